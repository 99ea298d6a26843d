"""What a latency backend is: it prepares a module for one input shape, and the result can be run and timed."""

from __future__ import annotations

import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import nn

from prunet_zoo.errors import LatencyError

_HAS_FINE_CPU_CLOCK = time.get_clock_info("thread_time").resolution <= 1e-6  # 16 ms on Windows
MAX_THREADS = 1024  # more than processors have
SOLO_RUNS = 300  # of a session whose runs are made in one call
INTERRUPTION_NS = 2000  # an interrupt and the switch to another process take longer; the clocks differ by less


@dataclass(frozen=True)
class Setting:
    """How a network is run: everything but the network that its latency depends on.

    ``accelerator``: where it runs, "cpu" or "cuda". ``dtype``: "fp32", "fp16" or "bf16". ``threads``: CPU threads.
    ``memory_format``: "contiguous" (NCHW) or "channels_last" (NHWC) of input and weights.
    """

    threads: int = 1
    dtype: str = "fp32"
    batch: int = 1
    accelerator: str = "cpu"
    memory_format: str = "contiguous"


class Session:
    """A module made ready to run. Subclasses whose device has its own clock override `sample`.

    Args:
        run: one run, complete when it returns.
        in_thread: whether the calling thread alone does the work. Then a run that the operating system interrupted is
            known by its wall time exceeding its CPU time, and counts with the latter: the time it had the processor.
        solo: whether each call of `sample` has a cost of its own outside of the latencies (a process that is started),
            so that all runs are to be made in one call (`visit`).
        spins: whether the session keeps threads of its own busy for a while after a run, so that sessions disturb
            each other when they are run in turn.
        output: makes one run on `example_input` and returns the (first) output; see `Session.output`.

    ``interrupted`` counts the runs that were.
    """

    def __init__(
        self,
        run: Callable[[], object],
        in_thread: bool = False,
        spins: bool = False,
        solo: bool = False,
        output: Callable[[], np.ndarray] | None = None,
    ) -> None:
        self.run = run
        self._output = output
        self.in_thread = in_thread and _HAS_FINE_CPU_CLOCK
        self.spins = spins
        self.solo = solo
        self.interrupted = 0

    def sample(self, n: int) -> list[float]:
        """Run ``n`` times and return each run's latency in ms."""
        run, wall_clock = self.run, time.perf_counter_ns
        cpu_clock = time.thread_time_ns if self.in_thread else wall_clock
        times = []
        for _ in range(n):
            cpu = cpu_clock()
            wall = wall_clock()
            run()
            wall = wall_clock() - wall
            cpu = cpu_clock() - cpu
            if self.in_thread and wall > cpu + INTERRUPTION_NS + cpu // 100:
                self.interrupted += 1
                wall = cpu
            times.append(wall * 1e-6)
        return times

    def visit(self, seconds: float) -> list[float]:
        """All runs of one measurement, of a session that is ``solo``; ms. ``seconds``: time to spend on them."""
        return self.sample(SOLO_RUNS)

    def output(self) -> np.ndarray:
        """What the network gives for `example_input`, as float32: to check that what is timed is right.

        Raises:
            LatencyError: this session cannot show its output.
        """
        if self._output is None:
            raise LatencyError(f"this {type(self).__name__} does not show the network's output")
        return np.asarray(self._output(), dtype=np.float32)


def example_input(input_shape: Sequence[int]) -> np.ndarray:
    """The input (B, C, H, W) that every backend runs on: standard normal values, float32, always the same."""
    return np.random.default_rng(0).standard_normal(tuple(input_shape), dtype=np.float32)


class Backend(ABC):
    """A way to run a network. Importing its module must not import the library behind it."""

    name: ClassVar[str]
    install: ClassVar[str]  # the command that installs it
    dtypes: ClassVar[dict[str, tuple[str, ...]]]  # accelerator → dtypes it can run
    memory_formats: ClassVar[tuple[str, ...]] = ("contiguous",)
    quick_prepare: ClassVar[bool] = False  # a measurement may prepare a network several times

    @property
    @abstractmethod
    def version(self) -> str:
        """Version of the library behind it; raises `ImportError` where it is missing."""

    @abstractmethod
    def prepare(self, module: nn.Module, input_shape: tuple[int, int, int, int], setting: Setting) -> Session:
        """Make ``module`` ready for one input of shape (B, C, H, W)."""

    def environment(self, setting: Setting) -> AbstractContextManager[None]:
        """What must hold while sessions are prepared and run (thread counts); undone afterwards."""
        return nullcontext()

    def device_name(self, accelerator: str) -> str:
        """Name of the hardware."""
        return cpu_name()

    def check(self, setting: Setting) -> None:
        """Raise `LatencyError` when the library is missing or cannot run ``setting``."""
        try:
            self.version  # noqa: B018  (imports the library)
        except (ImportError, OSError) as error:  # OSError: a library of it is missing
            raise LatencyError(
                f"latency backend {self.name!r} needs something that is not installed ({error}); run: {self.install}"
            ) from None
        if setting.accelerator not in self.dtypes:
            raise LatencyError(
                f"backend {self.name!r} does not run on {setting.accelerator!r}; "
                f"it runs on {', '.join(self.dtypes)} (--device)"
            )
        if setting.dtype not in self.dtypes[setting.accelerator]:
            raise LatencyError(
                f"backend {self.name!r} on {setting.accelerator} does not run {setting.dtype!r}; "
                f"it runs {', '.join(self.dtypes[setting.accelerator])} (--dtype)"
            )
        if setting.memory_format not in self.memory_formats:
            raise LatencyError(
                f"backend {self.name!r} does not run {setting.memory_format!r}; "
                f"it runs {' or '.join(map(repr, self.memory_formats))} (--memory-format)"
            )
        for field in ("threads", "batch"):
            if getattr(setting, field) < 1:
                raise LatencyError(f"{field} must be at least 1, got {getattr(setting, field)}")
        if setting.threads > MAX_THREADS:
            raise LatencyError(f"threads must be at most {MAX_THREADS}, got {setting.threads}")


def cpu_name() -> str:
    """Model name of this machine's CPU."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "cpu model") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown CPU"
