"""Several processes on GPUs or, over gloo, on CPU: joining them, the model's wrapper, what the first one decides.

MMEngine's launchers call ``torch.cuda.set_device`` and its wrapper names a device, so that they run on GPUs only. Here
stands what CPU needs instead; on GPUs everything is left to MMEngine.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, get_world_size, init_dist, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store

from prunet_zoo.errors import PrunetError
from prunet_zoo.mm.search_model import average_buffers
from prunet_zoo.registry import HOOKS, MODEL_WRAPPERS, register

T = TypeVar("T")
_asked = itertools.count()  # calls of `from_first`, counted alike in every process
_joined = False  # whether this process has been one of several
CPU_WRAPPER = "CpuDistributedDataParallel"
# where a launcher tells a process its number, how many there are, and its number on this machine
_TOLD = {
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}


class LaunchError(PrunetError):
    """A launcher did not start this process, or the processes of a run lost each other."""


class SaidByFirstError(PrunetError):
    """The first process has told the user what is wrong; the others end with it and say nothing."""


def on_cpu() -> bool:
    """Whether training runs on CPU: no CUDA, NPU, MLU or MUSA device can be used."""
    return get_device() in ("cpu", "mps")


@contextmanager
def processes(cfg: Config) -> Iterator[None]:
    """Join the processes that ``cfg.launcher`` started, and leave them at the end. One process alone: nothing.

    Raises:
        LaunchError: the launcher's variables are missing, or another process ended.
    """
    launcher = cfg.get("launcher") or "none"
    if launcher == "none" or dist.is_initialized():
        yield
        return
    missing = [name for name in _TOLD[launcher] if name not in os.environ]
    if missing:
        raise LaunchError(
            f"--launcher {launcher} is for processes that {launcher} started, but {', '.join(missing)} is not set; "
            "start them with tools/dist_train.sh or tools/slurm_train.sh, or leave --launcher out"
        )
    _join(cfg, launcher)
    global _joined
    _joined = True
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, PrunetError) or not _lost(error):
            raise
        raise LaunchError(
            f"another process of this run ended or cannot be reached ({str(error).strip().splitlines()[0]}). "
            "Checkpoints that were saved are whole: continue with the same command and --resume"
        ) from error
    finally:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process with ``status``; `sys.exit`, unless `processes` has joined it to others.

    Then Python is not taken down: a thread of gloo that drops the last collective's tensors meanwhile is made to end
    within a destructor, which aborts the process (seen in one of fifty runs on a busy machine, torch 2.11).
    """
    sys.stdout.flush()
    if not _joined:
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(status)


def _join(cfg: Config, launcher: str) -> None:
    options = dict(cfg.get("env_cfg", {}).get("dist_cfg", {}))
    set_multi_processing(**cfg.get("env_cfg", {}).get("mp_cfg", {}), distributed=True)
    if not on_cpu():
        if cfg.get("model_wrapper_cfg", {}).get("type") == CPU_WRAPPER:  # the config that a run on CPU left
            cfg.pop("model_wrapper_cfg")
        init_dist(launcher, **{"backend": "nccl", **options})
        return
    for name, told in zip(_TOLD["pytorch"], _TOLD[launcher], strict=True):
        os.environ[name] = os.environ[told]
    if launcher == "slurm" and "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_host()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(options.get("port", 29500)))
    seconds = options.get("timeout")
    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds) if seconds else None)
    _fit_wrapper(cfg)


def _first_host() -> str:
    """The first machine of a Slurm job."""
    nodes = os.environ.get("SLURM_NODELIST", "")
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        names, told = ([] if done.returncode else done.stdout.split()), done.stderr.strip()
    except OSError as error:
        names, told = [], str(error)
    if not names:
        raise LaunchError(
            f"'scontrol show hostnames {nodes}' does not give the job's machines ({told}); "
            "set MASTER_ADDR to the first one's name"
        )
    return names[0]


