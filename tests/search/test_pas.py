"""PruningAsSearch: the loss, the target, phases, exact continuation, a whole search."""

from __future__ import annotations

import copy
import io
import itertools
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo import create_model
from prunet_zoo.cost import MacsCost, space_cost
from prunet_zoo.errors import LatencyError, SpecError
from prunet_zoo.search.pas import PruningAsSearch
from prunet_zoo.search.strategy import Services
from prunet_zoo.space import SearchSpace
from prunet_zoo.supernet import SpecNet, SuperNet

STEM = [{"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]}]
GRID = {"step": 2, "max_expansion": 4}
OUT = {"types": ["rep"], "kernel_sizes": [3], "out": {"step": 2}}
TAIL = {"tail": {"out_channels": 16}, "num_classes": 4, "input_size": 16, "stem": STEM}
IRB = SearchSpace.from_dict(
    {
        "name": "irb",
        "stages": [
            {
                "out_channels": 16,
                "layers": [
                    {"stride": 2, "kernel_sizes": [3], "se_ratios": [0.25], "hidden": GRID},
                    {"repeat": 3, "kernel_sizes": [3], "hidden": GRID},
                ],
            }
        ],
        **TAIL,
    }
)
REP = SearchSpace.from_dict(
    {
        "name": "rep",
        "stages": [
            {"out_channels": 32, "layers": [{"stride": 2, **OUT}, {"repeat": 2, **OUT}]},
            {"out_channels": 48, "layers": [{"repeat": 2, **OUT}]},
        ],
        **TAIL,
    }
)
SPACES = {"irb": IRB, "rep": REP}


class StepCost(MacsCost):
    """Costs that only the grid's widths have, as in a table, and that fall where a width grows by 2 from 4n."""

    unit = "ms"

    def block(self, block, in_channels, in_size):
        assert block.hidden % 2 == 0, "a table has no such width"
        return super().block(block, in_channels, in_size) * (1.1 if block.hidden % 4 == 0 else 1.0)

    def __call__(self, spec):
        space = IRB
        return self.fixed(space) + sum(
            self.block(b, la.in_channels, la.in_size) for b, la in zip(spec.stages[1].blocks, space.layers, strict=True)
        )

    def fixed(self, space):
        return 0.01


def data(n: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes that differ in where the image is bright."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 4, (n,), generator=g)
    x = torch.randn(n, 3, 16, 16, generator=g) * 0.3
    for i, k in enumerate(label.tolist()):
        x[i, :, 8 * (k // 2) : 8 * (k // 2) + 8, 8 * (k % 2) : 8 * (k % 2) + 8] += 1.0
    return x, label


def fresh(share: float | None = 0.5, space=IRB, epochs: int = 8, cost=None, steps: int = 8, seed: int = 0, **options):
    torch.manual_seed(seed)
    net = SpecNet(space)
    cost = cost or MacsCost()
    target = None if share is None else share * cost(net.spec)
    strategy = PruningAsSearch(target, **options)
    strategy.setup(net, cost, epochs, seed, steps)
    return strategy, net, torch.optim.SGD(net.weight_parameters(), lr=0.05)


def step(strategy, net, optimizer, x, label) -> None:
    strategy.before_weight_step()
    optimizer.zero_grad()
    loss = F.cross_entropy(net(x), label)
    penalty = strategy.penalty()
    (loss if penalty is None else loss + penalty).backward()
    optimizer.step()
    assert strategy.after_weight_step() == ([], [])


def run(strategy, net, optimizer, epochs: range, steps: int = 8) -> list:
    """The loop of `SearchStrategy`'s module."""
    x, label = data()
    events = []
    for epoch in epochs:
        if epoch == strategy.decision_epoch:
            strategy.explore()
            strategy.adopt(strategy.finish())
        strategy.start_epoch(epoch)
        for i in range(steps):
            batch = slice(8 * (i % 8), 8 * (i % 8) + 8)
            step(strategy, net, optimizer, x[batch], label[batch])
        events += strategy.end_epoch(epoch)[0]
    return events


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_the_penalty_is_that_of_the_masked_network_and_its_gradient_what_a_channel_costs(space):
    strategy, net, _ = fresh(0.5, space, ramp=0.0, alpha=3.0, multiplier=False)
    with torch.no_grad():
        net.arch_parameters()[0][:3] = 0.2
        net.arch_parameters()[2][1:6] = -1.0
    strategy.setup(net, MacsCost(), 8, 0, 8)
    strategy.start_epoch(0)
    penalty = strategy.penalty()
    widths, cost = net.widths(), MacsCost()
    assert widths[0] == net.groups[0].channels - 3 and widths[2] == net.groups[2].channels - 5
    start, now = cost(net.spec), cost(net.at(widths))  # of any width, on the grid or not
    assert float(penalty.detach()) == pytest.approx(3.0 * ((now - strategy.target) / start) ** 2, rel=1e-5)
    penalty.backward()
    for g, weight in enumerate(net.arch_parameters()):
        one_more = list(widths)
        one_more[g] -= 1
        slope = now - cost(net.at(one_more))
        wanted = 2 * 3.0 * (now - strategy.target) / start**2 * slope
        assert weight.grad.unique().numel() == 1  # of kept and masked channels alike
        assert float(weight.grad[0]) == pytest.approx(wanted, rel=1e-4)


def test_weights_and_masks_both_learn_and_no_optimiser_of_weights_has_the_masks():
    strategy, net, optimizer = fresh(0.5, ramp=0.0)
    weights = [p.clone() for p in net.weight_parameters()]
    masks = [p.clone() for p in net.arch_parameters()]
    strategy.start_epoch(0)
    step(strategy, net, optimizer, *data(8))
    assert any(not torch.equal(a, b) for a, b in zip(weights, net.weight_parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(masks, net.arch_parameters(), strict=True))
    assert all(p.grad is None for p in net.arch_parameters())
    assert not strategy.wants_arch_step(0) and strategy.arch_step(lambda: torch.zeros(())) == {}


# --- the target -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.35, 0.5, 0.8])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_the_macs_of_the_masked_network_are_within_two_percent_of_the_target_when_the_search_ends(space, share):
    strategy, net, optimizer = fresh(share, space, epochs=8, finetune=0.25)
    run(strategy, net, optimizer, range(6))
    now = MacsCost()(net.at(net.widths()))
    assert 0.98 * strategy.target < now <= strategy.target
    assert strategy.status()["expected"] == pytest.approx(now)
    run(strategy, net, optimizer, range(6, 8))
    found = space_cost(MacsCost(), space, net.best())
    assert 0.97 * strategy.target < found <= strategy.target


@pytest.mark.parametrize("share", [0.35, 0.5, 0.8])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_the_published_loss_comes_near_the_target_and_settles_on_it(space, share):
    options = {"epochs": 16, "finetune": 0.0, "ramp": 0.0, "multiplier": False, "steps": 16}
    strategy, net, optimizer = fresh(share, space, **options)
    assert strategy.alpha == 20.0
    run(strategy, net, optimizer, range(14), steps=16)
    assert MacsCost()(net.at(net.widths())) == pytest.approx(strategy.target, rel=0.25)
    run(strategy, net, optimizer, range(14, 16), steps=16)
    assert 0.98 * strategy.target < MacsCost()(net.at(net.widths())) <= strategy.target
    assert 0.97 * strategy.target < space_cost(MacsCost(), space, strategy.finish()) <= strategy.target


def test_with_the_multiplier_the_loss_is_the_cross_entropy_alone():
    strategy, net, optimizer = fresh(0.5, ramp=0.0)
    strategy.start_epoch(0)
    step(strategy, net, optimizer, *data(8))
    assert strategy.searching and strategy.penalty() is None
    with pytest.raises(SpecError, match="give multiplier=False too, or no alpha"):
        PruningAsSearch(1.0, alpha=5.0)


def test_channels_go_one_by_one_while_the_goal_comes_down():
    strategy, net, optimizer = fresh(0.4, epochs=8, finetune=0.25, ramp=0.7)
    seen = []
    for epoch in range(6):
        run(strategy, net, optimizer, range(epoch, epoch + 1))
        seen.append(strategy.status()["expected"])
        assert seen[-1] <= strategy.goal() * (1 + 1e-6)
    assert all(after <= 1.01 * before for before, after in itertools.pairwise(seen))
    assert seen[0] > 0.8 * strategy.cost.start


@given(st.floats(0.0, 1.0), st.integers(0, 1000), st.sampled_from(["irb", "rep"]))
@settings(max_examples=40, deadline=None)
def test_finish_reaches_the_interval_whatever_the_masks_have_learnt(where, seed, name):
    strategy, net, _ = fresh(1.0, SPACES[name])
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for w in net.arch_parameters():
            w.copy_(torch.rand(w.shape, generator=g) * 1.5 - 0.25)
    low, high = strategy.cost.least, strategy.cost.start
    target = low * 1.3 + where * (high - low * 1.3)
    found = strategy.finish(target)
    assert 0.97 * target < MacsCost()(SPACES[name].decode(found)) <= target
    assert strategy.finish(target) == found


def test_finish_keeps_what_the_masks_say_where_that_fits():
    strategy, net, _ = fresh(1.0)
    wanted = (8, 20, 32, 6)
    with torch.no_grad():
        for w, n in zip(net.arch_parameters(), wanted, strict=True):
            w.copy_(torch.linspace(1.0, 0.6, len(w)))
            w[n:] = 0.1
    target = MacsCost()(net.at(wanted)) * 1.001
    assert strategy.finish(target) == net.encode(wanted)


def test_costs_that_only_the_grid_has_and_that_are_not_monotone():
    strategy, net, optimizer = fresh(0.5, cost=StepCost())
    run(strategy, net, optimizer, range(8))
    found = StepCost()(IRB.decode(strategy.finish()))
    assert 0.97 * strategy.target < found <= strategy.target
    for share in (0.3, 0.45, 0.62, 0.9):
        target = share * strategy.cost.start
        assert 0.97 * target < StepCost()(IRB.decode(strategy.finish(target))) <= target


def test_a_grid_that_is_too_coarse_is_said():
    coarse = {**IRB.model_dump(), "stages": [{"out_channels": 16, "layers": [
        {"stride": 2, "kernel_sizes": [3], "hidden": {"step": 16, "max_expansion": 4}}]}]}  # fmt: skip
    space = SearchSpace.from_dict(coarse)
    net = SpecNet(space)
    low, high = (MacsCost()(net.at([w])) for w in (16, 32))
    strategy = PruningAsSearch((low + high) / 2)
    strategy.setup(net, MacsCost(), 4, 0, 4)
    with pytest.raises(LatencyError, match=r"no widths of the start network cost between .* finer grid"):
        strategy.finish()


@pytest.mark.parametrize(("share", "words"), [(0.001, "below the narrowest"), (1.5, "above the start")])
def test_a_target_out_of_reach_names_both_ends(share, words):
    with pytest.raises(LatencyError, match=rf"{words} network that pruning can give: choose between .* MMACs"):
        fresh(share)


def test_without_a_target_a_third_of_the_way_is_taken():
    strategy, _, _ = fresh(None)
    low, high = strategy.cost.least, strategy.cost.start
    assert strategy.status()["target"] == float(f"{low + (high - low) / 3:.2g}")


def test_rounding_takes_the_default_target_out_of_no_range():
    class Offset(MacsCost):
        """Almost all of the cost is that of every network: 1.04 to 1.06, and two digits make 1.0 of a third."""

        def __call__(self, spec):
            return 1.04 + 0.02 * super().__call__(spec) / MacsCost()(IRB.decode(IRB.largest()))

        def block(self, block, in_channels, in_size):
            return 0.02 * super().block(block, in_channels, in_size) / MacsCost()(IRB.decode(IRB.largest()))

    strategy, _, _ = fresh(None, cost=Offset())
    assert 1.0 < strategy.cost.least == strategy.target


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_target_must_be_a_positive_number(bad):
    with pytest.raises(LatencyError, match="positive"):
        PruningAsSearch(bad)


@pytest.mark.parametrize(
    "options",
    [{"alpha": -1.0}, {"lr": 0.0}, {"pretrain": 1.0}, {"finetune": -0.1}, {"ramp": 2.0}, {"pretrain": 0.6}],
)
def test_settings_out_of_range_are_named(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        PruningAsSearch(1.0, **options)


def test_a_super_network_without_masks_is_refused():
    with pytest.raises(SpecError, match=r"masked network .* not a SuperNet"):
        PruningAsSearch(1.0).setup(SuperNet(IRB), MacsCost(), 4, 0, 4)


# --- phases ---------------------------------------------------------------------------------------------------------


def test_the_phases_follow_each_other():
    strategy, net, optimizer = fresh(0.5, epochs=10, pretrain=0.2, finetune=0.3)
    assert strategy.decision_epoch == 7
    assert run(strategy, net, optimizer, range(2)) == []
    assert strategy.step == 0 and strategy.penalty() is None and net.widths() == (32, 64, 64, 64)
    events = run(strategy, net, optimizer, range(2, 7))
    assert {e.kind for e in events} <= {"channels", "widened"} and {e.layer for e in events} <= {0, 1, 2, 3}
    assert any("→" in e.what and e.what.startswith("stages.1.") for e in events)
    assert all(0 < e.probability <= 1 for e in events)
    with torch.no_grad():
        net.arch_parameters()[0].fill_(1.0)  # every channel of the first layer comes back
        net.arch_parameters()[1][40:].fill_(0.0)
    first, second = strategy.end_epoch(6)[0][:2]
    assert first.kind == "widened" and first.what.endswith("→ 32 channels") and second.kind == "channels"
    run(strategy, net, optimizer, range(7, 8))
    kept = net.keep()
    assert strategy.finish() == net.best() and all(m.frozen.numel() for m in net.masks())
    before = [w.clone() for w in net.arch_parameters()]
    run(strategy, net, optimizer, range(8, 10))
    assert all(torch.equal(a, b) for a, b in zip(kept, net.keep(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, net.arch_parameters(), strict=True))


@pytest.mark.parametrize(
    ("epochs", "options", "decision"),
    [(1, {}, None), (2, {}, 1), (10, {"finetune": 0.0}, None), (2, {"pretrain": 0.5, "finetune": 0.4}, None)],
)
def test_short_runs_search_for_an_epoch_at_least(epochs, options, decision):
    strategy, _, _ = fresh(0.5, epochs=epochs, **options)
    assert strategy.decision_epoch == decision and strategy.steps >= 8


@pytest.mark.parametrize(
    ("epochs", "options", "words"),
    [
        (1, {"pretrain": 0.3, "finetune": 0.3}, "1 epochs have no room for pretrain and finetune: .* train 3 epochs"),
        (2, {"pretrain": 0.3, "finetune": 0.3}, "2 epochs have no room for finetune: .* train 3 epochs"),
        (1, {}, "1 epochs have no room for finetune: .* train 2 epochs"),
    ],
)
def test_phases_that_a_short_run_has_no_room_for_are_told(epochs, options, words, tmp_path):
    def told(epochs: int) -> list[str]:
        lines: list[str] = []
        services = Services(lambda seed: iter(()), lambda: iter(()), None, tmp_path, lines.append)
        strategy = PruningAsSearch(**options)
        strategy.setup(SpecNet(IRB), MacsCost(), epochs, 0, 8, services)
        return lines

    (line,) = told(epochs)
    assert re.search(words, line)
    assert told(3) == []


@pytest.mark.parametrize("cut", [1, 4, 7, 9])
def test_continues_exactly_in_every_phase(cut):
    options = {"epochs": 10, "pretrain": 0.2, "finetune": 0.3, "space": REP}
    strategy, net, optimizer = fresh(0.5, **options)
    run(strategy, net, optimizer, range(cut))
    if cut == 7:  # decided, and stopped before the next epoch
        strategy.adopt(strategy.finish())
    file = io.BytesIO()
    torch.save([strategy.state_dict(), net.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    first = run(strategy, net, optimizer, range(cut, 10))

    other, twin, other_optimizer = fresh(0.5, seed=1, **options)
    other.load_state_dict(saved[0])
    twin.load_state_dict(saved[1])
    other_optimizer.load_state_dict(saved[2])
    assert run(other, twin, other_optimizer, range(cut, 10)) == first
    assert other.finish() == strategy.finish() and other.status() == strategy.status()
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True))


def test_continues_exactly_in_the_middle_of_an_epoch():
    strategy, net, optimizer = fresh(0.5, finetune=0.25)
    run(strategy, net, optimizer, range(2))
    x, label = data()
    strategy.start_epoch(2)
    for i in range(5):
        step(strategy, net, optimizer, x[8 * i : 8 * i + 8], label[8 * i : 8 * i + 8])
    saved = copy.deepcopy((strategy.state_dict(), net.state_dict(), optimizer.state_dict()))
    other, twin, other_optimizer = fresh(0.5, finetune=0.25, seed=1)
    other.load_state_dict(saved[0])
    twin.load_state_dict(saved[1])
    other_optimizer.load_state_dict(saved[2])
    other.start_epoch(2)
    for s, n, o in ((strategy, net, optimizer), (other, twin, other_optimizer)):
        for i in range(5, 8):
            step(s, n, o, x[8 * i : 8 * i + 8], label[8 * i : 8 * i + 8])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_gradients_that_are_not_finite_move_no_mask():
    strategy, net, _ = fresh(0.9, multiplier=False)
    strategy.start_epoch(0)
    before = [w.clone() for w in net.arch_parameters()]
    for w in net.arch_parameters():
        w.grad = torch.full_like(w, float("nan"))
    strategy.after_weight_step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.arch_parameters(), strict=True))


# --- a whole search -------------------------------------------------------------------------------------------------


def test_a_search_on_digits_gives_a_network_that_knows_them(tmp_path: Path):
    pytest.importorskip("sklearn")
    from prunet_zoo.data.digits_split import load_scans, split_indices

    images, labels = load_scans()
    train, test = (torch.as_tensor(part.copy()) for part in split_indices())
    x = F.interpolate(torch.tensor(images).float().reshape(-1, 1, 8, 8), 16).expand(-1, 3, -1, -1) / 8 - 1
    y = torch.tensor(labels)
    torch.manual_seed(0)
    net = SpecNet(REP.replace(num_classes=10))
    strategy = PruningAsSearch(0.5 * MacsCost()(net.spec), pretrain=0.3, finetune=0.3)
    services = Services(train=lambda seed: iter(()), held=lambda: iter(()), measure=None, folder=tmp_path)
    steps, epochs, rng = 24, 6, random.Random(0)
    strategy.setup(net, MacsCost(), epochs, 0, steps, services)
    optimizer = torch.optim.SGD(net.weight_parameters(), lr=0.05, momentum=0.9)
    for epoch in range(epochs):
        if epoch == strategy.decision_epoch:
            strategy.adopt(strategy.finish())
        strategy.start_epoch(epoch)
        net.train()
        for _ in range(steps):
            batch = train[torch.tensor(rng.sample(range(len(train)), 32))]
            step(strategy, net, optimizer, x[batch], y[batch])
        strategy.end_epoch(epoch)
    spec, state = net.derive(strategy.finish(), "found")
    assert 0.97 * strategy.target < MacsCost()(spec) <= strategy.target
    model = create_model(spec)
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model.eval()(x[test])
        torch.testing.assert_close(logits, net.eval()(x[test]), rtol=1e-3, atol=1e-3)
    assert (logits.argmax(1) == y[test]).float().mean() > 0.5  # chance is 0.1
