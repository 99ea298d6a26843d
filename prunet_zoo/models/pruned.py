"""PrunedSpec: a network of timm (or any CNN) with channels taken out, as data; built again without torch-pruning.

A spec names the start network and writes down the shape of every layer that differs from it. Which channels were kept
is not written: that is in the weights.

    >>> spec = PrunedSpec.from_dict({"timm": "resnet18", "shapes": {"layer1.0.conv1": [32, 64, 1],
    ...                              "layer1.0.bn1": [32], "layer1.0.conv2": [64, 32, 1]}})
    >>> spec.params(), build_pruned(spec).layer1[0].conv1.out_channels
    (11652584, 32)
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import nn

from prunet_zoo.errors import CheckpointError, SpecError, few, unknown_name
from prunet_zoo.metadata import read_metadata
from prunet_zoo.models.channels import Profile, Shape, is_depthwise, layer_shape, select_channels, take_profile
from prunet_zoo.models.weights import load_weights
from prunet_zoo.spec import Frozen, Size, Version, as_size, load_named, parse, stable_hash

Scalar = bool | int | float | str | None
SPEC_FILE, WEIGHTS_FILE = "spec.json", "weights.safetensors"
# what the spec says itself, and what would load files or fetch them
_NOT_OPTIONS = (
    "cache_dir", "checkpoint_path", "exportable", "features_only", "in_chans", "num_classes", "pretrained",
    "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "scriptable",
)  # fmt: skip
_MODULE = re.compile(r"\w+(\.\w+)*", re.ASCII)


class PrunedSpec(Frozen):
    """A network with channels taken out.

    Attributes:
        timm: name of the start network in timm; None: a module of the user's own, to be given to `build_pruned`.
        options: further arguments of `timm.create_model`: numbers, texts, true, false, null, or lists of them.
        shapes: by name of the module, of each layer that differs from the start network: [out, in, groups] of a
            convolution, [out, in] of a linear layer, [channels] of a BatchNorm.
        input_size: side of the square input in px that the network is for.
    """

    version: Version = 1
    name: str = Field(default="unnamed", min_length=1, max_length=200)
    timm: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?$", max_length=200)] | None
    options: dict[str, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict, max_length=32)
    input_size: int = Field(default=224, ge=1, le=8192)
    in_channels: int = Field(default=3, ge=1, le=1024)
    num_classes: int = Field(default=1000, ge=0, le=10_000_000)
    shapes: dict[str, Annotated[tuple[Annotated[int, Field(ge=1, le=10_000_000)], ...], Field(max_length=3)]] = Field(
        max_length=10_000
    )

    @field_validator("options")
    @classmethod
    def _no_files(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key in _NOT_OPTIONS or not key.isidentifier():
                raise ValueError(f"{key!r} is no option here")
        return value

    @field_validator("shapes")
    @classmethod
    def _of_layers(cls, value: dict[str, Shape]) -> dict[str, Shape]:
        for name, shape in value.items():
            if not _MODULE.fullmatch(name):
                raise ValueError(f"{name!r:.80} is no name of a module")
            if not shape:
                raise ValueError(f"{name} takes [out, in, groups], [out, in] or [channels]")
        return dict(sorted(value.items()))

    @classmethod
    def from_dict(cls, data: Any) -> PrunedSpec:
        """Build from JSON data; raises `SpecError` naming the field."""
        return parse(cls, data, "pruned network's spec")

    @property
    def hash(self) -> str:
        """12 hex digits that depend on the architecture alone: neither on the spec's name nor on the tag that names
        timm's weights (``resnet50.a1_in1k``)."""
        data = {k: v for k, v in self.to_dict().items() if k != "name"}
        return stable_hash({**data, "timm": self.timm and self.timm.partition(".")[0]})

    def params(self) -> int:
        """Trainable parameters of the network; raises as `build_pruned` does."""
        return _profile_of(self.to_json(), as_size(self.input_size)).total_params

    def macs(self, input_size: Size | None = None) -> int:
        """Multiply-accumulates of all convolutions and linear layers for one image of ``input_size`` px; raises as
        `build_pruned` does, and `SpecError` where the network does not run on such an image."""
        return _profile_of(self.to_json(), as_size(self.input_size if input_size is None else input_size)).macs({})

    def replace(self, **changes: Any) -> PrunedSpec:
        """Return a validated copy with some fields changed."""
        return PrunedSpec.from_dict({**self.model_dump(), **changes})


