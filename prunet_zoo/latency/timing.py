"""The timing loop.

The statistic, for a machine that others use too: runs are timed one by one, in short rounds. A round that something
else disturbed has a high median. The latency is the median over the runs of the *quieter third of the rounds*; the
10th and 90th percentiles are over all runs, so that a record shows how disturbed its machine was. On a quiet machine
the value lies slightly under the plain median. It is not the minimum: it is what a run takes when nothing else
happens.

On one CPU thread a run that the system interrupted counts with its CPU time (`Session`), which is what makes networks
of tens of milliseconds measurable on a machine with more work than cores. What another process does to shared caches
and memory stays in the figure.

Several networks that are to be compared are measured together, round by round in turn (`time_together`), so that a slow
minute slows all of them. The blocks of a table are run one by one in turn (`time_in_turn`), so that each finds the
caches as it would inside a network, filled by the others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends import Session
from prunet_zoo.latency.record import Timing

ROUND_MS = 8.0  # long enough that a switch between networks does not matter, short enough to fall between disturbances
STABLE = 0.02  # warm-up ends when a round is within this of the best before it


def summarise(rounds: Sequence[Sequence[float]], warmup_runs: int = 0, interrupted: int = 0) -> Timing:
    """Reduce runs (ms), grouped by round, to the statistic of this module."""
    if not rounds or not all(rounds):
        raise LatencyError("a latency needs at least one round with at least one run")
    quiet = sorted(rounds, key=statistics.median)[: -(-len(rounds) // 3)]
    everything = sorted(t for group in rounds for t in group)
    last = len(everything) - 1
    return Timing(
        median_ms=statistics.median(t for group in quiet for t in group),
        p10_ms=everything[round(0.1 * last)],
        p90_ms=everything[round(0.9 * last)],
        n=len(everything),
        rounds=len(rounds),
        warmup_runs=warmup_runs,
        interrupted=interrupted,
    )


def warm_up(session: Session, max_seconds: float = 0.25) -> tuple[float, int]:
    """Run until a round is no more than 2% slower than the best before it, and a few runs more, within a time limit.

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
        if settled or time.perf_counter() - start > max_seconds:
            return best, runs


def _runs_per_round(ms: float) -> int:
    return max(1, min(1000, round(ROUND_MS / max(ms, 1e-4))))


def time_together(sessions: Sequence[Session], seconds: float = 0.4, min_rounds: int = 9) -> list[Timing]:
    """Time several sessions in turn, a round each, for about ``seconds`` each; all see the same disturbances."""
    warm = [warm_up(session, max_seconds=seconds / 2) for session in sessions]
    round_ms = sum(ms * _runs_per_round(ms) for ms, _ in warm) / len(warm)
    rounds = max(min_rounds, round(seconds * 1e3 / max(round_ms, 1e-4)))
    before = [session.interrupted for session in sessions]
    times: list[list[list[float]]] = [[] for _ in sessions]
    for _ in range(rounds):
        for session, (ms, _runs), mine in zip(sessions, warm, times, strict=True):
            mine.append(session.sample(_runs_per_round(ms)))
    return [
        summarise(mine, runs, session.interrupted - count)
        for session, mine, (_, runs), count in zip(sessions, times, warm, before, strict=True)
    ]


def time_in_turn(sessions: Sequence[Session], seconds: float = 0.06, min_passes: int = 45) -> list[Timing]:
    """Time several sessions, a single run each in turn, for about ``seconds`` each.

    Every run finds caches that the others have filled, as a block does inside a network. Sessions that disturb each
    other for a while after a run (`Session.spins`) are timed round by round instead.
    """
    if any(session.spins for session in sessions):
        return time_together(sessions, seconds)
    warmup = 6
    one = [session.sample(warmup)[-1] for session in sessions]
    passes = min(5000, max(min_passes, round(seconds * 1e3 * len(sessions) / max(sum(one), 1e-4))))
    size = max(3, passes // 20)
    before = [session.interrupted for session in sessions]
    times: list[list[list[float]]] = [[] for _ in sessions]
    for _ in range(passes // size):
        groups: list[list[float]] = [[] for _ in sessions]
        for _ in range(size):
            for session, group in zip(sessions, groups, strict=True):
                group.extend(session.sample(1))
        for mine, group in zip(times, groups, strict=True):
            mine.append(group)
    return [
        summarise(mine, warmup, session.interrupted - count)
        for session, mine, count in zip(sessions, times, before, strict=True)
    ]
