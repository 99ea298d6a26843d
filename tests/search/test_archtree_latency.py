"""What Archtree measures, how often, and which measurements it takes for the budget."""

from __future__ import annotations

import json
import math
import re

import pytest
from tree_bench import COST, HIGH, LOW, SPACE, START, grow, record, rows

from prunet_zoo.errors import LatencyError, TrainingError
from prunet_zoo.search import MacsCost, archtree_latency
from prunet_zoo.search.archtree_latency import Latencies, Savings
from prunet_zoo.supernet.masked_spec import SpecNet


def test_a_network_is_measured_once_unless_there_is_a_reason(tmp_path):
    found = grow(tmp_path, beam=3, children=3)
    target = found.strategy.target
    near = {row["spec_hash"] for row in found.strategy.measured_choice().trials}
    full = +found.full
    quick = found.made - full
    # all are ranked; what comes to the budget is measured twice with full effort
    assert set(quick) == set(found.made) and set(quick.values()) <= {1, 2} and set(full.values()) == {2}
    assert near and near <= set(full) and len(full) < len(found.made) / 2
    assert found.strategy.measured_choice().networks == len(found.made)
    assert all(0.95 * target < trial["measured"] <= 0.99 * target for trial in found.strategy.measured_choice().trials)


def test_disturbed_and_surprising_networks_are_measured_again(whole, tmp_path):
    shaken = grow(tmp_path / "b", noise=lambda n: ("a neighbour",) if n == 2 else ())
    second = list(shaken.made)[1]
    assert whole.made[second] == 1 and shaken.made[second] == 2
    odd = {second: 1.08}
    off = grow(tmp_path / "c", true=lambda spec: COST(spec) * odd.get(spec.hash, 1.0))
    assert off.made[second] == 2


def test_measurements_that_differ_are_not_taken_for_the_budget(tmp_path):
    """A full measurement, the next, and the third: off by -3, -9 and +7 percent, of every network."""
    found = grow(tmp_path / "a", shake=lambda n: (0.97, 0.91, 1.07)[n - 1], share=0.5)
    assert not [row for row in rows(found) if row["end"] == "budget"]
    assert set((+found.full).values()) == {3}
    choice = found.strategy.measured_choice()
    assert choice.missed is not None and found.strategy.missed() == choice.missed
    ended = {row["end"] for row in rows(found)} - {""}
    assert "unsure" in ended and re.search("is too uncertain: .*, .*, .* ms", choice.missed)


def test_two_that_agree_on_both_sides_of_the_target_are_not_taken(tmp_path):
    target = LOW + 0.6 * (HIGH - LOW)
    latencies = Latencies(lambda counts: ((), START.at(counts)), COST, None, target, tmp_path / "latencies.json")
    counts = [group.channels for group in START.groups]
    for low, high, meets, comfort in (
        (0.985, 1.002, False, False),
        (0.945, 0.96, False, False),
        (0.98, 0.998, True, False),
        (0.97, 0.985, True, True),
    ):
        given = iter([record(low * target), record(high * target)])
        latencies.measure = lambda spec, quick=False, given=given: next(given)
        latencies.rows = {}
        latencies.confirm(counts)
        assert (latencies.meets(counts), latencies.meets(counts, comfort=True)) == (meets, comfort)


def bare(path, measure=None):
    return Latencies(lambda counts: ((), START.at(counts)), COST, measure, 0.6 * HIGH, path / "latencies.json")


FULL = [group.channels for group in START.groups]


def test_what_was_measured_is_read_back(tmp_path):
    first = bare(tmp_path, lambda spec, quick=False: record(1.0, "a neighbour"))
    assert first(FULL, 1.2) == first.confirm(FULL) == 1.0 and first.made == 4
    again = bare(tmp_path, lambda spec, quick=False: pytest.fail("measured again"))
    assert again(FULL, 1.2) == again.confirm(FULL) == 1.0 and again.rows == first.rows


