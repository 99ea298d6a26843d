"""Parameters, MACs, map sizes and feature levels that a spec states are those of the network that is built from it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from prunet_zoo import NetSpec, create_model, list_models, load_spec
from prunet_zoo.errors import SpecError
from prunet_zoo.spec import BlockSpec, StageSpec, TailSpec


@st.composite
def net_specs(draw: st.DrawFn) -> NetSpec:
    """Small valid networks with every block type, activation, kernel, stride, SE and padding."""
    stages = []
    for _ in range(draw(st.integers(1, 3))):
        blocks = []
        for _ in range(draw(st.integers(1, 3))):
            kind = draw(st.sampled_from(["conv", "irb", "fused_irb", "rep"]))
            plain = kind in ("conv", "rep")
            kernel = draw(st.sampled_from([1, 3, 5]))
            blocks.append(
                BlockSpec(
                    type=kind,
                    out_channels=draw(st.integers(1, 9)),
                    kernel_size=kernel,
                    stride=draw(st.sampled_from([1, 1, 2, 3])),
                    hidden=None if plain else draw(st.integers(1, 12)),
                    act=draw(st.sampled_from(["relu", "silu", "hard_swish"])),
                    se_ratio=0.0 if plain else draw(st.sampled_from([0.0, 0.25, 1.0])),
                    padding=None if kind == "rep" else draw(st.sampled_from([None, 0, kernel // 2])),
                )
            )
        stages.append(StageSpec(blocks=tuple(blocks)))
    try:
        return NetSpec(
            input_size=48,
            in_channels=draw(st.sampled_from([1, 3])),
            stages=tuple(stages),
            tail=TailSpec(
                out_channels=draw(st.integers(1, 9)), head_hidden=draw(st.none() | st.integers(1, 9)), act="silu"
            ),
            num_classes=draw(st.integers(0, 5)),
        )
    except ValidationError:  # strides and missing padding left no map
        reject()


def count(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, dict[str, tuple[int, ...]], torch.Tensor]:
    """MACs of all convolutions and linear layers, and the shape after every block, seen by hooks in a forward pass."""
    macs, shapes = 0, {}

    def on_layer(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Conv2d):
            per_value = module.in_channels // module.groups * math.prod(module.kernel_size)
        else:
            per_value = inputs[0].shape[-1]
        macs += per_value * output[0].numel()

    handles = [m.register_forward_hook(on_layer) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for s, stage in enumerate(model.stages):
        for i, block in enumerate(stage):
            name = f"stages.{s}.{i}"
            handles.append(
                block.register_forward_hook(lambda _m, _i, out, name=name: shapes.update({name: tuple(out.shape)}))
            )
    with torch.no_grad():
        logits = model.eval()(torch.zeros(shape, device=next(model.parameters()).device))
    for handle in handles:
        handle.remove()
    return macs, shapes, logits


@settings(max_examples=60, deadline=None)
@given(spec=net_specs(), height=st.integers(20, 51), width=st.integers(20, 51))
def test_random_specs_count_what_is_built(spec: NetSpec, height: int, width: int) -> None:
    model = create_model(spec)
    try:
        placed = list(spec.placed((height, width)))
    except SpecError:  # the drawn input is too small for the drawn network; the message is tested in test_spec
        return
    assert sum(p.numel() for p in model.parameters()) == spec.params()
    model.switch_to_deploy()  # the MACs of a rep block are of its deployed form
    macs, shapes, out = count(model, (1, spec.in_channels, height, width))
    assert macs == spec.macs((height, width))
    assert {p.name: (1, p.block.out_channels, *p.out_size) for p in placed} == shapes
    assert out.shape == (1, spec.num_classes or spec.tail.features)


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("size", [224, 320, 255, (192, 417)])
def test_listed_models_count_what_is_built(name: str, size: int | tuple[int, int]) -> None:
    with torch.device("meta"):  # shapes without arithmetic
        model = create_model(name)
    h, w = (size, size) if isinstance(size, int) else size
    macs, shapes, out = count(model, (1, model.spec.in_channels, h, w))
    assert sum(p.numel() for p in model.parameters()) == model.spec.params()
    assert macs == model.spec.macs(size)
    assert out.shape == (1, model.spec.num_classes)
    sizes = {p.name: p.out_size for p in model.spec.placed(size)}
    usual_padding = all(p.block.padding is None for p in model.spec.placed())
    for info, level in zip(model.feature_info, model.spec.feature_levels, strict=True):
        assert shapes[info["module"]] == (1, level.channels, *sizes[info["module"]])
        assert info["num_chs"] == level.channels
        if size in (224, 320) and usual_padding:
            assert shapes[info["module"]][2] == math.ceil(h / info["reduction"])


@pytest.mark.parametrize(("name", "sides"), [("gpunet_0", [320, 159, 79, 40, 20]), ("gpunet_2", [192, 94, 46, 23, 12])])
def test_convolutions_without_padding_lose_the_border(name: str, sides: list[int]) -> None:
    """The stride-2 fused blocks of GPUNet-0/1/2: (side - kernel) // 2 + 1."""
    spec = load_spec(name)
    size = 640 if name == "gpunet_0" else spec.input_size
    last = {p.stride: p.out_size[0] for p in spec.placed(size)}
    assert [last[level.stride] for level in spec.feature_levels] == sides


def test_an_input_that_is_too_small_is_refused_before_torch_sees_it() -> None:
    spec = NetSpec.from_dict(
        {
            "input_size": 32,
            "stages": [{"blocks": [{"type": "conv", "out_channels": 4, "kernel_size": 7, "padding": 0}]}],
            "tail": {"out_channels": 4},
        }
    )
    with pytest.raises(SpecError, match="6×6 px is too small for a block with kernel 7"):
        spec.macs(6)
    with pytest.raises(SpecError, match="input size must be positive, got 0"):
        spec.macs(0)
