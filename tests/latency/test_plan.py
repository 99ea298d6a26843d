"""What a table measures: everything a search may choose, each once, more where the curve bends."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.latency.plan import QUICK, Effort, arrange, finer_widths, first_widths, list_templates, plan_networks
from prunet_zoo.latency.table import Curve, template_key
from prunet_zoo.space import list_spaces, load_space

GRID = tuple(range(32, 5633, 32))


@pytest.mark.parametrize("name", [name for name in list_spaces() if load_space(name).additive])
@pytest.mark.parametrize("effort", [Effort(), QUICK], ids=["full", "quick"])
def test_every_choice_of_shipped_spaces_is_planned_once(name, effort):
    space = load_space(name)
    sets = arrange({t: first_widths(t.grid, effort) for t in list_templates(space)}, smallest=4)
    items = [item for group in sets for item in group]
    assert len(set(items)) == len(items)
    assert all(len(group) >= 4 for group in sets[:-1]) or len(sets) < 3
    planned: dict[str, set[int]] = {}
    for item in items:
        planned.setdefault(template_key(*item), set()).add(item.block.hidden or 0)
    for layer in space.layers:
        for c in range(len(layer.candidates)):
            widths = layer.candidate_widths(c)
            key = template_key(layer.block(c, widths[0]), layer.in_channels, layer.in_size)
            assert {widths[0], widths[-1]} <= planned[key]
    networks = plan_networks(space, 16)
    assert len(set(networks)) == 16
    macs = sorted(space.decode(e).macs() for e in networks)
    assert macs[0] == min(macs) and macs[-1] == space.decode(space.largest()).macs()


def test_first_widths_keep_both_ends_and_small_grids():
    effort = Effort(all_widths=3, first_widths=4)
    assert first_widths((8, 16, 24), effort) == (8, 16, 24)
    assert first_widths(GRID, effort) == (32, 1888, 3776, 5632)


def test_a_straight_curve_is_not_refined_and_a_bend_is():
    effort = Effort(first_widths=6, tolerance=0.01, max_widths=24)
    first = first_widths(GRID, effort)
    assert finer_widths(GRID, {w: 0.1 + 0.001 * w for w in first}, effort) == ()
    step = {w: 1.0 + (w > 3000) for w in first}
    wanted = finer_widths(GRID, step, effort)
    assert wanted and all(first[1] < w < first[-2] for w in wanted)


@settings(max_examples=60, deadline=None)
@given(
    bend=st.sampled_from([lambda w: w**0.5, lambda w: w**1.6, lambda w: w + 700.0 * (w > 2500), math.log]),
    scale=st.floats(1e-5, 10.0),
    most=st.integers(6, 40),
)
def test_refinement_ends_within_its_widths_and_makes_the_curve_better(bend, scale, most):
    effort = Effort(first_widths=6, tolerance=0.005, max_widths=most)
    points = {w: scale * bend(w) for w in first_widths(GRID, effort)}
    start = dict(points)
    for _ in range(len(GRID)):
        wanted = finer_widths(GRID, points, effort)
        if not wanted:
            break
        assert not set(wanted) & set(points) and set(wanted) <= set(GRID)
        points.update({w: scale * bend(w) for w in wanted})
    else:
        pytest.fail("refinement does not end")
    assert len(points) <= most

    def off(curve: Curve) -> float:
        return statistics.mean(abs(curve(w) - scale * bend(w)) for w in GRID)

    assert off(Curve(points)) <= off(Curve(start)) * 1.001 + 1e-9


def test_smooth_curves_come_within_the_tolerance():
    effort = Effort(first_widths=6, tolerance=0.005, max_widths=64)
    points = {w: w**0.5 for w in first_widths(GRID, effort)}
    while wanted := finer_widths(GRID, points, effort):
        points.update({w: w**0.5 for w in wanted})
    curve = Curve(points)
    assert max(abs(curve(w) / w**0.5 - 1) for w in GRID if w > 320) < 0.02
    assert len(points) < len(GRID) / 3
