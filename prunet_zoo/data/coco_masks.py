"""Segmentations of COCO annotations: what pycocotools trips over, reads wrong, or mmdet leaves out.

pycocotools checks little of a run-length encoding (RLE): one that is too short gives another mask, a malformed
compressed one can write outside its memory. So both kinds are decoded here before it sees them.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

_NUMBER = {int, float}


def is_left_out(value: Any) -> bool:
    """Whether mmdet ignores the object: no polygon of at least three points, or a dict that is no RLE."""
    if isinstance(value, dict):
        return value.get("size") is None or not isinstance(value.get("counts"), list | str)
    return isinstance(value, list) and not any(_is_polygon(part) for part in value)


def find_fault(value: Any, height: float, width: float, scored: bool = False) -> str:
    """What training fails on, or reads wrong, in a segmentation that is not empty; empty text where it is sound.

    Args:
        value: polygons in px (lists of x, y, …) or RLE.
        height, width: of the image in px; infinite where it is not known.
        scored: pycocotools reads it itself, and fails on what mmdet would leave out.
    """
    if isinstance(value, dict):
        if is_left_out(value):
            return "no size and counts" if scored else ""
        return _rle_fault(value["size"], value["counts"], height, width)
    if not isinstance(value, list) or not all(isinstance(part, list) for part in value):
        return "neither a list of polygons nor RLE"
    if not set(map(type, chain.from_iterable(value))) <= _NUMBER or not _finite(value):
        return "coordinates that are no finite numbers"
    return "a polygon of less than three points" if scored and len(value[0]) <= 4 else ""


def _is_polygon(part: Any) -> bool:
    return isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0


def _finite(polygons: list[list[Any]]) -> bool:
    try:
        return all(math.isfinite(sum(part)) for part in polygons)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _rle_fault(size: Any, counts: list[Any] | str, height: float, width: float) -> str:
    if not isinstance(size, list) or len(size) != 2 or not set(map(type, size)) <= _NUMBER:
        return "an RLE whose size is not [height, width]"
    for has, wanted in zip(size, (height, width), strict=True):
        if wanted < math.inf and has != wanted:
            return f"an RLE of [height, width] {size} in an image of [{height:g}, {width:g}]"
    numbers = decode_counts(counts) if isinstance(counts, str) else counts
    if numbers is None:
        return "compressed RLE counts that cannot be decoded"
    if not all(type(n) in _NUMBER and 0 <= n < math.inf and n == int(n) for n in numbers):
        return "RLE counts that are no whole numbers from 0 on"
    total = sum(numbers)
    return "" if total == size[0] * size[1] else f"RLE counts that sum up to {total}, not to {size[0] * size[1]} px"


def decode_counts(text: str) -> list[int] | None:
    """The run lengths of a compressed RLE (pycocotools' ``rleFrString``); None where the text is none.

    Each number stands in groups of 5 bits, the lowest first, in characters from '0' on; bit 5 says that more follow,
    bit 4 of the last is the sign. From the fourth number on it is the difference to the last but one.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            return None
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return None if shift else counts
