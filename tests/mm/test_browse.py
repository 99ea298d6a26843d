"""tools/browse.py: pictures of what a detector is trained on, and --check."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.registry import DefaultScope
from PIL import Image

from prunet_zoo.data.scenes import write_scenes
from prunet_zoo.errors import DataError
from prunet_zoo.mm.browse import browse, load_samples
from prunet_zoo.mm.cli import ConfigError, load_config, run_tool
from prunet_zoo.mm.draw_boxes import class_colour

ROOT = Path(__file__).resolve().parents[2]
SCENES = ROOT / "configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py"


@pytest.fixture(autouse=True)
def _own_scope() -> Any:
    kept = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(kept)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", train=6, val=3)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One 100×60 px image with a grey square as box and mask, of the class 'square'."""
    root = tmp_path_factory.mktemp("shapes")
    pixels = np.full((60, 100, 3), 20, dtype=np.uint8)
    pixels[20:40, 30:50] = (200, 20, 20)  # red: blue and red must not change places
    Image.fromarray(pixels).save(root / "one.png")
    polygon = [30, 20, 50, 20, 50, 40, 30, 40]
    item = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [30, 20, 20, 20], "segmentation": [polygon], "area": 400}
    data = {
        "images": [{"id": 1, "file_name": "one.png", "width": 100, "height": 60}],
        "annotations": [{**item, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "square"}],
    }
    (root / "labels.json").write_text(json.dumps(data))
    return root


def on_scenes(scenes: Path) -> Any:
    cfg = load_config(SCENES)
    for part in ("train", "val"):
        cfg[f"{part}_dataloader"].dataset.data_root = f"{scenes}/"
    return cfg


def test_pictures_of_the_augmented_samples(scenes: Path, tmp_path: Path) -> None:
    cfg = on_scenes(scenes)
    written = browse(cfg, "train", 4, tmp_path / "a", seed=1)
    assert [path.name for path in written[:1]] == ["sheet.png"] and len(written) == 5
    assert len({path.name[4:] for path in written[1:]}) == 4  # each sample once
    again = browse(cfg, "train", 4, tmp_path / "b", seed=1)
    assert [p.read_bytes() for p in written] == [p.read_bytes() for p in again]  # augmentation included
    other = browse(cfg, "train", 4, tmp_path / "c", seed=2)
    assert written[0].read_bytes() != other[0].read_bytes()
    assert len(browse(cfg, "train", 100, tmp_path / "all.png")) == 1
    assert len(browse(cfg, "val", 100, tmp_path / "val")) == 4


def shapes_config(root: Path, wrapper: bool = False) -> Any:
    cfg = load_config(SCENES)
    # mmdet's mosaic knows no masks
    load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True, with_mask=not wrapper)]
    dataset = dict(
        type="CocoDataset", ann_file=str(root / "labels.json"), data_prefix=dict(img=f"{root}/"),
        metainfo=dict(classes=("square",)), pipeline=[*load, dict(type="PackDetInputs")],
    )  # fmt: skip
    if wrapper:
        dataset["pipeline"] = load
        dataset = dict(
            type="MultiImageMixDataset",
            dataset=dict(type="RepeatDataset", times=5, dataset=dataset),
            pipeline=[dict(type="Mosaic", img_scale=(64, 64), prob=1.0), dict(type="PackDetInputs")],
        )
    cfg.train_dataloader.dataset = dataset
    return cfg


def test_boxes_masks_and_colours_are_where_they_belong(shapes: Path, tmp_path: Path) -> None:
    ((title, image, sample, classes),) = load_samples(shapes_config(shapes), "train", 1, 0)
    assert title == "one.png" and image.size == (100, 60) and list(classes) == ["square"]
    assert image.getpixel((40, 30)) == (200, 20, 20) and len(sample.gt_instances) == 1
    (_, single) = browse(shapes_config(shapes), "train", 1, tmp_path / "out")
    picture = Image.open(single)
    assert picture.size == (500, 300)  # small images are enlarged
    inside, colour = np.array(picture.getpixel((200, 160)), float), np.array(class_colour(0), float)
    assert np.abs(inside - (0.55 * np.array([200, 20, 20]) + 0.45 * colour)).max() < 3
    assert picture.getpixel((20, 280)) == (20, 20, 20)


