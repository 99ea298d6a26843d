"""The timing loop and its record.

The statistic, for a machine that others use too: runs are timed one by one, in short rounds. A round that something
else disturbed has a high median. The latency is the median over the runs of the *quieter third of the rounds*; the
10th and 90th percentiles are over all runs, so that a record shows how disturbed its machine was. On a quiet machine
the value lies slightly under the plain median. It is not the minimum: it is what a run takes when nothing else
happens.

On one CPU thread a run that the system interrupted counts with its CPU time (`Session`), which is what makes networks
of tens of milliseconds measurable on a machine with more work than cores. What another process does to shared caches
and memory stays in the figure.

Several networks that are to be compared are measured together, round by round in turn (`time_together`), so that a slow
minute slows all of them. The blocks of a table are run one by one in turn (`time_in_turn`), so that each finds the
caches as it would inside a network, filled by the others.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends import Backend, Session, Setting, get_backend
from prunet_zoo.latency.probes import randomise
from prunet_zoo.models import create_model
from prunet_zoo.spec import Frozen, NetSpec, Size, as_size, load_spec, parse

ROUND_MS = 8.0  # long enough that a switch between networks does not matter, short enough to fall between disturbances
STABLE = 0.02  # warm-up ends when a round is within this of the best before it


class Timing(Frozen):
    """Latency in ms with its spread: ``median_ms`` of the quieter rounds, percentiles and count of all runs."""

    median_ms: float = Field(ge=0.0)
    p10_ms: float = Field(ge=0.0)
    p90_ms: float = Field(ge=0.0)
    n: int = Field(ge=1)
    rounds: int = Field(ge=1)
    warmup_runs: int = Field(ge=0)
    interrupted: int = Field(default=0, ge=0)  # runs that count with their CPU time


class Record(Timing):
    """One measurement with everything it depends on. JSON in and out (`to_dict`, `from_dict`)."""

    spec_name: str
    spec_hash: str
    input_size: tuple[int, int]
    device: str
    accelerator: str
    backend: str
    backend_version: str
    dtype: str
    batch: int
    threads: int
    date: str  # ISO 8601, UTC

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, every field."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, data: Any) -> Record:
        """Read back what `to_dict` gave; raises `SpecError` naming the field."""
        return parse(cls, data, "latency record")


def summarise(rounds: Sequence[Sequence[float]], warmup_runs: int = 0, interrupted: int = 0) -> Timing:
    """Reduce runs (ms), grouped by round, to the statistic of this module."""
    if not rounds or not all(rounds):
        raise LatencyError("a latency needs at least one round with at least one run")
    quiet = sorted(rounds, key=statistics.median)[: -(-len(rounds) // 3)]
    everything = sorted(t for group in rounds for t in group)
    last = len(everything) - 1
    return Timing(
        median_ms=statistics.median(t for group in quiet for t in group),
        p10_ms=everything[round(0.1 * last)],
        p90_ms=everything[round(0.9 * last)],
        n=len(everything),
        rounds=len(rounds),
        warmup_runs=warmup_runs,
        interrupted=interrupted,
    )


def warm_up(session: Session, max_seconds: float = 0.25) -> tuple[float, int]:
    """Run until a round is no more than 2% slower than the best before it, and a few runs more, within a time limit.

    Returns:
        (latency of one run in ms, number of runs made).
    """
    start = time.perf_counter()
    best, runs = min(session.sample(2)), 2
    while True:
        group = session.sample(_runs_per_round(best))
        runs += len(group)
        now = statistics.median(group)
        settled = runs >= 5 and abs(now - best) <= STABLE * best
        best = min(best, now)
        if settled or time.perf_counter() - start > max_seconds:
            return best, runs


def _runs_per_round(ms: float) -> int:
    return max(1, min(1000, round(ROUND_MS / max(ms, 1e-4))))


def time_together(sessions: Sequence[Session], seconds: float = 0.4, min_rounds: int = 9) -> list[Timing]:
    """Time several sessions in turn, a round each, for about ``seconds`` each; all see the same disturbances."""
    warm = [warm_up(session, max_seconds=seconds / 2) for session in sessions]
    round_ms = sum(ms * _runs_per_round(ms) for ms, _ in warm) / len(warm)
    rounds = max(min_rounds, round(seconds * 1e3 / max(round_ms, 1e-4)))
    before = [session.interrupted for session in sessions]
    times: list[list[list[float]]] = [[] for _ in sessions]
    for _ in range(rounds):
        for session, (ms, _runs), mine in zip(sessions, warm, times, strict=True):
            mine.append(session.sample(_runs_per_round(ms)))
    return [
        summarise(mine, runs, session.interrupted - count)
        for session, mine, (_, runs), count in zip(sessions, times, warm, before, strict=True)
    ]


def time_in_turn(sessions: Sequence[Session], seconds: float = 0.06, min_passes: int = 45) -> list[Timing]:
    """Time several sessions, a single run each in turn, for about ``seconds`` each.

    Every run finds caches that the others have filled, as a block does inside a network. Sessions that disturb each
    other for a while after a run (`Session.spins`) are timed round by round instead.
    """
    if any(session.spins for session in sessions):
        return time_together(sessions, seconds)
    warmup = 6
    one = [session.sample(warmup)[-1] for session in sessions]
    passes = min(5000, max(min_passes, round(seconds * 1e3 * len(sessions) / max(sum(one), 1e-4))))
    size = max(3, passes // 20)
    before = [session.interrupted for session in sessions]
    times: list[list[list[float]]] = [[] for _ in sessions]
    for _ in range(passes // size):
        groups: list[list[float]] = [[] for _ in sessions]
        for _ in range(size):
            for session, group in zip(sessions, groups, strict=True):
                group.extend(session.sample(1))
        for mine, group in zip(times, groups, strict=True):
            mine.append(group)
    return [
        summarise(mine, warmup, session.interrupted - count)
        for session, mine, count in zip(sessions, times, before, strict=True)
    ]


def measure(
    arch: str | Path | dict[str, Any] | NetSpec | nn.Module,
    backend: str | Backend = "onnxruntime",
    input_size: Size | None = None,
    batch: int = 1,
    threads: int = 1,
    dtype: str = "fp32",
    accelerator: str = "cpu",
    seconds: float = 0.4,
) -> Record:
    """Measure the latency of a network in eval mode.

    Args:
        arch: a listed name, spec, dict, path of a spec (``.json``) or of weights (``.safetensors``), or a ready
            module with a ``spec``. A network given without weights gets random ones of ordinary scale.
        backend: a name of `list_backends`.
        input_size: one side or (H, W), px; None takes the spec's.
        batch: images a run.
        threads: CPU threads.
        dtype: "fp32", "fp16" or "bf16", as the backend can.
        accelerator: "cpu" or "cuda".
        seconds: time to spend on runs, besides warm-up.

    Raises:
        LatencyError: the backend is missing or cannot do what is asked.
        UnknownNameError, SpecError, CheckpointError: about ``arch`` or ``backend``.
    """
    engine, setting = get_backend(backend), Setting(threads, dtype, batch, accelerator)
    engine.check(setting)
    spec, module = _network(arch)
    size = as_size(spec.input_size if input_size is None else input_size)
    list(spec.placed(size))  # raises SpecError where the input is too small
    with engine.environment(setting):
        session = engine.prepare(module, (batch, spec.in_channels, *size), setting)
        timing = time_together([session], seconds)[0]
    return Record(
        **timing.model_dump(),
        spec_name=spec.name,
        spec_hash=spec.hash,
        input_size=size,
        device=engine.device_name(accelerator),
        accelerator=accelerator,
        backend=engine.name,
        backend_version=engine.version,
        dtype=dtype,
        batch=batch,
        threads=threads,
        date=now(),
    )


def now() -> str:
    """The time in ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _network(arch: str | Path | dict[str, Any] | NetSpec | nn.Module) -> tuple[NetSpec, nn.Module]:
    if isinstance(arch, nn.Module):
        spec = getattr(arch, "spec", None)
        if not isinstance(spec, NetSpec):
            raise LatencyError(f"a module to be measured needs its NetSpec as .spec; {type(arch).__name__} has none")
        return spec, arch
    if str(arch).endswith(".safetensors"):
        model = create_model(arch)
        return model.spec, model
    spec = load_spec(arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spec, randomise(create_model(spec))
