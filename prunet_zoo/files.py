"""Files that are either whole or absent: written under a temporary name, flushed, renamed; and their sha256."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from prunet_zoo.errors import PrunetError


class WriteError(PrunetError, OSError):
    """A file could not be written; what stood there before is untouched."""


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write ``data`` to ``path`` so that a crash or a full disk leaves the old file or the new one, never a part.

    Raises:
        WriteError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException as error:  # a signal too must leave no temporary file
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise WriteError(
            f"cannot write {path} ({len(raw) / 1e6:.1f} MB): {error.strerror or error}. "
            "Nothing was overwritten; free some space or choose another folder."
        ) from error


def sha256_of(path: Path) -> str:
    """64 hex digits of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: str | Path, data: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
