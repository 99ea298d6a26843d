"""Compare finished searches: a table, and a page with accuracy against latency.

    python tools/report.py DIR... [--out DIR]

A DIR is a work directory of tools/search.py, or a folder with several of them in it. Searches that are not finished and
folders without one are named and left out. Searches that differ in nothing but the seed are averaged. Latencies of
different devices, units or ways of running get a picture each, not one axis.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from prunet_zoo.compare import read_searches
from prunet_zoo.compare.page import DATA, PAGE, PICTURE, terminal_table, write_comparison
from prunet_zoo.compare.reports import check_out
from prunet_zoo.console import run_plain_tool
from prunet_zoo.errors import DataError

PIPE_WIDTH = 240  # characters


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, read, print the table, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="work directories of searches, or folders of such")
    out = f"where {PAGE}, {PICTURE} and {DATA} go (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("work_dirs/report"), metavar="DIR", help=out)
    args = parser.parse_args(argv)
    check_out(args.out)
    found, unfinished = read_searches(args.folders)
    for search in unfinished:
        method = f" ({search.method})" if search.method else ""
        print(f"{search.why}, left out: {search.folder}{method}", file=sys.stderr)
    if not found:
        raise DataError("none of these searches is finished; go on with tools/search.py CONFIG --work-dir DIR --resume")
    panels = write_comparison(args.out, found, unfinished)
    settings = [setting for panel in panels for setting in panel.settings]
    for setting in settings:
        for again in setting.repeated:
            first = next(f for f in setting.found if f.seed == again.seed)
            print(f"seed {again.seed} again, not counted: {again.folder}; {first.folder} counts", file=sys.stderr)
    wide = None if sys.stdout.isatty() else PIPE_WIDTH  # a pipe has no width: rich would take 80 and fold every cell
    Console(width=wide).print(terminal_table(panels))
    print(f"{sum(len(setting.found) for setting in settings)} searches; see {args.out / PAGE}")
    return 0


if __name__ == "__main__":
    run_plain_tool(main)
