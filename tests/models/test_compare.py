"""How tensors differ from those that are wanted."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from prunet_zoo.models.weights import compare, shapes

Shapes = dict[str, tuple[int, ...]]
SHAPES = st.dictionaries(st.sampled_from("abcdef"), st.lists(st.integers(0, 2), max_size=3).map(tuple))


@given(wanted=SHAPES, found=SHAPES)
def test_every_name_is_right_or_told_once(
    wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> None:
    misfit = compare(wanted, found)
    told = [name for names in misfit for name in names]
    right = [name for name in wanted if found.get(name) == wanted[name]]
    assert sorted([*told, *right]) == sorted({*wanted, *found})
    assert set(misfit.missing) == set(wanted) - set(found) and set(misfit.left_over) == set(found) - set(wanted)
    assert any(misfit) is (wanted != found)


def test_lists_and_tuples_are_the_same_shape() -> None:
    assert not any(compare({"a": [2, 3], "b": ()}, shapes({"a": torch.zeros(2, 3), "b": torch.tensor(1)})))
    assert compare({"a": [3, 2]}, {"a": (2, 3)}).wrong == ["a"]
