"""Images of COCO files: missing, damaged, of another size, in two parts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from coco_files import as_coco, only
from PIL import Image

from prunet_zoo.data import coco_images
from prunet_zoo.data.coco import read_coco
from prunet_zoo.data.coco_images import decode, find_image_problems, find_shared, group_by_content, has_end, read_size


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
