"""mm/levels.py and mm/replace.py: whatever a spec's levels, the heads work on the strides that the neck's maps have."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import mmdet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import DefaultScope

from prunet_zoo.mm.channels import follow_spec
from prunet_zoo.mm.cli import ConfigError, load_config
from prunet_zoo.mm.levels import fit_levels, follow_levels, level_strides, scale_ranges
from prunet_zoo.mm.network import register_mmdet, set_arch
from prunet_zoo.mm.replace import match_levels, put_spec
from prunet_zoo.spec import NetSpec, load_spec

MMDET = Path(mmdet.__file__).parent / ".mim" / "configs"
DETECTORS = {
    "retinanet": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "fcos": "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "atss": "atss/atss_r50_fpn_1x_coco.py",
    "gfl": "gfl/gfl_r50_fpn_1x_coco.py",
    "rtmdet": "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
    "yolox": "yolox/yolox_tiny_8xb8-300e_coco.py",
    "faster-rcnn": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "mask-rcnn": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "cascade-rcnn": "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
    "deformable-detr": "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "dino": "dino/dino-4scale_r50_8xb2-12e_coco.py",
}
DOUBLING = ("rtmdet", "yolox")  # their necks enlarge by 2


@pytest.fixture(autouse=True)
def scope() -> Any:
    kept = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(kept)


def make_spec(strides: list[int], name: str = "random") -> NetSpec:
    """A tiny network whose blocks have these strides, one after the other."""
    blocks = [
        {"blocks": [{"type": "conv", "out_channels": 8 * (1 + i % 3), "stride": stride}]}
        for i, stride in enumerate(strides)
    ]
    return NetSpec.from_dict(
        {"name": name, "input_size": 64, "stages": blocks, "tail": {"out_channels": 16}, "num_classes": 2}
    )


@functools.cache
def base(name: str) -> Config:
    register_mmdet()
    return load_config(MMDET / DETECTORS[name])


def slim(cfg: Config) -> None:
    """Few channels: what is tested is levels."""
    for part in (cfg.model.get("encoder"), cfg.model.get("decoder")):
        if part is not None:
            part.num_layers = 1
    if "num_queries" in cfg.model:
        cfg.model.num_queries = 20  # DINO picks them among the positions of the maps
    if cfg.model.neck.type in ("CSPNeXtPAFPN", "YOLOXPAFPN"):
        cfg.model.neck.num_csp_blocks = 1


def build(model: Any) -> Any:
    from mmdet.registry import MODELS

    DefaultScope.get_instance("levels", scope_name="mmdet")
    return revert_sync_batchnorm(MODELS.build(follow_spec(model, "mmdet")))


def head_strides(model: Any) -> list[list[int]]:
    """Strides that the heads of a built detector work on."""
    heads = [getattr(model, name) for name in ("bbox_head", "rpn_head") if hasattr(model, name)]
    found = [head.prior_generator.strides for head in heads if hasattr(head, "prior_generator")]
    return [[s[0] if isinstance(s, tuple) else s for s in strides] for strides in found]


def measured(model: Any, side: int) -> list[int]:
    with torch.no_grad():
        maps = model.eval().extract_feat(torch.zeros(1, 3, side, side))
    return [side // m.shape[-1] for m in maps]


NAMES = st.sampled_from(sorted(DETECTORS))
STRIDES = st.lists(st.sampled_from([1, 2, 2, 2, 3, 4]), min_size=1, max_size=6)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(NAMES, STRIDES)
def test_heads_strides_are_those_of_the_maps(name: str, strides: list[int]) -> None:
    check_strides(name, strides)


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(NAMES, STRIDES)
def test_heads_strides_are_those_of_the_maps_of_many(name: str, strides: list[int]) -> None:
    check_strides(name, strides)


def check_strides(name: str, strides: list[int]) -> None:
    if math.prod(strides) in (1,) or math.prod(strides) > 64:
        strides = [2, *[2 for s in strides if s > 1][:4]]
    cfg = copy.deepcopy(base(name))
    slim(cfg)
    spec = make_spec(strides)
    try:
        set_arch(cfg, spec)
    except ConfigError as error:
        has = [level.stride for level in spec.feature_levels]
        assert name in DOUBLING and "enlarges each map by 2" in str(error)
        assert any(b != 2 * a for a, b in itertools.pairwise(has))
        return
    again, changes = fit_levels(cfg.model, "mmdet")
    assert not changes and again == cfg.model  # what follows is final
    model = build(cfg.model)
    levels = [spec.feature_levels[i].stride for i in cfg.model.backbone.out_indices]
    known = head_strides(model)
    side = levels[-1] * 8
    while known and side < known[0][-1]:
        side *= 2
    maps = measured(model, side)
    for heads in known:
        assert heads == maps
    if "num_feature_levels" in cfg.model:
        assert len(maps) == cfg.model.num_feature_levels == model.num_feature_levels
    ranges = getattr(getattr(model, "bbox_head", None), "regress_ranges", None)
    if ranges is not None:
        assert len(ranges) == len(maps)
        assert all(a[1] == b[0] and a[0] < a[1] for a, b in itertools.pairwise(ranges))
    if hasattr(model, "roi_head"):
        used = list(cfg.model.roi_head.bbox_roi_extractor.featmap_strides)
        assert used == maps[: len(used)] and used[-1] <= levels[-1]


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_a_spec_with_all_levels_changes_nothing_but_the_backbone(name: str) -> None:
    cfg = copy.deepcopy(base(name))
    before = copy.deepcopy(cfg.model)
    set_arch(cfg, "prunet_p0")
    changed = {key for key in before.keys() | cfg.model.keys() if before.get(key) != cfg.model.get(key)}
    assert changed == {"backbone", "neck"}
    assert {**cfg.model.neck, "in_channels": before.neck.in_channels} == before.neck
    p0 = load_spec("prunet_p0")
    assert list(cfg.model.neck.in_channels) == p0.channels(cfg.model.backbone.out_indices)
    assert [p0.feature_levels[i].stride for i in cfg.model.backbone.out_indices][-1] == 32


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["small", "prunet_p0"])
@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_every_detector_trains_a_step_and_predicts(name: str, arch: str) -> None:
    check_step(name, make_spec([2, 2, 2, 2]) if arch == "small" else load_spec(arch))


@pytest.mark.parametrize("name", ["retinanet", "yolox"])
def test_some_detectors_train_a_step_and_predict(name: str) -> None:
    check_step(name, make_spec([2, 2, 2, 2]))


def check_step(name: str, spec: NetSpec) -> None:
    from mmdet.testing import demo_mm_inputs

    cfg = copy.deepcopy(base(name))
    slim(cfg)
    cfg.model.data_preprocessor.pop("batch_augments", None)
    set_arch(cfg, spec)
    cfg.model.backbone.update(frozen_stages=-1, norm_eval=False)
    torch.manual_seed(0)
    model = build(cfg.model)
    data = demo_mm_inputs(
        2, [[3, 64, 64], [3, 64, 64]], num_items=[2, 1], with_mask=name == "mask-rcnn", use_box_type=False
    )
    batch = model.data_preprocessor(data, True)
    loss, _ = model.train().parse_losses(model(**batch, mode="loss"))
    loss.backward()
    assert torch.isfinite(loss)
    for key, parameter in model.backbone.named_parameters():
        if parameter.requires_grad:  # a norm_cfg of mmdet's may keep norms fixed
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
    with torch.no_grad():
        results = model.eval()(**model.data_preprocessor(data, False), mode="predict")
    assert all(torch.isfinite(r.pred_instances.bboxes).all() for r in results)


def retinanet(strides: list[int], **backbone: Any) -> dict[str, Any]:
    """A RetinaNet's config with a PruNet of a spec with these strides."""
    model = copy.deepcopy(base("retinanet").model.to_dict())
    model["backbone"] = {"type": "PruNet", "arch": make_spec(strides).to_dict(), **backbone}
    return dict(model)


