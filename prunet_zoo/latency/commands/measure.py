"""tools/latency.py measure: networks, on this machine."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from prunet_zoo.errors import LatencyError, PrunetError, SpecError
from prunet_zoo.latency.commands.setting import add_setting
from prunet_zoo.latency.record import ATTEMPTS, append_record, check_log

if TYPE_CHECKING:
    from prunet_zoo.latency import Record

STOPPED = "stopped; what was appended to the log (--log) so far is kept, nothing else was left behind"


def add(commands: Any) -> None:
    """Add the parser."""
    one = commands.add_parser("measure", help="measure networks; several are measured in turn, to be compared")
    one.set_defaults(run=run)
    one.add_argument(
        "arch",
        nargs="+",
        help="listed name, prunet://NAME, timm/NAME, spec (.json) or weights with a spec inside (.safetensors)",
    )
    one.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        metavar="PX",
        help="side, or height and width (default: each network's own)",
    )
    one.add_argument("--seconds", type=float, default=0.4, help="time to spend on runs (default: %(default)s)")
    one.add_argument(
        "--attempts",
        type=int,
        default=ATTEMPTS,
        help="measurements at most until two agree undisturbed (default: %(default)s)",
    )
    add_setting(one)
    one.add_argument("--log", metavar="FILE", help="append the records to this file (JSON lines)")
    one.add_argument("--json", action="store_true", help="print the whole record as JSON; of several networks, a list")


def run(args: argparse.Namespace) -> str:
    """Measure networks; returns what is to be printed."""
    from prunet_zoo.latency import measure, measure_together, progress_bar
    from prunet_zoo.latency.memory import memory_told

    size = _checked_size(args)
    if args.log is not None:
        check_log(args.log)  # before any time is spent
    failures: list[PrunetError] = []

    def keep(record: Record) -> None:
        try:
            if args.log is not None and not failures:
                append_record(args.log, record)
        except PrunetError as error:  # the figures are told first
            failures.append(error)

    options: dict[str, Any] = {
        "backend": args.backend,
        "input_size": size,
        "batch": args.batch,
        "threads": args.threads,
        "dtype": args.dtype,
        "accelerator": args.device,
        "seconds": args.seconds,
        "memory_format": args.memory_format,
        "attempts": args.attempts,
    }
    with memory_told(args.arch, args.device):
        if len(args.arch) == 1:
            records = [measure(args.arch[0], **options)]
            keep(records[0])
        else:
            with progress_bar("latency") as progress:
                records = measure_together(args.arch, **options, progress=progress, keep=keep)
    text = _show(records, args.json)
    if failures:
        print(text, flush=True)
        raise failures[0]
    return text


def _show(records: list[Record], as_json: bool) -> str:
    if as_json:
        data = [record.to_dict() for record in records]
        return json.dumps(data if len(data) > 1 else data[0], indent=2)
    return "\n".join(map(describe, records))


def _checked_size(args: argparse.Namespace) -> tuple[int, int] | None:
    """The input size asked for; raises on arguments that cannot be, or do not fit into memory."""
    from prunet_zoo.latency.backends import Setting
    from prunet_zoo.latency.memory import check_archs

    if not (math.isfinite(args.seconds) and args.seconds >= 0):
        raise LatencyError(f"--seconds takes a number from 0, got {args.seconds}")
    if args.input_size is not None and len(args.input_size) > 2:
        raise SpecError(f"--input-size takes one side or height and width, got {len(args.input_size)} numbers")
    size = None if args.input_size is None else (args.input_size[0], args.input_size[-1])
    check_archs(args.arch, size, Setting(args.threads, args.dtype, args.batch, args.device))
    return size


def describe(record: Record) -> str:
    """One line of text; a second one where the measurement was disturbed."""
    height, width = record.input_size
    line = (
        f"{record.spec_name}: {record.median_ms:.4g} ms "
        f"(95% interval {record.ci_low_ms:.4g} to {record.ci_high_ms:.4g}; "
        f"p10 {record.p10_ms:.4g}, p90 {record.p90_ms:.4g}, {record.n} runs) for "
        f"{record.batch}×{height}×{width} px, {record.dtype}, {record.backend} {record.backend_version}, "
        f"{record.threads} thread(s), {record.device}"
    )
    if not record.disturbed:
        return line
    tries = f"{record.attempts} attempts" if record.attempts > 1 else "1 attempt"
    return f"{line}\n  DISTURBED ({tries}): {'; '.join(record.disturbed)}"
