"""What a layer of a `SearchSpace` may be: candidates, grids of widths, and the layer in its place; no torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from prunet_zoo.errors import SpecError
from prunet_zoo.spec import MAX_HIDDEN, Activation, BlockSpec, BlockType, Frozen

Choice = tuple[int, int] | None
MAX_EXPANSION = 8.0


class WidthGrid(Frozen):
    """Hidden widths {step, 2·step, …} from ``min`` up to ``max_expansion`` × the block's input channels.

    With ``max``: those below it, and ``max`` itself, a multiple of the step or not.
    """

    step: int = Field(ge=1, le=4096)
    min: int | None = Field(default=None, ge=1)  # None: one step
    max_expansion: float = Field(default=MAX_EXPANSION, gt=0.0, le=64.0)
    max: int | None = Field(default=None, ge=1, le=MAX_HIDDEN)

    @model_validator(mode="after")
    def _one_end(self) -> WidthGrid:
        if self.max is not None and self.max_expansion != MAX_EXPANSION:
            raise ValueError("'max' and 'max_expansion' both say where the grid ends; give one of them")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    def widths(self, in_channels: int) -> tuple[int, ...]:
        """The grid for a block with ``in_channels`` inputs."""
        if self.max is not None:
            return grid_below(self.step, self.min, self.max)
        low = self.step if self.min is None else self.min
        top = int(in_channels * self.max_expansion)
        grid = tuple(w for w in range(self.step, top + 1, self.step) if w >= low)
        if not grid:
            raise SpecError(f"hidden: no multiple of step {self.step} between min {low} and {top}; lower step or min")
        if grid[-1] > MAX_HIDDEN:
            raise SpecError(
                f"hidden.max_expansion: {self.max_expansion:g} × {in_channels} input channels gives width {grid[-1]}, "
                f"at most {MAX_HIDDEN} is allowed"
            )
        return grid


class OutGrid(Frozen):
    """Output widths of rep blocks: {step, 2·step, …} from ``min`` on, and the layer's ``out_channels`` as the last."""

    step: int = Field(ge=1, le=4096)
    min: int | None = Field(default=None, ge=1)  # None: one step

    def widths(self, out_channels: int) -> tuple[int, ...]:
        """The grid of a layer of at most ``out_channels``."""
        if self.min is not None and self.min > out_channels:
            raise SpecError(f"out.min: {self.min} is above the layer's {out_channels} channels")
        return grid_below(self.step, self.min, out_channels)


def grid_below(step: int, low: int | None, top: int) -> tuple[int, ...]:
    """Multiples of ``step`` from ``low`` (None: one step) to below ``top``, and ``top``."""
    return (*(w for w in range(step, top, step) if w >= (low or 1)), top)


