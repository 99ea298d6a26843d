"""The final adjustment: random additive costs against brute force, and the predictor's costs of a large space."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prunet_zoo import load_space
from prunet_zoo.cost import check_target
from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.predictor import Predictor, list_devices
from prunet_zoo.search import cost_range, space_cost
from prunet_zoo.search.adjust import LOWEST, adjust_widths
from prunet_zoo.space import SearchSpace

SMALL = SearchSpace.from_dict(
    {
        "name": "small",
        "input_size": 16,
        "stem": [{"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]}],
        "stages": [
            {
                "out_channels": 16,
                "layers": [
                    {"stride": 2, "kernel_sizes": [3], "hidden": {"step": 16, "max_expansion": 6}},
                    {"repeat": 2, "kernel_sizes": [3, 5], "hidden": {"step": 32, "max_expansion": 6}, "skip": True},
                ],
            }
        ],
        "tail": {"out_channels": 16},
        "num_classes": 4,
    }
)
EVERY = list(itertools.product(*(layer.choices() for layer in SMALL.layers)))
ROUNDING = 2 * len(SMALL.layers) / 8192  # of the knapsack, at both ends of the interval


class RandomCost:
    """A cost of its own for every block of the space, drawn from a seed; a wider one may be cheaper."""

    unit = "ms"
    hash = "random"

    def __init__(self, seed: int, fixed: float) -> None:
        self.seed, self.base = seed, fixed

    def block(self, block: Any, in_channels: int, in_size: tuple[int, int]) -> float:
        return random.Random(f"{self.seed} {block} {in_channels} {in_size}").uniform(0.01, 1.0)

    def fixed(self, space: SearchSpace) -> float:
        return self.base

    def __call__(self, spec: Any) -> float:
        raise AssertionError("adjusting needs block and fixed alone")

    def describe(self) -> dict[str, Any]:
        return {}


@given(
    st.integers(0, 10**6), st.floats(0.0, 2.0), st.floats(0.0, 1.0), st.floats(0.0, 2.0), st.sampled_from([0.97, 0.99])
)
@settings(max_examples=80, deadline=None)
def test_the_cost_is_in_the_interval_or_no_network_is(seed, fixed, place, price, share):
    cost = RandomCost(seed, fixed)
    costs = [space_cost(cost, SMALL, encoding) for encoding in EVERY]
    target = min(costs) + place * (max(costs) - min(costs))
    assume(target > fixed)
    found = EVERY[seed % len(EVERY)]
    try:
        encoding = adjust_widths(SMALL, cost, found, target, price, share=share)
    except LatencyError as error:
        width = ROUNDING * target
        inside = [c for c in costs if share * target + width < c <= target - width]
        assert not inside and f"between {share * target:.4g} and {target:.4g}" in str(error)
    else:
        assert share * target * (1 - 1e-12) <= space_cost(cost, SMALL, encoding) <= target * (1 + 1e-12)
        assert encoding in EVERY


@pytest.mark.parametrize("device", list_devices())
@pytest.mark.parametrize("place", [0.02, 0.2, 0.5, 0.8])
def test_predicted_latencies_of_prunet_gpu_are_reached(device: str, place: float):
    space, cost = load_space("prunet_gpu"), Predictor.load(device)
    (low, _), (high, _) = cost_range(cost, space)
    target = low + place * (high - low)
    check_target(cost, space, target)
    encoding = adjust_widths(space, cost, space.sample(random.Random(0)), target, 0.3)
    assert LOWEST * target < cost(space.decode(encoding)) <= target


def test_0_6_ms_on_a_v100_is_a_target_of_prunet_gpu():
    space, cost = load_space("prunet_gpu"), Predictor.load("v100-tensorrt-fp16")
    check_target(cost, space, 0.6)
    for seed in range(5):
        encoding = adjust_widths(space, cost, space.sample(random.Random(seed)), 0.6, 0.3)
        assert LOWEST * 0.6 < cost(space.decode(encoding)) <= 0.6
    with pytest.raises(
        LatencyError, match=r"below the fastest network of space 'prunet_gpu': choose between 0\.\d+ and"
    ):
        check_target(cost, space, 0.001)
