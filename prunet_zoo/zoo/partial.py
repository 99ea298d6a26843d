"""An unfinished download: the bytes in ``<file>.part``, and in ``<file>.part.json`` the address they came from.

The part outlives the process that began it, so it must never be continued with the bytes of another file: it records
what the server called this version of the file (ETag, Last-Modified) and how long it said the file is.
"""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path

from pydantic import ValidationError

from prunet_zoo.files import write_json
from prunet_zoo.jsonfile import Frozen


class Origin(Frozen):
    """Where the bytes of a part come from. ``total`` is the length of the whole file in bytes, None if not told."""

    url: str
    etag: str | None = None
    last_modified: str | None = None
    total: int | None = None

    @property
    def validator(self) -> str | None:
        """What If-Range takes: a strong ETag, else the date; None: the server cannot tell whether the file changed."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified


class Part:
    """The unfinished file beside ``target``."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".part")
        self.record = target.with_name(target.name + ".part.json")

    @property
    def size(self) -> int:
        """Bytes that are there."""
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def origin(self) -> Origin | None:
        """What is known of the bytes; None: nothing, so they cannot be continued."""
        try:
            return Origin.model_validate_json(self.record.read_text("utf-8"), strict=True)
        except (FileNotFoundError, UnicodeDecodeError, ValidationError):
            return None

    @property
    def complete(self) -> bool:
        """Whether all bytes of the file are there, by the length that its server told."""
        origin = self.origin
        return origin is not None and origin.total == self.size > 0

    def continues(self, url: str) -> int:
        """Bytes from which a download of ``url`` may go on; 0: from the beginning."""
        origin = self.origin
        if origin is None or origin.url != url or origin.validator is None:
            return 0
        return self.size if origin.total is None or self.size <= origin.total else 0

    def begin(self, origin: Origin) -> None:
        """Forget the bytes that are there and note where the next come from; in this order, whatever interrupts it."""
        self.discard()
        write_json(self.record, origin.to_dict())

    def open(self) -> FileIO:
        """The file, to append to; unbuffered, so that a killed process loses nothing it has received."""
        return self.path.open("ab", buffering=0)

    def discard(self) -> None:
        """Remove the part and its record."""
        self.path.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)

    def install(self) -> None:
        """Flush the bytes to the disk and give them their name."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.path, self.target)
        self.record.unlink(missing_ok=True)
        if os.name == "posix":  # the new name, too, is to survive a power failure
            folder = os.open(self.target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
