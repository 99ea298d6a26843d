"""COCO files: every kind of fault is named with its count; what is sound passes; own files are divided, completed."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prunet_zoo.data import coco_images, coco_split
from prunet_zoo.data.coco import CocoFile, Problem, called, find_problems, read_coco
from prunet_zoo.data.coco_images import decode, find_image_problems, find_shared, group_by_content, has_end, read_size
from prunet_zoo.data.coco_masks import decode_counts, find_fault
from prunet_zoo.data.coco_split import find_images, hold_out, prepare_own_data
from prunet_zoo.errors import DataError

Data = dict[str, Any]
NAMES = ("cat", "dog")
FIELDS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "file_name", "width", "name")


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``own/labels.json`` and 20 images of different content in ``own/images``."""
    root = tmp_path / "own"
    (root / "images").mkdir(parents=True)
    for i in range(20):
        Image.new("RGB", (40, 30), (10 * i, 255 - 10 * i, 90)).save(root / "images" / f"{i}.png")
    (root / "labels.json").write_text(json.dumps(sound()))
    return root


def test_images_that_are_missing_unreadable_or_of_another_size(folder: Path) -> None:
    coco = read_coco(folder / "labels.json")
    images = folder / "images"
    assert find_image_problems(coco, images) == []
    (images / "3.png").rename(images / "3.PNG")
    (images / "4.png").unlink()
    problem = only(find_image_problems(coco, images, "do this"))
    assert problem.stops and "2 of 20 images do not exist" in problem.text and problem.text.endswith("do this")
    assert f"{images}/3.png" in problem.text and "(there is 3.PNG)" in problem.text
    (images / "3.PNG").rename(images / "3.png")
    (images / "4.png").write_bytes(b"no image")
    problem = only(find_image_problems(coco, images))
    assert problem.stops and "1 of 20 images are damaged or no images" in problem.text
    shutil.copy(images / "5.png", images / "4.png")
    for i in range(6):
        Image.new("RGB", (30, 40)).save(images / f"{i}.png")
        problem = only(find_image_problems(coco, images))
        assert f"{i + 1} of 20 images looked at have another size" in problem.text and problem.stops is (i == 5)
    assert "is 30×40, annotated as 40×30" in problem.text
    assert find_image_problems(coco, folder / "nowhere")[0].text.startswith("20 of 20 images do not exist")


def test_a_turned_photograph_has_the_size_that_detectors_see(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert read_size(tmp_path / "a.jpg") == decode(tmp_path / "a.jpg") == (30, 40)


@pytest.mark.parametrize("name", ["3.jpg", "3.png"])
@pytest.mark.parametrize("lost", [1, 4, 12, 2000, 0])
def test_images_that_were_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lost: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    names = [f"{i}{Path(name).suffix}" for i in range(8)]
    for file in names:
        Image.fromarray(pixels).save(tmp_path / file)
    data = {"images": [{"id": i, "file_name": f, "width": 80, "height": 60} for i, f in enumerate(names)]}
    coco = as_coco({**data, "annotations": [], "categories": []})
    whole = (tmp_path / name).read_bytes()
    for decoded in (2000, 3):  # all, or every third: the others by their ends
        monkeypatch.setattr(coco_images, "DECODED", decoded)
        (tmp_path / name).write_bytes(whole)
        assert find_image_problems(coco, tmp_path) == []
        (tmp_path / name).write_bytes(whole + b"x" * 100)  # what stands behind the end is no fault
        assert find_image_problems(coco, tmp_path) == [] and not has_end(str(tmp_path / name))
        (tmp_path / name).write_bytes(whole[: len(whole) - (lost or len(whole))])
        problem = only(find_image_problems(coco, tmp_path))
        assert problem.stops and f"1 of 8 images are damaged or no images: {tmp_path}/{name} (" in problem.text


def test_images_in_train_and_val(folder: Path) -> None:
    images = folder / "images"
    train = [str(images / f"{i}.png") for i in range(10)]
    val = [str(images / f"{i}.png") for i in range(10, 20)]
    assert find_shared(train, val) == []
    (images / "other").mkdir()
    shutil.copy(
        images / "2.png", images / "other" / "0.png"
    )  # the bytes of 2.png; the name of another one says nothing
    shutil.copy(images / "15.png", images / "other" / "1.png")
    names = [str(images / "other" / "0.png"), str(images / "other" / "1.png"), "/nowhere/0.png"]
    assert find_shared([*train, "/nowhere/1.png"], [*val, *names, train[4]]) == [
        (train[4], train[4]),
        (train[2], names[0]),
    ]
    assert group_by_content([*val, names[1]]) == [[val[5], names[1]]]


def test_files_that_differ_in_the_middle_are_not_the_same(tmp_path: Path) -> None:
    for name, middle in (("a", b"x"), ("b", b"y"), ("c", b"x")):
        (tmp_path / name).write_bytes(b"0" * 20_000 + middle + b"1" * 20_000)
    paths = [str(tmp_path / name) for name in "abc"]
    assert group_by_content(paths) == [[paths[0], paths[2]]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 4), max_size=3), min_size=2, max_size=40), st.floats(0.05, 0.6), st.integers(0, 3)
)
def test_the_held_out_share(labels: list[set[int]], share: float, seed: int) -> None:
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(len(labels))]
    annotations = [{"id": 0, "image_id": i, "category_id": c} for i, kinds in enumerate(labels) for c in sorted(kinds)]
    data = {"images": images, "annotations": annotations, "categories": [{"id": i, "name": str(i)} for i in range(5)]}
    annotated = {i for i, kinds in enumerate(labels) if kinds}
    if len(annotated) == 1:
        with pytest.raises(DataError, match="are of one image, which cannot be trained on and validated on"):
            hold_out(as_coco(data), "/nowhere", share, seed)
        return
    train, val = hold_out(as_coco(data), "/nowhere", share, seed)
    ids = [sorted(image["id"] for image in part.images) for part in (train, val)]
    assert sorted(ids[0] + ids[1]) == list(range(len(labels))) and all(ids)
    assert len(train.annotations) + len(val.annotations) == len(annotations)
    assert {a["image_id"] for a in val.annotations} <= set(ids[1])
    again = hold_out(
        as_coco({**data, "images": images[::-1], "annotations": annotations[::-1]}), "/nowhere", share, seed
    )
    assert sorted(image["id"] for image in again[1].images) == ids[1]  # the order in the file does not matter
    if annotated:
        assert annotated & set(ids[0]) and annotated & set(ids[1])  # both sides have something to work with
    for label in range(5):
        having = {i for i, kinds in enumerate(labels) if label in kinds}
        if len(annotated & set(ids[1])) > 1:
            assert not having or having & set(ids[0])  # each class is trained on


