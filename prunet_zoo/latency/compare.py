"""Comparing latencies: networks or backends measured in turn, or the records of two runs.

In turn (`prunet_zoo.latency.compare_now`): the 95% interval of a ratio is from drawing the rounds again, the same for
both (bootstrap, Efron 1979), so what slows a round of both does not widen it. From files: each record has its own
interval, and the interval of a ratio is combined from both (MOVER, Zou & Donner 2008, on logarithms). A difference
counts when that interval excludes 1.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from prunet_zoo.errors import LatencyError, few
from prunet_zoo.latency.jsonlines import dump_line
from prunet_zoo.latency.predictions import kendall
from prunet_zoo.latency.record import Record, Timing, read_records
from prunet_zoo.spec import Frozen

SETTING = ("device", "accelerator", "backend", "backend_version", "dtype", "threads", "memory_format")
RESAMPLES = 2000


class Ratio(Frozen):
    """How long ``other`` takes relative to ``base``, with the 95% interval: below 1 it is faster. Latencies in ms."""

    base: str
    other: str
    base_ms: float = Field(gt=0.0)
    other_ms: float = Field(gt=0.0)
    ratio: float = Field(gt=0.0)
    low: float = Field(ge=0.0)
    high: float = Field(gt=0.0)
    disturbed: bool = False  # one of the two was: the interval does not cover that

    @property
    def differs(self) -> bool:
        """Whether the difference is larger than the interval."""
        return self.low > 1 or self.high < 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, every field."""
        return {**self.model_dump(mode="json"), "differs": self.differs}


class Summary(Frozen):
    """Ratios of one pair of runs or backends over several networks.

    ``changed``: what differs between the two but the network, as field → (base, other). ``left_out``: what was not
    compared, and why.
    """

    base: str
    other: str
    changed: dict[str, tuple[str, str]]
    ratios: tuple[Ratio, ...]
    left_out: tuple[str, ...] = ()

    @property
    def geometric_mean(self) -> float:
        """Of the ratios."""
        return math.exp(sum(math.log(r.ratio) for r in self.ratios) / len(self.ratios))

    @property
    def tau(self) -> float | None:
        """Kendall's τ of the two orders; None for fewer than two networks."""
        return kendall([r.base_ms for r in self.ratios], [r.other_ms for r in self.ratios])

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data with the statistics."""
        return {
            "base": self.base,
            "other": self.other,
            "changed": {field: list(pair) for field, pair in self.changed.items()},
            "ratios": [ratio.to_dict() for ratio in self.ratios],
            "left_out": list(self.left_out),
            "geometric_mean": self.geometric_mean,
            "tau": self.tau,
            "larger_than_interval": sum(ratio.differs for ratio in self.ratios),
        }


def paired_interval(base: Sequence[float], other: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% interval of the ratio of two latencies, relative to that ratio.

    Args:
        base, other: median latency in ms of each round, the same rounds in the same order.
        seed: of the resampling.

    Returns:
        (low, high), to be multiplied with the ratio of ``other`` to ``base``; low ≤ 1 ≤ high.
    """
    rounds = np.asarray([base, other], dtype=np.float64)  # (2, n)
    drawn = np.random.default_rng(seed).integers(rounds.shape[1], size=(RESAMPLES, rounds.shape[1]))
    below, above = _quiet(rounds[:, drawn])
    centre = _quiet(rounds)
    low, high = np.quantile(above / below, (0.025, 0.975)) * centre[0] / centre[1]
    return min(1.0, float(low)), max(1.0, float(high))


