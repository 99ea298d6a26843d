"""TieredPruning: targets, tiers, adjustment, exact continuation."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo import create_model, load_space
from prunet_zoo.errors import LatencyError, SpecError
from prunet_zoo.search import MacsCost, TieredPruning, cost_range, space_cost
from prunet_zoo.search.adjust import adjust_widths
from prunet_zoo.space import SearchSpace
from prunet_zoo.supernet import SuperNet

SPACE = SearchSpace.from_dict(
    {
        "name": "test",
        "input_size": 16,
        "stem": [{"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]}],
        "stages": [
            {
                "out_channels": 16,
                "layers": [
                    {"stride": 2, "kernel_sizes": [3, 5], "hidden": {"step": 4, "max_expansion": 6}},
                    {"repeat": 3, "kernel_sizes": [3, 5], "hidden": {"step": 4, "max_expansion": 6}, "skip": True},
                ],
            }
        ],
        "tail": {"out_channels": 16},
        "num_classes": 4,
    }
)
LOW, HIGH = (end[0] for end in cost_range(MacsCost(), SPACE))


def data(n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes that differ in where the image is bright."""
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, 4, (n,), generator=g)
    x = torch.randn(n, 3, 16, 16, generator=g) * 0.3
    for i, k in enumerate(label.tolist()):
        x[i, :, 8 * (k // 2) : 8 * (k // 2) + 8, 8 * (k % 2) : 8 * (k % 2) + 8] += 1.0
    return x, label


def run(
    strategy: TieredPruning, net: SuperNet, epochs: range, optimizer: torch.optim.Optimizer, steps: int = 8
) -> None:
    x, label = data()
    for epoch in epochs:
        strategy.start_epoch(epoch)
        for i in range(steps):
            batch = slice(8 * (i % 8), 8 * (i % 8) + 8)
            strategy.before_weight_step()
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), label[batch]).backward()
            optimizer.step()
            if strategy.wants_arch_step(epoch):
                strategy.arch_step(lambda b=batch: F.cross_entropy(net(x[b]), label[b]))
        strategy.end_epoch(epoch)


