"""tools/latency.py predict: a network's latency from a table of its space."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    """Add the parser."""
    predict = commands.add_parser("predict", help="latency of a network from a table of its space")
    predict.set_defaults(run=run)
    predict.add_argument("arch", help="listed name, spec (.json) or weights with a spec inside (.safetensors)")
    predict.add_argument("--table", required=True, metavar="FILE", help="a table made by the command 'table'")
    predict.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> str:
    """Look a network up; returns what is to be printed."""
    from prunet_zoo.latency import LatencyTable
    from prunet_zoo.models.backbone import resolve_arch

    spec = resolve_arch(args.arch)
    table = LatencyTable.load(args.table)
    ms = table(spec)
    if args.json:
        return json.dumps(
            {"spec_name": spec.name, "spec_hash": spec.hash, "predicted_ms": ms, **table.describe()}, indent=2
        )
    header = table.header
    return f"{spec.name}: {ms:.4g} ms predicted for {header.device}, {header.backend}, {header.threads} thread(s)"
