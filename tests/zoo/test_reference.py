"""The seven networks are the published ones: equal names, shapes, counts, maps and logits (see reference.py)."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from reference import NAMES, Reference, State, published
from synthetic import synthetic_state, write_zip

from prunet_zoo import create_model, load_spec
from prunet_zoo.models import PruNetBackbone, PruNetClassifier
from prunet_zoo.spec import NetSpec
from prunet_zoo.zoo.convert import convert_checkpoint, to_own_names
from prunet_zoo.zoo.names import STAGES, published_names

TOLERANCE = 1e-4  # of the largest logit, in float32


def picture(height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An image with large and small structure, (1, 3, H, W)."""
    generator = torch.Generator().manual_seed(height * 10_000 + width)
    coarse = torch.randn(1, 3, 5, 5, generator=generator) * 1.5
    fine = torch.randn(1, 3, height, width, generator=generator) * 0.5
    return (F.interpolate(coarse, (height, width), mode="bilinear") + fine).to(dtype)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of ``b``."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


class Converted(NamedTuple):
    name: str
    state: State  # published names
    path: Path  # our safetensors
    model: PruNetClassifier  # made from it


@pytest.fixture(scope="module", params=NAMES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Converted]:
    """A synthetic checkpoint as published, and what `convert_checkpoint` made of its zip."""
    folder, state = tmp_path_factory.mktemp(request.param), synthetic_state(request.param)
    source = write_zip(request.param, state, folder / "published.zip")
    out = convert_checkpoint(source, request.param, folder / "ours.safetensors")
    yield Converted(request.param, state, out, create_model(out).eval())
    shutil.rmtree(folder)  # up to 0.3 GB


@torch.no_grad()
def test_logits_at_the_published_size(converted: Converted) -> None:
    size = published(converted.name)["image_size"]
    image = picture(size, size)
    model = converted.model
    assert model.spec.input_size == size
    logits, _ = Reference(converted.name, converted.state)(image)
    assert difference(model(image), logits) < TOLERANCE
    assert 0.1 < logits.std() < 100
    other = model(image.flip(3))  # the logits depend on the image, far beyond the tolerance
    assert difference(other, logits) > 20 * TOLERANCE


@pytest.mark.parametrize("size", [(97, 131), (225, 225), (160, 224)], ids="{0[0]}x{0[1]}".format)
@torch.no_grad()
def test_logits_at_other_sizes(converted: Converted, size: tuple[int, int]) -> None:
    image = picture(*size)
    reference = Reference(converted.name, converted.state)
    assert difference(converted.model(image), reference(image)[0]) < TOLERANCE


@torch.no_grad()
def test_logits_in_double_precision(converted: Converted) -> None:
    state = {k: v.double() if v.is_floating_point() else v for k, v in converted.state.items()}
    image = picture(97, 131, torch.float64)
    model = copy.deepcopy(converted.model).double()
    assert difference(model(image), Reference(converted.name, state)(image)[0]) < 1e-9


@torch.no_grad()
def test_backbone_maps(converted: Converted) -> None:
    image = picture(193, 225)
    backbone = PruNetBackbone(converted.path, out_indices=(0, 1, 2, 3, 4)).eval()
    _, maps = Reference(converted.name, converted.state)(image)
    assert [info["reduction"] for info in backbone.feature_info] == [2, 4, 8, 16, 32]
    for info, ours in zip(backbone.feature_info, backbone(image), strict=True):
        theirs = maps[info["reduction"]]
        assert info["num_chs"] == theirs.shape[1]
        assert difference(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_names_shapes_and_counts(name: str) -> None:
    facts, spec = published(name), load_spec(name)
    with torch.device("meta"):
        state = PruNetClassifier(spec).state_dict()
    names = published_names(spec, STAGES[name])
    derived = {names[k]: [str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in state.items()}
    assert derived == facts["state_dict"]
    assert list(derived) == list(facts["state_dict"])
    assert len(set(names.values())) == len(names)
    assert spec.params() == facts["params"]
    assert spec.macs(facts["image_size"]) == facts["macs"]


def test_all_seven_are_there() -> None:
    assert set(NAMES) == set(STAGES)


def _fused_stride_2(data: dict[str, Any]) -> None:
    for stage in data["stages"]:
        for block in stage["blocks"]:
            if block["type"] == "fused_irb" and block["stride"] == 2:
                block["padding"] = None


def _set(path: tuple[Any, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def mutate(data: dict[str, Any]) -> None:
        for part in path[:-1]:
            data = data[part]
        assert data[path[-1]] != value
        data[path[-1]] = value

    return mutate


FAULTS = {
    "gpunet_0: usual padding in fused blocks of stride 2": ("gpunet_0", _fused_stride_2),
    "gpunet_2: usual padding in fused blocks of stride 2": ("gpunet_2", _fused_stride_2),
    "prunet_p0: eps 1e-5": ("prunet_p0", _set(("bn_eps",), 1e-5)),
    "gpunet_d1: eps 1e-3": ("gpunet_d1", _set(("bn_eps",), 1e-3)),
    "gpunet_0: eps of one block": ("gpunet_0", _set(("stages", 2, "blocks", 0, "bn_eps"), 1e-5)),
    "gpunet_1: ReLU in the head": ("gpunet_1", _set(("stages", 0, "blocks", 0, "act"), "relu")),
    "prunet_p0: swish in the head": ("prunet_p0", _set(("stages", 0, "blocks", 0, "act"), "silu")),
    "gpunet_0: ReLU in one block": ("gpunet_0", _set(("stages", 4, "blocks", 1, "act"), "relu")),
    "gpunet_0: hard-swish for swish": ("gpunet_0", _set(("stages", 4, "blocks", 0, "act"), "hard_swish")),
    "gpunet_1: swish in a block with SE": ("gpunet_1", _set(("stages", 6, "blocks", 0, "act"), "silu")),
    "gpunet_1: swish in the tail": ("gpunet_1", _set(("tail", "act"), "silu")),
    "gpunet_d1: swish in the tail": ("gpunet_d1", _set(("tail", "act"), "silu")),
}


@pytest.mark.parametrize("fault", FAULTS)
@torch.no_grad()
def test_each_wrong_detail_would_show(fault: str) -> None:
    name, mutate = FAULTS[fault]
    state, image = synthetic_state(name), picture(97, 131)
    data = load_spec(name).model_dump()
    mutate(data)
    model = PruNetClassifier(NetSpec.from_dict(data)).eval()
    model.load_state_dict(to_own_names(state, name))
    assert difference(model(image), Reference(name, state)(image)[0]) > 10 * TOLERANCE


def test_another_squeeze_would_show() -> None:
    data = load_spec("gpunet_0").model_dump()
    data["stages"][5]["blocks"][0]["se_ratio"] = 0.125
    with pytest.raises(RuntimeError, match="size mismatch"):
        PruNetClassifier(NetSpec.from_dict(data)).load_state_dict(to_own_names(synthetic_state("gpunet_0"), "gpunet_0"))