@pytest.mark.parametrize(
    ("strides", "out_indices", "neck", "heads"),
    [
        ([2, 2, 2, 2, 2], (1, 2, 3, 4), {"start_level": 1, "num_outs": 5}, [8, 16, 32, 64, 128]),
        ([2, 2, 2, 2], (1, 2, 3, 4), {"start_level": 1, "num_outs": 5}, [8, 16, 32, 64, 128]),  # 32 is an extra level
        ([2, 2, 2, 2, 2], (2, 3, 4), {"start_level": 0, "num_outs": 5}, [8, 16, 32, 64, 128]),
        ([2, 2, 2, 2, 2], (3, 4), {"start_level": 0, "num_outs": 4}, [16, 32, 64, 128]),
        ([2, 2], (1, 2, 3, 4), {"start_level": 0, "num_outs": 6}, [4, 8, 16, 32, 64, 128]),
        ([2, 2, 4, 2], (1, 2, 3), {"start_level": 1, "num_outs": 4}, [16, 32, 64, 128]),
    ],
)
def test_retinanets_levels(
    strides: list[int], out_indices: tuple[int, ...], neck: dict[str, int], heads: list[int]
) -> None:
    before = retinanet(strides, out_indices=out_indices)
    kept = copy.deepcopy(before)
    after = follow_levels(before, "mmdet")
    assert before == kept  # a pure function
    assert {key: after["neck"].get(key, 0) for key in neck} == neck
    assert list(after["bbox_head"]["anchor_generator"]["strides"]) == heads
    assert list(after["backbone"]["out_indices"]) == [i for i in out_indices if i < len(strides)]


