"""Archtree on a device that is a formula: greedy for one place, budget hit, survivors, what is said where it misses."""

from __future__ import annotations

import copy
import random
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_bench import COST, HIGH, SPACE, START, X, full, grow, held, record, rows, train

from prunet_zoo import create_model
from prunet_zoo.errors import SpecError
from prunet_zoo.search.archtree import Archtree
from prunet_zoo.search.archtree_workers import ImportanceJob, RecoverJob, channel_importance, recover
from prunet_zoo.search.strategy import Services
from prunet_zoo.spec import NetSpec, stable_hash
from prunet_zoo.supernet.masked_spec import SpecNet


def greedy(target: float, children: int, rounds: int = 3) -> list[tuple[tuple[int, ...], float, float]]:
    """Greedy pruning, plainly: the widths after every round, accuracy and loss."""
    net, keep, lineage, path = copy.deepcopy(START), full(START), [], []
    latency = lambda counts: COST(net.at(counts))  # noqa: E731
    step = (HIGH - target) / rounds
    seed = lambda what, steps: int(stable_hash([0, what, [list(s) for s in steps]]), 16) % 2**31  # noqa: E731
    while latency(counts := [int(k.sum()) for k in keep]) > 0.99 * target:
        _, module = net.remove(keep, "node")
        norms = tuple(group.norms for group in net.groups)
        job = ImportanceJob(module, seed("importance", lineage), tuple(counts), norms, "taylor", 2)
        importance = channel_importance(job, list(islice(train(job.seed), 2)), "cpu")
        gap, options = latency(counts) - 0.98 * target, []
        wanted = gap / max(1, round(gap / step))
        for g, group in enumerate(net.groups):
            less = [w for w in group.widths if w < counts[g]]
            less = [w for w in less if w >= 0.75 * counts[g]] or less[-1:]
            after = {w: latency([*counts[:g], w, *counts[g + 1 :]]) for w in less}
            fits = [w for w in after if after[w] > 0.96 * target]
            if fits:
                w = min(fits, key=lambda w: abs(latency(counts) - after[w] - wanted))
                lost = float(importance[g].sort().values[: counts[g] - w].sum())
                options.append((lost / (latency(counts) - after[w]), g, w))
        found = []
        for _, g, w in sorted(options)[:children]:
            kept = [k.clone() for k in keep]
            kept[g][kept[g].nonzero().flatten()[importance[g].argsort(stable=True)[: counts[g] - w]]] = False
            _, module = net.remove(kept, "child")
            job = RecoverJob(module, seed("recovery", [*lineage, (g, w)]), 2, 0.05)
            done = recover(job, list(islice(train(job.seed), 2)), list(held()), "cpu")
            found.append((-done.accuracy, done.loss, (g, w), kept, done.state))
        accuracy, loss, removal, keep, state = min(found, key=lambda row: row[:3])
        lineage.append(removal)
        net.restore(keep, state)
        path.append((tuple(int(k.sum()) for k in keep), -accuracy, loss))
    return path


@pytest.mark.parametrize("children", [1, 3])
def test_one_place_is_greedy_pruning(tmp_path, children):
    found = grow(tmp_path, beam=1, children=children, measure_most=children)
    path = [(tuple(row["widths"]), row["accuracy"], row["loss"]) for row in rows(found) if row["survives"]][1:]
    assert path == greedy(found.strategy.target, children) and len(path) > 2


@given(st.floats(0.15, 0.9), st.floats(-0.3, 0.3), st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_the_budget_is_hit_whatever_the_table_says(tmp_path_factory, share, slope, seed):
    """The device is not the table: a fixed part, a size effect, and a grain of 0.3% for each network."""

    def true(spec: NetSpec) -> float:
        return (
            2
            * HIGH
            * (0.2 + COST(spec) / HIGH) ** (1 + slope)
            * (1 + random.Random(f"{seed}{spec.hash}").gauss(0, 0.003))
        )

    low, high = true(START.at([g.widths[0] for g in START.groups])), true(START.at([g.channels for g in START.groups]))
    target = low + share * (high - low)
    found = SimpleNamespace()
    folder = tmp_path_factory.mktemp("tree")
    found.strategy = Archtree(HIGH, beam=2, children=2, rounds=3, recovery_steps=1, importance_batches=1, pretrain=0.0)
    services = Services(train, held, lambda spec, quick=False: record(true(spec)), folder)
    found.strategy.setup(copy.deepcopy(START), COST, 4, 0, 8, services)
    found.strategy.target = target
    found.strategy.explore()
    choice = found.strategy.measured_choice()
    measured = true(SPACE.decode(choice.encoding))
    assert choice.missed is None and 0.95 * target < measured <= target
    assert choice.record["median_ms"] == pytest.approx(measured)


def test_survivors_are_no_more_than_the_beam_and_the_best_finished_is_chosen(tmp_path):
    found = grow(tmp_path, beam=3, children=3)
    details = found.strategy.details()
    by_round = Counter(row["round"] for row in details["tree"] if row["survives"])
    assert max(by_round.values()) <= 3
    assert len({tuple(row["widths"]) for row in details["tree"]}) == len(details["tree"])
    finished = [row for row in details["tree"] if row["end"] == "budget"]
    best = max(finished, key=lambda row: (row["accuracy"], -row["loss"]))
    assert best["node"] == details["chosen"] and 1 < len(finished) <= 3
    assert found.strategy.finish() == found.strategy.measured_choice().encoding
    assert found.net.encode(best["widths"]) == found.strategy.finish()
    assert any("s a round" in line and "left" in line for line in found.lines)


def test_the_start_networks_weights_are_put_back(whole):
    own = START.net.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in whole.net.net.state_dict().items())


