"""SearchSpace: what may vary in each layer of a network. Sample, count, encode, decode to a `NetSpec`; no torch.

A space is JSON like a spec. Each searchable layer offers candidates (block type × kernel × activation × SE), a grid of
hidden widths for the candidates that have one, and, where the shape does not change, ``skip``. A layer of rep blocks
may offer a grid of output widths instead.

An architecture is encoded as one `Choice` a layer: ``None`` (skipped) or ``(candidate index, width)``; the width is the
hidden one, in a layer with a grid of output widths the output channels, and 0 where there is none to choose.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from prunet_zoo.errors import SpecError, describe_fields
from prunet_zoo.space_layers import Choice, LayerSpace, OutGrid, SearchLayer, WidthGrid, place
from prunet_zoo.spec import (
    MAX_BLOCKS,
    BlockSpec,
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

__all__ = [
    "Choice",
    "Encoding",
    "LayerSpace",
    "OutGrid",
    "SearchLayer",
    "SearchSpace",
    "StageSpace",
    "WidthGrid",
    "list_spaces",
    "load_space",
    "space_around",
]

Encoding = tuple[Choice, ...]


class StageSpace(Frozen):
    """Layers of one stage; all give ``out_channels``, where they do not say otherwise."""

    out_channels: int = Field(ge=1, le=65536)
    layers: tuple[LayerSpace, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _short(self) -> StageSpace:
        count = sum(row.repeat for row in self.layers)
        if count > MAX_BLOCKS:
            raise ValueError(f"its rows repeat to {count} layers; a stage has at most {MAX_BLOCKS}")
        return self


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
                    before = found[-1] if found else None
                    shape = (channels, size, stage.out_channels)
                    layer = place(row, repeat == 0, len(found), s + len(self.stem), before, *shape)
                except ValidationError as error:
                    raise SpecError(describe_fields(error, path)) from None
                except SpecError as error:
                    raise SpecError(f"{path}.{error}") from None
                if layer.skip and i == repeat == 0:
                    raise SpecError(f"{path}.skip: the first layer of a stage cannot be skipped")
                found.append(layer)
                channels, size = layer.out_channels, layer.candidates[0].out_size(size)
        return tuple(found)

    @property
    def additive(self) -> bool:
        """Whether what a layer costs depends on its own choice alone: no layer has an output width to choose."""
        return all(layer.additive for layer in self.layers)

    def require_additive(self, what: str) -> None:
        """Raise `SpecError` for a space that is not `additive`, saying what to use instead of ``what``."""
        if not self.additive:
            raise SpecError(
                f"{what} needs a cost that is a sum over layers, but in space {self.name!r} layers have output widths "
                "of their own, so that each layer's cost depends on the one before it: search it by Pruning-as-Search "
                "or Archtree, with MACs, a predictor or measured networks as the cost"
            )

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
            candidate, width = choice
            if not 0 <= candidate < len(layer.candidates) or width not in layer.candidate_widths(candidate):
                raise SpecError(f"layer {layer.index} (stage {layer.stage}) does not offer {choice}")
            blocks.setdefault(layer.stage, []).append(layer.block(candidate, width))
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


def space_around(spec: NetSpec, step: int = 8, least: int | None = None) -> SearchSpace:
    """The space of the networks that are ``spec`` with narrower blocks: what pruning its channels can lead to.

    The first stage is the stem and stays. Each later block is the only candidate of its layer: an inverted residual one
    with hidden widths ``step``, 2 · ``step``, … below its own and its own, a rep block with such output widths, a plain
    convolution as it is. `SearchSpace.largest` decodes to ``spec``.

    Args:
        spec: the start network.
        step: of the grids.
        least: the least width, where a block is not narrower; None: one step.

    Raises:
        SpecError: the network has no stage after its stem or no classifier, or step or least are out of range.
    """
    if len(spec.stages) < 2 or not spec.num_classes:
        lacks = "stage after its stem" if spec.num_classes else "classifier (num_classes 0)"
        raise SpecError(f"there is no space around {spec.name!r}: it has no {lacks}")
    stages = [
        {"out_channels": stage.blocks[-1].out_channels, "layers": [_row(b, stage, step, least) for b in stage.blocks]}
        for stage in spec.stages[1:]
    ]
    same = spec.model_dump(include={"input_size", "in_channels", "tail", "num_classes", "bn_eps"})
    name = f"around_{spec.name}"[:200]
    return SearchSpace.from_dict({**same, "name": name, "stem": [spec.stages[0]], "stages": stages})


def _row(block: BlockSpec, stage: StageSpec, step: int, least: int | None) -> dict[str, Any]:
    """The layer in which ``block`` is the only candidate."""
    row: dict[str, Any] = {
        "stride": block.stride, "types": [block.type], "kernel_sizes": [block.kernel_size], "acts": [block.act],
        "se_ratios": [block.se_ratio], "padding": block.padding, "bn_eps": block.bn_eps,
    }  # fmt: skip
    if block.out_channels != stage.blocks[-1].out_channels:
        row["out_channels"] = block.out_channels
    if block.hidden is not None:
        row["hidden"] = {"step": step, "min": least and min(least, block.hidden), "max": block.hidden}
    if block.type == "rep":
        row["out"] = {"step": step, "min": least and min(least, block.out_channels)}
    return row


def load_space(source: str | Path | dict[str, Any] | SearchSpace) -> SearchSpace:
    """Return the space of a listed name, a JSON file, a dict, or the space itself; errors as in `load_spec`."""
    return load_named(SearchSpace, source, "spaces", "search space")


def list_spaces() -> list[str]:
    """Names that `load_space` takes."""
    return list_named("spaces")
