"""TracedSpace: what may vary in a CNN that is no `NetSpec`, in the form of a `SearchSpace`; no weights."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from prunet_zoo.errors import SpecError, few
from prunet_zoo.models.channels import Profile, Shape
from prunet_zoo.models.pruned import PrunedSpec
from prunet_zoo.space import Choice, Encoding
from prunet_zoo.spec import stable_hash


@dataclass(frozen=True)
class TracedLayer:
    """A set of channels that go together: one candidate, with any width of a grid.

    ``shrinks``: layers that become narrower with it, as (module, 'out' or 'in', their channels for each of the set's).
    """

    index: int
    name: str  # of the first layer that makes the channels
    widths: tuple[int, ...]
    shrinks: tuple[tuple[str, str, int], ...]
    skip: bool = False
    stage: int = 0

    @property
    def channels(self) -> int:
        """Channels of the start network."""
        return self.widths[-1]

    def candidate_widths(self, candidate: int) -> tuple[int, ...]:
        """The grid; there is candidate 0 alone."""
        if candidate != 0:
            raise SpecError(f"layer {self.index} ({self.name}) has one candidate, 0; got {candidate}")
        return self.widths

    def choices(self) -> list[Choice]:
        """Everything that may stand here."""
        return [(0, width) for width in self.widths]


class TracedSpace:
    """The networks that arise from a CNN when channels go. An encoding is one ``(0, width)`` a layer.

    Args:
        start: the whole network, ``shapes`` empty.
        layers: what may become narrower.
        profile: the start network's layers at its input size.

    Attributes:
        additive: False: what a layer costs depends on the widths of those around it.
    """

    additive = False

    def __init__(self, start: PrunedSpec, layers: Sequence[TracedLayer], profile: Profile) -> None:
        self.start, self.layers, self.profile = start, tuple(layers), profile
        self.name, self.input_size = start.name, start.input_size
        self.in_channels, self.num_classes = start.in_channels, start.num_classes

    @cached_property
    def hash(self) -> str:
        """12 hex digits that do not depend on the space's name."""
        layers = [[layer.name, list(layer.widths)] for layer in self.layers]
        shapes = {name: list(layer.shape) for name, layer in self.profile.layers.items()}
        return stable_hash({"start": self.start.hash, "layers": layers, "shapes": shapes})

    def count(self) -> int:
        """Number of encodings."""
        return math.prod(len(layer.widths) for layer in self.layers)

    def largest(self) -> Encoding:
        """The start network."""
        return tuple((0, layer.widths[-1]) for layer in self.layers)

    def smallest(self) -> Encoding:
        """The least width in every layer."""
        return tuple((0, layer.widths[0]) for layer in self.layers)

    def sample(self, rng: random.Random) -> Encoding:
        """Draw the width of each layer uniformly."""
        return tuple((0, rng.choice(layer.widths)) for layer in self.layers)

    def decode(self, encoding: Sequence[Choice], name: str | None = None) -> PrunedSpec:
        """Return the network of one choice a layer.

        Raises:
            SpecError: wrong length, or a choice that its layer does not offer.
        """
        if len(encoding) != len(self.layers):
            raise SpecError(f"an encoding of {self.name!r} has {len(self.layers)} choices, got {len(encoding)}")
        for layer, choice in zip(self.layers, encoding, strict=True):
            if choice is None or choice[0] != 0 or choice[1] not in layer.widths:
                raise SpecError(
                    f"layer {layer.index} ({layer.name}) does not offer {choice}, but (0, width) with a width of "
                    f"{few(layer.widths)}"
                )
        return self.at([choice[1] for choice in encoding if choice is not None], name)

    def at(self, widths: Sequence[int], name: str | None = None) -> PrunedSpec:
        """The network with so many channels a layer, on the grid or not, from 1 to the start network's."""
        gone: dict[str, dict[str, int]] = {}
        for layer, width in zip(self.layers, widths, strict=True):
            if not 1 <= width <= layer.channels:
                raise SpecError(f"layer {layer.index} ({layer.name}) keeps 1 to {layer.channels} channels, not {width}")
            for module, side, times in layer.shrinks:
                sides = gone.setdefault(module, {"out": 0, "in": 0})
                sides[side] += times * (layer.channels - width)
        shapes = {module: _less(self.profile.layers[module].shape, sides) for module, sides in gone.items()}
        changed = {module: shape for module, shape in shapes.items() if shape != self.profile.layers[module].shape}
        data = self.start.model_dump()
        return PrunedSpec(**{**data, "name": name or f"{self.name}-sample", "shapes": changed})

    def encode(self, spec: PrunedSpec) -> Encoding:
        """Return the encoding whose `decode` is ``spec``; raises `SpecError` where there is none."""
        found = []
        for layer in self.layers:
            whole = self.profile.layers[layer.name].shape
            found.append((0, spec.shapes.get(layer.name, whole)[0]))
        if self.decode(found).hash != spec.hash:
            raise SpecError(f"{spec.name!r} is no network of {self.name!r} with fewer channels")
        return tuple(found)

    def contains(self, spec: PrunedSpec) -> bool:
        """Whether some encoding gives this network (its name does not matter)."""
        try:
            return self.decode(self.encode(spec)).hash == spec.hash
        except SpecError:
            return False

    def macs(self, spec: PrunedSpec) -> int:
        """Multiply-accumulates of one of the space's networks, in closed form."""
        return self.profile.macs(spec.shapes)

    def params(self, spec: PrunedSpec) -> int:
        """Trainable parameters of one of the space's networks, in closed form."""
        return self.profile.params(spec.shapes)


def _less(shape: Shape, gone: Mapping[str, int]) -> Shape:
    """A layer's shape without so many outputs and inputs; a depth-wise convolution keeps one group a channel."""
    if len(shape) == 1:
        return (shape[0] - gone["out"],)
    if len(shape) == 3 and shape[2] > 1 and gone["out"]:
        return (shape[0] - gone["out"],) * 3
    return (shape[0] - gone["out"], shape[1] - gone["in"], *shape[2:])
