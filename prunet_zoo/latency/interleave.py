"""Timing many small probes so that neither caches nor a slow minute favour any of them.

Probes come in sets. The probes of a set are run one by one in turn, so that each finds the caches filled by the others,
as a block does inside a network. The sets are visited again and again, so that the rounds of every probe are spread
over the whole time: on a machine that others use too, a second of theirs then costs each probe a round, and no probe
its figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prunet_zoo.latency.backends import Session
from prunet_zoo.latency.references import References
from prunet_zoo.latency.timing import MIN_CLEAN, Series, run_rounds

ROUNDS = 12  # visits to each set
PATIENCE = 6  # times as many, while a set has too few visits at full speed
MAX_TURNS = 400  # in one visit
WARMUP = 3


def time_sets(
    sets: Sequence[Sequence[Session]],
    seconds: float = 0.06,
    references: References | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Series]]:
    """Time the sessions of each set in turn, a single run each, for about ``seconds`` each.

    Sessions that disturb each other for a while after a run (`Session.spins`), or whose runs are made in one call
    (`Session.solo`), are timed round by round instead (`run_rounds`).

    Args:
        sets: sessions, set by set.
        seconds: time for the runs of each.
        references: how to look at the speed of the processor before and after each round. Slow rounds do not count; a
            set with fewer than five others is visited again, up to `PATIENCE` times as often.
        progress: called with (visits made, of how many).
    """
    if any(session.spins or session.solo for group in sets for session in group):
        return [run_rounds(group, seconds, references=references) for group in sets]
    turns = [_turns(group, seconds) for group in sets]
    found = [[Series(warmup_runs=WARMUP + ROUNDS) for _ in group] for group in sets]
    pending = list(range(len(sets)))
    for visit in range(PATIENCE * ROUNDS):
        for i in pending:
            _visit(sets[i], found[i], turns[i], references)
        if progress is not None:
            progress(min(visit + 1, ROUNDS), ROUNDS)
        if visit + 1 >= ROUNDS:
            pending = [i for i in pending if found[i] and sum(found[i][0].clean(references)) < MIN_CLEAN]
        if not pending:
            break
    return found


def _turns(group: Sequence[Session], seconds: float) -> int:
    """Runs of each session in one visit, so that each gets ``seconds`` on average."""
    one = sum(session.sample(WARMUP)[-1] for session in group)
    return min(MAX_TURNS, max(3, round(seconds * 1e3 * len(group) / max(one, 1e-4) / ROUNDS)))


def _visit(group: Sequence[Session], found: Sequence[Series], turns: int, references: References | None) -> None:
    for session in group:
        session.sample(1)  # puts this set's weights and maps into the caches
    before = references() if references is not None else ()
    interrupted = [session.interrupted for session in group]
    runs: list[list[float]] = [[] for _ in group]
    for _ in range(turns):
        for session, mine in zip(group, runs, strict=True):
            mine.extend(session.sample(1))
    after = references() if references is not None else ()
    for session, series, mine, count in zip(group, found, runs, interrupted, strict=True):
        series.rounds.append(mine)
        series.interrupted += session.interrupted - count
        if references is not None:
            series.looks.append((before, after))
