"""TensorRT through its Python API, releases 8.6 to 11: the engine is built from ONNX and timed with CUDA events.

Until release 10, precision is a flag of the builder, which may then also choose fp16 or bf16 kernels for an fp32
network, as ``trtexec --fp16`` does. From release 11 on all networks are strongly typed: the flags are gone, and the
ONNX file holds the types. The names used here exist in the bindings of 8.6.1, 10.4, 10.16 and 11.4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends.base import Backend, Session, Setting, example_input
from prunet_zoo.latency.backends.cuda import CudaSession, gpu_name, require_cuda
from prunet_zoo.latency.backends.torch_eager import TORCH_DTYPES
from prunet_zoo.models.export import export_onnx

OLDEST = (8, 6)
DEVICE = "cuda"
_FLAGS = {"fp16": "FP16", "bf16": "BF16"}
_TENSOR_DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT32": torch.int32}


class TensorRT(Backend):
    """An engine on a CUDA stream of its own; torch holds the buffers."""

    name = "tensorrt"
    install = "pip install onnx tensorrt (a V100 needs tensorrt-cu12==10.4.0 or older: docs/v100.md)"
    dtypes = {"cuda": ("fp32", "fp16", "bf16")}  # noqa: RUF012  (ClassVar in the base)

    @property
    def version(self) -> str:
        import tensorrt

        return str(tensorrt.__version__)

    def check(self, setting: Setting) -> None:
        super().check(setting)
        import tensorrt

        if tuple(int(part) for part in self.version.split(".")[:2]) < OLDEST:
            raise LatencyError(
                f"backend {self.name!r} needs TensorRT 8.6 or newer, this is {self.version}; run: {self.install}"
            )
        if setting.dtype == "bf16" and not (is_strongly_typed(tensorrt) or hasattr(tensorrt.BuilderFlag, "BF16")):
            raise LatencyError(f"TensorRT {self.version} has no bf16; use fp16 (--dtype) or TensorRT 10 and newer")
        require_cuda(self.name)

    def device_name(self, accelerator: str) -> str:
        return gpu_name()

    def prepare(self, module: nn.Module, input_shape: tuple[int, int, int, int], setting: Setting) -> Session:
        import tensorrt

        typed = is_strongly_typed(tensorrt)
        onnx = export_onnx(module, input_shape, dtype=TORCH_DTYPES[setting.dtype] if typed else torch.float32)
        plan = build_engine(onnx, setting.dtype)
        logger = make_logger(tensorrt)
        runtime = tensorrt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise LatencyError(f"TensorRT {self.version} cannot load the engine that it built: {logger.text()}")
        context = engine.create_execution_context()
        inputs, outputs = make_buffers(engine, context)
        inputs[0].copy_(torch.from_numpy(example_input(input_shape)))
        stream = torch.cuda.Stream()
        kept = (runtime, engine, inputs)  # must outlive the context

        def run() -> object:
            if not context.execute_async_v3(stream.cuda_stream):
                raise LatencyError(f"TensorRT could not run the engine: {logger.text()}")
            return kept

        def output() -> np.ndarray:
            torch.cuda.synchronize()
            run()
            stream.synchronize()
            return outputs[0].float().cpu().numpy()

        return CudaSession(run, stream, output)


def make_buffers(engine: Any, context: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tensors on the GPU for the engine's (inputs, outputs), bound to ``context``."""
    buffers: dict[str, list[torch.Tensor]] = {"INPUT": [], "OUTPUT": []}
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        dtype = _TENSOR_DTYPES[engine.get_tensor_dtype(name).name]
        tensor = torch.empty(tuple(engine.get_tensor_shape(name)), dtype=dtype, device=DEVICE)
        context.set_tensor_address(name, tensor.data_ptr())
        buffers[engine.get_tensor_mode(name).name].append(tensor)
    return buffers["INPUT"], buffers["OUTPUT"]


def is_strongly_typed(tensorrt: Any) -> bool:
    """Whether this release takes the types from the network alone (11 and newer)."""
    return not hasattr(tensorrt.BuilderFlag, "FP16")


def build_engine(onnx: bytes, dtype: str, tf32: bool = True) -> bytes:
    """Build a serialised engine from an ONNX model of fixed input shape, for the first GPU.

    Args:
        onnx: the model; in ``dtype`` where TensorRT is strongly typed (`is_strongly_typed`), otherwise in fp32.
        dtype: "fp32", "fp16" or "bf16".
        tf32: whether fp32 may be computed in TensorFloat-32, where the GPU has it.

    Raises:
        LatencyError: TensorRT does not read the model or cannot build it; its messages are given.
    """
    import tensorrt

    logger = make_logger(tensorrt)
    builder = tensorrt.Builder(logger)
    explicit = getattr(tensorrt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)  # needed until 9, gone in 11
    network = builder.create_network(0 if explicit is None else 1 << int(explicit))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(onnx):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise LatencyError(f"TensorRT {tensorrt.__version__} does not read this ONNX model: {'; '.join(errors[:3])}")
    config = builder.create_builder_config()
    if dtype in _FLAGS and not is_strongly_typed(tensorrt):
        config.set_flag(getattr(tensorrt.BuilderFlag, _FLAGS[dtype]))
    if not tf32 and hasattr(tensorrt.BuilderFlag, "TF32"):
        config.clear_flag(tensorrt.BuilderFlag.TF32)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise LatencyError(f"TensorRT {tensorrt.__version__} could not build the engine: {logger.text()}")
    return bytes(plan)


def make_logger(tensorrt: Any) -> Any:
    """An ``ILogger`` that keeps errors, for messages, and prints nothing."""

    class Errors(tensorrt.ILogger):
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (tensorrt.Logger.INTERNAL_ERROR, tensorrt.Logger.ERROR):
                self.lines.append(message)

        def text(self) -> str:
            return "; ".join(self.lines[-3:]) or "it gave no reason"

    return Errors()