def test_frozen_stages_end_with_the_network() -> None:
    model, changes = fit_levels(retinanet([2, 2, 2], frozen_stages=4), "mmdet")
    assert model["backbone"]["frozen_stages"] == 2 and "backbone.frozen_stages 2" in changes


def test_other_models_are_left_alone() -> None:
    for model in ({"type": "X"}, {"backbone": {"type": "ResNet"}, "neck": None}, [1], None):
        assert follow_levels(model) is model


def test_lists_by_level_that_do_not_follow_are_refused() -> None:
    model = retinanet([2, 2, 2, 2, 2], out_indices=(3, 4))
    model["bbox_head"] |= {"base_edge_list": [16, 32, 64, 126, 256]}
    with pytest.raises(ConfigError, match="base_edge_list is a choice for each level"):
        follow_levels(model, "mmdet")
    model = retinanet([2, 2, 2, 2])
    model["neck"] = {"type": "NASFPN", "num_outs": 5}
    with pytest.raises(ConfigError, match=r"strides \[4, 8, 16\], the config was made for \[4, 8, 16, 32\]"):
        follow_levels(model, "mmdet")
    model["neck"] = [copy.deepcopy(base("retinanet").model.neck), {"type": "FPG"}]
    model["backbone"]["out_indices"] = (3,)
    with pytest.raises(ConfigError, match="FPG"):
        follow_levels(model, "mmdet")


def test_libras_later_neck_follows() -> None:
    model = retinanet([2, 2, 2, 2, 2], out_indices=(3, 4))
    model["neck"] = [dict(model["neck"]), {"type": "BFP", "num_levels": 5, "refine_level": 4}, {"type": "DyHead"}]
    after = follow_levels(model, "mmdet")
    assert after["neck"][1] == {"type": "BFP", "num_levels": 4, "refine_level": 3}


def test_rois_go_to_maps_of_their_size() -> None:
    cfg = copy.deepcopy(base("faster-rcnn"))
    cfg.model.backbone.out_indices = (1, 2, 3)  # of the ResNet: strides 8, 16, 32
    set_arch(cfg, "prunet_p0")
    extractor = cfg.model.roi_head.bbox_roi_extractor
    assert list(extractor.featmap_strides) == [8, 16, 32] and extractor.finest_scale == 112


