"""Which sub-networks DDPNAS trains in a pass: without replacement, and within a budget (arXiv 1905.13543).

The paper draws one surviving choice a layer "without replacement": in a pass of k sub-networks every one of k survivors
is used exactly once. What is ours: layers with fewer survivors, and a budget.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from prunet_zoo.search.knapsack import Option, grouped_knapsack

Picks = tuple[int, ...]  # an index into the choices of each layer

_SWEEPS = 6
_STARTS, _SWAPS = 8, 200  # permutations that are tried for a budget; exchanges within one
_BINS = 2048
SAFE = 1 - 1e-9  # what rounding may add to a sum must not take it over the budget


class Draws:
    """Draws the sub-networks of a phase: of any number of passes, each a permutation of the survivors in every layer.

    The passes of a phase are drawn together so that any two choices of different layers meet about alike often (ours,
    see `_balance`): what a choice is credited with then depends less on its luck with partners.

    A layer with m < k survivors uses each of them once in a pass and fills the other k − m places from decks of all m,
    which go on from pass to pass, so that over a phase the numbers of their uses differ by one at most.

    With a budget, choices are exchanged until all k sub-networks of a pass are within it. Where no such permutations
    exist (the survivors cost more than the budget in the mean) or none are found, each sub-network that costs too much
    keeps as many of its choices as fit, by a knapsack; choices that were left out come first in what follows.

    Args:
        seed: the same seed gives the same draws.
        sizes: number of choices of each layer.
        costs: cost of each choice of each layer; None: no budget.
        budget: greatest Σ cost of a sub-network.

    Attributes:
        owed: draws by which each choice is behind (above 0) or ahead, because of the budget.
    """

    def __init__(
        self,
        seed: int,
        sizes: Sequence[int],
        costs: Sequence[Sequence[float]] | None = None,
        budget: float | None = None,
    ) -> None:
        self.seed, self.costs, self.budget = seed, costs, budget
        self.owed = [[0] * size for size in sizes]

    def phase(self, survivors: Sequence[Sequence[int]], count: int, passes: int) -> list[list[Picks]]:
        """``passes`` passes of ``count`` sub-networks; ``count`` is at least the number of survivors of any layer."""
        rng = random.Random(f"{self.seed}/{count}")
        decks: list[list[int]] = [[] for _ in survivors]
        columns = [
            [_column(rng, layer, deck, count) for layer, deck in zip(survivors, decks, strict=True)]
            for _ in range(passes)
        ]
        _balance(rng, columns, survivors)
        return [self._within(rng, one, survivors) for one in columns]

    def _within(self, rng: random.Random, columns: list[list[int]], survivors: Sequence[Sequence[int]]) -> list[Picks]:
        """The sub-networks of a pass, (layers, count) choices, within the budget."""
        if self.costs is None or self.budget is None:
            return list(zip(*columns, strict=True))
        best, least = columns, np.inf
        for _ in range(_STARTS):
            excess = self._exchange(rng, columns)
            if excess < least:
                best, least = [list(column) for column in columns], excess
            if not excess or self._table(columns).sum() > self.budget * len(columns[0]):
                break
            for column in columns:
                rng.shuffle(column)
        rows: list[Picks] = list(zip(*best, strict=True))
        return [row if self.cost(row) <= self.budget else self._repaired(rng, row, survivors) for row in rows]

    def single(self, survivors: Sequence[Sequence[int]], label: str) -> Picks:
        """One sub-network on its own, every choice alike likely as far as the budget allows."""
        rng = random.Random(f"{self.seed}/{label}")
        row = tuple(rng.choice(list(layer)) for layer in survivors)
        if self.budget is None or self.cost(row) <= self.budget:
            return row
        kept = [list(layer) for layer in self.owed]
        row = self._repaired(rng, row, survivors)
        self.owed = kept
        return row

    def cost(self, picks: Sequence[int]) -> float:
        """Σ cost of a sub-network (0 without costs)."""
        return 0.0 if self.costs is None else sum(c[p] for c, p in zip(self.costs, picks, strict=True))

    def _table(self, columns: list[list[int]]) -> np.ndarray:
        assert self.costs is not None
        return np.array([[c[p] for p in column] for c, column in zip(self.costs, columns, strict=True)])

    def _exchange(self, rng: random.Random, columns: list[list[int]]) -> float:
        """Exchange choices of one layer between the dearest sub-network and another; returns the excess left."""
        assert self.budget is not None
        table = self._table(columns)
        sums = table.sum(0)
        for _ in range(_SWAPS):
            row = int(sums.argmax())
            if sums[row] <= self.budget:
                return 0.0
            less = table[:, row : row + 1] - table  # (L, k): what the dearest saves by an exchange
            before = sums[row] - self.budget + np.maximum(sums - self.budget, 0)
            after = np.maximum(sums[row] - less - self.budget, 0) + np.maximum(sums + less - self.budget, 0)
            better = np.argwhere(after < before - 1e-12 * self.budget)
            if not len(better):
                break
            layer, other = better[rng.randrange(len(better))]
            column = columns[layer]
            column[row], column[other] = column[other], column[row]
            table[layer, [row, other]] = table[layer, [other, row]]
            sums = table.sum(0)
        return float(np.maximum(sums - self.budget, 0).sum())

    def _repaired(self, rng: random.Random, row: Picks, survivors: Sequence[Sequence[int]]) -> Picks:
        """A sub-network within the budget that shares with ``row`` as much as possible, what is owed first."""
        assert self.costs is not None and self.budget is not None
        groups = []
        for index, layer in enumerate(survivors):
            owed, cost = self.owed[index], self.costs[index]
            groups.append(
                [
                    Option(c, 1.0 + 2 * max(0, owed[c]), cost[c])
                    if c == row[index]
                    else Option(c, 0.1 * owed[c] / (1 + abs(owed[c])) + 0.01 * rng.random(), cost[c])
                    for c in layer
                ]
            )
        picked = cheapest_or_best(groups, self.budget, _BINS)
        for index, (planned, taken) in enumerate(zip(row, picked, strict=True)):
            if planned != taken:
                self.owed[index][planned] += 1
                self.owed[index][taken] -= 1
            elif self.owed[index][planned] > 0:
                self.owed[index][planned] -= 1
        return picked


def cheapest_or_best(groups: Sequence[Sequence[Option]], budget: float, bins: int = 8192) -> Picks:
    """Keys of the best combination within the budget; the cheapest where rounding makes that seem impossible."""
    picks = grouped_knapsack(groups, budget * SAFE, bins=bins)
    if picks is None:
        picks = [min(range(len(g)), key=lambda i: g[i].cost) for g in groups]
    return tuple(g[i].key for g, i in zip(groups, picks, strict=True))  # type: ignore[misc]


def _column(rng: random.Random, layer: Sequence[int], deck: list[int], count: int) -> list[int]:
    """The choices of a layer in a pass, in random order; ``deck`` fills it up and goes on to the next pass."""
    column = list(layer)
    while len(column) < count:
        if not deck:
            deck += rng.sample(list(layer), len(layer))
        column.append(deck.pop())
    rng.shuffle(column)
    return column


def _balance(rng: random.Random, columns: list[list[list[int]]], survivors: Sequence[Sequence[int]]) -> None:
    """Exchange choices between the sub-networks of a pass until any two meet about alike often.

    The passes start from random permutations, so each choice is still as likely in any place. Then in a few sweeps the
    choices of each layer in each pass are assigned anew to its sub-networks, at the least Σ (meetings)² over all pairs.
    """
    start = np.cumsum([0] + [len(layer) for layer in survivors])
    code = [{c: start[i] + j for j, c in enumerate(layer)} for i, layer in enumerate(survivors)]
    x = np.array([[[code[i][c] for c in column] for i, column in enumerate(one)] for one in columns])  # (T, L, k)
    total = start[-1]
    noise = np.random.default_rng(rng.getrandbits(64))

    def shown(one: np.ndarray) -> np.ndarray:
        """Which choices are in which sub-network: (L, k) → (k, choices), 0 or 1."""
        z = np.zeros((one.shape[1], total))
        z[np.arange(one.shape[1])[None], one] = 1
        return z

    meet = sum(z.T @ z for z in map(shown, x))  # (choices, choices)
    for _ in range(_SWEEPS):
        for p in noise.permutation(len(x)):
            one = x[p]
            z = shown(one)
            others = meet - z.T @ z
            for i in noise.permutation(len(one)):
                own = slice(start[i], start[i + 1])
                z[:, own] = 0
                price = z @ others[:, one[i]]  # (sub-network, choice to be assigned)
                rows, which = linear_sum_assignment(price + 0.01 * noise.random(price.shape))
                one[i] = one[i][which[np.argsort(rows)]]
                z[np.arange(len(z)), one[i]] = 1
            meet = others + z.T @ z
    back = [c for layer in survivors for c in layer]
    for one, coded in zip(columns, x, strict=True):
        for i, column in enumerate(coded):
            one[i][:] = [back[j] for j in column]
