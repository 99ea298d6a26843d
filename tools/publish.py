"""Publish a trained network as one safetensors file that works alone: weights, classes, preprocessing, metrics.

    python tools/publish.py CONFIG CHECKPOINT --out F.safetensors --licence Apache-2.0

The metrics are measured now, on the config's test data, with the tensors of the file. tools/predict.py takes the file
as --model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from prunet_zoo.mm.cli import ConfigOptions, load_config, run_tool
from prunet_zoo.mm.publish import publish


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="config that the network was trained with")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's .pth, or a classifier's .safetensors")
    parser.add_argument("--out", required=True, metavar="F", help="the .safetensors file to write")
    parser.add_argument("--licence", required=True, metavar="L", help="under which others may use it: Apache-2.0, …")
    parser.add_argument("--name", metavar="N", help="what the network is called; default: the name of the file")
    parser.add_argument("--arch", metavar="SPEC", help="architecture, where the config has another")
    parser.add_argument("--data-root", metavar="D", help="image folder to test on, as given to tools/train.py")
    made = "a command that made the checkpoint, once for each; default: the one that tools/train.py noted beside it"
    parser.add_argument("--command", action="append", default=[], metavar="CMD", help=made)
    parser.add_argument(
        "--cfg-options", nargs="+", action=ConfigOptions, metavar="KEY=VALUE", help="change values of the config"
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Publish, and print what was written."""
    args = make_parser().parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    options = {"name": args.name, "arch": args.arch, "data_root": args.data_root}
    record = publish(cfg, args.checkpoint, args.out, args.licence, **options, commands=args.command, force=args.force)
    print(", ".join(f"{key} {value:g}" for key, value in record["metrics"].items()))
    print(f"{record['file']}: {record['task']}, {record['bytes']:,} bytes")
    print(f"sha256 {record['sha256']}")
    return 0


if __name__ == "__main__":
    run_tool(main)
