"""ChannelMask and SpecNet: straight-through masks, removal that changes nothing, states."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunet_zoo import create_model
from prunet_zoo.errors import CheckpointError, SpecError
from prunet_zoo.space import SearchSpace, load_space, space_around
from prunet_zoo.spec import load_spec
from prunet_zoo.supernet import ChannelMask, SpecNet

STEM = [{"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]}]
GRID = {"step": 4, "max_expansion": 2}
IRB = SearchSpace.from_dict(
    {
        "name": "irb",
        "input_size": 16,
        "stem": STEM,
        "stages": [
            {
                "out_channels": 16,
                "layers": [
                    {"stride": 2, "kernel_sizes": [3], "acts": ["hard_swish"], "se_ratios": [0.25], "hidden": GRID},
                    {"types": ["fused_irb"], "kernel_sizes": [3], "acts": ["silu"], "se_ratios": [0.5], "hidden": GRID},
                    {"types": ["conv"], "kernel_sizes": [3]},
                    {"repeat": 2, "kernel_sizes": [3, 5], "hidden": GRID, "skip": True},
                ],
            }
        ],
        "tail": {"out_channels": 16},
        "num_classes": 4,
    }
)
OUT = {"types": ["rep"], "kernel_sizes": [3], "out": {"step": 4}}
REP = SearchSpace.from_dict(
    {
        "name": "rep",
        "input_size": 16,
        "stem": STEM,
        "stages": [
            {"out_channels": 8, "layers": [{"repeat": 2, **OUT}]},
            {"out_channels": 16, "layers": [{"stride": 2, **OUT}, {"repeat": 2, **OUT, "acts": ["silu"]}]},
        ],
        "tail": {"out_channels": 16},
        "num_classes": 4,
    }
)
HIDDEN16 = {"kernel_sizes": [3], "hidden": {"step": 16, "max": 32}}
# with 16 channels the blocks behind the rep blocks would get a residual connection that they do not have
MIXED = REP.replace(
    name="mixed",
    stages=[
        {
            "out_channels": 16,
            "layers": [
                {"stride": 2, "out_channels": 32, "types": ["rep"], "kernel_sizes": [3], "out": {"step": 8}},
                HIDDEN16,
                {"out_channels": 24, "types": ["rep"], "kernel_sizes": [3], "out": {"step": 8}},
                {"types": ["fused_irb"], **HIDDEN16},
            ],
        }
    ],
)
SPACES = {"irb": IRB, "rep": REP, "mixed": MIXED}


def shake(net: nn.Module, seed: int) -> None:
    """Statistics, scales and shifts as after a training: a masked channel is not zero by chance."""
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(generator=g)
            m.running_var.uniform_(0.5, 2.0, generator=g)
            nn.init.normal_(m.weight, 1.0, 0.3, generator=g)
            nn.init.normal_(m.bias, 0.5, 0.5, generator=g)


def made(space: SearchSpace, seed: int = 0) -> SpecNet:
    torch.manual_seed(seed)
    net = SpecNet(space)
    shake(net, seed)
    return net.eval()


def drawn(net: SpecNet, seed: int) -> list[torch.Tensor]:
    """Random channels, as many as some width of each group's grid."""
    g = torch.Generator().manual_seed(seed)
    keep = []
    for group in net.groups:
        width = group.widths[int(torch.randint(len(group.widths), (), generator=g))]
        mine = torch.zeros(group.channels, dtype=torch.bool)
        mine[torch.randperm(group.channels, generator=g)[:width]] = True
        keep.append(mine)
    return keep


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# --- the mask -------------------------------------------------------------------------------------------------------


def test_gradient_passes_straight_to_the_weight_and_masked_to_the_input():
    mask = ChannelMask(3)
    with torch.no_grad():
        mask.weight.copy_(torch.tensor([0.9, 0.2, 0.50001]))
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    factor = torch.randn(2, 3, 4, 4)
    y = mask(x)
    (y * factor).sum().backward()
    on = torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    assert torch.equal(y, x * on)
    torch.testing.assert_close(mask.weight.grad, (x.detach() * factor).sum((0, 2, 3)))  # of the masked channel too
    torch.testing.assert_close(x.grad, factor * on)


@given(
    st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=12),
    st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_the_greatest_weights_stay_and_a_mask_is_never_empty(weights, least):
    mask = ChannelMask(len(weights), least)
    with torch.no_grad():
        mask.weight.copy_(torch.tensor(weights))
    kept = mask.kept()
    above = sum(w > 0.5 for w in weights)
    assert int(kept.sum()) == max(above, min(least, len(weights)))
    ranked = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    assert set(kept.nonzero().flatten().tolist()) == set(ranked[: int(kept.sum())])
    assert mask.order().tolist() == ranked
    assert torch.equal(mask.binary().detach(), kept.float())


