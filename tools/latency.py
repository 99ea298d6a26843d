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
from collections.abc import Sequence

from prunet_zoo.console import run_plain_tool
from prunet_zoo.latency.commands import compare, fit, measure, predict, report, table

STOPPED = "interrupted; what was measured is kept: the same command goes on"
COMMANDS = (measure, table, predict, fit, compare, report)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, run the command, print what it returns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    args = parser.parse_args(argv)
    print(args.run(args))
    return 0


if __name__ == "__main__":
    run_plain_tool(main, stopped=STOPPED)
