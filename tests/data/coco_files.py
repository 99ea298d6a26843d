"""COCO files for the tests, sound or with one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunet_zoo.data.coco import CocoFile, Problem

Data = dict[str, Any]
NAMES = ("cat", "dog")


def sound(images: int = 20) -> Data:
    """A file with two boxes an image, of classes 3 (cat) and 7 (dog)."""
    listed = [{"id": 10 + i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(images)]
    annotations = [
        {
            "id": 2 * i + k + 1, "image_id": 10 + i, "category_id": (3, 7)[(i + k) % 2], "bbox": [2 + k, 3, 10, 12.5],
            "area": 125.0, "iscrowd": 0, "segmentation": [[2, 3, 12, 3, 12, 15]],
        }
        for i in range(images) for k in range(2)
    ]  # fmt: skip
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    return {"images": listed, "annotations": annotations, "categories": categories}


def as_coco(data: Data) -> CocoFile:
    return CocoFile(Path("a.json"), "a.json", data["images"], data["annotations"], data["categories"])


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, problems
    return problems[0]


def changed(change: Callable[[Data], None], images: int = 20) -> CocoFile:
    data = sound(images)
    change(data)
    return as_coco(data)
