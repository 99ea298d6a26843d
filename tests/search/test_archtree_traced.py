"""Archtree on a network of timm."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

pytest.importorskip("torch_pruning", reason="networks that are no specs need torch-pruning: pip install '.[prune]'")

from prunet_zoo.cost import ScaledCost
from prunet_zoo.errors import SpecError
from prunet_zoo.models import build_pruned
from prunet_zoo.models.export.fold import fold_batchnorm
from prunet_zoo.search.archtree import Archtree
from prunet_zoo.search.archtree_node import judges
from prunet_zoo.search.archtree_workers import ImportanceJob, channel_importance
from prunet_zoo.search.strategy import Services
from prunet_zoo.supernet.masked import MaskedNet
from prunet_zoo.supernet.traced import TracedCost, TracedNet


def train(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(8, 3, 32, 32, generator=g), torch.randint(0, 4, (8,), generator=g)


@pytest.fixture(scope="module")
def start() -> TracedNet:
    torch.manual_seed(0)
    return TracedNet("resnet18", 32, 4, step=4, options={"channels": [8, 8, 12, 12]})


def test_prunes_to_the_budget_and_goes_on_with_the_nodes_weights(start, tmp_path):
    net = copy.deepcopy(start)
    cost = ScaledCost(TracedCost(net.space), net.spec, 2.0)

    def measure(spec, quick=False) -> dict:
        ms = 0.3 + 0.85 * cost(spec)
        return {"median_ms": ms, "ci_low_ms": ms * 0.999, "ci_high_ms": ms * 1.001, "disturbed": []}

    services = Services(train, lambda: iter([next(train(0))]), measure, tmp_path)
    strategy = Archtree(1.6, beam=2, children=1, rounds=2, recovery_steps=1, importance_batches=1, pretrain=0.0)
    strategy.setup(net, cost, 1, 0, 1, services)
    strategy.explore()
    choice = strategy.measured_choice()
    assert choice.missed is None and 0.95 * 1.6 < choice.record["median_ms"] <= 1.6
    node = strategy._nodes[0]
    strategy.adopt(choice.encoding)
    spec, state = net.derive(choice.encoding, "found")
    assert measure(spec) == choice.record
    assert all(torch.equal(state[name], tensor) for name, tensor in node.state.items())
    model = build_pruned(spec).eval()
    model.load_state_dict(state)
    images, _ = next(train(1))
    torch.testing.assert_close(net.eval()(images), model(images), rtol=1e-4, atol=1e-4)


def test_restore_is_the_inverse_of_remove(start):
    net = copy.deepcopy(start)
    g = torch.Generator().manual_seed(1)
    keep = [torch.zeros(group.channels, dtype=torch.bool) for group in net.groups]
    for mask, group in zip(keep, net.groups, strict=True):
        mask[torch.randperm(group.channels, generator=g)[: group.widths[0]]] = True
    _, module = net.remove(keep, "small")
    state = {name: torch.randn(t.shape, generator=g).to(t.dtype) for name, t in module.state_dict().items()}
    MaskedNet.restore(net, keep, state)
    again = net.remove(keep, "small")[1].state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.items())


class Bare(nn.Module):
    """Two sets of channels: the first without a BatchNorm, the second with one or not."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.first, self.relu = nn.Conv2d(3, 16, 3, stride=2), nn.ReLU()
        self.second, self.norm = nn.Conv2d(16, 16, 3, bias=not norm), nn.BatchNorm2d(16) if norm else nn.Identity()
        self.relu2, self.head = nn.ReLU(), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu2(self.norm(self.second(self.relu(self.first(x)))))
        return self.head(x.mean((2, 3)))


def bare(norm: bool = True) -> TracedNet:
    torch.manual_seed(0)
    return TracedNet(Bare(norm), 32, 4, step=1)


def explored(net: TracedNet, folder, share: float = 0.7, **options) -> tuple[Archtree, list[str]]:
    cost, lines = TracedCost(net.space), []
    services = Services(train, lambda: iter([next(train(0))]), None, folder, lines.append)
    settings = {"beam": 1, "children": 2, "rounds": 3, "recovery_steps": 0, "importance_batches": 1, "pretrain": 0.0}
    strategy = Archtree(share * cost(net.spec), **{**settings, **options})
    strategy.setup(net, cost, 1, 0, 1, services)
    strategy.explore()
    return strategy, lines


def test_a_group_without_a_batchnorm_is_judged_by_its_layers_outputs(tmp_path):
    net = bare()
    assert judges(net, "taylor") == [((), ("first",)), (("norm",), ())]
    strategy, lines = explored(net, tmp_path)
    widths = [row["widths"] for row in strategy.details()["tree"]]
    assert {w[0] for w in widths} > {16} and strategy.missed() is None
    assert not any("whole" in line for line in lines)


def test_where_nothing_judges_a_group_it_stays_whole_and_this_is_told(tmp_path):
    strategy, lines = explored(bare(), tmp_path, importance="magnitude")
    widths = [row["widths"] for row in strategy.details()["tree"]]
    assert {w[0] for w in widths} == {16} and {w[1] for w in widths} > {16}
    assert [line for line in lines if "leaves first whole" in line and "importance='taylor'" in line]


def test_only_a_network_without_any_group_to_judge_is_refused(tmp_path):
    with pytest.raises(SpecError, match="nothing to judge channels by"):
        explored(bare(norm=False), tmp_path / "m", importance="magnitude")
    strategy, _ = explored(bare(norm=False), tmp_path / "t")
    assert strategy.missed() is None and sum(strategy.details()["tree"][-1]["widths"]) < 32


def test_importance_is_the_same_whether_a_batchnorm_is_folded_or_not():
    net = bare().net.eval()
    with torch.no_grad():
        for tensor in (net.norm.weight, net.norm.bias, net.norm.running_mean):
            tensor.copy_(torch.randn(16))
    folded = fold_batchnorm(copy.deepcopy(net), torch.zeros(1, 3, 32, 32))
    batches = [next(train(0))]
    with_norm = ImportanceJob(net, 0, (16,), (("norm",),), "taylor", 1)
    without = ImportanceJob(folded, 0, (16,), ((),), "taylor", 1, (("second",),))
    expected, found = channel_importance(with_norm, batches, "cpu")[0], channel_importance(without, batches, "cpu")[0]
    assert expected.min() >= 0 and expected.max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_importance_of_a_linear_layer_with_channels_last_in_a_map():
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x.permute(0, 2, 3, 1)).relu_()).mean((1, 2))

    net, (images, labels) = Mlp(), next(train(0))
    found = channel_importance(
        ImportanceJob(copy.deepcopy(net), 0, (6,), ((),), "taylor", 1, (("first",),)), [(images, labels)], "cpu"
    )[0]
    nn.functional.cross_entropy(net(images), labels).backward()
    layer = net.first
    expected = ((layer.weight * layer.weight.grad).sum(1) + layer.bias * layer.bias.grad).abs().double()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-6)


def test_mobilenetv3_with_its_bare_head_is_pruned(tmp_path):
    torch.manual_seed(0)
    net = TracedNet("mobilenetv3_small_100", 32, 4, step=32)
    by = dict(zip((group.name for group in net.groups), judges(net, "taylor"), strict=True))
    assert by["conv_head"] == ((), ("conv_head",)) and sum(not norms for norms, _ in by.values()) == 1
    strategy, _ = explored(net, tmp_path, share=0.93, children=1, rounds=1, removal=1.0)
    assert strategy.missed() is None
