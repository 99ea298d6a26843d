"""NetSpec: an architecture as data, the only truth about a network.

A spec lists blocks stage by stage. Input channels are never written: each block takes what the one before it gives.
Everything that can be known without weights (shapes, strides, parameters, MACs) is computed here, without torch.

    >>> spec = load_spec("prunet_p0")
    >>> spec.params(), spec.macs(224)
    (22815080, 1870345792)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from prunet_zoo.errors import SpecError
from prunet_zoo.jsonfile import Frozen, list_named, load_named, parse, stable_hash

BlockType = Literal["conv", "irb", "fused_irb", "rep"]
Activation = Literal["relu", "silu", "hard_swish"]
Size = int | tuple[int, int]
MAX_HIDDEN = 262144
MAX_BLOCKS = 256  # of a stage


def _exact_int(value: Any) -> Any:
    if type(value) is not int:  # a Literal compares with ==, and True == 1.0 == 1
        raise ValueError("Input should be an integer")
    return value


Version = Annotated[Literal[1], BeforeValidator(_exact_int)]


class BlockSpec(Frozen):
    """One block.

    ``conv``: k×k convolution, norm, activation. ``irb`` (inverted residual block, MobileNetV2, arXiv 1801.04381): 1×1
    expand, k×k depth-wise, [SE], 1×1 project. ``fused_irb`` (EfficientNet-EdgeTPU / EfficientNetV2, arXiv 2104.00298):
    k×k expand, [SE], 1×1 project. Both have a residual connection where the shape allows it. ``rep`` (RepVGG, arXiv
    2101.03697): k×k convolution + norm, 1×1 convolution + norm and, where the shape does not change, a norm alone,
    summed; then the activation. For deployment its branches are folded into one k×k convolution.
    """

    type: BlockType
    out_channels: int = Field(ge=1, le=65536)
    kernel_size: int = Field(default=3, ge=1, le=15)
    stride: int = Field(default=1, ge=1, le=4)
    hidden: int | None = Field(default=None, ge=1, le=MAX_HIDDEN)  # channels between expand and project
    act: Activation = "relu"
    se_ratio: float = Field(default=0.0, ge=0.0, le=1.0)  # squeeze channels / input channels of the block; 0: no SE
    padding: int | None = Field(default=None, ge=0, le=7)  # None: kernel_size // 2
    bn_eps: float | None = Field(default=None, gt=0.0, le=0.1)  # None: the network's

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("kernel_size must be odd (1, 3, 5, 7, …)")
        return value

    @field_validator("padding")
    @classmethod
    def _usual(cls, value: int | None, info: ValidationInfo) -> int | None:
        """The usual padding is None however it was given, so that equal networks have equal hashes."""
        return None if value is not None and value == info.data.get("kernel_size", 0) // 2 else value

    @model_validator(mode="after")
    def _consistent(self) -> BlockSpec:
        if self.has_hidden:
            if self.hidden is None:
                raise ValueError(f"'hidden' is required for type {self.type!r} (channels between expand and project)")
            return self
        if self.hidden is not None:
            raise ValueError(f"a {self.type} block has no hidden width; remove 'hidden'")
        if self.se_ratio:
            raise ValueError(f"a {self.type} block has no squeeze-and-excite; remove 'se_ratio'")
        if self.type == "rep" and self.padding is not None:
            raise ValueError("a rep block pads by kernel_size // 2, so that its branches meet; remove 'padding'")
        return self

    @property
    def has_hidden(self) -> bool:
        """Whether blocks of this type have a hidden width: the inverted residual ones."""
        return self.type in ("irb", "fused_irb")

    @property
    def pad(self) -> int:
        """Padding on each side, in pixels."""
        return self.kernel_size // 2 if self.padding is None else self.padding

    def has_residual(self, in_channels: int) -> bool:
        """Whether input is added to output: same shape, and an inverted residual block."""
        return (
            self.has_hidden
            and self.stride == 1
            and in_channels == self.out_channels
            and self.pad == self.kernel_size // 2
        )

    def has_identity(self, in_channels: int) -> bool:
        """Whether a rep block has its third branch, the norm of the input: same shape."""
        return self.type == "rep" and self.stride == 1 and in_channels == self.out_channels

    def se_channels(self, in_channels: int) -> int:
        """Width of the squeeze, as in EfficientNet: a share of the block's *input* channels (0: no SE)."""
        return max(1, round(in_channels * self.se_ratio)) if self.se_ratio else 0

    def out_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width after the block."""
        h, w = ((side + 2 * self.pad - self.kernel_size) // self.stride + 1 for side in size)
        if h < 1 or w < 1:
            raise SpecError(f"input of {size[0]}×{size[1]} px is too small for a block with kernel {self.kernel_size}")
        return h, w

    def params(self, in_channels: int) -> int:
        """Trainable parameters: convolutions without bias, two a channel for each BatchNorm, SE with bias.

        Those of a rep block are of the form that is trained, with all its branches.
        """
        k2, cout, squeeze = self.kernel_size**2, self.out_channels, self.se_channels(in_channels)
        if self.hidden is None:
            point = in_channels * cout + 2 * cout if self.type == "rep" else 0
            return in_channels * cout * k2 + 2 * cout + point + 2 * cout * self.has_identity(in_channels)
        hid = self.hidden
        count = hid * cout + 2 * cout
        count += in_channels * hid + k2 * hid + 4 * hid if self.type == "irb" else in_channels * hid * k2 + 2 * hid
        return count + (2 * hid * squeeze + squeeze + hid if squeeze else 0)

    def macs(self, in_channels: int, size: tuple[int, int]) -> int:
        """Multiply-accumulates of the convolutions for one image whose map is ``size`` (H, W) before the block.

        Those of a rep block are of the form that is deployed, one k×k convolution.
        """
        (h, w), (ho, wo) = size, self.out_size(size)
        k2, cout, squeeze = self.kernel_size**2, self.out_channels, self.se_channels(in_channels)
        if self.hidden is None:
            return in_channels * cout * k2 * ho * wo
        hid = self.hidden
        count = hid * cout * ho * wo + 2 * hid * squeeze
        if self.type == "irb":
            return count + in_channels * hid * h * w + k2 * hid * ho * wo
        return count + in_channels * hid * k2 * ho * wo


class StageSpec(Frozen):
    """Blocks that follow each other; stage 0 is the stem."""

    blocks: tuple[BlockSpec, ...] = Field(min_length=1, max_length=MAX_BLOCKS)


class TailSpec(Frozen):
    """What stands before the linear classifier: 1×1 convolution + norm + activation, global pooling and, with
    ``head_hidden``, a 1×1 convolution (no norm, no bias) + activation on the pooled features, as in MobileNetV3
    (arXiv 1905.02244)."""

    out_channels: int = Field(ge=1, le=65536)
    act: Activation = "relu"
    head_hidden: int | None = Field(default=None, ge=1, le=65536)

    @property
    def features(self) -> int:
        """Width of the pooled features that the classifier takes."""
        return self.head_hidden or self.out_channels

    def params(self, in_channels: int) -> int:
        """Trainable parameters of the convolutions and the BatchNorm."""
        return (in_channels + 2 + (self.head_hidden or 0)) * self.out_channels

    def macs(self, in_channels: int, size: tuple[int, int]) -> int:
        """Multiply-accumulates for one image whose last map is ``size`` (H, W)."""
        return (in_channels * size[0] * size[1] + (self.head_hidden or 0)) * self.out_channels


class PlacedBlock(NamedTuple):
    """A block with what surrounds it. ``stride`` is the total stride after the block; sizes are (H, W)."""

    stage: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    block: BlockSpec
    in_channels: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    stride: int

    @property
    def name(self) -> str:
        """Module path of the block in the built network."""
        return f"stages.{self.stage}.{self.index}"


class FeatureLevel(NamedTuple):
    """A feature map a detector can take: the last layer of each stride 2, 4, 8, …, counted from 0."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    stride: int
    channels: int
    stage: int
    block: int

    @property
    def module(self) -> str:
        """Module path of the block that makes the map."""
        return f"stages.{self.stage}.{self.block}"