def test_ranges_of_other_strides() -> None:
    old = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8))
    strides = [8, 16, 32, 64, 128]
    assert scale_ranges(old, strides, strides) == [list(map(float, pair)) for pair in old]
    assert scale_ranges(old, strides, [16, 32]) == [[-1, 128], [128, 1e8]]
    assert scale_ranges(old, strides, [4, 8, 12]) == [[-1, 32], [32, 64], [64, 1e8]]
    assert scale_ranges(((-1, 1e8),), [8], [8, 16]) == [[-1, 64], [64, 1e8]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=5).filter(lambda s: math.prod(s) > 1),
    st.sets(st.sampled_from([2, 4, 8, 16, 32, 64]), min_size=1),
)
def test_matched_levels(strides: list[int], wanted: set[int]) -> None:
    spec = make_spec(strides)
    has = [level.stride for level in spec.feature_levels]
    found = match_levels(level_strides(spec), sorted(wanted))
    assert found and list(found) == sorted(set(found)) and all(0 <= i < len(has) for i in found)
    if wanted <= set(has):
        assert [has[i] for i in found] == sorted(wanted)
    inside = [s for s in has if min(wanted) <= s <= max(wanted)]
    assert not inside or all(has[i] in inside for i in found)


FAMILIES = [
    ({"type": "ResNet", "out_indices": (1, 2, 3)}, [8, 16, 32]),
    ({"type": "mmdet.ResNeXt"}, [4, 8, 16, 32]),
    ({"type": "ResNet", "strides": (1, 2, 2, 1), "out_indices": (2,)}, [16]),
    ({"type": "CSPDarknet"}, [8, 16, 32]),
    ({"type": "CSPNeXt", "out_indices": (1, 2, 3, 4)}, [4, 8, 16, 32]),
    ({"type": "MobileNetV2", "out_indices": (2, 4, 6)}, [8, 16, 32]),
    ({"type": "EfficientNet", "out_indices": (3, 4, 5)}, [8, 16, 32]),
    ({"type": "Darknet", "depth": 53}, [8, 16, 32]),
    ({"type": "SwinTransformer"}, [4, 8, 16, 32]),
    ({"type": "TimmBackbone", "model_name": "efficientnet_b0"}, [4, 8, 16, 32]),
]


@pytest.mark.parametrize(("old", "strides"), FAMILIES)
def test_backbones_of_other_families(old: dict[str, Any], strides: list[int]) -> None:
    spec = load_spec("prunet_p0")
    new, found, told = put_spec({"backbone": old, "neck": {"type": "FPN"}}, spec)
    assert found == strides and new.type == "PruNet" and told
    assert [spec.feature_levels[i].stride for i in new.out_indices] == strides


@pytest.mark.parametrize(
    ("old", "strides"),
    [
        (dict(type="ResNet", depth=18), [4, 8, 16, 32]),
        (dict(type="CSPDarknet", widen_factor=0.25, out_indices=(0, 1, 2, 3, 4)), [2, 4, 8, 16, 32]),
        (dict(type="CSPNeXt", widen_factor=0.25, out_indices=(0, 1, 2, 3, 4)), [2, 4, 8, 16, 32]),
        (dict(type="MobileNetV2", out_indices=tuple(range(8))), [2, 4, 8, 16, 16, 32, 32, 32]),
        (dict(type="EfficientNet", arch="b0", out_indices=tuple(range(7))), [2, 2, 4, 8, 16, 32, 32]),
        (dict(type="Darknet", depth=53, out_indices=(1, 2, 3, 4, 5)), [2, 4, 8, 16, 32]),
    ],
)  # fmt: skip
def test_the_families_strides_are_those_of_their_maps(old: dict[str, Any], strides: list[int]) -> None:
    from mmdet.registry import MODELS

    register_mmdet()
    with MODELS.switch_scope_and_registry("mmdet") as registry, torch.no_grad():
        backbone = registry.build(old)
        backbone.eval()  # returns None in some of mmdet's
        maps = backbone(torch.zeros(1, 3, 64, 64))
    assert [64 // m.shape[-1] for m in maps] == strides
