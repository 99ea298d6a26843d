"""The target that a method is given, or the one it takes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunet_zoo.errors import LatencyError
from prunet_zoo.search.aim import given_target, pruned_target


@given(st.floats(0.01, 100), st.floats(0, 10))
def test_the_target_taken_is_within_the_range(low: float, width: float) -> None:
    """Also where rounding to two digits leaves it, as from 1.24 to 1.26."""
    assert low <= pruned_target(math.nan, low, low + width, "ms") <= low + width


def test_a_target_out_of_the_range_is_refused_with_the_range() -> None:
    assert pruned_target(0.5, 0.2, 1.0, "ms") == 0.5
    for target, side in ((0.1, "below the narrowest"), (1.1, "above the start")):
        with pytest.raises(LatencyError, match=rf"{side}.*between 0\.2 and 1 ms"):
            pruned_target(target, 0.2, 1.0, "ms")


def test_a_target_is_a_positive_number_or_none() -> None:
    assert math.isnan(given_target(None)) and given_target(2) == 2.0
    for wrong in (0, -1.0, math.nan, math.inf):
        with pytest.raises(LatencyError, match="must be a positive number"):
            given_target(wrong)
