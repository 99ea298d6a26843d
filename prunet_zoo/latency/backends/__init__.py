"""Latency backends by name, one file each, imported when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

from prunet_zoo.errors import LatencyError, unknown_name
from prunet_zoo.latency.backends.base import Backend, Session, Setting, example_input
from prunet_zoo.latency.backends.verify import check_output

_BACKENDS = {
    "torch": "torch_eager:TorchEager",
    "torch-compile": "torch_compile:TorchCompile",
    "cuda-graph": "cuda_graph:CudaGraph",
    "onnxruntime": "onnxruntime:OnnxRuntime",
    "onnxruntime-cuda": "onnxruntime_gpu:OnnxRuntimeCuda",
    "onnxruntime-tensorrt": "onnxruntime_gpu:OnnxRuntimeTensorRT",
    "openvino": "openvino:OpenVino",
    "tensorrt": "tensorrt:TensorRT",
    "trtexec": "trtexec:Trtexec",
}

__all__ = [
    "Availability",
    "Backend",
    "Session",
    "Setting",
    "available_backends",
    "check_output",
    "example_input",
    "get_backend",
    "list_backends",
]


class Availability(NamedTuple):
    """Whether a backend runs on this machine: its ``version``, or the ``reason`` why not and what to install."""

    version: str | None
    reason: str | None


def list_backends() -> list[str]:
    """Names that `get_backend` takes, installed or not."""
    return sorted(_BACKENDS)


def available_backends() -> dict[str, Availability]:
    """What `list_backends` names, and whether it runs here, on its first accelerator."""
    found = {}
    for name in list_backends():
        backend = get_backend(name)
        accelerator = next(iter(backend.dtypes))
        try:
            backend.check(Setting(dtype=backend.dtypes[accelerator][0], accelerator=accelerator))
            found[name] = Availability(backend.version, None)
        except LatencyError as error:
            found[name] = Availability(None, str(error))
    return found


def get_backend(backend: str | Backend) -> Backend:
    """Return the backend of a name, or the object itself.

    Raises:
        UnknownNameError: no such backend; the nearest names are suggested.
    """
    if isinstance(backend, Backend):
        return backend
    if backend not in _BACKENDS:
        raise unknown_name("latency backend", backend, list_backends())
    module, cls = _BACKENDS[backend].split(":")
    return getattr(import_module(f"prunet_zoo.latency.backends.{module}"), cls)()
