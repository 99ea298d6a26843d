"""TensorRT engines as an export format; an engine runs on the kind of GPU and the release that built it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends.base import Setting
from prunet_zoo.latency.backends.tensorrt import TensorRT, build_engine, is_strongly_typed, make_buffers, make_logger
from prunet_zoo.models.export import ExportError, Format, Plan
from prunet_zoo.models.export.formats import Array, RunFile
from prunet_zoo.models.export.onnx import to_onnx


class Engine(Format):
    """fp16: TensorRT chooses fp16 kernels (8.6 to 10), or computes in fp16 (11 and newer); input and outputs float32.

    An engine has no place for metadata: they lie beside it in ``FILE.json``.
    """

    name, suffix, install, dynamic = "engine", ".engine", TensorRT.install, False

    @property
    def runtime(self) -> str:
        return f"tensorrt {TensorRT().version}"

    @property
    def half_graph(self) -> bool:
        """Whether the ONNX file must hold the types."""
        import tensorrt

        return is_strongly_typed(tensorrt)

    def write(self, graph: nn.Module, plan: Plan, path: Path) -> None:
        try:
            TensorRT().check(Setting(dtype=plan.dtype, accelerator="cuda"))
            path.write_bytes(build_engine(to_onnx(graph, plan.example, plan.outputs, False, plan.opset), plan.dtype))
        except LatencyError as error:
            raise ExportError(f"no engine can be built here: {error}") from None
        about = path.with_name(f"{path.name}.json")
        about.write_text(json.dumps(dict(plan.metadata), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def open(self, path: Path) -> RunFile:
        import tensorrt

        logger = make_logger(tensorrt)
        runtime = tensorrt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise ExportError(f"TensorRT cannot load the engine that it built: {logger.text()}")
        context = engine.create_execution_context()
        inputs, outputs = make_buffers(engine, context)
        stream = torch.cuda.Stream()
        kept = (runtime, engine)  # must outlive the context

        def run(x: Array) -> list[Array]:
            inputs[0].copy_(torch.from_numpy(x))
            torch.cuda.synchronize()
            if not context.execute_async_v3(stream.cuda_stream):
                raise ExportError(f"TensorRT could not run the engine ({kept[1]}): {logger.text()}")
            stream.synchronize()
            return [out.float().cpu().numpy() for out in outputs]

        return run
