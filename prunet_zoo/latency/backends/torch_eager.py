"""PyTorch eager, as the user's own ``model(x)``: BatchNorm is not folded. CPU, or CUDA timed with events.

Rep blocks are measured as they are deployed, as one convolution each (``model.switch_to_deploy()``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from prunet_zoo.latency.backends.base import Backend, Session, Setting, cpu_name, example_input
from prunet_zoo.latency.backends.cuda import CudaSession, gpu_name, require_cuda
from prunet_zoo.latency.backends.verify import first_output
from prunet_zoo.models import switch_to_deploy

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class TorchEager(Backend):
    """``model(x)`` in inference mode. Base of the backends that run the module itself."""

    name = "torch"
    install = "pip install torch"
    quick_prepare = True
    dtypes = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "fp16", "bf16")}  # noqa: RUF012  (ClassVar in the base)
    memory_formats = ("contiguous", "channels_last")

    @property
    def version(self) -> str:
        return str(torch.__version__)

    def check(self, setting: Setting) -> None:
        super().check(setting)
        if setting.accelerator == "cuda":
            require_cuda(self.name)

    def device_name(self, accelerator: str) -> str:
        return gpu_name() if accelerator == "cuda" else cpu_name()

    @contextmanager
    def environment(self, setting: Setting) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(setting.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def prepare(self, module: nn.Module, input_shape: tuple[int, int, int, int], setting: Setting) -> Session:
        ready, x = place(module, input_shape, setting)
        return make_session(ready, x, setting)


def place(
    module: nn.Module, input_shape: tuple[int, int, int, int], setting: Setting
) -> tuple[nn.Module, torch.Tensor]:
    """A copy of ``module`` in eval mode, its rep blocks deployed, and the example input, both in the setting's dtype,
    device and layout."""
    device, dtype = torch.device(setting.accelerator), TORCH_DTYPES[setting.dtype]
    layout: Any = _LAYOUTS[setting.memory_format]
    ready: Any = copy.deepcopy(module).eval()
    switch_to_deploy(ready)
    ready = ready.to(device=device, dtype=dtype).to(memory_format=layout)
    x = torch.from_numpy(example_input(input_shape)).to(device=device, dtype=dtype, memory_format=layout)
    return ready, x


def make_session(call: Callable[[torch.Tensor], Any], x: torch.Tensor, setting: Setting) -> Session:
    """A session that runs ``call(x)`` in inference mode."""

    def run() -> object:
        with torch.inference_mode():
            return call(x)

    def output() -> np.ndarray:
        return first_output(run()).float().cpu().numpy()

    if x.device.type == "cuda":
        return CudaSession(run, output=output)
    return Session(run, in_thread=setting.threads == 1, output=output)
