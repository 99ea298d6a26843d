"""DDPNASearch: the published schedule and updates, the two known errors, the budget, exact continuation."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.errors import LatencyError, PrunetError, SpecError, TrainingError
from prunet_zoo.search import MacsCost
from prunet_zoo.search.ddpnas import DDPNASearch, Removal
from prunet_zoo.search.ddpnas_choices import evenly, space_choices
from prunet_zoo.search.ddpnas_credit import Evaluation, main_effects, mean_softmax
from prunet_zoo.space import SearchSpace
from prunet_zoo.spec import NetSpec

EFFECTS = np.array([[0.0, 1.5, 3.0], [3.0, 0.0, 1.5], [1.5, 3.0, 0.0], [0.0, 3.0, 1.5]])  # points
BEST, WORST = (2, 0, 1, 1), (0, 1, 2, 0)
SPACE = SearchSpace.from_dict(
    {
        "input_size": 16,
        "stem": [{"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]}],
        "stages": [
            {
                "out_channels": 16,
                "layers": [
                    {"stride": 2, "kernel_sizes": [3, 5], "hidden": {"step": 4, "max_expansion": 6}},
                    {"types": ["conv"], "kernel_sizes": [3], "skip": True},
                    {"kernel_sizes": [3], "hidden": {"step": 8, "max_expansion": 6}, "skip": True},
                ],
            }
        ],
        "tail": {"out_channels": 16},
        "num_classes": 4,
    }
)


def accuracy(picks: Sequence[int]) -> float:
    """Additive table: 80% and the effects."""
    return (80 + float(EFFECTS[range(4), list(picks)].sum())) / 100


def tell(search: DDPNASearch, accuracy: Any) -> list[Removal]:
    """Ask, and tell what it is asked for."""
    search.ask()
    return search.tell(accuracy)


def searched(cls: type[DDPNASearch] = DDPNASearch, passes: int = 20, seed: int = 0, **options) -> DDPNASearch:
    search = cls([range(3)] * 4, passes=passes, seed=seed, **options)
    search.run(accuracy)
    return search


@pytest.mark.parametrize(("choices", "passes", "epochs"), [(8, 3, 105), (3, 3, 15), (3, 10, 50), (1, 3, 0)])
def test_schedule_has_the_published_length(choices, passes, epochs):
    search = DDPNASearch([range(choices)] * 3, passes=passes)
    assert search.total == epochs
    search.run(lambda picks: 0.5)
    assert len(search.evaluated) == epochs and search.done
    with pytest.raises(TrainingError, match="has ended"):
        search.ask()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_layers_of_any_sizes_end_together_and_lose_one_at_a_time(sizes, passes, seed):
    search, rng = DDPNASearch([range(n) for n in sizes], passes=passes, seed=seed), random.Random(seed)
    while not search.done:
        k = max(map(len, search.survivors))
        for _ in range(passes * k):
            gone = tell(search, rng.random())
        assert Counter(r.layer for r in gone) == {
            i: 1 for i, n in enumerate(sizes) if n - sum(r.layer == i for r in search.removed[: -len(gone)]) == k
        }
        assert all(len(layer) == min(n, k - 1) for layer, n in zip(search.survivors, sizes, strict=True))
    assert len(search.evaluated) == search.total


@pytest.mark.parametrize("update", ["first", "momentum"])
def test_best_survives(update):
    search = searched(update=update)
    assert search.best() == BEST == search.decode(search.best())


# The two errors of a known re-implementation: each makes the worst survive or chance decide.


class PercentError(DDPNASearch):
    """What reaches the softmax is the error, not the accuracy."""

    def tell(self, accuracy: float) -> list:
        return super().tell(1 - accuracy)


class OtherSample(DDPNASearch):
    """What is credited is another sub-network of the pass than the one that was trained."""

    def ask(self) -> tuple[int, ...]:
        super().ask()
        one = self._plan[self._at // self.count]
        if sys._getframe(1).f_code.co_name == "run":  # who trains and validates
            return one[(self._at + 1) % self.count]
        return one[self._at % self.count]


def right(cls: type[DDPNASearch], **options) -> float:
    """Share of layers, over seeds, in which the best choice of an additive table survived."""
    return float(np.mean([np.mean(np.array(searched(cls, seed=s, **options).best()) == BEST) for s in range(10)]))


@pytest.mark.parametrize(("update", "credit"), [("first", "sample"), ("momentum", "sample"), ("first", "adjusted")])
@pytest.mark.parametrize("fault", [PercentError, OtherSample])
def test_the_known_errors_would_be_seen(fault, update, credit):
    assert right(DDPNASearch, update=update, credit=credit) > 0.95
    assert right(fault, update=update, credit=credit) < 0.35


def test_error_in_percent_prefers_the_worst():
    assert searched(PercentError).best() == WORST


@pytest.mark.parametrize("value", [93.2, -0.1, math.nan, math.inf])
def test_an_accuracy_that_is_no_fraction_is_refused(value):
    with pytest.raises(TrainingError, match="fraction"):
        DDPNASearch([range(2)]).tell(value)


def test_an_accuracy_that_was_not_asked_for_is_refused():
    search = DDPNASearch([range(3)] * 4)
    with pytest.raises(TrainingError, match=r"call ask\(\) once for each tell\(\)"):
        search.tell(0.9)
    tell(search, 0.9)
    with pytest.raises(TrainingError, match="did not ask for"):
        search.tell(0.8)
    assert len(search.evaluated) == 1
    search.ask()
    other = DDPNASearch([range(3)] * 4)
    other.load_state_dict(json.loads(json.dumps(search.state_dict())))
    other.tell(0.7)


def test_softmax_takes_points():
    found = mean_softmax([[(0, 0.90), (1, 0.91)]], [0, 1])  # one point apart
    assert found[1] / found[0] == pytest.approx(math.e)
    mean = mean_softmax([[(0, 0.90), (1, 0.91)], [(0, 0.5), (1, 0.5)]], [0, 1])
    assert mean[0] == pytest.approx((1 / (1 + math.e) + 0.5) / 2)


def test_a_choice_that_a_budget_kept_out_is_neither_praised_nor_blamed():
    passes = [[(0, 0.9), (1, 0.9)], [(0, 0.9), (1, 0.9), (2, 0.9)]]
    assert mean_softmax(passes, [0, 1, 2, 3]) == pytest.approx({0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25})


@pytest.mark.parametrize(("update", "expected"), [("first", (0.9, 0.6)), ("momentum", (0.11, 0.09))])
def test_updates_are_the_published_ones(update, expected):
    search = DDPNASearch([range(2)], update=update, gamma=0.9)
    search.theta, search.velocity = [[0.4, 0.2]], [[0.02, 0.01]]
    for choice, score in enumerate((0.7, 0.5)):
        search._learn(0, choice, score)
    first = (0.7 + 0.5 * 0.4, 0.5 + 0.5 * 0.2)
    v = (0.9 * 0.02 + 0.1 * 0.7, 0.9 * 0.01 + 0.1 * 0.5)
    momentum = (0.4 + v[0], 0.2 + v[1])
    assert search.theta[0] == pytest.approx(first if update == "first" else momentum)
    assert update == "momentum" or search.theta[0] == pytest.approx(expected)


def test_main_effects_are_those_of_an_additive_table_although_accuracies_drift():
    rng = np.random.default_rng(0)
    nets = rng.integers(0, 3, (600, 4))
    rows = [Evaluation(i // 30, tuple(n), accuracy(n) + 0.01 * (i // 30)) for i, n in enumerate(nets.tolist())]
    found = np.array(main_effects(rows, [3] * 4))
    true = (EFFECTS - EFFECTS.mean(1, keepdims=True)) / 100
    assert np.abs(found - found.mean(1, keepdims=True) - true).max() < 0.001


COSTS = np.array([[1.0, 2.0, 4.0]] * 4)


@given(st.integers(0, 10_000), st.floats(0.0, 1.0), st.sampled_from(["sample", "adjusted"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_nothing_is_ever_over_the_budget(seed, share, credit, momentum):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, 5).tolist()
    costs = [rng.uniform(0.1, 3, n).tolist() for n in sizes]
    low, high = sum(map(min, costs)), sum(map(max, costs))
    budget = low + share * (high - low)
    search = DDPNASearch(
        [range(n) for n in sizes], 2, "momentum" if momentum else "first", seed=seed, budget=budget, cost=costs,
        credit=credit,
    )  # fmt: skip
    while not search.done:
        assert search.cost(search.ask()) <= budget
        assert search.cost(search.best()) <= budget
        search.tell(rng.random())
        assert sum(min(costs[i][c] for c in layer) for i, layer in enumerate(search.survivors)) <= budget + 1e-9
    assert search.cost(search.best()) <= budget
    assert len(search.evaluated) <= search.total


def test_under_a_budget_the_result_is_near_the_best_that_fits():
    nets = list(itertools.product(range(3), repeat=4))
    for budget in (6.0, 8.0, 11.0):
        fitting = [n for n in nets if COSTS[range(4), list(n)].sum() <= budget]
        search = searched(budget=budget + 0.01, cost=COSTS.tolist())
        better = sum(accuracy(n) > accuracy(search.best()) + 1e-9 for n in fitting)
        assert better <= 0.06 * len(fitting), (budget, search.best())


def test_crediting_the_sample_alone_would_not_do_under_a_budget():
    # dear choices are better, but meet cheap partners: their samples' accuracies do not say so
    table = np.array([[0.0, 1.0, 2.0]] * 4)

    def value(n: Sequence[int]) -> float:
        return (80 + float(table[range(4), list(n)].sum())) / 100

    def theta_gap(credit: str) -> float:
        search = DDPNASearch([range(3)] * 4, 20, seed=1, budget=8.0, cost=COSTS.tolist(), credit=credit)
        for _ in range(60):
            search.tell(value(search.ask()))
        return float(np.mean([layer[2] - layer[0] for layer in search.theta]))

    assert theta_gap("adjusted") > 0.1 > 4 * abs(theta_gap("sample"))


def test_what_no_network_within_the_budget_can_have_goes_at_once():
    search = DDPNASearch([range(3)] * 4, budget=4.5, cost=COSTS.tolist())
    assert search.survivors == [[0]] * 4 and search.done and {r.phase for r in search.removed} == {0}
    search = DDPNASearch([range(3)] * 4, budget=6.0, cost=COSTS.tolist())
    assert search.survivors == [[0, 1]] * 4 and search.total == 6


def test_budget_below_the_cheapest_network_and_budget_without_cost_are_refused():
    with pytest.raises(LatencyError, match=r"cheapest network costs 4, the budget is 3\.9"):
        DDPNASearch([range(3)] * 4, budget=3.9, cost=COSTS.tolist())
    with pytest.raises(LatencyError, match="needs a cost"):
        DDPNASearch([range(3)] * 4, budget=10)


@pytest.mark.parametrize(
    "options",
    [{"passes": 0}, {"update": "adam"}, {"gamma": 1.0}, {"widths": 1}, {"credit": "all"}, {"cost": [[1.0]] * 4}],
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(SpecError, match="DDPNAS"):
        DDPNASearch([range(3)] * 4, **options)


def test_a_layer_without_choices_is_refused():
    with pytest.raises(SpecError, match="at least one choice"):
        DDPNASearch([[1], []])


@pytest.mark.parametrize("stop", [0, 7, 23, 45])
@pytest.mark.parametrize("budget", [None, 9.0])
def test_goes_on_exactly_from_plain_json(stop, budget):
    def fresh() -> DDPNASearch:
        return DDPNASearch([range(3), range(2), range(3), range(3)], 10, "momentum", seed=4, budget=budget, cost=costs)

    costs = [row[:n] for row, n in zip(COSTS.tolist(), (3, 2, 3, 3), strict=True)]
    rng = random.Random(0)
    told = [rng.random() for _ in range(50)]
    whole = fresh()
    for value in told[: whole.total]:
        tell(whole, value)
    first = fresh()
    for value in told[:stop]:
        tell(first, value)
    second = fresh()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for value in told[stop : whole.total]:
        assert second.ask() == first.ask()
        first.tell(value)
        second.tell(value)
    assert second.state_dict() == whole.state_dict() == first.state_dict()


def test_state_of_another_search_is_refused():
    with pytest.raises(TrainingError, match="other choices"):
        DDPNASearch([range(2)] * 4).load_state_dict(DDPNASearch([range(3)] * 4).state_dict())


@pytest.mark.parametrize(
    "options",
    [{"passes": 4}, {"update": "momentum"}, {"credit": "sample"}, {"gamma": 0.5}, {"seed": 1}, {"budget": 10.0}],
)
def test_state_of_a_search_with_other_settings_is_refused(options):
    known = {"cost": COSTS.tolist(), "budget": 11.0}
    state = DDPNASearch([range(3)] * 4, **known).state_dict()
    name = next(iter(options))
    with pytest.raises(TrainingError, match=rf"another search \({name} .*, here {options[name]}\)"):
        DDPNASearch([range(3)] * 4, **{**known, **options}).load_state_dict(state)


def test_state_of_a_search_over_other_choices_of_as_many_is_refused():
    known = {"budget": 45.0, "cost": [[1.0, 2.0, 3.0]] * 4}
    state = DDPNASearch([["a", "b", "c"]] * 4, **known).state_dict()
    DDPNASearch([["a", "b", "c"]] * 4, **known).load_state_dict(state)
    for choices, options in ((["x", "y", "z"], known), (["a", "b", "c"], {**known, "cost": [[30.0, 20.0, 10.0]] * 4})):
        with pytest.raises(TrainingError, match="another search"):
            DDPNASearch([choices] * 4, **options).load_state_dict(state)
    with pytest.raises(TrainingError, match="lowest"):
        DDPNASearch([["a", "b", "c"]] * 4, **known, lowest=40.0).load_state_dict(state)


def test_choices_of_a_space_are_candidates_on_a_coarse_grid_and_skip():
    assert space_choices(SPACE, 3) == [
        [(0, 4), (0, 28), (0, 48), (1, 4), (1, 28), (1, 48)],
        [(0, 0), None],
        [(0, 8), (0, 56), (0, 96), None],
    ]


@given(st.integers(1, 40), st.integers(2, 9))
def test_the_coarse_grid_is_even_and_goes_from_end_to_end(length, count):
    grid = list(range(8, 8 * length + 1, 8))
    found = evenly(grid, count)
    assert found == sorted(set(found)) and len(found) == min(count, length)
    assert found[0] == grid[0] and (length == 1 or found[-1] == grid[-1])
    steps = np.diff([grid.index(w) for w in found])
    assert not len(steps) or steps.max() - steps.min() <= 1


def test_searches_a_space_for_any_function_of_a_spec_within_a_budget():
    seen: list[NetSpec] = []

    def evaluate(spec: NetSpec) -> float:
        seen.append(spec)
        return min(0.99, spec.params() / 30_000)

    cost = MacsCost()
    budget = 0.6 * cost(SPACE.decode(SPACE.largest()))
    search, lines = DDPNASearch(SPACE, budget=budget, cost=cost), []
    found = search.run(evaluate, lines.append)
    assert isinstance(found, NetSpec) and SPACE.contains(found)
    assert all(cost(spec) <= budget for spec in [*seen, found])
    assert cost(found) == pytest.approx(search.cost(search.best()))
    assert len(seen) == search.total and len(lines) == search.first - 1


def test_a_space_whose_cost_is_no_sum_is_refused_with_a_budget(monkeypatch):
    monkeypatch.setattr(SearchSpace, "additive", property(lambda self: False), raising=False)
    with pytest.raises(PrunetError, match="PruningAsSearch or Archtree"):
        DDPNASearch(SPACE, budget=1.0, cost=MacsCost())
    assert DDPNASearch(SPACE).total > 0


def test_a_space_whose_cost_is_no_sum_is_searched_without_a_budget():
    out = {"types": ["rep"], "kernel_sizes": [3], "out": {"step": 4}}
    space = SPACE.replace(stages=[{"out_channels": 16, "layers": [{"stride": 2, **out}, out]}])
    assert not space.additive
    search = DDPNASearch(space, passes=1, cost=MacsCost())
    found = search.run(lambda spec: min(1.0, spec.params() / 1e5))
    assert space.contains(found) and search.cost(search.best()) == MacsCost()(found)


def test_an_infinite_budget_is_none():
    costs = COSTS.tolist()
    endless, none = (DDPNASearch([range(3)] * 4, budget=b, cost=costs, seed=1) for b in (math.inf, None))
    assert endless.budget is None and endless.ask() == none.ask() and endless.state_dict() == none.state_dict()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_costs_that_are_not_finite_are_refused(bad):
    with pytest.raises(LatencyError, match="finite"):
        DDPNASearch([range(2)] * 2, budget=3.0, cost=[[1.0, 2.0], [1.0, bad]])
    with pytest.raises(LatencyError, match="budget is nan"):
        DDPNASearch([range(2)] * 2, budget=math.nan, cost=[[1.0, 2.0], [1.0, 2.0]])


def test_a_cost_of_the_wrong_kind_is_named():
    with pytest.raises(SpecError, match="lists of choices, cost must be the cost of each choice"):
        DDPNASearch([range(2)] * 2, budget=3.0, cost=MacsCost())
    with pytest.raises(SpecError, match="for a space, cost must be a Cost"):
        DDPNASearch(SPACE, budget=3.0, cost=[[1.0]] * 3)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.array(0.5)])
def test_accuracies_of_other_types_are_stored_as_plain_numbers(number):
    search = DDPNASearch([range(2)] * 2)
    tell(search, number)
    assert json.loads(json.dumps(search.state_dict()))["evaluated"][0][2] == 0.5


def test_needs_no_torch():
    code = (
        "import sys\nfor n in ('torch', 'mmengine'): sys.modules[n] = None\n"
        "from prunet_zoo.search.ddpnas import DDPNASearch\n"
        "print(DDPNASearch([range(3)] * 2, passes=5).run(lambda n: sum(n) / 10))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(2, 2)", done.stderr


def test_every_exported_name_is_there_and_others_are_not():
    import prunet_zoo.search as package

    assert {"DDPNAS", "DDPNASearch", "TieredPruning", "SearchStrategy", "grouped_knapsack"} <= set(package.__all__)
    assert set(package.__all__) == set(package._MODULE)
    with pytest.raises(AttributeError, match="no attribute 'DDPNass'"):
        _ = package.DDPNass


def noisy(table: Callable[[Sequence[int]], float], noise: float, seed: int) -> Callable[[Sequence[int]], float]:
    rng = random.Random(seed)
    return lambda picks: min(1.0, max(0.0, table(picks) + rng.gauss(0, noise)))


def test_noise_of_half_a_point_seldom_changes_the_result():
    hits = 0
    for seed in range(10):
        search = DDPNASearch([range(3)] * 4, 10, seed=seed)
        hits += search.run(noisy(accuracy, 0.005, seed)) == BEST
    assert hits >= 8
