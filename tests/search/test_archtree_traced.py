"""Archtree on a network of timm."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("torch_pruning", reason="networks that are no specs need torch-pruning: pip install '.[prune]'")

from prunet_zoo.cost import ScaledCost
from prunet_zoo.models import build_pruned
from prunet_zoo.search.archtree import Archtree
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
