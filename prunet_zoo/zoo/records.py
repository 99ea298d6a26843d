"""Checksums of downloads, beside them: ``<file>.sha256`` in the format of ``sha256sum``.

Upstream publishes none for most files. Then the first download that could be read records the one it got, and every
later one is held to it: this does not prove that the first was right, but that a later one is the same.
"""

from __future__ import annotations

import re
from pathlib import Path

from prunet_zoo.files import write_atomic
from prunet_zoo.zoo.fetch import DownloadError


def record_path(archive: Path) -> Path:
    """Where the checksum of ``archive`` is recorded."""
    return archive.with_name(archive.name + ".sha256")


def read_record(archive: Path) -> str | None:
    """The recorded sha256; None: nothing is recorded.

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
    return found[1].lower()


def write_record(archive: Path, sha256: str) -> None:
    """Record the sha256 of ``archive``; ``sha256sum --check`` reads it."""
    write_atomic(record_path(archive), f"{sha256}  {archive.name}\n")