def is_pruned(data: Any) -> bool:
    """Whether JSON data is that of a `PrunedSpec` (well-formed or not) and not of a `NetSpec`."""
    return isinstance(data, dict) and "shapes" in data and "stages" not in data


def is_pruned_file(path: str | Path) -> bool:
    """Whether a ``.json`` or ``.safetensors`` file holds a `PrunedSpec`; False where it cannot be read."""
    path = Path(path)
    try:
        text = read_metadata(path).get("spec", "") if path.suffix == ".safetensors" else path.read_text("utf-8")
        return path.suffix in (".json", ".safetensors") and is_pruned(json.loads(text))
    except (OSError, ValueError):  # CheckpointError, JSONDecodeError and UnicodeDecodeError are ValueErrors
        return False


def load_pruned_spec(source: str | Path | dict[str, Any] | PrunedSpec) -> PrunedSpec:
    """The spec of a ``.json`` or ``.safetensors`` file, a result's folder, a dict, or the spec itself.

    Raises:
        SpecError: it is missing or malformed; the field is named.
        CheckpointError: a weights file without such a spec.
    """
    if isinstance(source, PrunedSpec | dict):
        return load_named(PrunedSpec, source, "archs", "pruned network")
    path = Path(source)
    if path.suffix == ".safetensors":
        text = read_metadata(path).get("spec")
        if text is None:
            raise CheckpointError(f"weights file {path} carries no spec; give the spec's JSON and this as weights")
        try:
            return PrunedSpec.from_dict(json.loads(text))
        except ValueError as error:
            raise CheckpointError(f"weights file {path} carries a damaged spec: {error}") from None
    path = path / SPEC_FILE if path.is_dir() else path
    if path.suffix != ".json":
        raise SpecError(f"a pruned network is a folder, a .json or a .safetensors file; got {source}")
    return load_named(PrunedSpec, str(path.absolute()), "archs", "pruned network")


def create_start(spec: PrunedSpec, pretrained: bool = False) -> nn.Module:
    """The start network of a spec, whole, made by timm with random weights (or, asked for, timm's).

    Raises:
        UnknownNameError: timm has no such network.
        SpecError: the spec names none, or timm does not take its options.
    """
    import timm

    if spec.timm is None:
        raise SpecError(f"{spec.name!r} was cut from a network that is not timm's; give that network as start")
    if not timm.is_model(spec.timm.partition(".")[0]):
        raise unknown_name("network of timm", spec.timm.partition(".")[0], timm.list_models())
    options: dict[str, Any] = {**spec.options, "num_classes": spec.num_classes, "in_chans": spec.in_channels}
    try:
        return timm.create_model(spec.timm, pretrained=pretrained, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError, AttributeError, IndexError) as error:
        reason = _short(f"{type(error).__name__}: {error}")
        raise SpecError(f"timm cannot make {spec.timm!r} with options {dict(spec.options)}: {reason}") from error


def build_pruned(spec: PrunedSpec, start: nn.Module | None = None) -> nn.Module:
    """Build the network of a spec, ready for its weights; it bears the spec as ``.spec``.

    Without weights it has the first channels of the start network's random ones.

    Args:
        spec: the network.
        start: the start network, which is copied, where timm has none by that name; its weights are taken.

    Raises:
        UnknownNameError: timm has no such network.
        SpecError: a layer does not exist, is to become larger, or the shapes do not fit each other or the classes.
    """
    net: Any = create_start(spec) if start is None else copy.deepcopy(start)
    shrink(net, spec.shapes)
    if spec.shapes:
        _check_fit(copy.deepcopy(net).to("meta"), spec, as_size(spec.input_size))
    net.spec = spec
    return net