def _fit_wrapper(cfg: Config) -> None:
    """Have the model wrapped for CPU; ``find_unused_parameters`` and ``model_wrapper_cfg`` keep their meaning."""
    wrapper = dict(cfg.get("model_wrapper_cfg") or {})
    kind = wrapper.pop("type", MMDistributedDataParallel.__name__)
    if kind not in (MMDistributedDataParallel.__name__, CPU_WRAPPER):
        raise LaunchError(
            f"model_wrapper_cfg.type {kind!r} needs GPUs; on CPU leave model_wrapper_cfg out, or its type"
        )
    unused = bool(cfg.get("find_unused_parameters", False))
    cfg.model_wrapper_cfg = {"broadcast_buffers": False, "find_unused_parameters": unused, **wrapper}
    cfg.model_wrapper_cfg.update(type=CPU_WRAPPER)


def _lost(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def from_first(function: Callable[[], T]) -> T:
    """What ``function`` returns in the first process; the others wait for it, however long it takes, and get the same.

    Raises:
        PrunetError: what the first process raised; in the others `SaidByFirstError`, so that it is said once.
    """
    if get_world_size() == 1:
        return function()
    store, key = _get_default_store(), f"prunet_zoo/from_first/{next(_asked)}"
    told: list[Any] = [None, None]
    mistake: PrunetError | None = None
    if is_main_process():
        try:
            told[0] = function()
        except PrunetError as error:
            mistake, told[1] = error, str(error)
        finally:
            store.set(key, "done")
    while not store.check([key]):  # a collective would give up after minutes, and hear no signal meanwhile
        time.sleep(0.1)
    broadcast_object_list(told)
    if mistake is not None:
        raise mistake
    if told[1] is not None:
        raise SaidByFirstError(told[1])
    return told[0]


@register(MODEL_WRAPPERS)
class CpuDistributedDataParallel(MMDistributedDataParallel):
    """`MMDistributedDataParallel` without a device, so that it runs on CPU.

    SyncBN, which torch has on GPUs only, becomes BatchNorm; the log says so.

    Args:
        module: the model.
        device_ids: ignored, MMEngine's runner gives it.
        kwargs: as in `MMDistributedDataParallel`.
    """

    def __init__(self, module: nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
        synced = sum(isinstance(layer, nn.SyncBatchNorm) for layer in module.modules())
        if synced:
            print_log(
                f"{synced} SyncBN layers run as BatchNorm: SyncBN needs GPUs, so each process normalises its own "
                "part of the batch",
                "current",
                logging.WARNING,
            )
            module = revert_sync_batchnorm(module)
        super().__init__(module=module, **kwargs)


@register(HOOKS)
class SyncStatisticsHook(Hook):
    """Averages BatchNorm's statistics over the processes, of the model and of `EMAHook`'s, at the end of each epoch.

    Without SyncBN each process has seen other images. So all processes validate the same network, and it is the one in
    the checkpoint. One process alone: nothing.
    """

    priority = "VERY_HIGH"  # before the checkpoint is written, and before EMAHook swaps the weights for validation

    def after_train_epoch(self, runner: Runner) -> None:
        self.average(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        if runner._train_loop is not None:
            self.average(runner)

    def before_gathering(self, runner: Runner) -> None:
        """Called by `AtomicCheckpointHook` in all processes, before the first one writes a checkpoint."""
        self.average(runner)

    @staticmethod
    def average(runner: Runner) -> None:
        """Average the floating-point buffers of all processes."""
        if get_world_size() == 1:
            return
        average_buffers(runner.model)
        for hook in runner.hooks:
            if isinstance(hook, EMAHook) and hasattr(hook, "ema_model"):
                average_buffers(hook.ema_model)


def full_precision_on_cpu(cfg: Config) -> None:
    """Make a config with `AmpOptimWrapper` train in float32 where there is no GPU, and say so in the log."""
    wrapper: Any = cfg.get("optim_wrapper") or {}
    kind = wrapper.get("type")
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    if name.rpartition(".")[2] != "AmpOptimWrapper" or not on_cpu():
        return
    for option in ("loss_scale", "dtype", "use_fsdp"):
        wrapper.pop(option, None)
    wrapper.type = "OptimWrapper"
    print_log(
        "mixed precision (optim_wrapper.type='AmpOptimWrapper') needs a GPU, and there is none: training in float32",
        "current",
        logging.WARNING,
    )
