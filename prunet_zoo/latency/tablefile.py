"""The file of a latency table: JSON lines, appended as they are measured.

The first line is the header (what was measured, on what). Then one line an entry:

    {"kind": "block", "block": {…}, "in_channels": 32, "in_size": [8, 8], "ms": 0.0042, "seconds": 0.06, …}
    {"kind": "fixed", "part": "stem", "ms": 0.0051, …}
    {"kind": "network", "encoding": [[0, 64], null, …], "ms": 0.0935, …}
    {"kind": "correction", "scale": 1.02, …}

``seconds``: time that was asked for; ``slow``: whether the processor was. A correction counts where no other line
follows it: otherwise the table is being built.

An interrupted append leaves a last line that is cut short: it is dropped, and cut off before the next append.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from prunet_zoo.errors import LatencyError, SpecError
from prunet_zoo.files import write_atomic
from prunet_zoo.latency.jsonlines import append_lines, dump_line, parse_line, split_lines
from prunet_zoo.space import SearchSpace
from prunet_zoo.spec import Frozen, parse

FORMAT = 1


class Header(Frozen):
    """What a table is of. All fields but ``date`` and the name must agree where a table is resumed."""

    kind: Literal["header"] = "header"
    format: Literal[1] = 1
    device: str
    accelerator: str
    backend: str
    backend_version: str
    dtype: str
    batch: int
    threads: int
    memory_format: str = "contiguous"
    fingerprint: dict[str, Any] = Field(default_factory=dict)  # of the machine that began the table
    space_name: str
    space_hash: str
    input_size: tuple[int, int]
    date: str
    space: dict[str, Any]

    def search_space(self) -> SearchSpace:
        """The space whose blocks the table holds."""
        return SearchSpace.from_dict(self.space)


def read_table(path: str | Path) -> tuple[Header, list[dict[str, Any]], int]:
    """Read a table's file.

    Returns:
        (header, entries, bytes up to the end of the last whole line).

    Raises:
        LatencyError: missing, not a table, of another format, or damaged before its last line.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise LatencyError(
            f"latency table {path} cannot be read ({error.strerror or error}); "
            f"build it: python tools/latency.py table SPACE --out {path}"
        ) from None
    lines, end = split_lines(raw)
    rows = [_parse_line(path, number, line) for number, line in enumerate(lines, 1)]
    if not rows or rows[0].get("kind") != "header":
        raise _no_table(path)
    if rows[0].get("format") != FORMAT:
        raise LatencyError(f"{path} has format {rows[0].get('format')!r}, this version reads {FORMAT}; build it again")
    try:
        header = parse(Header, rows[0], f"header of latency table {path}")
    except SpecError as error:
        raise LatencyError(str(error)) from None
    return header, rows[1:], end


def _parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    row = parse_line(line)
    if not isinstance(row, dict) or "kind" not in row:
        if number == 1:
            raise _no_table(path)
        raise LatencyError(f"{path}, line {number} is damaged; delete it and build the table again to fill the gap")
    return row


def _no_table(path: Path) -> LatencyError:
    return LatencyError(f"{path} is not a latency table: its first line is no header; give another file")


def start_table(path: str | Path, header: Header) -> None:
    """Write a new table with nothing but its header."""
    write_atomic(path, dump_line(header.model_dump(mode="json")))


def append(path: str | Path, rows: Iterable[dict[str, Any]], end: int) -> int:
    """Append ``rows`` after byte ``end``, flushed to the disk; returns the new end.

    Raises:
        WriteError: the disk is full; the file holds what it held before.
    """
    advice = "What was measured before is kept; free some space and run the same command again to go on."
    return append_lines(path, rows, end, "latency table", advice)


def check_same(path: str | Path, header: Header, asked: dict[str, Any]) -> None:
    """Raise `LatencyError` naming both sides when ``asked`` (fields of the header) differs from the table."""
    for field, value in asked.items():
        mine = getattr(header, field)
        if mine != value:
            name = field.replace("_", " ")
            raise LatencyError(
                f"latency table {path} is of {name} {mine!r}, but {name} {value!r} is asked for; "
                "give the table that fits, or another file name to build one"
            )


def check_space(path: str | Path, header: Header, asked: SearchSpace) -> None:
    """Raise `LatencyError` naming the fields in which the table's space differs from the one ``asked`` for."""
    if header.space_hash == asked.hash:
        return
    mine, other = (s.model_dump(mode="json", exclude={"name"}) for s in (header.search_space(), asked))
    fields = list(_differences(mine, other)) or [f"hash {header.space_hash}, not {asked.hash}"]
    more = f" and {len(fields) - 4} more" if len(fields) > 4 else ""
    advice = "give the table that fits, or another file name to build one"
    if [field.split()[0] for field in fields] == ["num_classes"]:
        advice += f": python tools/latency.py table {asked.name} --num-classes {asked.num_classes} --out FILE"
    raise LatencyError(
        f"latency table {path}: its space {header.space_name!r} differs from the {asked.name!r} asked for: "
        f"{', '.join(fields[:4])}{more}; {advice}"
    )


def _differences(mine: Any, asked: Any, field: str = "") -> Iterator[str]:
    """Where two spaces as JSON data differ: "field value, not value"."""
    if isinstance(mine, dict) and isinstance(asked, dict):
        for key in mine:  # both have every field
            yield from _differences(mine[key], asked[key], f"{field}.{key}".lstrip("."))
    elif isinstance(mine, list) and isinstance(asked, list) and any(isinstance(v, dict) for v in mine + asked):
        if len(mine) != len(asked):
            yield f"{field} has {len(mine)} entries, not {len(asked)}"
        for i, pair in enumerate(zip(mine, asked, strict=False)):
            yield from _differences(*pair, f"{field}[{i}]")
    elif mine != asked:
        yield f"{field} {mine}, not {asked}"
