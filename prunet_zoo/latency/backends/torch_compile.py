"""``torch.compile(model)``: TorchInductor, mode "default", static shapes, one graph.

The mode is the one that ``torch.compile`` takes when it is not told otherwise. "max-autotune" tries many kernels for
each matrix product, which takes minutes a network, and a table has hundreds; what it gains beyond that by CUDA graphs
is what the backend ``cuda-graph`` measures.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends.base import Session, Setting
from prunet_zoo.latency.backends.torch_eager import TorchEager, make_session, place


class TorchCompile(TorchEager):
    """Compiled in `prepare`; a graph break is an error, because the rest would run in Python unnoticed."""

    name = "torch-compile"
    quick_prepare = False

    def check(self, setting: Setting) -> None:
        super().check(setting)
        if setting.accelerator == "cpu" and (compiler := missing_compiler()) is not None:
            raise LatencyError(
                f"backend {self.name!r} on the cpu needs a C++ compiler, and {compiler!r} was not found; run: "
                "apt install g++ (or name one in the environment variable CXX)"
            )

    def prepare(self, module: nn.Module, input_shape: tuple[int, int, int, int], setting: Setting) -> Session:
        ready, x = place(module, input_shape, setting)
        session = make_session(torch.compile(own_code(ready), fullgraph=True, dynamic=False), x, setting)
        try:
            session.run()  # compiles
        except Exception as error:  # the compiler's own errors, and whatever its back ends raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise LatencyError(
                f"torch.compile of {type(module).__name__} for input {input_shape} failed: {type(error).__name__}: "
                f"{' '.join(lines[:2])}"
            ) from error
        return session


def own_code(module: nn.Module) -> Callable[[torch.Tensor], Any]:
    """``module`` as a function with a code object of its own.

    torch keeps compiled graphs by code object, not more than eight of them, and tries their guards one after another.
    All networks share the code of ``forward``, so the ninth would not be compiled.
    """

    def call(x: torch.Tensor) -> Any:
        return module(x)

    call.__code__ = call.__code__.replace()  # a copy
    return call


def missing_compiler() -> str | None:
    """The C++ compiler that TorchInductor would call and that is not there; None where it is."""
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", default)
    return None if shutil.which(compiler) else compiler
