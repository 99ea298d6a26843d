"""tools/latency.py measure: networks, on this machine."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prunet_zoo.errors import LatencyError, PrunetError, SpecError
from prunet_zoo.latency.commands.setting import add_setting
from prunet_zoo.latency.record import ATTEMPTS, append_record, check_log

if TYPE_CHECKING:
    from prunet_zoo.latency import Record
    from prunet_zoo.spec import NetSpec

STOPPED = "stopped; what was appended to the log (--log) so far is kept, nothing else was left behind"


def add(commands: Any) -> None:
    """Add the parser."""
    one = commands.add_parser("measure", help="measure networks; several are measured in turn, to be compared")
    one.set_defaults(run=run)
    one.add_argument(
        "arch",
        nargs="+",
        help="listed name, timm/NAME, spec (.json) or weights with a spec inside (.safetensors)",
    )
    one.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        metavar="PX",
        help="side, or height and width (default: each network's own)",
    )
    one.add_argument("--seconds", type=float, default=0.4, help="time to spend on runs (default: %(default)s)")
    one.add_argument(
        "--attempts",
        type=int,
        default=ATTEMPTS,
        help="measurements at most until two agree undisturbed (default: %(default)s)",
    )
    add_setting(one)
    one.add_argument("--log", metavar="FILE", help="append the records to this file (JSON lines)")
    one.add_argument("--json", action="store_true", help="print the whole record as JSON; of several networks, a list")


def run(args: argparse.Namespace) -> str:
    """Measure networks; returns what is to be printed."""
    from prunet_zoo.latency import measure, measure_together, progress_bar

    size = _checked_size(args)
    if args.log is not None:
        check_log(args.log)  # before any time is spent
    failures: list[PrunetError] = []

    def keep(record: Record) -> None:
        try:
            if args.log is not None and not failures:
                append_record(args.log, record)
        except PrunetError as error:  # the figures are told first
            failures.append(error)

    options: dict[str, Any] = {
        "backend": args.backend,
        "input_size": size,
        "batch": args.batch,
        "threads": args.threads,
        "dtype": args.dtype,
        "accelerator": args.device,
        "seconds": args.seconds,
        "memory_format": args.memory_format,
        "attempts": args.attempts,
    }
    with _memory_told(args):
        if len(args.arch) == 1:
            records = [measure(args.arch[0], **options)]
            keep(records[0])
        else:
            with progress_bar("latency") as progress:
                records = measure_together(args.arch, **options, progress=progress, keep=keep)
    text = _show(records, args.json)
    if failures:
        print(text, flush=True)
        raise failures[0]
    return text


def _show(records: list[Record], as_json: bool) -> str:
    if as_json:
        data = [record.to_dict() for record in records]
        return json.dumps(data if len(data) > 1 else data[0], indent=2)
    return "\n".join(map(describe, records))


def _checked_size(args: argparse.Namespace) -> tuple[int, int] | None:
    """The input size asked for; raises on arguments that cannot be, or do not fit into memory."""
    from prunet_zoo.models.backbone import resolve_arch

    if not (math.isfinite(args.seconds) and args.seconds >= 0):
        raise LatencyError(f"--seconds takes a number from 0, got {args.seconds}")
    if args.input_size is not None and len(args.input_size) > 2:
        raise SpecError(f"--input-size takes one side or height and width, got {len(args.input_size)} numbers")
    size = None if args.input_size is None else (args.input_size[0], args.input_size[-1])
    if args.device == "cpu":
        for arch in args.arch:
            if not arch.startswith("timm/"):
                check_memory(resolve_arch(arch), size, args.batch, args.dtype)
    return size


@contextmanager
def _memory_told(args: argparse.Namespace) -> Iterator[None]:
    """Turn a failed allocation into an error that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        names, verb = ", ".join(args.arch), "does" if len(args.arch) == 1 else "do"
        raise LatencyError(
            f"{names} {verb} not fit into the memory of {args.device}; take a smaller --input-size or --batch"
        ) from error


def describe(record: Record) -> str:
    """One line of text; a second one where the measurement was disturbed."""
    height, width = record.input_size
    line = (
        f"{record.spec_name}: {record.median_ms:.4g} ms "
        f"(95% interval {record.ci_low_ms:.4g} to {record.ci_high_ms:.4g}; "
        f"p10 {record.p10_ms:.4g}, p90 {record.p90_ms:.4g}, {record.n} runs) for "
        f"{record.batch}×{height}×{width} px, {record.dtype}, {record.backend} {record.backend_version}, "
        f"{record.threads} thread(s), {record.device}"
    )
    if not record.disturbed:
        return line
    tries = f"{record.attempts} attempts" if record.attempts > 1 else "1 attempt"
    return f"{line}\n  DISTURBED ({tries}): {'; '.join(record.disturbed)}"


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
