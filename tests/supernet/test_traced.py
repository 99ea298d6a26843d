"""TracedNet: what is masked equals what is removed, in networks that are no specs."""

from __future__ import annotations

import copy
import random
import sys
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunet_zoo.cost import ScaledCost
from prunet_zoo.errors import CheckpointError, LatencyError, PrunetError, SpecError, UnknownNameError
from prunet_zoo.models import PrunedSpec, build_pruned
from prunet_zoo.models.channels import layer_shape
from prunet_zoo.supernet import traced
from prunet_zoo.supernet.traced import TracedCost, TracedNet
from prunet_zoo.supernet.traced_groups import find_coupled

TINY: dict[str, Any] = {"channels": [16, 16, 24, 24]}
NETS = {
    "resnet18": (32, 8, {}),
    "resnet50": (32, 16, {}),
    "mobilenetv3_small_100": (32, 8, {}),
    "efficientnet_b0": (32, 8, {}),
    "regnetx_002": (32, 8, {}),
}


def shaken(net: nn.Module, seed: int = 0) -> nn.Module:
    """Norms with statistics, scales and shifts of ordinary size, as training leaves them."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                for tensor in (layer.weight, layer.running_var):
                    tensor.copy_(torch.empty(tensor.shape).uniform_(0.5, 1.5, generator=draw))
                for tensor in (layer.bias, layer.running_mean):
                    tensor.copy_(torch.empty(tensor.shape).uniform_(-0.5, 0.5, generator=draw))
    return net


@pytest.fixture(scope="module")
def tiny() -> TracedNet:
    torch.manual_seed(0)
    net = TracedNet("resnet18", 32, 4, step=4, options=TINY)
    shaken(net.net)
    return net.eval()


@pytest.mark.parametrize("name", NETS)
def test_masked_equals_removed_equals_rebuilt(name: str):
    size, step, options = NETS[name]
    torch.manual_seed(0)
    net = TracedNet(name, size, 10, step=step, options=options)
    shaken(net.net)
    net.eval()
    encoding = net.space.sample(random.Random(0))
    for mask in net.masks():
        nn.init.uniform_(mask.weight)  # so that the channels that go are not the last ones
    keep = net.ranked(encoding)
    net.freeze(keep)
    spec, small = net.remove(keep, "cut")
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        wanted, got = net(x), small.eval()(x)
    assert (wanted - got).abs().max() <= 1e-4 * wanted.abs().max()
    assert spec.hash == net.space.decode(encoding).hash and net.space.encode(spec) == encoding
    assert sum(p.numel() for p in small.parameters()) == spec.params() == net.space.params(spec)
    assert spec.macs() == net.space.macs(spec) < net.space.macs(net.spec)
    again = build_pruned(PrunedSpec.from_dict(spec.to_dict()))
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(x), got)
    assert not any("on_output" in str(m._forward_hooks) for m in small.modules())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_any_channels_may_go(tiny: TracedNet, seed: int):
    draw, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    keep = []
    for group in tiny.groups:
        mine = torch.zeros(group.channels, dtype=torch.bool)
        mine[torch.randperm(group.channels, generator=draw)[: rng.choice(group.widths)]] = True
        keep.append(mine)
    tiny.freeze(keep)
    x = torch.randn(1, 3, 32, 32, generator=draw)
    with torch.no_grad():
        wanted = tiny(x)
        torch.testing.assert_close(tiny.remove(keep, "x")[1](x), wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)
    tiny.freeze(None)


def test_groups_of_a_residual_net(tiny: TracedNet):
    found = {group.name: group for group in tiny.groups}
    assert list(found)[:4] == ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"]
    assert found["layer1.0.conv1"].sites == ("layer1.0.act1",) and found["layer1.0.conv1"].norms == ("layer1.0.bn1",)
    stream = found["layer4.0.conv2"]  # behind each addition and activation
    assert stream.sites == ("layer4.0.act2", "layer4.1.act2")
    assert set(stream.norms) == {"layer4.0.bn2", "layer4.0.downsample.1", "layer4.1.bn2"}
    assert all(group.widths[-1] == group.channels for group in tiny.groups)
    assert tiny.skipped == {}
    fc, first = tiny.net.get_submodule("fc"), tiny.net.get_submodule("conv1")
    small = tiny.remove(tiny.ranked(tiny.space.smallest()), "least")[1]
    assert layer_shape(small.get_submodule("fc")) == (4, 4) and layer_shape(fc) == (4, 24), "classes stay"
    assert layer_shape(small.get_submodule("conv1")) == (4, 3, 1) and layer_shape(first) == (64, 3, 1), "images too"


def test_depthwise_hidden_channels_are_masked_before_squeeze_and_excite():
    net = TracedNet("efficientnet_b0", 32, 4)
    found = {group.name: group for group in net.groups}
    assert found["blocks.1.0.conv_pw"].sites == ("blocks.1.0.bn2.act",)
    assert set(found["blocks.1.0.conv_pw"].norms) == {"blocks.1.0.bn1", "blocks.1.0.bn2"}
    assert found["blocks.1.0.conv_pwl"].sites == ("blocks.1.0.bn3", "blocks.1.1")
    assert "squeeze" in net.skipped["blocks.1.0.se.conv_reduce"]


def test_grouped_convolutions_are_left_out_and_told():
    net = TracedNet("regnetx_002", 32, 4)
    assert "3 groups" in net.skipped["s1.b1.conv1.conv"]
    assert [group.name for group in net.groups] == ["stem.conv", *(f"s{i}.b1.conv3.conv" for i in (1, 2, 3, 4))]


def test_an_activation_that_serves_several_places_carries_no_mask():
    net = TracedNet("dla34", 32, 4)  # a block of it has one activation for both of its convolutions
    found = {group.name: group.sites for group in net.groups}
    assert found["level2.tree1.conv1"] == ("level2.tree1.bn1",)
    assert not any("differ" in reason for reason in net.skipped.values())


def test_removal_is_torch_prunings_own():
    torch.manual_seed(0)
    net = TracedNet("resnet18", 32, 4, step=4, options=TINY)
    own, gone = copy.deepcopy(net.net), [1, 5, 6, 11]
    for module in own.modules():
        module._forward_hooks.clear()
    graph = tp.DependencyGraph().build_dependency(own, torch.zeros(1, 3, 32, 32))
    layer: Any = own.get_submodule("layer2.0.conv2")
    graph.get_pruning_group(layer, tp.prune_conv_out_channels, gone).prune()
    keep = [torch.ones(group.channels, dtype=torch.bool) for group in net.groups]
    keep[[group.name for group in net.groups].index("layer2.0.conv2")][gone] = False
    state = net.remove(keep, "x")[1].state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.state_dict().items())


def test_a_mask_learns_as_if_it_were_its_weight(tiny: TracedNet):
    tiny.zero_grad()
    tiny(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in tiny.arch_parameters())
    tiny.zero_grad()


def test_restore_is_the_inverse(tiny: TracedNet):
    keep = tiny.ranked(tiny.space.sample(random.Random(3)))
    saved = copy.deepcopy(tiny.net.state_dict())
    _, small = tiny.remove(keep, "x")
    torch.manual_seed(5)
    with torch.no_grad():
        for p in small.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        tiny.restore(keep, small.state_dict())
        again = tiny.remove(keep, "x")[1].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in small.state_dict().items())
    tiny.net.load_state_dict(saved)


def test_a_copy_has_masks_of_its_own(tiny: TracedNet):
    other, x = copy.deepcopy(tiny), torch.randn(1, 3, 32, 32)
    wanted = tiny(x)
    other.freeze(other.ranked(other.space.smallest()))
    assert torch.equal(tiny(x), wanted) and not torch.equal(other(x), wanted)


def test_a_module_that_is_trained_already():
    torch.manual_seed(0)
    module = shaken(timm.create_model("resnet10t", num_classes=3)).eval()
    x = torch.randn(1, 3, 32, 32)
    wanted = module(x)
    net = TracedNet(module, 32, 3)
    assert torch.equal(net.eval()(x), wanted) and net.spec.timm is None
    spec, small = net.remove(net.ranked(net.space.smallest()), "least")
    built = build_pruned(spec, timm.create_model("resnet10t", num_classes=3))
    built.load_state_dict(small.state_dict())
    assert torch.equal(built.eval()(x), small(x))
    assert TracedCost(net.space)(spec) == net.space.macs(spec) / 1e6
    with pytest.raises(SpecError, match="not timm's"):
        spec.macs()


def test_channels_that_are_flattened_before_a_linear_layer():
    """Each channel of the last map is nine inputs of the linear layer."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 10, 3, bias=True), nn.ReLU()]
    net = TracedNet(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(90, 2)), 16, 2, step=2)
    shaken(net.net)
    net.eval()
    assert [(group.name, group.sites) for group in net.groups] == [("0", ("2",)), ("3", ("4",))]
    keep = [torch.arange(12) % 3 == 0, torch.arange(10) % 2 == 1]
    with pytest.raises(SpecError, match="can keep"):
        net.remove(keep, "x")
    keep = [torch.arange(12) % 3 == 0, torch.arange(10) % 5 != 0]
    net.freeze(keep)
    spec, small = net.remove(keep, "x")
    assert spec.shapes == {"0": (4, 3, 1), "1": (4,), "3": (8, 4, 1), "7": (2, 72)}
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(net(x), small.eval()(x))


