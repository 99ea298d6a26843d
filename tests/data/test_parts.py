from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.data.parts import select_part
from prunet_zoo.errors import DataError

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=80)


@settings(max_examples=60, deadline=None)
@given(LABELS, st.floats(0.05, 0.95), st.integers(0, 5))
def test_parts_are_disjoint_complete_and_stratified(labels: list[int], fraction: float, seed: int) -> None:
    labels = labels * 2  # at least two of each
    weights = select_part(labels, "weights", fraction, seed)
    arch = select_part(labels, "arch", fraction, seed)
    assert sorted([*weights, *arch]) == list(range(len(labels)))
    for label in set(labels):
        count, here = labels.count(label), sum(labels[i] == label for i in arch)
        assert abs(here - fraction * count) <= 1 and 1 <= here < count
    assert np.array_equal(arch, select_part(labels, "arch", fraction, seed))


def test_another_seed_gives_another_split() -> None:
    labels = [0] * 100
    assert not np.array_equal(select_part(labels, "arch", seed=0), select_part(labels, "arch", seed=1))


def test_limit_per_class_comes_before_the_parts() -> None:
    labels = [0] * 50 + [1] * 3
    kept = select_part(labels, max_per_class=10)
    assert [labels[i] for i in kept].count(0) == 10 and [labels[i] for i in kept].count(1) == 3
    both = [*select_part(labels, "weights", max_per_class=10), *select_part(labels, "arch", max_per_class=10)]
    assert sorted(both) == sorted(kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "both"}, "'weights' or 'arch'"),
        ({"part": "arch", "arch_fraction": 1.0}, "between 0 and 1"),
        ({"max_per_class": 0}, "at least 1"),
        ({"part": "arch", "max_per_class": 1}, "at least 2"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        select_part([0, 0, 1, 1], **options)
