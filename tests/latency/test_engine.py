"""The engine format around a stand-in for TensorRT, which is not here: what it asks for, writes and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency import engine
from prunet_zoo.latency.backends import tensorrt
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


@pytest.mark.parametrize("options", [Options(), Options(dtype="fp16", check=False)], ids=["checked", "unchecked"])
def test_without_tensorrt_it_says_what_to_install(
    network: Network, tmp_path: Path, monkeypatch: Any, options: Options
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        ExportError, match=r"'engine' needs a library that is not installed.*run: pip install .*tensorrt"
    ):
        export(network, Engine(), tmp_path / "net.engine", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_engine_is_built_from_onnx_and_has_its_metadata_beside_it(
    network: Network, tmp_path: Path, monkeypatch: Any, dtype: str
) -> None:
    pytest.importorskip("onnxruntime")
    asked = []
    monkeypatch.setattr(engine.TensorRT, "check", lambda self, setting: asked.append(setting))
    monkeypatch.setattr(engine, "build_engine", lambda onnx, dtype, tf32: asked.extend([dtype, tf32]) or onnx)
    record = export(network, Fake(), tmp_path / "net.engine", Options(dtype=dtype, batch=2))
    assert asked[1:] == [dtype, False] and asked[0].dtype == dtype and asked[0].accelerator == "cuda"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.engine", "net.engine.json"] == record["files"]
    about = json.loads((tmp_path / "net.engine.json").read_text())
    assert about["opset"] == record["opset"] == 17 and about["task"] == "x" and about["input"]["shape"] == [2, 3, 8, 8]
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


def fake_runtime(outputs: dict[str, torch.Tensor], runs: bool = True) -> SimpleNamespace:
    """The names of TensorRT's runtime that the format uses; its engine gives constants, in this order."""
    io = {**outputs, "input": torch.zeros(1, 3)}
    names = list(io)
    buffers = {name: torch.empty_like(value) for name, value in io.items()}

    def execute(stream: int) -> bool:
        for name, value in outputs.items():
            buffers[name].copy_(value)
        return runs

    built = SimpleNamespace(
        num_io_tensors=len(names),
        get_tensor_name=lambda i: names[i],
        get_tensor_mode=lambda name: SimpleNamespace(name="INPUT" if name == "input" else "OUTPUT"),
        create_execution_context=lambda: SimpleNamespace(execute_async_v3=execute),
    )
    return SimpleNamespace(
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: built),
        make_buffers=lambda engine, context: ([buffers["input"]], [buffers[name] for name in outputs]),
    )


@pytest.mark.parametrize("runs", [True, False])
def test_outputs_are_found_by_name_and_a_failed_run_is_plain(tmp_path: Path, monkeypatch: Any, runs: bool) -> None:
    fake = fake_runtime({"boxes": torch.ones(1, 4), "scores": torch.full((1, 4), 2.0)}, runs)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(engine, "make_buffers", fake.make_buffers)
    monkeypatch.setattr(engine, "make_logger", lambda tensorrt: SimpleNamespace(text=lambda: "out of memory"))
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    path = tmp_path / "net.engine"
    path.write_bytes(b"")
    (tmp_path / "net.engine.json").write_text(json.dumps({"outputs": [{"name": "scores"}, {"name": "boxes"}]}))
    run = Engine().open(path)
    image = np.zeros((1, 3), np.float32)
    if runs:
        assert [float(out[0, 0]) for out in run(image)] == [2.0, 1.0]
    else:
        with pytest.raises(ExportError, match=r"could not run the engine: out of memory$"):
            run(image)


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_switched_off_where_it_is_asked(monkeypatch: Any, tf32: bool) -> None:
    cleared: list[str] = []
    builder = SimpleNamespace(
        create_network=lambda flags: None,
        create_builder_config=lambda: SimpleNamespace(clear_flag=cleared.append),
        build_serialized_network=lambda network, config: b"plan",
    )
    fake = SimpleNamespace(
        BuilderFlag=SimpleNamespace(FP16="FP16", TF32="TF32"),
        NetworkDefinitionCreationFlag=SimpleNamespace(),
        Builder=lambda logger: builder,
        OnnxParser=lambda network, logger: SimpleNamespace(parse=lambda onnx: True),
    )
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(tensorrt, "make_logger", lambda module: None)
    assert tensorrt.build_engine(b"", "fp32", tf32=tf32) == b"plan"
    assert cleared == ([] if tf32 else ["TF32"])
