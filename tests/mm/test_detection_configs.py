"""Every detector's COCO config with every backbone: names, preprocessing, weights, schedule; builds, trains, predicts.

By default each detector runs with prunet_p0, and RetinaNet with each backbone; the other pairs run with ``-m slow``.
"""

from __future__ import annotations

import ast
import copy
import functools
import math
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mmdet
import mmengine.config.utils
import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.structures import InstanceData

from prunet_zoo import load_spec
from prunet_zoo.mm.channels import follow_spec
from prunet_zoo.mm.network import register_mmdet, set_arch, set_weights
from prunet_zoo.mm.timm_backbone import timm_channels
from prunet_zoo.models import load_state, read_weights_spec
from prunet_zoo.zoo.fetch import DownloadError
from prunet_zoo.zoo.index import find_model

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "detection"


class Detector(NamedTuple):
    """A detector's type, its part of the configs' names behind the backbone, and what its base config is to hold."""

    type: str
    suffix: str
    batch: int  # images of all GPUs in one step
    frozen: int = 1  # stages
    fixed_norms: bool = True
    first_level: int = 1  # 1 is stride 4


DETECTORS = {
    "retinanet": Detector("RetinaNet", "fpn_1x", 16),
    "fcos": Detector("FCOS", "fpn_gn-head_1x", 16),
    "atss": Detector("ATSS", "fpn_1x", 16),
    "gfl": Detector("GFL", "fpn_1x", 16),
    "faster-rcnn": Detector("FasterRCNN", "fpn_1x", 16),
    "mask-rcnn": Detector("MaskRCNN", "fpn_1x", 16),
    "cascade-rcnn": Detector("CascadeRCNN", "fpn_1x", 16),
    "rtmdet": Detector("RTMDet", "8xb32-300e", 256, frozen=-1, fixed_norms=False, first_level=2),
    "yolox": Detector("YOLOX", "8xb8-300e", 64, frozen=-1, fixed_norms=False, first_level=2),
    "deformable-detr": Detector("DeformableDETR", "16xb2-50e", 32, first_level=2),
    "dino-4scale": Detector("DINO", "8xb2-12e", 16, first_level=2),
}
BACKBONES = {
    "prunet-p0": "prunet_p0",
    "prunet-p1": "prunet_p1",
    "gpunet-0": "gpunet_0",
    "gpunet-1": "gpunet_1",
    "efficientnet-b0": "efficientnet_b0.ra_in1k",
    "efficientnet-b1": "efficientnet_b1.ft_in1k",
    "efficientnet-b2": "efficientnet_b2.ra_in1k",
    "efficientnetv2-s": "tf_efficientnetv2_s.in1k",
    "r50": "ResNet-50",
}
PAIRS = [(detector, backbone) for detector in DETECTORS for backbone in BACKBONES]


def path_of(detector: str, backbone: str) -> Path:
    return CONFIGS / f"{detector}_{backbone}_{DETECTORS[detector].suffix}_coco.py"


