"""A detector that finds nothing has mAP 0: in the log, in metrics.json, as the best so far, in several processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope

from prunet_zoo.mm.metrics import NoDetectionsHook, TopKAccuracy, coco_keys
from prunet_zoo.mm.pipeline_report import read_scalars
from prunet_zoo.mm.training import summary

CONFIGS = Path(__file__).parent / "scale_configs"
NOTHING = ("model.test_cfg.score_thr=2", "log_level=INFO")
ZEROS = {f"coco/bbox_{name}": 0.0 for name in ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")}
SAID = "no box scored above score_thr: mAP 0"


@pytest.mark.parametrize("count", [1, 2])
def test_training_records_zero(run: Callable[..., Any], scenes: Path, tmp_path: Path, count: int) -> None:
    out = tmp_path / "run"
    options = [*NOTHING, "default_hooks.checkpoint.save_best=coco/bbox_mAP_50", "train_cfg.max_epochs=1"]
    results = run("train", [str(CONFIGS / "atss.py"), "--work-dir", str(out), "--cfg-options", *options], count=count)
    text = "".join(output for _, output in results)
    assert [status for status, _ in results] == [0] * count, text
    assert text.count(SAID) == 1 and "coco/bbox_mAP_50 0," in text
    record = json.loads((out / "metrics.json").read_text())
    assert record["metrics"] == {"epoch": 1, **ZEROS} == record["best"]
    assert (out / "best.safetensors").is_file() and list(out.glob("best_coco_bbox_mAP_50_*.pth"))
    assert read_scalars(out)["coco/bbox_mAP"] == [(1, 0.0)]  # what the reports draw


def test_testing_records_zero(run: Callable[..., Any], scenes: Path, tmp_path: Path) -> None:
    weights = Path(__file__).resolve().parents[2] / "checkpoints" / "digits_detector.safetensors"
    out = tmp_path / "out.json"
    argv = [str(CONFIGS / "shipped.py"), str(weights), "--json", str(out), "--work-dir", str(tmp_path / "w")]
    ((status, text),) = run("test", [*argv, "--cfg-options", *NOTHING])
    assert status == 0 and text.count(SAID) == 1 and "coco/bbox_mAP 0, " in text, text
    assert json.loads(out.read_text())["metrics"] == ZEROS


OPTIONS: list[dict[str, Any]] = [
    {"metric": "bbox"},
    {"metric": ["bbox", "segm"], "classwise": True},
    {"metric": ["proposal", "bbox"], "metric_items": None, "prefix": "mine"},
    {"metric": "bbox", "metric_items": ["mAP", "AR_s@1000"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_keys_are_those_that_mmdet_gives(scenes: Path, options: dict[str, Any]) -> None:
    metric, samples = coco_metric(scenes, options)
    metric.process({}, samples)
    found = metric.evaluate(len(samples))
    assert found and list(dict.fromkeys(coco_keys(metric))) == list(found)  # in mmdet's order: save_best='auto'
    for sample in samples:
        sample["pred_instances"] = {key: value[:0] for key, value in sample["pred_instances"].items()}
    metric.process({}, samples)
    nothing = metric.evaluate(len(samples))
    NoDetectionsHook._fill(SimpleNamespace(evaluator=SimpleNamespace(metrics=[metric])), nothing)
    assert nothing.keys() == found.keys() and not any(nothing.values())


def coco_metric(scenes: Path, options: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """mmdet's metric on the validation scenes, and for each a box (with its mask) over the whole image."""
    from mmdet.evaluation import CocoMetric
    from pycocotools import mask

    init_default_scope("mmdet")
    file = scenes / "annotations" / "instances_val.json"
    data = json.loads(file.read_text())
    for item in data["annotations"]:
        x, y, w, h = item["bbox"]
        item["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    own = file.with_name("with_masks.json")
    own.write_text(json.dumps(data))
    metric = CocoMetric(ann_file=str(own), **options)
    metric.dataset_meta = {"classes": tuple(item["name"] for item in data["categories"])}
    samples = []
    for image in data["images"]:
        size = (image["height"], image["width"])
        found = {
            "bboxes": torch.tensor([[0.0, 0, size[1], size[0]]]),
            "scores": torch.tensor([0.5]),
            "labels": torch.tensor([0]),
            "masks": [mask.encode(np.ones(size, dtype=np.uint8, order="F"))],
        }
        samples.append({"img_id": image["id"], "ori_shape": size, "pred_instances": found})
    return metric, samples


def test_other_metrics_are_left_alone(scenes: Path) -> None:
    assert list(coco_keys(TopKAccuracy())) == []
    metric, _ = coco_metric(scenes, {"format_only": True, "outfile_prefix": "x"})
    assert list(coco_keys(metric)) == []  # it is to write a file, not to give figures
    metrics = {"top1": 50.0}
    NoDetectionsHook().after_val_epoch(SimpleNamespace(val_loop=SimpleNamespace()), metrics)  # a loop of its own
    assert metrics == {"top1": 50.0}
    assert summary(metrics) == "top1 50" and summary({}) == "not evaluated"
