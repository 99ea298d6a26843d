"""--train-json: any detector's config trains on a user's COCO JSON, with one command and no edit."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

from prunet_zoo.data.scenes import write_scenes
from prunet_zoo.errors import DataError
from prunet_zoo.mm.cli import ConfigError, load_config, run_tool
from prunet_zoo.mm.coco_checks import coco_sources, heads
from prunet_zoo.mm.network import register_mmdet
from prunet_zoo.mm.own_data import add_own_data_arguments, find_annotations, fit_schedule, needs_masks, set_own_data

ROOT = Path(__file__).resolve().parents[2]
DETECTION = ROOT / "configs/detection"
SCENES = DETECTION / "retinanet_prunet-cpu-small_fpn_digit-scenes.py"
CUSTOM = DETECTION / "retinanet_prunet-p0_fpn_custom.py"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEC = {
    "input_size": 32,
    "stages": [
        {"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]},
        {"blocks": [{"type": "fused_irb", "out_channels": 8, "stride": 2, "hidden": 16}]},
        {"blocks": [{"type": "irb", "out_channels": 16, "stride": 2, "hidden": 32}]},
        {"blocks": [{"type": "irb", "out_channels": 24, "stride": 2, "hidden": 32}]},
    ],
    "tail": {"out_channels": 32},
    "num_classes": 10,
}


@pytest.fixture(autouse=True)
def _own_scope() -> Any:
    kept = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(kept)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten digit scenes as another tool would export them: other names, ids and folders, boxes alone."""
    root = tmp_path_factory.mktemp("own")
    scenes = write_scenes(root / "scenes", train=10, val=1)
    data = json.loads((scenes / "annotations/instances_train.json").read_text())
    for image in data["images"]:
        target = root / "mine" / "pictures" / "day1" / f"shot_{image['file_name']}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scenes / "images/train" / image["file_name"], target)
        image.update(id=1000 + 3 * image["id"], file_name=f"day1/{target.name}")
    for item in data["annotations"]:
        item.update(image_id=1000 + 3 * item["image_id"], category_id=7 * item["category_id"] + 3)
        del item["area"], item["iscrowd"], item["segmentation"]
    order = (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)
    data["categories"] = [{"id": 999, "name": "things"}, *({"id": 7 * k + 3, "name": NAMES[k]} for k in order)]
    path = root / "mine" / "my labels.json"
    path.write_text(json.dumps(data))
    return path


