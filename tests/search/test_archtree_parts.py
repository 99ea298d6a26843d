"""Archtree's settings and parts: phases, targets, families, restored weights, importance of channels."""

from __future__ import annotations

import copy

import pytest
import torch
from tree_bench import COST, HIGH, LABEL, LOW, START, X, full

from prunet_zoo.errors import LatencyError, SpecError, TrainingError
from prunet_zoo.search.archtree import Archtree
from prunet_zoo.search.archtree_node import Node, select
from prunet_zoo.search.archtree_workers import ImportanceJob, channel_importance
from prunet_zoo.supernet.masked import MaskedNet
from prunet_zoo.supernet.masked_spec import SpecNet


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
