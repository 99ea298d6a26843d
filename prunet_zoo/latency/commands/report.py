"""tools/latency.py report: the zoo's and timm's networks on this machine, as a page with pictures."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.commands.setting import add_setting


def add(commands: Any) -> None:
    """Add the parser."""
    report = commands.add_parser(
        "report",
        help="a page with pictures: accuracy, predictions, blocks; goes on where it was interrupted",
    )
    report.set_defaults(run=run)
    report.add_argument("--out", required=True, metavar="DIR", help="folder of the records, the page and the pictures")
    report.add_argument(
        "--networks",
        nargs="+",
        metavar="NAME",
        help="networks or families with a published top-1, e.g. prunet_p0 ResNet timm/efficientnet_b0 (default: all)",
    )
    report.add_argument(
        "--quick", action="store_true", help="only networks for inputs up to 224 px, fewer random ones, no repeats"
    )
    report.add_argument(
        "--table", action="append", default=[], metavar="FILE", help="a table of this device, to be checked; repeatable"
    )
    report.add_argument(
        "--random", type=int, metavar="N", help="random networks measured for each table (default: 16; 6 with --quick)"
    )
    report.add_argument(
        "--blocks",
        nargs="*",
        metavar="NAME",
        help="networks measured block by block: listed names or specs (default: the zoo's among --networks)",
    )
    report.add_argument("--seconds", type=float, default=0.4, help="time on each network (default: %(default)s)")
    add_setting(report)
    report.add_argument("--json", action="store_true", help="print all figures as JSON")


def run(args: argparse.Namespace) -> str:
    """Measure, write the report; returns what is to be printed."""
    from prunet_zoo.latency.accuracy import select_networks
    from prunet_zoo.latency.backends import Setting
    from prunet_zoo.latency.memory import SMALLER_BATCH, check_archs, memory_told
    from prunet_zoo.latency.progress import progress_bar
    from prunet_zoo.latency.record import ATTEMPTS
    from prunet_zoo.latency.report import ReportPlan, make_report

    count = args.random if args.random is not None else (6 if args.quick else 16)
    if count < 2:
        raise LatencyError(f"--random takes a number from 2, got {count}")
    if not (math.isfinite(args.seconds) and args.seconds >= 0):
        raise LatencyError(f"--seconds takes a number from 0, got {args.seconds}")
    networks = select_networks(args.networks, args.quick)
    zoo = [n.name for n in networks if n.weights is None]
    setting = Setting(args.threads, args.dtype, args.batch, args.device, args.memory_format)
    blocks = zoo if args.blocks is None else args.blocks
    for network in networks:
        check_archs([network.name], network.input_size, setting, SMALLER_BATCH)
    check_archs(blocks, None, setting, SMALLER_BATCH)
    plan = ReportPlan(
        networks=networks,
        tables=[Path(path) for path in args.table],
        random=count,
        blocks=blocks,
        backend=args.backend,
        setting=setting,
        seconds=args.seconds,
        attempts=1 if args.quick else ATTEMPTS,
    )
    what = [network.name for network in networks]
    with memory_told(what, args.device, SMALLER_BATCH), progress_bar("latency report") as progress:
        data = make_report(args.out, plan, progress)
    return json.dumps(data, indent=2) if args.json else _describe(Path(args.out), data)


def _describe(out: Path, data: dict[str, Any]) -> str:
    disturbed = [n["label"] for n in data["networks"] if n["record"]["disturbed"]]
    reference = data["reference"]
    lines = [
        f"{out / 'report.html'}: {len(data['networks'])} networks; on the Pareto line: {', '.join(data['pareto'])}",
        f"{reference['name']}, measured in each of {len(reference['median_ms'])} groups: "
        f"figures within {reference['spread']:.1%}",
    ]
    if disturbed:
        lines.append(f"disturbed, see the page for reasons: {', '.join(disturbed)}")
    for p in data["predictions"]:
        lines.append(f"{p['source']} ({p['about']}): median error {p['typical']:.1%}, worst {p['worst']:.1%}")
    for b in data["blocks"]:
        lines.append(
            f"{b['spec_name']}: blocks sum to {b['sum_ms']:.4g} ms, the whole network takes {b['whole_ms']:.4g} ms"
        )
    return "\n".join(lines)
