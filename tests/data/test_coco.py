"""COCO files: every kind of fault is named with its count; what is sound passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from coco_files import NAMES, Data, as_coco, changed, only, sound
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.data.coco import CocoFile, find_problems, read_coco
from prunet_zoo.errors import DataError

FIELDS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "file_name", "width", "name")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("\ufeff{", "is no JSON"),
        ("[1]", "it holds a list"),
        ("{}", "it has no 'images', 'categories'"),
        ('{"images": [], "categories": 3}', "'categories': no list of objects"),
        ('{"images": [1], "categories": []}', "'images': no list of objects"),
    ],
)
def test_what_is_no_coco_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_coco(path)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_coco(tmp_path / "b.json")


def test_a_sound_file_has_no_problem() -> None:
    coco = as_coco(sound())
    assert find_problems(coco, NAMES, masks=True, scored=True) == []
    assert find_problems(coco) == []
    assert find_problems(changed(lambda d: d["annotations"][0].update(iscrowd=1, segmentation={"size": [30, 40], "counts": [9, 1191]})), NAMES, True, True) == []  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("images", "id", None, r"1 of 20 images have a bad 'id': 0.png \(None\); it must be a number"),
        ("images", "id", True, "bad 'id'"),
        ("images", "file_name", 5, "bad 'file_name'"),
        ("images", "width", 0, "1 of 20 images have a bad 'width': 0.png"),
        ("images", "height", "30", "bad 'height'"),
        ("annotations", "bbox", [1, 2, 3], "1 of 40 annotations have a bad 'bbox': 1"),
        ("annotations", "bbox", [1, 2, float("nan"), 3], "four finite numbers"),
        ("annotations", "bbox", [1, 2, float("inf"), 3], "four finite numbers"),
        ("annotations", "bbox", [1, 2, "3", 3], "four finite numbers"),
        ("annotations", "bbox", [1, 2, 10**400, 3], "four finite numbers"),
        ("annotations", "area", None, "bad 'area'"),
        ("annotations", "iscrowd", None, "pycocotools needs it"),
        ("annotations", "category_id", [3], "bad 'category_id'"),
        ("annotations", "image_id", {}, "bad 'image_id'"),
        ("categories", "name", "", "bad 'name'"),
    ],
)
def test_bad_fields_stop(part: str, key: str, value: Any, message: str) -> None:
    problem = only(find_problems(changed(lambda d: d[part][0].update({key: value})), NAMES, scored=True))
    assert problem.stops
    with pytest.raises(DataError, match=message):
        raise DataError(problem.text)


@pytest.mark.parametrize("part", ["images", "annotations", "categories"])
def test_duplicate_ids_stop(part: str) -> None:
    def change(data: Data) -> None:
        data[part][1]["id"] = data[part][0]["id"]

    problems = find_problems(changed(change), NAMES)
    assert any(f"1 ids of {part} are given more than once" in p.text and p.stops for p in problems)


def test_duplicate_file_names_are_named() -> None:
    problem = only(find_problems(changed(lambda d: d["images"][0].update(file_name="1.png")), NAMES))
    assert "1 of 20 file names belong to more than one image" in problem.text and not problem.stops


def test_names_that_the_config_and_the_file_do_not_share() -> None:
    coco = as_coco(sound())
    problem = only(find_problems(coco, ["Cat", "dog", "owl"]))
    assert problem.stops and "2 of 3 class names of the config are no category" in problem.text
    assert "'Cat' (meant 'cat'?), 'owl'" in problem.text and "--train-json" in problem.text
    problems = find_problems(coco, ["person", "car"])
    assert {p.stops for p in problems} == {True} and "which has 'cat', 'dog'" in problems[0].text
    problem = only(find_problems(coco, ["dog"]))  # a part of the classes is meant to be trained on
    assert not problem.stops and "1 of 2 categories are not among the config's classes" in problem.text
    problem = only(find_problems(coco, ["dog", "cat"]))
    assert problem.stops and "another order" in problem.text and "'cat', 'dog'" in problem.text
    problem = only(find_problems(changed(lambda d: d["categories"].append({"id": 9, "name": "dog"})), NAMES))
    assert problem.stops and "more than one category: 'dog'" in problem.text


def damage(key: str, value: Any, count: int) -> CocoFile:
    def change(data: Data) -> None:
        for item in data["annotations"][:count]:
            item[key] = value

    return changed(change)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bbox", [1, 1, 0, 9], "of 40 boxes are empty (under 1 px)"),
        ("bbox", [1, 1, -4, 9], "of 40 boxes have a negative width or height"),
        ("bbox", [30, 1, 15, 9], "of 40 boxes reach more than 1 px out of their image"),
        ("bbox", [50, 1, 15, 9], "annotation 1 [50, 1, 15, 9] in 0.png (40×30)"),
        ("area", 0, "are empty"),
        ("image_id", 99, "of 40 annotations belong to no image of the file"),
        ("image_id", "10", "(image_id '10')"),
        ("category_id", 4, "of 40 annotations belong to no category of the file"),
    ],
)
def test_few_bad_annotations_warn_and_many_stop(key: str, value: Any, message: str) -> None:
    problem = only(find_problems(damage(key, value, 2), NAMES))
    assert message in problem.text and not problem.stops
    assert only(find_problems(damage(key, value, 5), NAMES)).stops is False  # five are a few, of however many
    assert only(find_problems(damage(key, value, 6), NAMES)).stops
    problems = find_problems(damage(key, value, 40), NAMES)
    assert any(p.stops for p in problems)


def test_boxes_of_another_kind_are_recognised() -> None:
    def shares(data: Data) -> None:
        for item in data["annotations"]:
            item["bbox"] = [0.1, 0.2, 0.3, 0.4]

    def corners(data: Data) -> None:
        for item in data["annotations"]:
            item["bbox"] = [20, 10, 38, 28]

    assert any("shares of the image's width" in p.text and p.stops for p in find_problems(changed(shares), NAMES))
    assert any("may be x1, y1, x2, y2" in p.text and p.stops for p in find_problems(changed(corners), NAMES))


def test_nothing_to_learn_from() -> None:
    assert "has no annotations" in only(find_problems(changed(lambda d: d["annotations"].clear()), NAMES)).text
    assert any("no images" in p.text for p in find_problems(changed(lambda d: d["images"].clear()), NAMES))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["images", "annotations", "categories"]),
    st.integers(0, 1),
    st.sampled_from(FIELDS),
    json_values,
    st.booleans(),
)  # fmt: skip
def test_any_value_anywhere_is_judged_not_tripped_over(part: str, row: int, key: str, value: Any, repair: bool) -> None:
    coco = changed(lambda d: d[part][row].update({key: value}), images=2)
    for problem in find_problems(coco, None if repair else NAMES, masks=True, scored=True, repairable=repair):
        assert problem.text and isinstance(problem.stops, bool)
