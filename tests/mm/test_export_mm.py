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
from prunet_zoo.zoo.export import classifier_network
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


UNNORMALISED = """
_base_ = ["{base}"]
model = dict(data_preprocessor=dict(_delete_=True, type="DetDataPreprocessor", pad_size_divisor=32))
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type="Resize", scale=(64, 96), keep_ratio=True),
    dict(type="Pad", pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
]))
"""


def test_a_detector_of_images_as_they_are_loaded(tmp_path: Path) -> None:
    """As mmdet's YOLOX: no normalisation, BGR, 114 beside the image."""
    config = tmp_path / "plain.py"
    config.write_text(UNNORMALISED.format(base=RETINANET))
    network = config_network(config)
    told = {"mean": [0.0] * 3, "std": [1.0] * 3, "order": "BGR", "pad_size_divisor": 32, "pad_value": 114.0}
    assert network.about["preprocess"] == told
    record = export(network, FORMATS["torchscript"], tmp_path / "net.pt", Options(check=False))
    assert record["input"]["values"] == "BGR, 0…255"
    export(network, FORMATS["torchscript"], tmp_path / "rgb.pt", Options(normalize=True, check=False))
    image = torch.randint(0, 256, (1, 3, 64, 96)).float()
    first, second = (FORMATS["torchscript"].open(tmp_path / name) for name in ("net.pt", "rgb.pt"))
    for got, wanted in zip(second(image.flip(1).numpy()), first(image.numpy()), strict=True):
        assert relative_error(got, wanted) < 1e-5


def test_the_padding_of_a_pipeline_is_told_as_the_network_gets_it(tmp_path: Path) -> None:
    config = tmp_path / "padded.py"
    pad = 'test_dataloader = dict(dataset=dict(pipeline=[dict(type="Pad", pad_val=dict(img=(114, 50, 0)))]))'
    config.write_text(f'_base_ = ["{RETINANET}"]\n{pad}\n')
    told = config_network(config, input_size=(64, 64)).about["preprocess"]
    raw = (114, 50, 0) if told["order"] == "BGR" else (0, 50, 114)
    wanted = [(v - m) / s for v, m, s in zip(raw, told["mean"], told["std"], strict=True)]
    assert told["pad_value"] == pytest.approx(wanted)


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
        (["prunet_p0", "--opset", "17"], "has no ONNX opset"),
        (["prunet_p00", "--out", "."], "is a folder; give the file"),  # said before the name is looked up
        (["prunet_p00", "--out", "x.onnx"], "makes files FILE.pt; got the name x.onnx"),
    ],
)
def test_the_tools_refusals(tool: ModuleType, tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(PrunetError) as caught:
        tool.main([*arguments, "--format", "torchscript"])
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_is_none_is_named(tool: ModuleType, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        tool.main(["prunet_p0", "--format", "onnx", "--batch", "x"])
    assert "takes a whole number from 1, got 'x'" in capsys.readouterr().err


def test_a_specs_name_is_no_path(
    tool: ModuleType, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    spec = {**load_classifier(CLASSIFIER, device="cpu").net.spec.to_dict(), "name": "../a/b: c"}
    Path("spec.json").write_text(json.dumps(spec))
    assert tool.main(["spec.json", "--format", "torchscript", "--no-check", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["name"] == "../a/b: c" and "opset" not in record
    assert sorted(path.name for path in folder.iterdir()) == sorted([record["file"], "spec.json"])


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_networks_of_timm_have_the_size_that_they_are_measured_at(name: str) -> None:
    from prunet_zoo.latency.subject import load_subject

    network = classifier_network(f"timm/{name}")
    assert network.input_size == load_subject(f"timm/{name}").size
    assert network.about["preprocess"]["input_size"] == network.input_size[0]


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
