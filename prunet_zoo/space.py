"""SearchSpace: what may vary in each layer of a network. Sample, count, encode, decode to a `NetSpec`; no torch.

A space is JSON like a spec. Each searchable layer offers candidates (block type × kernel × activation × SE), a grid of
hidden widths for the candidates that have one, and, where the shape does not change, ``skip``.

An architecture is encoded as one `Choice` a layer: ``None`` (skipped) or ``(candidate index, hidden width or 0)``.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from prunet_zoo.errors import SpecError, describe_fields
from prunet_zoo.spec import (
    MAX_BLOCKS,
    MAX_HIDDEN,
    Activation,
    BlockSpec,
    BlockType,
    Frozen,
    NetSpec,
    StageSpec,
    TailSpec,
    Version,
    list_named,
    load_named,
    parse,
    stable_hash,
)

Choice = tuple[int, int] | None
Encoding = tuple[Choice, ...]


class WidthGrid(Frozen):
    """Hidden widths {step, 2·step, …} from ``min`` up to ``max_expansion`` × the block's input channels."""

    step: int = Field(ge=1, le=4096)
    min: int | None = Field(default=None, ge=1)  # None: one step
    max_expansion: float = Field(default=8.0, gt=0.0, le=64.0)

    def widths(self, in_channels: int) -> tuple[int, ...]:
        """The grid for a block with ``in_channels`` inputs."""
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