def _quiet(rounds: np.ndarray) -> np.ndarray:
    """Median of the quieter third (as `prunet_zoo.latency.timing` does) along the last axis."""
    third = -(-rounds.shape[-1] // 3)
    return np.asarray(np.median(np.partition(rounds, third - 1, axis=-1)[..., :third], axis=-1))


def combine_intervals(base: Timing, other: Timing) -> tuple[float, float, float]:
    """Ratio of two independent latencies with its 95% interval: (ratio, low, high)."""
    middle = math.log(other.median_ms / base.median_ms)
    low = math.hypot(_log(other.median_ms, other.ci_low_ms), _log(base.ci_high_ms, base.median_ms))
    high = math.hypot(_log(other.ci_high_ms, other.median_ms), _log(base.median_ms, base.ci_low_ms))
    return math.exp(middle), math.exp(middle - low), math.exp(min(middle + high, 700.0))


def _log(above: float, below: float) -> float:
    return math.log(above / below) if below > 0 else math.inf


def compare_files(paths: Sequence[str | Path]) -> list[Summary]:
    """Compare the records of equal networks: each file with the first.

    Of several records of the same network, input size and batch the last one of a file counts.

    Raises:
        LatencyError: fewer than two files; one has no records, or records of several settings; or two files have no
            network in common at the same input size and batch.
    """
    if len(paths) < 2:
        raise LatencyError(f"comparing records needs two files or more, got {few(paths)}")
    logs = [_one_setting(path) for path in paths]
    return [_compare(paths[0], logs[0], path, log) for path, log in zip(paths[1:], logs[1:], strict=True)]


def _one_setting(path: str | Path) -> list[Record]:
    """A file's records; raises `LatencyError` unless all are of one device, backend and setting."""
    records = read_records(path)
    if not records:
        raise LatencyError(f"{path} holds no records; write some: python tools/latency.py measure ARCH --log {path}")
    for field in SETTING:
        values = sorted({str(getattr(record, field)) for record in records})
        if len(values) > 1:
            text = dump_line({field: getattr(records[0], field)}).strip("{}\n") + ","  # as lines have it
            raise LatencyError(
                f"{path} holds records of several settings ({field.replace('_', ' ')} {few(values)}), so it is not "
                f"clear which are to be compared; keep one in a file: grep -F {shlex.quote(text)} "
                f"{shlex.quote(str(path))} > NEW.jsonl"
            )
    return records


Key = tuple[str, tuple[int, int], int]  # spec hash (or name), input size, batch


def _key(record: Record) -> Key:
    return (record.spec_hash or record.spec_name, record.input_size, record.batch)


def _compare(base_path: str | Path, base: list[Record], other_path: str | Path, other: list[Record]) -> Summary:
    mine, theirs = ({_key(record): record for record in log} for log in (base, other))
    ratios = []
    for key in mine:
        if key in theirs and mine[key].median_ms > 0 and theirs[key].median_ms > 0:
            a, b = mine[key], theirs[key]
            ratio, low, high = combine_intervals(a, b)
            name = a.spec_name if a.spec_name == b.spec_name else f"{a.spec_name} = {b.spec_name}"
            ratios.append(
                Ratio(
                    base=name,
                    other=name,
                    base_ms=a.median_ms,
                    other_ms=b.median_ms,
                    ratio=ratio,
                    low=low,
                    high=high,
                    disturbed=bool(a.disturbed or b.disturbed),
                )
            )
    left_out = _left_out(mine, theirs)
    if not ratios:
        raise LatencyError(
            f"{base_path} and {other_path} have no network in common at the same input size and batch: "
            f"{'; '.join(left_out[:4])}"
        )
    changed = {f: (str(getattr(base[0], f)), str(getattr(other[0], f))) for f in SETTING}
    return Summary(
        base=str(base_path),
        other=str(other_path),
        changed={field: pair for field, pair in changed.items() if pair[0] != pair[1]},
        ratios=tuple(ratios),
        left_out=tuple(left_out),
    )


def _left_out(mine: dict[Key, Record], theirs: dict[Key, Record]) -> list[str]:
    """What only one side has, with the reason: another input size or batch, or not measured at all."""
    reasons = []
    for one, rest, side in ((mine, theirs, "first"), (theirs, mine, "second")):
        for key, record in one.items():
            if key in rest:
                continue
            twins = [_how(r) for k, r in rest.items() if k[0] == key[0]]
            if twins and side == "second":
                continue  # said already, from the other side
            what = f"{record.spec_name}, {_how(record)}"
            reasons.append(f"{what} is not comparable with {few(twins)}" if twins else f"{what}: only in the {side}")
    return reasons


def _how(record: Record) -> str:
    height, width = record.input_size
    return f"{height}×{width} px, batch {record.batch}"
