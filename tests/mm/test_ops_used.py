"""Which of mmcv's operators mmdet calls, read from the sources of both: all that its detectors need are there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mmcv.ops
import mmdet
import mmengine
import pytest

from prunet_zoo.mm import ops

MMCV_OPS = Path(mmcv.__file__).parent / "ops"
MMDET = Path(mmdet.__file__).parent
CONFIGS = MMDET / ".mim" / "configs"
DETECTORS = [
    "retinanet/retinanet_r50_fpn_1x_coco.py",
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "atss/atss_r50_fpn_1x_coco.py",
    "gfl/gfl_r50_fpn_1x_coco.py",
    "rtmdet/rtmdet_s_8xb32-300e_coco.py",
    "rtmdet/rtmdet-ins_s_8xb32-300e_coco.py",
    "yolox/yolox_s_8xb8-300e_coco.py",
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
    "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
    "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py",
    "dino/dino-4scale_r50_8xb2-12e_coco.py",
    # and those whose operators the others do not call
    "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
    "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py",
    "guided_anchoring/ga-retinanet_r50_fpn_1x_coco.py",
    "reppoints/reppoints-moment_r50_fpn_1x_coco.py",
    "vfnet/vfnet_r50_fpn_1x_coco.py",
    "tood/tood_r50_fpn_1x_coco.py",
    "dyhead/atss_r50_fpn_dyhead_1x_coco.py",
    "pisa/faster-rcnn_r50_fpn_pisa_1x_coco.py",
]


@cache
def definitions(path: Path) -> dict[str, ast.AST]:
    """The top-level names of a file of mmcv.ops; of one that it imports from a sibling, that file's."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            sibling = definitions(path.parent / f"{node.module}.py")
            found |= {alias.asname or alias.name: sibling[alias.name] for alias in node.names if alias.name in sibling}
    return found


@cache
def compiled_calls(name: str) -> frozenset[str]:
    """The functions of ``mmcv._ext`` that a public name of mmcv.ops may call."""
    path = next((p for p in sorted(MMCV_OPS.glob("[!_]*.py")) if name in definitions(p)), None)
    assert path is not None, f"mmcv.ops has no {name}"
    calls, seen, waiting = set(), set(), [name]
    while waiting:
        current = waiting.pop()
        if current in seen or current not in definitions(path):
            continue
        seen.add(current)
        for node in ast.walk(definitions(path)[current]):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ext_module":
                calls.add(node.attr)
            elif isinstance(node, ast.Name):
                waiting.append(node.id)
    return frozenset(calls)


def imported_by(path: Path) -> set[str]:
    """The names that a file imports from mmcv.ops."""
    return {
        alias.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[:2] == ["mmcv", "ops"]
        for alias in node.names
    }


def types_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("type"), str):
            yield value["type"]
        for child in value.values():
            yield from types_in(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from types_in(child)


def test_the_reading_finds_what_is_there() -> None:
    assert compiled_calls("RoIAlign") == {"roi_align_forward", "roi_align_backward"}
    assert compiled_calls("nms") == {"nms"}  # and not those of the other functions of its file
    assert compiled_calls("soft_nms") == {"softnms"}
    assert compiled_calls("point_sample") == compiled_calls("batched_nms") == set()  # (a config names the latter's)
    assert "carafe_forward" in compiled_calls("CARAFEPack")


def test_all_of_mmdet_but_carafe_finds_its_operators() -> None:
    """CARAFE (a learnt upsampling) is an option of mask heads and a neck of its own."""
    lacking: dict[str, set[str]] = {}
    seen = compiled_calls("nms") | compiled_calls("soft_nms")  # what batched_nms may be told to call
    for path in MMDET.rglob("*.py"):
        if ".mim" not in path.parts:
            for name in imported_by(path):
                calls = compiled_calls(name)
                seen |= calls
                if missing := calls - set(ops.__all__):
                    lacking.setdefault(path.name, set()).update(missing)
    lacking.pop("clr_head.py", None)  # lanes: onedl-mmdetection alone has it
    assert set(lacking) == {"fpn_carafe.py", "fcn_mask_head.py"}
    assert all(name.startswith("carafe") for names in lacking.values() for name in names)
    assert seen >= {
        "nms_match",
        "roi_align_forward",
        "deform_conv_forward",
        "masked_im2col_forward",
        "ms_deform_attn_forward",
    }


@pytest.mark.parametrize("name", DETECTORS)
def test_what_a_detectors_config_names_is_there(name: str) -> None:
    """The operators that a config names, rather than a source: RoI layers, convolutions, upsampling, suppression."""
    from mmengine.registry import MODELS

    cfg = mmengine.Config.fromfile(CONFIGS / name)
    types = set(types_in(cfg.model.to_dict()))
    assert not any("carafe" in type_.lower() for type_ in types)
    registered = {type_: MODELS.module_dict[type_] for type_ in types if type_ in MODELS.module_dict}
    names = types - set(registered)  # looked up in mmcv.ops by their own name
    names |= {layer.__name__ for layer in registered.values() if layer.__module__.startswith("mmcv.ops.")}
    called = set().union(*(compiled_calls(name) for name in names if name in mmcv.ops.__all__))
    assert called <= set(ops.__all__)
    if "rcnn" in name:
        assert "roi_align_forward" in called
    if name.startswith("dcn"):
        assert "deform_conv_forward" in called or "modulated_deform_conv_forward" in called


def test_nothing_is_provided_that_mmcv_does_not_call() -> None:
    asked = {
        node.value
        for path in MMCV_OPS.glob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "load_ext"
        for node in ast.walk(call)
        if isinstance(node, ast.Constant)
    }
    assert set(ops.__all__) <= asked