def test_mosaic_and_repeated_images(shapes: Path) -> None:
    # mosaic of one image: four boxes; repeated five times it is still one image to look at
    samples = load_samples(shapes_config(shapes, wrapper=True), "train", 9, 0)
    assert len(samples) == 1 and samples[0][0] == "one.png" and samples[0][1].size == (128, 128)


def test_what_cannot_be_drawn(scenes: Path, tmp_path: Path) -> None:
    cfg = on_scenes(scenes)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        browse(cfg, "train", 0, tmp_path)
    cfg.train_dataloader.dataset.pipeline = cfg.train_dataloader.dataset.pipeline[:2]
    with pytest.raises(ConfigError, match="must end with PackDetInputs"):
        browse(cfg, "train", 1, tmp_path)
    cfg.val_dataloader = None
    with pytest.raises(ConfigError, match="has no val_dataloader"):
        browse(cfg, "val", 1, tmp_path)
    cfg = on_scenes(scenes)
    cfg.train_dataloader.dataset.data_prefix.img = "nowhere/"
    with pytest.raises(DataError, match="an image of the train data is missing"):
        browse(cfg, "train", 1, tmp_path)


def test_where_pictures_go(scenes: Path, tmp_path: Path) -> None:
    cfg = on_scenes(scenes)
    for name, kind in (("a.jpg", "JPEG"), ("b.PNG", "PNG")):
        assert browse(cfg, "train", 1, tmp_path / name) == [tmp_path / name]
        assert Image.open(tmp_path / name).format == kind
    for name in ("a.bmp", "a.webp", "a.svg", "a.pdf"):
        with pytest.raises(ConfigError, match=r"written as \.png or \.jpg; give F\.png, F\.jpg or a folder"):
            browse(cfg, "train", 1, tmp_path / name)
    assert len(browse(cfg, "train", 1, tmp_path / "day.1")) == 2


def test_an_image_that_was_cut_off(scenes: Path, tmp_path: Path) -> None:
    for part in ("annotations", "images"):
        shutil.copytree(scenes / part, tmp_path / part)
    path = sorted((tmp_path / "images/train").iterdir())[0]
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DataError, match=rf"image {path} of the train data cannot be read: it is damaged"):
        browse(on_scenes(tmp_path), "train", 6, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def call(load_tool: Any, *argv: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        run_tool(load_tool("browse").main, [str(a) for a in argv])
    return int(caught.value.code or 0)


def test_the_tool(
    shapes: Path, scenes: Path, tmp_path: Path, load_tool: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads((scenes / "annotations/instances_train.json").read_text())
    own = ["--data-root", scenes, "--work-dir", tmp_path]
    assert call(load_tool, SCENES, *own, "--number", "2") == 0
    assert f"drawn: {tmp_path}/browse_train/sheet.png and 2 single pictures" in capsys.readouterr().out
    assert call(load_tool, SCENES, *own, "--check") == 0
    said = capsys.readouterr().out
    assert f"6 images, {len(data['annotations'])} annotations" in said and "nothing found that would stop" in said
    options = [
        f"train_dataloader.dataset.ann_file={shapes}/labels.json",
        f"train_dataloader.dataset.data_prefix.img={shapes}",
        f"train_dataloader.dataset.data_root={scenes}/",
        f"val_dataloader.dataset.data_root={scenes}/",
        f"val_evaluator.ann_file={scenes}/annotations/instances_val.json",
    ]
    assert call(load_tool, SCENES, "--check", "--cfg-options", *options) == 2
    error = capsys.readouterr().err
    assert "10 of 10 class names of the config are no category of the file, which has 'square'" in error
    assert call(load_tool, SCENES, "--cfg-options", *options) == 2  # drawn it would have wrong names
    error = capsys.readouterr().err
    assert "class names of the config are no category" in error and "data_check=False draws them" in error
    assert call(load_tool, ROOT / "configs/classification/prunet-cpu-small_digits.py") == 2
    assert "is no detector's config" in capsys.readouterr().err