@pytest.fixture(autouse=True)
def mmdet_scope(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """mmdet's registries, and MMEngine's default scope as it was; mmdet's list of configs is read once, for speed."""
    monkeypatch.setattr(mmengine.config.utils, "_get_cfg_metainfo", read_metainfo)
    kept = dict(DefaultScope._instance_dict)
    register_mmdet()
    init_default_scope("mmdet")
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(kept)


read_metainfo = functools.cache(mmengine.config.utils._get_cfg_metainfo)


@functools.cache
def read_base(path: Path | str) -> Config:
    """Of a path, or of mmdet's by its name "mmdet::…"."""
    if isinstance(path, str):
        path = Path(mmdet.__file__).parent / ".mim" / "configs" / path.removeprefix("mmdet::")
    return Config.fromfile(path)


def test_every_detector_has_every_backbone() -> None:
    assert {p.name for p in CONFIGS.glob("*_coco.py")} == {path_of(*pair).name for pair in PAIRS}


@pytest.mark.parametrize(("detector", "backbone"), PAIRS)
def test_a_config_says_what_its_name_says(detector: str, backbone: str) -> None:
    """A file is its base and a backbone, so the bases are read once, and the backbone merged as MMEngine does."""
    path, wanted = path_of(detector, backbone), DETECTORS[detector]
    content = runpy.run_path(str(path))
    assert {key for key in content if not key.startswith("__")} == {"_base_", "model"}
    assert set(content["model"]) <= {"backbone", "data_preprocessor"}
    assert content["_base_"] == f"../_base_/detectors/{detector}_{wanted.suffix}_coco.py"
    assert len(path.read_text().splitlines()) <= 20
    about = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert "COCO" in about and "epochs" in about
    assert (timm_label(backbone) if "efficientnet" in backbone else BACKBONES[backbone]) in about

    cfg = copy.deepcopy(read_base((CONFIGS / content["_base_"]).resolve()))
    cfg.merge_from_dict({"model": content["model"]})
    assert cfg.model.type == wanted.type
    assert (cfg.optim_wrapper.type, cfg.auto_scale_lr) == (
        "AmpOptimWrapper",
        {"enable": False, "base_batch_size": wanted.batch},
    )
    assert cfg.train_dataloader.batch_size == int((wanted.suffix.partition("b")[2].partition("-")[0]) or 2)
    assert cfg.default_scope == "mmdet" and cfg.custom_imports["imports"] == ["prunet_zoo"]
    body = cfg.model.backbone
    assert (body.frozen_stages, body.norm_eval) == (wanted.frozen, wanted.fixed_norms)
    mean, std, channels = check_backbone(body, backbone, wanted.first_level)
    prepared = cfg.model.data_preprocessor
    assert prepared.mean == pytest.approx([255 * m for m in mean]) and prepared.bgr_to_rgb
    assert prepared.std == pytest.approx([255 * s for s in std])
    neck = follow_spec(cfg.model, "mmdet").neck
    assert (neck[0] if isinstance(neck, list) else neck).in_channels == channels


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a config by their dotted names."""
    if isinstance(value, dict) or (isinstance(value, list | tuple) and any(isinstance(v, dict) for v in value)):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(child, f"{name}.{key}")
    else:
        yield name.lstrip("."), list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("detector", DETECTORS)
def test_resnet_configs_are_mmdets_but_for_what_their_base_says(detector: str) -> None:
    """What mmdet's users have measured with ResNet-50 is of mmdet's config."""
    path = path_of(detector, "r50")
    base = (CONFIGS / runpy.run_path(str(path))["_base_"]).resolve()
    name = runpy.run_path(str(base))["_base_"]
    ours, theirs = (dict(leaves(read_base(p).to_dict())) for p in (path, name))
    different = {key for key in ours.keys() | theirs.keys() if ours.get(key, "-") != theirs.get(key, "-")}
    different = {key for key in different if "_scope_" not in key and not key.startswith("custom_imports.")}
    # 4 stages are ResNet's own default, as is an auto_scale_lr that is not enabled
    different -= {"optim_wrapper.type", "model.backbone.num_stages", "auto_scale_lr.enable"}
    about = ast.get_docstring(ast.parse(base.read_text())) or ""
    own = {key.removeprefix("model.").partition(".")[0] for key in different}
    expected = {"retinanet": {"neck"}, "fcos": {"backbone", "data_preprocessor"}}.get(detector, set())
    if detector in ("rtmdet", "yolox"):
        expected = {"backbone", "data_preprocessor", "neck"} | ({"checkpoint", "auto_scale_lr"} & own)
        assert ("auto_scale_lr" in own) == ("auto_scale_lr" in about)
    assert own == expected
    assert ("mmdet's own config but for mixed precision" in about) == (not own)
    if detector == "retinanet":
        assert different == {"model.neck.add_extra_convs"}


def timm_label(backbone: str) -> str:
    return backbone.replace("efficientnet", "EfficientNet").replace("v2", "V2").replace("-b", "-B").replace("-s", "-S")


def check_backbone(body: Any, name: str, first: int) -> tuple[Any, Any, list[int]]:
    """See that a backbone's config is the one of its name; returns mean and std (of 1) and channels as published."""
    levels = tuple(range(first, 5))
    if name == "r50":
        assert (body.type, body.depth, body.init_cfg.checkpoint) == ("ResNet", 50, "torchvision://resnet50")
        assert body.out_indices == tuple(level - 1 for level in levels)
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), [128 << level for level in levels]
    assert body.out_indices == levels
    if "efficientnet" in name:
        assert (body.type, body.model_name, body.pretrained) == ("TimmBackbone", BACKBONES[name], True)
        published = timm.models.get_pretrained_cfg(body.model_name)
        assert published is not None and published.has_weights
        return published.mean, published.std, timm_channels(body.model_name, levels)
    arch = BACKBONES[name]
    assert (body.type, body.arch) == ("PruNet", arch)
    assert body.init_cfg == {"type": "Pretrained", "checkpoint": f"prunet://{arch}"}
    preprocess = find_model(arch).preprocess
    return preprocess.mean, preprocess.std, list(load_spec(arch).channels(levels))


