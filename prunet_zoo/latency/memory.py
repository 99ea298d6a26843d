"""Networks and inputs that do not fit into memory are refused in one sentence, before anything is built or written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from prunet_zoo.errors import LatencyError, PrunetError, few
from prunet_zoo.latency.backends import Setting
from prunet_zoo.latency.subject import TIMM, find_arch
from prunet_zoo.models.backbone import resolve_arch
from prunet_zoo.models.memory import is_out_of_memory, shortage, widest_layer
from prunet_zoo.models.pruned import build_pruned, is_pruned_file, load_pruned_spec
from prunet_zoo.spec import NetSpec, Size, as_size

SMALLER = "take a smaller --input-size or --batch"
SMALLER_BATCH = "take a smaller --batch"


def check_memory(spec: NetSpec, size: Size | None, batch: int, dtype: str, advice: str = SMALLER) -> None:
    """Raise `LatencyError` when the maps around a single layer alone exceed the free memory: measuring would swap, or
    the system would end the process."""
    need = 0
    for place in spec.placed(size):
        inside, outside = (math.prod(side) for side in (place.in_size, place.out_size))
        hidden, before = place.block.hidden or 0, place.in_channels * inside
        expand = hidden * (outside if place.block.type == "fused_irb" else inside)
        need = max(need, before + (expand if hidden else place.block.out_channels * outside))
    _refuse(spec.name, next(iter(spec.placed(size))).in_size, need * batch, batch, dtype, advice)


def check_archs(archs: Sequence[str], size: Size | None, setting: Setting, advice: str = SMALLER) -> None:
    """The same for networks as `prunet_zoo.latency.measure` takes them, at ``size`` or else their own, on the CPU."""
    if setting.accelerator != "cpu" or setting.batch < 1:
        return
    for arch in (find_arch(name, with_weights=False) for name in archs):
        if not (arch.startswith(TIMM) or is_pruned_file(arch)):
            check_memory(resolve_arch(arch), size, setting.batch, setting.dtype, advice)
            continue
        built = _of_pruned(arch) if is_pruned_file(arch) else _of_timm(arch)
        if built is None:
            continue
        module, channels, own = built
        height, width = as_size(own if size is None else size)
        need = widest_layer(module, (setting.batch, channels, height, width))
        _refuse(arch, (height, width), need, setting.batch, setting.dtype, advice)


def _refuse(name: str, size: tuple[int, int], elements: int, batch: int, dtype: str, advice: str) -> None:
    if lack := shortage(name, elements, dtype):
        raise LatencyError(f"{batch}×{size[0]}×{size[1]} px needs {lack}; {advice}")


def _of_timm(arch: str) -> tuple[Any, int, tuple[int, int]] | None:
    """A network of timm without data, its channels and input size; None where there is none, which is told later."""
    import timm

    try:
        with torch.device("meta"):
            module = timm.create_model(arch.removeprefix(TIMM))
        cfg: Any = module.pretrained_cfg
        channels, height, width = cfg.get("test_input_size") or cfg["input_size"]
    except Exception:  # an unknown name, or a network that cannot be built without data
        return None
    return module, channels, (height, width)


def _of_pruned(arch: str) -> tuple[Any, int, tuple[int, int]] | None:
    spec = load_pruned_spec(arch)
    try:
        with torch.device("meta"):
            module = build_pruned(spec)
    except Exception:
        return None
    return module, spec.in_channels, as_size(spec.input_size)


@contextmanager
def memory_told(names: Sequence[str], accelerator: str, advice: str = SMALLER) -> Iterator[None]:
    """Turn a failed allocation into an error that says what to do."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:
        if isinstance(error, PrunetError) or not is_out_of_memory(error):
            raise
        verb = "does" if len(names) == 1 else "do"
        raise LatencyError(f"{few(names)} {verb} not fit into the memory of {accelerator}; {advice}") from error
