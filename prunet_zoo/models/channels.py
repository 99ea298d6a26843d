"""Channels of single layers: their shapes, what they cost, and taking some of them out. For any CNN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Shape = tuple[int, ...]


def layer_shape(layer: nn.Module) -> Shape | None:
    """(out, in, groups) of a 2-D convolution, (out, in) of a linear layer, (channels,) of a BatchNorm; None: others."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.in_channels, layer.groups
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return (layer.num_features,)
    return None


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a convolution has one group, and one output, a channel."""
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels == layer.out_channels


def tensor_sides(layer: nn.Module, name: str) -> tuple[str, ...]:
    """What the first dimensions of a layer's tensor count, each "out" or "in": ("out", "in") for a dense weight."""
    tensor: torch.Tensor = getattr(layer, name)
    if tensor.ndim == 0:  # num_batches_tracked
        return ()
    is_weight = name == "weight" and isinstance(layer, nn.Conv2d | nn.Linear)
    return ("out", "in") if is_weight and not is_depthwise(layer) else ("out",)


def select_channels(layer: nn.Module, out: torch.Tensor | None, inputs: torch.Tensor | None) -> None:
    """Keep these channels (int64 indices, in order) of a convolution, linear layer or BatchNorm, in place.

    Args:
        layer: of any number of groups where nothing is taken; else dense or depth-wise.
        out: output channels; None: all.
        inputs: input channels; None: all. A depth-wise convolution and a BatchNorm have the output's.
    """
    index = {"out": out, "in": inputs}
    tensors = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    for name, tensor in tensors.items():
        new = tensor.detach()
        for dim, side in enumerate(tensor_sides(layer, name)):
            chosen = index[side]
            if chosen is not None and len(chosen) != new.shape[dim]:
                new = new.index_select(dim, chosen.to(new.device))
        if new.shape == tensor.shape:
            continue
        if isinstance(tensor, nn.Parameter):
            setattr(layer, name, nn.Parameter(new.clone(), requires_grad=tensor.requires_grad))
        else:
            layer.register_buffer(name, new.clone())
    counts: Any = layer
    if is_depthwise(layer) and out is not None:
        counts.out_channels = counts.in_channels = counts.groups = len(out)
        return
    for chosen, names in (
        (out, ("out_channels", "out_features", "num_features")),
        (inputs, ("in_channels", "in_features")),
    ):
        for name in names:
            if chosen is not None and hasattr(layer, name):
                setattr(counts, name, len(chosen))


@dataclass(frozen=True)
class LayerProfile:
    """A layer in its network. ``area``: of the kernel; ``positions``: of the output map(s), for one image."""

    shape: Shape
    area: int
    positions: int
    per_output: int  # parameters a channel besides the kernel: bias; scale and shift

    def macs(self, shape: Sequence[int]) -> int:
        """Multiply-accumulates of the layer in another shape; 0 for a BatchNorm."""
        return 0 if len(shape) == 1 else self.positions * self._kernel(shape)

    def params(self, shape: Sequence[int]) -> int:
        """Trainable parameters of the layer in another shape."""
        return (0 if len(shape) == 1 else self._kernel(shape)) + self.per_output * shape[0]

    def _kernel(self, shape: Sequence[int]) -> int:
        groups = shape[2] if len(shape) == 3 else 1
        return shape[0] * (shape[1] // groups) * self.area


@dataclass(frozen=True)
class Profile:
    """A network's layers by name for one input size; counts follow from their shapes in closed form.

    Attributes:
        layers: convolutions, linear layers and BatchNorms.
        total_params: trainable parameters of the whole network.
        output: shape of what it gives for one image, without the batch; empty where that is no tensor.
    """

    layers: Mapping[str, LayerProfile] = field(repr=False)
    total_params: int
    output: Shape = ()

    def macs(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Multiply-accumulates for one image with these layers in other shapes."""
        return sum(layer.macs(shapes.get(name, layer.shape)) for name, layer in self.layers.items())

    def params(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Trainable parameters with these layers in other shapes."""
        layers = self.layers
        change = sum(layers[n].params(s) - layers[n].params(layers[n].shape) for n, s in shapes.items())
        return self.total_params + change


def take_profile(net: nn.Module, channels: int, size: tuple[int, int]) -> Profile:
    """Run ``net`` once on an image of zeros, (1, channels, H, W), on its own device; mode and statistics stay.

    On torch's meta device nothing is computed.
    """
    positions: dict[str, int] = {}
    handles = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            width = layer_shape(module)
            positions[name] = positions.get(name, 0) + output.numel() // (width[0] if width else 1)

        return hook

    layers = {name: module for name, module in net.named_modules() if layer_shape(module) is not None}
    modes = {module: module.training for module in net.modules()}
    first = next(net.parameters())
    try:
        for name, module in layers.items():
            handles.append(module.register_forward_hook(note(name)))
        net.eval()
        with torch.no_grad():
            given = net(torch.zeros(1, channels, *size, device=first.device, dtype=first.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    total = sum(p.numel() for p in net.parameters() if p.requires_grad)
    output = tuple(given.shape[1:]) if isinstance(given, torch.Tensor) else ()
    return Profile({name: _layer(module, positions.get(name, 0)) for name, module in layers.items()}, total, output)


def _layer(module: nn.Module, positions: int) -> LayerProfile:
    shape = layer_shape(module)
    assert shape is not None
    parameters = dict(module.named_parameters(recurse=False))
    area = math.prod(module.kernel_size) if isinstance(module, nn.Conv2d) else 1
    per_output = sum(name in parameters for name in (("weight", "bias") if len(shape) == 1 else ("bias",)))
    return LayerProfile(shape, area, positions, per_output)
