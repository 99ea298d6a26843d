"""Latency of networks: measure one, build a table over a search space, predict from a table.

python tools/latency.py measure prunet_p0 --backend onnxruntime --threads 1 --json
python tools/latency.py table prunet_cpu_small --out tables/small.jsonl
python tools/latency.py predict work_dirs/search/spec.json --table tables/small.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from prunet_zoo.errors import PrunetError

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
    from prunet_zoo.errors import SpecError
    from prunet_zoo.latency import measure

    size = args.input_size
    if size is not None and len(size) > 2:
        raise SpecError(f"--input-size takes one side or height and width, got {len(size)} numbers")
    record = measure(
        args.arch,
        backend=args.backend,
        input_size=None if size is None else (size[0], size[-1]),
        batch=args.batch,
        threads=args.threads,
        dtype=args.dtype,
        accelerator=args.device,
        seconds=args.seconds,
    )
    if args.json:
        return json.dumps(record.to_dict(), indent=2)
    height, width = record.input_size
    return (
        f"{record.spec_name}: {record.median_ms:.4g} ms "
        f"(p10 {record.p10_ms:.4g}, p90 {record.p90_ms:.4g}, {record.n} runs) for "
        f"{record.batch}×{height}×{width} px, {record.dtype}, {record.backend} {record.backend_version}, "
        f"{record.threads} thread(s), {record.device}"
    )


def run_table(args: argparse.Namespace) -> str:
    """Build a table or go on with one; returns what is to be printed."""
    from prunet_zoo.latency import QUICK, Effort, build_table, progress_bar

    with progress_bar("latency table") as progress:
        table = build_table(
            args.space,
            args.out,
            backend=args.backend,
            threads=args.threads,
            dtype=args.dtype,
            batch=args.batch,
            accelerator=args.device,
            effort=QUICK if args.quick else Effort(),
            progress=progress,
        )
    about = table.describe()
    if args.json:
        return json.dumps(about, indent=2)
    fit = about["correction"]
    return (
        f"{args.out}: {about['blocks']} blocks of {about['space_name']} on {about['device']}, {about['backend']}; "
        f"{fit['networks']} whole networks, each predicted from the others: typical error {fit['typical_error']:.1%}, "
        f"worst {fit['worst_error']:.1%}"
    )


def run_predict(args: argparse.Namespace) -> str:
    """Look a network up; returns what is to be printed."""
    from prunet_zoo.latency import LatencyTable
    from prunet_zoo.spec import load_spec

    if args.arch.endswith(".safetensors"):
        from prunet_zoo.models import read_weights_spec

        spec = read_weights_spec(args.arch)
    else:
        spec = load_spec(args.arch)
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