class NetSpec(Frozen):
    """A whole network. ``input_size`` is the square input in px that it was designed for."""

    version: Version = 1
    name: str = Field(default="unnamed", min_length=1, max_length=200)
    input_size: int = Field(default=224, ge=1, le=8192)
    in_channels: int = Field(default=3, ge=1, le=1024)
    stages: tuple[StageSpec, ...] = Field(min_length=1, max_length=64)
    tail: TailSpec
    num_classes: int = Field(default=1000, ge=0, le=10_000_000)
    bn_eps: float = Field(default=1e-3, gt=0.0, le=0.1)

    @model_validator(mode="after")
    def _fits_input(self) -> NetSpec:
        list(self.placed())  # raises SpecError where the map becomes empty
        return self

    @classmethod
    def of_another_kind(cls, data: dict[str, Any]) -> str | None:
        """See `Frozen`."""
        if "shapes" in data and "stages" not in data:
            return (
                "is that of a network with channels taken out (PrunedSpec), not of a network of blocks: it is for "
                "tools/train.py --arch (classifiers and detectors), tools/latency.py measure, tools/export.py and "
                "prunet_zoo.models.load_pruned"
            )
        return None

    @classmethod
    def from_dict(cls, data: Any) -> NetSpec:
        """Build from JSON data.

        Raises:
            SpecError: with the path of the field, what it got and what it takes.
        """
        return parse(cls, data, "network spec")

    @property
    def hash(self) -> str:
        """12 hex digits that depend on the architecture alone: not on its name, nor on the order of JSON keys."""
        return stable_hash({k: v for k, v in self.to_dict().items() if k != "name"})

    def placed(self, input_size: Size | None = None) -> Iterator[PlacedBlock]:
        """Yield each block with its input channels, map sizes and total stride, for an input of H×W px."""
        size = as_size(self.input_size if input_size is None else input_size)
        channels, stride = self.in_channels, 1
        for s, stage in enumerate(self.stages):
            for i, block in enumerate(stage.blocks):
                out, stride = block.out_size(size), stride * block.stride
                yield PlacedBlock(s, i, block, channels, size, out, stride)
                channels, size = block.out_channels, out

    @property
    def feature_levels(self) -> tuple[FeatureLevel, ...]:
        """Last layer of each total stride 2, 4, 8, … (timm's convention for ``features_only``)."""
        last = {p.stride: p for p in self.placed()}
        strides = sorted(s for s in last if s > 1)
        return tuple(
            FeatureLevel(i, s, last[s].block.out_channels, last[s].stage, last[s].index) for i, s in enumerate(strides)
        )

    def channels(self, out_indices: tuple[int, ...] | list[int] | None = None) -> list[int]:
        """Channels of the requested feature levels (all by default): what a neck takes as ``in_channels``."""
        levels = self.feature_levels
        indices = range(len(levels)) if out_indices is None else out_indices
        bad = [i for i in indices if not 0 <= i < len(levels)]
        if bad:
            known = ", ".join(f"{lv.index}: stride {lv.stride}" for lv in levels)
            raise SpecError(
                f"out_indices {tuple(indices)} of {self.name!r}: {bad[0]} does not exist; levels are {known}"
            )
        return [levels[i].channels for i in indices]

    def params(self, num_classes: int | None = None) -> int:
        """Trainable parameters of the classifier built from this spec."""
        classes = self.num_classes if num_classes is None else num_classes
        blocks = sum(p.block.params(p.in_channels) for p in self.placed())
        return blocks + self.tail.params(self._last_channels) + (self.tail.features + 1) * classes

    def macs(self, input_size: Size | None = None, num_classes: int | None = None) -> int:
        """Multiply-accumulates of all convolutions and the classifier for one image of ``input_size`` px."""
        classes = self.num_classes if num_classes is None else num_classes
        placed = list(self.placed(input_size))
        blocks = sum(p.block.macs(p.in_channels, p.in_size) for p in placed)
        return blocks + self.tail.macs(self._last_channels, placed[-1].out_size) + self.tail.features * classes

    @property
    def _last_channels(self) -> int:
        return self.stages[-1].blocks[-1].out_channels

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(len(stage.blocks) for stage in self.stages)

    def with_usual_padding(self) -> NetSpec:
        """Return a copy whose blocks all pad by ``kernel_size // 2``, so that each map has ceil(side / stride) px.

        The weights fit unchanged: a convolution that was trained without padding (GPUNet-0/1/2) then samples its input
        from half a kernel earlier, and sees zeros at the border.
        """
        stages = [{"blocks": [b.model_copy(update={"padding": None}) for b in stage.blocks]} for stage in self.stages]
        return self.replace(stages=stages)

    def replace(self, **changes: Any) -> NetSpec:
        """Return a validated copy with some fields changed."""
        return NetSpec.from_dict({**self.model_dump(), **changes})


def as_size(size: Size) -> tuple[int, int]:
    """(H, W) from one side or a pair, in px."""
    h, w = (size, size) if isinstance(size, int) else size
    if h < 1 or w < 1:
        raise SpecError(f"input size must be positive, got {size}")
    return int(h), int(w)


def load_spec(source: str | Path | dict[str, Any] | NetSpec) -> NetSpec:
    """Return the spec of a listed name, a JSON file, a dict, or the spec itself.

    Raises:
        UnknownNameError: no such name; the nearest are suggested.
        SpecError: the file is missing or malformed; the field is named.
    """
    return load_named(NetSpec, source, "archs", "arch")


def list_models() -> list[str]:
    """Names that `load_spec` and `create_model` take."""
    return list_named("archs")
