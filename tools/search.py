"""Search an architecture for a latency budget.

    python tools/search.py CONFIG [--target-ms T] [--table FILE | --device NAME] [--work-dir D] [--seed N] [--resume]
                                  [--verify N]

D ends with spec.json, weights.safetensors (spec inside), report.json and report.html.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from prunet_zoo.mm.cli import add_config_arguments, config_from_args, run_tool
from prunet_zoo.mm.own_images import set_data_root
from prunet_zoo.mm.search import search, set_target
from prunet_zoo.search.target import TRIES, summary


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, search, print where the result is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--target-ms", type=float, metavar="T", help="latency budget in milliseconds")
    table = (
        "latency table of the device (tools/latency.py table); without it one is measured here first. For networks of "
        "timm and spaces of rep blocks there is none: their largest network is measured, others count by MACs"
    )
    parser.add_argument("--table", metavar="FILE", help=table)
    device = (
        "search for a device that is not at hand: its predicted latencies take the place of a table. A name of "
        "prunet_zoo.latency.list_devices(), e.g. v100-tensorrt-fp16, or a file of tools/latency.py fit"
    )
    parser.add_argument("--device", metavar="NAME|FILE", help=device)
    verify = (
        "measure the network found and, where it misses the target, adjust its widths and measure again, up to N "
        f"networks (default: {TRIES}); 0 takes the table's word: the result then depends on table, config, seed alone"
    )
    parser.add_argument("--verify", type=int, metavar="N", help=verify)
    root = "your own images: a folder with train/<class>/ and val/<class>/; the model gets as many classes as it has"
    parser.add_argument("--data-root", metavar="D", help=root)
    args = parser.parse_args(argv)
    cfg = config_from_args(args)
    set_target(cfg, args.target_ms, args.table, args.verify, args.device)
    set_data_root(cfg, args.data_root)
    report = search(cfg)
    if report:
        print(f"{summary(report)}; see {cfg.work_dir}/report.html")
    return 0


if __name__ == "__main__":
    run_tool(main, resumable=True)
