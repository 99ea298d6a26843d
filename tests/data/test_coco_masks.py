"""Masks of COCO files: what is malformed is named, and RLE is decoded as pycocotools does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from coco_files import NAMES, changed, only
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.data.coco import find_problems
from prunet_zoo.data.coco_masks import decode_counts, find_fault
from prunet_zoo.errors import DataError


def test_masks() -> None:
    coco = changed(lambda d: [a.pop("segmentation") for a in d["annotations"][:3]])
    assert find_problems(coco, NAMES) == []
    problem = only(find_problems(coco, NAMES, masks=True))
    assert problem.stops and "3 of 40 annotations have no segmentation" in problem.text
    left_out: list[Any] = [[[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], {"size": [3, 4]}, [[]]]
    for ignored in left_out:
        coco = changed(lambda d, value=ignored: d["annotations"][0].update(segmentation=value))  # type: ignore[misc]
        problem = only(find_problems(coco, NAMES, masks=True))
        assert "1 of 40 segmentations are neither polygons" in problem.text and not problem.stops
        problem = only(find_problems(coco, NAMES, masks=True, scored=True))  # pycocotools fails on all but the second
        assert problem.stops == (ignored != [[1, 2, 3, 4, 5, 6, 7]])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("x", "neither a list of polygons nor RLE"),
        ([1, 2, 3, 4, 5, 6], "neither a list of polygons nor RLE"),
        ([[1, 2, 3, 4, 5, float("nan")]], "coordinates that are no finite numbers"),
        ([[1, 2, 3, 4, 5, "6"]], "coordinates that are no finite numbers"),
        ([[1, 2, 3, 4, 5, 10**400]], "coordinates that are no finite numbers"),
        ({"size": [40, 30], "counts": [1200]}, r"an RLE of \[height, width\] \[40, 30\] in an image of \[30, 40\]"),
        ({"size": ["30", 40], "counts": [1200]}, "an RLE whose size is not"),
        ({"size": [30, 40], "counts": [100, 99]}, "counts that sum up to 199, not to 1200 px"),
        ({"size": [30, 40], "counts": [-5, 1205]}, "no whole numbers from 0 on"),
        ({"size": [30, 40], "counts": [0.5, 1199.5]}, "no whole numbers from 0 on"),
        ({"size": [30, 40], "counts": ["1200"]}, "no whole numbers from 0 on"),
        ({"size": [30, 40], "counts": "zzzz"}, "cannot be decoded"),  # pycocotools writes outside its memory
        ({"size": [30, 40], "counts": "é"}, "cannot be decoded"),
        ({"size": [30, 40], "counts": "00"}, "sum up to 0"),
    ],
)
def test_malformed_masks_stop(value: Any, message: str) -> None:
    coco = changed(lambda d: d["annotations"][0].update(segmentation=value))
    problem = only(find_problems(coco, NAMES, masks=True))
    assert problem.stops and "1 of 40 segmentations are malformed" in problem.text and "annotation 1 (" in problem.text
    with pytest.raises(DataError, match=message):
        raise DataError(problem.text)
    assert find_problems(coco, NAMES) == []  # boxes alone


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**32), st.floats(0, 1))
def test_compressed_masks_are_decoded_as_pycocotools_does(height: int, width: int, seed: int, share: float) -> None:
    mask_api = pytest.importorskip("pycocotools.mask")
    mask = np.asfortranarray(np.random.default_rng(seed).random((height, width)) < share, dtype=np.uint8)
    text = mask_api.encode(mask)["counts"].decode()
    counts = decode_counts(text)
    assert counts is not None
    flat = np.repeat(np.arange(len(counts)) % 2, counts)
    assert (mask == flat.reshape(width, height).T).all()
    assert find_fault({"size": [height, width], "counts": text}, height, width, scored=True) == ""
    assert find_fault({"size": [height, width], "counts": text[:-1] + "z"}, height, width) != ""
