"""One detector with nine backbones: size, work, where its time goes, and what the backbones are known to reach.

    python benchmarks/detection_backbones.py [--json F] [--quick] [--detector retinanet|rtmdet|faster-rcnn]
                                             [--backbones NAME ...] [--size H W] [--threads N] [--device cpu|cuda]

Builds ``configs/detection/<detector>_<backbone>_*_coco.py`` for each backbone and times ``test_step`` on one image
(batch 1, float32, PyTorch eager), split into preprocessing, backbone, neck + head, and post-processing, as
`prunet_zoo.mm.detector_latency` says. Weights are random; post-processing gets the same scores and boxes in every
network: ``--candidates`` (1000) pairs of box and class pass the threshold.

The networks are timed in turn, an image each, so that a disturbed minute hits all of them. Figures are medians over the
quieter third of the rounds; p10 and p90 are over all. With one CPU thread they are CPU time of that thread: what the
image costs when nothing else runs. Else wall time. GMACs are at the detector's input size.

Accuracy is not measured here: ImageNet top-1 as published (``source`` in the JSON), at the input size of that figure.
Beside the JSON goes a plot (.png).
"""

from __future__ import annotations

import argparse
import csv
import io
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prunet_zoo.errors import PrunetError
from prunet_zoo.files import write_atomic, write_json
from prunet_zoo.latency.backends.base import cpu_name
from prunet_zoo.latency.probes import randomise
from prunet_zoo.latency.record import now
from prunet_zoo.mm.cli import load_config, run_tool
from prunet_zoo.mm.detector_latency import LATENCY_PARTS, Clock, DetectorTimer, count_macs, one_image
from prunet_zoo.version import __version__

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "detection"
RESULTS = ROOT / "checkpoints" / "results.csv"
BACKBONES = (
    *("prunet-p0", "prunet-p1", "gpunet-0", "gpunet-1"),
    *("efficientnet-b0", "efficientnet-b1", "efficientnet-b2", "efficientnetv2-s", "r50"),
)
SIZES = {"retinanet": (800, 1344), "faster-rcnn": (800, 1344), "rtmdet": (640, 640)}  # mmdet's test sizes, padded
FAMILIES = (("prunet", "#d62728"), ("gpunet", "#ff7f0e"), ("efficientnet", "#1f77b4"), ("r50", "#7f7f7f"))

_TIMM_RESULTS = (
    "https://github.com/huggingface/pytorch-image-models/blob/0173a139a2c66db3a41ebfe1d8ac4fb02483642e/"
    "results/results-imagenet.csv"
)
_TIMM_README = "https://github.com/huggingface/pytorch-image-models/blob/main/README.md"
# timm's name or the address of the weights → top-1 in %, input size in px, source
PUBLISHED = {
    "efficientnet_b0.ra_in1k": (77.694, 224, _TIMM_RESULTS),
    "efficientnet_b1.ft_in1k": (78.800, 256, _TIMM_RESULTS),
    "efficientnet_b1.ra4_e3600_r240_in1k": (81.440, 288, _TIMM_README),
    "efficientnet_b2.ra_in1k": (80.610, 288, _TIMM_RESULTS),
    "tf_efficientnetv2_s.in1k": (83.900, 384, _TIMM_RESULTS),
    "tf_efficientnetv2_s.in21k_ft_in1k": (84.288, 384, _TIMM_RESULTS),
    "efficientnetv2_rw_s.ra2_in1k": (83.808, 384, _TIMM_RESULTS),
    "torchvision://resnet50": (76.130, 224, f"{_TIMM_RESULTS} (resnet50.tv_in1k)"),
}


class BenchmarkError(PrunetError, ValueError):
    """A config is missing, or a detector cannot be measured as asked."""


