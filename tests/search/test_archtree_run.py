"""The lines that a tree search tells of its progress: pace and time left."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from prunet_zoo.search import archtree_run
from prunet_zoo.search.archtree_run import run_tree


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Steps:
    """A tree of which round n takes ``seconds[n]`` and leaves two nodes open at ``latencies[n]``, none after the last;
    T = 100, two full measurements take 3 s."""

    def __init__(self, clock: Clock, seconds: list[float], latencies: list[float]) -> None:
        self.clock, self.seconds, self.ms, self.round, self.target = clock, seconds, latencies, 0, 100.0
        self.root_latency = latencies[0]
        self.latencies = SimpleNamespace(seconds_to_confirm=lambda: 3.0)

    def plant(self) -> None:
        self.clock.now += self.seconds[0]

    def grow(self) -> None:
        self.round += 1
        self.clock.now += self.seconds[self.round]

    @property
    def best(self) -> SimpleNamespace:
        return SimpleNamespace(rank=0, accuracy=50.0, latency=self.ms[min(self.round, len(self.ms) - 1)])

    @property
    def open(self) -> list[SimpleNamespace]:
        return [self.best] * 2 if self.round < len(self.seconds) - 1 else []

    @property
    def finished(self) -> list[SimpleNamespace]:
        return [] if self.open else [self.best]

    def state_dict(self) -> dict[str, int]:
        return {"round": self.round}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.round = state["round"]


SECONDS = [1000.0, 2.0, 4.0, 6.0, 8.0, 9.0]
LATENCIES = [200.0, 170.0, 140.0, 120.0, 99.5, 98.0]


def told(lines: list[str]) -> list[tuple[float, float]]:
    """Pace and seconds left of each line that has both."""
    found = [re.search(r"; (\S+) s a round, at least about (\S+) s left$", line) for line in lines]
    return [(float(match[1]), float(match[2])) for match in found if match]


def test_tells_the_pace_of_the_last_rounds_and_what_is_left_at_least(monkeypatch, tmp_path):
    clock = Clock()
    monkeypatch.setattr(archtree_run, "time", clock)
    lines: list[str] = []
    assert run_tree(Steps(clock, SECONDS, LATENCIES), tmp_path, {}, lines.append) == 1029.0
    # planting does not count; rounds to 0.98 T at what was saved so far, one at least; 2 nodes are confirmed
    assert told(lines) == [(2.0, 3 * 2 + 6), (3.0, 2 * 3 + 6), (4.0, 1 * 4 + 6), (6.0, 1 * 6 + 6)]
    assert "a round" not in lines[0] and lines[-1].endswith("; 7.7 s a round")
    assert len(lines) == 6


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_the_pace_goes_on_after_a_stop(monkeypatch, tmp_path, stop):
    clock = Clock()
    monkeypatch.setattr(archtree_run, "time", clock)
    whole: list[str] = []
    run_tree(Steps(clock, SECONDS, LATENCIES), tmp_path / "whole", {}, whole.append)
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        if len(lines) == stop:
            raise KeyboardInterrupt

    (tmp_path / "parts").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run_tree(Steps(clock, SECONDS, LATENCIES), tmp_path / "parts", {}, tell)
    clock.now += 500.0
    rest: list[str] = []
    run_tree(Steps(clock, SECONDS, LATENCIES), tmp_path / "parts", {}, rest.append)
    assert [*lines, *rest[1:]] == whole and "goes on after round" in rest[0]


def test_rounds_that_saved_nothing_leave_one_at_least(monkeypatch, tmp_path):
    clock = Clock()
    monkeypatch.setattr(archtree_run, "time", clock)
    lines: list[str] = []
    run_tree(Steps(clock, [5.0, 2.0, 2.0], [200.0, 201.0, 99.0]), tmp_path, {}, lines.append)
    assert told(lines) == [(2.0, 2 + 6)]
