"""The two widths of a Prunode: invariants, both ends, resume, and the regret that the benchmark promises."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.errors import CheckpointError, SpecError, TrainingError, UnknownNameError
from prunet_zoo.supernet.window import WidthWindow, nearest_index

RULES = ("averaged", "ema")

grids = st.lists(st.integers(1, 2000), min_size=1, max_size=70, unique=True).map(sorted)
steps = st.tuples(st.floats(0, 1), st.one_of(st.none(), st.floats(-1e6, 1e6)))


def drive(window: WidthWindow, gain: Callable[[int], float], count: int, use_grad: bool = True) -> WidthWindow:
    """Train the logit difference by plain gradient steps, without noise, as the super-network would."""
    logit, scale = 0.0, abs(gain(window.grid[-1]) - gain(window.grid[0])) or 1.0
    for _ in range(count):
        p = 1 / (1 + math.exp(-logit))
        grad = -(gain(window.large) - gain(window.small)) * p * (1 - p)
        logit = min(max(logit - 2.0 * grad / scale, -8.0), 8.0)
        if window.observe(1 / (1 + math.exp(-logit)), grad if use_grad else None):
            logit = 0.0
    return window


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None)
@given(grid=grids, observed=st.lists(steps, max_size=150))
def test_window_stays_ordered_and_on_the_grid(rule: str, grid: list[int], observed: list) -> None:
    window = WidthWindow(grid, rule=rule)
    for p, grad in observed:
        window.observe(p, grad)
        assert window.small in grid and window.large in grid and window.final() in grid
        assert window.small < window.large or len(grid) == 1
        assert window.converged == (len(grid) == 1 or grid.index(window.large) - grid.index(window.small) == 1)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40, deadline=None)
@given(grid=grids, before=st.lists(steps, max_size=90), after=st.lists(steps, max_size=90))
def test_state_continues_exactly(rule: str, grid: list[int], before: list, after: list) -> None:
    first, second = WidthWindow(grid, rule=rule), WidthWindow(grid, rule=rule)
    for p, grad in before:
        first.observe(p, grad)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for p, grad in after:
        assert first.observe(p, grad) == second.observe(p, grad)
        assert (first.small, first.large, first.final()) == (second.small, second.large, second.final())
    assert first.state_dict() == second.state_dict()


@pytest.mark.parametrize("exponent", [-6.0, 0.0, 6.0])
def test_averaged_finds_the_best_width_without_noise(exponent: float) -> None:
    """On parabolas with their top anywhere, whatever the scale; see `docs/prunode.md` for where it does worst."""
    regrets = []
    for size in (2, 3, 5, 9, 17, 33, 64):
        grid = [8 * (i + 1) for i in range(size)]
        for best in np.linspace(0, 1, 17):
            top = grid[0] + best * (grid[-1] - grid[0])
            gains = {d: -(10.0**exponent) * ((d - top) / grid[-1]) ** 2 for d in grid}
            chosen = drive(WidthWindow(grid), gains.__getitem__, 800).final()
            spread = max(gains.values()) - min(gains.values())
            regrets.append((max(gains.values()) - gains[chosen]) / spread if spread else 0.0)
    assert np.mean(regrets) <= 5e-4 and max(regrets) <= 0.01


@pytest.mark.parametrize("use_grad", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [2, 3, 5, 16, 64, 200])
def test_both_ends_are_reached(rule: str, size: int, use_grad: bool) -> None:
    grid = range(32, 32 * size + 1, 32)
    up = drive(WidthWindow(grid, rule=rule), lambda d: 3e-4 * d, 1000, use_grad)
    down = drive(WidthWindow(grid, rule=rule), lambda d: -3e-4 * d, 1000, use_grad)
    assert (up.large, down.small) == (grid[-1], grid[0])
    if rule == "averaged":
        assert (up.final(), down.final()) == (grid[-1], grid[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("better", [0, 1, 2])
def test_three_widths(rule: str, better: int) -> None:
    grid = [16, 32, 48]
    assert drive(WidthWindow(grid, rule=rule), lambda d: -abs(d - grid[better]) / 16, 610).final() == grid[better]


@pytest.mark.parametrize("rule", RULES)
def test_one_width_never_moves(rule: str) -> None:
    window = WidthWindow([64], rule=rule)
    assert not any(window.observe(0.9, -1.0) for _ in range(200))
    assert window.small == window.large == window.final() == 64
    assert window.converged
    window.narrow()
    window.load_state_dict(window.state_dict())


def test_scale_of_the_gradient_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(1000)
    one, other = WidthWindow(range(8, 513, 8)), WidthWindow(range(8, 513, 8))
    for e in noise:
        for window, scale in ((one, 1.0), (other, 2.0**-30)):  # a power of two, so that rounding is the same
            grad = ((window.large + window.small) / 2 - 300) / 512 + 0.5 * float(e)
            window.observe(0.5, scale * grad)
    assert (one.small, one.large, one.final()) == (other.small, other.large, other.final())


def test_follows_an_optimum_that_moves() -> None:
    window = WidthWindow(range(8, 513, 8))
    drive(window, lambda d: -(((d - 400) / 512) ** 2), 600)
    assert abs(window.final() - 400) <= 8
    drive(window, lambda d: -(((d - 120) / 512) ** 2), 3000)
    assert abs(window.final() - 120) <= 16


def test_one_wild_gradient_does_not_decide() -> None:
    window = drive(WidthWindow(range(8, 513, 8)), lambda d: -(((d - 200) / 512) ** 2), 600)
    before = window.final()
    window.observe(0.5, -1e9)
    drive(window, lambda d: -(((d - 200) / 512) ** 2), 200)
    assert abs(window.final() - before) <= 16


def test_no_signal_moves_nothing() -> None:
    window = WidthWindow(range(8, 129, 8))
    pair = (window.small, window.large)
    assert sum(window.observe(0.5, 0.0) for _ in range(100)) == 10  # the periods end all the same
    assert (window.small, window.large) == pair


def test_narrow_keeps_the_choice() -> None:
    for top in (8, 200, 512):
        window = drive(WidthWindow(range(8, 513, 8)), lambda d, t=top: -(((d - t) / 512) ** 2), 100)
        chosen = window.final()
        window.narrow()
        assert window.converged and chosen in (window.small, window.large) and window.final() == chosen


@given(st.lists(st.floats(0, 1), min_size=1, unique=True).map(sorted), st.floats(-1, 2))
def test_nearest_index(values: list[float], value: float) -> None:
    index = nearest_index(values, value)
    assert abs(values[index] - value) == min(abs(v - value) for v in values)


@pytest.mark.parametrize("grid", [[], [0, 8], [8, 8], [16, 8], [-8]])
def test_bad_grid(grid: list[int]) -> None:
    with pytest.raises(SpecError, match="positive and rising"):
        WidthWindow(grid)


def test_unknown_rule_suggests() -> None:
    with pytest.raises(UnknownNameError, match="averaged"):
        WidthWindow([8, 16], rule="average")  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("p", "grad"), [(math.nan, 0.0), (1.5, None), (0.5, math.nan), (0.5, math.inf)])
def test_diverged_step(rule: str, p: float, grad: float | None) -> None:
    window = WidthWindow([8, 16, 24], rule=rule)
    before = window.state_dict()
    with pytest.raises(TrainingError, match="learning rate"):
        window.observe(p, grad)
    assert window.state_dict() == before


def test_foreign_state() -> None:
    window = WidthWindow([8, 16, 24])
    with pytest.raises(CheckpointError, match="grid"):
        window.load_state_dict(WidthWindow([8, 16]).state_dict())
    with pytest.raises(CheckpointError, match="ema"):
        window.load_state_dict(WidthWindow([8, 16, 24], rule="ema").state_dict())
    state = window.state_dict()
    del state["s1"]
    with pytest.raises(CheckpointError, match="s1"):
        window.load_state_dict(state)


def test_regret_of_the_benchmark(load_benchmark: Callable[[str], ModuleType]) -> None:
    """150 problems: below 0.2%, 0.6% and 3% for noise 0, 0.1 and 0.5, and below the plain rule in the same run."""
    rows = load_benchmark("prunode_convergence").run(150, seed=3, quick=True)
    regret = {(r["rule"], r["noise"]): r["regret_mean"] for r in rows}
    for noise, limit in ((0.0, 0.002), (0.1, 0.006), (0.5, 0.03)):
        assert regret["averaged", noise] < limit
        assert regret["averaged", noise] < regret["ema", noise]
