"""Costs of networks: sums over layers where there are such, whole networks where layers depend on each other."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.cost import (
    MacsCost,
    ScaledCost,
    check_target,
    choice_cost,
    cost_range,
    default_target,
    layer_costs,
    space_cost,
)
from prunet_zoo.errors import LatencyError, SpecError
from prunet_zoo.latency import Predictor
from prunet_zoo.latency.build import build_table
from prunet_zoo.search.adjust import adjust_widths
from prunet_zoo.space import SearchSpace, load_space
from prunet_zoo.spec import BlockSpec
from prunet_zoo.supernet import SuperNet

REP = load_space("rep_vgg_small")
MIXED = SearchSpace.from_dict(
    {
        "input_size": 32,
        "stem": [{"blocks": [{"type": "rep", "out_channels": 8, "stride": 2}]}],
        "stages": [
            {
                "out_channels": 16,
                "layers": [
                    {"stride": 2, "types": ["rep"], "kernel_sizes": [3, 5], "out": {"step": 4}},
                    {"types": ["irb", "fused_irb"], "hidden": {"step": 8, "max_expansion": 4}},
                    {"types": ["irb", "fused_irb"], "hidden": {"step": 8, "max_expansion": 4}, "skip": True},
                ],
            }
        ],
        "tail": {"out_channels": 16},
        "num_classes": 4,
    }
)


@pytest.mark.parametrize("space", [REP, MIXED, load_space("prunet_cpu_small")], ids=lambda s: s.name)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_network_costs_what_it_has_between_both_ends(space: SearchSpace, seed: int) -> None:
    cost, encoding = MacsCost(), space.sample(random.Random(seed))
    spec = space.decode(encoding)
    assert space_cost(cost, space, encoding) == pytest.approx(spec.macs() / 1e6, rel=1e-12)
    (low, least), (high, most) = cost_range(cost, space)
    assert low <= spec.macs() / 1e6 <= high
    assert (space.decode(least).macs() / 1e6, space.decode(most).macs() / 1e6) == pytest.approx((low, high))
    parts = layer_costs(cost, space, encoding)
    assert len(parts) == len(encoding) and all(c is not None or p == 0 for p, c in zip(parts, encoding, strict=True))
    blocks = [p.block.macs(p.in_channels, p.in_size) / 1e6 for p in spec.placed() if p.stage]
    assert [p for p, c in zip(parts, encoding, strict=True) if c is not None] == pytest.approx(blocks)


@pytest.mark.parametrize("space", [REP, MIXED], ids=["rep", "mixed"])
def test_targets_of_a_space_that_is_not_additive(space: SearchSpace) -> None:
    for cost in (MacsCost(), Predictor.load("v100-tensorrt-fp16")):
        (low, _), (high, _) = cost_range(cost, space)
        assert low < default_target(cost, space) < high
        check_target(cost, space, (low + high) / 2)
        with pytest.raises(LatencyError, match="below the fastest network"):
            check_target(cost, space, low / 2)


def test_rounding_takes_the_default_target_out_of_no_range() -> None:
    class Offset(MacsCost):
        """Almost all of the cost is that of every network, and two digits make 1.0 of a third of the way."""

        def fixed(self, space: SearchSpace) -> float:
            return 1.04

        def block(self, block: BlockSpec, in_channels: int, in_size: tuple[int, int]) -> float:
            return 1e-6

    space = load_space("prunet_cpu_small")
    low = cost_range(Offset(), space)[0][0]
    assert 1.0 < low == default_target(Offset(), space)
    check_target(Offset(), space, default_target(Offset(), space))


@pytest.mark.parametrize("space", [REP, load_space("prunet_cpu_small")], ids=lambda s: s.name)
def test_one_measurement_scaled_by_macs(space: SearchSpace) -> None:
    macs, whole = MacsCost(), space.decode(space.largest())
    cost = ScaledCost(macs, whole, 0.5, {"device": "here"})
    assert cost.unit == "ms" and cost(whole) == pytest.approx(0.5)
    assert cost.describe() == {"cost": "MACs scaled by one measurement", "start_ms": 0.5, "device": "here"}
    encoding = space.sample(random.Random(0))
    small = space.decode(encoding)
    assert cost(small) == pytest.approx(0.5 * small.macs() / whole.macs())
    assert space_cost(cost, space, encoding) == pytest.approx(cost(small))
    assert sum(layer_costs(cost, space, encoding)) < cost(small)
    hashes = {macs.hash, cost.hash, ScaledCost(macs, whole, 0.6).hash, ScaledCost(macs, small, 0.5).hash}
    assert len(hashes) == 4
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(LatencyError, match="positive"):
            ScaledCost(macs, whole, wrong)


def test_what_needs_a_sum_says_what_to_use(tmp_path) -> None:
    advice = "needs a cost that is a sum over layers.*Pruning-as-Search or Archtree, with MACs, a predictor or measured"
    for call in (
        lambda: MacsCost().fixed(REP),
        lambda: Predictor.load("v100-tensorrt-fp16").fixed(REP),
        lambda: build_table(REP, tmp_path / "table.jsonl"),
        lambda: adjust_widths(REP, MacsCost(), REP.largest(), 8.0, 0.0),
        lambda: SuperNet(REP),
    ):
        with pytest.raises(SpecError, match=advice):
            call()
    assert not list(tmp_path.iterdir())
    with pytest.raises(SpecError, match="layer 2 of the space costs what it does only together with its neighbours"):
        choice_cost(MacsCost(), REP.layers[2], (0, 8))
