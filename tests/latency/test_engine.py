"""The engine format around a stand-in for TensorRT, which is not here: what it asks for, writes and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency import engine
from prunet_zoo.latency.engine import Engine
from prunet_zoo.models.export import ExportError, Network, Options, export


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), "net", (8, 8), about={"task": "x"})


class Fake(Engine):
    """An "engine" that is the ONNX file itself, run by ONNX Runtime."""

    half_graph = False  # type: ignore[assignment]
    runtime = "tensorrt 10.4.0"  # type: ignore[assignment]

    def open(self, path: Path) -> Any:
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"input": x})


def test_without_tensorrt_it_says_what_to_install(network: Network, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        ExportError, match=r"'engine' needs a library that is not installed.*run: pip install .*tensorrt"
    ):
        export(network, Engine(), tmp_path / "net.engine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_engine_is_built_from_onnx_and_has_its_metadata_beside_it(
    network: Network, tmp_path: Path, monkeypatch: Any, dtype: str
) -> None:
    pytest.importorskip("onnxruntime")
    asked = []
    monkeypatch.setattr(engine.TensorRT, "check", lambda self, setting: asked.append(setting))
    monkeypatch.setattr(engine, "build_engine", lambda onnx, dtype: asked.append(dtype) or onnx)
    record = export(network, Fake(), tmp_path / "net.engine", Options(dtype=dtype, batch=2))
    assert asked[1] == dtype and asked[0].dtype == dtype and asked[0].accelerator == "cuda"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.engine", "net.engine.json"] == record["files"]
    about = json.loads((tmp_path / "net.engine.json").read_text())
    assert about["task"] == "x" and about["input"]["shape"] == [2, 3, 8, 8]
    assert record["batchnorm"] == {"folded": 1, "kept": 0}


def test_where_no_engine_can_be_built_nothing_is_left(network: Network, tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(self: Any, setting: Any) -> None:
        raise LatencyError("torch sees no CUDA device")

    monkeypatch.setattr(engine.TensorRT, "check", refuse)
    with pytest.raises(ExportError, match="no engine can be built here: torch sees no CUDA device"):
        export(network, Fake(), tmp_path / "net.engine")
    with pytest.raises(ExportError, match="fixed batch"):
        export(network, Fake(), tmp_path / "net.engine", Options(dynamic_batch=True))
    assert list(tmp_path.iterdir()) == []
