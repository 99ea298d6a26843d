"""What DDPNAS chooses among, and what each choice costs. The coarse grid of widths is ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from prunet_zoo.cost import Cost, choice_cost
from prunet_zoo.errors import LatencyError, SpecError
from prunet_zoo.space import Choice, SearchLayer, SearchSpace


def choice_costs(
    space: SearchSpace | None,
    choices: Sequence[Sequence[Any]],
    cost: Cost | Sequence[Sequence[float]] | None,
    budget: float | None,
) -> tuple[list[list[float]] | None, float]:
    """Cost of each choice of each layer, and what every network costs besides.

    None for the choices where there is no cost, and in a space where only whole networks have one.

    Raises:
        SpecError: a `Cost` without a space, lists with one, or lists that do not fit the choices.
        LatencyError: a budget without a cost, or in a space whose cost is no sum over layers; a cost is not finite.
    """
    if cost is None:
        if budget is not None:
            raise LatencyError("DDPNAS: a budget needs a cost (a latency table, MACs, or the cost of each choice)")
        return None, 0.0
    if space is None:
        if hasattr(cost, "block"):
            raise SpecError("DDPNAS: for lists of choices, cost must be the cost of each choice of each layer")
        costs = [[float(c) for c in layer] for layer in cost]
        if [len(layer) for layer in costs] != [len(layer) for layer in choices]:
            raise SpecError("DDPNAS: cost must give one figure for each choice of each layer")
        return _finite(costs), 0.0
    if not hasattr(cost, "block"):
        raise SpecError("DDPNAS: for a space, cost must be a Cost (a latency table or MacsCost), not lists")
    if not space.additive:
        if budget is None:
            return None, 0.0
        raise LatencyError(
            f"DDPNAS: in space {space.name!r} a layer's cost depends on the layer before it, so no budget can "
            "be kept; search it by PruningAsSearch or Archtree, or without a budget"
        )
    pairs = zip(space.layers, choices, strict=True)
    costs = [[choice_cost(cost, layer, c) for c in row] for layer, row in pairs]  # type: ignore[arg-type]
    return _finite(costs), cost.fixed(space)  # type: ignore[union-attr]


def _finite(costs: list[list[float]]) -> list[list[float]]:
    if not all(math.isfinite(c) for layer in costs for c in layer):
        raise LatencyError("DDPNAS: the cost of every choice must be a finite number")
    return costs


def space_choices(space: SearchSpace, widths: int) -> list[list[Choice]]:
    """What each layer offers to DDPNAS: candidates × ``widths`` evenly spaced widths of their grid, skip last."""
    return [_layer_choices(layer, widths) for layer in space.layers]


def _layer_choices(layer: SearchLayer, widths: int) -> list[Choice]:
    real: list[Choice] = [
        (c, w) for c in range(len(layer.candidates)) for w in evenly(layer.candidate_widths(c), widths)
    ]
    return [*real, None] if layer.skip else real


def evenly(grid: Sequence[int], count: int) -> list[int]:
    """``count`` values of a grid (all, where it has no more), evenly spaced from its first to its last."""
    count = min(count, len(grid))
    return [grid[round(i * (len(grid) - 1) / max(1, count - 1))] for i in range(count)]
