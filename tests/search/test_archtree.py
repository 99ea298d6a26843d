"""Archtree on a device that is a formula: greedy for one place, budget hit, resume, workers, what is measured."""

from __future__ import annotations

import copy
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo import create_model
from prunet_zoo.errors import LatencyError, SpecError, TrainingError
from prunet_zoo.search import MacsCost
from prunet_zoo.search.archtree import Archtree
from prunet_zoo.search.archtree_latency import Latencies, Savings
from prunet_zoo.search.archtree_node import Node, select
from prunet_zoo.search.archtree_workers import ImportanceJob, RecoverJob, channel_importance, recover
from prunet_zoo.search.strategy import Services
from prunet_zoo.space import SearchSpace
from prunet_zoo.spec import NetSpec, stable_hash
from prunet_zoo.supernet.masked import MaskedNet
from prunet_zoo.supernet.masked_spec import SpecNet

HIDDEN = {"step": 2, "max_expansion": 3}
SPACE = SearchSpace.from_dict(
    {
        "name": "test",
        "input_size": 16,
        "stem": [{"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]}],
        "stages": [
            {
                "out_channels": 12,
                "layers": [
                    {"stride": 2, "kernel_sizes": [3], "hidden": HIDDEN},
                    {"kernel_sizes": [3], "hidden": HIDDEN, "types": ["fused_irb"]},
                    {"kernel_sizes": [3], "hidden": HIDDEN, "se_ratios": [0.25]},
                ],
            }
        ],
        "tail": {"out_channels": 16},
        "num_classes": 4,
    }
)


class MsCost(MacsCost):
    """A table for a device whose time goes with MACs."""

    unit = "ms"


COST = MsCost()
Latency = Callable[[NetSpec], float]


def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes that differ in where the image is bright."""
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, 4, (n,), generator=g)
    x = torch.randn(n, 3, 16, 16, generator=g) * 0.5
    for i, k in enumerate(label.tolist()):
        x[i, :, 8 * (k // 2) : 8 * (k // 2) + 8, 8 * (k % 2) : 8 * (k % 2) + 8] += 0.4
    return x, label


X, LABEL = data(160)


def train(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    while True:
        pick = torch.randint(0, 96, (16,), generator=g)
        yield X[pick], LABEL[pick]


def held() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield from zip(X[96:].split(32), LABEL[96:].split(32), strict=True)


def record(ms: float, *disturbed: str) -> dict:
    return {"median_ms": ms, "ci_low_ms": ms * 0.998, "ci_high_ms": ms * 1.002, "disturbed": list(disturbed)}


def trained(space: SearchSpace = SPACE, steps: int = 25) -> SpecNet:
    torch.manual_seed(0)
    net = SpecNet(space)
    state = recover(
        RecoverJob(net.remove(full(net), "start")[1], 0, steps, 0.1), list(islice(train(1), steps)), [], "cpu"
    )
    return SpecNet(space, state=state.state)


def full(net: MaskedNet) -> list[torch.Tensor]:
    return [torch.ones(group.channels, dtype=torch.bool) for group in net.groups]


START = trained()
HIGH = COST(SPACE.decode(SPACE.largest()))
LOW = COST(START.at([group.widths[0] for group in START.groups]))


def grow(folder: Path, true: Latency | None = COST, share: float = 0.6, **options) -> SimpleNamespace:
    """An explored `Archtree`; how often each network was measured; the lines told."""
    made: Counter[str] = Counter()
    lines: list[str] = []
    full: Counter[str] = Counter()
    noise = options.pop("noise", lambda n: ())
    shake = options.pop("shake", lambda n: 1.0)  # what the nth full measurement of a network is off
    fail = options.pop("fail", math.inf)

    def measure(spec: NetSpec, quick: bool = False) -> dict:
        if made.total() >= fail:
            raise KeyboardInterrupt
        made[spec.hash] += 1
        full[spec.hash] += not quick
        assert true is not None
        return record(true(spec) * (1.0 if quick else shake(full[spec.hash])), *noise(made.total()))

    net = copy.deepcopy(options.pop("net", START))
    services = options.pop("services", None) or Services(train, held, measure if true else None, folder, lines.append)
    base = {"beam": 2, "children": 2, "rounds": 3, "recovery_steps": 2, "recovery_lr": 0.05, "pretrain": 0.0}
    base["importance_batches"] = 2
    strategy = Archtree(options.pop("target", LOW + share * (HIGH - LOW)), **{**base, **options})
    strategy.setup(net, COST if true else MacsCost(), 4, 0, 8, services)
    found = SimpleNamespace(strategy=strategy, net=net, made=made, full=full, lines=lines)
    strategy.explore()
    return found


def rows(found: SimpleNamespace) -> list[dict]:
    return found.strategy.details()["tree"]


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> SimpleNamespace:
    """A tree that was not interrupted."""
    return grow(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("fail", [0, 2, 7, 11])
def test_goes_on_exactly_where_it_was_killed(whole, tmp_path, fail):
    with pytest.raises(KeyboardInterrupt):
        grow(tmp_path / "parts", fail=fail)
    rest = grow(tmp_path / "parts")
    assert _same(whole, rest)
    assert rest.made.total() <= whole.made.total() - fail  # nothing is measured again
    again = grow(tmp_path / "parts")
    assert _same(whole, again) and not again.made


def test_goes_on_exactly_between_rounds(whole, tmp_path):
    for stop in (1, 3):
        told: list[str] = []

        def tell(line: str, told: list[str] = told, stop: int = stop) -> None:
            told.append(line)
            if len(told) == stop:
                raise KeyboardInterrupt

        services = Services(train, held, lambda spec, quick=False: record(COST(spec)), tmp_path / str(stop), tell)
        with pytest.raises(KeyboardInterrupt):
            grow(tmp_path / str(stop), services=services)
        assert len(list((tmp_path / str(stop) / "archtree").glob("round_*.pt"))) == 1
        assert _same(whole, grow(tmp_path / str(stop)))


def _same(a: SimpleNamespace, b: SimpleNamespace) -> bool:
    first, second = a.strategy._nodes, b.strategy._nodes
    return rows(a) == rows(b) and all(
        x.lineage == y.lineage and all(torch.equal(x.state[k], y.state[k]) for k in x.state)
        for x, y in zip(first, second, strict=True)
    )


@pytest.mark.slow
def test_other_processes_give_the_same_bits(whole, tmp_path):
    assert _same(whole, grow(tmp_path / "2", workers=2))
    assert not (tmp_path / "2" / "archtree" / "jobs").exists()


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


def test_files_of_another_search_or_damaged_ones_are_refused(tmp_path):
    grow(tmp_path)
    with pytest.raises(TrainingError, match="beam differ"):
        grow(tmp_path, beam=1)
    (path,) = (tmp_path / "archtree").glob("round_*.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(TrainingError, match="damaged"):
        grow(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "archtree" / "latencies.json").write_text('{"a": 1}')
    with pytest.raises(TrainingError, match="measure again"):
        grow(tmp_path)


def test_continues_from_its_state(whole, tmp_path):
    found = whole
    torch.save(found.strategy.state_dict(), tmp_path / "state.pt")
    other = Archtree(found.strategy.target, pretrain=0.0)
    other.setup(copy.deepcopy(START), COST, 4, 0, 8)
    assert other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)) == []
    assert other.finish() == found.strategy.finish()
    assert other.measured_choice() == found.strategy.measured_choice() and other.status() == found.strategy.status()
    other.adopt(other.finish())
    assert other.supernet.best() == found.strategy.finish()


def test_pretraining_comes_first():
    strategy = Archtree(HIGH / 2, pretrain=0.5)
    strategy.setup(START, COST, 10, 0, 8)
    assert strategy.decision_epoch == 5 and not strategy.wants_arch_step(7)
    assert strategy.status()["expected"] == HIGH
    strategy.setup(START, COST, 1, 0, 8)
    assert strategy.decision_epoch == 0
    with pytest.raises(TrainingError, match="services"):
        strategy.explore()
    with pytest.raises(TrainingError, match="explore"):
        strategy.finish()


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_impossible_target_names_both_ends(factor):
    with pytest.raises(LatencyError, match="choose between"):
        Archtree(HIGH * factor).setup(START, COST, 4, 0, 8)


def test_without_a_target_a_third_of_the_way_is_taken():
    strategy = Archtree()
    strategy.setup(START, COST, 4, 0, 8)
    assert strategy.target == pytest.approx(LOW + (HIGH - LOW) / 3, rel=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"beam": 0},
        {"children": 0},
        {"measure_most": 1},
        {"importance": "l7"},
        {"recovery_lr": 0.0},
        {"removal": 0.0},
        {"pretrain": 1.0},
    ],
)
def test_settings_out_of_range_are_named(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        Archtree(1.0, **options)


def node(parent: int, index: int, accuracy: float, loss: float = 1.0) -> Node:
    return Node(((parent, 1), (index, 1)), [], {}, 1.0, accuracy, loss)


def test_at_most_half_of_the_places_go_to_one_family_while_there_are_others():
    family, other = [node(0, i, 90 - i) for i in range(4)], [node(1, i, 50 - i) for i in range(2)]
    assert select([*family, *other], 4) == [*family[:2], *other]
    assert select([*family, other[0]], 4) == [*family[:3], other[0]]
    assert select(family, 3) == family[:3]
    assert select([node(0, 0, 50, 1.0), node(0, 1, 50, 0.5)], 1)[0].loss == 0.5
    assert select(family, 0) == []


def test_savings_follow_what_was_measured():
    savings = Savings(2.0, 1.0)
    assert savings.estimate(0, 8, 4, 0.5) == 1.0
    savings.add(0, 8, 4, 0.5, 3.0)
    assert savings.estimate(0, 8, 4, 0.5) == 3.0  # the same step
    assert savings.estimate(0, 4, 2, 0.5) == 2.0  # the same group: (1 + 3) / (1 + 1)
    assert savings.estimate(1, 8, 4, 0.5) == 1.0
    assert Savings(2.0, 1.0, savings.rows).estimate(0, 4, 2, 0.5) == 2.0


@pytest.mark.parametrize("restore", [MaskedNet.restore, SpecNet.restore])
def test_restore_is_the_inverse_of_remove(restore):
    net = copy.deepcopy(START)
    g = torch.Generator().manual_seed(3)
    keep = [torch.zeros(group.channels, dtype=torch.bool) for group in net.groups]
    for mask, group in zip(keep, net.groups, strict=True):
        mask[torch.randperm(group.channels, generator=g)[: group.widths[len(group.widths) // 2]]] = True
    _, module = net.remove(keep, "small")
    state = {name: torch.randn(t.shape, generator=g).to(t.dtype) for name, t in module.state_dict().items()}
    before = {name: t.clone() for name, t in net.net.state_dict().items()}
    restore(net, keep, state)
    _, again = net.remove(keep, "small")
    assert all(torch.equal(t, state[name]) for name, t in again.state_dict().items())
    gone = [~mask for mask in keep]
    after = net.net.state_dict()
    name = f"{net.groups[0].name}.expand.conv.weight"
    assert torch.equal(after[name][gone[0]], before[name][gone[0]])
    with pytest.raises(Exception, match="no weights of the network"):
        restore(net, keep, {**state, "odd": torch.zeros(1)})


def test_taylor_is_the_change_of_the_loss_when_scale_and_shift_go():
    net = copy.deepcopy(START)
    _, module = net.remove(full(net), "root")
    name = net.groups[1].norms[0]
    job = ImportanceJob(module, 0, (net.groups[1].channels,), ((name,),), "taylor", 1)
    importance = channel_importance(job, [(X[:32], LABEL[:32])], "cpu")[0]
    norm, h = module.get_submodule(name), 1e-3
    changes = []
    for c in range(len(importance)):
        losses = []
        for sign in (1, -1):
            probe = copy.deepcopy(module).eval()
            with torch.no_grad():
                probe.get_submodule(name).weight[c] *= 1 + sign * h
                probe.get_submodule(name).bias[c] *= 1 + sign * h
                losses.append(float(torch.nn.functional.cross_entropy(probe(X[:32]), LABEL[:32])))
        changes.append(abs(losses[0] - losses[1]) / (2 * h))
    assert norm.weight.shape[0] == len(changes)
    torch.testing.assert_close(importance.float(), torch.tensor(changes), rtol=0.05, atol=2e-4)