# ---- one step, one prediction


def shrunk(path: Path) -> Config:
    """A config without downloads, and with fewer proposals and queries than 64 px images have places for."""
    cfg = Config.fromfile(path)
    cfg.model.backbone.pop("init_cfg", None)
    cfg.model.backbone.pop("pretrained", None)
    if cfg.model.backbone.type == "ResNet":
        cfg.model.backbone.zero_init_residual = False  # else blocks begin without gradients inside
    if "num_queries" in cfg.model:
        cfg.model.num_queries = 20
    if "rpn_head" in cfg.model:
        cfg.model.train_cfg.rpn_proposal.max_per_img = cfg.model.test_cfg.rpn.max_per_img = 20
        rcnn = cfg.model.train_cfg.rcnn
        for part in rcnn if isinstance(rcnn, list) else [rcnn]:
            part.sampler.num = 16
    return cfg


def batch(masks: bool, size: int = 64) -> dict[str, Any]:
    """Two random images with two boxes each, as mmdet's pipelines give them."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    torch.manual_seed(0)
    boxes = torch.tensor([[8.0, 8, 40, 44], [30, 20, 62, 60]])
    samples = []
    for number in range(2):
        shape = dict(img_shape=(size, size), ori_shape=(size, size), batch_input_shape=(size, size))
        sample = DetDataSample(metainfo=dict(scale_factor=(1.0, 1.0), img_id=number, **shape))
        sample.gt_instances = InstanceData(bboxes=boxes.clone(), labels=torch.tensor([number, 79]))
        if masks:
            drawn = np.zeros((2, size, size), np.uint8)
            for layer, (x1, y1, x2, y2) in zip(drawn, boxes.int().tolist(), strict=True):
                layer[y1:y2, x1:x2] = 1
            sample.gt_instances.masks = BitmapMasks(drawn, size, size)
        samples.append(sample)
    images = [torch.randint(0, 255, (3, size, size), dtype=torch.uint8) for _ in samples]
    return dict(inputs=images, data_samples=samples)


@pytest.fixture
def first_iteration() -> Iterator[None]:
    """YOLOX's random resizing asks the running loop for its iteration."""
    hub = MessageHub.get_current_instance()
    hub.update_info("iter", 0)
    yield
    hub.runtime_info.pop("iter")


def statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if name.endswith("running_mean")}


