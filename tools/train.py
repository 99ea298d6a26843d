"""Train a classifier or a detector: python tools/train.py CONFIG [--arch SPEC] [--weights FILE] [--work-dir D] ..."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from prunet_zoo.mm.cli import add_config_arguments, config_from_args, run_tool
from prunet_zoo.mm.interrupts import is_first
from prunet_zoo.mm.network import set_arch, set_weights
from prunet_zoo.mm.own_data import add_own_data_arguments, set_own_data
from prunet_zoo.mm.training import METRICS, summary, train


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, train, print the result."""
    parser = add_config_arguments(argparse.ArgumentParser(description=__doc__))
    parser.add_argument(
        "--arch",
        metavar="SPEC",
        help="listed name, spec (.json), weights with their spec (.safetensors) or prunet://NAME",
    )
    parser.add_argument("--weights", metavar="FILE", help="classifier's weights to start from, or prunet://NAME")
    add_own_data_arguments(parser)
    args = parser.parse_args(argv)
    cfg = config_from_args(args)
    set_own_data(cfg, args)
    set_arch(cfg, args.arch)
    set_weights(cfg, args.weights)
    record = train(cfg)
    if is_first():
        print(f"{summary(record['metrics'])}; {record['seconds']:.0f} s; see {cfg.work_dir}/{METRICS}")
    return 0


if __name__ == "__main__":
    run_tool(main, resumable=True)
