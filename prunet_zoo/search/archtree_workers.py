"""Recovery, score and importance of pruned networks, in this process or in others.

A job is a module, so that other processes know nothing of masks and super-networks. It is handed over in files: shared
memory is scarce in containers. A network learns the same in this process and in another one with one thread.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prunet_zoo.errors import TrainingError
from prunet_zoo.search.memory import resident_peak_mb
from prunet_zoo.search.strategy import Batch, Services

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4


@dataclass(frozen=True)
class Recovered:
    """A network after its recovery: weights on the CPU, top-1 accuracy in percent and mean loss on held-out images."""

    state: dict[str, torch.Tensor]
    accuracy: float
    loss: float


@dataclass(frozen=True)
class RecoverJob:
    """Train ``module`` on batches of ``seed``, then score it; ``steps`` 0: score it as it is."""

    module: nn.Module
    seed: int
    steps: int
    lr: float


@dataclass(frozen=True)
class ImportanceJob:
    """How much each channel of the groups matters.

    ``counts``: channels of each group, ``norms``: names of its BatchNorms, ``sources``: of the layers that make its
    channels, for 'taylor' where it has no BatchNorm; () for all: no group needs them.
    """

    module: nn.Module
    seed: int
    counts: tuple[int, ...]
    norms: tuple[tuple[str, ...], ...]
    kind: str
    steps: int  # batches
    sources: tuple[tuple[str, ...], ...] = ()


Job = RecoverJob | ImportanceJob


def recover(job: RecoverJob, batches: Sequence[Batch], held: Sequence[Batch], device: str) -> Recovered:
    """SGD with momentum 0.9 and a learning rate that falls to 0 as a cosine, one step a batch (ours)."""
    module = job.module.to(device)
    with torch.random.fork_rng(devices=_cuda(device)):
        torch.manual_seed(job.seed)
        module.train()
        optimizer = torch.optim.SGD(
            module.parameters(), job.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        for step, (images, labels) in enumerate(batches):
            optimizer.param_groups[0]["lr"] = job.lr * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
            optimizer.zero_grad()
            F.cross_entropy(module(images.to(device)), labels.to(device)).backward()
            optimizer.step()
    accuracy, loss = score(module, held, device)
    return Recovered({k: v.detach().cpu().clone() for k, v in module.state_dict().items()}, accuracy, loss)


@torch.no_grad()
def score(module: nn.Module, held: Sequence[Batch], device: str) -> tuple[float, float]:
    """Top-1 accuracy in percent and mean cross-entropy."""
    module.eval()
    right, loss, seen = 0, 0.0, 0
    for images, labels in held:
        logits, labels = module(images.to(device)).float(), labels.to(device)
        right += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        seen += len(labels)
    return 100.0 * right / max(1, seen), loss / max(1, seen)


def channel_importance(job: ImportanceJob, batches: Sequence[Batch], device: str) -> list[torch.Tensor]:
    """Importance (C,) of the channels of each group, float64 on the CPU.

    'taylor': the first-order change of the loss when the channel's normalised output is set to 0,
    |γ·∂L/∂γ + β·∂L/∂β|, summed over the group's norms, mean over the batches, in eval mode (arXiv 1906.10771 for BN
    gates; both terms are ours). In a group without norms the same for the outputs of its layers: |∂L/∂g| of a gate g,
    1 for each channel, behind each of ``sources`` (that paper's gate; γ·∂L/∂γ + β·∂L/∂β is ∂L/∂g of one behind a norm),
    so that groups can be compared. 'magnitude': |γ|, summed over the norms.
    """
    module = job.module.to(device).eval()
    norms = [_norms(module, names, count) for names, count in zip(job.norms, job.counts, strict=True)]
    totals = [torch.zeros(count, dtype=torch.float64) for count in job.counts]
    if job.kind == "magnitude":
        for total, group in zip(totals, norms, strict=True):
            for norm in group:
                total += norm.weight.detach().abs().double().cpu()
        return totals
    gates = [_gates(module, names) for names in job.sources or [()] * len(norms)]
    for images, labels in batches:
        module.zero_grad()
        F.cross_entropy(module(images.to(device)), labels.to(device)).backward()
        for total, group, behind in zip(totals, norms, gates, strict=True):
            for norm in group:
                total += _taylor(norm).double().cpu() / len(batches)
            for gate in behind:
                total += gate.grad.abs().double().cpu() / len(batches)
                gate.grad = None
    return totals


def _gates(module: nn.Module, names: Sequence[str]) -> list[Any]:
    """A gate (C,) of ones behind each of these convolutions and linear layers of a module."""
    found = []
    for name in names:
        layer: Any = module.get_submodule(name)
        shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        gate = layer.weight.new_ones(layer.weight.shape[0]).requires_grad_(True)
        layer.register_forward_hook(lambda _, args, output, gate=gate, shape=shape: output * gate.view(shape))
        found.append(gate)
    return found


def _norms(module: nn.Module, names: Sequence[str], count: int) -> list[Any]:
    """The norms of a group that are left: where channels are gone an identity branch may be part of a convolution."""
    known = dict(module.named_modules())
    found = [known[name] for name in names if name in known]
    return [norm for norm in found if getattr(norm, "weight", None) is not None and norm.weight.shape[0] == count]


def _taylor(norm: Any) -> torch.Tensor:
    pairs = [(norm.weight, norm.weight.grad), (norm.bias, norm.bias.grad)]
    return sum((p.detach() * g for p, g in pairs if g is not None), torch.zeros_like(norm.weight)).abs()


def _cuda(device: str) -> list[int]:
    return [torch.device(device).index or 0] if device.startswith("cuda") else []


def run_job(job: Job, batches: Sequence[Batch], held: Sequence[Batch], device: str) -> Any:
    """`recover` or `channel_importance`."""
    if isinstance(job, RecoverJob):
        return recover(job, batches, held, device)
    return channel_importance(job, batches, device)


class Evaluator:
    """Runs jobs, in this process or in ``workers`` others; the results do not depend on which.

    The batches of a job, and the held-out batches, are in memory at once.

    Args:
        services: the loop's batches.
        folder: for files that pass between processes; emptied at the start and removed at the end.
        workers: number of processes, each with one thread; 0: this process.
        held_batches: held-out batches that a score is of (None: all).
        device: of the networks.
    """

    def __init__(
        self, services: Services, folder: Path, workers: int = 0, held_batches: int | None = None, device: str = "cpu"
    ) -> None:
        self.services, self.folder, self.workers, self.device = services, folder, workers, device
        self.held = list(islice(services.held(), held_batches))
        if not self.held:
            raise TrainingError("the held-out part of the images gives no batch; add images or lower batch_size")
        self._pool: ProcessPoolExecutor | None = None
        self._peaks: dict[int, float] = {}  # MB, by process

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def workers_mb(self) -> float:
        """The greatest resident memory of each other process so far, in MB, summed up; memory that they share counts
        for each. 0 without workers."""
        return sum(self._peaks.values())

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """Results in the order of the jobs; raises `TrainingError` when a process dies."""
        if not self.workers:
            return [run_job(job, self._batches(job), self.held, self.device) for job in jobs]
        try:
            return list(self._spread(jobs))
        except BrokenProcessPool:
            raise TrainingError(
                "a process that trains pruned networks died (out of memory?); run the command again with fewer workers "
                "(train_cfg.strategy.workers): it goes on where it stopped"
            ) from None

    def _batches(self, job: Job) -> list[Batch]:
        return list(islice(self.services.train(job.seed), job.steps)) if job.steps else []

    def _spread(self, jobs: Sequence[Job]) -> Iterator[Any]:
        """Batches are drawn here, job by job, and no further ahead than the processes need them."""
        pool = self._pool or self._start()
        waiting: deque[tuple[Path, Future[tuple[int, float]]]] = deque()
        for number, job in enumerate(jobs):
            path = self.folder / f"job_{number}.pt"
            torch.save((job, self._batches(job)), path)
            waiting.append((path, pool.submit(_work, str(path), self.device)))
            if len(waiting) > self.workers:
                yield self._result(*waiting.popleft())
        while waiting:
            yield self._result(*waiting.popleft())

    def _start(self) -> ProcessPoolExecutor:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        torch.save(self.held, self.folder / "held.pt")
        self._pool = ProcessPoolExecutor(
            self.workers, multiprocessing.get_context("spawn"), _begin, (str(self.folder / "held.pt"),)
        )
        return self._pool

    def _result(self, path: Path, future: Future[tuple[int, float]]) -> Any:
        process, peak = future.result()
        self._peaks[process] = max(peak, self._peaks.get(process, 0.0))
        found = torch.load(path, weights_only=False)  # written by our own process a moment ago
        path.unlink()
        return found


_held: list[Batch] = []  # of a worker process


def _begin(held: str) -> None:
    """Start of a worker: one thread, Ctrl-C is the parent's to handle, and no life without the parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _held.extend(torch.load(held, weights_only=False))


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _work(path: str, device: str) -> tuple[int, float]:
    """Do a job; the result takes its file's place. Returns this process's id and peak memory in MB."""
    job, batches = torch.load(path, weights_only=False)
    torch.save(run_job(job, batches, _held, device), path)
    return os.getpid(), resident_peak_mb()
