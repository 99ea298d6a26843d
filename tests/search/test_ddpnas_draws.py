"""Which sub-networks DDPNAS draws: each survivor once a pass, balanced, never over the budget."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.search.ddpnas_draws import Draws

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=6)


@given(SIZES, st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_each_survivor_once_a_pass_and_evenly_over_the_passes_where_there_are_fewer(sizes, passes, seed):
    survivors, k = [list(range(1, n + 1)) for n in sizes], max(sizes)
    phase = Draws(seed, [n + 1 for n in sizes]).phase(survivors, k, passes)
    assert len(phase) == passes and all(len(one) == k for one in phase)
    for i, layer in enumerate(survivors):
        for one in phase:
            uses = Counter(picks[i] for picks in one)
            assert set(uses) == set(layer)
            assert len(layer) < k or set(uses.values()) == {1}
        total = Counter(picks[i] for one in phase for picks in one)
        assert max(total.values()) - min(total.values()) <= 1


@given(SIZES, st.integers(1, 3), st.integers(0, 1000), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_never_over_the_budget(sizes, passes, seed, tightness):
    rng = np.random.default_rng(seed)
    costs = [rng.uniform(0.1, 3, n).tolist() for n in sizes]
    low, high = sum(map(min, costs)), sum(map(max, costs))
    budget = low + tightness * (high - low)
    draws = Draws(seed, sizes, costs, budget)
    survivors = [list(range(n)) for n in sizes]
    rows = [picks for one in draws.phase(survivors, max(sizes), passes) for picks in one]
    rows += [draws.single(survivors, str(i)) for i in range(5)]
    assert all(draws.cost(row) <= budget for row in rows)


def test_permutations_within_the_budget_are_found_where_they_exist():
    costs = [[1.0, 2.0, 3.0]] * 6  # a third of the choices are dear; in the mean a network costs 12
    for seed in range(20):
        phase = Draws(seed, [3] * 6, costs, 12.0).phase([[0, 1, 2]] * 6, 3, 3)
        for one in phase:
            assert all(sorted(column) == [0, 1, 2] for column in zip(*one, strict=True))


def test_under_a_tight_budget_every_choice_that_fits_is_drawn_in_some_pass():
    costs = [[1.0, 2.0, 3.0]] * 4
    draws = Draws(0, [3] * 4, costs, 6.1)  # the mean network costs 8, so no permutations are within it
    rows = [picks for one in draws.phase([[0, 1, 2]] * 4, 3, 6) for picks in one]
    for column in zip(*rows, strict=True):
        uses = Counter(column)
        assert set(uses) == {0, 1, 2} and uses[0] > uses[2]


def test_every_permutation_is_as_likely_as_another():
    counts = Counter(tuple(p[1] for p in sorted(Draws(s, [3, 3]).phase([[0, 1, 2]] * 2, 3, 1)[0])) for s in range(1200))
    assert len(counts) == 6 and min(counts.values()) > 150 and max(counts.values()) < 250


def test_choices_of_different_layers_meet_more_evenly_than_by_chance():
    def uneven(rows: list[tuple[int, ...]]) -> float:
        pairs = itertools.combinations(range(6), 2)
        return sum(n * n for a, b in pairs for n in Counter((row[a], row[b]) for row in rows).values())

    rng = np.random.default_rng(0)
    chance = [
        uneven([tuple(r) for _ in range(6) for r in np.array([rng.permutation(3) for _ in range(6)]).T.tolist()])
        for _ in range(20)
    ]
    ours = [uneven([p for one in Draws(seed, [3] * 6).phase([[0, 1, 2]] * 6, 3, 6) for p in one]) for seed in range(20)]
    least = 15 * 9 * 2 * 2  # all nine pairs of two layers meet twice in 18 sub-networks
    assert least <= max(ours) < min(chance)
    assert np.mean(ours) - least < 0.35 * (np.mean(chance) - least)


def test_the_seed_decides():
    first, again, other = (Draws(seed, [4] * 3).phase([[0, 1, 2, 3]] * 3, 4, 2) for seed in (1, 1, 2))
    assert first == again != other


def test_a_single_draw_takes_only_survivors():
    draws = Draws(0, [3, 3], [[1.0, 5.0, 9.0]] * 2, 10.0)
    assert {draws.single([[0, 2], [1]], str(i)) for i in range(50)} == {(0, 1)}


def test_the_budget_may_be_that_of_the_cheapest_network_exactly():
    costs = [[0.1, 0.7], [0.2, 0.3], [0.3, 0.4]]
    budget = sum(row[0] for row in costs)
    for one in Draws(0, [2] * 3, costs, budget).phase([[0, 1]] * 3, 2, 3):
        assert set(one) == {(0, 0, 0)}


@pytest.mark.parametrize("budget", [None, 100.0])
def test_a_budget_that_does_not_bind_changes_nothing(budget):
    costs = [[1.0, 2.0, 3.0]] * 4
    assert Draws(3, [3] * 4, costs, budget).phase([[0, 1, 2]] * 4, 3, 2) == Draws(3, [3] * 4).phase(
        [[0, 1, 2]] * 4, 3, 2
    )
