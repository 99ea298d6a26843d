"""mm/network.py: what --arch and --weights do to a detector's config, mmdet's own too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mmdet
import pytest
import torch
from mmengine.config import Config

from prunet_zoo import save_weights
from prunet_zoo.mm import network
from prunet_zoo.mm.cli import ConfigError, load_config
from prunet_zoo.mm.network import set_arch, set_weights
from prunet_zoo.mm.preprocess import follow_checkpoint, read_preprocessor
from prunet_zoo.models import create_model
from prunet_zoo.spec import NetSpec, load_spec

MMDET = Path(mmdet.__file__).parent / ".mim" / "configs"
FCOS = MMDET / "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py"
YOLOX = MMDET / "yolox/yolox_tiny_8xb8-300e_coco.py"
TINY = {
    "name": "tiny",
    "input_size": 32,
    "stages": [{"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]} for _ in range(5)],
    "tail": {"out_channels": 16},
    "num_classes": 3,
}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is told to the user."""
    lines: list[str] = []
    monkeypatch.setattr(network, "print_log", lambda text, *args: lines.append(text))
    monkeypatch.setattr("prunet_zoo.mm.preprocess.print_log", lambda text, *args: lines.append(text))
    return lines


def make_weights(path: Path, mean: float | None) -> Path:
    model = create_model(NetSpec.from_dict(TINY))
    own = {"input_size": 32, "mean": [mean] * 3, "std": [0.25] * 3}
    save_weights(path, model.state_dict(), model.spec, **({} if mean is None else {"preprocess": own}))
    return path


def test_mmdets_own_config_with_arch_and_weights(tmp_path: Path, said: list[str]) -> None:
    cfg = load_config(FCOS)
    weights = make_weights(tmp_path / "w.safetensors", 0.5)
    set_arch(cfg, str(weights))
    set_weights(cfg, weights)
    backbone = cfg.model.backbone
    assert backbone.type == "PruNet" and backbone.arch.name == "tiny" and list(backbone.out_indices) == [1, 2, 3, 4]
    assert (backbone.frozen_stages, backbone.norm_eval) == (1, True)
    assert backbone.norm_cfg == {"type": "BN", "requires_grad": False}
    assert backbone.init_cfg == {"type": "Pretrained", "checkpoint": str(weights)}
    assert not {"style", "depth", "num_stages"} & backbone.keys()
    told = " ".join(said)
    assert "backbone ResNet → tiny" in told and "open-mmlab://detectron/resnet50_caffe) left out" in told
    model = cfg.model.data_preprocessor
    assert model.mean == [127.5] * 3 and model.std == [63.75] * 3 and model.bgr_to_rgb
    assert "mean [127.5, 127.5, 127.5]" in told and "BGR" in told  # the new one and the config's


def test_a_config_without_normalisation(tmp_path: Path, said: list[str]) -> None:
    cfg = load_config(YOLOX)
    set_arch(cfg, NetSpec.from_dict(TINY))
    set_weights(cfg, make_weights(tmp_path / "w.safetensors", 0.5))
    assert cfg.model.data_preprocessor.mean == [127.5] * 3 and cfg.model.data_preprocessor.batch_augments
    from mmdet.registry import MODELS

    built = MODELS.build({**cfg.model.data_preprocessor, "_scope_": "mmdet"})
    assert built.mean.flatten().tolist() == [127.5] * 3


@pytest.mark.parametrize("mean", [None, 0.4559])
def test_same_or_unknown_preprocessing_is_left(tmp_path: Path, said: list[str], mean: float | None) -> None:
    cfg = load_config(FCOS)
    values = {"mean": [116.25] * 3, "std": [63.7] * 3, "bgr_to_rgb": True}
    cfg.model.data_preprocessor.update(values)
    set_arch(cfg, NetSpec.from_dict(TINY))
    set_weights(cfg, make_weights(tmp_path / "w.safetensors", mean))
    assert {key: cfg.model.data_preprocessor[key] for key in values} == values
    assert not any("data_preprocessor" in line for line in said)


def test_random_weights_that_are_to_stay_are_warned_of(said: list[str]) -> None:
    cfg = load_config(FCOS)
    set_arch(cfg, NetSpec.from_dict(TINY))
    set_weights(cfg, None)
    assert "model.backbone.frozen_stages=-1 model.backbone.norm_eval=False" in said[-1]
    said.clear()
    cfg.model.backbone.update(frozen_stages=-1, norm_eval=False)
    set_weights(cfg, None)
    assert not said


