"""tools/latency.py measure: one network, on this machine."""

from __future__ import annotations

import argparse
import json
import math
import os
from typing import TYPE_CHECKING, Any

from prunet_zoo.errors import LatencyError, SpecError
from prunet_zoo.latency.commands.setting import add_setting

if TYPE_CHECKING:
    from prunet_zoo.spec import NetSpec


def add(commands: Any) -> None:
    """Add the parser."""
    one = commands.add_parser("measure", help="measure one network")
    one.set_defaults(run=run)
    one.add_argument("arch", help="listed name, spec (.json) or weights with a spec inside (.safetensors)")
    one.add_argument(
        "--input-size", type=int, nargs="+", metavar="PX", help="side, or height and width (default: the spec's)"
    )
    one.add_argument("--seconds", type=float, default=0.4, help="time to spend on runs (default: %(default)s)")
    add_setting(one)
    one.add_argument("--json", action="store_true", help="print the whole record as JSON")


def run(args: argparse.Namespace) -> str:
    """Measure one network; returns what is to be printed."""
    from prunet_zoo.latency import measure
    from prunet_zoo.models.backbone import resolve_arch

    if not (math.isfinite(args.seconds) and args.seconds >= 0):
        raise LatencyError(f"--seconds takes a number from 0, got {args.seconds}")
    if args.input_size is not None and len(args.input_size) > 2:
        raise SpecError(f"--input-size takes one side or height and width, got {len(args.input_size)} numbers")
    size = None if args.input_size is None else (args.input_size[0], args.input_size[-1])
    if args.device == "cpu":
        check_memory(resolve_arch(args.arch), size, args.batch, args.dtype)
    try:
        record = measure(
            args.arch,
            backend=args.backend,
            input_size=size,
            batch=args.batch,
            threads=args.threads,
            dtype=args.dtype,
            accelerator=args.device,
            seconds=args.seconds,
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise LatencyError(
            f"{args.arch} does not fit into the memory of {args.device}; take a smaller --input-size or --batch"
        ) from error
    if args.json:
        return json.dumps(record.to_dict(), indent=2)
    height, width = record.input_size
    return (
        f"{record.spec_name}: {record.median_ms:.4g} ms "
        f"(p10 {record.p10_ms:.4g}, p90 {record.p90_ms:.4g}, {record.n} runs) for "
        f"{record.batch}×{height}×{width} px, {record.dtype}, {record.backend} {record.backend_version}, "
        f"{record.threads} thread(s), {record.device}"
    )


def check_memory(spec: NetSpec, size: tuple[int, int] | None, batch: int, dtype: str) -> None:
    """Raise `LatencyError` when the maps around a single layer alone exceed the free memory: measuring would swap, or
    the system would end the process."""
    need = 0
    for place in spec.placed(size):
        inside, outside = (math.prod(side) for side in (place.in_size, place.out_size))
        hidden, before = place.block.hidden or 0, place.in_channels * inside
        expand = hidden * (outside if place.block.type == "fused_irb" else inside)
        need = max(need, before + (expand if hidden else place.block.out_channels * outside))
    need *= batch * (4 if dtype == "fp32" else 2)
    free = free_memory()
    if free is not None and need > free:
        height, width = next(iter(spec.placed(size))).in_size
        raise LatencyError(
            f"{batch}×{height}×{width} px needs at least {need / 2**30:,.1f} GiB for one layer of {spec.name!r}, "
            f"{free / 2**30:,.1f} GiB of memory are free; take a smaller --input-size or --batch"
        )


def free_memory() -> int | None:
    """Bytes that can be taken without swapping; None where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):  # not Linux
        return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator raised: numpy's and torch's on a GPU are told by type, the others by their message."""
    import torch

    named = ("DefaultCPUAllocator", "Failed to allocate memory")  # torch on the CPU, ONNX Runtime
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(name in str(error) for name in named)
