"""Whether a measurement was disturbed, and by what."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from prunet_zoo.latency import nvidia
from prunet_zoo.latency.backends import Session, Setting
from prunet_zoo.latency.machine import Meanwhile, Snapshot, meanwhile, snapshot
from prunet_zoo.latency.record import Timing
from prunet_zoo.latency.references import NAMES, References
from prunet_zoo.latency.timing import MIN_CLEAN, Series, summarise

CLEAN_SHARE = 0.1  # of the rounds must be at full speed; the others do not count
WIDE = 0.015  # half the width of an interval that says little
DRIFT = 0.02  # difference of the statistic between two halves of the time
TAKEN = 0.25  # of the time that other processes had the processor: caches are cold after it
STEAL = 0.05  # of a core, by the hypervisor
CROWDED = 0.25  # cores that others kept busy beyond those that were free


@dataclass(frozen=True)
class Verdict:
    """A timing, why it is not to be relied on (empty: nothing found), and what was seen.

    ``reasons``: something disturbed it. ``doubts``: it varies more than it should; another that agrees removes these.
    """

    timing: Timing
    reasons: tuple[str, ...]
    doubts: tuple[str, ...]
    clock: dict[str, Any]


class Watch:
    """What is watched from its making to `stop`. ``look`` is called during the runs, when the device is warm."""

    def __init__(self, setting: Setting, cores: float, references: References | None, gpu: str | None) -> None:
        self.setting, self.cores, self.references, self.gpu = setting, cores, references, gpu
        self.before: Snapshot = snapshot()
        self.during: Meanwhile | None = None
        self.gpu_states: list[dict[str, Any]] = []
        self.gpu_others: list[int] | None = None
        self.look: Callable[[], None] | None = None if gpu is None else self._look

    def _look(self) -> None:
        if self.gpu is not None:
            self.gpu_states.append(nvidia.gpu_state(self.gpu))

    def stop(self) -> None:
        """The measurement is over: take what happened meanwhile."""
        self.during = meanwhile(self.before, snapshot())
        if self.gpu is not None:
            self.gpu_others = nvidia.other_processes(self.gpu)

    def judge(self, session: Session, series: Series) -> Verdict:
        """Judge the runs of one session; call `stop` before."""
        if self.during is None:
            raise RuntimeError("Watch.stop comes before Watch.judge")
        timing = series.timing(self.references)
        clean = series.clean(self.references)
        drift = _drift(series, clean)
        taken = max(0.0, 1 - series.cpu_s / series.wall_s) if session.in_thread and series.wall_s else None
        reasons = [
            *self._speed(series, clean),
            *self._machine(self.during, taken, session.solo),
            *nvidia.gpu_reasons(self.gpu_states, self.gpu_others, DRIFT),
        ]
        doubts = [*wide(timing), *_drifting(drift)]
        return Verdict(timing, tuple(reasons), tuple(doubts), self._clock(self.during, series, clean, taken, drift))

    def _speed(self, series: Series, clean: list[bool]) -> list[str]:
        share = sum(clean) / len(clean)
        if self.references is None or share >= CLEAN_SHARE:
            return []
        slow = statistics.median(self.references.slowness(pair) for pair in series.looks)
        rounds = f"{1 - share:.0%} of {len(clean)} rounds"
        return [f"the processor was slower than its best in {rounds}, in the middle by {slow:.0%}"]

    def _machine(self, seen: Meanwhile, taken: float | None, solo: bool) -> list[str]:
        reasons = []
        if taken is not None and taken > TAKEN:
            reasons.append(f"other processes had the processor for {taken:.0%} of the time")
        free = max(0.0, self.cores - self.setting.threads)
        counts = taken is None and not solo  # in one thread `taken` says it better; a process of its own is an "other"
        if counts and seen.others is not None and seen.others > free + CROWDED:
            reasons.append(f"other processes used {seen.others:.1f} cores, {free:g} were free")
        if seen.steal is not None and seen.steal > STEAL:
            reasons.append(f"the hypervisor gave {seen.steal:.0%} of a core to other machines")
        if seen.throttled:
            reasons.append(f"the CPU was throttled for its heat {seen.throttled} times")
        return reasons

    def _clock(
        self, during: Meanwhile, series: Series, clean: list[bool], taken: float | None, drift: float
    ) -> dict[str, Any]:
        data: dict[str, Any] = {key: _short(value) for key, value in asdict(during).items()}
        data |= {"taken": _short(taken), "drift": _short(drift), "clean_rounds": sum(clean)}
        if self.references is not None and series.looks:
            looks = zip(*(look for pair in series.looks for look in pair), strict=True)
            data["reference_us"] = {n: _short(statistics.median(us)) for n, us in zip(NAMES, looks, strict=True)}
            data["best_us"] = {n: _short(us) for n, us in zip(NAMES, self.references.best, strict=True)}
        if self.gpu is not None:
            data |= {"gpu": self.gpu_states, "gpu_others": self.gpu_others}
        return data


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _drift(series: Series, clean: list[bool]) -> float:
    """How much more the statistic of one half of the time is than that of the other."""
    used = [group for group, good in zip(series.rounds, clean, strict=True) if good]
    if len(used) < 2 * MIN_CLEAN:
        used = series.rounds
    if len(used) < 2:
        return 0.0
    halves = [summarise(half, whole=series.solo).median_ms for half in (used[: len(used) // 2], used[len(used) // 2 :])]
    return max(halves) / min(halves) - 1 if min(halves) > 0 else 0.0


def wide(timing: Timing) -> list[str]:
    """The doubt that an interval raises, if it is wide."""
    return [f"the interval is ±{timing.precision:.1%} after {timing.rounds} rounds"] if timing.precision > WIDE else []


def _drifting(drift: float) -> list[str]:
    return [f"one half of the time was {drift:.1%} slower than the other"] if drift > DRIFT else []
