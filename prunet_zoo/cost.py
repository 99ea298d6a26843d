"""What a network costs, as a strategy sees it: a sum over blocks and a fixed part. Latency tables have this shape.

In a space whose layers have output widths of their own (`SearchSpace.additive` is False) there is no such sum: there a
cost is asked for whole networks only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from prunet_zoo.errors import LatencyError, SpecError
from prunet_zoo.space import Choice, Encoding, SearchLayer, SearchSpace
from prunet_zoo.spec import BlockSpec, NetSpec, PlacedBlock, stable_hash


class Cost(Protocol):
    """Additive cost of a network of one space, in ``unit``."""

    unit: str

    @property
    def hash(self) -> str:
        """Changes when any figure changes: a resumed search must go on with the same cost."""
        ...

    def block(self, block: BlockSpec, in_channels: int, in_size: tuple[int, int]) -> float:
        """Cost of one searchable block on a map of ``in_size`` (H, W)."""
        ...

    def fixed(self, space: SearchSpace) -> float:
        """Cost of what every network of the space has: stem, tail, classifier, call overhead."""
        ...

    def __call__(self, spec: NetSpec) -> float:
        """Cost of a whole network: `fixed` plus the sum over its searchable blocks."""
        ...

    def describe(self) -> dict[str, Any]:
        """Device, backend and whatever else a report should say about where the figures are from."""
        ...


class MacsCost:
    """Multiply-accumulates in millions: a cost that needs no device."""

    unit = "MMACs"
    hash = "macs"

    def block(self, block: BlockSpec, in_channels: int, in_size: tuple[int, int]) -> float:
        """MMACs of one block."""
        return block.macs(in_channels, in_size) / 1e6

    def fixed(self, space: SearchSpace) -> float:
        """MMACs of stem, tail and classifier; raises `SpecError` for a space that is not additive."""
        space.require_additive("the fixed part of a cost")
        encoding = space.largest()
        return self(space.decode(encoding)) - sum(
            choice_cost(self, layer, choice) for layer, choice in zip(space.layers, encoding, strict=True)
        )

    def __call__(self, spec: NetSpec) -> float:
        """MMACs of the network at its own input size."""
        return spec.macs() / 1e6

    def describe(self) -> dict[str, Any]:
        """No device is involved."""
        return {"cost": "MACs computed from the spec"}


class ScaledCost:
    """A `Cost` in ms: one network was measured, any other takes as many times less as it has fewer MACs.

    The rule is ours, and coarse: on most devices a network with half of the MACs takes more than half of the time. A
    search whose target is in ms therefore measures what it proposes and corrects its aim.

    Args:
        macs: the cost in MACs of the networks meant: `MacsCost`, or a `TracedCost`.
        network: the one measured.
        measured_ms: its latency.
        about: where that is from, for reports: plain JSON data.

    Raises:
        LatencyError: a latency that is none.
    """

    unit = "ms"

    def __init__(self, macs: Cost, network: Any, measured_ms: float, about: dict[str, Any] | None = None) -> None:
        if not 0 < measured_ms < float("inf"):
            raise LatencyError(f"the network's latency must be a positive number of ms, got {measured_ms}")
        self.macs, self.measured_ms, self.about = macs, measured_ms, dict(about or {})
        self.scale = measured_ms / macs(network)  # ms a million multiply-accumulates
        self.hash = stable_hash({"macs": macs.hash, "network": network.hash, "measured_ms": measured_ms})

    def block(self, block: BlockSpec, in_channels: int, in_size: tuple[int, int]) -> float:
        """ms of one block; raises where ``macs`` has none."""
        return self.macs.block(block, in_channels, in_size) * self.scale

    def fixed(self, space: SearchSpace) -> float:
        """ms of what every network of the space has; raises where ``macs`` does."""
        return self.macs.fixed(space) * self.scale

    def __call__(self, spec: Any) -> float:
        """ms of the network at its own input size."""
        return self.macs(spec) * self.scale

    def describe(self) -> dict[str, Any]:
        """Where the figure is from."""
        return {"cost": "MACs scaled by one measurement", "start_ms": self.measured_ms, **self.about}


def choice_cost(cost: Cost, layer: SearchLayer, choice: Choice) -> float:
    """Cost of one choice in its layer (0 for skip).

    Raises:
        SpecError: the layer has an output width of its own, or the one before it has.
    """
    if not layer.additive:
        raise SpecError(
            f"layer {layer.index} of the space costs what it does only together with its neighbours, whose output "
            "widths vary: use the cost of the whole network (space_cost)"
        )
    return 0.0 if choice is None else cost.block(layer.block(*choice), layer.in_channels, layer.in_size)


def space_cost(cost: Cost, space: SearchSpace, encoding: Sequence[Choice]) -> float:
    """Cost of an encoded network, of any space."""
    if not space.additive:
        return cost(space.decode(encoding))
    return cost.fixed(space) + sum(choice_cost(cost, la, ch) for la, ch in zip(space.layers, encoding, strict=True))


def layer_costs(cost: Cost, space: SearchSpace, encoding: Sequence[Choice]) -> list[float]:
    """Cost of each layer of an encoded network, of any space (0 for skip): between the neighbours that it has there."""
    if space.additive:
        return [choice_cost(cost, layer, choice) for layer, choice in zip(space.layers, encoding, strict=True)]
    placed = (p for p in space.decode(encoding).placed() if p.stage >= len(space.stem))
    return [0.0 if c is None else cost.block(p.block, p.in_channels, p.in_size) for c, p in _pairs(encoding, placed)]


def _pairs(encoding: Sequence[Choice], placed: Iterator[PlacedBlock]) -> Iterator[tuple[Choice, Any]]:
    """Each choice with the block that it became, None for skip."""
    for choice in encoding:
        yield choice, None if choice is None else next(placed)


def cost_range(cost: Cost, space: SearchSpace) -> tuple[tuple[float, Encoding], tuple[float, Encoding]]:
    """The cheapest and the dearest network of a space: (cost, encoding) each.

    In a space that is not additive these are the networks of all least and of all greatest widths, as they are for any
    cost that does not fall when a width grows.
    """
    if not space.additive:
        return _whole_end(cost, space, min), _whole_end(cost, space, max)
    rows = [[(choice_cost(cost, layer, choice), choice) for choice in layer.choices()] for layer in space.layers]
    fixed = cost.fixed(space)
    low = [min(row, key=lambda item: item[0]) for row in rows]
    high = [max(row, key=lambda item: item[0]) for row in rows]
    return (
        (fixed + sum(c for c, _ in low), tuple(ch for _, ch in low)),
        (fixed + sum(c for c, _ in high), tuple(ch for _, ch in high)),
    )


def _whole_end(cost: Cost, space: SearchSpace, pick: Any) -> tuple[float, Encoding]:
    """The network at one end of every grid. ``pick``: `min` or `max`. Which candidate stands in a layer changes no
    other layer's shape, so each is chosen alone."""
    rows: list[list[Choice]] = []
    for layer in space.layers:
        ends: dict[int | None, Choice] = {}
        for choice in layer.choices():
            kind = None if choice is None else choice[0]
            ends[kind] = choice if choice is None else pick(choice, ends.get(kind) or choice)
        rows.append(list(ends.values()))
    chosen = [row[0] for row in rows]
    for i, row in enumerate(rows):
        if len(row) > 1:
            found = [(cost(space.decode([*chosen[:i], option, *chosen[i + 1 :]])), k) for k, option in enumerate(row)]
            chosen[i] = row[pick(found)[1]]
    return cost(space.decode(chosen)), tuple(chosen)


def default_target(cost: Cost, space: SearchSpace) -> float:
    """A target for who names none: a third of the way from the cheapest to the dearest network, two digits."""
    (fastest, _), (slowest, _) = cost_range(cost, space)
    return min(max(float(f"{fastest + (slowest - fastest) / 3:.2g}"), fastest), slowest)


def _digits(value: float, towards: Callable[[float], int]) -> str:
    """Four significant digits, rounded into the range that a message offers."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{towards(value / unit) * unit:.4g}"


def check_target(cost: Cost, space: SearchSpace, target: float) -> None:
    """Raise `LatencyError` naming both ends when no network of the space can have cost ``target``."""
    (fastest, _), (slowest, _) = cost_range(cost, space)
    if not fastest <= target <= slowest:
        side = "below the fastest" if target < fastest else "above the slowest"
        raise LatencyError(
            f"target {target:g} {cost.unit} is {side} network of space {space.name!r}: "
            f"choose between {_digits(fastest, math.ceil)} and {_digits(slowest, math.floor)} {cost.unit}"
        )
