"""Which channels stay when a cost is to be met: all groups' thresholds move together until it is. Rules are ours.

A channel stays where its mask weight is above ½ + shift · rate of its group. Were the rates what a channel of the group
costs, the shift would be the Lagrange multiplier of the cost: a channel stays that is worth its price.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from prunet_zoo.errors import LatencyError
from prunet_zoo.search.knapsack import Option, grouped_knapsack
from prunet_zoo.search.width_cost import WidthCost
from prunet_zoo.supernet.masked import THRESHOLD

TIE = 1e-4  # see `Thresholds`


class Thresholds:
    """How many channels each group keeps by the common shift.

    Args:
        weights: mask weights of each group, (C,) each.
        rates: by how much a group's threshold moves with the shift, positive.
        least: how many channels each group keeps at least.
        tie: what the first and the last of a group's ranked channels differ by besides their weights; with it equal
            ones go one by one.

    Attributes:
        leave: for each group the shift at which each of its channels goes, the last to go first.
    """

    def __init__(
        self, weights: Sequence[np.ndarray], rates: Sequence[float], least: Sequence[int], tie: float = 0.0
    ) -> None:
        self.rates, self.least = list(rates), list(least)
        self.leave: list[np.ndarray] = []
        for weight, rate in zip(weights, rates, strict=True):
            ranked = np.sort(weight.astype(np.float64))[::-1]
            ranked = ranked - tie * np.arange(len(ranked)) / len(ranked)
            self.leave.append((ranked - THRESHOLD) / rate)

    def widths(self, shift: float) -> tuple[int, ...]:
        """Channels that stay in each group."""
        counts = [int(np.searchsorted(-leave, -shift)) for leave in self.leave]
        return tuple(max(least, count) for least, count in zip(self.least, counts, strict=True))

    def solve(self, value: Callable[[tuple[int, ...]], float], highest: float, enough: float) -> float:
        """The shift at which ``value(widths)`` is at most ``highest``, and just so: no channel more would fit, or it is
        above ``enough``. Where not even the least widths fit, the shift that gives these."""
        times = np.unique(np.concatenate(self.leave))
        # between two of them nothing changes; before the first everything stays, behind the last the least
        shifts = np.concatenate([[times[0] - 1e-3], (times[:-1] + times[1:]) / 2, [times[-1] + 1e-3]])
        low, high = -1, len(shifts) - 1
        while high - low > 1:
            middle = (low + high) // 2
            found = value(self.widths(float(shifts[middle])))
            if found > highest:
                low = middle
            else:
                high = middle
                if found > enough:
                    break
        return float(shifts[high])


def fit_widths(cost: WidthCost, thresholds: Thresholds, target: float, share: float) -> tuple[int, ...]:
    """Widths on the grids whose cost is in (share · target, target], near those of a common shift.

    The common shift comes first; then the groups whose next channels would stay longest are widened by a step of their
    grids as long as they fit. Where that does not use enough of the target, one group is made narrower, or one wider
    and others narrower, before that; last, in an additive space, a knapsack over all widths.

    Raises:
        LatencyError: none was found.
    """
    fit = _Fit(cost, thresholds, target, share)
    found = fit.run()
    if found is None:
        raise LatencyError(
            f"no widths of the start network cost between {share * target:.4g} and {target:.4g} {cost.cost.unit}; "
            "choose another target, a finer grid of widths (step) or a wider start network"
        )
    return found


class _Fit:
    def __init__(self, cost: WidthCost, thresholds: Thresholds, target: float, share: float) -> None:
        self.cost, self.thresholds, self.target, self.share = cost, thresholds, target, share
        self.grids = cost.grids

    def run(self) -> tuple[int, ...] | None:
        shift = self.thresholds.solve(
            lambda widths: self.cost(self._on_grid(widths)), self.target * (1 + 1e-12), self.share * self.target
        )
        start = [self.grids[g].index(w) for g, w in enumerate(self._on_grid(self.thresholds.widths(shift)))]
        for at in self._tries(start):
            filled = self._fill(at)
            widths = self._widths(filled)
            if self.share * self.target < self.cost.exact(widths) <= self.target:
                return widths
        return self._knapsack()

    def _on_grid(self, widths: Sequence[int]) -> tuple[int, ...]:
        return tuple(next(w for w in grid if w >= width) for grid, width in zip(self.grids, widths, strict=True))

    def _widths(self, at: Sequence[int]) -> tuple[int, ...]:
        return tuple(grid[i] for grid, i in zip(self.grids, at, strict=True))

    def _price(self, group: int, at: int) -> float:
        """The mean shift at which the channels of step ``at`` of a group's grid go: what they are worth by cost."""
        grid = self.grids[group]
        return float(self.thresholds.leave[group][grid[at - 1] : grid[at]].mean())

    def _tries(self, start: list[int]) -> Iterator[list[int]]:
        """Places on the grids to fill up from: the start; one group narrower; one wider, others narrower to fit."""
        yield start
        last_to_go = sorted(range(len(start)), key=lambda g: (self._price(g, start[g]) if start[g] else 0.0, g))
        for g in last_to_go:
            if start[g]:
                yield [*start[:g], start[g] - 1, *start[g + 1 :]]
        for g in last_to_go:
            if start[g] + 1 < len(self.grids[g]):
                wider = [*start[:g], start[g] + 1, *start[g + 1 :]]
                yield self._shrink(wider, fixed=g)

    def _shrink(self, at: list[int], fixed: int) -> list[int]:
        """Narrow the other groups, what is worth least first, until the network fits."""
        at = list(at)
        while self.cost(self._widths(at)) > self.target:
            open_groups = [g for g in range(len(at)) if g != fixed and at[g]]
            if not open_groups:
                break
            at[min(open_groups, key=lambda g: (self._price(g, at[g]), g))] -= 1
        return at

    def _fill(self, at: list[int]) -> list[int]:
        """Widen groups step by step, what is worth most first, as long as the network fits."""
        at = list(at)
        open_groups = {g for g in range(len(at)) if at[g] + 1 < len(self.grids[g])}
        while open_groups:
            g = max(open_groups, key=lambda g: (self._price(g, at[g] + 1), -g))
            at[g] += 1
            if self.cost(self._widths(at)) > self.target:
                at[g] -= 1
                open_groups.remove(g)
            elif at[g] + 1 == len(self.grids[g]):
                open_groups.remove(g)
        return at

    def _knapsack(self) -> tuple[int, ...] | None:
        """In an additive space the widths of greatest worth whose cost is in the interval."""
        if not self.cost.additive:
            return None
        low = self._widths([0] * len(self.grids))
        base = self.cost(low)
        groups = []
        for g, grid in enumerate(self.grids):
            leave, rate = self.thresholds.leave[g], self.thresholds.rates[g]
            parts = [self.cost([*low[:g], w, *low[g + 1 :]]) - base for w in grid]
            groups.append([Option(i, float(leave[:w].sum() * rate), parts[i]) for i, w in enumerate(grid)])
        bins = 8192
        budget = self.target - base
        lowest = max(0.0, self.share * self.target - base + len(groups) / bins * budget)
        picks = grouped_knapsack(groups, budget, lowest, bins)
        if picks is None:
            return None
        widths = self._widths(picks)
        return widths if self.share * self.target < self.cost.exact(widths) <= self.target else None
