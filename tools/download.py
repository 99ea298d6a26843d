"""Bring the zoo's weights into the weights folder, converted: python tools/download.py NAME… | --all | --list

The folder is $PRUNET_HOME, else checkpoints/ of the checkout. $PRUNET_MIRROR may name mirrors (http://, https:// or
file:// bases, or folders, with blanks or commas between; a folder with a blank in its name as file:///with%20blank),
which are asked before the published addresses.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from prunet_zoo.console import run_plain_tool
from prunet_zoo.errors import PrunetError

EPILOG = """examples:
  python tools/download.py prunet_p0                     # once; then prunet://prunet_p0 works everywhere
  python tools/download.py --list                        # what there is, and what is here
  PRUNET_HOME=/data/mirror python tools/download.py --all --keep-archive   # a folder that others name by $PRUNET_MIRROR
"""
STOPPED = "stopped; what has arrived is kept, the same command goes on from there"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="models of the zoo; --list shows them")
    parser.add_argument("--all", action="store_true", help="all models; goes on with the others when one fails")
    parser.add_argument("--list", action="store_true", help="show all models and what is here of them")
    parser.add_argument(
        "--force",
        action="store_true",
        help="download again (an unfinished download is gone on with) and replace what is here",
    )
    parser.add_argument(
        "--keep-archive",
        action="store_true",
        help="keep the archive beside the weights, to serve as a mirror",
    )
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    args = parser.parse_args(argv)
    if bool(args.names) + args.all + args.list != 1:
        parser.error("give names, or --all, or --list")
    return args


def show_list(as_json: bool) -> int:
    """Print what there is and what is here; returns the exit status."""
    from prunet_zoo.zoo.home import weights_home
    from prunet_zoo.zoo.listing import list_weights

    records = list_weights()
    if as_json:
        print(json.dumps(records, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "task", "state", "file", "MB", "sha256", "licence", "address"):
        table.add_column(title, overflow="fold", justify="right" if title == "MB" else "left")
    for record in records:
        size = f"{record['bytes'] / 1e6:.1f}" if record["bytes"] else ""
        known = f"{record['sha256'][:12]}… ({record['checksum']})" if record["sha256"] else record["checksum"]
        file, address = record["archive"] or record["path"].rpartition("/")[2], record["url"] or "in this package"
        table.add_row(record["name"], record["task"], record["state"], file, size, known, record["licence"], address)
    if not console.is_terminal:
        console.width = 400  # one line a model for grep
    with console.capture() as text:  # printed by us: rich itself would end the process when the reader has gone
        console.print(table)
    print(text.get(), end="")
    print(f"weights folder: {weights_home()}")
    return 0


def bring(names: Sequence[str], force: bool, keep: bool, as_json: bool) -> int:
    """Download each; returns the exit status, 2 if one failed."""
    from prunet_zoo.zoo.download import download
    from prunet_zoo.zoo.index import find_model

    names = list(dict.fromkeys(find_model(name).name for name in names))  # a wrong name before the first download
    results: list[dict[str, Any]] = []
    for name in names:
        try:
            path = download(name, force=force, keep=keep)
        except PrunetError as error:
            if len(names) == 1 and not as_json:
                raise
            print(f"error: {name}: {error}", file=sys.stderr)
            results.append({"name": name, "path": None, "error": str(error)})
        else:
            results.append({"name": name, "path": str(path), "error": None})
            if not as_json:
                print(path, flush=True)
    failed = [result["name"] for result in results if result["error"]]
    if as_json:
        print(json.dumps(results, indent=2))
    if failed:
        print(f"{len(failed)} of {len(names)} failed: {', '.join(failed)}", file=sys.stderr)
    return 2 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse_args(argv)
    if args.list:
        return show_list(args.json)
    from prunet_zoo.zoo.index import load_index

    return bring(args.names or list(load_index()), args.force, args.keep_archive, args.json)


if __name__ == "__main__":
    run_plain_tool(main, stopped=STOPPED)
