"""Grouped knapsack: one option a group, greatest total worth under a cost budget, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Option(NamedTuple):
    """One option of a group. ``key`` is what the caller gets back."""

    key: object
    worth: float
    cost: float


def grouped_knapsack(
    groups: Sequence[Sequence[Option]], budget: float, lowest: float = 0.0, bins: int = 8192
) -> list[int] | None:
    """Pick one option of each group so that Σ worth is greatest and lowest ≤ Σ cost ≤ budget.

    Costs are rounded up to 1/bins of the budget, so the true sum never exceeds it, and lies at most len(groups)/bins of
    the budget under the sum that is reckoned with. Time is O(options · bins).

    Args:
        groups: options of each group, each group with at least one.
        budget: greatest total cost, in the unit of the options.
        lowest: least total cost.
        bins: resolution.

    Returns:
        Index of the option picked in each group, or None when no combination is in the interval.
    """
    if budget <= 0 or lowest > budget:
        return None
    value = np.full(bins + 1, -np.inf)  # value[b]: greatest worth with a cost of exactly b bins
    value[0] = 0.0
    picks = np.zeros((len(groups), bins + 1), dtype=np.int32)
    steps: list[np.ndarray] = []
    for g, group in enumerate(groups):
        cost = np.array([option.cost for option in group])
        step = np.ceil(cost / budget * bins - 1e-9).astype(np.int64).clip(min=0)
        steps.append(step)
        best = np.full(bins + 1, -np.inf)
        for i, option in enumerate(group):
            if step[i] > bins:
                continue
            moved = np.full(bins + 1, -np.inf)
            moved[step[i] :] = value[: bins + 1 - step[i]] + option.worth
            better = moved > best
            best[better] = moved[better]
            picks[g, better] = i
        value = best
    first = max(0, int(np.ceil(lowest / budget * bins)))
    at = first + int(value[first:].argmax())
    if not np.isfinite(value[at]):
        return None
    chosen = [0] * len(groups)
    for g in range(len(groups) - 1, -1, -1):
        chosen[g] = int(picks[g, at])
        at -= int(steps[g][chosen[g]])
    return chosen


def best_in_interval(groups: Sequence[Sequence[Option]], budget: float, lowest: float) -> list[int] | None:
    """`grouped_knapsack` whose pick truly costs more than ``lowest``: it reckons with costs up to a bin too high."""
    bins = 8192
    slack = len(groups) / bins * budget
    return grouped_knapsack(groups, budget, max(0.0, lowest + slack), bins)
