"""tools/latency.py compare: networks or backends in turn on this machine, or the records of two runs."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.commands.setting import add_setting

if TYPE_CHECKING:
    from prunet_zoo.latency.compare import Ratio, Summary

RECORDS = ".jsonl"


def add(commands: Any) -> None:
    """Add the parser."""
    compare = commands.add_parser("compare", help="networks or backends measured in turn, or files of records")
    compare.set_defaults(run=run)
    compare.add_argument(
        "what",
        nargs="+",
        metavar="A",
        help="networks (listed name, spec, weights, timm/NAME), or files of records (.jsonl): each with the first",
    )
    compare.add_argument(
        "--backends", nargs="+", metavar="NAME", help="measure each network on these backends, each with the first"
    )
    compare.add_argument(
        "--input-size", type=int, nargs="+", metavar="PX", help="side, or height and width (default: each network's)"
    )
    compare.add_argument("--seconds", type=float, default=1.0, help="time on each network (default: %(default)s)")
    add_setting(compare)
    compare.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> str:
    """Compare; returns what is to be printed."""
    files = [str(name).endswith(RECORDS) for name in args.what]
    if any(files) and not all(files):
        raise LatencyError(
            "compare takes networks or files of records (.jsonl), not both: measure the network into a file first "
            "(python tools/latency.py measure ARCH --log FILE.jsonl)"
        )
    if any(files) and (args.backends or args.input_size):
        raise LatencyError("--backends and --input-size are for networks that are measured now, not for files")
    if not (math.isfinite(args.seconds) and args.seconds >= 0):
        raise LatencyError(f"--seconds takes a number from 0, got {args.seconds}")
    if args.input_size is not None and len(args.input_size) > 2:
        raise LatencyError(f"--input-size takes one side or height and width, got {len(args.input_size)} numbers")
    if any(files):
        from prunet_zoo.latency.compare import compare_files

        return _show(args, compare_files(args.what))
    return _measure(args)


def _measure(args: argparse.Namespace) -> str:
    from prunet_zoo.latency.backends import Setting
    from prunet_zoo.latency.compare_now import compare_backends, compare_networks
    from prunet_zoo.latency.memory import check_archs, memory_told

    setting = Setting(args.threads, args.dtype, args.batch, args.device, args.memory_format)
    size = None if args.input_size is None else (args.input_size[0], args.input_size[-1])
    check_archs(args.what, size, setting)
    with memory_told(args.what, args.device):
        if args.backends:
            return _show(args, compare_backends(args.what, args.backends, setting, size, args.seconds))
        ratios = compare_networks(args.what, args.backend, setting, size, args.seconds)
    if args.json:
        return json.dumps([ratio.to_dict() for ratio in ratios], indent=2)
    return "\n".join(
        [*_lines([(ratio, ratio.other) for ratio in ratios], f"{ratios[0].base} (ms)", "ms"), *_notes(ratios)]
    )


def _show(args: argparse.Namespace, summaries: Sequence[Summary]) -> str:
    if args.json:
        return json.dumps([summary.to_dict() for summary in summaries], indent=2)
    return "\n\n".join("\n".join(_describe(summary)) for summary in summaries)


def _describe(summary: Summary) -> list[str]:
    lines = [f"{summary.other} relative to {summary.base}"]
    lines += [f"  {field.replace('_', ' ')}: {a} → {b}" for field, (a, b) in summary.changed.items()]
    lines += _lines([(ratio, ratio.base) for ratio in summary.ratios], "first (ms)", "second (ms)")
    larger = sum(ratio.differs for ratio in summary.ratios)
    tau = "" if summary.tau is None else f", Kendall's τ of the two orders {summary.tau:.3f}"
    lines.append(f"geometric mean of the ratios {summary.geometric_mean:.3f}{tau}")
    lines.append(f"{larger} of {len(summary.ratios)} differences are larger than their 95% interval")
    lines += [f"not compared: {reason}" for reason in summary.left_out]
    return lines + _notes(summary.ratios)


def _lines(rows: Sequence[tuple[Ratio, str]], first: str, second: str) -> list[str]:
    """An aligned table: a ratio a line."""
    cells = [["", first, second, "ratio", "95% interval", ""]]
    for ratio, name in rows:
        verdict = ("faster" if ratio.ratio < 1 else "slower") if ratio.differs else "no difference shown"
        mark = " (disturbed)" if ratio.disturbed else ""
        interval = f"{ratio.low:.3f} – {ratio.high:.3f}"
        cells.append(
            [name, f"{ratio.base_ms:.4g}", f"{ratio.other_ms:.4g}", f"{ratio.ratio:.3f}", interval, verdict + mark]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *figures, verdict in cells:
        middle = "  ".join(text.rjust(width) for text, width in zip(figures, widths[1:-1], strict=True))
        lines.append(f"{name.ljust(widths[0])}  {middle}  {verdict}".rstrip())
    return lines


def _notes(ratios: Sequence[Ratio]) -> list[str]:
    if not any(ratio.disturbed for ratio in ratios):
        return []
    return ["disturbed: something else slowed this machine while it measured; the intervals do not cover that"]
