"""The target T that a method is given: a positive number, or none until its range is known, and within that range."""

from __future__ import annotations

import math

from prunet_zoo.cost import Cost, check_target, default_target
from prunet_zoo.errors import LatencyError
from prunet_zoo.space import SearchSpace


def given_target(target: float | None) -> float:
    """T as a method keeps it: NaN where none is given. Raises `LatencyError` for what is no positive number."""
    if target is None:
        return math.nan
    if not (math.isfinite(target) and target > 0):
        raise LatencyError(f"the target must be a positive number, got {target!r}")
    return float(target)


def space_target(target: float, cost: Cost, space: SearchSpace) -> float:
    """T of a search among all networks of a space; `default_target` in place of NaN.

    Raises:
        LatencyError: no network of the space can have that cost.
    """
    if math.isnan(target):
        target = default_target(cost, space)
    check_target(cost, space, target)
    return target


def pruned_target(target: float, low: float, high: float, unit: str) -> float:
    """T of a start network that is pruned; a third of the way from ``low`` to ``high``, two digits, in place of NaN.

    Args:
        low, high: cost of the narrowest network that pruning can give, and of the start network.

    Raises:
        LatencyError: no pruning gives that cost.
    """
    if math.isnan(target):
        target = min(max(float(f"{low + (high - low) / 3:.2g}"), low), high)
    if not low <= target <= high:
        side = "below the narrowest network" if target < low else "above the start network"
        raise LatencyError(
            f"target {target:g} {unit} is {side} that pruning can give: choose between {low:.4g} and {high:.4g} {unit}"
        )
    return target
