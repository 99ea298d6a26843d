"""Latency of networks: measure one, build a table over a search space, predict from a table.

python tools/latency.py measure prunet_p0 --backend onnxruntime --threads 1 --json
python tools/latency.py table prunet_cpu_small --out tables/small.jsonl
python tools/latency.py predict work_dirs/search/spec.json --table tables/small.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prunet_zoo.errors import LatencyError, PrunetError, SpecError

if TYPE_CHECKING:
    from prunet_zoo.spec import NetSpec

EPILOG = """examples:
  python tools/latency.py measure prunet_p0 --backend onnxruntime --input-size 224 --threads 1 --json
  python tools/latency.py table prunet_cpu_small --out tables/small.jsonl
  python tools/latency.py predict work_dirs/search/spec.json --table tables/small.jsonl
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Measure, tabulate and predict the latency of networks.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="measure | table | predict")

    one = commands.add_parser("measure", help="measure one network")
    one.add_argument("arch", help="listed name, spec (.json) or weights with a spec inside (.safetensors)")
    one.add_argument(
        "--input-size", type=int, nargs="+", metavar="PX", help="side, or height and width (default: the spec's)"
    )
    one.add_argument("--seconds", type=float, default=0.4, help="time to spend on runs (default: %(default)s)")
    _add_setting(one)
    one.add_argument("--json", action="store_true", help="print the whole record as JSON")

    table = commands.add_parser("table", help="measure the blocks of a search space; goes on where it was interrupted")
    table.add_argument("space", help="listed name or .json of a search space")
    table.add_argument("--num-classes", type=int, metavar="N", help="classes of the networks (default: the space's)")
    table.add_argument("--out", required=True, metavar="FILE", help="the table (JSON lines)")
    table.add_argument("--quick", action="store_true", help="fewer widths, fewer networks, less time on each")
    _add_setting(table)
    table.add_argument("--json", action="store_true", help="print what the table is of as JSON")

    predict = commands.add_parser("predict", help="latency of a network from a table of its space")
    predict.add_argument("arch", help="listed name, spec (.json) or weights with a spec inside (.safetensors)")
    predict.add_argument("--table", required=True, metavar="FILE", help="a table made by the command 'table'")
    predict.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def _add_setting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="onnxruntime", help="onnxruntime or torch (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images a run (default: %(default)s)")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "fp16", "bf16"), help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")


def run_measure(args: argparse.Namespace) -> str:
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


def run_table(args: argparse.Namespace) -> str:
    """Build a table or go on with one; returns what is to be printed."""
    from prunet_zoo.latency import QUICK, Effort, build_table, progress_bar
    from prunet_zoo.search import cost_range
    from prunet_zoo.space import load_space

    space = load_space(args.space)
    if args.num_classes is not None:
        space = space.replace(num_classes=args.num_classes)
    with progress_bar("latency table") as progress:
        table = build_table(
            space,
            args.out,
            backend=args.backend,
            threads=args.threads,
            dtype=args.dtype,
            batch=args.batch,
            accelerator=args.device,
            effort=QUICK if args.quick else Effort(),
            progress=progress,
        )
    (fastest, _), (slowest, _) = cost_range(table, space)
    about = {**table.describe(), "fastest_ms": fastest, "slowest_ms": slowest}
    if args.json:
        return json.dumps(about, indent=2)
    fit = about["correction"]
    return (
        f"{args.out}: {about['blocks']} blocks of {about['space_name']} on {about['device']}, {about['backend']}; "
        f"{fit['networks']} whole networks, each predicted from the others: typical error {fit['typical_error']:.1%}, "
        f"worst {fit['worst_error']:.1%}\n"
        f"fastest network of the space {fastest:.4g} ms, slowest {slowest:.4g} ms: a search's target lies between them"
    )


def run_predict(args: argparse.Namespace) -> str:
    """Look a network up; returns what is to be printed."""
    from prunet_zoo.latency import LatencyTable
    from prunet_zoo.models.backbone import resolve_arch

    spec = resolve_arch(args.arch)
    table = LatencyTable.load(args.table)
    ms = table(spec)
    if args.json:
        return json.dumps(
            {"spec_name": spec.name, "spec_hash": spec.hash, "predicted_ms": ms, **table.describe()}, indent=2
        )
    header = table.header
    return f"{spec.name}: {ms:.4g} ms predicted for {header.device}, {header.backend}, {header.threads} thread(s)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse_args(argv)
    run = {"measure": run_measure, "table": run_table, "predict": run_predict}[args.command]
    try:
        print(run(args))
    except PrunetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; what was measured is kept, the same command goes on" if args.command == "table" else ""
        print(f"interrupted{again}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