def test_weights_of_the_start_network():
    start = timm.create_model("resnet18", num_classes=7, **TINY)
    state = {k: v + 0.01 if v.is_floating_point() else v for k, v in start.state_dict().items()}
    net = TracedNet("resnet18", 32, 7, options=TINY, state=state).net.state_dict()
    assert all(torch.equal(net[k], v) for k, v in state.items())
    other = TracedNet("resnet18", 32, 4, options=TINY, state=state).net.state_dict()  # a fresh head
    assert all(torch.equal(other[k], v) for k, v in state.items() if not k.startswith("fc."))
    with pytest.raises(CheckpointError, match="start network"):
        TracedNet("resnet18", 32, 4, state=state)


def test_space(tiny: TracedNet):
    space = tiny.space
    assert space.additive is False and space.count() > 1
    assert space.decode(space.largest()).shapes == {} and space.decode(space.largest()).hash == tiny.spec.hash
    assert space.contains(space.decode(space.smallest(), "least"))
    assert not space.contains(PrunedSpec.from_dict({"timm": "resnet18", "shapes": {}}))
    assert TracedNet("resnet18", 32, 4, step=4, options=TINY).space.hash == space.hash
    assert TracedNet("resnet18", 32, 4, step=8, options=TINY).space.hash != space.hash
    with pytest.raises(SpecError, match="does not offer"):
        space.decode(((0, 3), *space.largest()[1:]))
    with pytest.raises(SpecError, match="choices"):
        space.decode(space.largest()[1:])
    with pytest.raises(SpecError, match="can keep"):
        tiny.remove([torch.arange(group.channels) < 3 for group in tiny.groups], "x")
    widths = [5, *(group.channels for group in tiny.groups[1:])]
    assert tiny.encode(widths)[0] == (0, 8) and layer_of(tiny.at(widths), "conv1")[0] == 5


