"""Between measured widths: a curve that never falls, steps of latency; the correction for whole networks."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.correction import NetworkParts, fit_correction
from prunet_zoo.latency.table import QUANTA, Curve, find_quantum, leave_out_errors


@given(
    st.dictionaries(st.integers(1, 10_000), st.floats(-1, 100), min_size=1, max_size=12),
    st.sampled_from(QUANTA),
    st.data(),
)
@settings(deadline=None)
def test_curve_is_non_decreasing_and_stays_within_its_points(points, quantum, data):
    curve = Curve(points, quantum)
    low, high = min(points), max(points)
    a, b = sorted(data.draw(st.tuples(st.integers(low, high), st.integers(low, high))))
    assert curve(a) <= curve(b) + 1e-9
    assert 0 <= curve(a) <= max(0.0, *points.values()) + 1e-9
    assert curve(low - 1) is None
    assert curve(high + 1) is None


def test_a_straight_line_leaves_no_error_and_a_step_does():
    assert leave_out_errors({32: 1.0, 64: 2.0, 128: 4.0}) == {1: 0.0}
    assert leave_out_errors({32: 1.0, 64: 1.0, 96: 2.0}) == {1: pytest.approx(0.5)}
    assert leave_out_errors({8: 0.001, 16: 0.004, 24: 1.0})[1] == pytest.approx((0.5005 - 0.004) / 0.1)
    assert leave_out_errors({32: 1.0, 64: 2.0}) == leave_out_errors({0: 1.0}) == leave_out_errors({}) == {}


def test_a_device_that_computes_sixteen_channels_at_a_time_is_seen():
    stairs = [{w: scale * -(-w // 16) for w in (8, 24, 32, 56, 80, 88, 128)} for scale in (1.0, 3.0)]
    assert find_quantum(stairs) == 16
    assert find_quantum([{w: 0.2 + 0.01 * w for w in (8, 24, 32, 56, 80, 88, 128)}]) == 1
    assert find_quantum([{0: 1.0}, {8: 1.0, 16: 2.0}]) == find_quantum([]) == 1
    curve = Curve(stairs[0], 16)
    assert [curve(w) for w in (40, 48, 96, 104, 112)] == [3.0, 3.0, 6.0, 7.0, 7.0]
    assert curve(24) == 2.0  # as measured


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(0.7, 1.5), per_block=st.floats(0, 0.02), outlier=st.floats(1.3, 3.0), seed=st.integers(0, 1000))
def test_correction_is_found_in_spite_of_a_disturbed_network(scale, per_block, outlier, seed):
    rng = random.Random(seed)
    networks = []
    for i in range(16):
        n = rng.randint(3, 20)
        blocks = sum(rng.uniform(0.02, 0.3) for _ in range(n))
        true = scale * blocks + 0.1 + per_block * n
        measured = true * (outlier if i == 5 else 1.0)
        networks.append(NetworkParts(blocks_ms=blocks, fixed_ms=0.1, blocks=n, params=n * 10_000, measured_ms=measured))
    fit = fit_correction(networks)
    errors = []
    for part in networks[:5] + networks[6:]:
        predicted = fit.scale * part.blocks_ms + fit.fixed * 0.1 + fit.per_block_ms * part.blocks
        errors.append(abs((predicted + fit.per_mparam_ms * part.params * 1e-6) / part.measured_ms - 1))
    assert statistics.median(errors) < 0.025
    assert max(errors) < 0.15
    assert min(fit.scale, fit.fixed, fit.per_block_ms, fit.per_mparam_ms) >= 0


def test_correction_needs_networks():
    with pytest.raises(LatencyError, match="at least two networks"):
        fit_correction([NetworkParts(blocks_ms=1, fixed_ms=0, blocks=1, params=1, measured_ms=1)])
