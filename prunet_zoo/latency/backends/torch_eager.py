"""PyTorch eager, as the user's own ``model(x)``: BatchNorm is not folded. CPU, or CUDA timed with events."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends.base import Backend, Session, Setting, cpu_name

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class CudaSession(Session):
    """Times the stream with CUDA events. The device is idle when a run starts, so launch gaps count, as at batch 1."""

    def sample(self, n: int) -> list[float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(n):
            torch.cuda.synchronize()
            start.record()
            self.run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return times


class TorchEager(Backend):
    """``model(x)`` in inference mode."""

    name = "torch"
    install = "pip install torch"
    dtypes = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "fp16", "bf16")}  # noqa: RUF012  (ClassVar in the base)

    @property
    def version(self) -> str:
        return str(torch.__version__)

    def check(self, setting: Setting) -> None:
        super().check(setting)
        if setting.accelerator == "cuda" and not torch.cuda.is_available():
            raise LatencyError("backend 'torch' was asked for cuda, but torch sees no CUDA device; use the cpu")

    def device_name(self, accelerator: str) -> str:
        return str(torch.cuda.get_device_name()) if accelerator == "cuda" else cpu_name()

    @contextmanager
    def environment(self, setting: Setting) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(setting.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def prepare(self, module: nn.Module, input_shape: tuple[int, int, int, int], setting: Setting) -> Session:
        dtype, device = _DTYPES[setting.dtype], torch.device(setting.accelerator)
        ready = copy.deepcopy(module).eval().to(device=device, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(input_shape, generator=generator).to(device=device, dtype=dtype)

        def run() -> object:
            with torch.inference_mode():
                return ready(x)

        if device.type == "cuda":
            return CudaSession(run)
        return Session(run, in_thread=setting.threads == 1)
