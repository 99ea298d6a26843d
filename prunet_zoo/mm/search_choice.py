"""The architecture found: proposed, measured where the device is at hand, and how far its latency can be trusted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunet_zoo.errors import PrunetError, SpecError, TrainingError
from prunet_zoo.files import write_json
from prunet_zoo.latency import Record, Setting, get_backend, measure
from prunet_zoo.search.target import TargetHitter
from prunet_zoo.space import Encoding

if TYPE_CHECKING:
    from prunet_zoo.mm.search_loop import SearchLoop

SECONDS, ATTEMPTS = 0.6, 3  # of a measurement: time for its runs, how often it is made at most until two agree
QUICK = 0.15  # time for the runs of one that is only to rank networks; it is made once


@dataclass(frozen=True)
class Chosen:
    """The architecture found and how far its latency can be trusted.

    ``status`` is "measured" (it meets the target; ``reason`` says what there is to doubt), "predicted" (it cannot be
    measured here, ``reason`` says why; it meets the target by the cost's word) or "missed: …". ``measured`` is a
    latency record, None where it was not measured; ``correction`` the factor by which measured networks like it differ
    from the table, 1 where its word was taken. ``tries``: how many networks were measured; ``trials``: those of them
    that are told in the report; ``verify``: how many were to be measured at most; ``epoch``: before which epoch it was
    chosen, the number of epochs where all were over; ``seconds`` and ``peak_mb`` of exploring and choosing.
    """

    encoding: Encoding
    status: str
    reason: str | None = None
    measured: dict[str, Any] | None = None
    correction: float = 1.0
    trials: list[dict[str, Any]] = field(default_factory=list)
    tries: int = 0
    verify: int = 0
    epoch: int = 0
    seconds: float = 0.0
    peak_mb: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Chosen:
        """The inverse of `to_dict`."""
        encoding = tuple(None if choice is None else (choice[0], choice[1]) for choice in data["encoding"])
        return cls(**{"tries": len(data["trials"]), **data, "encoding": encoding})


def choose(loop: SearchLoop, path: Path, tell: Callable[[str], None] = lambda line: None) -> Chosen:
    """The architecture found: with ``loop.verify`` the one that measures what was asked for, see `TargetHitter`.

    What is measured is kept in ``path``, so that a run that is stopped here goes on with the same figures. Where the
    method has measured its network itself, that counts.
    """
    target, cost, space = loop.strategy.status()["target"], loop.cost, loop.searched.space
    own = loop.strategy.measured_choice()
    if own is not None:
        trials = [dict(trial) for trial in own.trials]
        return _chosen(own.encoding, own.missed, own.doubt, measured=own.record, trials=trials, tries=own.networks)
    source = cost.describe()
    why = why_not_measured(source)
    if why is not None:
        missed = loop.strategy.missed()
        return Chosen(loop.strategy.finish(), f"missed: {missed}" if missed else "predicted", why)
    if not loop.verify:
        encoding = loop.strategy.finish()
        measured = measure_like(space.decode(encoding), source)
        off = measured["median_ms"] / target - 1
        doubt = f"the measurement was disturbed: {'; '.join(measured['disturbed'])}" if measured["disturbed"] else None
        missed = f"the table's word was taken (--verify 0), the network measures {100 * off:+.1f}% off the target"
        missed += f"; {doubt}" if doubt else ""
        return _chosen(encoding, None if loop.strategy.lowest - 1 < off <= 0 else missed, doubt, measured=measured)
    log = TrialLog(path, lambda spec: measure_like(spec, source))
    found = TargetHitter(space, cost, loop.strategy.finish, log, target, loop.verify, tell).run()
    return _chosen(
        found.trial.encoding,
        found.missed,
        found.doubt,
        measured=found.trial.record,
        correction=found.correction,
        trials=[trial.to_dict() for trial in found.trials],
        tries=len(found.trials),
    )


def _chosen(encoding: Encoding, missed: str | None, doubt: str | None = None, **figures: Any) -> Chosen:
    if missed is None:
        return Chosen(encoding, "measured", doubt, **figures)
    return Chosen(encoding, f"missed: {missed}", missed, **figures)


class TrialLog:
    """Measures, and keeps what was measured in a file, in order; what the file holds already is not measured again.

    Raises:
        TrainingError: the file is damaged.
    """

    def __init__(self, path: Path, measure: Callable[[Any], dict[str, Any]]) -> None:
        self.path, self.measure, self.used = path, measure, 0
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            try:
                self.rows = _read(path)
            except (ValueError, SpecError) as error:
                raise TrainingError(f"{path} is damaged ({error}); remove it to measure again") from None

    def __call__(self, spec: Any, noted: dict[str, Any]) -> dict[str, Any]:
        """The record of a network; ``noted`` is kept with it."""
        if self.used == len(self.rows) or self.rows[self.used]["spec_hash"] != spec.hash:
            del self.rows[self.used :]
            self.rows.append({**noted, "record": self.measure(spec)})
            write_json(self.path, self.rows)
        self.used += 1
        return dict(self.rows[self.used - 1]["record"])


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a `TrialLog`; raises `ValueError` or `SpecError` for a file that is not whole."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise SpecError("it holds no JSON list")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("spec_hash"), str):
            raise SpecError(f"row {number} has no spec_hash")
        if Record.from_dict(row.get("record")).median_ms == 0:
            raise SpecError(f"row {number} has a latency of 0")
    return rows


def _setting(source: dict[str, Any]) -> dict[str, Any]:
    return {key: source[key] for key in ("threads", "dtype", "batch", "accelerator", "memory_format") if key in source}


def why_not_measured(source: dict[str, Any]) -> str | None:
    """Why a network cannot be measured here as its cost was (`Cost.describe`); None where it can."""
    if "backend" not in source:
        return "what was searched for is no latency"
    other = f"the latencies are of {source['device']} with {source['backend']}, which this machine lacks"
    try:
        backend = get_backend(source["backend"])
        backend.check(Setting(**_setting(source)))
        mine = backend.device_name(source["accelerator"])
    except PrunetError as error:
        return f"{other}: {error}"
    known = mine == source["device"] or mine.startswith(tuple(source.get("devices", ())))
    return None if known else f"{other}: it has {mine}"


def measure_like(spec: Any, source: dict[str, Any], quick: bool = False) -> dict[str, Any]:
    """Measure a network (spec, or module with one) the way its table was measured (`Cost.describe`); returns the record
    as plain data. ``quick``: enough to rank networks."""
    seconds, attempts = (QUICK, 1) if quick else (SECONDS, ATTEMPTS)
    return measure(spec, source["backend"], **_setting(source), seconds=seconds, attempts=attempts).to_dict()
