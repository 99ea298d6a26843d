"""mmdet, unmodified, with any PruNet as backbone: predict; train, resume, infer on digit scenes; the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from prunet_zoo import list_models
from prunet_zoo.data.scenes import write_scenes
from prunet_zoo.errors import DataError
from prunet_zoo.mm.draw import draw_detections, main

ROOT = Path(__file__).resolve().parents[2]
SCENES = ROOT / "configs" / "detection" / "retinanet_prunet-cpu-small_fpn_digit-scenes.py"
SMALL = {
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
RTMDET = """
custom_imports = dict(imports=['prunet_zoo'], allow_failed_imports=False)
default_scope = 'mmdet'
model = dict(
    type='RTMDet',
    data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
    backbone=dict(type='PruNet', arch='prunet_p0', out_indices=(1, 2, 3)),
    neck=dict(type='CSPNeXtPAFPN', out_channels=16, num_csp_blocks=1, norm_cfg=dict(type='BN')),
    bbox_head=dict(type='RTMDetSepBNHead', num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1,
        anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=[4, 8, 16]),
        bbox_coder=dict(type='DistancePointBBoxCoder'),
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0), loss_bbox=dict(type='GIoULoss'),
        norm_cfg=dict(type='BN'), exp_on_reg=True, share_conv=True, pred_kernel_size=1),
    train_cfg=dict(assigner=dict(type='DynamicSoftLabelAssigner', topk=5), allowed_border=-1, pos_weight=-1,
                   debug=False),
    test_cfg=dict(nms_pre=100, min_bbox_size=0, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=9))
"""


@pytest.fixture(autouse=True)
def _own_scope() -> Any:
    """Leave MMEngine's default scope as it was: other tests may rely on having none."""
    kept = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(kept)


def batch(size: int = 64) -> dict[str, Any]:
    """Two random images with one box each, as mmdet's pipelines give them."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    torch.manual_seed(0)
    samples = []
    for number in range(2):
        sample = DetDataSample(
            metainfo=dict(img_shape=(size, size), ori_shape=(size, size), scale_factor=(1.0, 1.0), img_id=number)
        )
        sample.gt_instances = InstanceData(bboxes=torch.tensor([[8.0, 8, 40, 44]]), labels=torch.tensor([number]))
        samples.append(sample)
    return dict(
        inputs=[torch.randint(0, 255, (3, size, size), dtype=torch.uint8) for _ in samples], data_samples=samples
    )


@pytest.mark.parametrize("arch", list_models())
def test_a_detector_takes_any_network_of_the_zoo(tmp_path: Path, arch: str) -> None:
    """One word is another; RTMDet's neck joins each map to the next, enlarged by 2, and so needs the usual sizes."""
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    (tmp_path / "config.py").write_text(RTMDET)
    cfg = Config.fromfile(tmp_path / "config.py")
    cfg.model.backbone.arch = arch
    init_default_scope("mmdet")
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        maps = model.backbone(torch.randn(1, 3, 64, 96))
        results = model.test_step(batch())
    strides = (4, 8, 16, 32)[: len(maps)]
    assert [tuple(m.shape[2:]) for m in maps] == [(64 // s, 96 // s) for s in strides]
    assert len(results) == 2


def scenes_config(tmp_path: Path, epochs: int) -> Config:
    cfg = Config.fromfile(SCENES)
    data = str(write_scenes(tmp_path / "scenes", train=8, val=4)) + "/"
    (tmp_path / "small.json").write_text(json.dumps(SMALL))  # a path: a spec within the config is slow to print
    cfg.model.backbone.arch = str(tmp_path / "small.json")
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = data
        loader.batch_size = 4
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = data + "annotations/instances_val.json"
    cfg.train_cfg.max_epochs = cfg.train_cfg.val_interval = epochs
    cfg.param_scheduler = [dict(type="ConstantLR", factor=1.0)]
    cfg.work_dir = str(tmp_path / "work")
    cfg.experiment_name = f"{tmp_path.name}-{epochs}"
    cfg.visualizer = dict(type="DetLocalVisualizer", name=f"visualizer-{tmp_path.name}-{epochs}")
    return cfg


def test_train_resume_infer_draw(tmp_path: Path) -> None:
    from mmdet.apis import DetInferencer

    runner = Runner.from_cfg(scenes_config(tmp_path, epochs=1))
    runner.train()
    assert (tmp_path / "work" / "epoch_1.pth").is_file()
    resumed = scenes_config(tmp_path, epochs=2)
    resumed.resume = True
    runner = Runner.from_cfg(resumed)
    runner.train()
    assert runner.epoch == 2
    assert runner.message_hub.log_scalars["train/loss"].data[0].size == 4  # the log history came back: 2 + 2 iterations
    checkpoint = tmp_path / "work" / "epoch_2.pth"
    config = tmp_path / "config.py"
    resumed.dump(str(config))
    work = tmp_path / "work"
    inferencer = DetInferencer(model=str(config), weights=str(checkpoint), device="cpu", show_progress=False)
    image = str(tmp_path / "scenes" / "images" / "val" / "00000.jpg")
    assert set(inferencer(image)["predictions"][0]) >= {"bboxes", "labels", "scores"}

    out = draw_detections(config, checkpoint, 3, tmp_path / "grid.png", columns=2, score_thr=0.0)
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="no image"):
        draw_detections(config, checkpoint, [], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert main([str(work), "--count", "2", "--out", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").is_file()


def test_draw_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main([str(tmp_path)]) == 2
    assert "no last_checkpoint" in capsys.readouterr().err
    (tmp_path / "config.py").write_text("model = {}")
    (tmp_path / "last_checkpoint").write_text("/gone/epoch_3.pth")
    assert main([str(tmp_path)]) == 2
    assert "epoch_3.pth, which does not exist" in capsys.readouterr().err
