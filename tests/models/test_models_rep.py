"""Rep blocks: what is folded or sliced computes the same; the two forms' weights are not mixed up."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunet_zoo import NetSpec, load_space
from prunet_zoo.errors import CheckpointError, SpecError
from prunet_zoo.latency.backends import Setting, get_backend
from prunet_zoo.latency.backends.verify import check_output
from prunet_zoo.latency.probes import block_probe, randomise
from prunet_zoo.models import PruNetBackbone, create_model, load_weights, save_weights, switch_to_deploy
from prunet_zoo.models.blocks import RepBlock, build_block, slice_rep
from prunet_zoo.models.export import FORMATS, Network, count_batchnorms, export, export_onnx
from prunet_zoo.models.layers import make_norm_factory
from prunet_zoo.spec import BlockSpec

SMALL = {
    "input_size": 16,
    "stages": [
        {"blocks": [{"type": "rep", "out_channels": 8}]},
        {"blocks": [{"type": "rep", "out_channels": 12, "stride": 2}, {"type": "rep", "out_channels": 12}]},
        {"blocks": [{"type": "irb", "out_channels": 12, "hidden": 24, "stride": 2}]},
    ],
    "tail": {"out_channels": 16},
    "num_classes": 5,
}


def rep(out: int, **changes: object) -> BlockSpec:
    return BlockSpec(type="rep", out_channels=out, **changes)


def random_block(spec: BlockSpec, in_channels: int, seed: int = 0, eps: float = 1e-5) -> RepBlock:
    """A block in eval mode, with norms of ordinary statistics and weights of both signs."""
    torch.manual_seed(seed)
    block = build_block(spec, in_channels, eps)
    assert isinstance(block, RepBlock)
    for layer in block.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.25, 2)
            layer.weight.data.uniform_(-1.5, 1.5)
            layer.bias.data.uniform_(-1, 1)
    return block.eval()


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3))


def model() -> nn.Module:
    torch.manual_seed(0)
    return randomise(create_model(SMALL))


blocks = st.tuples(
    st.sampled_from((1, 3, 5)),
    st.sampled_from((1, 2)),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 999),
)


def drawn(values: tuple[int, int, int, int, bool, int]) -> tuple[RepBlock, BlockSpec, int]:
    kernel, stride, channels, out, same, seed = values
    spec = rep(channels if same else out, kernel_size=kernel, stride=stride, act="silu")
    return random_block(spec, channels, seed), spec, channels


@settings(max_examples=40, deadline=None)
@given(values=blocks, side=st.integers(3, 8))
def test_one_convolution_computes_what_the_branches_do(values: tuple[int, int, int, int, bool, int], side: int) -> None:
    block, spec, channels = drawn(values)
    assert (block.identity is not None) == spec.has_identity(channels)
    assert sum(p.numel() for p in block.parameters()) == spec.params(channels)
    x = torch.randn(2, channels, side, side)
    kernel, bias = block.equivalent()
    with torch.no_grad():
        wanted = block(x)
        alone = block.act(nn.functional.conv2d(x, kernel, bias, spec.stride, spec.pad))
        assert off(alone, wanted) < 1e-5
        assert block.switch_to_deploy() is block and block.is_deployed
        assert list(block.state_dict()) == ["conv.weight", "conv.bias"]
        assert off(block(x), wanted) < 1e-5
        weight = block.conv.weight
        block.switch_to_deploy()  # again
        assert block.conv.weight is weight
    assert (block.equivalent()[0] == kernel).all()


@settings(max_examples=60, deadline=None)
@given(values=blocks, data=st.data(), deployed=st.booleans(), eps=st.sampled_from((1e-5, 1e-3)))
def test_a_slice_computes_the_sliced_kernel(
    values: tuple[int, int, int, int, bool, int], data: st.DataObject, deployed: bool, eps: float
) -> None:
    block, spec, channels = drawn(values)
    some = st.sets(st.integers(0, 8), min_size=1)
    ins = sorted(i for i in data.draw(some) if i < channels) or [0]
    outs = sorted(i for i in data.draw(some) if i < spec.out_channels) or [0]
    if data.draw(st.booleans()) and max(ins) < spec.out_channels:
        outs = ins
    kernel, bias = block.equivalent()
    whole = copy.deepcopy(block)
    if deployed:
        block.switch_to_deploy()
    small = spec.model_copy(update={"out_channels": len(outs)})
    new = slice_rep(block, torch.tensor(ins), torch.tensor(outs), small, eps)
    assert not new.is_deployed and not new.training
    assert (new.identity is not None) == small.has_identity(len(ins))
    got, got_bias = new.equivalent()
    wanted = kernel[outs][:, ins]
    scale = max(1.0, float(kernel.abs().max()), float(bias.abs().max()))
    assert float((got - wanted).abs().max()) < 1e-5 * scale
    assert float((got_bias - bias[outs]).abs().max()) < 1e-5 * scale
    x = torch.zeros(2, channels, 6, 6)
    x[:, ins] = torch.randn(2, len(ins), 6, 6)
    with torch.no_grad():
        assert off(new(x[:, ins]), whole(x)[:, outs]) < 2e-5


def test_where_the_same_channels_stay_every_branch_is_sliced() -> None:
    block = random_block(rep(6), 6)
    keep = torch.tensor([0, 3, 4])
    new = slice_rep(block, keep, keep, rep(3), 1e-5)
    for mine, whole in ((new.dense.norm, block.dense.norm), (new.identity, block.identity)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(getattr(mine, name), getattr(whole, name)[keep])
    assert torch.equal(new.point.conv.weight, block.point.conv.weight[keep][:, keep])
    other = slice_rep(block, keep, keep.flip(0), rep(3), 1e-5)  # the same set, but not in the same places
    assert not other.identity.weight.any() and not other.identity.bias.any()
    assert torch.allclose(other.equivalent()[0], block.equivalent()[0][keep.flip(0)][:, keep], atol=1e-6)


def test_a_carried_identity_keeps_each_channels_mean_when_statistics_are_taken_anew() -> None:
    torch.manual_seed(0)
    block, x = random_block(rep(8), 8), torch.randn(64, 8, 12, 12)
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]

    def recalibrate(module: nn.Module, x: torch.Tensor) -> nn.Module:
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_running_stats()
                norm.momentum = None
        with torch.no_grad():
            module.train()(x)
        return module.eval()

    keep_in, keep_out = torch.tensor([0, 1, 2, 5, 6, 7]), torch.tensor([1, 2, 3, 4])
    x[:, [3, 4]] = 0  # the channels that go carry nothing
    recalibrate(block, x)
    assert len(norms) == 3
    new = slice_rep(block, keep_in, keep_out, rep(4), 1e-5)
    before, x = copy.deepcopy(new), x[:, keep_in]
    recalibrate(new, x)
    with torch.no_grad():
        y = [module.dense(x) for module in (before, new)]
    assert torch.allclose(y[0].mean((0, 2, 3)), y[1].mean((0, 2, 3)), atol=1e-4)
    ratio = y[1].std((0, 2, 3)) / y[0].std((0, 2, 3))
    assert float(ratio.min()) > 0.5 and float(ratio.max()) < 2


def test_what_cannot_be_sliced() -> None:
    block, keep = random_block(rep(6), 6), torch.tensor([0, 1])
    with pytest.raises(SpecError, match="2 output and 2 input channels were chosen"):
        slice_rep(block, keep, keep, rep(3), 1e-5)
    with pytest.raises(SpecError, match="a slice has the kernel and stride of its block"):
        slice_rep(block, keep, keep, rep(2, stride=2), 1e-5)
    with pytest.raises(SpecError, match="no branches to absorb"):
        block.switch_to_deploy().absorb(*block.equivalent())


@pytest.mark.parametrize("cfg", [{"type": "GN", "num_groups": 2}, {"type": "BN", "track_running_stats": False}])
def test_other_norms_are_not_folded(cfg: dict[str, object]) -> None:
    backbone = PruNetBackbone(SMALL, out_indices=(0,), norm_cfg=cfg)
    with pytest.raises(SpecError, match=r"cannot be folded.*norm_cfg=dict\(type='BN'\)"):
        backbone.switch_to_deploy()
    assert not any(isinstance(m, RepBlock) and m.is_deployed for m in backbone.modules())
    with pytest.raises(SpecError, match="cannot be folded"):
        export_onnx(backbone, (1, 3, 16, 16))


@pytest.mark.parametrize("norm_cfg", [None, {"type": "SyncBN"}, {"type": "BN", "affine": False}])
def test_backbone_and_classifier_switch(norm_cfg: dict[str, object] | None) -> None:
    x = torch.randn(2, 3, 16, 16)
    backbone = randomise(PruNetBackbone(SMALL, out_indices=(0, 1), norm_cfg=norm_cfg, frozen_stages=0))
    classifier = randomise(create_model(SMALL, norm=make_norm_factory(norm_cfg)))
    with torch.no_grad():
        for net in (backbone, classifier):
            wanted = net(x)
            assert net.switch_to_deploy() is net and net.switch_to_deploy() is net
            for a, b in zip(net(x), wanted, strict=True):
                assert off(a, b) < 1e-5
    deployed = [m for m in backbone.modules() if isinstance(m, RepBlock)]
    assert len(deployed) == 3 and all(m.is_deployed for m in deployed)
    assert not any(p.requires_grad for p in deployed[0].parameters())  # what was frozen is frozen
    assert switch_to_deploy(backbone) == 0


def test_torchscript_takes_both_forms() -> None:
    net, x = model(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        wanted = net(x)
        assert torch.equal(torch.jit.script(net)(x), wanted)
        assert off(torch.jit.script(net.switch_to_deploy())(x), wanted) < 1e-5


def test_weights_of_the_other_form_are_named(tmp_path) -> None:
    trained, deployed = model(), model().switch_to_deploy()
    save_weights(tmp_path / "deployed.safetensors", deployed.state_dict(), deployed.spec)
    to_deploy = r"deployed form, the network is in the form that is trained: call switch_to_deploy\(\)"
    to_train = "these weights are of the form that is trained.*load them into a fresh network"
    for load, other, message in (
        (lambda n, s: n.load_state_dict(s), model(), to_deploy),
        (load_weights, model(), to_deploy),
        (load_weights, PruNetBackbone(SMALL, out_indices=(0,)), to_deploy),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(other, deployed.state_dict())
    for load in (lambda n, s: n.load_state_dict(s), load_weights):
        with pytest.raises(CheckpointError, match=to_train):
            load(model().switch_to_deploy(), trained.state_dict())
    with pytest.raises(CheckpointError, match=r"deployed\.safetensors does not fit: stages\.0\.0\.conv\.weight"):
        create_model(tmp_path / "deployed.safetensors")
    fresh, x = create_model(SMALL).switch_to_deploy().eval(), torch.randn(1, 3, 16, 16)
    load_weights(fresh, tmp_path / "deployed.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh(x), deployed(x))


def test_an_exported_file_has_one_convolution_a_block(tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    net = model().train()
    names = list(net.state_dict())
    record = export(Network(net, "small", (16, 16)), FORMATS["onnx"], tmp_path / "small.onnx")
    assert record["batchnorm"] == {"folded": count_batchnorms(net), "kept": 0} and record["max_error"]["output"] < 1e-4
    nodes = [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node]
    assert nodes.count("Conv") == 3 + 3 + 1 and "BatchNormalization" not in nodes
    assert net.training and list(net.state_dict()) == names  # the given network is as it was


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "openvino"])
def test_what_is_measured_is_deployed(name: str) -> None:
    if name != "torch":
        pytest.importorskip(name)
    net, setting, backend = model(), Setting(), get_backend(name)
    session = backend.prepare(net, (1, 3, 16, 16), setting)
    assert check_output(session, net, (1, 3, 16, 16)) < 1e-4
    assert not any(isinstance(m, RepBlock) and m.is_deployed for m in net.modules())
    probe = randomise(block_probe(rep(8), 8, (4, 4)))
    session = backend.prepare(probe, (1, *probe.in_shape), setting)
    assert np.isfinite(session.output()).all() and check_output(session, probe, (1, *probe.in_shape)) < 1e-4


def test_eager_torch_runs_one_convolution_a_block() -> None:
    from prunet_zoo.latency.backends.torch_eager import place

    ready, x = place(model(), (1, 3, 16, 16), Setting())
    seen: list[str] = []
    for layer in ready.modules():
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            layer.register_forward_hook(lambda m, _i, _o: seen.append(type(m).__name__))
    ready(x)
    assert seen[:3] == ["Conv2d"] * 3  # then the irb
    assert sum(name == "Conv2d" for name in seen) == 3 + 3 + 1


def test_rep_vgg_b1_has_the_published_parameters() -> None:
    """Those of the paper's RepVGG-B1 as timm has it; ours has a tail convolution, which the paper's does not."""
    space = load_space("rep_vgg_b1")
    spec = space.decode(space.largest())
    with torch.device("meta"):
        published = sum(p.numel() for p in timm.create_model("repvgg_b1").parameters())
        ours = sum(p.numel() for p in create_model(spec).parameters())
    tail = spec.tail.params(2048)
    assert ours == spec.params() and ours - tail == published
    # published: 11.8 GMACs in the deployed form
    assert math.isclose(spec.macs() - spec.tail.macs(2048, (7, 7)), 11.8e9, rel_tol=0.01)


def test_gradients_reach_every_branch() -> None:
    net = create_model(NetSpec.from_dict(SMALL)).train()
    net(torch.randn(4, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