WHOLE = {"counts": [1], "expected": None, "quick": [record(1.0)], "records": []}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[]", "no JSON object"),
        ("{", "line 1"),
        ('{"a": 1}', "network a must be a JSON object"),
        (json.dumps({"a": {**WHOLE, "quick": []}}), "network a has no measurement"),
        (json.dumps({"a": WHOLE, "b": {**WHOLE, "quick": [{}]}}), "network b.*quick.*median_ms"),
        (json.dumps({"a": {**WHOLE, "records": {}}}), "records"),
        (json.dumps({"a": {**WHOLE, "counts": ["1"]}}), "counts"),
        (json.dumps({"a": {**WHOLE, "expected": math.inf}}), "expected"),
        *(
            (json.dumps({"a": {**WHOLE, "records": [record(1.0) | {field: value}]}}), field)
            for field in record(1.0)
            for value in (None, "1", -1.0)
        ),
        (json.dumps({"a": {**WHOLE, "records": [record(0.0)]}}), "median_ms"),
    ],
)
def test_files_of_measurements_that_are_not_whole_are_refused(tmp_path, text, what):
    (tmp_path / "latencies.json").write_text(text)
    with pytest.raises(TrainingError, match=rf"(?s)latencies\.json is damaged .*{what}.*remove it to measure again"):
        bare(tmp_path)


def test_less_than_nothing_expected_is_a_surprise(tmp_path):
    latencies = bare(tmp_path, lambda spec, quick=False: record(1.0))
    assert latencies(FULL, -0.1) == 1.0 and latencies.made == 2


def test_confirming_takes_two_full_measurements(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(archtree_latency.time, "perf_counter", lambda: now[0])

    def measure(spec, quick=False):
        now[0] += 1.0 if quick else 5.0
        return record(1.0)

    latencies = bare(tmp_path, measure)
    assert latencies.seconds_to_confirm() == 0.0
    latencies(FULL)
    assert latencies.seconds_to_confirm() == 2.0  # the quick one's, for want of better
    latencies.confirm(FULL)
    assert latencies.seconds_to_confirm() == 10.0


def test_finer_removals_are_few_whatever_is_expected(tmp_path):
    """The cost says that channels cost next to nothing, the device that most are needed to keep above the target."""
    grid = {"step": 1, "max_expansion": 8}
    layers = [{"stride": 2, "kernel_sizes": [3], "hidden": grid}]
    net = SpecNet(SPACE.replace(stages=[{"out_channels": 12, "layers": layers}]))
    whole = COST(net.spec)
    slow = lambda spec: whole if spec.hash == net.spec.hash else 0.5 * whole  # noqa: E731
    found = grow(tmp_path, true=slow, net=net, target=0.9 * whole, removal=1.0, children=1)
    assert len(found.made) <= 2 + math.log2(64) + 1
    assert "too coarse" in found.strategy.measured_choice().missed


def test_predicts_where_nothing_can_be_measured(tmp_path):
    found = grow(tmp_path, true=None)
    encoding = found.strategy.finish()
    cost = MacsCost()(SPACE.decode(encoding))
    assert found.strategy.measured_choice() is None
    assert 0.95 * found.strategy.target < cost <= found.strategy.target and found.strategy.missed() is None
    assert found.strategy.finish(cost * 1.01, 0.97) == encoding
    with pytest.raises(LatencyError, match="no network that the tree found"):
        found.strategy.finish(cost * 2)


def test_savings_follow_what_was_measured():
    savings = Savings(2.0, 1.0)
    assert savings.estimate(0, 8, 4, 0.5) == 1.0
    savings.add(0, 8, 4, 0.5, 3.0)
    assert savings.estimate(0, 8, 4, 0.5) == 3.0  # the same step
    assert savings.estimate(0, 4, 2, 0.5) == 2.0  # the same group: (1 + 3) / (1 + 1)
    assert savings.estimate(1, 8, 4, 0.5) == 1.0
    assert Savings(2.0, 1.0, savings.rows).estimate(0, 4, 2, 0.5) == 2.0
