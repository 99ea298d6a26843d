"""Where a network's time goes: each block measured in a probe of its own, next to the whole network.

All probes, their bare frames (`prunet_zoo.latency.probes`) and the network are run in turn, one run each, so that each
finds the caches filled by the others and a slow minute slows all of them; on the CPU, rounds in which the processor was
slow do not count. A block's figure is its probe less its frame, and a cheap one's may come out below 0. What the sum
lacks or exceeds of the whole network is shown too: the call, fusion across blocks, gaps between kernels.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from pydantic import Field
from torch import nn

from prunet_zoo.latency.backends import Backend, Setting, get_backend
from prunet_zoo.latency.device import fingerprint
from prunet_zoo.latency.interleave import time_sets
from prunet_zoo.latency.probes import Probe, block_probe, randomise
from prunet_zoo.latency.record import now
from prunet_zoo.latency.references import References, recall, reference_key
from prunet_zoo.models import create_model
from prunet_zoo.models.layers import ConvNormAct, PooledHead
from prunet_zoo.spec import BlockSpec, Frozen, NetSpec, load_spec

Place = tuple[BlockSpec, int, tuple[int, int]]


class Part(Frozen):
    """A block of a network or its tail, with its latency in ms. ``in_size`` is (H, W) before it."""

    name: str
    kind: str  # a block's type, or "tail": last 1×1 convolution, pooling, classifier
    stage: int
    stride: int = Field(ge=1)
    in_size: tuple[int, int]
    ms: float


class Breakdown(Frozen):
    """The parts of one network and the whole network, measured in one go. Latencies in ms."""

    spec_name: str
    spec_hash: str
    input_size: int
    device: str
    accelerator: str
    backend: str
    backend_version: str
    dtype: str
    batch: int
    threads: int
    memory_format: str
    date: str
    whole_ms: float = Field(gt=0.0)
    parts: tuple[Part, ...]

    @property
    def sum_ms(self) -> float:
        """Sum over the parts."""
        return sum(part.ms for part in self.parts)

    def by_kind(self) -> dict[str, float]:
        """Latency in ms of all parts of a kind."""
        total: dict[str, float] = {}
        for part in self.parts:
            total[part.kind] = total.get(part.kind, 0.0) + part.ms
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, every field and the sum."""
        return {**self.model_dump(mode="json"), "sum_ms": self.sum_ms}


def break_down(
    arch: str | NetSpec, backend: str | Backend = "onnxruntime", setting: Setting | None = None, seconds: float = 0.06
) -> Breakdown:
    """Measure a network block by block, at its own input size.

    Args:
        arch: a listed name, path of a spec, or a spec.
        backend: a name of `list_backends`.
        setting: how it is run; None: one thread, fp32, batch 1, on the CPU.
        seconds: time to spend on each probe.

    Raises:
        LatencyError: the backend is missing or cannot do what is asked.
        SpecError, UnknownNameError: about ``arch`` or ``backend``.
    """
    spec, engine, setting = load_spec(arch), get_backend(backend), setting or Setting()
    engine.check(setting)
    parts, whole_ms = _measure(spec, engine, setting, seconds)
    return Breakdown(
        spec_name=spec.name,
        spec_hash=spec.hash,
        input_size=spec.input_size,
        device=engine.device_name(setting.accelerator),
        backend=engine.name,
        backend_version=engine.version,
        date=now(),
        whole_ms=whole_ms,
        parts=tuple(parts),
        **asdict(setting),
    )


def _measure(spec: NetSpec, engine: Backend, setting: Setting, seconds: float) -> tuple[list[Part], float]:
    """Every part of a network, and the whole network's latency in ms."""
    placed = list(spec.placed())
    last = placed[-1]
    places: list[Place] = list(dict.fromkeys((p.block, p.in_channels, p.in_size) for p in placed))
    end = (last.block.out_channels, last.out_size)
    shapes = list(dict.fromkeys([*(place[1:] for place in places), end]))
    with engine.environment(setting), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules: list[nn.Module] = [block_probe(None, *shape) for shape in shapes]
        modules += [block_probe(*place, bn_eps=spec.bn_eps) for place in places]
        modules += [_tail_probe(spec, *end), create_model(spec)]
        inputs = [m.in_shape if isinstance(m, Probe) else _image_shape(spec) for m in modules]
        sessions = [
            engine.prepare(randomise(m), (setting.batch, *shape), setting)
            for m, shape in zip(modules, inputs, strict=True)
        ]
        references = None
        if setting.accelerator == "cpu":
            references = References(recall(reference_key(fingerprint(engine, setting)["hash"])))
        (series,) = time_sets([sessions], seconds, references)
        *timings, tail_ms, whole_ms = (runs.timing(references).median_ms for runs in series)
    frame = dict(zip(shapes, timings, strict=False))
    probe = dict(zip(places, timings[len(shapes) :], strict=True))
    parts = []
    for p in placed:
        ms = probe[p.block, p.in_channels, p.in_size] - frame[p.in_channels, p.in_size]
        parts.append(_part(p.name, p.block.type, p.stage, p.stride, p.in_size, ms))
    parts.append(_part("tail", "tail", last.stage + 1, last.stride, last.out_size, tail_ms - frame[end]))
    return parts, whole_ms


def _part(name: str, kind: str, stage: int, stride: int, in_size: tuple[int, int], ms: float) -> Part:
    return Part(name=name, kind=kind, stage=stage, stride=stride, in_size=in_size, ms=ms)


def _image_shape(spec: NetSpec) -> tuple[int, int, int]:
    return (spec.in_channels, spec.input_size, spec.input_size)


def _tail_probe(spec: NetSpec, channels: int, size: tuple[int, int]) -> Probe:
    """Last convolution, pooling and classifier of a network in the frame of a probe."""
    tail = spec.tail
    layers = [
        ConvNormAct(channels, tail.out_channels, act=tail.act, eps=spec.bn_eps),
        PooledHead(tail.out_channels, tail.head_hidden, tail.act),
        nn.Linear(tail.features, spec.num_classes) if spec.num_classes else nn.Identity(),
    ]
    return Probe(ConvNormAct(1, channels, act=None), *layers, in_shape=(1, *size))