def parse(config: Path, *argv: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_own_data_arguments(parser)
    args = parser.parse_args([str(a) for a in argv])
    args.config, args.cfg_options = str(config), None
    return args


def configured(config: Path, work: Path, *argv: str | Path) -> Config:
    cfg = load_config(config)
    cfg.work_dir = str(work)
    set_own_data(cfg, parse(config, *argv))
    return cfg


@pytest.mark.parametrize(
    "name",
    [
        "retinanet_prunet-p0_fpn_1x_coco", "cascade-rcnn_prunet-p0_fpn_1x_coco", "faster-rcnn_prunet-p0_fpn_1x_coco",
        "yolox_prunet-p0_8xb8-300e_coco", "rtmdet_prunet-p0_8xb32-300e_coco", "dino-4scale_prunet-p0_8xb2-12e_coco",
        "deformable-detr_prunet-p0_16xb2-50e_coco", CUSTOM.stem,
    ],
)  # fmt: skip
def test_every_kind_of_detector_takes_the_files_classes(labels: Path, tmp_path: Path, name: str) -> None:
    data = json.loads(labels.read_text())
    used = {item["category_id"] for item in data["annotations"]}
    classes = [c["name"] for c in data["categories"] if c["id"] in used]
    cfg = configured(DETECTION / f"{name}.py", tmp_path, "--train-json", labels, "--images", labels.parent / "pictures")
    found = list(heads(cfg.model))
    assert found and {head["num_classes"] for _, head in found} == {len(classes)}
    for part in ("train", "val", "test"):
        (source,) = coco_sources(cfg, part)
        assert source.ann_file.is_file() and list(source.classes) == classes
        assert source.images == labels.parent / "pictures"
        if part != "train":
            evaluators = cfg[f"{part}_evaluator"]
            for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
                assert Path(evaluator.ann_file) == source.ann_file
    assert coco_sources(cfg, "train")[0].ann_file != coco_sources(cfg, "val")[0].ann_file
    if name.startswith("faster"):
        assert "num_classes" not in cfg.model.rpn_head or cfg.model.rpn_head.num_classes == 1


def test_masks_are_needed_where_the_config_trains_them(labels: Path, tmp_path: Path) -> None:
    config = DETECTION / "mask-rcnn_prunet-p0_fpn_1x_coco.py"
    assert needs_masks(load_config(config)) and not needs_masks(load_config(SCENES))
    with pytest.raises(DataError, match="annotations have no segmentation"):
        configured(config, tmp_path, "--train-json", labels, "--images", labels.parent / "pictures")


def test_few_images_are_repeated_and_the_rate_follows_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = load_config(DETECTION / "retinanet_prunet-p0_fpn_1x_coco.py")
    notes = fit_schedule(cfg, 160)  # batches of 2: 80 steps, 12 epochs
    assert cfg.train_dataloader.dataset.type == "RepeatDataset" and cfg.train_dataloader.dataset.times == 2
    assert cfg.auto_scale_lr.enable and len(notes) == 2 and "times 0.125" in notes[1]
    cfg = load_config(DETECTION / "retinanet_prunet-p0_fpn_1x_coco.py")
    assert len(fit_schedule(cfg, 10_000, keep_scaling=True)) == 0
    assert cfg.train_dataloader.dataset.type == "CocoDataset" and not cfg.auto_scale_lr.enable
    cfg = load_config(DETECTION / "yolox_prunet-p0_8xb8-300e_coco.py")  # mosaic works on repeated images
    fit_schedule(cfg, 8)
    assert cfg.train_dataloader.dataset.type == "MultiImageMixDataset"
    assert cfg.train_dataloader.dataset.dataset.type == "RepeatDataset"
    assert cfg.default_hooks.logger.interval <= 4 * 2


def test_a_length_that_the_user_chose_is_kept(labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = load_config(CUSTOM, {"train_cfg.max_epochs": 1})
    cfg.work_dir = str(tmp_path)
    args = parse(CUSTOM, "--train-json", labels, "--images", labels.parent / "pictures")
    args.cfg_options = {"train_cfg.max_epochs": 1}
    set_own_data(cfg, args)
    said = capsys.readouterr().out
    assert cfg.train_dataloader.dataset.type == "CocoDataset" and "1 steps an epoch: 1 epochs make 1 steps" in said
    assert "T_max" not in cfg.param_scheduler[1] and "end" not in cfg.param_scheduler[1]  # it follows max_epochs


def test_steps_are_counted_as_mmdet_trains(labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images without annotation are left out where the config says so, and too small ones."""
    from mmengine.registry import DATASETS

    data = json.loads(labels.read_text())
    kept = {image["id"] for image in data["images"][:6]}
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in kept]
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(data))
    for drop in (True, False):
        cfg = load_config(SCENES)
        cfg.work_dir, cfg.train_dataloader.batch_size = str(tmp_path / str(drop)), 2
        cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=drop, min_size=32)
        argv = ("--train-json", path, "--val-json", labels, "--images", labels.parent / "pictures")
        set_own_data(cfg, parse(SCENES, *argv, "--val-images", labels.parent / "pictures"))
        said = capsys.readouterr().out
        assert f"4 of 10 training images have no annotation: {'left out' if drop else 'trained on'}" in said
        inner = cfg.train_dataloader.dataset
        register_mmdet()
        count = len(DATASETS.build({**inner.dataset, "_scope_": "mmdet"}))
        assert count == (6 if drop else 10) and f"{count} training images are {count // 2} steps an epoch" in said


def test_arguments_that_do_not_fit(labels: Path, tmp_path: Path) -> None:
    for argv, message in (
        (("--images", "x"), "--images needs --train-json FILE"),
        (("--train-json", labels, "--data-root", "x"), "either --train-json or --data-root"),
        (("--train-json", labels, "--val-images", "x"), "--val-images needs --val-json"),
    ):
        with pytest.raises(ConfigError, match=message):
            configured(SCENES, tmp_path, *argv)
    classifier = ROOT / "configs/classification/prunet-cpu-small_digits.py"
    with pytest.raises(ConfigError, match="is of a classifier"):
        configured(classifier, tmp_path, "--train-json", labels)
    cfg = load_config(SCENES)
    before = cfg.to_dict()
    set_own_data(cfg, parse(SCENES))
    assert cfg.to_dict() == before
    cfg.work_dir, cfg.train_dataloader.dataset.type = str(tmp_path), "VOCDataset"
    with pytest.raises(ConfigError, match=r"one CocoDataset; .* has 0 \(its data sets: VOCDataset\)"):
        set_own_data(cfg, parse(SCENES, "--train-json", labels))
    cfg = load_config(SCENES)
    cfg.work_dir = str(tmp_path)
    del cfg.model.bbox_head["num_classes"]
    with pytest.raises(ConfigError, match=r"classes of the model's heads \(RetinaNet\) cannot be set"):
        set_own_data(cfg, parse(SCENES, "--train-json", labels, "--images", labels.parent / "pictures"))


@pytest.mark.parametrize(
    ("files", "train", "val"),
    [
        (("annotations/instances_train2017.json", "annotations/instances_val2017.json"), 0, 1),
        (("train/_annotations.coco.json", "valid/_annotations.coco.json", "test/_annotations.coco.json"), 0, 1),
        (("annotations/instances_default.json",), 0, None),
        (("train.json", "val.json"), 0, 1),
        (("labels.json",), 0, None),
    ],
)
def test_data_root_in_the_usual_layouts(
    tmp_path: Path, files: tuple[str, ...], train: int | None, val: int | None
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    found = find_annotations(tmp_path)
    assert found == tuple(None if i is None else tmp_path / files[i] for i in (train, val))


def test_data_root_that_is_unclear(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no COCO JSON"):
        find_annotations(tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        find_annotations(tmp_path / "nowhere")
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match="holds 2 files that may be meant"):
        find_annotations(tmp_path)


def train(load_tool: Any, labels: Path, work: Path, *argv: str, options: Sequence[str] = ()) -> int:
    options = [
        *options, "visualizer=None", "log_level=WARNING", f"model.backbone.arch={work.parent / 'small.json'}",
        "train_cfg.max_epochs=1", "train_cfg.val_interval=1", "train_dataloader.batch_size=4",
        "model.test_cfg.score_thr=0.0",
        f"experiment_name={work.name}",
    ]  # fmt: skip
    (work.parent / "small.json").write_text(json.dumps(SPEC))
    command = [str(SCENES), "--train-json", str(labels), "--work-dir", str(work), *argv, "--cfg-options", *options]
    with pytest.raises(SystemExit) as caught:
        run_tool(load_tool("train").main, command, resumable=True)
    return int(caught.value.code or 0)


def test_objects_are_found_under_the_users_names(
    tmp_path: Path, load_tool: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A detector of digits goes on with digits that somebody else has annotated: boxes, names and ids have to fit."""
    scenes = write_scenes(tmp_path / "scenes", train=16, val=12)
    for part, step, order in (("train", 5, range(10)), ("val", 3, (4, 2, 0, 1, 3, 9, 8, 7, 6, 5))):
        data = json.loads((scenes / f"annotations/instances_{part}.json").read_text())
        classes = {c["id"]: int(c["name"]) for c in data["categories"]}
        for image in data["images"]:
            image.update(id=1000 + 3 * image["id"])
        for item in data["annotations"]:
            item.update(image_id=1000 + 3 * item["image_id"], category_id=step * classes[item["category_id"]] + 1)
        data["categories"] = [{"id": step * k + 1, "name": NAMES[k]} for k in order]
        (tmp_path / f"{part}.json").write_text(json.dumps(data))
    monkeypatch.setattr("prunet_zoo.mm.own_data.MIN_STEPS", 4)
    command = [
        SCENES, "--train-json", tmp_path / "train.json", "--val-json", tmp_path / "val.json", "--images",
        scenes / "images/train", "--val-images", scenes / "images/val", "--work-dir", tmp_path / "run", "--cfg-options",
        f"load_from={ROOT / 'checkpoints/digits_detector.safetensors'}", "visualizer=None", "log_level=WARNING",
        "train_cfg.max_epochs=1", "train_cfg.val_interval=1", "optim_wrapper.optimizer.lr=1e-5",
    ]  # fmt: skip
    assert load_tool("train").main([str(part) for part in command]) == 0
    assert "10 classes: zero, one, two, three" in capsys.readouterr().out
    record = json.loads((tmp_path / "run/metrics.json").read_text())
    assert record["metrics"]["coco/bbox_mAP_50"] > 0.85, record["metrics"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_during_the_run(
    labels: Path, tmp_path: Path, load_tool: Any, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    images = tmp_path / "pictures"
    shutil.copytree(labels.parent / "pictures", images)
    for path in (images / "day1").iterdir():
        path.write_bytes(path.read_bytes()[:-500])
    options = (f"train_dataloader.num_workers={workers}", "train_dataloader.persistent_workers=False")
    assert train(load_tool, labels, tmp_path / "a", "--images", str(images), options=options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any("images are damaged or no images" in line and "image file is truncated" in line for line in lines)
    options = (*options, "data_check=False")  # as if they were cut off after the check
    assert train(load_tool, labels, tmp_path / "b", "--images", str(images), options=options) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: image {images}/day1/shot_") and last.endswith("damaged or cut off; replace it")


def test_one_command_trains_and_resumes(
    labels: Path, tmp_path: Path, load_tool: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("prunet_zoo.mm.own_data.MIN_STEPS", 4)
    images = labels.parent / "pictures"
    assert train(load_tool, labels, tmp_path / "run") == 2  # the pictures are where no tool looks
    assert "give the folder that these names start from with --images" in capsys.readouterr().err
    assert train(load_tool, labels, tmp_path / "run", "--images", str(images)) == 0
    said = capsys.readouterr().out
    assert "nothing is annotated as" in said and "are held out" in said and "coco/bbox_mAP" in said
    files = sorted(path.name for path in (tmp_path / "run/data").iterdir())
    assert len(files) == 2
    record = json.loads((tmp_path / "run/metrics.json").read_text())
    assert record["metrics"]["coco/bbox_mAP"] >= 0
    assert train(load_tool, labels, tmp_path / "run", "--images", str(images), "--resume") == 0
    assert sorted(path.name for path in (tmp_path / "run/data").iterdir()) == files
    assert train(load_tool, labels, tmp_path / "run", "--images", str(images), "--val-share", "0.4", "--resume") == 2
    assert "holds a run of another config" in capsys.readouterr().err
    (images / "gone").mkdir(exist_ok=True)
    picture = sorted((images / "day1").iterdir())[0]
    picture.rename(images / "gone" / picture.name)
    try:
        assert train(load_tool, labels, tmp_path / "again", "--images", str(images)) == 2
    finally:
        (images / "gone" / picture.name).rename(picture)
    error = capsys.readouterr().err
    assert f"images do not exist: {picture}; put them there" in error and "--images" in error
    assert "as copied to" in error
