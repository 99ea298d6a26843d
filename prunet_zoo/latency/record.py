"""One measurement as a record: the figures and everything they depend on; and the log that records are kept in."""

from __future__ import annotations

import datetime
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import Field

from prunet_zoo.errors import LatencyError, SpecError
from prunet_zoo.files import WriteError, write_atomic
from prunet_zoo.latency.jsonlines import append_lines, dump_line, parse_line, split_lines
from prunet_zoo.spec import Frozen, parse

ATTEMPTS = 5  # measurements of a network at most until two agree undisturbed, unless told otherwise
LOCK_SECONDS = 30.0  # an append takes milliseconds


class Timing(Frozen):
    """Latency in ms with its spread: the statistic ``median_ms`` (`prunet_zoo.latency.timing`) with its 95% interval
    ``ci_low_ms`` to ``ci_high_ms``, percentiles and counts of all runs."""

    median_ms: float = Field(ge=0.0)
    ci_low_ms: float = Field(ge=0.0)
    ci_high_ms: float = Field(ge=0.0)
    p10_ms: float = Field(ge=0.0)
    p90_ms: float = Field(ge=0.0)
    n: int = Field(ge=1)
    rounds: int = Field(ge=1)
    warmup_runs: int = Field(ge=0)
    interrupted: int = Field(default=0, ge=0)  # runs that count with their CPU time

    @property
    def precision(self) -> float:
        """Half the width of the interval, relative to the median; 0 where the median is 0."""
        return (self.ci_high_ms - self.ci_low_ms) / (2 * self.median_ms) if self.median_ms else 0.0


class Record(Timing):
    """One measurement with everything it depends on. JSON in and out (`to_dict`, `from_dict`).

    ``disturbed``: why the figure is not to be relied on, in plain words with figures; empty: nothing was found.
    ``attempts``: measurements made; ``median_ms`` and its interval are of the fastest and of those that agree with it,
    percentiles and counts of all. ``clock``: speed of the processor and what else ran meanwhile, of the least disturbed
    of those that agree (`prunet_zoo.latency.conditions`), and ``visits_ms``, the figure of each measurement.
    ``fingerprint``: `prunet_zoo.latency.device.fingerprint`.
    ``spec``: the network's whole spec; None, with an empty ``spec_hash``, for a network of timm.
    """

    spec_name: str
    spec_hash: str
    spec: dict[str, Any] | None
    input_size: tuple[int, int]
    device: str
    accelerator: str
    backend: str
    backend_version: str
    dtype: str
    batch: int
    threads: int
    memory_format: str
    disturbed: tuple[str, ...]
    attempts: int = Field(ge=1)
    seconds: float | None = None  # asked for each attempt; None in records of before this was kept
    clock: dict[str, Any]
    fingerprint: dict[str, Any]
    date: str  # ISO 8601, UTC

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, every field."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, data: Any) -> Record:
        """Read back what `to_dict` gave; raises `SpecError` naming the field."""
        return parse(cls, data, "latency record")


def now() -> str:
    """The time in ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def read_records(path: str | Path) -> list[Record]:
    """Read a log of records; a last line that was cut short is dropped.

    Raises:
        LatencyError: the file is missing, or a line before the last is no record.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise LatencyError(
            f"latency log {path} cannot be read ({error.strerror or error}); "
            f"write one: python tools/latency.py measure ARCH --log {path}"
        ) from None
    lines, _ = split_lines(raw)
    _check_log(path, raw, lines)
    return [_record(path, number, line) for number, line in enumerate(lines, 1)]


def check_log(path: str | Path) -> None:
    """Find out whether `append_record` could append to a log, before time is spent on what it is to hold.

    Raises:
        LatencyError: the file is no log of records.
        WriteError: it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("r+b"):
                pass
        except FileNotFoundError:  # nothing of that name is made or removed: another process may write it meanwhile
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
                return
    except OSError as error:
        raise _not_written(path, error) from error
    read_records(path)


def append_record(path: str | Path, record: Record) -> None:
    """Append a record to a log of JSON lines, which is made if it is missing.

    The line is on the disk when this returns; an interruption leaves at worst a last line that is cut short. Two
    processes may append to the same log: they wait for each other (a file ``<path>.lock`` beside it).

    Raises:
        LatencyError: the file is no log of records, or another process holds its lock.
        WriteError: it cannot be written; it holds what it held before.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=LOCK_SECONDS, poll_interval=0.01):
            if not path.exists():
                write_atomic(path, dump_line(record.to_dict()))
                return
            raw = path.read_bytes()
            lines, end = split_lines(raw)
            _check_log(path, raw, lines)
            append_lines(path, [record.to_dict()], end, "latency log", "The records before are kept.")
    except Timeout:
        raise LatencyError(
            f"latency log {path} is locked by another process for more than {LOCK_SECONDS:g} s; "
            f"end that process, or name another file"
        ) from None
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> WriteError:
    return WriteError(f"cannot write latency log {path}: {error.strerror or error}; name another file")


def _check_log(path: str | Path, raw: bytes, lines: list[bytes]) -> None:
    """Raise `LatencyError` unless a file begins as a log does: an append must not end up in another file."""
    if lines:
        _record(path, 1, lines[0])
    elif not dump_line({"median_ms": 0}).encode().startswith(raw[:11]):  # at most a first line that was cut short
        raise LatencyError(f"{path} is not a log of latency records; name another file")


def _record(path: str | Path, number: int, line: bytes) -> Record:
    try:
        return Record.from_dict(parse_line(line))
    except SpecError as error:
        raise LatencyError(
            f"{path}, line {number} is no record of this version ({error}); name another file or delete the line"
        ) from None