def layer_of(spec: PrunedSpec, name: str) -> tuple[int, ...]:
    return spec.shapes[name]


def test_cost(tiny: TracedNet):
    space = tiny.space
    macs = TracedCost(space)
    ms = ScaledCost(macs, tiny.spec, 3.0, {"device": "here"})
    assert macs.unit == "MMACs" and macs(tiny.spec) == tiny.spec.macs() / 1e6
    assert ms.unit == "ms" and ms(tiny.spec) == pytest.approx(3.0) and ms.describe()["device"] == "here"
    small = space.decode(space.smallest())
    assert ms(small) / 3.0 == pytest.approx(macs(small) / macs(tiny.spec))
    for cost in (macs, ms):
        with pytest.raises(LatencyError, match="no cost by layer"):
            cost.block(None, 3, (1, 1))  # type: ignore[arg-type]


def test_a_mask_at_the_wrong_place_is_found_out(monkeypatch: pytest.MonkeyPatch):
    def misplaced(*args: Any) -> Any:
        found, skipped = find_coupled(*args)
        wrong = {"layer1.0.conv1": ("layer1.0.bn2",), "layer2.0.conv1": ("layer2.0.conv1",)}
        return [
            traced.Coupled(c.name, c.channels, c.parts, wrong.get(c.name, c.sites), c.norms) for c in found
        ], skipped

    monkeypatch.setattr(traced, "find_coupled", misplaced)
    net = TracedNet("resnet18", 32, 4, options=TINY)
    assert set(net.skipped) == {"layer1.0.conv1", "layer2.0.conv1"}  # before BatchNorm's shift a mask removes nothing
    assert all("differ" in reason for reason in net.skipped.values())
    assert "layer1.1.conv1" in [group.name for group in net.groups]


def test_arguments_that_cannot_be(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UnknownNameError):
        TracedNet("resnet19", 32, 4)
    with pytest.raises(SpecError, match="no channels that can be removed"):
        TracedNet("resnet18", 32, 4, step=512)
    with pytest.raises(SpecError, match="step"):
        TracedNet("resnet18", 32, 4, step=0)
    with pytest.raises(SpecError, match="exclude"):
        TracedNet("resnet18", 32, 4, state={}, pretrained=True)
    with pytest.raises(SpecError, match="taken as it is"):
        TracedNet(nn.Identity(), 32, 4, pretrained=True)
    with pytest.raises(PrunetError, match="cannot follow"):
        TracedNet("vit_tiny_patch16_224", 32, 4)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(PrunetError, match=r"prunet-zoo\[prune\]"):
        TracedNet("resnet18", 32, 4)