def test_a_decided_mask_is_fixed_and_learns_no_more():
    mask = ChannelMask(4)
    mask.freeze(torch.tensor([True, False, False, True]))
    x = torch.randn(1, 4, 2, 2)
    with torch.no_grad():
        mask.weight.zero_()
    assert torch.equal(mask(x)[:, [1, 2]], torch.zeros(1, 2, 2, 2)) and torch.equal(mask(x)[:, [0, 3]], x[:, [0, 3]])
    assert not mask(x).requires_grad
    assert mask.order().tolist() == [0, 3, 1, 2]  # its own channels first
    mask.freeze(None)
    assert mask(x).requires_grad


# --- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_the_masked_network_computes_what_the_network_without_the_channels_does(name, seed):
    net = made(SPACES[name], seed)
    keep = drawn(net, seed)
    net.freeze(keep)
    spec, small = net.remove(keep, "small")
    with torch.no_grad():
        wanted = net(images())
        assert wanted.std(0).mean() > 1e-3  # it is no constant
        torch.testing.assert_close(small(images()), wanted, rtol=1e-4, atol=1e-4)
    assert SPACES[name].contains(spec) and spec.name == "small"
    assert sum(p.numel() for p in small.parameters()) == spec.params()
    state = net.derive(net.best(), "small")[1]
    again = create_model(spec)
    again.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images()), wanted, rtol=1e-4, atol=1e-4)


def test_masked_and_folded_agree():
    net = made(REP, 3)
    keep = drawn(net, 3)
    net.freeze(keep)
    small = net.remove(keep, "small")[1].switch_to_deploy()
    with torch.no_grad():
        torch.testing.assert_close(small(images()), net(images()), rtol=1e-4, atol=1e-4)


