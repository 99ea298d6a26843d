"""DDPNAS in a super-network: what is trained is what is credited, steps, pruning, target, exact continuation."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from prunet_zoo import create_model
from prunet_zoo.errors import LatencyError, SpecError, TrainingError
from prunet_zoo.search import DDPNAS, MacsCost, Services, cost_range, space_cost
from prunet_zoo.search.target import TargetHitter
from prunet_zoo.space import Encoding, SearchSpace
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
                    {"kernel_sizes": [3], "hidden": {"step": 4, "max_expansion": 4}, "skip": True},
                    {"types": ["conv"], "kernel_sizes": [1, 3], "skip": True},
                ],
            }
        ],
        "tail": {"out_channels": 16},
        "num_classes": 4,
    }
)
COST = MacsCost()
LOW, HIGH = (end[0] for end in cost_range(COST, SPACE))
TARGET = LOW + 0.5 * (HIGH - LOW)
STEPS = 10


def data(n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes that differ in where the image is bright."""
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, 4, (n,), generator=g)
    x = torch.randn(n, 3, 16, 16, generator=g) * 0.3
    for i, k in enumerate(label.tolist()):
        x[i, :, 8 * (k // 2) : 8 * (k // 2) + 8, 8 * (k % 2) : 8 * (k % 2) + 8] += 1.0
    return x, label


def services(lines: list[str] | None = None) -> Services:
    """The images' second half is held out, in two batches."""
    x, label = data()

    def train(seed: int) -> Iterator:
        while True:
            yield x[:8], label[:8]

    def held() -> Iterator:
        yield x[32:52], label[32:52]
        yield x[52:], label[52:]

    return Services(train, held, None, Path(), (lines if lines is not None else []).append)


def fresh(
    target: float | None = TARGET, epochs: int = 8, seed: int = 0, cls: type[DDPNAS] = DDPNAS, **options
) -> tuple[DDPNAS, SuperNet, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = SuperNet(SPACE)
    strategy = cls(target, **{"passes": 2, "widths": 2, **options})
    strategy.setup(net, COST, epochs, seed, STEPS, services())
    return strategy, net, torch.optim.SGD(net.weight_parameters(), lr=0.05)


def one_step(strategy: DDPNAS, net: SuperNet, optimizer: torch.optim.Optimizer, index: int):
    x, label = data()
    batch = slice(8 * (index % 4), 8 * (index % 4) + 8)
    strategy.before_weight_step()
    optimizer.zero_grad()
    F.cross_entropy(net(x[batch]), label[batch]).backward()
    optimizer.step()
    return strategy.after_weight_step()


def run(strategy: DDPNAS, net: SuperNet, optimizer: torch.optim.Optimizer, steps: range) -> list:
    events = []
    for index in steps:
        if index % STEPS == 0:
            strategy.start_epoch(index // STEPS)
        events += one_step(strategy, net, optimizer, index)[0]
    return events


def executed(net: SuperNet) -> Encoding:
    return tuple(layer.hard[0] for layer in net.stochastic_layers())


def credited_as_trained(cls: type[DDPNAS]) -> bool:
    """Whether every sub-network whose accuracy is recorded is the one that the steps before it trained."""
    strategy, net, optimizer = fresh(cls=cls)
    trained: list[set[Encoding]] = [set()]
    for index in range(8 * STEPS):
        done = len(strategy.search.evaluated)
        strategy.before_weight_step()
        trained[-1].add(executed(net))
        x, label = data(8)
        optimizer.zero_grad()
        F.cross_entropy(net(x), label).backward()
        optimizer.step()
        strategy.after_weight_step()
        if len(strategy.search.evaluated) > done and index < 8 * STEPS - 1:
            trained.append(set())
    assert strategy.search.done
    return all(
        turn == {strategy.search.encoding(e.picks)} for turn, e in zip(trained, strategy.search.evaluated, strict=False)
    )


class OtherSample(DDPNAS):
    """The known error: the sample is drawn anew for the training."""

    def _execute(self, encoding: Encoding, before: int) -> None:
        super()._execute(self.search.encoding(self.search.single(str(self.step))), before)


def test_what_is_trained_is_what_is_credited():
    assert credited_as_trained(DDPNAS)
    assert not credited_as_trained(OtherSample)


def validated_as_asked(cls: type[DDPNAS]) -> bool:
    """Whether what the network executes while it is validated is always what the search credits."""
    same = []

    class Spy(cls):
        def _validate(self) -> float:
            def held() -> Iterator:
                same.append(executed(self.supernet) == self.search.encoding(self.search.ask()))
                yield data()

            self.services = Services(lambda seed: iter(()), held, None, Path())
            return super()._validate()

    strategy, net, optimizer = fresh(cls=Spy, epochs=2)
    run(strategy, net, optimizer, range(2 * STEPS))
    assert len(same) == len(strategy.search.evaluated) == strategy.search.total
    return all(same)


class OtherValidated(DDPNAS):
    """The known error in another place: another sub-network is executed just before the validation."""

    def _validate(self) -> float:
        self._execute(self.search.encoding(self.search.single(str(self.step))), 0)
        return super()._validate()


def test_what_is_validated_is_what_is_credited():
    assert validated_as_asked(DDPNAS)
    assert not validated_as_asked(OtherValidated)


def test_few_steps_for_a_sub_network_are_told():
    def told(epochs: int) -> list[str]:
        lines: list[str] = []
        strategy = DDPNAS(TARGET, passes=2, widths=2)
        strategy.setup(SuperNet(SPACE), COST, epochs, 0, STEPS, services(lines))
        return [line for line in lines if "fewer than 20 steps" in line]

    assert told(36) == []  # 18 sub-networks, 10 steps an epoch
    (line,) = told(35)
    assert "train 36 epochs, or lower passes or widths" in line


class PercentError(DDPNAS):
    """The known error: error in the place of accuracy."""

    def _validate(self) -> float:
        return 1 - super()._validate()


def test_accuracy_is_the_executed_networks_on_the_held_images():
    def holds(cls: type[DDPNAS]) -> bool:
        strategy, net, optimizer = fresh(cls=cls)
        x, label = data()
        while not strategy.search.evaluated:
            one_step(strategy, net, optimizer, 0)
        net.eval()
        with torch.no_grad():
            right = float((net(x[32:]).argmax(1) == label[32:]).float().mean())
        return strategy.search.evaluated[-1].accuracy == pytest.approx(right)

    assert holds(DDPNAS)
    assert not holds(PercentError)


@pytest.mark.parametrize("update", ["first", "momentum"])
def test_ends_with_one_choice_a_layer_that_learnt_something(update):
    strategy, net, optimizer = fresh(update=update, epochs=12)
    run(strategy, net, optimizer, range(12 * STEPS))
    assert strategy.search.done and strategy.status()["choices"] == 3
    assert max(e.accuracy for e in strategy.search.evaluated) > 0.5
    assert net.best() == strategy.search.encoding(strategy.search.best())
    assert strategy.status()["candidates"] == net.candidates_left() <= 3


def test_every_trained_network_is_within_the_target():
    for share in (0.1, 0.4, 0.8):
        target = LOW + share * (HIGH - LOW)
        strategy, net, optimizer = fresh(target, warmup=0.2)
        for index in range(8 * STEPS):
            one_step(strategy, net, optimizer, index)
            assert space_cost(COST, SPACE, executed(net)) <= target * (1 + 1e-9)
            assert strategy.status()["expected"] <= target * (1 + 1e-9)


def test_blocks_without_a_width_left_are_removed_and_forgotten():
    strategy, net, optimizer = fresh()
    events, gone = [], []
    for index in range(8 * STEPS):
        new, lost = one_step(strategy, net, optimizer, index)
        events, gone = events + new, gone + lost
    for layer, left in zip(net.stochastic_layers(), strategy.search.encoding(strategy.search.best()), strict=True):
        assert layer.options == (["skip"] if left is None else [str(left[0])])
    kinds = Counter(e.kind for e in events)
    assert kinds["block"] >= 2 and kinds["choice"] >= 3
    in_net = {id(p) for p in net.parameters()}
    assert gone and not any(id(p) in in_net for p in gone)
    assert all(0 <= e.probability <= 1 for e in events)
    assert json.dumps([e.to_dict() for e in events])


def test_steps_are_shared_out_evenly_and_an_epoch_is_a_turn_where_there_are_enough():
    assert fresh()[0].search.total == 18
    for epochs, steps, expected in ((8, 80, {4, 5}), (18, 20, {10}), (27, 30, {15})):
        strategy, net, optimizer = fresh(epochs=epochs)
        ends = [0]
        for index in range(steps):
            one_step(strategy, net, optimizer, index)
            if len(strategy.search.evaluated) == len(ends):
                ends.append(index + 1)
        assert {b - a for a, b in pairwise(ends)} == expected


def test_a_target_that_leaves_one_network_trains_that():
    target = LOW * 1.0001
    strategy, net, optimizer = fresh(target, epochs=2)
    assert strategy.search.done and strategy.search.total == 0
    run(strategy, net, optimizer, range(2 * STEPS))
    assert space_cost(COST, SPACE, strategy.finish()) <= target and executed(net) == strategy.finish()


def test_too_few_epochs_names_how_many_are_needed():
    with pytest.raises(TrainingError, match=r"18 sub-networks here .* 1 epochs have 10 steps; train 2 epochs \(as pub"):
        fresh(epochs=1)
    fresh(epochs=2)
    with pytest.raises(TrainingError, match="train 4 epochs"):
        fresh(epochs=3, warmup=0.5)
    fresh(epochs=4, warmup=0.5)


def test_the_warmup_trains_many_sub_networks_and_credits_none():
    strategy, net, optimizer = fresh(warmup=0.3)
    seen = set()
    for index in range(24):
        one_step(strategy, net, optimizer, index)
        seen.add(executed(net))
    assert len(seen) > 8 and not strategy.search.evaluated


def test_statistics_are_those_of_the_network_that_is_validated():
    strategy, net, optimizer = fresh()
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.fill_(1e6)  # what another width may have left
    one_step(strategy, net, optimizer, 0)
    for layer, choice in zip(net.stochastic_layers(), executed(net), strict=True):
        if choice is not None and choice[1]:
            norm = layer.candidates[str(choice[0])].block.expand.norm
            assert norm.running_mean[: choice[1]].abs().max() < 1e3
            assert bool((norm.running_mean[choice[1] :] == 1e6).all())
    assert [m for _, m in strategy._norms] == [0.1] * len(strategy._norms)
    assert net.training


@pytest.mark.parametrize("stop", [13, 31, 58])
def test_continues_exactly_in_the_middle_of_a_turn(stop):
    strategy, net, optimizer = fresh(warmup=0.1)
    run(strategy, net, optimizer, range(stop))
    saved = copy.deepcopy((json.loads(json.dumps(strategy.state_dict())), net.state_dict()))
    events = run(strategy, net, optimizer, range(stop, 8 * STEPS))

    other, copied, _ = fresh(warmup=0.1)
    other.load_state_dict(saved[0])
    copied.load_state_dict(saved[1])
    again = run(other, copied, torch.optim.SGD(copied.weight_parameters(), lr=0.05), range(stop, 8 * STEPS))
    assert other.state_dict() == strategy.state_dict()
    assert [e.what for e in again] == [e.what for e in events] and events
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), copied.state_dict().values(), strict=True))
    assert other.finish() == strategy.finish()


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_result_is_within_three_percent_under_the_target(share):
    target = LOW + share * (HIGH - LOW)
    strategy, net, optimizer = fresh(target, epochs=5)
    run(strategy, net, optimizer, range(5 * STEPS))
    encoding = strategy.finish()
    assert 0.97 * target < space_cost(COST, SPACE, encoding) <= target
    spec, state = net.derive(encoding, "found")
    create_model(spec).load_state_dict(state)


def test_removed_choices_are_taken_where_the_survivors_cannot_reach_the_target():
    strategy, net, optimizer = fresh(LOW + 0.3 * (HIGH - LOW))
    run(strategy, net, optimizer, range(8 * STEPS))
    assert net.missing(strategy.finish()) == []
    far = strategy.finish(0.995 * HIGH)
    assert 0.97 * 0.995 * HIGH < space_cost(COST, SPACE, far) <= 0.995 * HIGH
    with pytest.raises(LatencyError, match="no network of space 'test' costs between"):
        strategy.finish(2 * HIGH)


def test_hits_a_measured_target_where_the_table_is_off():
    strategy, net, optimizer = fresh()
    run(strategy, net, optimizer, range(8 * STEPS))

    def measure(spec, noted):
        ms = 1.04 * COST(spec)
        return {"median_ms": ms, "ci_low_ms": ms, "ci_high_ms": ms, "disturbed": []}

    found = TargetHitter(SPACE, COST, strategy.finish, measure, TARGET).run()
    assert found.missed is None and 0.97 * TARGET < found.trial.measured <= TARGET
    net.derive(found.trial.encoding, "found")


def test_default_target_details_and_what_it_does_not_do():
    strategy, net, optimizer = fresh(None)
    assert LOW < strategy.target < HIGH
    run(strategy, net, optimizer, range(8 * STEPS))
    details = json.loads(json.dumps(strategy.details()))
    assert len(details["evaluated"]) == details["total"] and len(details["theta"]) == 3
    assert not strategy.wants_arch_step(5) and strategy.end_epoch(0) == ([], [])
    with pytest.raises(TrainingError, match="no architecture steps"):
        strategy.arch_step(lambda: torch.zeros(()))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"target": -1.0}, LatencyError),
        ({"target": 2 * HIGH}, LatencyError),
        ({"warmup": 0.95}, SpecError),
        ({"batches": 0}, SpecError),
        ({"passes": 0}, SpecError),
        ({"widths": 1}, SpecError),
    ],
)
def test_settings_out_of_range_are_refused(options, error):
    with pytest.raises(error):
        fresh(**options)


def test_without_services_it_says_so():
    with pytest.raises(TrainingError, match="Services with held"):
        DDPNAS(TARGET).setup(SuperNet(SPACE), COST, 8, 0, STEPS)


def test_only_so_many_batches_are_validated_on():
    strategy, net, optimizer = fresh(batches=1)
    while not strategy.search.evaluated:
        one_step(strategy, net, optimizer, 0)
    assert strategy.search.evaluated[0].accuracy * 20 == pytest.approx(
        round(strategy.search.evaluated[0].accuracy * 20)
    )
