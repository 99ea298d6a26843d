"""The kernels that a network is run as: what a fusing runtime (TensorRT, ONNX Runtime) or eager PyTorch launches.

A fusing runtime folds BatchNorm into its convolution and runs the residual addition and the activations of
`Runtime.fused_activations` in the same kernel; other activations are kernels of their own, and so are pooling, the two
layers and the gate (sigmoid and multiplication in one) of a squeeze-and-excite. TorchInductor does not fold BatchNorm
unless it freezes weights: BatchNorm, activation and addition are one kernel after the convolution. In eager PyTorch
convolution, BatchNorm, activation and addition are kernels of their own. A rep block is deployed everywhere: one
convolution with bias and its activation.

Only shapes are computed here; what a kernel costs is `prunet_zoo.latency.roofline`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from prunet_zoo.spec import Activation, BlockSpec, Frozen, NetSpec, Size, TailSpec

Kind = Literal["convolution", "depthwise", "vector", "pool", "elementwise"]


class Runtime(Frozen):
    """How a network becomes kernels.

    ``fuses``: BatchNorm and residual addition are part of the convolution. ``fused_activations``: these are too.
    ``folds``: False puts all of these into one kernel that follows the convolution.
    ``asynchronous``: launching a kernel overlaps with running the one before, so that the longer of both counts.
    """

    fuses: bool = True
    folds: bool = True
    fused_activations: tuple[Activation, ...] = ("relu",)
    asynchronous: bool = False

    def is_fused(self, act: Activation | None) -> bool:
        """Whether an activation costs no kernel of its own; None is no activation."""
        return act is None or (self.fuses and act in self.fused_activations)


@dataclass(frozen=True)
class Kernel:
    """One kernel for one image.

    A convolution is the matrix product (rows × depth)·(depth × columns): ``rows`` pixels of the result, ``columns``
    channels of the result, ``taps · channels`` deep. A depth-wise one has ``channels`` 1. ``vector`` is a product with
    a single row: a linear layer, the two layers of a squeeze-and-excite. ``maps``: elements of feature maps read and
    written; ``weights``: elements of weights read.
    """

    name: str
    kind: Kind
    rows: int
    columns: int
    channels: int = 0
    taps: int = 0
    maps: int = 0
    weights: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates, without padding."""
        return self.rows * self.columns * self.channels * self.taps


def block_kernels(block: BlockSpec, in_channels: int, in_size: tuple[int, int], runtime: Runtime) -> list[Kernel]:
    """The kernels of one block on a map of ``in_size`` (H, W)."""
    before, after = in_size[0] * in_size[1], _area(block.out_size(in_size))
    taps, out = block.kernel_size**2, block.out_channels
    if block.hidden is None:
        norm = block.type != "rep"
        return _conv("conv", in_channels, out, taps, before, after, block.act, runtime, norm=norm)
    hidden, kernels = block.hidden, []
    if block.type == "irb":
        kernels += _conv("expand", in_channels, hidden, 1, before, before, block.act, runtime)
        kernels += _conv("depthwise", hidden, hidden, taps, before, after, block.act, runtime, depthwise=True)
    else:
        kernels += _conv("expand", in_channels, hidden, taps, before, after, block.act, runtime)
    if squeeze := block.se_channels(in_channels):
        kernels += _squeeze_excite(hidden, squeeze, after, block.act, runtime)
    residual = block.has_residual(in_channels)
    kernels += _conv("project", hidden, out, 1, after, after, None, runtime, residual=residual)
    return kernels


def tail_kernels(
    tail: TailSpec, in_channels: int, in_size: tuple[int, int], num_classes: int, runtime: Runtime
) -> list[Kernel]:
    """The kernels after the last block: 1×1 convolution, pooling, hidden layer if any, classifier if any."""
    area, out = _area(in_size), tail.out_channels
    kernels = _conv("conv", in_channels, out, 1, area, area, tail.act, runtime)
    kernels.append(Kernel("pool", "pool", 1, out, maps=out * (area + 1)))
    if tail.head_hidden:
        kernels += _vector("hidden", out, tail.head_hidden, tail.act, runtime)
    if num_classes:
        kernels += _vector("classifier", tail.features, num_classes, None, runtime)
    return kernels


def input_kernels(channels: int, size: tuple[int, int], runtime: Runtime) -> list[Kernel]:
    """What a fusing runtime does to the input before the first layer: other dtype, other memory layout."""
    return [_elementwise("input", channels, _area(size))] if runtime.fuses else []


def network_kernels(
    spec: NetSpec, runtime: Runtime, input_size: Size | None = None, blocks: bool = True
) -> Iterator[tuple[str, list[Kernel]]]:
    """(name of the block, its kernels) of a whole network in order; "input" and "tail" at the ends, or these alone."""
    placed = list(spec.placed(input_size))
    yield "input", input_kernels(spec.in_channels, placed[0].in_size, runtime)
    for place in placed if blocks else ():
        yield place.name, block_kernels(place.block, place.in_channels, place.in_size, runtime)
    last = placed[-1]
    yield "tail", tail_kernels(spec.tail, last.block.out_channels, last.out_size, spec.num_classes, runtime)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _conv(
    name: str,
    channels: int,
    out: int,
    taps: int,
    before: int,
    after: int,
    act: Activation | None,
    runtime: Runtime,
    depthwise: bool = False,
    residual: bool = False,
    norm: bool = True,
) -> list[Kernel]:
    """Convolution, BatchNorm (or a bias), activation, addition: ``before`` and ``after`` are pixels of its map."""
    fused = runtime.fuses
    inside = residual and fused and runtime.folds
    maps = channels * before + out * after + (out * after if inside else 0)
    kind: Kind = "depthwise" if depthwise else "convolution"
    depth = 1 if depthwise else channels
    kernels = [Kernel(name, kind, after, out, depth, taps, maps, out * depth * taps)]
    if norm and not fused:
        kernels.append(_elementwise(f"{name}.norm", out, after))
    elif fused and not runtime.folds:
        kernels.append(_elementwise(f"{name}.norm", out, after, inputs=2 if residual else 1))
    if act is not None and not runtime.is_fused(act):
        kernels.append(_elementwise(f"{name}.{act}", out, after))
    if residual and not fused:
        kernels.append(_elementwise(f"{name}.add", out, after, inputs=2))
    return kernels


def _squeeze_excite(hidden: int, squeeze: int, area: int, act: Activation, runtime: Runtime) -> list[Kernel]:
    """Pooling, two layers on the pooled vector, and the gate."""
    kernels = [Kernel("se.pool", "pool", 1, hidden, maps=hidden * (area + 1))]
    kernels += _vector("se.reduce", hidden, squeeze, act, runtime)
    kernels += _vector("se.expand", squeeze, hidden, None, runtime)
    if not runtime.fuses:
        kernels.append(_elementwise("se.sigmoid", hidden, 1))
    kernels.append(_elementwise("se.gate", hidden, area))
    return kernels


def _vector(name: str, channels: int, out: int, act: Activation | None, runtime: Runtime) -> list[Kernel]:
    kernels = [Kernel(name, "vector", 1, out, channels, 1, channels + out, out * (channels + 1))]
    if act is not None and not runtime.is_fused(act):
        kernels.append(_elementwise(f"{name}.{act}", out, 1))
    return kernels


def _elementwise(name: str, channels: int, area: int, inputs: int = 1) -> Kernel:
    return Kernel(name, "elementwise", area, channels, maps=(inputs + 1) * channels * area)
