"""The grouped knapsack against brute force."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.search import Option, grouped_knapsack

OPTIONS = st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 3)), min_size=1, max_size=4)


@given(st.lists(OPTIONS, min_size=1, max_size=4), st.floats(0.5, 8))
@settings(max_examples=60, deadline=None)
def test_is_as_good_as_brute_force_up_to_rounding(groups, budget):
    options = [[Option(i, w, c) for i, (w, c) in enumerate(g)] for g in groups]
    picks = grouped_knapsack(options, budget)
    fitting = [
        sum(o.worth for o in combo)
        for combo in itertools.product(*options)
        if sum(o.cost for o in combo) <= budget * (1 - len(options) / 8192)
    ]
    if picks is None:
        assert not fitting
        return
    chosen = [g[i] for g, i in zip(options, picks, strict=True)]
    assert sum(o.cost for o in chosen) <= budget + 1e-9
    if fitting:
        assert sum(o.worth for o in chosen) >= max(fitting) - 1e-9


def test_lower_bound_forces_cost_up_even_against_worth():
    groups = [[Option("cheap", 10.0, 1.0), Option("dear", 0.0, 5.0)]] * 2
    assert grouped_knapsack(groups, 11.0) == [0, 0]
    assert sorted(grouped_knapsack(groups, 11.0, lowest=5.5)) == [0, 1]
    assert grouped_knapsack(groups, 11.0, lowest=10.5) is None


def test_no_budget_gives_none():
    assert grouped_knapsack([[Option(0, 1.0, 1.0)]], 0.5) is None
    assert grouped_knapsack([[Option(0, 1.0, 1.0)]], -1.0) is None
