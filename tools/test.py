"""Evaluate: python tools/test.py CONFIG CHECKPOINT, or NAME of the zoo; [--data-root D] [--arch SPEC] [--json F]."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from prunet_zoo.files import write_json
from prunet_zoo.mm.cli import add_config_arguments, config_from_args, run_tool
from prunet_zoo.mm.interrupts import is_first
from prunet_zoo.mm.testing import find_config, fit_loader, prepare_test, preprocessing
from prunet_zoo.mm.training import summary, test


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, test, print the metrics and write them to a file on request."""
    parser = add_config_arguments(
        argparse.ArgumentParser(
            description=__doc__,
            epilog="A network is tested with its own preprocessing: that of the zoo's index for prunet:// and NAME, "
            "that in a .safetensors file that tells it, else the config's.",
        ),
        training=False,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?",
        help="a run's .pth, a .safetensors or prunet://NAME; may be left out where CONFIG is a name of the zoo",
    )
    parser.add_argument(
        "--data-root",
        metavar="D",
        help="images to test a classifier on: a folder with val/<class>/, or that folder itself; ImageNet's classes, "
        "or some of them, are named by WordNet ids (n01440764)",
    )
    parser.add_argument("--arch", metavar="SPEC", help="architecture, where neither config nor checkpoint have it")
    parser.add_argument("--json", metavar="F", help="write the record of the test to this file")
    args = parser.parse_args(argv)
    args.config, checkpoint = find_config(args.config, args.checkpoint)
    cfg = config_from_args(args)
    prepare_test(cfg, checkpoint, args.arch, args.data_root)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)  # what is asked for by name comes before what the network tells
    fit_loader(cfg.test_dataloader)
    own = preprocessing(cfg)
    if own is not None:
        cfg.input_size = own["input_size"]
    record = test(cfg, checkpoint)
    if own is not None:
        record["preprocess"] = own
    if not is_first():
        return 0
    if args.json:
        write_json(args.json, record)
    print(f"{summary(record['metrics'])}; {record['images']} images{_of(own)}")
    return 0


def _of(own: Mapping[str, Any] | None) -> str:
    """In a few words, how the images were brought to size."""
    if own is None:
        return ""
    crop = f"crop {own['crop_pct']:g}" if own["crop_mode"] == "center" else own["crop_mode"]
    return f" at {own['input_size']} px ({crop}, {own['interpolation']})"


if __name__ == "__main__":
    run_tool(main)
