"""The timing loop.

The statistic, for a machine that others use too: runs are timed one by one, in short rounds. A round that something
else disturbed has a high median. The latency is the median over the runs of the *quieter third of the rounds*; the
10th and 90th percentiles are over all runs, so that a record shows how disturbed its machine was. On a quiet machine
the value lies slightly under the plain median. It is not the minimum: it is what a run takes when nothing else
happens. Its interval comes from drawing the rounds again (`interval`).

On one CPU thread a run that the system interrupted counts with its CPU time (`Session`), which is what makes networks
of tens of milliseconds measurable on a machine with more work than cores. What another process does to shared caches
and memory stays in the figure.

A session that makes all its runs in one call (`Session.solo`: ``trtexec``) is a protocol of its own: its latency is the
median over *all* its runs, as that of the published figures is, and its interval that of the median over all rounds.

Several networks that are to be compared are measured together, round by round in turn (`time_together`), so that a slow
minute slows all of them. The blocks of a table are run one by one in turn (`interleave`), so that each finds the
caches as it would inside a network, filled by the others.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends import Session
from prunet_zoo.latency.record import Timing
from prunet_zoo.latency.references import Look, References

ROUND_MS = 8.0  # long enough that a switch between networks does not matter, short enough to fall between disturbances
STABLE = 0.02  # warm-up ends when a round is within this of the best before it
EXTEND = 3  # a series that is to reach a precision takes at most so many times the time asked for, unless told
SOLO_ROUNDS = 30  # that the runs of a session are split into which are made in one call
LOOK_SECONDS = 0.5  # between looks at the device during such a call
DRAWS = 400  # resamples behind an interval
MIN_CLEAN = 5  # rounds at full speed that the statistic is taken from, where there are so many


@dataclass
class Series:
    """The runs of one session in ms, by rounds.

    ``looks``: how fast the processor was before and after each round; empty where nobody looked.
    ``wall_s``, ``cpu_s``: of all rounds, wall time and CPU time of the calling thread. ``solo``: as of the session.
    """

    warmup_runs: int = 0
    rounds: list[list[float]] = field(default_factory=list)
    looks: list[tuple[Look, Look]] = field(default_factory=list)
    interrupted: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    solo: bool = False

    def clean(self, references: References | None) -> list[bool]:
        """Of each round, whether the processor was at full speed before and after it; without looks, all are."""
        if references is None or not self.looks:
            return [True] * len(self.rounds)
        return references.are_clean(self.looks)

    def timing(self, references: References | None = None, among: Series | None = None) -> Timing:
        """Reduce to the statistic of this module, over the rounds at full speed if there are at least five.

        Args:
            references: what the rounds were judged by.
            among: the series that this one is a part of; percentiles and counts are of that. None: of this one.
        """
        whole = self if among is None else among
        used = [group for group, good in zip(self.rounds, self.clean(references), strict=True) if good]
        if len(used) < MIN_CLEAN:
            used = self.rounds
        return summarise(whole.rounds, whole.warmup_runs, whole.interrupted, used, self.solo)


def join_series(some: Sequence[Series]) -> Series:
    """Several series of one session as one."""
    return Series(
        warmup_runs=sum(series.warmup_runs for series in some),
        rounds=[group for series in some for group in series.rounds],
        looks=[look for series in some for look in series.looks],
        interrupted=sum(series.interrupted for series in some),
        wall_s=sum(series.wall_s for series in some),
        cpu_s=sum(series.cpu_s for series in some),
        solo=any(series.solo for series in some),
    )


def summarise(
    rounds: Sequence[Sequence[float]],
    warmup_runs: int = 0,
    interrupted: int = 0,
    used: Sequence[Sequence[float]] | None = None,
    whole: bool = False,
) -> Timing:
    """Reduce runs (ms), grouped by round, to the statistic of this module.

    Args:
        rounds: all rounds; the percentiles and counts are theirs.
        warmup_runs: runs made before.
        interrupted: runs that the system interrupted.
        used: the rounds that the median and its interval are taken from; None: all.
        whole: take the median over all of these instead of over their quieter third.
    """
    if not rounds or not all(rounds):
        raise LatencyError("a latency needs at least one round with at least one run")
    used = rounds if used is None else used
    medians = [statistics.median(group) for group in used]
    quiet = sorted(zip(medians, used, strict=True), key=lambda pair: pair[0])
    quiet = quiet if whole else quiet[: _third(len(used))]
    value = statistics.median(t for _, group in quiet for t in group)
    low, high = interval(medians, whole)
    everything = sorted(t for group in rounds for t in group)
    last = len(everything) - 1
    return Timing(
        median_ms=value,
        ci_low_ms=value * min(1.0, low),
        ci_high_ms=value * max(1.0, high),
        p10_ms=everything[round(0.1 * last)],
        p90_ms=everything[round(0.9 * last)],
        n=len(everything),
        rounds=len(rounds),
        warmup_runs=warmup_runs,
        interrupted=interrupted,
    )


def _third(rounds: int) -> int:
    return -(-rounds // 3)


def interval(medians: Sequence[float], whole: bool = False) -> tuple[float, float]:
    """95% interval of the statistic, relative to it: percentile bootstrap over rounds (Efron 1979), seeded.

    Rounds are what is drawn, each with its median: runs of a round share what disturbs them. ``whole``: as of
    `summarise`.
    """
    rounds = np.sort(np.asarray(medians, dtype=np.float64))
    quiet = len(rounds) if whole else _third(len(rounds))
    drawn = np.random.default_rng(0).integers(len(rounds), size=(DRAWS, len(rounds)))
    drawn.partition(quiet - 1, axis=1)  # rounds are sorted: the lowest indices are the quieter rounds
    values = np.median(rounds[drawn[:, :quiet]], axis=1)
    centre = float(np.median(rounds[:quiet]))
    if centre == 0.0:
        return 1.0, 1.0
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low) / centre, float(high) / centre


def warm_up(session: Session, max_seconds: float = 0.25, min_seconds: float = 0.0) -> tuple[float, int]:
    """Run until a round is no more than 2% slower than the best before it, and a few runs more, within a time limit.

    Args:
        session: what to run.
        max_seconds: the limit.
        min_seconds: time to run at least: the clock of a GPU takes a while to rise.

    Returns:
        (latency of one run in ms, number of runs made).
    """
    start = time.perf_counter()
    best, runs = min(session.sample(2)), 2
    while True:
        group = session.sample(_runs_per_round(best))
        runs += len(group)
        now = statistics.median(group)
        settled = runs >= 5 and abs(now - best) <= STABLE * best
        best = min(best, now)
        elapsed = time.perf_counter() - start
        if (settled or elapsed > max_seconds) and elapsed >= min_seconds:
            return best, runs


def _runs_per_round(ms: float) -> int:
    return max(1, min(1000, round(ROUND_MS / max(ms, 1e-4))))


def time_together(sessions: Sequence[Session], seconds: float = 0.4, min_rounds: int = 9) -> list[Timing]:
    """Time several sessions in turn, a round each, for about ``seconds`` each; all see the same disturbances."""
    return [series.timing() for series in run_rounds(sessions, seconds, min_rounds)]


def run_rounds(
    sessions: Sequence[Session],
    seconds: float = 0.4,
    min_rounds: int = 9,
    precision: float | None = None,
    references: References | None = None,
    warm_seconds: float = 0.0,
    patience: int = EXTEND,
    look: Callable[[], None] | None = None,
) -> list[Series]:
    """Run several sessions in turn, a round each.

    Args:
        sessions: what to run. One whose runs are made in one call (`Session.solo`) has its turn alone, before the
            others.
        seconds: time for each.
        min_rounds: rounds of each at least.
        precision: half the width that the relative interval of a session may have; while it is wider, or less than half
            of the planned rounds were at full speed, the session gets more rounds, up to ``patience`` times as many and
            ``patience`` times ``seconds``. None: ``seconds`` alone count.
        references: how to look at the speed of the processor, before and after each round.
        warm_seconds: time to warm up at least.
        look: called after the warm-up and after the last round; during a call that makes all runs, twice a second.
    """
    found = {i: _run_solo(session, seconds, look) for i, session in enumerate(sessions) if session.solo}
    others = [i for i in range(len(sessions)) if i not in found]
    if others:
        chosen = [sessions[i] for i in others]
        rows = _run_in_rounds(chosen, seconds, min_rounds, precision, references, warm_seconds, patience, look)
        found.update(zip(others, rows, strict=True))
    return [found[i] for i in range(len(sessions))]


def _run_solo(session: Session, seconds: float, look: Callable[[], None] | None) -> Series:
    start = time.perf_counter()
    with _looking(look):
        runs = session.visit(seconds)
    size = max(1, len(runs) // SOLO_ROUNDS)
    rounds = [runs[i : i + size] for i in range(0, len(runs), size)]
    return Series(rounds=rounds, wall_s=time.perf_counter() - start, solo=True)


@contextmanager
def _looking(look: Callable[[], None] | None) -> Iterator[None]:
    """Call ``look`` every half second in another thread, until the block ends."""
    if look is None:
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(LOOK_SECONDS):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _run_in_rounds(
    sessions: Sequence[Session],
    seconds: float,
    min_rounds: int,
    precision: float | None,
    references: References | None,
    warm_seconds: float,
    patience: int,
    look: Callable[[], None] | None,
) -> list[Series]:
    warm = [warm_up(s, max_seconds=max(seconds / 2, warm_seconds), min_seconds=warm_seconds) for s in sessions]
    sizes = [_runs_per_round(ms) for ms, _ in warm]
    round_ms = sum(ms * size for (ms, _), size in zip(warm, sizes, strict=True)) / len(warm)
    rounds = max(min_rounds, round(seconds * 1e3 / max(round_ms, 1e-4)))
    found = [Series(warmup_runs=runs) for _, runs in warm]
    if look is not None:
        look()
    pending = list(range(len(sessions)))
    limit = patience * seconds * len(sessions)  # of wall time, where others have the processor
    start = time.perf_counter()
    for number in range(1, (rounds if precision is None else patience * rounds) + 1):
        for i in pending:
            _run_round(sessions[i], sizes[i], found[i], references)
        if number >= rounds and precision is not None and (number - rounds) % 5 == 0:
            pending = [i for i in pending if not _is_precise(found[i], references, precision, rounds)]
        if not pending or (number >= rounds and time.perf_counter() - start > limit):
            break
    if look is not None:
        look()
    return found


def _is_precise(series: Series, references: References | None, precision: float, planned: int) -> bool:
    return sum(series.clean(references)) >= planned / 2 and series.timing(references).precision <= precision


def _run_round(session: Session, size: int, series: Series, references: References | None) -> None:
    before = references() if references is not None else ()
    count, wall, cpu = session.interrupted, time.perf_counter(), time.thread_time()
    series.rounds.append(session.sample(size))
    series.wall_s += time.perf_counter() - wall
    series.cpu_s += time.thread_time() - cpu
    series.interrupted += session.interrupted - count
    if references is not None:
        series.looks.append((before, references()))