def test_norms_that_are_of_the_old_network() -> None:
    cfg = load_config(YOLOX)
    cfg.model.backbone.norm_cfg = {"type": "SyncBN", "momentum": 0.03, "eps": 0.1}
    set_arch(cfg, NetSpec.from_dict(TINY))
    assert cfg.model.backbone.norm_cfg == {"type": "SyncBN"}
    cfg = load_config(FCOS)
    cfg.model.backbone.norm_cfg = {"type": "LN"}
    set_arch(cfg, NetSpec.from_dict(TINY))
    assert "norm_cfg" not in cfg.model.backbone


def test_a_pruned_networks_own_arguments_stay() -> None:
    cfg = load_config(FCOS)
    set_arch(cfg, "prunet_p0")
    cfg.model.backbone.update(with_cp=True, drop_path_rate=0.1, out_indices=(2, 3, 4), frozen_stages=2)
    before = {key: cfg.model.backbone[key] for key in ("with_cp", "drop_path_rate", "frozen_stages")}
    set_arch(cfg, NetSpec.from_dict(TINY))
    assert {key: cfg.model.backbone[key] for key in before} == before
    assert list(cfg.model.backbone.out_indices) == [2, 3, 4] and list(cfg.model.neck.in_channels) == [8, 8, 8]
    assert list(cfg.model.bbox_head.strides) == [8, 16, 32, 64, 128]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"type": "SSDVGG"}, "backbone of type 'SSDVGG', whose levels are not known; known: CSPDarknet"),
    ({"type": "ResNet", "out_indices": (0, 7)}, "out_indices 0, 7 of ResNet are not from 0 to 10|of ResNet are not"),
    ({"type": "ResNet", "strides": (1, 2, 1, 1)}, "one map a stride"),
]


@pytest.mark.parametrize(("backbone", "message"), REFUSED)
def test_backbones_that_cannot_be_replaced(backbone: dict[str, Any], message: str) -> None:
    cfg = load_config(FCOS)
    cfg.model.backbone = backbone
    if backbone.get("out_indices"):
        cfg.model.backbone["strides"] = (1, 2, 2, 2)
    with pytest.raises(ConfigError, match=message):
        set_arch(cfg, "prunet_p0")


def test_a_detector_without_a_neck_is_refused() -> None:
    cfg = load_config(MMDET / "faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco.py")
    with pytest.raises(ConfigError, match="without a neck"):
        set_arch(cfg, "prunet_p0")


def test_without_arch_another_backbone_is_left_alone() -> None:
    cfg = load_config(FCOS)
    before = cfg.model.to_dict()
    set_arch(cfg, None)
    assert cfg.model.to_dict() == before


def test_a_levels_config_that_is_run_again_stays(said: list[str]) -> None:
    cfg = load_config(FCOS)
    small = {**TINY, "stages": TINY["stages"][:3]}  # type: ignore[index]
    set_arch(cfg, NetSpec.from_dict(small))
    assert any("its maps have strides [4, 8] where the config asks for [4, 8, 16, 32]" in line for line in said)
    said.clear()
    before = cfg.model.to_dict()
    set_arch(cfg, None)
    assert cfg.model.to_dict() == before and not said


def test_a_test_normalises_as_the_training_did(tmp_path: Path, said: list[str]) -> None:
    cfg = load_config(FCOS)
    set_arch(cfg, load_spec("prunet_p0"))
    set_weights(cfg, make_weights(tmp_path / "w.safetensors", 0.5))
    torch.save({"state_dict": {}, "meta": {"cfg": cfg.pretty_text}}, tmp_path / "epoch_1.pth")
    other = load_config(FCOS)
    follow_checkpoint(other, tmp_path / "epoch_1.pth")
    assert other.model.data_preprocessor.mean == [127.5] * 3 and other.model.data_preprocessor.bgr_to_rgb
    said.clear()
    follow_checkpoint(other, tmp_path / "epoch_1.pth")
    assert not said


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (
            "model = dict(data_preprocessor=dict(mean=[1, 2, 3], std=[1, 1, 1], type='X'))",
            {"mean": [1, 2, 3], "std": [1] * 3},
        ),
        ("model = dict(backbone=dict(mean=[1]))", {}),
        ("model = dict(data_preprocessor=dict(mean=[open('/nowhere')], std=[1, 1, 1]))", {}),
        ("x = (", {}),
        ("\0", {}),
        ("", {}),
    ],
)
def test_a_configs_text_is_not_executed(text: str, values: dict[str, Any]) -> None:
    assert read_preprocessor(text) == values
    assert read_preprocessor("model = open('/nowhere')") == {}


def test_a_classifier_takes_no_other_model() -> None:
    with pytest.raises(ConfigError, match="--arch needs a PruNet in the config's model"):
        set_arch(Config({"model": {"type": "ImageClassifier"}}), "prunet_p0")