def head_names(net: nn.Module) -> tuple[str, ...]:
    """Names of the classifier's last layer(s), as timm tells them."""
    named = (getattr(net, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def with_classes(spec: PrunedSpec, num_classes: int) -> PrunedSpec:
    """The same network of timm with a head for another number of classes; raises as `create_start`."""
    if num_classes == spec.num_classes:
        return spec
    heads = head_names(meta_start(spec))
    shapes = {name: (num_classes, *shape[1:]) if name in heads else shape for name, shape in spec.shapes.items()}
    return spec.replace(num_classes=num_classes, shapes=shapes)


def load_pruned(source: str | Path | dict[str, Any] | PrunedSpec, weights: str | Path | None = None) -> nn.Module:
    """Build a pruned network with its weights.

    Args:
        source: the folder of a result (``spec.json`` and ``weights.safetensors``), a weights file with the spec
            inside, or a spec as `load_pruned_spec` takes it.
        weights: a weights file; None takes the folder's or the file's own, and random ones for a spec alone.

    Raises:
        SpecError, UnknownNameError, CheckpointError: as `load_pruned_spec`, `build_pruned` and `load_weights`.
    """
    net = build_pruned(load_pruned_spec(source))
    if weights is None and isinstance(source, str | Path):
        path = Path(source)
        weights = path if path.suffix == ".safetensors" else path / WEIGHTS_FILE if path.is_dir() else None
    if weights is not None:
        load_weights(net, weights)
    return net


def shrink(net: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give the layers of a start network these shapes, in place: the first channels stay.

    Raises:
        SpecError: there is no such layer, or it cannot have that shape.
    """
    layers = dict(net.named_modules())
    strange = [name for name in shapes if name not in layers]
    if strange:
        raise SpecError(f"shapes: the network has no module {few(strange)}")
    for name, shape in shapes.items():
        old, new = layer_shape(layers[name]), tuple(shape)
        if old is None:
            raise SpecError(
                f"shapes.{name}: {type(layers[name]).__name__} is no convolution, linear layer or BatchNorm"
            )
        if len(new) != len(old) or any(n > o for n, o in zip(new, old, strict=True)):
            raise SpecError(f"shapes.{name}: the layer is {list(old)}, it cannot become {list(new)}")
        if (
            len(old) == 3
            and new != old
            and not (new[2] == old[2] == 1 or (is_depthwise(layers[name]) and len(set(new)) == 1))
        ):
            raise SpecError(
                f"shapes.{name}: {list(old)} (out, in, groups) cannot become {list(new)}; a depth-wise convolution has "
                "one group a channel, and one with other groups stays as it is"
            )
        inputs = torch.arange(new[1]) if len(new) > 1 else None
        select_channels(layers[name], torch.arange(new[0]), inputs)


def _check_fit(net: nn.Module, spec: PrunedSpec, size: tuple[int, int]) -> Profile:
    """The profile of a network that was shrunk, on torch's meta device, where nothing is computed.

    Raises:
        SpecError: its shapes do not fit each other or the spec's classes.
    """
    profile = _run(net, spec, size, f"shapes of {spec.name!r} do not fit each other")
    if spec.num_classes and profile.output != (spec.num_classes,):
        given = "×".join(map(str, profile.output)) or "no"
        raise SpecError(f"shapes of {spec.name!r} lead to {given} outputs, but num_classes is {spec.num_classes}")
    return profile


def _run(net: nn.Module, spec: PrunedSpec, size: tuple[int, int], wrong: str) -> Profile:
    try:
        return take_profile(net, spec.in_channels, size)
    except (RuntimeError, ValueError, AssertionError) as error:  # whatever a network checks its input by
        raise SpecError(f"{wrong} ({_short(error)})") from error


def _short(error: object) -> str:
    return " ".join(str(error).split())[:300]


@lru_cache(maxsize=64)
def _profile_of(text: str, size: tuple[int, int]) -> Profile:
    """The layers of a spec's network for input of ``size``; ``text``: the spec as JSON."""
    spec = PrunedSpec.from_dict(json.loads(text))
    start = meta_start(spec)
    whole = _run(start, spec, size, f"{spec.timm} does not run on input of {size[0]}×{size[1]} px")
    if not spec.shapes:
        return whole
    shrink(start, spec.shapes)
    return _check_fit(start, spec, size)


def meta_start(spec: PrunedSpec) -> nn.Module:
    """The start network of a spec on torch's meta device: shapes without values, in no memory. Raises as `create_start`
    does; draws nothing at random."""
    data = {**spec.to_dict(), "name": "start", "input_size": 1, "shapes": {}}
    return copy.deepcopy(_meta_start(json.dumps(data, sort_keys=True)))


@lru_cache(maxsize=16)
def _meta_start(text: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # counting must not change what is drawn after it
        return create_start(PrunedSpec.from_dict(json.loads(text))).to("meta")