def test_copies_of_an_image_count_as_images(tmp_path: Path) -> None:
    """200 images, of which each of 10 stands there 10 times and 100 once: a fifth is 40 images, not 40 groups."""
    names = [f"{i}_{k}.png" for i in range(10) for k in range(10)] + [f"{i}.png" for i in range(10, 110)]
    for name in names:
        (tmp_path / name).write_bytes(name.partition("_")[0].removesuffix(".png").encode())
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    annotations = [{"id": i, "image_id": i, "category_id": 1} for i in range(len(names))]
    coco = as_coco({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]})
    counts = [len(hold_out(coco, tmp_path, 0.2, seed)[1].images) for seed in range(20)]
    assert all(35 <= count <= 45 for count in counts), counts
    grouped = [sum("_" in i["file_name"] for i in hold_out(coco, tmp_path, 0.2, seed)[1].images) for seed in range(20)]
    assert 10 <= sum(grouped) / 20 <= 30  # copies are held out as often as others: 20 of 40
    alone = [
        image for image in images if not str(image["file_name"]).startswith("0_")
    ]  # one group larger than the share
    few = as_coco({**vars(coco), "images": [*images[:10], *alone[-5:]]})
    assert {len(hold_out(few, tmp_path, 0.2, seed)[1].images) for seed in range(5)} == {3}