def check_gradients(model: torch.nn.Module) -> None:
    """Every trainable parameter has a finite gradient; that of the backbone's is not zero.

    Heads may have some that are: boxes of a few px reach no level but the first ones, and a branch that begins with
    zero weights (DETR's boxes) passes nothing on to its layers before.
    """
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    assert [n for n, gradient in gradients.items() if n.startswith("backbone.") and not gradient.any()] == []
    assert [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []


@pytest.mark.usefixtures("first_iteration")
@pytest.mark.parametrize(
    ("detector", "backbone"),
    [
        pytest.param(*pair, marks=() if pair[0] == "retinanet" or pair[1] == "prunet-p0" else pytest.mark.slow)
        for pair in PAIRS
    ],
)
def test_builds_trains_a_step_and_predicts(detector: str, backbone: str) -> None:
    from mmdet.registry import MODELS

    torch.manual_seed(0)
    cfg, wanted = shrunk(path_of(detector, backbone)), DETECTORS[detector]
    model = MODELS.build(cfg.model)
    model.init_weights()
    before = statistics(model.train().backbone)
    train_a_step(model, detector)
    frozen = [name for name, parameter in model.backbone.named_parameters() if not parameter.requires_grad]
    assert bool(frozen) == (wanted.frozen >= 0)
    moved = [name for name, value in statistics(model.backbone).items() if not torch.equal(value, before[name])]
    assert len(moved) == (0 if wanted.fixed_norms else len(before))

    predict(model, detector)


DEMO = ROOT / "checkpoints" / "digits_classifier.safetensors"  # of a searched network whose last stride is 16


@pytest.mark.usefixtures("first_iteration")
@pytest.mark.parametrize(
    ("detector", "backbone"),
    [
        pytest.param(*pair, marks=() if pair in (("rtmdet", "r50"), ("dino-4scale", "gpunet-0")) else pytest.mark.slow)
        for pair in PAIRS
    ],
)
def test_takes_a_searched_network_and_its_weights(detector: str, backbone: str) -> None:
    """What ``tools/train.py CONFIG --arch FILE --weights FILE`` does to every config."""
    from mmdet.registry import MODELS

    torch.manual_seed(0)
    cfg = shrunk(path_of(detector, backbone))
    set_arch(cfg, DEMO)
    set_weights(cfg, DEMO)
    assert cfg.model.data_preprocessor.mean == [127.5] * 3  # as the classifier was trained
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    assert model.backbone.spec.hash == read_weights_spec(DEMO).hash
    given = load_state(DEMO)
    own = model.backbone.state_dict()
    assert own and all(torch.equal(value, given[name]) for name, value in own.items())
    train_a_step(model.train(), detector)
    predict(model, detector)


def train_a_step(model: Any, detector: str) -> None:
    """The loss and all gradients of one batch are as they should be."""
    data = model.data_preprocessor(batch(masks=detector == "mask-rcnn"), training=True)
    loss, _ = model.parse_losses(model(**data, mode="loss"))
    assert math.isfinite(loss.item()) and loss > 0
    loss.backward()
    check_gradients(model)


def predict(model: Any, detector: str) -> None:
    """A batch gives boxes, classes and masks as mmdet's should."""
    with torch.no_grad():
        results = model.eval().test_step(batch(masks=False))
    assert len(results) == 2
    for result in results:
        found = result.pred_instances
        assert found.bboxes.shape == (len(found), 4) and found.bboxes.isfinite().all()
        assert len(found) == 0 or (found.labels.min() >= 0 and found.labels.max() < 80)
        assert ("masks" in found) == (detector == "mask-rcnn")


@pytest.mark.usefixtures("first_iteration")
@pytest.mark.parametrize(
    "detector", [pytest.param(d, marks=() if d in ("fcos", "faster-rcnn") else pytest.mark.slow) for d in DETECTORS]
)
def test_trains_a_step_in_mixed_precision(detector: str) -> None:
    """In bfloat16, which CPUs have: what the operators and losses do with half precision.

    On 160 px, where the last of all maps has 2 × 2 positions: torch's kernel leaves the weights' gradient of a 3 × 3
    convolution of stride 2 unwritten in bfloat16 on a CPU when its map has a single one (P7 of 64 px).
    """
    from mmdet.registry import MODELS

    cfg = shrunk(path_of(detector, "prunet-p0"))
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    torch.manual_seed(0)
    data = model.data_preprocessor(batch(masks=detector == "mask-rcnn", size=160), training=True)
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.parse_losses(model(**data, mode="loss"))
    assert math.isfinite(loss.item()) and loss > 0
    loss.backward()
    check_gradients(model)
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e3


@pytest.mark.parametrize("detector", ["deformable-detr", "dino-4scale"])
@pytest.mark.parametrize("backbone", ["prunet-p0", "efficientnet-b0"])
def test_a_detrs_backbone_learns_at_a_tenth_of_the_rate(detector: str, backbone: str) -> None:
    from mmdet.registry import MODELS

    cfg = shrunk(path_of(detector, backbone))
    model = MODELS.build(cfg.model)
    cfg.optim_wrapper.type = "OptimWrapper"  # mixed precision wants a GPU
    rate = cfg.optim_wrapper.optimizer.lr
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    of_backbone = {rates[id(p)] for p in model.backbone.parameters() if p.requires_grad}
    assert list(of_backbone) == [pytest.approx(rate / 10)]
    assert {rates[id(p)] for p in model.neck.parameters()} == {rate}


def test_never_from_random_weights_without_a_word(zoo_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmdet.registry import MODELS

    from prunet_zoo.errors import CheckpointError

    with pytest.raises(DownloadError, match=r"was not downloaded|no address"):
        MODELS.build(Config.fromfile(path_of("retinanet", "prunet-p0")).model).init_weights()

    def offline(**options: Any) -> None:
        raise OSError("no way to the hub")

    model = MODELS.build(Config.fromfile(path_of("retinanet", "efficientnet-b0")).model)
    create: Callable[..., Any] = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **o: offline() if pretrained else create(name, **o)
    )
    with pytest.raises(
        CheckpointError, match=r"efficientnet_b0\.ra_in1k could not be loaded .*no way to the hub.*FILE"
    ):
        model.init_weights()