class LayerSpace(Frozen):
    """One searchable layer, or ``repeat`` alike (the stride belongs to the first of them).

    ``hidden`` is the grid of the inverted residual blocks' widths, ``out`` that of rep blocks: the layer then has an
    output width of its own, and what follows takes what it gives. ``out_channels`` (None: the stage's), ``padding`` and
    ``bn_eps`` are those of all its candidates.
    """

    repeat: int = Field(default=1, ge=1, le=64)
    stride: int = Field(default=1, ge=1, le=4)
    types: tuple[BlockType, ...] = Field(default=("irb",), min_length=1)
    kernel_sizes: tuple[int, ...] = Field(default=(3, 5), min_length=1)
    acts: tuple[Activation, ...] = Field(default=("relu",), min_length=1)
    se_ratios: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] = Field(default=(0.0,), min_length=1)
    hidden: WidthGrid | None = None
    skip: bool = False
    out: OutGrid | None = None
    out_channels: int | None = Field(default=None, ge=1, le=65536)
    padding: int | None = Field(default=None, ge=0, le=7)
    bn_eps: float | None = Field(default=None, gt=0.0, le=0.1)

    @field_validator("kernel_sizes")
    @classmethod
    def _odd(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(k % 2 == 0 or not 1 <= k <= 15 for k in value):
            raise ValueError("kernel sizes must be odd, from 1 to 15")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> LayerSpace:
        if self.hidden is None and not set(self.types) <= {"conv", "rep"}:
            raise ValueError("'hidden' (the grid of hidden widths) is required for irb and fused_irb")
        if self.out is not None and set(self.types) != {"rep"}:
            raise ValueError("'out' (the grid of output widths) is for rep blocks; let types be ['rep']")
        if self.out is not None and self.skip:
            raise ValueError("a layer with 'out' cannot be skipped; remove 'skip'")
        for name in ("types", "kernel_sizes", "acts", "se_ratios"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} lists a value twice")
        return self


@dataclass(frozen=True)
class SearchLayer:
    """A searchable layer in place: what may stand there, and the shape of what comes in.

    Where layers have output widths of their own, the input channels depend on what the layer before is: here they are
    the greatest.
    """

    index: int
    stage: int  # stage of the resulting NetSpec (0 is the stem)
    in_channels: int
    in_size: tuple[int, int]
    candidates: tuple[BlockSpec, ...]  # width at its maximum
    widths: tuple[int, ...]
    skip: bool
    varies_out: bool = False  # ``widths`` are of the output
    varies_in: bool = False  # the input channels depend on the layer before

    @property
    def out_channels(self) -> int:
        """Channels after the layer, at most."""
        return self.candidates[0].out_channels

    @property
    def additive(self) -> bool:
        """Whether what a choice costs does not depend on other layers' choices, nor theirs on this one."""
        return not self.varies_in and not (self.varies_out and len(self.widths) > 1)

    def block(self, candidate: int, width: int = 0) -> BlockSpec:
        """The block of one choice; ``width`` is ignored for a candidate without a width to choose."""
        template = self.candidates[candidate]
        if self.varies_out:
            return template.model_copy(update={"out_channels": width})
        return template if template.hidden is None else template.model_copy(update={"hidden": width})

    def candidate_widths(self, candidate: int) -> tuple[int, ...]:
        """The width grid of a candidate, ``(0,)`` for one without a width to choose."""
        return self.widths if self.varies_out or self.candidates[candidate].hidden is not None else (0,)

    def choices(self) -> list[Choice]:
        """Everything that may stand here, skip last."""
        real: list[Choice] = [(c, w) for c in range(len(self.candidates)) for w in self.candidate_widths(c)]
        return [*real, None] if self.skip else real

    def find(self, block: BlockSpec) -> Choice:
        """The choice that gives ``block``; raises `SpecError` when the layer cannot."""
        width = block.out_channels if self.varies_out else block.hidden or 0
        for c in range(len(self.candidates)):
            if width in self.candidate_widths(c) and self.block(c, width) == block:
                return c, width
        raise SpecError(f"layer {self.index} (stage {self.stage}) of the space cannot be {block.to_dict()}")


def place(
    row: LayerSpace, first: bool, index: int, stage: int, before: SearchLayer | None, channels: int,
    size: tuple[int, int], out_channels: int,
) -> SearchLayer:  # fmt: skip
    """Expand a row of the space into the layer that stands at one place.

    Args:
        row: what the space says.
        first: whether it is the first layer of the row, to which the stride belongs.
        index, stage: its number, and its stage in the network.
        before: the searchable layer before it, if any.
        channels, size: of what comes in, channels at most; (H, W).
        out_channels: of the stage.

    Raises:
        SpecError, ValidationError: the row cannot stand here; without the row's path.
    """
    stride = row.stride if first else 1
    out_channels = row.out_channels or out_channels
    widths: tuple[int, ...] = row.hidden.widths(channels) if row.hidden else ()
    candidates = []
    for kind, kernel, act, se in itertools.product(row.types, row.kernel_sizes, row.acts, row.se_ratios):
        has_hidden = kind in ("irb", "fused_irb")
        if se and not has_hidden:
            continue
        candidates.append(
            BlockSpec(
                type=kind, out_channels=out_channels, kernel_size=kernel, stride=stride, act=act, se_ratio=se,
                hidden=widths[-1] if has_hidden else None, padding=row.padding, bn_eps=row.bn_eps,
            )
        )  # fmt: skip
    if not candidates:
        raise SpecError(f"se_ratios: a {row.types[0]} layer has no squeeze-and-excite; put 0 into se_ratios")
    varies_in = before is not None and before.varies_out and len(before.widths) > 1
    if row.skip and (stride != 1 or channels != out_channels):
        raise SpecError(
            f"skip: skip needs stride 1 and equal channels, here stride {stride}, {channels} → {out_channels} channels"
        )
    if row.skip and varies_in:
        raise SpecError("skip: skip needs equal channels, but the layer before has an output width of its own")
    if row.out is not None:
        widths = row.out.widths(out_channels)
    return SearchLayer(
        index, stage, channels, size, tuple(candidates), widths, row.skip,
        varies_out=row.out is not None, varies_in=varies_in,
    )  # fmt: skip