def test_same_content_never_on_both_sides(folder: Path) -> None:
    for i in range(0, 20, 2):
        shutil.copy(folder / "images" / f"{i}.png", folder / "images" / f"{i + 1}.png")
    for seed in range(5):
        train, val = hold_out(read_coco(folder / "labels.json"), folder / "images", 0.3, seed)
        sides = [{int(Path(image["file_name"]).stem) // 2 for image in part.images} for part in (train, val)]
        assert not sides[0] & sides[1] and len(sides[1]) == 3
    for i in range(1, 20):
        shutil.copy(folder / "images" / "0.png", folder / "images" / f"{i}.png")
    with pytest.raises(DataError, match="of which none can be held out"):
        prepare_own_data(folder / "labels.json", folder / "work")


def test_images_without_annotation(folder: Path) -> None:
    data = sound()
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] < 12]  # 4 of 20 images, 2 boxes each
    (folder / "labels.json").write_text(json.dumps(data))
    for drop_empty, count, told in ((True, 1, "left out of training"), (False, 15, "trained on as background")):
        own = prepare_own_data(folder / "labels.json", folder / "work", drop_empty=drop_empty)
        train, val = read_coco(own.train_file), read_coco(own.val_file)
        assert val.annotations and find_problems(val) == find_problems(train) == []
        having = len({a["image_id"] for a in train.annotations})
        assert own.train_count == (having if drop_empty else len(train.images)) >= count
        note = f"{len(train.images) - having} of {len(train.images)} training images have no annotation: {told}"
        assert any(line.startswith(note) for line in own.notes), own.notes
    with pytest.raises(DataError, match=r"none of the .* can be used: .* have a side under 64 px"):
        prepare_own_data(folder / "labels.json", folder / "work", min_size=64)
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] == 10]
    (folder / "labels.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match="or give --val-json"):
        prepare_own_data(folder / "labels.json", folder / "work")


def test_classes_in_validation_images_alone_are_named(folder: Path) -> None:
    data = sound()
    data["annotations"] = [a for a in data["annotations"] if (a["category_id"] == 3) == (a["image_id"] == 10)]
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in (10, 11)]  # one image of either class
    (folder / "labels.json").write_text(json.dumps(data))
    own = prepare_own_data(folder / "labels.json", folder / "work")
    assert any("stand in validation images alone" in note and note.startswith("warning: ") for note in own.notes)
    own = prepare_own_data(folder / "labels.json", folder / "work", val_json=folder / "labels.json")
    assert not any("stand in validation images alone" in note for note in own.notes)


def test_ids_of_the_users_file(folder: Path) -> None:
    data = sound()
    given = [0, 5, 5, "x7", None, 2**70]
    for item, number in zip(data["annotations"], given, strict=False):
        item["id"] = number
    for item in data["annotations"][:4]:
        item["bbox"] = [50, 3, 10, 12]  # outside
    (folder / "labels.json").write_text(json.dumps(data))
    own = prepare_own_data(folder / "labels.json", folder / "work", val_json=folder / "labels.json")
    copied = read_coco(own.train_file)
    numbers = [a["id"] for a in copied.annotations]
    assert numbers == [41, 5, 42, 43, 44, 45, *range(7, 41)]  # pycocotools takes 0 for no object
    for part, show in ((0, "0"), (1, "5"), (2, "5"), (3, "x7"), (5, str(2**70))):
        assert called(copied.annotations[part]) == f"annotation {show}"
    assert called(copied.annotations[4]) == "an annotation without id"
    text = only([p for p in find_problems(copied, NAMES, scored=True) if "reach more than" in p.text]).text
    assert "annotation 0 [50, 3, 10, 12] in 0.png" in text and "annotation x7" in text


def test_an_unknown_category_is_not_taken_for_another(folder: Path) -> None:
    val = sound(4)
    val["categories"] = [{"id": 5, "name": "dog"}]
    for item in val["annotations"]:
        item["category_id"] = 5
    val["annotations"][0]["category_id"] = 3  # no category of this file; of the other one it is 'cat'
    (folder / "val.json").write_text(json.dumps(val))
    own = prepare_own_data(folder / "labels.json", folder / "work", val_json=folder / "val.json")
    held = read_coco(own.val_file)
    assert [a["category_id"] for a in held.annotations] == [8, *[7] * 7]
    problem = only(find_problems(held, NAMES, scored=True))
    assert "1 of 8 annotations belong to no category of the file" in problem.text and not problem.stops
    assert "annotation 1 (category_id 3)" in problem.text


def test_backslashes_in_file_names(folder: Path) -> None:
    data = sound()
    for image in data["images"]:
        image["file_name"] = f"images\\{image['file_name']}"
    (folder / "labels.json").write_text(json.dumps(data))
    own = prepare_own_data(folder / "labels.json", folder / "work")
    assert find_image_problems(read_coco(own.train_file), own.train_images) == []
    assert any("20 file names of" in note and "backslashes, which are read as /" in note for note in own.notes)
    problem = only(find_image_problems(read_coco(folder / "labels.json"), folder))
    assert "20 of 20 images do not exist" in problem.text and "write / in the annotation file" in problem.text
    for image in (folder / "images").iterdir():  # unpacked so: the backslash belongs to the name
        image.rename(folder / f"images\\{image.name}")
    own = prepare_own_data(folder / "labels.json", folder / "work2", images=folder)
    assert find_image_problems(read_coco(own.train_file), own.train_images) == []