def test_adopted_weights_are_the_nodes_and_fine_tuning_goes_on_from_them(tmp_path):
    found = grow(tmp_path)
    strategy, net = found.strategy, found.net
    encoding, node = strategy.finish(), strategy._nodes[0]
    strategy.adopt(encoding)
    spec, state = net.derive(encoding, "found")
    assert all(torch.equal(state[name], tensor) for name, tensor in node.state.items())
    model = create_model(spec).eval()
    model.load_state_dict(state)
    torch.testing.assert_close(net.eval()(X[:8]), model(X[:8]), rtol=1e-4, atol=1e-4)
    assert net.best() == encoding and strategy.state_dict()["nodes"] == []
    with pytest.raises(SpecError, match="its tree found"):
        strategy.adopt(SPACE.largest())


def test_magnitude_is_another_tree(whole, tmp_path):
    magnitude = grow(tmp_path / "m", importance="magnitude")
    assert [row["node"] for row in rows(whole)] != [row["node"] for row in rows(magnitude)]


MANY = {"step": 2, "max_expansion": 2}
DEEP = SPACE.replace(stages=[{"out_channels": 12, "layers": [{"kernel_sizes": [3], "hidden": MANY}] * 8}])


@pytest.mark.parametrize("removal", [0.25, 1.0])
def test_where_groups_are_many_none_is_emptied_at_once(tmp_path, removal):
    """None of eight groups can save the third of what is to be saved that three rounds ask for."""
    net = SpecNet(DEEP)
    whole = [group.channels for group in net.groups]
    target = COST(net.spec) - 0.6 * (COST(net.spec) - COST(net.at([group.widths[0] for group in net.groups])))
    options = {"importance": "magnitude", "recovery_steps": 0, "beam": 1, "children": 2, "measure_most": 3}
    found = grow(tmp_path, net=net, target=target, removal=removal, **options)
    by_name = {row["node"]: row["widths"] for row in rows(found)}
    shares = []
    for row in rows(found)[1:]:
        pairs = zip(by_name[row["parent"]], row["widths"], strict=True)
        shares += [(before - after) / before for before, after in pairs if before - after > 2]
    first = [row["widths"] for row in rows(found) if row["round"] == 1]
    least = [any(w == group.widths[0] < c for w, c, group in zip(f, whole, net.groups, strict=True)) for f in first]
    assert found.strategy.measured_choice().missed is None
    if removal == 1.0:
        assert all(least)
        return
    assert not any(least) and max(shares) <= 0.25
    details = found.strategy.details()
    assert details["rounds"] > 3 and details["networks_measured"] <= 1 + 3 * details["rounds"]


def test_says_where_the_grid_is_too_coarse(tmp_path):
    grid = {"step": 12, "max_expansion": 3}
    layers = [{"stride": 2, "kernel_sizes": [3], "hidden": grid}, {"kernel_sizes": [3], "hidden": grid}]
    space = SPACE.replace(stages=[{"out_channels": 12, "layers": layers}])
    net = SpecNet(space)
    start = net.spec.hash
    whole = COST(net.spec)
    found = grow(
        tmp_path,
        true=lambda spec: COST(spec) * (1.0 if spec.hash == start else 0.8),  # the first step already saves too much
        net=net,
        target=0.9 * whole,
    )
    choice = found.strategy.measured_choice()
    nearest = max(COST(net.at(widths)) for widths in ([24, 24], [12, 36]))
    assert "too coarse" in choice.missed and choice.record["median_ms"] == pytest.approx(0.8 * nearest)
    assert {row["end"] for row in rows(found) if row["survives"]} >= {"under"}


def test_says_when_the_device_is_too_slow_or_too_fast(tmp_path):
    slow = grow(tmp_path / "s", true=lambda spec: 3 * HIGH + COST(spec), share=0.1)
    assert "nothing more can be taken out" in slow.strategy.measured_choice().missed
    fast = grow(tmp_path / "f", true=lambda spec: 0.1 * COST(spec))
    assert "already" in fast.strategy.measured_choice().missed
    assert fast.strategy.finish() == SPACE.largest()
