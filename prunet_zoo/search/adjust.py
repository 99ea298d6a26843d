"""Final width adjustment: widths by what they are worth against what they cost, until the cost is in (0.97 T, T]."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from prunet_zoo.cost import Cost, choice_cost, cost_range
from prunet_zoo.errors import LatencyError
from prunet_zoo.search.knapsack import Option, best_in_interval
from prunet_zoo.space import Choice, Encoding, SearchSpace

LOWEST = 0.97  # the adjusted network costs more than this share of the target


def adjust_widths(
    space: SearchSpace,
    cost: Cost,
    found: Sequence[Choice],
    target: float,
    price: float,
    preference: Mapping[tuple[int, int | None], float] | None = None,
    share: float = LOWEST,
) -> Encoding:
    """Return the architecture near ``found`` whose cost is in (share·target, target]. Rules are ours.

    The search leaves every width d* where one channel more is worth what it costs: at the price that the dual variable
    has reached, s = price · c'(d*) / target of loss per channel. So the worth of width d is taken as s·d*·ln(d/d*):
    concave, with slope s at d*. A grouped knapsack then takes the widths of greatest total worth. Only where widths
    alone cannot reach the interval are other candidates and skips admitted, those that the search preferred first.

    Args:
        space: the search space.
        cost: additive cost.
        found: the search's choice in every layer.
        target: T, in the unit of ``cost``.
        price: the dual variable λ of log(cost / T).
        preference: log-probability of each option (layer, candidate or None) at the end of the search.
        share: how much of the target must be used.

    Raises:
        LatencyError: no combination reaches the interval.
        SpecError: the space is not additive.
    """
    space.require_additive("width adjustment")
    fixed = cost.fixed(space)
    budget, lowest = target - fixed, share * target - fixed
    groups = [_width_options(space, cost, i, choice, target, price) for i, choice in enumerate(found)]
    encoding = _solve(groups, budget, lowest)
    if encoding is not None:
        return encoding
    scale = max((abs(o.worth) for group in groups for o in group), default=1.0) or 1.0
    wide = [
        _all_options(space, cost, i, group, target, price, scale, preference or {}) for i, group in enumerate(groups)
    ]
    encoding = _solve(wide, budget, lowest)
    (low, fastest), _ = cost_range(cost, space)
    if encoding is None and share * target < low <= target:
        return fastest  # the knapsack rounds costs up, so the very fastest network may not seem to fit
    if encoding is None:
        raise LatencyError(
            f"no network of space {space.name!r} costs between {share * target:.4g} and {target:.4g} {cost.unit}; "
            "choose another target or a space with a finer width grid"
        )
    return encoding


def _solve(groups: list[list[Option]], budget: float, lowest: float) -> Encoding | None:
    """The best combination whose cost is above ``lowest``."""
    picks = best_in_interval(groups, budget, lowest)
    return None if picks is None else tuple(g[i].key for g, i in zip(groups, picks, strict=True))  # type: ignore[misc]


def _width_options(
    space: SearchSpace, cost: Cost, index: int, choice: Choice, target: float, price: float
) -> list[Option]:
    """The found candidate at every width of its grid; a skipped layer stays skipped."""
    layer = space.layers[index]
    if choice is None:
        return [Option(None, 0.0, 0.0)]
    candidate, found = choice
    widths = layer.candidate_widths(candidate)
    if len(widths) == 1:
        return [Option((candidate, widths[0]), 0.0, choice_cost(cost, layer, (candidate, widths[0])))]
    costs = [choice_cost(cost, layer, (candidate, w)) for w in widths]
    marginal = max((costs[-1] - costs[0]) / (widths[-1] - widths[0]), 1e-9)
    s = max(price, 1e-3) * marginal / target
    return [Option((candidate, w), s * found * math.log(w / found), c) for w, c in zip(widths, costs, strict=True)]


def _all_options(
    space: SearchSpace,
    cost: Cost,
    index: int,
    own: list[Option],
    target: float,
    price: float,
    scale: float,
    preference: Mapping[tuple[int, int | None], float],
) -> list[Option]:
    """``own`` and every other choice of the layer, at a penalty: leaving the found candidate is a last resort."""
    layer, lowest = space.layers[index], -20.0
    kept = own[0].key[0] if isinstance(own[0].key, tuple) else None
    options = list(own)
    if layer.skip and kept is not None:
        options.append(Option(None, 10 * scale * (preference.get((index, None), lowest) - 1), 0.0))
    for c in range(len(layer.candidates)):
        if c == kept:
            continue
        penalty = 10 * scale * (preference.get((index, c), lowest) - 1)
        middle = layer.candidate_widths(c)[len(layer.candidate_widths(c)) // 2]
        other = _width_options(space, cost, index, (c, middle), target, price)
        options += [o._replace(worth=o.worth + penalty) for o in other]
    return options
