"""What the backends on NVIDIA GPUs share: the clock, the check and the name of the device."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import numpy as np
import torch

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends.base import Session
from prunet_zoo.latency.device import gpu_id


class CudaSession(Session):
    """Times ``run`` with CUDA events on one stream.

    The device is idle when a run starts, so launch gaps count, as at batch 1. Caches are warm: the second-level cache
    is not flushed between runs, as the published protocol (``trtexec``) does not either.

    Args:
        run: starts one run on ``stream``; need not wait for it.
        stream: None takes the current one.
        output: as in `Session`.
    """

    def __init__(
        self,
        run: Callable[[], object],
        stream: torch.cuda.Stream | None = None,
        output: Callable[[], np.ndarray] | None = None,
    ) -> None:
        super().__init__(run, output=output)
        self.stream = stream

    def sample(self, n: int) -> list[float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        with torch.cuda.stream(self.stream):  # None: no change
            for _ in range(n):
                torch.cuda.synchronize()
                start.record()
                self.run()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
        return times


def require_cuda(backend: str) -> None:
    """Raise `LatencyError` where torch has no usable CUDA device."""
    if torch.version.cuda is None:
        raise LatencyError(
            f"backend {backend!r} was asked for cuda, but this torch ({torch.__version__}) is a CPU build; install one "
            "for CUDA: pip install torch --index-url https://download.pytorch.org/whl/cu126"
        )
    if not torch.cuda.is_available():
        raise LatencyError(
            f"backend {backend!r} was asked for cuda, but torch sees no CUDA device; see what nvidia-smi says, "
            "or measure on the cpu"
        )


def gpu_name() -> str:
    """Model name of the GPU in use, from torch or else from ``nvidia-smi``.

    Raises:
        LatencyError: neither knows one.
    """
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", f"--id={gpu_id()}"],
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise LatencyError(
            f"no NVIDIA GPU: torch sees no CUDA device, and nvidia-smi does not answer ({error})"
        ) from None
    if not answer:
        raise LatencyError("no NVIDIA GPU: torch sees no CUDA device, and nvidia-smi names none")
    return answer.splitlines()[0]
