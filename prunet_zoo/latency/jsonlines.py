"""Files of JSON lines that grow as things are measured and survive an interruption.

An interrupted append leaves a last line that is cut short: readers drop it, and it is cut off before the next append.
A last line that lacks its end alone is whole: it is read, and the next append ends it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prunet_zoo.files import WriteError


def dump_line(row: Any) -> str:
    """One line of JSON."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def split_lines(raw: bytes) -> tuple[list[bytes], int]:
    """The whole lines of a file's bytes, without their ends, and where the last of them ends."""
    *lines, rest = raw.split(b"\n")
    if isinstance(parse_line(rest), dict):  # lacks its end alone; anything else was cut short
        return [*lines, rest], len(raw)
    return lines, len(raw) - len(rest)


def parse_line(line: bytes) -> Any:
    """A line's data; None where it is damaged."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def append_lines(path: str | Path, rows: Iterable[Any], end: int, what: str, advice: str) -> int:
    """Append ``rows`` after byte ``end``, on lines of their own, flushed to the disk; returns the new end.

    Raises:
        WriteError: the disk is full or the file cannot be written; it holds what it held before. The message names the
            file as ``what`` and ends in ``advice``.
    """
    data = "".join(map(dump_line, rows)).encode()
    try:
        with open(path, "r+b") as file:
            file.seek(max(0, end - 1))
            if file.read(min(1, end)) not in (b"", b"\n"):
                data = b"\n" + data
            try:
                file.truncate(end)
                file.seek(end)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, end)
                raise
    except OSError as error:
        raise WriteError(f"cannot append to {what} {path}: {error.strerror or error}. {advice}") from error
    return end + len(data)
