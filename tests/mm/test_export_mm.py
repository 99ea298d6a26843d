"""Exported detectors and classifiers of configs: in ONNX Runtime equal to mmdet; parts; what cannot be is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from prunet_zoo.data.scenes import SceneParams, make_scene
from prunet_zoo.errors import CheckpointError, PrunetError
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.export import config_network, detector_network
from prunet_zoo.mm.predict import load_detector
from prunet_zoo.models.export import FORMATS, ExportError, Options, export
from prunet_zoo.models.export.job import relative_error
from prunet_zoo.zoo.home import shared_folder
from prunet_zoo.zoo.predict import load_classifier

ROOT = Path(__file__).resolve().parents[2]
RETINANET = ROOT / "configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py"
DIGITS = ROOT / "configs/classification/prunet-cpu-small_digits.py"
DETECTOR = shared_folder("checkpoints") / "digits_detector.safetensors"
CLASSIFIER = shared_folder("checkpoints") / "digits_classifier.safetensors"
NAMES = ["cls_score_0", "cls_score_1", "bbox_pred_0", "bbox_pred_1"]


@pytest.fixture
def tool(load_tool: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(tmp_path)
    return load_tool("export")


@pytest.mark.parametrize("normalize", [False, True])
def test_the_digit_detector_in_onnx_runtime_equals_mmdet(tmp_path: Path, normalize: bool) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "detector.onnx"
    record = export(detector_network("digits_detector"), FORMATS["onnx"], path, Options(normalize=normalize))
    assert [out["name"] for out in record["outputs"]] == NAMES
    assert record["strides"] == [8, 16] and record["classes"] == [str(i) for i in range(10)]
    assert record["head"]["type"] == "RetinaHead" and record["test_cfg"]["nms"]["type"] == "nms"
    assert record["batchnorm"] == {"folded": 20, "kept": 0} and record["weights"] == "prunet://digits_detector"
    detector = load_detector("digits_detector", device="cpu")
    rgb = make_scene("val", 0, SceneParams()).image
    bgr = torch.from_numpy(np.ascontiguousarray(rgb[:, :, ::-1])).permute(2, 0, 1)
    taken = detector.model.data_preprocessor({"inputs": [bgr], "data_samples": None}, False)["inputs"]
    with torch.no_grad():
        scores, boxes = detector.model(taken, mode="tensor")
    image = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)[None].float()
    found = FORMATS["onnx"].open(path)((image if normalize else taken).numpy())
    for got, wanted in zip(found, [*scores, *boxes], strict=True):
        assert relative_error(got, wanted.numpy()) < 1e-5


def test_a_config_with_weights_is_the_published_detector(tmp_path: Path) -> None:
    both = [config_network(RETINANET, str(DETECTOR)), detector_network(str(DETECTOR))]
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        first, second = (network.module(x) for network in both)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert both[0].about["strides"] == [8, 16] and both[0].scaling == both[1].scaling


def test_parts_of_a_detector() -> None:
    spec = ROOT / "configs/classification/prunet-cpu-small.json"
    for part, channels in (("backbone", [64, 128]), ("neck", [64, 64])):
        network = config_network(RETINANET, arch=str(spec), part=part, input_size=(64, 96))
        with torch.no_grad():
            maps = network.module(torch.zeros(1, 3, 64, 96))
        assert [tuple(m.shape[2:]) for m in maps] == [(8, 12), (4, 6)]
        assert network.outputs == ("feature_0", "feature_1") and network.weights is None
        if part == "neck":
            assert [m.shape[1] for m in maps] == channels


def test_a_classifiers_config(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    network = config_network(DIGITS, str(CLASSIFIER))
    record = export(network, FORMATS["onnx"], tmp_path / "digits.onnx", Options(normalize=True))
    classifier = load_classifier(CLASSIFIER, device="cpu")
    assert record["preprocess"] == classifier.preprocess.model_dump(mode="json")
    assert record["classes"] == list(classifier.classes)
    image = torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(getattr(classifier.preprocess, key)).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        wanted = classifier.net((image - mean) / std).numpy()
    (got,) = FORMATS["onnx"].open(tmp_path / "digits.onnx")((255 * image).numpy())
    assert relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize("name", ["faster-rcnn_prunet-cpu-small_fpn_digit-scenes"])
def test_the_whole_of_a_two_stage_detector_is_refused_and_its_neck_is_not(tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnxruntime")
    config = ROOT / f"configs/detection/{name}.py"
    with pytest.raises(ExportError, match=r"FasterRCNN: not a one-stage detector.*--part neck or --part backbone"):
        config_network(config)
    network = config_network(config, part="neck")
    assert export(network, FORMATS["onnx"], tmp_path / "neck.onnx", Options(tolerance=1e-3))["task"] == "neck"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("retinanet", "bbox_pred_4"), ("atss", "score_factor_4"), ("fcos", "score_factor_4"), ("gfl", "bbox_pred_4"),
        ("rtmdet", "bbox_pred_2"), ("yolox", "objectness_2"), ("deformable-detr", None), ("dino-4scale", None),
        ("faster-rcnn", None), ("cascade-rcnn", None), ("mask-rcnn", None),
    ],
)  # fmt: skip
def test_every_family_of_detectors(tmp_path: Path, name: str, last: str | None) -> None:
    from prunet_zoo.latency.probes import randomise

    pytest.importorskip("onnxruntime")
    (config,) = ROOT.glob(f"configs/detection/{name}_prunet-p0_*coco.py")
    if last is None:
        with pytest.raises(ExportError, match="not a one-stage detector"):
            config_network(config, input_size=(128, 192))
    network = config_network(config, part="whole" if last else "backbone", input_size=(128, 192))
    randomise(network.module)
    record = export(network, FORMATS["onnx"], tmp_path / "x.onnx")
    assert record["outputs"][-1]["name"] == (last or f"feature_{len(record['strides']) - 1}")


def test_mistakes_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit"):
        config_network(RETINANET, str(CLASSIFIER))
    with pytest.raises(ConfigError, match="does not exist"):
        config_network(tmp_path / "none.py")
    bare = tmp_path / "bare.py"
    bare.write_text(f'_base_ = ["{RETINANET}"]\ntest_dataloader = dict(dataset=dict(pipeline=[]))\n')
    with pytest.raises(ExportError, match="give --input-size H W"):
        config_network(bare)
    with pytest.raises(ExportError, match="classifier: give its name"):
        config_network(DIGITS, part="backbone")


def test_the_tool_exports_and_prints_json_alone(tool: ModuleType, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("onnxruntime")
    assert tool.main(["digits_detector", "--format", "onnx", "--json", "--dynamic-batch"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["file"] == "digits_detector.onnx" and (tmp_path / record["file"]).stat().st_size == record["bytes"]
    assert record["input"]["shape"] == ["batch", 3, 128, 128] and max(record["max_error"].values()) < 1e-5
    assert record["checked_with"].startswith("onnxruntime ")


def test_the_tool_says_in_lines_what_it_wrote(tool: ModuleType, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "a" / "b.pt"
    assert tool.main([str(CLASSIFIER), "--format", "torchscript", "--out", str(out), "--part", "backbone"]) == 0
    text = capsys.readouterr().out
    assert f"{out}: " in text and "output  feature_0 1×" in text and "folded, 0 kept" in text
    assert "differs from torch by" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prunet_p00"], "did you mean 'prunet_p0'"),
        (["timm/resnet1"], "unknown network of timm 'resnet1'"),
        (["timm/resnet18", "--out-indices", "1"], "--part backbone"),
        (["timm/resnet18", "--part", "backbone", "--out-indices", "9"], "timm cannot make resnet18"),
        (["prunet_p0", "--part", "neck"], "has no neck"),
        (["prunet_p0", "--arch", "x"], "does not take --arch"),
        (["prunet_p0", "--weights", "none.safetensors"], "does not exist"),
        (["prunet_p0", "--pretrained", "--weights", "x.pth"], "two kinds of weights"),
        ([str(RETINANET), "--pretrained"], "does not take --pretrained"),
        (["digits_detector", "--weights", "x"], "does not take --weights"),
        (["prunet_p0", "--input-size", "1", "2", "3"], "got 3 numbers"),
        (["prunet_p0", "--part", "backbone", "--out-indices", "7"], "7"),
    ],
)
def test_the_tools_refusals(tool: ModuleType, tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(PrunetError) as caught:
        tool.main([*arguments, "--format", "torchscript"])
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_documents_python_runs(tool: ModuleType, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    for name in FORMATS:
        normalize = ["--normalize"] if name == "onnx" else []
        assert tool.main(["digits_classifier", "--pretrained", "--format", name, *normalize]) == 0
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    for source in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        capsys.readouterr()
        exec(compile(source, "docs/export.md", "exec"), {})
        assert capsys.readouterr().out
    assert (tmp_path / "prunet_p0.onnx").is_file()


def test_a_spec_with_weights_of_its_own(tool: ModuleType, tmp_path: Path, capsys: Any) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(load_classifier(CLASSIFIER, device="cpu").net.spec.to_dict()))
    args = [str(spec), "--weights", str(CLASSIFIER), "--format", "torchscript", "--normalize", "--json"]
    assert tool.main(args) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["weights"] == str(CLASSIFIER) and len(record["classes"]) == 10
