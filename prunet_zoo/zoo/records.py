"""Checksums of downloads, beside them: ``<file>.sha256`` in the format of ``sha256sum``.

Upstream publishes none for most files. Then the first download that could be read records the one it got, and every
later one is held to it: this does not prove that the first was right, but that a later one is the same. A server may
pack a zip anew for each request, so the checksum of the checkpoint in it is recorded too, and is what counts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from prunet_zoo.files import write_atomic
from prunet_zoo.zoo.fetch import DownloadError


def record_path(archive: Path) -> Path:
    """Where the checksum of ``archive`` is recorded."""
    return archive.with_name(archive.name + ".sha256")


class Recorded(NamedTuple):
    """sha256 of an archive, and of the checkpoint in it where that was recorded."""

    sha256: str
    checkpoint: str | None = None


def read_record(archive: Path) -> Recorded | None:
    """What is recorded of ``archive``; None: nothing.

    Raises:
        DownloadError: the record is damaged; what it said cannot be ignored.
    """
    path = record_path(archive)
    try:
        text = path.read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DownloadError(f"the checksum recorded in {path} cannot be read: {error.strerror or error}") from error
    found = re.match(r"([0-9a-fA-F]{64})(\s|$)", text)
    if found is None:
        raise DownloadError(
            f"{path} does not begin with a sha256 (64 hex digits); write the right one there, or delete the file to "
            "have it recorded anew at the next download"
        )
    inner = re.search(r"^# ([0-9a-f]{64})  ", text, re.MULTILINE)
    return Recorded(found[1].lower(), inner[1] if inner else None)


def write_record(archive: Path, recorded: Recorded) -> None:
    """Record what ``archive`` is; ``sha256sum --check`` reads it, and takes the second line for a comment."""
    inner = f"# {recorded.checkpoint}  the checkpoint in it, however it is packed\n" if recorded.checkpoint else ""
    write_atomic(record_path(archive), f"{recorded.sha256}  {archive.name}\n{inner}")