class LayerSpace(Frozen):
    """One searchable layer, or ``repeat`` alike (the stride belongs to the first of them)."""

    repeat: int = Field(default=1, ge=1, le=64)
    stride: int = Field(default=1, ge=1, le=4)
    types: tuple[BlockType, ...] = Field(default=("irb",), min_length=1)
    kernel_sizes: tuple[int, ...] = Field(default=(3, 5), min_length=1)
    acts: tuple[Activation, ...] = Field(default=("relu",), min_length=1)
    se_ratios: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] = Field(default=(0.0,), min_length=1)
    hidden: WidthGrid | None = None
    skip: bool = False

    @field_validator("kernel_sizes")
    @classmethod
    def _odd(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(k % 2 == 0 or not 1 <= k <= 15 for k in value):
            raise ValueError("kernel sizes must be odd, from 1 to 15")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> LayerSpace:
        if self.hidden is None and set(self.types) != {"conv"}:
            raise ValueError("'hidden' (the grid of hidden widths) is required for irb and fused_irb")
        for name in ("types", "kernel_sizes", "acts", "se_ratios"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} lists a value twice")
        return self


class StageSpace(Frozen):
    """Layers of one stage; all give ``out_channels``."""

    out_channels: int = Field(ge=1, le=65536)
    layers: tuple[LayerSpace, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _short(self) -> StageSpace:
        count = sum(row.repeat for row in self.layers)
        if count > MAX_BLOCKS:
            raise ValueError(f"its rows repeat to {count} layers; a stage has at most {MAX_BLOCKS}")
        return self


@dataclass(frozen=True)
class SearchLayer:
    """A searchable layer in place: what may stand there, and the shape of what comes in."""

    index: int
    stage: int  # stage of the resulting NetSpec (0 is the stem)
    in_channels: int
    in_size: tuple[int, int]
    candidates: tuple[BlockSpec, ...]  # hidden width at its maximum
    widths: tuple[int, ...]
    skip: bool

    @property
    def out_channels(self) -> int:
        """Channels after the layer."""
        return self.candidates[0].out_channels

    def block(self, candidate: int, hidden: int = 0) -> BlockSpec:
        """The block of one choice; ``hidden`` is ignored for a candidate without hidden width."""
        template = self.candidates[candidate]
        return template if template.hidden is None else template.model_copy(update={"hidden": hidden})

    def candidate_widths(self, candidate: int) -> tuple[int, ...]:
        """The width grid of a candidate, ``(0,)`` for a plain convolution."""
        return (0,) if self.candidates[candidate].hidden is None else self.widths

    def choices(self) -> list[Choice]:
        """Everything that may stand here, skip last."""
        real: list[Choice] = [(c, w) for c in range(len(self.candidates)) for w in self.candidate_widths(c)]
        return [*real, None] if self.skip else real

    def find(self, block: BlockSpec) -> Choice:
        """The choice that gives ``block``; raises `SpecError` when the layer cannot."""
        hidden = block.hidden or 0
        for c in range(len(self.candidates)):
            if hidden in self.candidate_widths(c) and self.block(c, hidden) == block:
                return c, hidden
        raise SpecError(f"layer {self.index} (stage {self.stage}) of the space cannot be {block.to_dict()}")


class SearchSpace(Frozen):
    """A family of networks: a fixed stem and tail, and stages of searchable layers between them."""

    version: Version = 1
    name: str = Field(default="unnamed", min_length=1, max_length=200)
    input_size: int = Field(default=224, ge=1, le=8192)
    in_channels: int = Field(default=3, ge=1, le=1024)
    stem: tuple[StageSpec, ...] = Field(min_length=1, max_length=64)
    stages: tuple[StageSpace, ...] = Field(min_length=1, max_length=64)
    tail: TailSpec
    num_classes: int = Field(default=1000, ge=1, le=10_000_000)
    bn_eps: float = Field(default=1e-3, gt=0.0, le=0.1)

    @model_validator(mode="after")
    def _layers_fit(self) -> SearchSpace:
        try:
            self.decode(self.largest())
        except ValidationError as error:
            raise SpecError(f"the space's largest network is malformed: {describe_fields(error)}") from None
        return self

    @classmethod
    def from_dict(cls, data: Any) -> SearchSpace:
        """Build from JSON data; raises `SpecError` naming the field."""
        return parse(cls, data, "search space")

    @property
    def hash(self) -> str:
        """12 hex digits that do not depend on the space's name."""
        return stable_hash({k: v for k, v in self.to_dict().items() if k != "name"})

    def replace(self, **changes: Any) -> SearchSpace:
        """Return a validated copy with some fields changed."""
        return SearchSpace.from_dict({**self.model_dump(), **changes})

    @cached_property
    def layers(self) -> tuple[SearchLayer, ...]:
        """The searchable layers in order, each with its candidates, widths and input shape."""
        try:
            probe = NetSpec(input_size=self.input_size, in_channels=self.in_channels, stages=self.stem, tail=self.tail)
        except ValidationError as error:
            raise SpecError(f"stem: {describe_fields(error)}") from None
        *_, last = probe.placed()
        channels, size = last.block.out_channels, last.out_size
        found: list[SearchLayer] = []
        for s, stage in enumerate(self.stages):
            rows = [(i, row, r) for i, row in enumerate(stage.layers) for r in range(row.repeat)]
            for i, row, repeat in rows:
                path = f"stages[{s}].layers[{i}]"
                try:
                    layer = _place(row, repeat, len(found), s + len(self.stem), channels, size, stage.out_channels)
                except ValidationError as error:
                    raise SpecError(describe_fields(error, path)) from None
                except SpecError as error:
                    raise SpecError(f"{path}.{error}") from None
                if layer.skip and i == repeat == 0:
                    raise SpecError(f"{path}.skip: the first layer of a stage cannot be skipped")
                found.append(layer)
                channels, size = stage.out_channels, layer.candidates[0].out_size(size)
        return tuple(found)

    def count(self) -> int:
        """Number of encodings (skips in different places of a stage are counted apart)."""
        return math.prod(len(layer.choices()) for layer in self.layers)

    def largest(self) -> Encoding:
        """The last candidate (most often the largest kernel) at full width in every layer."""
        return tuple((len(la.candidates) - 1, la.candidate_widths(len(la.candidates) - 1)[-1]) for la in self.layers)

    def sample(self, rng: random.Random) -> Encoding:
        """Draw one choice a layer: skip or a candidate uniformly, then its width uniformly."""
        chosen: list[Choice] = []
        for layer in self.layers:
            pick = rng.randrange(len(layer.candidates) + layer.skip)
            is_skip = pick == len(layer.candidates)
            chosen.append(None if is_skip else (pick, rng.choice(layer.candidate_widths(pick))))
        return tuple(chosen)

    def decode(self, encoding: Sequence[Choice], name: str | None = None) -> NetSpec:
        """Return the network of one choice a layer.

        Raises:
            SpecError: wrong length, or a choice that its layer does not offer.
        """
        if len(encoding) != len(self.layers):
            raise SpecError(f"an encoding of {self.name!r} has {len(self.layers)} choices, got {len(encoding)}")
        blocks: dict[int, list[BlockSpec]] = {}
        for layer, choice in zip(self.layers, encoding, strict=True):
            if choice is None:
                if not layer.skip:
                    raise SpecError(f"layer {layer.index} (stage {layer.stage}) cannot be skipped")
                continue
            candidate, hidden = choice
            if not 0 <= candidate < len(layer.candidates) or hidden not in layer.candidate_widths(candidate):
                raise SpecError(f"layer {layer.index} (stage {layer.stage}) does not offer {choice}")
            blocks.setdefault(layer.stage, []).append(layer.block(candidate, hidden))
        return NetSpec(
            name=name or f"{self.name}-sample",
            input_size=self.input_size,
            in_channels=self.in_channels,
            stages=(*self.stem, *(StageSpec(blocks=tuple(blocks[s])) for s in sorted(blocks))),
            tail=self.tail,
            num_classes=self.num_classes,
            bn_eps=self.bn_eps,
        )

    def encode(self, spec: NetSpec) -> Encoding:
        """Return an encoding whose `decode` is ``spec``.

        Raises:
            SpecError: the network is not in this space; the message says where it leaves it.
        """
        if spec.stages[: len(self.stem)] != self.stem:
            raise SpecError(f"{spec.name!r} has another stem than space {self.name!r}")
        if len(spec.stages) != len(self.stem) + len(self.stages) or spec.tail != self.tail:
            raise SpecError(f"{spec.name!r} has other stages or another tail than space {self.name!r}")
        encoding: list[Choice] = []
        for stage, group in itertools.groupby(self.layers, key=lambda layer: layer.stage):
            encoding.extend(_match(list(group), list(spec.stages[stage].blocks)))
        return tuple(encoding)

    def contains(self, spec: NetSpec) -> bool:
        """Whether some encoding gives this architecture (its name does not matter)."""
        try:
            return self.decode(self.encode(spec)).hash == spec.hash
        except SpecError:
            return False


def _place(
    row: LayerSpace, repeat: int, index: int, stage: int, channels: int, size: tuple[int, int], out_channels: int
) -> SearchLayer:
    """Expand a row of the space into the layer that stands at one place."""
    stride = row.stride if repeat == 0 else 1
    widths = row.hidden.widths(channels) if row.hidden else ()
    candidates = []
    for kind, kernel, act, se in itertools.product(row.types, row.kernel_sizes, row.acts, row.se_ratios):
        if kind == "conv" and se:
            continue
        candidates.append(
            BlockSpec(
                type=kind, out_channels=out_channels, kernel_size=kernel, stride=stride, act=act, se_ratio=se,
                hidden=None if kind == "conv" else widths[-1],
            )
        )  # fmt: skip
    if not candidates:
        raise SpecError("se_ratios: a conv layer has no squeeze-and-excite; put 0 into se_ratios")
    if row.skip and (stride != 1 or channels != out_channels):
        raise SpecError(
            f"skip: skip needs stride 1 and equal channels, here stride {stride}, {channels} → {out_channels} channels"
        )
    return SearchLayer(index, stage, channels, size, tuple(candidates), widths, row.skip)


def _match(layers: list[SearchLayer], blocks: list[BlockSpec]) -> list[Choice]:
    """Assign a stage's blocks to its layers in order, skipping layers where needed (depth-first)."""
    if not layers:
        if blocks:
            raise SpecError(f"{len(blocks)} block(s) more than the space has layers for: {blocks[0].to_dict()}")
        return []
    head, rest = layers[0], layers[1:]
    reason: SpecError | None = None
    if blocks:
        try:
            return [head.find(blocks[0]), *_match(rest, blocks[1:])]
        except SpecError as error:
            reason = error
    if head.skip:
        return [None, *_match(rest, blocks)]
    raise reason or SpecError(f"stage {head.stage} has too few blocks: layer {head.index} cannot be skipped")


def load_space(source: str | Path | dict[str, Any] | SearchSpace) -> SearchSpace:
    """Return the space of a listed name, a JSON file, a dict, or the space itself; errors as in `load_spec`."""
    return load_named(SearchSpace, source, "spaces", "search space")


def list_spaces() -> list[str]:
    """Names that `load_space` takes."""
    return list_named("spaces")
