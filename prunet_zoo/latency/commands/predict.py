"""tools/latency.py predict: a network's latency from a table of its space, or on a device that is not at hand."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from prunet_zoo.errors import SpecError

if TYPE_CHECKING:
    from prunet_zoo.spec import NetSpec


def add(commands: Any) -> None:
    """Add the parser."""
    predict = commands.add_parser(
        "predict", help="latency of a network from a table of its space, or on a device that is not at hand"
    )
    predict.set_defaults(run=run)
    predict.add_argument("arch", help="listed name, spec (.json) or weights with a spec inside (.safetensors)")
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument("--table", metavar="FILE", help="a table made by the command 'table'")
    source.add_argument(
        "--device",
        metavar="NAME|FILE",
        help="v100-tensorrt-fp16, a100-tensorrt-fp16, v100-pytorch-fp16 or a100-pytorch-fp16 (all of batch 1), "
        "or a file made by the command 'fit'",
    )
    predict.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        metavar="PX",
        help="with --device: side, or height and width (default: the spec's)",
    )
    predict.add_argument("--json", action="store_true", help="print JSON; with --device every kernel is in it")


def run(args: argparse.Namespace) -> str:
    """Look a network up, or predict it; returns what is to be printed."""
    from prunet_zoo.latency.subject import TIMM, find_arch
    from prunet_zoo.models.backbone import resolve_arch
    from prunet_zoo.models.pruned import is_pruned_file

    if args.table and args.input_size:
        raise SpecError("--input-size goes with --device: a table is of one input size; build another one for another")
    if args.input_size and len(args.input_size) > 2:
        raise SpecError(f"--input-size takes one side or height and width, got {len(args.input_size)} numbers")
    if args.arch.startswith(TIMM):
        raise SpecError(
            "predict needs a network's spec, which networks of timm do not have; give a listed name, a spec (.json) or "
            f"weights (.safetensors). On a device at hand: python tools/latency.py measure {args.arch}"
        )
    arch = find_arch(args.arch, with_weights=False)
    if is_pruned_file(arch):
        raise SpecError(
            f"predict needs the spec of a network of this package's blocks, and {args.arch} is a pruned one; on a "
            f"device at hand: python tools/latency.py measure {args.arch}"
        )
    spec = resolve_arch(arch)
    return _from_table(args, spec) if args.table else _from_device(args, spec)


def _from_table(args: argparse.Namespace, spec: NetSpec) -> str:
    from prunet_zoo.latency import LatencyTable

    table = LatencyTable.load(args.table)
    ms = table(spec)
    if args.json:
        return json.dumps(
            {"spec_name": spec.name, "spec_hash": spec.hash, "predicted_ms": ms, **table.describe()}, indent=2
        )
    header = table.header
    return f"{spec.name}: {ms:.4g} ms predicted for {header.device}, {header.backend}, {header.threads} thread(s)"


def _from_device(args: argparse.Namespace, spec: NetSpec) -> str:
    from prunet_zoo.latency.predictor import Predictor
    from prunet_zoo.spec import as_size

    predictor = Predictor.load(args.device)
    size = (args.input_size[0], args.input_size[-1]) if args.input_size else as_size(spec.input_size)
    ms = predictor.predict(spec, size)
    about = predictor.describe()
    if args.json:
        kernels = [row._asdict() for row in predictor.kernels(spec, size)]
        data = {"spec_name": spec.name, "spec_hash": spec.hash, "input_size": list(size), "predicted_ms": ms}
        return json.dumps({**data, **about, "kernels": kernels}, indent=2)
    fit, layout = about["fit"], "" if about["memory_format"] == "contiguous" else f", {about['memory_format']}"
    return (
        f"{spec.name}: {ms:.4g} ms predicted for {about['batch']}×{size[0]}×{size[1]} px, {about['dtype']}{layout}, "
        f"{about['device']}, {about['backend']} ({about['backend_version']}); not measured. Mean error "
        f"{fit['mean_abs']:.1%}, worst {fit['worst']:.1%} of the {fit['networks']} networks it was fitted to, "
        "each left out in turn"
    )
