"""tools/latency.py table: the blocks of a search space, on this machine; goes on where it was interrupted."""

from __future__ import annotations

import argparse
import json
from typing import Any

from prunet_zoo.latency.commands.setting import add_setting


def add(commands: Any) -> None:
    """Add the parser."""
    table = commands.add_parser("table", help="measure the blocks of a search space; goes on where it was interrupted")
    table.set_defaults(run=run)
    table.add_argument("space", help="listed name or .json of a search space")
    table.add_argument("--num-classes", type=int, metavar="N", help="classes of the networks (default: the space's)")
    table.add_argument("--out", required=True, metavar="FILE", help="the table (JSON lines)")
    table.add_argument(
        "--quick", action="store_true", help="fewer widths and networks, less time on each; can be made full later"
    )
    add_setting(table)
    table.add_argument("--json", action="store_true", help="print what the table is of as JSON")


def run(args: argparse.Namespace) -> str:
    """Build a table or go on with one; returns what is to be printed."""
    from prunet_zoo.cost import cost_range
    from prunet_zoo.latency import QUICK, Effort, build_table, progress_bar
    from prunet_zoo.latency.memory import SMALLER_BATCH, memory_told
    from prunet_zoo.space import load_space

    space = load_space(args.space)
    if args.num_classes is not None:
        space = space.replace(num_classes=args.num_classes)
    what = [f"the networks of {space.name!r}"]
    with memory_told(what, args.device, SMALLER_BATCH), progress_bar("latency table") as progress:
        table = build_table(
            space,
            args.out,
            backend=args.backend,
            threads=args.threads,
            dtype=args.dtype,
            batch=args.batch,
            accelerator=args.device,
            memory_format=args.memory_format,
            effort=QUICK if args.quick else Effort(),
            progress=progress,
            repeat_slow=True,
        )
    (fastest, _), (slowest, _) = cost_range(table, space)
    about = {**table.describe(), "fastest_ms": fastest, "slowest_ms": slowest}
    if args.json:
        return json.dumps(about, indent=2)
    fit, between = about["correction"], about["interpolation"]
    again = (
        f"the processor was slow whenever {about['slow']} blocks and networks were measured: run the same command "
        "again while nothing else runs, and these are measured again\n"
    )
    slow = again if about["slow"] else ""
    return (
        f"{args.out}: {about['blocks']} blocks of {about['space_name']} on {about['device']}, {about['backend']}; "
        f"{fit['networks']} whole networks, each predicted from the others: typical error "
        f"{_share(fit['typical_error'])}, worst {_share(fit['worst_error'])}\n"
        f"a width left out and interpolated across twice its gap: typical error {_share(between['typical'])}, "
        f"worst {_share(between['worst'])}\n"
        f"{slow}"
        f"fastest network of the space {fastest:.4g} ms, slowest {slowest:.4g} ms: a search's target lies between them"
    )


def _share(value: float | None) -> str:
    return "not known" if value is None else f"{value:.1%}"
