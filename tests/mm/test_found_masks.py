"""Instance segmentation: what a search leaves behind, in Mask R-CNN on digit scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from prunet_zoo import NetSpec, create_model, save_weights
from prunet_zoo.data.scenes import write_scenes
from prunet_zoo.mm.network import set_arch, set_weights
from prunet_zoo.models import PrunedSpec, build_pruned

CONFIG = Path(__file__).parents[2] / "configs/detection/mask-rcnn_prunet-cpu-small_fpn_digit-scenes.py"
IRB, REP = {"type": "irb", "hidden": 24}, {"type": "rep"}
STAGES: dict[str, list[list[dict[str, Any]]]] = {
    "irb": [[{**IRB, "stride": 2}], [{**IRB, "stride": 2}], [{**IRB, "stride": 2}, IRB]],
    "rep": [[{**REP, "stride": 2}], [{**REP, "stride": 2}], [{**REP, "stride": 2}, REP]],
}  # fmt: skip


@pytest.fixture(autouse=True)
def scope() -> Any:
    kept = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(kept)


def found(folder: Path, kind: str) -> tuple[Path, Path]:
    """``spec.json`` and ``weights.safetensors`` as a search writes them; widths that differ in each layer."""
    widths = iter((12, 20, 28, 28) if kind == "irb" else (12, 20, 24, 32))
    stages = [{"blocks": [{**block, "out_channels": next(widths)} for block in stage]} for stage in STAGES[kind]]
    stem = {"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]}
    data = {"name": f"found-{kind}", "input_size": 32, "stages": [stem, *stages], "num_classes": 10}
    spec = NetSpec.from_dict({**data, "tail": {"out_channels": 16}})
    torch.manual_seed(0)
    net = create_model(spec)
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    folder.mkdir()
    (folder / "spec.json").write_text(spec.to_json())
    save_weights(folder / "weights.safetensors", net.state_dict(), spec)
    return folder / "spec.json", folder / "weights.safetensors"


def scenes_config(tmp_path: Path) -> Config:
    cfg = Config.fromfile(CONFIG)
    data = str(write_scenes(tmp_path / "scenes", train=4, val=2)) + "/"
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = data
        loader.batch_size = 2
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = data + "annotations/instances_val.json"
    cfg.train_cfg.max_epochs = cfg.train_cfg.val_interval = 1
    cfg.param_scheduler = [dict(type="ConstantLR", factor=1.0)]
    cfg.work_dir, cfg.experiment_name = str(tmp_path / "work"), tmp_path.name
    cfg.visualizer = dict(type="DetLocalVisualizer", name=f"visualizer-{tmp_path.name}")
    return cfg


@pytest.mark.parametrize("kind", ["irb", "rep"])
def test_a_found_backbone_learns_masks_and_is_deployed(tmp_path: Path, kind: str) -> None:
    spec, weights = found(tmp_path / "search", kind)
    cfg = scenes_config(tmp_path)
    set_arch(cfg, spec)
    set_weights(cfg, weights)
    assert cfg.model.neck.in_channels == [20, 28 if kind == "irb" else 32]
    runner = Runner.from_cfg(cfg)
    wanted = create_model(str(weights)).state_dict()
    runner._init_model_weights()
    body = runner.model.backbone
    own = body.state_dict()
    assert own and all(torch.equal(value, wanted[name]) for name, value in own.items())
    runner.train()
    scalars = runner.message_hub.log_scalars
    losses = scalars["train/loss_mask"].data[0]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert {"val/coco/bbox_mAP", "val/coco/segm_mAP"} <= set(scalars)

    runner.model.eval()
    batch = next(iter(runner.val_dataloader))
    with torch.no_grad():
        image = runner.model.data_preprocessor(batch, False)["inputs"]
        before = body(image)
        body.switch_to_deploy()
        after = body(image)
        results = runner.model.test_step(batch)
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(before, after, strict=True))
    assert all(r.pred_instances.masks.shape[1:] == (128, 128) for r in results)


def test_a_cut_network_of_timm_learns_masks(tmp_path: Path) -> None:
    shapes = {f"layer1.{i}.{conv}": [40, 40, 1] for i in (0, 1) for conv in ("conv1", "conv2")}
    shapes |= {f"layer1.{i}.{bn}": [40] for i in (0, 1) for bn in ("bn1", "bn2")}
    shapes |= {"conv1": [40, 3, 1], "bn1": [40], "layer2.0.conv1": [24, 40, 1], "layer2.0.bn1": [24]}
    shapes |= {"layer2.0.conv2": [128, 24, 1], "layer2.0.downsample.0": [128, 40, 1], "layer4.1.conv1": [32, 512, 1]}
    shapes |= {"layer4.1.bn1": [32], "layer4.1.conv2": [512, 32, 1]}
    data = {"name": "cut", "timm": "resnet18", "input_size": 32, "num_classes": 10, "shapes": shapes}
    spec = PrunedSpec.from_dict(data)
    torch.manual_seed(0)
    net = build_pruned(spec)
    folder = tmp_path / "search"
    folder.mkdir()
    (folder / "spec.json").write_text(spec.to_json())
    save_weights(folder / "weights.safetensors", net.state_dict(), spec)
    cfg = scenes_config(tmp_path)
    indices = cfg.model.backbone.out_indices
    set_arch(cfg, folder / "spec.json")
    set_weights(cfg, folder / "weights.safetensors")
    assert cfg.model.backbone.type == "TimmBackbone" and tuple(cfg.model.backbone.out_indices) == tuple(indices)
    assert cfg.model.neck.in_channels == [{1: 40, 2: 128, 3: 256, 4: 512}[i] for i in indices]
    cfg = Config.fromstring(cfg.pretty_text, ".py")  # as the work directory keeps it
    runner = Runner.from_cfg(cfg)
    runner._init_model_weights()
    wanted = net.state_dict()
    own = runner.model.backbone.net.state_dict()
    assert own and all(torch.equal(value, wanted[name]) for name, value in own.items())
    runner.train()
    losses = runner.message_hub.log_scalars["train/loss_mask"].data[0]
    assert len(losses) == 2 and np.isfinite(losses).all()


def test_the_masks_reach_the_loss_whole(tmp_path: Path) -> None:
    """The pipeline moves no image away from its masks: what it gives is tight in the boxes."""
    from mmdet.utils import register_all_modules

    register_all_modules()
    cfg = scenes_config(tmp_path)
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    truth = json.loads((tmp_path / "scenes/annotations/instances_train.json").read_text())["annotations"]
    seen = 0
    for batch in loader:
        for sample in batch["data_samples"]:
            instances = sample.gt_instances
            masks = torch.from_numpy(instances.masks.to_ndarray())
            for mask, box in zip(masks, instances.bboxes.tensor, strict=True):
                ys, xs = torch.nonzero(mask, as_tuple=True)
                assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                seen += 1
    assert seen == len(truth) > 0
