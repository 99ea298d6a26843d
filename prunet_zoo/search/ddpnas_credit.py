"""What DDPNAS credits its choices with: the softmax E of arXiv 1905.13543; ours: accuracies freed of their partners.

A sub-network's accuracy is credited to each choice in it, so a choice's record depends on its partners. With few passes
that is luck, and under a budget it does not even out with many: dear choices always meet cheap partners. So the record
of a choice can be the accuracy less the main effects of the other layers' choices, estimated from all sub-networks so
far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from prunet_zoo.search.ddpnas_draws import Picks

_RIDGE, _RIDGE_LEVEL = 1.0, 3.0  # evaluations' worth of belief that an effect (the level of a pass) is zero


@dataclass(frozen=True)
class Evaluation:
    """A sub-network that was evaluated: in which pass (counted over all phases), its picks, its accuracy (fraction)."""

    turn: int
    picks: Picks
    accuracy: float


def mean_softmax(passes: Sequence[Sequence[tuple[int, float]]], survivors: Sequence[int]) -> dict[int, float]:
    """E of each survivor of a layer: the mean over passes of the softmax over choices of 100·V.

    A pass is a list of (choice, accuracy as a fraction); V is the mean accuracy of a choice in the pass. A budget can
    keep a choice out of a pass (ours): then the softmax is over the others, times their share of the survivors; the
    mean is over the passes that a choice was in, and 1/m (it says nothing) for one that was in none.
    """
    sums, times = dict.fromkeys(survivors, 0.0), dict.fromkeys(survivors, 0)
    for one in passes:
        seen: dict[int, list[float]] = {}
        for choice, accuracy in one:
            seen.setdefault(choice, []).append(accuracy)
        points = {c: 100 * sum(v) / len(v) for c, v in seen.items()}
        top = max(points.values())
        weights = {c: math.exp(v - top) for c, v in points.items()}
        share = len(points) / len(survivors) / sum(weights.values())
        for c, weight in weights.items():
            sums[c] += share * weight
            times[c] += 1
    return {c: sums[c] / times[c] if times[c] else 1 / len(survivors) for c in survivors}


def main_effects(evaluations: Sequence[Evaluation], sizes: Sequence[int]) -> list[np.ndarray]:
    """What each choice of each layer adds to the accuracy (fractions): ridge regression on which choices were in.

    Each pass has a level of its own in it, as the shared weights get better from one to the next.
    """
    start = np.cumsum([0, *sizes])
    turns = np.array([e.turn for e in evaluations])
    x = np.zeros((len(evaluations), start[-1] + turns[-1] + 1))
    x[np.arange(len(x))[:, None], start[:-1] + np.array([e.picks for e in evaluations])] = 1.0
    x[np.arange(len(x)), start[-1] + turns] = 1.0
    x -= x.mean(0)
    y = np.array([e.accuracy for e in evaluations])
    penalty = np.concatenate([np.full(start[-1], _RIDGE), np.full(turns[-1] + 1, _RIDGE_LEVEL)])
    effects = np.linalg.solve(x.T @ x + np.diag(penalty), x.T @ (y - y.mean()))
    return [effects[a:b] for a, b in pairwise(start)]
