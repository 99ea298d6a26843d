"""TensorRT through ``trtexec``, the protocol of the published figures: ``trtexec --onnx=… --fp16``, batch 1, median of
"GPU Compute Time" over all runs of 3 s (https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/Classification/GPUNet).

The engine is built once and saved; a call of `Session.visit` is one process that loads it and exports the time of each
run. ``trtexec`` queues a run while the one before it is on the GPU, so launch gaps do not count, and does not flush
caches. Options have changed between releases: those of the program at hand are read from its ``--help``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from prunet_zoo.errors import LatencyError
from prunet_zoo.files import write_atomic
from prunet_zoo.latency.backends.base import Backend, Session, Setting, example_input
from prunet_zoo.latency.backends.cuda import gpu_name
from prunet_zoo.latency.backends.torch_eager import TORCH_DTYPES
from prunet_zoo.latency.backends.trtexec_program import Program, read_output, read_times
from prunet_zoo.models.export import export_onnx

VARIABLE = "PRUNET_TRTEXEC"  # environment variable: path of the program
USUAL_PLACES = ("/usr/src/tensorrt/bin/trtexec", "/usr/local/tensorrt/bin/trtexec", "/opt/tensorrt/bin/trtexec")
WORKSPACE_MIB = 10240  # as published; releases before 8.4 would take 16 MiB, later ones the whole memory
DURATION_S = 3.0  # trtexec's own default, as its warm-up of 200 ms is
SPARE_RUNS = 10  # asked for beyond n: the last of the warm-up may be counted among the runs


class Trtexec(Backend):
    """Found through ``PRUNET_TRTEXEC``, on PATH or where NVIDIA's packages put it."""

    name = "trtexec"
    install = (
        "apt install libnvinfer-bin (from NVIDIA's repository) or unpack TensorRT's tar archive; pip packages do not "
        f"have the program. Put it on PATH or name it: export {VARIABLE}=/path/to/trtexec"
    )
    dtypes = {"cuda": ("fp32", "fp16", "bf16")}  # noqa: RUF012  (ClassVar in the base)

    def __init__(self) -> None:
        self._program: Program | None = None

    @property
    def program(self) -> Program:
        """The program found; raises `ImportError` where there is none."""
        if self._program is None:
            self._program = Program.open(find_trtexec())
        return self._program

    @property
    def version(self) -> str:
        return self.program.version

    def check(self, setting: Setting) -> None:
        super().check(setting)
        if setting.dtype == "bf16" and not self.program.strongly_typed and "--bf16" not in self.program.options:
            raise LatencyError(f"trtexec {self.version} has no bf16; use fp16 (--dtype) or TensorRT 10 and newer")
        gpu_name()

    def device_name(self, accelerator: str) -> str:
        return gpu_name()

    def prepare(self, module: nn.Module, input_shape: tuple[int, int, int, int], setting: Setting) -> Session:
        program, folder = self.program, tempfile.TemporaryDirectory(prefix="prunet_trtexec_")
        place = Path(folder.name)
        dtype = TORCH_DTYPES[setting.dtype] if program.strongly_typed else torch.float32
        write_atomic(place / "model.onnx", export_onnx(module, input_shape, dtype=dtype))
        program.run(*build_options(program, place, setting.dtype))
        if not (place / "model.engine").is_file():
            raise LatencyError(f"trtexec {self.version} ended without an error but saved no engine")
        x = torch.from_numpy(example_input(input_shape)).to(dtype)
        write_atomic(place / "input.bin", x.view(torch.uint8).numpy().tobytes())
        return TrtexecSession(program, folder)


class TrtexecSession(Session):
    """Runs the engine in ``folder``. Starting the process takes seconds, so all runs belong into one call."""

    def __init__(self, program: Program, folder: tempfile.TemporaryDirectory[str]) -> None:
        super().__init__(lambda: self.sample(1), solo=True, output=self._read_output)
        self.program, self.folder = program, folder

    def visit(self, seconds: float) -> list[float]:
        """The GPU compute time of all runs of trtexec's own 3 s, or of ``seconds`` where that is more; ms."""
        return self._time(*([f"--duration={seconds:g}"] if seconds > DURATION_S else []))

    def _time(self, *options: str) -> list[float]:
        place = Path(self.folder.name)
        times = place / "times.json"
        times.unlink(missing_ok=True)
        log = self.program.run(f"--loadEngine={place / 'model.engine'}", f"--exportTimes={times}", *options)
        return read_times(times, log)

    def sample(self, n: int) -> list[float]:
        """The GPU compute time of ``n`` runs, ms, after trtexec's own warm-up."""
        found = self._time(f"--iterations={n + SPARE_RUNS}", "--duration=0")
        if len(found) < n:
            raise LatencyError(f"trtexec {self.program.version} timed {len(found)} runs, {n} were asked for")
        return found[-n:]

    def _read_output(self) -> np.ndarray:
        place = Path(self.folder.name)
        values = place / "output.json"
        values.unlink(missing_ok=True)
        self.program.run(
            f"--loadEngine={place / 'model.engine'}", "--iterations=1", "--duration=0", "--warmUp=0",
            f"--loadInputs=input:{place / 'input.bin'}", f"--exportOutput={values}",
        )  # fmt: skip
        return read_output(values)


def find_trtexec() -> Path:
    """The program's path; raises `ImportError`, as a missing library does."""
    named = os.environ.get(VARIABLE)
    if named:
        if not Path(named).is_file():
            raise ImportError(f"{VARIABLE} names {named}, where no file is")
        return Path(named)
    on_path = shutil.which("trtexec")
    for path in (on_path, *USUAL_PLACES):
        if path is not None and Path(path).is_file():
            return Path(path)
    raise ImportError("no program trtexec on PATH")


def build_options(program: Program, folder: Path, dtype: str) -> list[str]:
    """Options that build ``folder/model.engine`` from ``folder/model.onnx``, as this release knows them."""
    options = [f"--onnx={folder / 'model.onnx'}", f"--saveEngine={folder / 'model.engine'}"]
    if dtype != "fp32" and not program.strongly_typed:
        options.append(f"--{dtype}")
    for skip in ("--skipInference", "--buildOnly"):  # the name from 8.6 on, and before
        if skip in program.options:
            options.append(skip)
            break
    if "--memPoolSize" not in program.options and "--workspace" in program.options:
        options.append(f"--workspace={WORKSPACE_MIB}")
    return options
