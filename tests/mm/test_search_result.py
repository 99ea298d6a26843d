"""The end of a search: verifying the latency of the network found, with measurements that the test makes up."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from prunet_zoo import load_space
from prunet_zoo.errors import LatencyError
from prunet_zoo.mm import search_result
from prunet_zoo.mm.latency_cost import make_cost
from prunet_zoo.mm.search_result import choose
from prunet_zoo.search import MacsCost, cost_range
from prunet_zoo.search.adjust import adjust_widths

SPACE = load_space("prunet_cpu_small")
TARGET = 5.0


class Strategy:
    """Adjusts a fixed architecture, as the end of a search does."""

    def __init__(self) -> None:
        self.found = SPACE.sample(random.Random(3))
        self.aims: list[float] = []

    def status(self) -> dict[str, float]:
        return {"target": TARGET}

    def finish(self, target: float | None = None):
        self.aims.append(TARGET if target is None else target)
        return adjust_widths(SPACE, MacsCost(), self.found, self.aims[-1], 0.1)


def loop(verify: int) -> SimpleNamespace:
    return SimpleNamespace(strategy=Strategy(), cost=MacsCost(), verify=verify, supernet=SimpleNamespace(space=SPACE))


def fake_measure(monkeypatch: pytest.MonkeyPatch, factor) -> list[float]:
    """The device is ``factor(predicted)`` off; returns the list of measurements made."""
    made: list[float] = []

    def measure_like(spec, source):
        made.append(MacsCost()(spec) * factor(len(made)))
        return {"median_ms": made[-1]}

    monkeypatch.setattr(search_result, "measure_like", measure_like)
    return made


@pytest.mark.parametrize("off", [0.8, 0.95, 1.06, 1.3])
def test_a_biased_table_is_corrected_until_the_target_is_met(monkeypatch, tmp_path: Path, off: float):
    made = fake_measure(monkeypatch, lambda n: off)
    encoding, trials, correction = choose(loop(4), tmp_path / "trials.json")
    measured = off * MacsCost()(SPACE.decode(encoding))
    assert 0.97 * TARGET < measured <= TARGET
    assert correction == pytest.approx(off, rel=0.02) and len(trials) == len(made) == 2
    assert 0.97 * TARGET < correction * trials[-1]["predicted"] <= TARGET


def test_a_network_that_meets_the_target_is_measured_once(monkeypatch, tmp_path: Path):
    made = fake_measure(monkeypatch, lambda n: 0.999)
    _, trials, correction = choose(loop(4), tmp_path / "trials.json")
    assert len(made) == len(trials) == 1 and correction == 1.0


def test_without_verify_the_tables_word_is_taken(monkeypatch, tmp_path: Path):
    made = fake_measure(monkeypatch, lambda n: 2.0)
    encoding, trials, correction = choose(loop(0), tmp_path / "trials.json")
    assert not made and trials[0]["measured"] is None and correction == 1.0
    assert encoding == Strategy().finish()


def test_noise_ends_with_the_nearest_trial(monkeypatch, tmp_path: Path):
    fake_measure(monkeypatch, lambda n: [1.3, 0.7, 1.02, 1.4][n])
    encoding, trials, _ = choose(loop(3), tmp_path / "trials.json")
    distance = [abs(t["measured"] - 0.985 * TARGET) for t in trials]
    assert len(trials) == 4 and SPACE.decode(encoding).hash == trials[distance.index(min(distance))]["spec_hash"]


def test_a_run_stopped_here_goes_on_with_the_same_figures(monkeypatch, tmp_path: Path):
    path = tmp_path / "trials.json"

    def killed(n: int) -> float:
        if n == 1:
            raise KeyboardInterrupt
        return 1.2

    fake_measure(monkeypatch, killed)
    with pytest.raises(KeyboardInterrupt):
        choose(loop(2), path)
    kept = json.loads(path.read_text())
    made = fake_measure(monkeypatch, lambda n: 1.2)
    _, trials, _ = choose(loop(2), path)
    assert len(kept) == 1 and trials[0] == kept[0]
    assert len(trials) == 2 and len(made) == 1  # the first trial is not made again


def test_a_correction_that_leaves_the_space_keeps_what_there_is(monkeypatch, tmp_path: Path):
    (low, _), _ = cost_range(MacsCost(), SPACE)
    assert low < TARGET / 10
    fake_measure(monkeypatch, lambda n: 100.0)
    encoding, trials, _ = choose(loop(3), tmp_path / "trials.json")
    assert len(trials) == 1 and SPACE.decode(encoding).hash == trials[0]["spec_hash"]


def test_unknown_cost_type_is_named():
    with pytest.raises(LatencyError, match="'watts'"):
        make_cost(SPACE, "unused", type="watts")


def test_the_accepted_trial_is_kept_too(monkeypatch, tmp_path: Path):
    path = tmp_path / "trials.json"
    made = fake_measure(monkeypatch, lambda n: 1.2)
    first = choose(loop(3), path)
    assert len(json.loads(path.read_text())) == len(first[1]) == len(made) == 2
    assert choose(loop(3), path) == first and len(made) == 2
