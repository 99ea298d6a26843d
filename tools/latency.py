"""Latency of networks: measure one, build a table over a search space, predict from a table.

python tools/latency.py measure prunet_p0 --backend onnxruntime --threads 1 --json
python tools/latency.py table prunet_cpu_small --out tables/small.jsonl
python tools/latency.py predict work_dirs/search/spec.json --table tables/small.jsonl
python tools/latency.py predict prunet_p0 --device v100-tensorrt-fp16
python tools/latency.py fit my_records.jsonl --out my_device.json
python tools/latency.py compare prunet_p0 --backends onnxruntime torch openvino
python tools/latency.py report --out work_dirs/latency
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from prunet_zoo.console import run_plain_tool
from prunet_zoo.latency.commands import compare, fit, measure, predict, report, table

COMMANDS = (measure, table, predict, fit, compare, report)
STOPPED = "stopped; nothing was left behind"
GOES_ON = "interrupted; what was measured is kept: the same command goes on"
TOLD = {"measure": measure.STOPPED, "table": GOES_ON, "report": GOES_ON}  # others: STOPPED


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, run the command, print what it returns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    args = parser.parse_args(argv)
    print(args.run(args))
    return 0


def stopped(argv: Sequence[str]) -> str:
    """What is told when a signal ends the command of these arguments."""
    return TOLD.get(argv[0], STOPPED) if argv else STOPPED


if __name__ == "__main__":
    run_plain_tool(main, stopped=stopped(sys.argv[1:]))
