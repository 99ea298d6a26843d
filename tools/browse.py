"""See what a detector is trained on: python tools/browse.py CONFIG [--part train|val|test] [--number N] [--out D] ...

Draws samples after augmentation, with boxes, masks and class names; with --check it looks the data over instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from prunet_zoo.errors import DataError
from prunet_zoo.mm.browse import browse
from prunet_zoo.mm.checks import check_files
from prunet_zoo.mm.cli import ConfigError, add_config_arguments, config_from_args, run_tool
from prunet_zoo.mm.coco_checks import check_coco
from prunet_zoo.mm.own_data import add_own_data_arguments, set_own_data
from prunet_zoo.mm.training import make_data


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, check the data, draw them."""
    parser = add_config_arguments(argparse.ArgumentParser(description=__doc__), training=False)
    parser.add_argument("--part", choices=("train", "val", "test"), default="train", help="of the data; default train")
    parser.add_argument("--number", type=int, default=12, metavar="N", help="how many samples; default 12")
    parser.add_argument(
        "--out", metavar="D", help="folder, or F.png or F.jpg: the sheet alone; default WORK_DIR/browse_PART"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of choice and augmentation; default 0")
    parser.add_argument("--check", action="store_true", help="look the training and validation data over; draw nothing")
    add_own_data_arguments(parser)
    args = parser.parse_args(argv)
    cfg = config_from_args(args)
    if "backbone" not in (cfg.get("model") or {}):
        raise ConfigError(f"{args.config} is no detector's config; browse draws boxes")
    set_own_data(cfg, args, training=False)
    make_data(cfg)
    parts = [part for part in ("train", "val") if cfg.get(f"{part}_dataloader")] if args.check else [args.part]
    check_files(cfg, tuple(parts))
    if args.check:
        lines = check_coco({**cfg, "data_check": True}, parts)
        print(*lines, "nothing found that would stop a training run", sep="\n")
        return 0
    try:
        check_coco(cfg, parts, images=False)
    except DataError as error:
        raise DataError(f"{error}\n(--cfg-options data_check=False draws them as they are)") from None
    written = browse(cfg, args.part, args.number, args.out or Path(cfg.work_dir) / f"browse_{args.part}", args.seed)
    print(f"drawn: {written[0]}" + (f" and {len(written) - 1} single pictures beside it" if len(written) > 1 else ""))
    return 0


if __name__ == "__main__":
    run_tool(main)