def test_own_data_are_completed_and_written_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = sound()
    for item in data["annotations"]:
        del item["area"], item["iscrowd"], item["id"]
    for image in data["images"]:
        del image["width"]
    data["categories"] = [{"id": 0, "name": "dog"}, *data["categories"]]  # unused, as Roboflow adds one
    (folder / "labels.json").write_text(json.dumps(data))
    own = prepare_own_data(folder / "labels.json", folder / "work")
    assert own.classes == NAMES and own.train_images == own.val_images == folder / "images"
    assert any("held out" in note for note in own.notes)
    train, val = read_coco(own.train_file), read_coco(own.val_file)
    assert (len(train.images), len(val.images)) == (own.train_count, 20 - own.train_count) == (16, 4)
    for part in (train, val):
        assert find_problems(part, NAMES, scored=True) == [] and find_image_problems(part, own.train_images) == []
        assert [c["id"] for c in part.categories] == [3, 7] and part.name.startswith(f"{folder}/labels.json, as copied")
        assert {a["area"] for a in part.annotations} == {125.0}
    monkeypatch.setattr(coco_split, "write_atomic", lambda *a: pytest.fail("written again"))
    assert prepare_own_data(folder / "labels.json", folder / "work") == own


def test_a_validation_file_of_ones_own(folder: Path) -> None:
    val = sound(4)
    for i, image in enumerate(val["images"]):
        image["file_name"] = f"v{i}.png"
        Image.new("RGB", (40, 30), (i, i, i)).save(folder / "images" / f"v{i}.png")
    val["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]  # other numbers, another order
    for item in val["annotations"]:
        item["category_id"] = {3: 2, 7: 1}[item["category_id"]]
    (folder / "val.json").write_text(json.dumps(val))
    own = prepare_own_data(folder / "labels.json", folder / "work", val_json=folder / "val.json")
    train, held = read_coco(own.train_file), read_coco(own.val_file)
    assert train.categories == held.categories and len(held.images) == 4 and own.train_count == 20
    assert [a["category_id"] for a in held.annotations] == [a["category_id"] for a in sound(4)["annotations"]]
    val["categories"][0]["name"] = "wolf"
    (folder / "val.json").write_text(json.dumps(val))
    with pytest.raises(DataError, match=r"1 categories that .*labels\.json does not have: 'wolf'"):
        prepare_own_data(folder / "labels.json", folder / "work", val_json=folder / "val.json")


def test_own_data_that_cannot_be_used(folder: Path) -> None:
    data = sound()
    data["annotations"][0]["bbox"] = [1, 2, 3]
    data["images"][0]["id"] = None
    (folder / "labels.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"must be mended first\n  1 of 20 images.*\n  1 of 40 annotations"):
        prepare_own_data(folder / "labels.json", folder / "work")
    (folder / "labels.json").write_text(json.dumps(sound()))
    with pytest.raises(DataError, match="between 0 and 1, got 1"):
        prepare_own_data(folder / "labels.json", folder / "work", val_share=1.0)
    with pytest.raises(DataError, match=r"--images .*nowhere is no folder"):
        prepare_own_data(folder / "labels.json", folder / "work", images=folder / "nowhere")
    without = copy.deepcopy(sound())
    for item in without["annotations"]:
        del item["segmentation"]
    (folder / "labels.json").write_text(json.dumps(without))
    with pytest.raises(DataError, match="40 of 40 annotations have no segmentation"):
        prepare_own_data(folder / "labels.json", folder / "work", masks=True)
    assert not (folder / "work").exists()


@pytest.mark.parametrize(
    ("file", "images", "prefix"),
    [
        ("a.json", "", ""),
        ("a.json", "images", ""),
        ("annotations/instances_train2017.json", "train2017", ""),
        ("annotations/instances_train.json", "images/train", ""),
        ("annotations/instances_default.json", "images", ""),
        ("train/_annotations.coco.json", "train", ""),
        ("annotations/a.json", "pictures/day1", "pictures/day1/"),
    ],
)
def test_where_images_are_looked_for(tmp_path: Path, file: str, images: str, prefix: str) -> None:
    data = sound(3)
    for image in data["images"]:
        (tmp_path / images).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(tmp_path / images / image["file_name"])
        image["file_name"] = prefix + image["file_name"]
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps(data))
    found = find_images(read_coco(tmp_path / file))
    assert found / prefix == tmp_path / images
    shutil.move(str(tmp_path / images / "0.png"), str(tmp_path / "elsewhere.png"))
    assert find_images(read_coco(tmp_path / file)) == found
    for image in tmp_path.rglob("*.png"):
        image.unlink()
    with pytest.raises(DataError, match="are in none of the folders around it"):
        find_images(read_coco(tmp_path / file))