def test_in_training_mode_too_where_a_block_keeps_its_branches():
    net = made(IRB, 5)
    keep = drawn(net, 5)
    net.freeze(keep)
    small = net.remove(keep, "small")[1].train()
    net.train()
    torch.testing.assert_close(small(images()), net(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SPACES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_weights_go_back_into_the_masked_network(name, seed):
    net = made(SPACES[name], seed)
    keep = drawn(net, seed)
    net.freeze(keep)
    small = net.remove(keep, "small")[1]
    with torch.no_grad():  # as if it had been trained
        for p in small.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    gone = [(m.detach().clone(), k) for m, k in zip(_first_kernels(net), keep, strict=True)]
    net.restore(keep, small.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(net(images()), small(images()), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(net.remove(keep, "again")[1](images()), small(images()), rtol=1e-4, atol=1e-4)
    for (old, k), new in zip(gone, _first_kernels(net), strict=True):
        assert torch.equal(old[~k], new[~k])  # what is gone stays as it was


def _first_kernels(net: SpecNet) -> list[torch.Tensor]:
    return [net.net.get_submodule(g.norms[0].replace("norm", "conv")).weight for g in net.groups]


def test_weights_of_another_network_are_not_put_back():
    net = made(IRB)
    keep = drawn(net, 0)
    with pytest.raises(CheckpointError, match=r"no weights of the network without the channels: .* differ"):
        net.restore(keep, {"classifier.weight": torch.zeros(1)})


def test_groups_sites_and_grids():
    net = SpecNet(IRB, ((0, 12), (0, 16), (0, 0), None, (1, 32)))
    assert [(g.name, g.channels, g.widths[0], g.widths[-1]) for g in net.groups] == [
        ("stages.1.0", 12, 4, 12),
        ("stages.1.1", 16, 4, 16),
        ("stages.1.3", 32, 4, 32),
    ]
    assert net.layers == (0, 1, 4)  # the plain convolution has no width, the fourth layer is skipped
    assert net.groups[0].sites == ("stages.1.0.depthwise.act",) and net.groups[1].sites == ("stages.1.1.expand.act",)
    assert net.encode([5, 16, 29]) == ((0, 8), (0, 16), (0, 0), None, (1, 32))
    assert net.best() == net.start and net.depth() == 4 and net.candidates_left() == 60
    assert {id(p) for p in net.arch_parameters()} & {id(p) for p in net.weight_parameters()} == set()
    assert len(net.arch_parameters()) + len(net.weight_parameters()) == len(list(net.parameters()))


def test_the_spec_for_a_cost_may_have_any_width():
    net = made(IRB)
    spec = net.at([5, 6, 7, 9])
    assert [b.hidden for b in spec.stages[1].blocks] == [5, 6, None, 7, 9]
    full = net.at([g.channels for g in net.groups])
    assert full.hash == net.spec.hash and full.macs() > spec.macs()
    rep = made(REP).at([3, 5, 7, 9, 11])
    assert [b.out_channels for s in rep.stages[1:] for b in s.blocks] == [3, 5, 7, 9, 11]


@pytest.mark.parametrize("name", ["prunet_p0", "gpunet_0"])
def test_published_networks_have_a_group_for_each_inverted_residual_block(name):
    spec = load_spec(name)
    with torch.device("meta"):
        net = SpecNet(space_around(spec, 32))
    blocks = [b for s in spec.stages[1:] for b in s.blocks if b.has_hidden and b.hidden > 32]
    assert len(net.groups) == len(blocks) and net.spec.hash == spec.hash


def test_a_rep_block_before_a_residual_block_keeps_its_width():
    space = REP.replace(
        stages=[{"out_channels": 8, "layers": [{"repeat": 2, **OUT}, {"kernel_sizes": [3], "hidden": GRID}]}]
    )
    net = made(space)
    assert [g.name for g in net.groups] == ["stages.1.0", "stages.1.2"]
    keep = drawn(net, 1)
    net.freeze(keep)
    with torch.no_grad():
        torch.testing.assert_close(net.remove(keep, "s")[1](images()), net(images()), rtol=1e-4, atol=1e-4)


def test_no_width_of_a_rep_block_gives_the_next_block_a_residual_connection():
    net = made(MIXED)
    assert [g.widths for g in net.groups] == [(8, 24, 32), (16, 32), (8, 24), (16, 32)]
    assert net.encode([16, 32, 9, 32])[0] == (0, 24)
    coarse = {"stride": 2, "out_channels": 32, "types": ["rep"], "kernel_sizes": [3], "out": {"step": 16}}
    net = made(MIXED.replace(stages=[{"out_channels": 16, "layers": [coarse, HIDDEN16]}]))
    assert [g.name for g in net.groups] == ["stages.1.1"]  # of 16 and 32 only 32 is left: no mask


def test_ranked_takes_the_greatest_weights_and_refuses_widths_off_the_grid():
    net = made(REP)
    with torch.no_grad():
        net.arch_parameters()[0].copy_(torch.tensor([0.1, 0.9, 0.9, 0.2, 0.9, 0.3, 0.8, 0.7]))
    assert net.ranked(net.encode([4] * 5))[0].nonzero().flatten().tolist() == [1, 2, 4, 6]
    with pytest.raises(SpecError, match=r"stages\.1\.0 can keep 4, 8 channels"):
        net.ranked(((0, 6), *net.start[1:]))
    with pytest.raises(SpecError, match=r"can keep 4, 8 channels, not 3"):
        net.remove([torch.arange(g.channels) < 3 for g in net.groups], "odd")
    with pytest.raises(SpecError, match="5 bool tensors"):
        net.freeze([torch.ones(3)])


# --- states ---------------------------------------------------------------------------------------------------------


def test_states_load_strictly_before_and_after_the_decision():
    net = made(IRB)
    fresh, decided = copy.deepcopy(net.state_dict()), drawn(net, 2)
    net.freeze(decided)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = SpecNet(IRB).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(other.keep(), decided, strict=True))
    with torch.no_grad():
        assert torch.equal(other(images()), net(images()))
    other.load_state_dict(fresh)
    assert other.widths() == tuple(g.channels for g in other.groups)


def test_a_copy_has_masks_of_its_own():
    net = made(IRB)
    twin = copy.deepcopy(net)
    twin.freeze(drawn(twin, 4))
    with torch.no_grad():
        assert not torch.equal(twin(images()), net(images()))
        assert net.widths() == tuple(g.channels for g in net.groups)


def test_names_of_the_start_network_stay_and_its_weights_fit():
    torch.manual_seed(0)
    trained = create_model(IRB.decode(IRB.largest()))
    net = SpecNet(IRB, None, trained.state_dict()).eval()
    assert set(net.net.state_dict()) == set(trained.state_dict())
    with torch.no_grad():
        assert torch.equal(net(images()), trained.eval()(images()))
    wrong = create_model(IRB.decode(IRB.sample(__import__("random").Random(1))))
    with pytest.raises(CheckpointError, match="the weights given for the start network"):
        SpecNet(IRB, None, wrong.state_dict())


def test_a_start_of_another_space_is_refused():
    with pytest.raises(SpecError, match="another stem"):
        SpecNet(IRB, load_spec("prunet_p0"))
    with pytest.raises(SpecError, match="no width to choose"):
        SpecNet(IRB, ((0, 4), (0, 4), (0, 0), None, None))


def test_masks_work_in_other_types_and_layouts():
    net = made(IRB).to(memory_format=torch.channels_last)
    net.freeze(drawn(net, 6))
    x = images().to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(x)
    with torch.no_grad():
        full = net(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.1 * float(full.abs().max()))
    mask = ChannelMask(8)
    y = mask(torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_the_listed_rep_spaces_can_be_masked():
    net = SpecNet(load_space("rep_vgg_small"))
    assert len(net.groups) == len(net.space.layers)