def find_config(detector: str, backbone: str, folder: Path = CONFIGS) -> Path:
    """The COCO config of a detector with a backbone.

    Raises:
        BenchmarkError: there is none, or there are several.
    """
    found = sorted(folder.glob(f"{detector}_{backbone}_*_coco.py"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise BenchmarkError(f"one config {detector}_{backbone}_*_coco.py is expected in {folder}; found: {names}")
    return found[0]


def accuracy_of(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Published ImageNet top-1 of the weights that a config's backbone starts from; empty where none is known."""
    if backbone["type"] == "PruNet":
        with RESULTS.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if (row["model"], row["metric"], row["source"]) == (backbone["arch"], "top1", "published"):
                    return {"top1": float(row["value"]), "px": int(row["input_size"]), "source": row["reference"]}
        return {}
    if backbone["type"] == "TimmBackbone":
        from timm.models import get_pretrained_cfg

        model, _, tag = str(backbone["model_name"]).partition(".")
        key = f"{model}.{tag or getattr(get_pretrained_cfg(model), 'tag', '')}"
    else:
        key = str((backbone.get("init_cfg") or {}).get("checkpoint"))
    if key not in PUBLISHED:
        return {}
    top1, px, source = PUBLISHED[key]
    return {"top1": top1, "px": px, "source": source, "weights": key}


@dataclass
class Network:
    """A detector ready to be timed, and what is known of it."""

    name: str
    config: Path
    timer: DetectorTimer
    facts: dict[str, Any]


def build(name: str, config: Path, size: tuple[int, int], device: torch.device, candidates: int) -> Network:
    """Build a config's detector with random weights, count its parameters and work, and prepare it for timing."""
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope

    cfg = load_config(config)
    facts = accuracy_of(cfg.model.backbone)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmdet")):
        model: Any = randomise(MODELS.build(cfg.model)).to(device)
    timer = DetectorTimer(model, one_image(size), candidates)
    macs = count_macs(model, size)
    facts = {
        "backbone_params": sum(p.numel() for p in model.backbone.parameters()),
        "detector_params": sum(p.numel() for p in model.parameters()),
        "backbone_gmacs": round(macs["backbone"] / 1e9, 4),
        "detector_gmacs": round(macs["detector"] / 1e9, 4),
        **facts,
    }
    return Network(name, config, timer, facts)


def time_in_turn(networks: Sequence[Network], rounds: int, console: Console) -> None:
    """Time all networks ``rounds`` times in turn, after a run each that does not count."""
    for network in networks:
        network.timer.run()
    for number in range(rounds):
        start = time.perf_counter()
        for network in networks:
            network.timer.sample()
        if number == 0:
            seconds = (rounds - 1) * (time.perf_counter() - start)
            console.print(f"{rounds} rounds, {seconds:.0f} s to go", highlight=False)


def make_row(network: Network) -> dict[str, Any]:
    """A row of the results."""
    times = {key: round(value, 4) for key, value in network.timer.summary().items()}
    return {"backbone": network.name, "config": network.config.name, **network.facts, **times}


def show(rows: Sequence[Mapping[str, Any]], title: str, console: Console) -> None:
    """Print the table."""
    table = Table(title=title)
    names = ("backbone", "M params", "detector's", "GMACs", "detector's", "backbone ms", "neck + head ms", "post ms",
             "preprocess ms", "detector ms", "p10–p90", "top-1 (px)")  # fmt: skip
    for name in names:
        table.add_column(name, justify="left" if name == "backbone" else "right", no_wrap=name == "backbone")
    for r in rows:
        table.add_row(
            r["backbone"], f"{r['backbone_params'] / 1e6:.1f}", f"{r['detector_params'] / 1e6:.1f}",
            f"{r['backbone_gmacs']:.1f}", f"{r['detector_gmacs']:.1f}",
            *(f"{r[f'{part}_ms']:.1f}" for part in ("backbone", "neck_head", "post", "preprocess", "total")),
            f"{r['total_p10_ms']:.0f}–{r['total_p90_ms']:.0f}", f"{r['top1']:.1f} ({r['px']})" if "top1" in r else "-",
        )  # fmt: skip
    console.print(table)


def plot(rows: Sequence[Mapping[str, Any]], title: str, out: Path) -> None:
    """Draw the parts of the latency as stacked bars, and accuracy against the whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (bars, points) = plt.subplots(1, 2, figsize=(11, 0.36 * len(rows) + 2.2), width_ratios=(1.25, 1))
    names = [row["backbone"] for row in rows]
    left = [0.0] * len(rows)
    shades = {"preprocess": "#bbbbbb", "backbone": "#1f77b4", "neck_head": "#aec7e8", "post": "#ff9f40"}
    for part in LATENCY_PARTS:
        values = [row[f"{part}_ms"] for row in rows]
        bars.barh(names, values, left=left, color=shades[part], label=LATENCY_PARTS[part], height=0.7)
        left = [a + b for a, b in zip(left, values, strict=True)]
    bars.invert_yaxis()
    bars.set(xlabel="latency of the detector, ms")
    bars.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.42, 1.0), columnspacing=1.0)
    known = [row for row in rows if "top1" in row]
    wide = max(row["total_ms"] for row in known) - min(row["total_ms"] for row in known) if known else 0.0
    high = max(row["top1"] for row in known) - min(row["top1"] for row in known) if known else 0.0
    for row in known:
        colour = next((c for family, c in FAMILIES if row["backbone"].startswith(family)), "black")
        points.scatter(row["total_ms"], row["top1"], color=colour, s=28)
        crowded = any(  # another point a little higher, whose label needs the place above
            other is not row
            and 0 <= other["top1"] - row["top1"] < 0.06 * high
            and abs(other["total_ms"] - row["total_ms"]) < 0.3 * wide
            for other in known
        )
        points.annotate(row["backbone"], (row["total_ms"], row["top1"]), xytext=(5, -11 if crowded else 4),
                        textcoords="offset points", fontsize=8)  # fmt: skip
    points.set(xlabel="latency of the detector, ms", ylabel="ImageNet top-1, %, as published")
    points.margins(x=0.22, y=0.1)
    for axis in (bars, points):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomic(out, buffer.getvalue())


def describe(args: argparse.Namespace, device: torch.device, size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """What the figures depend on."""
    import mmcv
    import mmdet
    import timm
    import torchvision

    versions = {"prunet_zoo": __version__, "python": platform.python_version()}
    versions |= {m.__name__: str(m.__version__) for m in (torch, torchvision, timm, mmcv, mmdet)}
    return {
        "detector": args.detector,
        "input_size": list(size),
        "batch": 1,
        "dtype": "fp32",
        "candidates": args.candidates,
        "rounds": rounds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "accelerator": device.type,
        "threads": torch.get_num_threads(),
        "clock": "CPU time of the thread" if Clock(device).cpu_time else "wall time",
        "backend": "PyTorch eager",
        "versions": versions,
        "date": now(),
    }


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows to this file, and the plot beside it")
    parser.add_argument("--quick", action="store_true", help="128 × 160 px, 3 rounds (about 1 minute)")
    parser.add_argument("--detector", choices=tuple(SIZES), default="retinanet")
    parser.add_argument(
        "--backbones", nargs="+", default=list(BACKBONES), metavar="NAME", help="as in the configs' names"
    )
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="px, multiples of 32; default: the detector's test size"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, metavar="N", help="images a network; default 9")
    parser.add_argument(
        "--candidates", type=int, default=1000, metavar="N", help="box and class pairs over the threshold"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Build, time, report."""
    parser = make_parser()
    args = parser.parse_args(argv)
    rounds = (3 if args.quick else 9) if args.rounds is None else args.rounds
    size = tuple(args.size) if args.size else (128, 160) if args.quick else SIZES[args.detector]
    if min(*size, args.threads, rounds) < 1 or args.candidates < 0:
        parser.error("--size, --threads and --rounds must be at least 1, --candidates at least 0")
    if any(side % 32 for side in size):
        parser.error(f"--size must be multiples of 32, as mmdet pads its images, got {size[0]} {size[1]}")
    if len(set(args.backbones)) < len(args.backbones):
        parser.error(f"--backbones must differ from each other, got {' '.join(args.backbones)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda was asked for, but torch sees no CUDA device; use --device cpu")
    torch.set_num_threads(args.threads)
    from prunet_zoo.mm.network import register_mmdet

    register_mmdet()
    console, device = Console(width=150), torch.device(args.device)
    configs = [find_config(args.detector, name) for name in args.backbones]
    networks = [build(n, c, size, device, args.candidates) for n, c in zip(args.backbones, configs, strict=True)]
    time_in_turn(networks, rounds, console)
    rows = [make_row(network) for network in networks]
    setting = describe(args, device, size, rounds)
    title = (
        f"{args.detector}, {size[0]} × {size[1]} px, batch 1, float32; {setting['device']}, "
        + (f"{args.threads} thread{'s' * (args.threads > 1)}" if device.type == "cpu" else "CUDA")
        + f", PyTorch {torch.__version__}; {setting['date'][:10]}"
    )
    show(rows, title, console)
    if args.json:
        command = shlex.join(["python", "benchmarks/detection_backbones.py", *(sys.argv[1:] if argv is None else argv)])
        write_json(args.json, {**setting, "command": command, "rows": rows})
        plot(rows, title, args.json.with_suffix(".png"))
        console.print(f"{args.json}, {args.json.with_suffix('.png')}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    run_tool(main)
