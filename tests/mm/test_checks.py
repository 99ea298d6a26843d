"""Ordinary faults of data and weights: one line that names them, before anything is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from PIL import Image

from prunet_zoo.data.scenes import write_scenes
from prunet_zoo.errors import CheckpointError, DataError
from prunet_zoo.mm import draw, network, training
from prunet_zoo.mm.checks import check_classes, check_files, check_pretrained
from prunet_zoo.mm.cli import load_config, run_tool
from prunet_zoo.mm.coco_checks import check_coco
from prunet_zoo.zoo import download
from prunet_zoo.zoo.fetch import DownloadError

ROOT = Path(__file__).resolve().parents[2]
COCO = ROOT / "configs/detection/retinanet_prunet-p0_fpn_1x_coco.py"
SCENES = ROOT / "configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py"
QUIET = {"log_level": "WARNING", "visualizer": None}


def fails(cfg: Config, capsys: pytest.CaptureFixture[str], work_dir: Path, checkpoint: Path | None = None) -> str:
    """What a tool says of this config in its one line."""
    (line,) = fails_with_lines(cfg, capsys, work_dir, checkpoint)
    return line


def fails_with_lines(
    cfg: Config, capsys: pytest.CaptureFixture[str], work_dir: Path, checkpoint: Path | None = None
) -> list[str]:
    """What a tool says of this config, in a line or, where the data have several problems, in more."""

    def main(argv: object) -> None:
        cfg.work_dir, cfg.experiment_name = str(work_dir), work_dir.name
        network.set_arch(cfg, None)
        if checkpoint is None:
            training.train(cfg)
        else:
            training.test(cfg, checkpoint)

    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_tool(main)
    shown = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2, shown
    place = max(i for i, line in enumerate(shown) if line.startswith("error: "))
    return shown[place:]


def coco_json(files: list[str], classes: Any, width: int = 64, height: int = 48) -> dict[str, Any]:
    """One box of the first class in each image."""
    return {
        "images": [{"id": i, "file_name": f, "width": width, "height": height} for i, f in enumerate(files)],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [4, 5, 20, 22], "area": 440, "iscrowd": 0}
            for i in range(len(files))
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
    }


def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*args: object) -> None:
        pytest.fail("a model was built before the data was looked at")

    monkeypatch.setattr(training.Runner, "from_cfg", build)


def test_coco_config_without_coco(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_model(monkeypatch)
    monkeypatch.chdir(tmp_path)
    message = fails(load_config(COCO), capsys, tmp_path / "run")
    assert "annotation file data/coco/annotations/instances_train2017.json does not exist" in message
    assert "--cfg-options train_dataloader.dataset.data_root=" in message
    annotations = tmp_path / "data/coco/annotations"
    annotations.mkdir(parents=True)
    for number, part in enumerate(("train", "val")):
        content = coco_json([f"{number}.png"], CocoDataset.METAINFO["classes"])
        (annotations / f"instances_{part}2017.json").write_text(json.dumps(content))
    assert "image folder data/coco/train2017 does not exist" in fails(load_config(COCO), capsys, tmp_path / "run")
    for part in ("train", "val"):
        (tmp_path / "data/coco" / f"{part}2017").mkdir()
    message = "\n".join(fails_with_lines(load_config(COCO), capsys, tmp_path / "run"))
    assert "1 of 1 images do not exist: data/coco/train2017/0.png" in message
    assert "1 of 1 images do not exist: data/coco/val2017/1.png" in message
    for number, part in enumerate(("train", "val")):
        Image.new("RGB", (64, 48), (number, 9, 9)).save(tmp_path / "data/coco" / f"{part}2017" / f"{number}.png")
    monkeypatch.setenv("PRUNET_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download, "addresses", lambda entry: [str(tmp_path / "nowhere" / entry.weights.file)])
    with pytest.raises(DownloadError, match=rf"put it at\s+{tmp_path}/home/gpunet_p0_pyt_ckpt_21.12.0_amp.zip"):
        training.train(load_config(COCO, {"work_dir": str(tmp_path / "run")}))
    cfg = load_config(COCO, {"model.backbone.init_cfg.checkpoint": "nowhere.safetensors"})
    message = fails(cfg, capsys, tmp_path / "run")
    assert "weights file nowhere.safetensors does not exist (model.backbone.init_cfg)" in message
    cfg = load_config(COCO, {"model.backbone.init_cfg": None})
    check_pretrained(cfg.model)
    check_pretrained(dict(backbone=dict(init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"))))
    with pytest.raises(CheckpointError, match=r"model\.necks\.1\.init_cfg"):
        check_pretrained(dict(necks=[{}, dict(init_cfg=dict(type="Pretrained", checkpoint="nowhere.pth"))]))


def test_paths_at_any_depth_and_other_stores(tmp_path: Path) -> None:
    inner = dict(type="CocoDataset", data_root=str(tmp_path), ann_file="a.json", data_prefix=dict(img=""))
    cfg: dict[str, Any] = dict(train_dataloader=dict(dataset=dict(type="RepeatDataset", dataset=inner)))
    with pytest.raises(DataError, match=r"a\.json does not exist \(train_dataloader\.dataset\.dataset\.ann_file\)"):
        check_files(cfg, ("train",))
    check_files(cfg, ("val", "test"))  # the run does not use them
    (tmp_path / "a.json").write_text("{}")
    check_files(cfg, ("train",))
    inner["data_root"] = "s3://bucket"
    check_files(cfg, ("train",))
    inner.update(data_root="/nowhere", backend_args=dict(backend="petrel"))
    check_files(cfg, ("train",))
    cfg = dict(val_evaluator=[dict(type="CocoMetric", ann_file="/nowhere/b.json")])
    with pytest.raises(DataError, match=r"b\.json does not exist .*--cfg-options val_evaluator\.0\.ann_file="):
        check_files(cfg, ("val",))


def scenes_config(root: Path, **options: Any) -> Config:
    cfg = load_config(SCENES, {**QUIET, "train_cfg.max_epochs": 1, "train_dataloader.batch_size": 2, **options})
    for part in ("train", "val", "test"):
        cfg[f"{part}_dataloader"].dataset.data_root = f"{root}/"
    for part in ("val", "test"):
        cfg[f"{part}_evaluator"].ann_file = f"{root}/annotations/instances_val.json"
    return cfg


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """COCO data of the classes cat and dog: four images to train on and three to validate on."""
    for number, (part, count) in enumerate((("train", 4), ("val", 3))):
        (tmp_path / part).mkdir()
        files = [f"{i}.png" for i in range(count)]
        for i, file in enumerate(files):
            Image.new("RGB", (64, 48), (100 * number, i, 9)).save(tmp_path / part / file)
        (tmp_path / f"{part}.json").write_text(json.dumps(coco_json(files, ("cat", "dog"))))
    return tmp_path


def own_config(root: Path) -> dict[str, Any]:
    cfg: dict[str, Any] = {"model": dict(bbox_head=dict(num_classes=2), rpn_head=dict(num_classes=1))}
    for part in ("train", "val"):
        dataset = dict(
            type="CocoDataset", data_root=str(root), ann_file=f"{part}.json", data_prefix=dict(img=part),
            metainfo=dict(classes=("cat", "dog")), pipeline=[dict(type="LoadAnnotations", with_bbox=True)],
        )  # fmt: skip
        cfg[f"{part}_dataloader"] = dict(dataset=dataset)
    cfg["val_evaluator"] = dict(type="CocoMetric", ann_file=str(root / "val.json"), metric="bbox")
    return cfg


def rewrite(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def problems(cfg: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        check_coco(cfg, ("train", "val"))
    return str(caught.value)


def test_sound_coco_data_are_described(own: Path) -> None:
    lines = check_coco(own_config(own), ("train", "val"))
    assert lines == [
        f"train: {own}/train.json: 4 images, 4 annotations, 2 classes (cat, dog)",
        f"val: {own}/val.json: 3 images, 3 annotations, 2 classes (cat, dog)",
    ]


def test_all_problems_are_said_at_once_and_at_any_depth(own: Path) -> None:
    cfg = own_config(own)
    inner = cfg["train_dataloader"]["dataset"]
    wrapped = dict(type="MultiImageMixDataset", dataset=dict(type="RepeatDataset", times=2, dataset=inner))
    cfg["train_dataloader"]["dataset"] = dict(type="ConcatDataset", datasets=[wrapped])
    check_coco(cfg, ("train", "val"))
    rewrite(own / "train.json", lambda d: d["categories"][0].update(name="Cat"))
    (own / "val" / "1.png").unlink()
    message = problems(cfg)
    assert message.startswith("the data has 2 problems that must be mended first\n  train data (")
    assert "1 of 2 class names of the config are no category" in message and "'cat' (meant 'Cat'?)" in message
    assert "\n  val data (" in message and f"1 of 3 images do not exist: {own}/val/1.png" in message
    assert "--cfg-options val_dataloader.dataset.data_root=" in message
    cfg["data_check"] = False
    assert check_coco(cfg, ("train", "val")) == []


def test_classes_as_the_config_gives_them(own: Path) -> None:
    cfg = own_config(own)
    metainfo = cfg["train_dataloader"]["dataset"]["metainfo"]
    metainfo["classes"] = "cat"  # ("cat") is no tuple
    assert "('cat',) with a comma" in problems(cfg)
    metainfo["classes"] = ["cat", "cat"]
    assert "has names more than once: 'cat'" in problems(cfg)
    (own / "names.txt").write_text("cat\ndog\n")
    metainfo["classes"] = str(own / "names.txt")
    check_coco(cfg, ("train",))
    del metainfo["classes"]  # mmdet then takes COCO's 80
    assert "78 of 80 class names of the config" in problems(cfg)
    assert "it has 80 classes, but model.bbox_head.num_classes is 2" in problems(cfg)


def test_heads_of_another_number_of_classes(own: Path) -> None:
    cfg = own_config(own)
    cfg["model"]["roi_head"] = dict(
        bbox_head=[dict(num_classes=2), dict(num_classes=80)], mask_head=dict(num_classes=3)
    )
    message = problems(cfg)
    assert "model.roi_head.bbox_head.1.num_classes is 80, model.roi_head.mask_head.num_classes is 3" in message
    assert "--cfg-options model.roi_head.bbox_head.1.num_classes=2" in message
    for part in ("train", "val"):
        cfg[f"{part}_dataloader"]["dataset"]["return_classes"] = True  # names are read as text (Grounding DINO)
    check_coco(cfg, ("train", "val"))


def test_the_evaluator_reads_another_file(own: Path) -> None:
    cfg = own_config(own)
    cfg["val_evaluator"] = [dict(type="CocoMetric", ann_file=str(own / "train.json"), metric="bbox")]
    assert f"val_evaluator scores against {own}/train.json, which lists other images" in problems(cfg)
    shutil.copy(own / "val.json", own / "copy.json")
    cfg["val_evaluator"][0]["ann_file"] = str(own / "copy.json")
    check_coco(cfg, ("train", "val"))


def test_masks_where_they_are_trained_or_scored(own: Path) -> None:
    cfg = own_config(own)
    cfg["train_dataloader"]["dataset"]["pipeline"][0]["with_mask"] = True
    assert problems(cfg).count("4 of 4 annotations have no segmentation") == 1
    cfg = own_config(own)
    cfg["val_evaluator"]["metric"] = ["bbox", "segm"]
    assert problems(cfg).count("3 of 3 annotations have no segmentation") == 1


def test_what_scoring_needs(own: Path) -> None:
    for part in ("train", "val"):
        rewrite(own / f"{part}.json", lambda d: d["annotations"][0].pop("iscrowd"))
    message = problems(own_config(own))
    assert message.count("iscrowd") == 1 and f"val data ({own}/val.json)" in message


def test_images_to_train_and_validate_on_are_warned_of(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("prunet_zoo.mm.coco_checks.print_log", lambda text, *a: said.append(text))
    check_coco(own_config(own), ("train", "val"))
    assert said == []  # files of one name are not one image
    shutil.copy(own / "train/2.png", own / "val/0.png")
    check_coco(own_config(own), ("train", "val"))
    assert len(said) == 1 and "1 of 3 validation images are training images too" in said[0]
    assert f"{own}/train/2.png = {own}/val/0.png" in said[0]


def test_images_of_the_scenes_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_scenes(tmp_path / "scenes", train=4, val=2)
    remedy = f"remove {root}, then run again: the digit scenes are made anew"
    for number, workers in enumerate((0, 1)):
        path = sorted((root / "images/train").iterdir())[0]
        path.rename(tmp_path / "kept.jpg")
        cfg = scenes_config(root, **{"train_dataloader.num_workers": workers})
        cfg.train_dataloader.persistent_workers = False
        if not number:
            message = "\n".join(fails_with_lines(cfg, capsys, tmp_path / "run"))
            assert f"1 of 4 images do not exist: {path}" in message and remedy in message
        cfg.data_check = False  # as if it were lost during the run
        message = fails(cfg, capsys, tmp_path / f"late{number}")
        assert "the data is not complete" in message and str(path) in message and remedy in message
        (tmp_path / "kept.jpg").rename(path)
    no_model(monkeypatch)
    shutil.rmtree(root / "images/train")
    message = fails(scenes_config(root), capsys, tmp_path / "run2")
    assert f"image folder {root}/images/train does not exist" in message and remedy in message


def test_a_file_missing_elsewhere_is_the_programs_fault() -> None:
    with pytest.raises(FileNotFoundError):
        run_tool(lambda argv: int(Path("/nowhere/at/all").read_text()))


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "pets"
    for part in ("train", "val"):
        for number, name in enumerate(("cat", "dog", "owl")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (32, 32), (60 * number, 20 * i, 90)).save(folder / f"{i}.png")
    return root


def pets_config(tiny_config: Path, root: Path, classes: int, batch: int = 4) -> Config:
    cfg = load_config(tiny_config, {**QUIET, "model.num_classes": classes, "train_cfg.max_epochs": 1})
    for part in ("train", "val", "test"):
        split = "train" if part == "train" else "val"
        cfg[f"{part}_dataloader"].dataset = dict(
            type="ImageFolderDataset", data_root=str(root), split=split, transform=dict(type="cifar", size=32)
        )
    cfg.train_dataloader.batch_size = batch
    return cfg


@pytest.mark.parametrize("classes", [2, 10])
def test_number_of_classes(
    tiny_config: Path, three_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: int
) -> None:
    message = fails(pets_config(tiny_config, three_classes, classes), capsys, tmp_path / f"run {classes}")
    assert f"{three_classes} has 3 classes (cat, dog, owl), the model's num_classes is {classes}" in message
    assert "--cfg-options model.num_classes=3" in message


def test_the_right_number_of_classes_trains_and_tests(
    tiny_config: Path, three_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = pets_config(tiny_config, three_classes, 3)
    cfg.work_dir, cfg.experiment_name = str(tmp_path / "run"), "pets"
    network.set_arch(cfg, None)
    assert training.train(cfg)["metrics"]["epoch"] == 1
    other = pets_config(tiny_config, three_classes, 4)
    assert "has 3 classes" in fails(other, capsys, tmp_path / "test", tmp_path / "run" / "last.safetensors")


def test_super_network_of_another_number_of_classes() -> None:
    from types import SimpleNamespace

    from torch.utils.data import DataLoader

    from prunet_zoo.mm.datasets import DigitsDataset
    from prunet_zoo.mm.supernet_model import SuperNetClassifier

    digits = DataLoader(DigitsDataset("test"))
    for where in ("dataloader", "arch_dataloader", "val_dataloader"):
        runner: Any = SimpleNamespace(train_loop=SimpleNamespace(**{where: digits}), val_loop=None)
        runner.model = SuperNetClassifier("prunet_cpu_small", num_classes=10)
        check_classes(runner)
        runner.model = SuperNetClassifier("prunet_cpu_small", num_classes=12)
        with pytest.raises(DataError, match=r"10 classes .* num_classes is 12"):
            check_classes(runner)


def test_fewer_images_than_a_batch(
    tiny_config: Path, three_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(pets_config(tiny_config, three_classes, 3, batch=13), capsys, tmp_path / "few")
    assert "12 training images give no batch of 13" in message and "train_dataloader.batch_size" in message


def test_drawing_what_is_no_detector(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(tiny_config, tmp_path / "config.py")
    (tmp_path / "epoch_1.pth").write_bytes(b"")
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "epoch_1.pth"))
    assert draw.main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "has no detector to draw with, but a model of type 'PruNetClassifier'" in message
    assert "detector's training run" in message and len(message.strip().splitlines()) == 1
    assert draw.main(["--config", "nowhere.py", "--checkpoint", str(tmp_path / "epoch_1.pth")]) == 2
    assert "config file nowhere.py does not exist" in capsys.readouterr().err


def test_drawing_without_the_images(tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "scenes", train=1, val=2)
    image = sorted((root / "images/val").iterdir())[0]
    image.unlink()
    with pytest.raises(DataError, match=rf"image {image} does not exist; remove {root}"):
        draw.draw_detections(scenes_config(root), "unused.pth", 2, tmp_path / "out.png")
    shutil.rmtree(root / "images/val")
    with pytest.raises(DataError, match=r"image folder .*images/val does not exist"):
        draw.draw_detections(scenes_config(root), "unused.pth", 2, tmp_path / "out.png")
