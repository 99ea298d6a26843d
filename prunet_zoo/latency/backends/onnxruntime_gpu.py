"""ONNX Runtime on an NVIDIA GPU: the CUDA and the TensorRT execution provider, timed with CUDA events.

ONNX Runtime turns to the CPU without an error where a provider cannot be loaded or does not know an operator. Both are
refused here: the session must have the provider, and no node may be left to the CPU.

fp16 is exported in fp16: the CUDA provider runs what the file says, and so does TensorRT from release 11 on, whose
networks are strongly typed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends.base import Session, Setting, example_input
from prunet_zoo.latency.backends.cuda import CudaSession, gpu_name, require_cuda
from prunet_zoo.latency.backends.onnxruntime import OnnxRuntime, bind, session_options
from prunet_zoo.latency.backends.torch_eager import TORCH_DTYPES
from prunet_zoo.models.export import export_onnx


class OnnxRuntimeCuda(OnnxRuntime):
    """The CUDA provider on a stream of its own; runs are not synchronised by ONNX Runtime but timed on the stream."""

    name = "onnxruntime-cuda"
    install = "pip uninstall -y onnxruntime; pip install onnx onnxruntime-gpu"  # both own the same import name
    dtypes: ClassVar[dict[str, tuple[str, ...]]] = {"cuda": ("fp32", "fp16")}
    provider: ClassVar[str] = "CUDAExecutionProvider"

    def check(self, setting: Setting) -> None:
        super().check(setting)
        import onnxruntime

        if self.provider not in onnxruntime.get_available_providers():
            raise LatencyError(
                f"backend {self.name!r} needs an ONNX Runtime with {self.provider}; this one ({self.version}) has "
                f"{', '.join(onnxruntime.get_available_providers())}; run: {self.install}"
            )
        require_cuda(self.name)

    def device_name(self, accelerator: str) -> str:
        return gpu_name()

    def provider_options(self, setting: Setting, stream: int, folder: Path) -> dict[str, str]:
        """Options of the provider; ``folder`` is this session's own."""
        return {"device_id": "0", "user_compute_stream": str(stream), "cudnn_conv_algo_search": "EXHAUSTIVE"}

    def prepare(self, module: nn.Module, input_shape: tuple[int, int, int, int], setting: Setting) -> Session:
        import onnxruntime

        if hasattr(onnxruntime, "preload_dlls"):  # from 1.21: finds the CUDA libraries of pip packages
            onnxruntime.preload_dlls()
        stream = torch.cuda.Stream()
        folder = tempfile.TemporaryDirectory(prefix="prunet_onnxruntime_")
        options = session_options(setting.threads)
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        session = self._open(
            export_onnx(module, input_shape, dtype=TORCH_DTYPES[setting.dtype]),
            options,
            self.provider_options(setting, stream.cuda_stream, Path(folder.name)),
        )
        x = example_input(input_shape).astype(np.float16 if setting.dtype == "fp16" else np.float32)
        binding = bind(session, x, "cuda")
        unsynchronised = onnxruntime.RunOptions()
        unsynchronised.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def run() -> object:
            session.run_with_iobinding(binding, unsynchronised)
            return folder  # lives as long as the session

        def output() -> np.ndarray:
            session.run_with_iobinding(binding)
            return np.asarray(binding.copy_outputs_to_cpu()[0])

        output()  # builds the engine, chooses convolution algorithms
        return CudaSession(run, stream, output)

    def _open(self, model: bytes, options: Any, provider_options: dict[str, str]) -> Any:
        """The session, or `LatencyError` where ONNX Runtime would run something else than asked."""
        import onnxruntime

        try:
            session = onnxruntime.InferenceSession(model, options, providers=[(self.provider, provider_options)])
        except Exception as error:  # onnxruntime raises its own classes, one a status code
            raise LatencyError(
                f"ONNX Runtime cannot run this network with {self.provider} alone: {str(error).splitlines()[0]}"
            ) from error
        if self.provider not in session.get_providers():
            raise LatencyError(
                f"ONNX Runtime could not load {self.provider} and would run on {', '.join(session.get_providers())} "
                f"instead: {self.libraries}"
            )
        return session

    libraries: ClassVar[str] = (
        "its CUDA libraries do not fit; onnxruntime-gpu names the CUDA and cuDNN it was built for: "
        "https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#requirements"
    )


class OnnxRuntimeTensorRT(OnnxRuntimeCuda):
    """The TensorRT provider. Its engine cache lies in a folder of each session's own: the cache's key does not hold the
    weights, so that two blocks of the same form could get each other's engine."""

    name = "onnxruntime-tensorrt"
    quick_prepare = False
    install = "pip uninstall -y onnxruntime; pip install onnx onnxruntime-gpu tensorrt"
    provider = "TensorrtExecutionProvider"
    libraries = (
        "its TensorRT libraries do not fit; onnxruntime-gpu names the TensorRT it was built for: "
        "https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html#requirements"
    )

    def provider_options(self, setting: Setting, stream: int, folder: Path) -> dict[str, str]:
        return {
            "device_id": "0",
            "user_compute_stream": str(stream),
            "trt_fp16_enable": str(setting.dtype == "fp16"),
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(folder),
        }
