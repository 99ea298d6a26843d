"""The user's own COCO files: divided, completed, written once; what cannot be used is said."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
from coco_files import NAMES, as_coco, only, sound
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prunet_zoo.data import coco_split
from prunet_zoo.data.coco import called, find_problems, read_coco
from prunet_zoo.data.coco_images import find_image_problems
from prunet_zoo.data.coco_split import find_images, hold_out, prepare_own_data
from prunet_zoo.errors import DataError


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
