"""`measure`: the latency of a network on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends import Backend, Setting, get_backend
from prunet_zoo.latency.probes import randomise
from prunet_zoo.latency.record import Record, now
from prunet_zoo.latency.timing import time_together
from prunet_zoo.models import create_model
from prunet_zoo.spec import NetSpec, Size, as_size, load_spec


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
