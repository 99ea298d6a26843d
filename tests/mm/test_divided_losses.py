"""What docs/scale.md says of each detector: the gradient of two processes with an image each, against one with both."""

from __future__ import annotations

import copy
import functools
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope
from torch import nn

CONFIGS = Path(__file__).parent / "scale_configs"
FCOS = {
    "model.type": "FCOS",
    "model.bbox_head": dict(
        type="FCOSHead",
        num_classes=10,
        in_channels=16,
        feat_channels=16,
        stacked_convs=1,
        strides=[8, 16],
        regress_ranges=((-1, 40), (40, 1e8)),
        norm_cfg=dict(type="GN", num_groups=4),
    ),
}
GFL = {
    "model.type": "GFL",
    "model.bbox_head": dict(
        type="GFLHead",
        num_classes=10,
        in_channels=16,
        feat_channels=16,
        stacked_convs=1,
        norm_cfg=dict(type="GN", num_groups=4),
        anchor_generator=dict(
            type="AnchorGenerator", ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=[8, 16]
        ),
        loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0),
        loss_dfl=dict(type="DistributionFocalLoss", loss_weight=0.25),
        reg_max=16,
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
    ),
}
DETECTORS: dict[str, tuple[str, dict[str, Any], bool]] = {  # config, changes, whether it counts over the processes
    "ATSS": ("atss.py", {}, True),
    "GFL": ("atss.py", GFL, True),
    "FCOS": ("atss.py", FCOS, True),
    "RTMDet": ("rtmdet.py", {}, True),
    "YOLOX": ("yolox.py", {}, True),
    "RetinaNet": ("retinanet.py", {}, False),
}


@pytest.fixture(autouse=True)
def _mmdet_scope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    kept = dict(DefaultScope._instance_dict)
    init_default_scope("mmdet")
    monkeypatch.setenv("SCENES", str(tmp_path))
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(kept)


@functools.cache
def read(file: str) -> Config:
    return Config.fromfile(CONFIGS / file)


def read_config(file: str) -> Config:
    return copy.deepcopy(read(file))


def gradient(name: str, images: list[int]) -> dict[str, torch.Tensor]:
    """The gradient of the loss of some of the two images, with fixed BatchNorm statistics."""
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    file, changes, _ = DETECTORS[name]
    cfg = read_config(file)
    for key, value in changes.items():
        part, last = key.split(".")
        cfg[part].pop(last)
        cfg[part][last] = value
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    if (
        name == "GFL"
    ):  # boxes are weighted by scores; where these sum to less than 1, mmdet divides by 1 (docs/scale.md)
        nn.init.zeros_(model.bbox_head.gfl_cls.bias)
    for module in model.train().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    boxes = [[[8.0, 8, 40, 44], [20, 20, 90, 90], [60, 70, 100, 120]], [[30.0, 30, 110, 80]]]
    samples = []
    for number in images:
        meta = dict(img_shape=(128, 128), ori_shape=(128, 128), batch_input_shape=(128, 128), pad_shape=(128, 128))
        sample = DetDataSample(metainfo={**meta, "scale_factor": (1.0, 1.0), "img_id": number})
        labels = torch.arange(len(boxes[number]))
        sample.gt_instances = InstanceData(bboxes=torch.tensor(boxes[number]), labels=labels)
        samples.append(sample)
    total, _ = model.parse_losses(model.loss(pixels[images], samples))
    total.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def one_of_two(name: str, number: int, port: int, out: Path) -> None:
    """What each of two processes does: the gradient of its image, averaged as DDP averages."""
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, number == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=number, world_size=2)
    mine = gradient(name, [number])
    for value in mine.values():
        torch.distributed.all_reduce(value)
        value /= 2
    if number == 0:
        torch.save(mine, out)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", DETECTORS)
def test_gradient_of_two_processes(name: str, free_port: int, tmp_path: Path) -> None:
    read(DETECTORS[name][0])  # before the processes are forked, in which Python's parser may fail
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=one_of_two, args=(name, i, free_port, tmp_path / "two.pth")) for i in range(2)]
    for job in jobs:
        job.start()
    one = gradient(name, [0, 1])
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]
    two = torch.load(tmp_path / "two.pth", weights_only=True)
    assert one.keys() == two.keys()
    size = max(float(value.abs().max()) for value in one.values())
    off = max(float((one[key] - two[key]).abs().max()) for key in one) / size
    assert off < 1e-4 if DETECTORS[name][2] else off > 1e-2
