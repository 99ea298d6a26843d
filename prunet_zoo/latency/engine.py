"""TensorRT engines as an export format; an engine runs on the kind of GPU and the release that built it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends.base import Setting
from prunet_zoo.latency.backends.tensorrt import TensorRT, build_engine, is_strongly_typed, make_buffers, make_logger
from prunet_zoo.models.export import ExportError, Format, Plan
from prunet_zoo.models.export.formats import Array, RunFile
from prunet_zoo.models.export.onnx import to_onnx_of


class Engine(Format):
    """fp16: TensorRT chooses fp16 kernels (8.6 to 10), or computes in fp16 (11 and newer); input and outputs float32.

    fp32 is float32: TensorFloat-32, which the builder may choose otherwise, has fp16's mantissa. An engine has no place
    for metadata: they lie beside it in ``FILE.json``.
    """

    name, suffix, install, dynamic = "engine", ".engine", TensorRT.install, False
    has_opset, needed = True, True

    @property
    def runtime(self) -> str:
        return f"tensorrt {TensorRT().version}"

    @property
    def half_graph(self) -> bool:
        """Whether the ONNX file must hold the types."""
        import tensorrt

        return is_strongly_typed(tensorrt)

    def write(self, graph: nn.Module, plan: Plan, path: Path) -> dict[str, Any]:
        try:
            TensorRT().check(Setting(dtype=plan.dtype, accelerator="cuda"))
            data, opset = to_onnx_of(graph, plan.example, plan.outputs, False, plan.opset)
            path.write_bytes(build_engine(data, plan.dtype, tf32=False))
        except LatencyError as error:
            raise ExportError(f"no engine can be built here: {error}") from None
        about = {**plan.metadata, "opset": opset}
        _beside(path).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return {"opset": opset}

    def open(self, path: Path) -> RunFile:
        import tensorrt

        logger = make_logger(tensorrt)
        runtime = tensorrt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise ExportError(f"TensorRT cannot load the engine that it built: {logger.text()}")
        context = engine.create_execution_context()
        inputs, outputs = make_buffers(engine, context)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        names = [name for name in names if engine.get_tensor_mode(name).name == "OUTPUT"]
        found = dict(zip(names, outputs, strict=True))  # an engine may have them in another order
        wanted = [out["name"] for out in json.loads(_beside(path).read_text(encoding="utf-8"))["outputs"]]
        stream = torch.cuda.Stream()

        def run(x: Array, kept: object = (runtime, engine)) -> list[Array]:  # these must outlive the context
            inputs[0].copy_(torch.from_numpy(x))
            torch.cuda.synchronize()
            if not context.execute_async_v3(stream.cuda_stream):
                raise ExportError(f"TensorRT could not run the engine: {logger.text()}")
            stream.synchronize()
            return [found[name].float().cpu().numpy() for name in wanted]

        return run


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