def fresh(
    target: float, epochs: int = 8, seed: int = 0, **options
) -> tuple[TieredPruning, SuperNet, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = SuperNet(SPACE)
    strategy = TieredPruning(target, **options)
    strategy.setup(net, MacsCost(), epochs, seed, 8)
    return strategy, net, torch.optim.SGD(net.weight_parameters(), lr=0.05)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_result_is_within_three_percent_under_the_target(share):
    target = LOW + share * (HIGH - LOW)
    strategy, net, optimizer = fresh(target)
    run(strategy, net, range(8), optimizer)
    cost = space_cost(MacsCost(), SPACE, strategy.finish())
    assert 0.97 * target < cost <= target


def test_expected_cost_comes_to_the_target_from_above_and_lambda_follows():
    target = LOW + 0.12 * (HIGH - LOW)
    strategy, net, optimizer = fresh(target, epochs=20, dual_lr=0.05)
    start = strategy.status()["expected"]
    duals = []
    for epoch in range(20):
        run(strategy, net, range(epoch, epoch + 1), optimizer)
        duals.append(strategy.status()["dual"])
    end = strategy.status()["expected"]
    assert start > 1.3 * target and 0.85 * target < end < 1.15 * target
    assert duals[0] == 0 and max(duals) > 0.1


def test_same_seed_same_network_other_target_other_network():
    results = []
    for target in (0.3, 0.3, 0.7):
        strategy, net, optimizer = fresh(LOW + target * (HIGH - LOW))
        run(strategy, net, range(8), optimizer)
        results.append(strategy.finish())
    assert results[0] == results[1] != results[2]


def test_unlikely_blocks_and_decisive_skips_are_removed_with_their_optimiser_state():
    strategy, net, optimizer = fresh(HIGH * 0.6, warmup=0.0, settle=0.0)
    run(strategy, net, range(1), optimizer)
    layer, gone_layer, staying = net.stochastic_layers()[1:4]
    with torch.no_grad():
        layer.theta["0"].fill_(-4.0)
        gone_layer.theta["skip"].fill_(4.0)
        staying.theta["skip"].fill_(-4.0)
    had = len(strategy.optimizer.param_groups[0]["params"])
    events, gone = strategy.end_epoch(1)
    kinds = {(e.layer, e.kind) for e in events}
    assert {(1, "block"), (2, "layer"), (3, "skip")} <= kinds
    assert layer.options == ["1", "skip"] and gone_layer.options == [] and "skip" not in staying.options
    assert len(strategy.optimizer.param_groups[0]["params"]) < had
    lost = {id(p) for p in gone}
    assert not any(id(p) in lost for p in strategy.optimizer.state)
    assert strategy.status()["candidates"] == sum(len(la.candidates) for la in net.stochastic_layers())


def test_theta_is_frozen_in_the_warmup():
    strategy, _net, _ = fresh(HIGH * 0.5, epochs=10, warmup=0.3)
    assert [strategy.wants_arch_step(e) for e in range(5)] == [False] * 3 + [True] * 2
    strategy.start_epoch(3)
    first = strategy.tau
    strategy.start_epoch(9)
    assert first == 4.0 and strategy.tau == pytest.approx(0.4)


def test_arch_step_leaves_weights_and_their_gradients_alone():
    strategy, net, _ = fresh(HIGH * 0.5, warmup=0.0)
    x, label = data(8)
    weights = [p.clone() for p in net.weight_parameters()]
    logits = [p.clone() for p in net.arch_parameters()]
    strategy.arch_step(lambda: F.cross_entropy(net(x), label))
    assert all(torch.equal(a, b) for a, b in zip(weights, net.weight_parameters(), strict=True))
    assert all(p.grad is None for p in net.weight_parameters())
    assert any(not torch.equal(a, b) for a, b in zip(logits, net.arch_parameters(), strict=True))


def test_continues_exactly_from_its_state():
    target = LOW + 0.3 * (HIGH - LOW)
    options = {"warmup": 0.1, "settle": 0.1, "block_kappa": 0.9}
    strategy, net, optimizer = fresh(target, epochs=10, **options)
    run(strategy, net, range(6), optimizer)
    saved = copy.deepcopy((strategy.state_dict(), net.state_dict()))
    assert net.candidates_left() < 8  # something was pruned, so the structure matters
    run(strategy, net, range(6, 10), optimizer)

    other, copy_net, _ = fresh(target, epochs=10, **options)
    other.load_state_dict(saved[0])
    copy_net.load_state_dict(saved[1])
    run(other, copy_net, range(6, 10), torch.optim.SGD(copy_net.weight_parameters(), lr=0.05))
    assert other.finish() == strategy.finish()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), copy_net.parameters(), strict=True))


@given(st.floats(0.03, 0.97), st.integers(0, 1000), st.floats(0, 2))
@settings(max_examples=30, deadline=None)
def test_adjustment_reaches_the_interval_from_any_start(share, seed, price):
    target = LOW + share * (HIGH - LOW)
    encoding = adjust_widths(SPACE, MacsCost(), SPACE.sample(random.Random(seed)), target, price)
    assert 0.97 * target < space_cost(MacsCost(), SPACE, encoding) <= target


def test_adjustment_keeps_candidates_and_proportions_when_widths_suffice():
    found = ((0, 24), (1, 48), None, (0, 48))
    cost = MacsCost()
    target = space_cost(cost, SPACE, found) * 1.2
    wider = adjust_widths(SPACE, cost, found, target, 0.5)
    assert [c and c[0] for c in wider] == [0, 1, None, 0]
    assert all(w[1] >= f[1] for w, f in zip(wider, found, strict=True) if f)
    narrower = adjust_widths(SPACE, cost, found, target / 2, 0.5)
    assert all(n[1] < f[1] for n, f in zip(narrower, found, strict=True) if f)
    assert [c and c[0] for c in narrower] == [0, 1, None, 0]


