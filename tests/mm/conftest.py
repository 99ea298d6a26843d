"""What tests share: for ``prunet://`` a weights folder of their own and models in the zoo's index; mmcv's operators."""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer

from prunet_zoo import save_weights
from prunet_zoo.data.scenes import write_scenes
from prunet_zoo.mm.cli import load_config, run_tool
from prunet_zoo.mm.compat import SubstituteExt
from prunet_zoo.mm.epoch_loop import ResumableEpochLoop
from prunet_zoo.models import create_model
from prunet_zoo.zoo.fetch import DownloadError
from prunet_zoo.zoo.index import ModelEntry, load_index

State = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def random_state() -> Callable[[torch.nn.Module], State]:
    """Makes the state dict of a model with statistics that differ from a fresh network's."""

    def make(model: torch.nn.Module) -> State:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    return make


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights folder of a test module."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def zoo_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The weights folder, no way to the network, and MMEngine's default scope as it was."""

    def offline(*args: Any, **kwargs: Any) -> None:
        raise DownloadError("no address could be reached")

    monkeypatch.setenv("PRUNET_HOME", str(home))
    monkeypatch.delenv("PRUNET_MIRROR", raising=False)
    monkeypatch.setattr("prunet_zoo.zoo.download.fetch", offline)
    kept = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(kept)


@pytest.fixture
def list_model(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a model, whose spec lies in its weights, into the zoo's index: ``list_model(name, **fields)``."""

    def put(name: str, **fields: Any) -> None:
        preprocess = {"input_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
        weights = {"file": f"{name}.zip", "url": "https://example.invalid/x", "licence": "Apache-2.0", "origin": "test"}
        classes = tuple(str(i) for i in range(10))
        data = {"name": name, "config": "x.py", "classes": classes, "preprocess": preprocess, "weights": weights}
        monkeypatch.setitem(load_index(), name, ModelEntry.model_validate({**data, **fields}))

    return put


@pytest.fixture
def tiny(
    home: Path,
    tiny_config: Path,
    list_model: Callable[..., None],
    random_state: Callable[[torch.nn.Module], State],
) -> State:
    """``prunet://tiny``: a classifier for 10 classes, with the architecture of `tiny_config`."""
    list_model("tiny")
    torch.manual_seed(6)
    model = create_model(load_config(tiny_config).model.arch.to_dict())
    state = random_state(model)
    save_weights(home / "tiny.safetensors", state, model.spec)
    return state


@pytest.fixture
def torch_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """mmcv.ops calls `prunet_zoo.mm.ops`, also where a compiled mmcv is installed."""
    importlib.import_module("mmcv.ops")
    for name, module in list(sys.modules.items()):
        if name.startswith("mmcv.ops.") and hasattr(module, "ext_module"):
            monkeypatch.setattr(module, "ext_module", SubstituteExt())


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test runs: on the CPU, and on a GPU if there is one."""
    return request.param


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Digit scenes, 10 for training and 5 for validation, where the configs in ``scale_configs/`` look for them."""
    folder = write_scenes(tmp_path_factory.mktemp("data") / "scenes", train=10, val=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCENES", str(folder))
        yield Path(folder)


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def run(tmp_path: Path, load_tool: Callable[[str], ModuleType], free_port: int) -> Callable[..., list[tuple[int, str]]]:
    """Runs a tool in processes of its own, forked so that nothing is imported again.

    ``run("train", argv, count=2, kill=(1, 7))`` starts two that belong together, and the second kills itself (-9)
    before its seventh step; with ``kill="epoch_2.pth"`` the first does while it writes that file. Returns each one's
    exit status and what it wrote.
    """
    for name in ("datasets", "engine", "evaluation", "models", "visualization"):
        importlib.import_module(f"mmdet.{name}")
    importlib.import_module("torch._dynamo")  # the optimisers import it

    def plain(text: str, **kwargs: Any) -> tuple[str, bool]:
        return text, False  # MMEngine lays the config out anew for every checkpoint: most of a small run's time

    def start(number: int, tool: str, argv: list[str], count: int, kill: Any, output: Path) -> None:
        with output.open("wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        os.chdir(tmp_path)
        for kept in (Visualizer, MessageHub, MMLogger, DefaultScope, *Visualizer.__subclasses__()):
            kept._instance_dict.clear()  # of earlier tests of this process
        sys.modules["mmengine.config.config"].FormatCode = plain  # type: ignore[attr-defined]
        if count > 1:
            places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "WORLD_SIZE": str(count)}
            os.environ.update(places, RANK=str(number), LOCAL_RANK=str(number))
            argv = [*argv, "--launcher", "pytorch"]
        if isinstance(kill, tuple) and kill[0] == number:
            kill_before_step(kill[1])
        elif isinstance(kill, str) and number == 0:
            kill_while_writing(kill)
        sys.argv = [f"tools/{tool}.py", *argv]
        run_tool(load_tool(tool).main)

    def call(tool: str, argv: list[str], count: int = 1, kill: Any = None) -> list[tuple[int, str]]:
        context = multiprocessing.get_context("fork")
        outputs = [tmp_path / f"output{number}.txt" for number in range(count)]
        jobs = [context.Process(target=start, args=(i, tool, argv, count, kill, outputs[i])) for i in range(count)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(240)
            if job.exitcode is None:
                job.kill()
                job.join()
        return [(int(job.exitcode or 0), out.read_text()) for job, out in zip(jobs, outputs, strict=True)]

    return call


def kill_before_step(step: int) -> None:
    """Have this process killed before it trains on its ``step``-th batch."""
    usual, count = ResumableEpochLoop.run_iter, itertools.count(1)

    def run_iter(loop: ResumableEpochLoop, *args: Any) -> None:
        if next(count) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        usual(loop, *args)

    ResumableEpochLoop.run_iter = run_iter  # type: ignore[method-assign]


def kill_while_writing(name: str) -> None:
    """Have this process killed when the file called ``name`` is written but does not stand in its place yet."""
    usual = os.fsync

    def fsync(handle: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{handle}"):
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        usual(handle)

    os.fsync = fsync
