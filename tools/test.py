"""Evaluate a checkpoint: python tools/test.py CONFIG CHECKPOINT [--arch SPEC] [--json F]."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from prunet_zoo.files import write_json
from prunet_zoo.mm.cli import add_config_arguments, config_from_args, run_tool
from prunet_zoo.mm.training import is_detection, set_arch, test


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, test, print the metrics and write them to a file on request."""
    parser = add_config_arguments(argparse.ArgumentParser(description=__doc__), training=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's .pth, or a classifier's .safetensors")
    parser.add_argument("--arch", metavar="SPEC", help="architecture, where the config has another")
    parser.add_argument("--json", metavar="F", help="write the record of the test to this file")
    args = parser.parse_args(argv)
    cfg = config_from_args(args)
    arch = args.arch
    if arch is None and args.checkpoint.endswith(".safetensors") and not is_detection(cfg):
        arch = args.checkpoint  # its spec lies in it
    set_arch(cfg, arch)
    record = test(cfg, args.checkpoint)
    if args.json:
        write_json(args.json, record)
    print(", ".join(f"{k} {v:g}" for k, v in record["metrics"].items()))
    return 0


if __name__ == "__main__":
    run_tool(main)
