"""Probes in sets: each is visited over the whole time, and a slow stretch costs none its figure."""

from __future__ import annotations

import pytest

from prunet_zoo.latency import Session
from prunet_zoo.latency.interleave import ROUNDS, WARMUP, time_sets


class Logged(Session):
    """Latency from a rule over the number of all runs so far; writes down who ran."""

    def __init__(self, log: list[str], name: str, rule, **options) -> None:
        super().__init__(lambda: None, **options)
        self.log, self.name, self.rule = log, name, rule

    def sample(self, n: int) -> list[float]:
        times = []
        for _ in range(n):
            self.log.append(self.name)
            times.append(self.rule(len(self.log)))
        return times


def test_sets_are_visited_in_turn_and_their_sessions_run_one_by_one():
    log: list[str] = []
    sets = [[Logged(log, name, lambda n: 1.0) for name in names] for names in ("ab", "cd")]
    visits: list[tuple[int, int]] = []
    found = time_sets(sets, seconds=0.036, progress=lambda done, of: visits.append((done, of)))
    assert [[s.timing().n for s in group] for group in found] == [[36, 36], [36, 36]]
    runs = "".join(log)[4 * WARMUP :]
    assert runs == ("ab" * 4 + "cd" * 4) * ROUNDS  # one run first that does not count, then three
    assert visits[-1] == (ROUNDS, ROUNDS)


def test_a_slow_stretch_of_a_half_of_the_time_does_not_show():
    log: list[str] = []
    sets = [[Logged(log, f"{i}{j}", lambda n: 1.7 if 100 < n < 420 else 1.0) for j in range(3)] for i in range(5)]
    assert {s.timing().median_ms for group in time_sets(sets, seconds=0.0) for s in group} == {1.0}
    assert len(log) < 840


@pytest.mark.parametrize("option", ["spins", "solo"])
def test_sessions_that_disturb_each_other_are_run_round_by_round(option):
    log: list[str] = []
    group = [Logged(log, name, lambda n: 2.0, **{option: True}) for name in "ab"]
    found = time_sets([group], seconds=0.1)
    assert [s.timing().median_ms for s in found[0]] == [2.0, 2.0]
    assert "abab" not in "".join(log)
