"""The end of a DDPNAS search: an architecture whose cost is in (share·T, T]. Ours, but for the knapsack on θ."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from prunet_zoo.cost import Cost, choice_cost, cost_range
from prunet_zoo.errors import LatencyError
from prunet_zoo.search.ddpnas import DDPNASearch
from prunet_zoo.search.knapsack import Option, best_in_interval
from prunet_zoo.space import Choice, Encoding, SearchSpace

_REMOVED = 1.0  # worth of having weights, per layer: about what separates the best choice from the worst in E


def fit_to_target(
    space: SearchSpace,
    cost: Cost,
    search: DDPNASearch,
    held: Sequence[Collection[int]],
    target: float,
    share: float,
) -> Encoding:
    """The architecture of greatest total worth whose cost is in (share·target, target].

    The worth of a choice is its θ, of a removed one that of when it went. A width between two choices of a candidate is
    worth what a straight line between their θ gives. Candidates that still have weights (and skip) are taken if they
    can reach the interval; else all.

    Args:
        held: candidates of each layer that have weights.

    Raises:
        LatencyError: no network of the space reaches the interval.
    """
    fixed = cost.fixed(space)
    full = [_options(space, cost, search, i) for i in range(len(space.layers))]
    own = [
        [o for o in options if o.key is None or o.key[0] in held[i]]  # type: ignore[index]
        for i, options in enumerate(full)
    ]
    dear = [
        [o if o.key is None or o.key[0] in held[i] else o._replace(worth=o.worth - _REMOVED) for o in options]  # type: ignore[index]
        for i, options in enumerate(full)
    ]
    for groups in (own, dear):
        if all(groups):
            picks = best_in_interval(groups, target - fixed, share * target - fixed)
            if picks is not None:
                return tuple(g[i].key for g, i in zip(groups, picks, strict=True))  # type: ignore[misc]
    (low, fastest), _ = cost_range(cost, space)
    if share * target < low <= target:
        return fastest  # the knapsack rounds costs up, so the very fastest network may not seem to fit
    raise LatencyError(
        f"no network of space {space.name!r} costs between {share * target:.4g} and {target:.4g} {cost.unit}; "
        "choose another target or a space with a finer width grid"
    )


def _options(space: SearchSpace, cost: Cost, search: DDPNASearch, index: int) -> list[Option]:
    """Every choice of a layer on its fine grid."""
    layer = space.layers[index]
    theta: dict[Choice, float] = dict(zip(search.choices[index], search.theta[index], strict=True))
    options = []
    for c in range(len(layer.candidates)):
        known = sorted((choice[1], worth) for choice, worth in theta.items() if choice is not None and choice[0] == c)
        grid = layer.candidate_widths(c)
        worths = np.interp(grid, [w for w, _ in known], [worth for _, worth in known])
        options += [
            Option((c, w), float(worth), choice_cost(cost, layer, (c, w)))
            for w, worth in zip(grid, worths, strict=True)
        ]
    if layer.skip:
        options.append(Option(None, theta[None], 0.0))
    return options
