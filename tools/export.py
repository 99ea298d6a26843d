"""Write a network as ONNX, TorchScript, OpenVINO or a TensorRT engine, BatchNorm folded, and compare it with torch.

    python tools/export.py prunet_p0 --pretrained --format onnx
    python tools/export.py work_dirs/x/spec.json --weights work_dirs/x/best.pth --format openvino --dtype fp16
    python tools/export.py timm/resnet18 --format torchscript --part backbone
    python tools/export.py configs/detection/F.py --weights work_dirs/F/epoch_12.pth --format onnx --input-size 800 1344

The file is kept only when its own runtime gives what torch gives. Options and examples: docs/export.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunet_zoo.console import run_plain_tool

if TYPE_CHECKING:
    from prunet_zoo.models.export import Format, Network

FORMAT_NAMES = ("onnx", "torchscript", "openvino", "engine")


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = (
        "a name of the zoo or prunet://NAME, a spec (.json), weights with their spec (.safetensors), timm/NAME, or a "
        "config (.py)"
    )
    parser.add_argument("model", metavar="ARCH|CONFIG", help=model)
    parser.add_argument("--format", required=True, choices=FORMAT_NAMES, help="what to write")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: the network's name here; ends in the format's suffix"
    )
    parser.add_argument("--weights", metavar="F", help="weights of a name, spec or config; without: random")
    parser.add_argument("--pretrained", action="store_true", help="published weights of a name of the zoo or of timm")
    parser.add_argument("--arch", metavar="SPEC", help="another architecture in a config's place")
    part = "whole (default): logits, or a one-stage detector's raw maps; neck, backbone: their feature maps"
    parser.add_argument("--part", choices=("whole", "neck", "backbone"), default="whole", help=part)
    levels = "feature levels of --part backbone: 0 is stride 2, 1 is stride 4, …; of timm/NAME as timm counts"
    parser.add_argument("--out-indices", type=int, nargs="+", metavar="I", help=levels)
    parser.add_argument("--input-size", type=_positive, nargs="+", metavar="PX", help="H W, or one number for both")
    parser.add_argument("--batch", type=_positive, default=1, metavar="N", help="images at once (%(default)s)")
    parser.add_argument("--dynamic-batch", action="store_true", help="any number of images; not for engines")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16"), default="fp32", help="%(default)s; input and outputs stay fp32"
    )
    opset = "of onnx and engine, exactly this one (default: 17 where torch can)"
    parser.add_argument("--opset", type=_positive, metavar="N", help=opset)
    parser.add_argument(
        "--normalize", action="store_true", help="the file takes RGB images of 0…255 and scales them itself"
    )
    tolerance = "largest difference from torch, as a share of an output's largest value (fp32 1e-4, fp16 0.03)"
    parser.add_argument("--tolerance", type=float, metavar="T", help=tolerance)
    parser.add_argument("--no-check", action="store_true", help="keep the file without running it")
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", help="change values of a config")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    return parser


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"takes a whole number from 1, got {text!r}")
    return int(text)


def find_format(name: str) -> Format:
    """The format of that name."""
    if name == "engine":
        from prunet_zoo.latency.engine import Engine

        return Engine()
    from prunet_zoo.models.export import FORMATS

    return FORMATS[name]


def load_network(args: argparse.Namespace) -> Network:
    """The network that the arguments name; MMEngine is imported only where it is needed."""
    from prunet_zoo.models.export import ExportError
    from prunet_zoo.zoo.export import TIMM, classifier_network
    from prunet_zoo.zoo.index import load_index
    from prunet_zoo.zoo.predict import read_meta

    model = args.model
    size = None if args.input_size is None else (args.input_size[0], args.input_size[-1])
    if args.input_size is not None and len(args.input_size) > 2:
        raise ExportError(f"--input-size takes H W, or one number for both; got {len(args.input_size)} numbers")
    if args.out_indices is not None and args.part != "backbone":
        raise ExportError("--out-indices are the levels of --part backbone; give that as well, or leave them out")
    if model.endswith(".py"):
        _refuse(args, "a config", "pretrained", "out_indices")
        with _wants_mm():
            from prunet_zoo.mm.export import config_network

            options = _config_options(args.cfg_options)
        return config_network(model, args.weights, args.arch, args.part, size, options)
    _refuse(args, "a network without a config", "arch", "cfg_options")
    entry = None if model.endswith((".safetensors", ".json")) else load_index().get(model.removeprefix("prunet://"))
    published = entry.task if entry else read_meta(model).get("task") if model.endswith(".safetensors") else None
    if published == "detection" and not model.startswith(TIMM):
        _refuse(args, "a published detector", "weights", "out_indices")
        with _wants_mm():
            from prunet_zoo.mm.export import detector_network
        return detector_network(model, args.part, size)
    if args.part == "neck":
        raise ExportError(f"{model} is a classifier and has no neck; give --part backbone, or a detector's config")
    return classifier_network(model, args.weights, args.pretrained, args.part == "backbone", args.out_indices, size)


def _refuse(args: argparse.Namespace, what: str, *names: str) -> None:
    from prunet_zoo.models.export import ExportError

    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
    if given:
        raise ExportError(f"{what} does not take {' or '.join(given)}; leave it out")


def _config_options(texts: Sequence[str] | None) -> dict[str, Any] | None:
    if texts is None:
        return None
    from prunet_zoo.mm.cli import ConfigOptions

    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=ConfigOptions)
    return dict(parser.parse_args(["--cfg-options", *texts]).cfg_options)


@contextmanager
def _wants_mm() -> Iterator[None]:
    """Around imports that need mmdet and what it needs: says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == "prunet_zoo":
            raise
        from prunet_zoo.models.export import ExportError

        raise ExportError(
            f"a config or a detector needs {package}, which is not installed: pip install 'prunet-zoo[mm]'"
        ) from None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, export, and return what was written."""
    from prunet_zoo.latency.probes import randomise
    from prunet_zoo.models.export import Options, export
    from prunet_zoo.models.export.formats import check_path, need

    options = Options(
        args.batch, args.dynamic_batch, args.dtype, args.opset, args.normalize, args.tolerance, not args.no_check
    )
    form = find_format(args.format)
    if args.out is not None:
        check_path(form, args.out)
    if options.check or form.needed:
        need(form)  # said before a network is built, or its weights are downloaded
    network = load_network(args)
    if network.weights is None:
        randomise(network.module)  # a fresh network's signals die out, and nothing could be compared
    out = args.out if args.out is not None else Path(f"{_file_name(network.name)}{form.suffix}")
    return export(network, form, out, options)


def _file_name(name: str) -> str:
    """A network's name as that of a file in the current folder; a spec may be called anything."""
    return re.sub(r"[^\w.@+-]+", "_", name).lstrip(".") or "network"


def describe(record: dict[str, Any]) -> str:
    """What was written, in a few lines."""
    lines = [f"{record['file']}: {record['bytes'] / 1e6:.1f} MB, {record['format']} {record['dtype']}, "
             f"weights: {record['weights']}"]  # fmt: skip
    taken = record["input"]
    lines.append(f"input   {taken['name']} {_shape(taken['shape'])}, {taken['values']}")
    lines += [f"output  {out['name']} {_shape(out['shape'])}" for out in record["outputs"]]
    norms = record["batchnorm"]
    lines.append(f"BatchNorm layers: {norms['folded']} folded, {norms['kept']} kept")
    if record["max_error"] is None:
        lines.append("not checked (--no-check)")
    else:
        worst = max(record["max_error"].values())
        lines.append(f"differs from torch by {worst:.1e} of an output's scale at most ({record['checked_with']})")
    return "\n".join(lines)


def _shape(shape: Sequence[Any]) -> str:
    return "×".join(str(side) for side in shape)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = make_parser().parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # what configs and libraries tell while they load
        record = run(args)
    print(json.dumps(record, indent=2, ensure_ascii=False) if args.json else describe(record))
    return 0


if __name__ == "__main__":
    run_plain_tool(main)