@pytest.mark.parametrize(("target", "words"), [(LOW * 0.5, "below the fastest"), (HIGH * 2, "above the slowest")])
def test_impossible_target_names_both_ends(target, words):
    with pytest.raises(LatencyError, match=rf"{words} .* between 0\.0216\d and 0\.336\d MMACs"):
        fresh(target)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_target_must_be_a_positive_number(bad):
    with pytest.raises(LatencyError, match="positive"):
        TieredPruning(bad)


def test_prunet_gpu_range_contains_both_published_networks():
    space, cost = load_space("prunet_gpu"), MacsCost()
    (low, _), (high, _) = cost_range(cost, space)
    assert low < 1870.345792 < 3241.678272 < high


def test_the_very_fastest_network_is_a_possible_target():
    strategy, _net, _ = fresh(LOW)
    assert space_cost(MacsCost(), SPACE, strategy.finish()) == LOW


def test_without_a_target_a_third_of_the_way_is_taken():
    strategy, _net, _ = fresh(None)
    assert strategy.status()["target"] == float(f"{LOW + (HIGH - LOW) / 3:.2g}")


def test_the_range_in_the_message_can_be_used_as_it_stands():
    with pytest.raises(LatencyError) as error:
        fresh(HIGH * 3)
    low, high = (float(word) for word in str(error.value).split("between ")[1].split(" MMACs")[0].split(" and "))
    assert LOW <= low < LOW * 1.001 and HIGH * 0.999 < high <= HIGH
    fresh(low)
    fresh(high)


@pytest.mark.parametrize(
    "options", [{"warmup": 2.0}, {"active": 0}, {"lr": 0.0}, {"tau": (1.0, -1.0)}, {"layer_threshold": 0.2}]
)
def test_settings_out_of_range_are_named(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        TieredPruning(1.0, **options)


@pytest.mark.parametrize("active", [None, 2])
def test_windows_see_loss_and_cost_in_the_same_proportion_however_many_options_run(active):
    """The gradients that a window is given, averaged over samples, must not depend on ``active``."""
    sums = {}
    for count in (None, active):
        strategy, net, _ = fresh(HIGH * 0.3, warmup=0.0, active=count, lr=1e-9)
        strategy.dual, strategy.dual_lr = 0.5, 0.0
        layer = net.stochastic_layers()[1]
        block = layer.candidates["0"]
        seen = []
        block.window.observe = lambda p, g, seen=seen: seen.append(g) or False
        # the loss is the block's own probability in the mixture times p_L: d loss / d logit_L is p_i / 4 on average
        for _ in range(1500):
            strategy.arch_step(lambda b=layer, k=block: _weighted(b, k))
        sums[count] = sum(seen) / len(seen)
    assert sums[active] == pytest.approx(sums[None], rel=0.15)


def _weighted(layer, block) -> torch.Tensor:
    names = layer._active or layer.options
    if "0" not in names:
        return sum(p.sum() for p in layer.theta.values()) * 0.0
    p = layer.probabilities(names, noisy=False)[names.index("0")].detach()
    return p * block.p_large()


def test_derived_networks_equal_the_supernet_at_every_point_of_a_search():
    strategy, net, optimizer = fresh(LOW + 0.4 * (HIGH - LOW), epochs=10, warmup=0.1, settle=0.1, block_kappa=0.9)
    x, _ = data(8)
    rng, sizes = random.Random(0), set()
    for epoch in range(10):
        run(strategy, net, range(epoch, epoch + 1), optimizer)
        sizes.add(net.candidates_left())
        free = [
            rng.choice([c for c in layer.layer.choices() if c is None or str(c[0]) in layer.candidates])
            if len(layer.options)
            else None
            for layer in net.stochastic_layers()
        ]
        for encoding in (net.best(), tuple(free)):
            net.set_hard(encoding)
            spec, state = net.derive(encoding, "point")
            model = create_model(spec)
            model.load_state_dict(state)
            for mode in (False, True):  # a running-statistics pass first: the training pass moves them
                net.train(mode)
                model.train(mode)
                torch.testing.assert_close(net(x), model(x), rtol=1e-5, atol=1e-5)
            net.set_hard(None)
        net.train()
    assert len(sizes) > 2, "nothing was pruned on the way"
    spec, _ = net.derive(strategy.finish(), "end")
    assert SPACE.contains(spec)
