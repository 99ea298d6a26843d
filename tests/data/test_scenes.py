"""Digit scenes: boxes on the ink, disjoint scans and photographs, whole folders or none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prunet_zoo.data import scenes
from prunet_zoo.data.digits_split import load_scans, split_indices
from prunet_zoo.errors import DataError, PrunetError
from prunet_zoo.files import WriteError

PARAMS = scenes.SceneParams()


def test_split_is_a_stratified_partition() -> None:
    train, test = split_indices()
    assert sorted([*train, *test]) == list(range(1797))
    _, labels = load_scans()
    for digit in range(10):
        assert np.mean(labels[test] == digit) == pytest.approx(np.mean(labels == digit), abs=0.005)
        assert (labels[test] == digit).sum() == round(0.2 * (labels == digit).sum())
    again = split_indices()
    assert np.array_equal(train, again[0])
    assert not np.array_equal(test, split_indices(seed=1)[1])
    # the split itself must not move: trained weights were validated on these scans
    assert test[:5].tolist() == [3, 7, 13, 19, 36]
    assert len(test) == 359


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_split_refuses_bad_fractions(fraction: float) -> None:
    with pytest.raises(DataError, match="between 0 and 1"):
        split_indices(fraction)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["train", "val"]), st.integers(0, 10_000), st.integers(0, 3))
def test_scene_keeps_its_promises(part: str, number: int, seed: int) -> None:
    params = scenes.SceneParams(seed=seed)
    scene = scenes.make_scene(part, number, params)
    assert scene.image.shape == (128, 128, 3) and scene.image.dtype == np.uint8
    assert 1 <= len(scene.boxes) <= params.max_digits
    x, y, w, h = scene.boxes.T
    assert (x >= 0).all() and (y >= 0).all() and (x + w <= 128).all() and (y + h <= 128).all()
    longer = np.maximum(w, h)
    assert (longer <= params.max_side + 2).all() and (longer >= params.min_side * 0.8).all()
    allowed = split_indices()[0 if part == "train" else 1]
    assert np.isin(scene.scans, allowed).all()
    assert np.array_equal(scene.labels, load_scans()[1][scene.scans])
    for i in range(len(scene.boxes)):
        for j in range(i):
            assert scenes._overlap(tuple(scene.boxes[i]), tuple(scene.boxes[j])) <= 0.1
    assert scene.masks.shape == (len(scene.boxes), 128, 128) and scene.masks.sum(0).max() == 1  # a pixel is one digit's
    assert [scenes._tight_box(mask) for mask in scene.masks] == [tuple(box) for box in scene.boxes.tolist()]
    again = scenes.make_scene(part, number, params)
    assert np.array_equal(scene.image, again.image) and np.array_equal(scene.boxes, again.boxes)


def test_boxes_are_tight_on_the_ink(monkeypatch: pytest.MonkeyPatch) -> None:
    # on a flat background, what differs from it is ink
    monkeypatch.setattr(scenes, "_background", lambda part, size, rng: np.full((size, size, 3), 128.0))
    checked = 0
    for number in range(30):
        scene = scenes.make_scene("train", number, scenes.SceneParams(max_digits=1))
        ((x, y, w, h),) = scene.boxes.tolist()
        changed = np.abs(scene.image.astype(int) - 128).max(-1) > 4
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == (x, y, x + w, y + h)
        checked += 1
    assert checked == 30


def test_photographs_are_cut_in_two() -> None:
    assert scenes.region_of("train", 640) == (0, 448)
    assert scenes.region_of("val", 640) == (448, 640)


def folder_bytes(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_folder_is_coco_and_reproducible(tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    root = scenes.write_scenes(tmp_path / "a" / "scenes", train=12, val=6)
    scans = {}
    for part, count in (("train", 12), ("val", 6)):
        coco = COCO(str(root / "annotations" / f"instances_{part}.json"))
        assert len(coco.imgs) == count
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list("0123456789")
        for image in coco.imgs.values():
            with Image.open(root / "images" / part / image["file_name"]) as file:
                assert file.size == (image["width"], image["height"])
            ids = coco.getAnnIds(imgIds=[image["id"]])
            masks = [coco.annToMask(annotation) for annotation in coco.loadAnns(ids)]
            assert np.array_equal(masks, scenes.make_scene(part, image["id"], scenes.SceneParams(12, 6)).masks)
        scans[part] = {a["scan"] for a in coco.anns.values()}
    assert scans["train"].isdisjoint(scans["val"])
    other = scenes.write_scenes(tmp_path / "b", train=12, val=6)
    assert folder_bytes(root) == folder_bytes(other)
    assert folder_bytes(scenes.write_scenes(tmp_path / "c", train=12, val=6, seed=1)) != folder_bytes(root)


def test_second_call_does_nothing_and_other_parameters_are_noticed(tmp_path: Path) -> None:
    root = scenes.write_scenes(tmp_path / "s", train=2, val=1)
    stamps = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert scenes.write_scenes(root, train=2, val=1) == root
    assert scenes.ensure_scenes(root) == root  # complete scenes of any size will do
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == stamps
    with pytest.raises(DataError, match=r"holds other scenes.*'train': 2"):
        scenes.write_scenes(root, train=3, val=1)
    (root / scenes.MARKER).write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        scenes.ensure_scenes(root)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        scenes.ensure_scenes(strange)
    assert (strange / "thesis.txt").read_text() == "mine"


def test_missing_scenes_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        scenes.SceneParams.__init__, "__defaults__", (3, 2, *scenes.SceneParams.__init__.__defaults__[2:])
    )
    root = scenes.ensure_scenes(tmp_path / "new")
    assert len(list((root / "images" / "train").iterdir())) == 3


def test_crash_or_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = scenes.make_scene

    def full(part, number, params):
        if number == 2:
            raise OSError(28, "No space left on device")
        return real(part, number, params)

    monkeypatch.setattr(scenes, "make_scene", full)
    with pytest.raises(WriteError, match="No space left"):
        scenes.write_scenes(tmp_path / "s", train=4, val=1)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scenes.main(["--out", str(tmp_path / "s"), "--train", "2", "--val", "1"]) == 0
    assert "2 train and 1 val" in capsys.readouterr().out
    assert scenes.main(["--out", str(tmp_path / "s"), "--train", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
    assert issubclass(DataError, PrunetError)
