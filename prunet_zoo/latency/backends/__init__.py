"""Latency backends by name, one file each, imported when asked for."""

from __future__ import annotations

from importlib import import_module

from prunet_zoo.errors import unknown_name
from prunet_zoo.latency.backends.base import Backend, Session, Setting

_BACKENDS = {"torch": "torch_eager:TorchEager", "onnxruntime": "onnxruntime:OnnxRuntime"}

__all__ = ["Backend", "Session", "Setting", "get_backend", "list_backends"]


def list_backends() -> list[str]:
    """Names that `get_backend` takes, installed or not."""
    return sorted(_BACKENDS)


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
