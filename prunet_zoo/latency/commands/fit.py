"""tools/latency.py fit: a predictor for your own device, from networks measured there."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from prunet_zoo.errors import LatencyError

_PEAKS = {
    "matrix_tflops": ("--peak-tflops", float, "peak of matrix products in the dtype of the records, TFLOP/s"),
    "vector_tflops": ("--vector-tflops", float, "peak without matrix units, TFLOP/s"),
    "bandwidth_gbs": ("--bandwidth-gbs", float, "bandwidth of the memory, GB/s"),
    "units": ("--units", int, "streaming multiprocessors or cores"),
}


def add(commands: Any) -> None:
    """Add the parser."""
    fit = commands.add_parser("fit", help="a predictor for your own device, from networks measured there")
    fit.set_defaults(run=run)
    fit.add_argument("records", help="log of 'measure … --log FILE', or a table made by the command 'table'")
    fit.add_argument("--out", required=True, metavar="FILE", help="the predictor (.json), for predict --device FILE")
    fit.add_argument(
        "--like", metavar="NAME|FILE", help="a predictor that the device resembles, such as v100-tensorrt-fp16"
    )
    fit.add_argument("--name", help="name of the predictor (default: that of the file)")
    for flag, kind, text in _PEAKS.values():
        fit.add_argument(flag, type=kind, metavar="N", help=f"{text} (default: that of --like, or assumed)")
    fit.add_argument("--json", action="store_true", help="print the predictor as JSON")


def run(args: argparse.Namespace) -> str:
    """Fit and write; returns what is to be printed."""
    from prunet_zoo.files import write_json
    from prunet_zoo.latency.own_device import describe_skipped, fit_device, read_measurements, seen_before
    from prunet_zoo.latency.predictor import Predictor

    if not args.out.endswith(".json"):
        raise LatencyError(f"--out takes a path that ends in .json, got {args.out!r}")
    peaks = {name: getattr(args, flag[2:].replace("-", "_")) for name, (flag, _, _) in _PEAKS.items()}
    for name, value in peaks.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise LatencyError(f"{_PEAKS[name][0]} takes a positive number, got {value}")
    _check_out(args.out, args.records)
    measured = read_measurements(args.records)
    like = Predictor.load(args.like) if args.like else None
    model = fit_device(measured, args.name or Path(args.out).stem, like, peaks)
    write_json(args.out, model.to_dict())
    if args.json:
        return json.dumps(model.to_dict(), indent=2)
    width = max(len(n.name) for n in model.fit.networks)
    rows = [
        f"  {n.name:<{width}}  {n.measured_ms:9.4g} ms measured  {n.left_out_ms:9.4g} ms predicted  {n.error:+7.1%}"
        for n in model.fit.networks
    ]
    skipped = describe_skipped(measured)
    return "\n".join(
        [
            f"{args.out}: {model.device}, {model.backend} {model.backend_version}, {model.dtype}, batch {model.batch}, "
            f"{model.threads} thread(s)",
            "each network predicted from the others:",
            *rows,
            f"mean error {model.fit.mean_abs:.1%}, worst {model.fit.worst:.1%}"
            + (f"; records left out: {skipped}" if skipped else ""),
            *([f"not fully left out: {seen}"] if (seen := seen_before(measured, like)) else []),
            f"use it: python tools/latency.py predict ARCH --device {args.out}",
        ]
    )


def _check_out(out: str, records: str) -> None:
    """Refuse to write over the measurements, or over any file that is no predictor."""
    from prunet_zoo.errors import PrunetError
    from prunet_zoo.latency.predictor import Predictor

    if not Path(out).exists():
        return
    if Path(records).exists() and Path(out).samefile(records):  # that they are missing is told by their reader
        raise LatencyError(f"--out {out} is the file of the measurements, which would be lost; give another one")
    try:
        Predictor.load(out)
    except PrunetError as error:
        raise LatencyError(f"--out {out} exists and is no predictor ({error}); give another file") from None
