"""The predictor against the seven published networks, each left out of the fit in turn.

    python benchmarks/latency_published.py [--json F] [--png F] [--devices DIR] [--quick]

Published: NVIDIA DeepLearningExamples, GPUNet (May 2022), as in checkpoints/results.csv: batch 1, fp16. V100 and A100
are fitted together, and a network that is left out is left out of both. Beside it stand

baseline   four parameters a column, fitted to it alone: overhead a kernel, one rate for convolutions, one for
           depth-wise ones, bandwidth; ``Σ overhead + max(compute, memory)`` over the same kernels.
chosen     the form of the model is chosen too, without the network that is left out: of the first two `VARIANTS` the
           one with the least mean error when each of the six others is left out in turn.
any        the same with all `VARIANTS`: also whether TensorRT runs SiLU inside of the convolution is left to the
           figures. A maintainer says that it can, from TensorRT 7 and other than in INT8
           (github.com/NVIDIA/TensorRT/issues/966, 2021-05-27). One network has most of the SiLU: the six others
           cannot tell.

What is not in `VARIANTS` was chosen by hand, on the same seven networks, and no column pays for it: two forms that were
tried for TensorRT and dropped (64×64 tiles with a fitted exponent of the occupancy, channels padded or not), and the
constants of roofline.py and fit.py (`FULL_REUSE`, `DEPTH_STEP`, `GPU_TILES`, padding to 8 channels, the centres and
spreads of the priors, `ERROR`, `DEVICE_SPREAD`). ``methods_baseline`` is what an overhead a kernel plus max(compute,
memory), with a rate of its own for depth-wise convolutions, gave before this was written.

``--quick`` fits the first two forms alone, without the column any. ``--devices DIR`` writes the predictors fitted to
all seven networks: the package's prunet_zoo/latency/devices.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares

from prunet_zoo.files import write_atomic, write_json
from prunet_zoo.jsonfile import dump_compact
from prunet_zoo.latency.fit import EAGER_GPU, FUSED_GPU, Observation, Prior, Subject, fit_rates, leave_one_out
from prunet_zoo.latency.kernels import Kernel, Runtime, network_kernels
from prunet_zoo.latency.labels import label_points
from prunet_zoo.latency.predictor import DeviceModel, FitReport
from prunet_zoo.latency.roofline import GPU_TILES, Peaks
from prunet_zoo.page import figure_png
from prunet_zoo.spec import load_spec

RESULTS = Path(__file__).parents[1] / "checkpoints" / "results.csv"
DATE = "2026-11-20"  # of the fit
METHODS_BASELINE = {"v100_tensorrt8_fp16_b1": 0.11, "a100_tensorrt8_fp16_b1": 0.09}  # mean absolute error
DRIVER_NAMES = {"v100": ("Tesla V100",), "a100": ("A100", "NVIDIA A100")}  # how they begin
GPUS = {
    "v100": (
        "Tesla V100-SXM2",
        Peaks(matrix_tflops=125, vector_tflops=31.4, bandwidth_gbs=900, units=80, align=8, tiles=GPU_TILES),
        "data sheet: NVIDIA Tesla V100 GPU Architecture (WP-08608-001), SXM2: 125 TFLOP/s FP16 tensor, 31.4 FP16, "
        "900 GB/s, 80 SMs. The publication does not say which V100",
    ),
    "a100": (
        "A100-SXM4-40GB",
        Peaks(matrix_tflops=312, vector_tflops=78, bandwidth_gbs=1555, units=108, align=8, tiles=GPU_TILES),
        "data sheet: NVIDIA A100 Tensor Core GPU Architecture, SXM4 40 GB: 312 TFLOP/s FP16 tensor, 78 FP16, "
        "1555 GB/s, 108 SMs. The publication does not say which A100",
    ),
}
ALL_FUSED = Runtime(fused_activations=("relu", "silu", "hard_swish"))
EAGER = Runtime(fuses=False, fused_activations=(), asynchronous=True)
ONE_OVERHEAD = Prior(
    EAGER_GPU.rates.model_copy(update={"light_overhead_us": None}),
    {k: v for k, v in EAGER_GPU.spread.items() if k != "light_overhead_us"},
)
ONE_TILE = ((64, 64),)
COLOURS = ("#1b6ca8", "#c8553d")


class Variant(NamedTuple):
    """A form of the model. ``tiles``: those that the runtime may take."""

    name: str
    runtime: Runtime
    prior: Prior
    tiles: tuple[tuple[int, int], ...] = GPU_TILES


# the first of each is the one that is shipped
VARIANTS = {
    "tensorrt8": (
        Variant("activations fused, best tile", ALL_FUSED, FUSED_GPU),
        Variant("activations fused, 64×64 tiles", ALL_FUSED, FUSED_GPU, ONE_TILE),
        Variant("SiLU apart, best tile", Runtime(), FUSED_GPU),
        Variant("SiLU apart, 64×64 tiles", Runtime(), FUSED_GPU, ONE_TILE),
    ),
    "pytorch": (
        Variant("launches overlap, two overheads", EAGER, EAGER_GPU),
        Variant("launches overlap, one overhead", EAGER, ONE_OVERHEAD),
        Variant("launches add, two overheads", EAGER.model_copy(update={"asynchronous": False}), EAGER_GPU),
        Variant("launches add, one overhead", EAGER.model_copy(update={"asynchronous": False}), ONE_OVERHEAD),
    ),
}
NAMES = {"tensorrt8": "tensorrt", "pytorch": "pytorch"}


def published(gpu: str, stack: str) -> tuple[Observation, ...]:
    """The published latencies of a column, from checkpoints/results.csv."""
    with RESULTS.open(encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["metric"] == f"latency {gpu} {stack} fp16"]
    found = []
    for row in rows:
        if row["source"] == "published":
            side = int(row["input_size"])
            found.append(Observation(load_spec(row["model"]), (side, side), float(row["value"])))
    return tuple(found)


@cache
def _both(stack: str, variant: str) -> tuple[Subject, ...]:
    form = next(v for v in VARIANTS[stack] if v.name == variant)
    return tuple(
        Subject.of(form.runtime, peaks.model_copy(update={"tiles": form.tiles}), "fp16", 1, published(gpu, stack))
        for gpu, (_, peaks, _) in GPUS.items()
    )


def subjects(stack: str, variant: Variant, without: str | None = None) -> list[Subject]:
    """Both GPUs with one form of the model, without one network (its spec's hash)."""
    both = _both(stack, variant.name)
    return [subject if without is None else subject.without(without) for subject in both]


def chosen(stack: str, variants: Sequence[Variant]) -> tuple[list[list[float]], list[str]]:
    """Errors of each network on each GPU, with one of ``variants`` chosen without it; and those chosen."""
    errors: list[list[float]] = [[] for _ in GPUS]
    names = []
    for observation in published("v100", stack):
        left = observation.hash

        def inner(variant: Variant, left: str = left) -> float:
            reports = leave_one_out(subjects(stack, variant, left), variant.prior)
            return sum(report.mean_abs for report in reports)

        best = min(variants, key=inner)
        fitted = fit_rates(subjects(stack, best, left), best.prior)
        names.append(best.name)
        for mine, subject, rates in zip(errors, subjects(stack, best), fitted, strict=True):
            i = [o.hash for o in subject.observations].index(left)
            mine.append(float(subject.predict(rates)[i] / subject.observations[i].ms - 1))
    return errors, names


class Baseline:
    """The four-parameter baseline of one column."""

    START = np.log([4e-3, 1e11, 1e10, 4e8])  # ms, MAC/ms, MAC/ms, bytes/ms

    def __init__(self, observations: Sequence[Observation], runtime: Runtime) -> None:
        self.ms = np.array([o.ms for o in observations])
        self.features = [
            np.array([self._row(k) for _, kernels in network_kernels(o.spec, runtime, o.input_size) for k in kernels])
            for o in observations
        ]

    @staticmethod
    def _row(kernel: Kernel) -> tuple[int, int, int]:
        is_depthwise = kernel.kind == "depthwise"
        return (
            0 if is_depthwise else kernel.macs,
            kernel.macs if is_depthwise else 0,
            2 * (kernel.maps + kernel.weights),
        )

    def predict(self, point: np.ndarray, i: int) -> float:
        """Latency of network ``i`` in ms."""
        overhead, rate, depthwise, bandwidth = np.exp(point)
        macs, light, size = self.features[i].T
        return float(np.sum(overhead + np.maximum(macs / rate + light / depthwise, size / bandwidth)))

    def fit(self, networks: Sequence[int]) -> np.ndarray:
        """Least squares on log errors, from several starts."""

        def residuals(point: np.ndarray) -> np.ndarray:
            return np.array([np.log(self.predict(point, i) / self.ms[i]) for i in networks])

        rng = np.random.default_rng(0)
        starts = [self.START, *(self.START + rng.normal(0, 0.7, 4) for _ in range(5))]
        bounds = (np.log([1e-5, 1e8, 1e7, 1e7]), np.log([1.0, 1e13, 1e13, 1e13]))
        return min((least_squares(residuals, s, bounds=bounds) for s in starts), key=lambda r: r.cost).x

    def errors(self) -> list[float]:
        """Relative error of each network when it is left out."""
        every = range(len(self.ms))
        return [float(self.predict(self.fit([j for j in every if j != i]), i) / self.ms[i] - 1) for i in every]


def summary(errors: Sequence[float]) -> dict[str, float]:
    """Mean and worst absolute error, as fractions."""
    return {
        "mean_abs": round(float(np.mean(np.abs(errors))), 4),
        "worst": round(float(np.max(np.abs(errors))), 4),
    }


def evaluate(stack: str, quick: bool = False) -> dict[str, dict[str, Any]]:
    """All figures of the columns of a stack; ``quick``: without "any"."""
    shipped = VARIANTS[stack][0]
    reports = leave_one_out(subjects(stack, shipped), shipped.prior)
    chances = {"chosen": chosen(stack, VARIANTS[stack][:2])}
    if not quick:
        chances["any"] = chosen(stack, VARIANTS[stack])
    columns = {}
    for i, (gpu, report) in enumerate(zip(GPUS, reports, strict=True)):
        name = f"{gpu}_{stack}_fp16_b1"
        errors = {"baseline": Baseline(published(gpu, stack), shipped.runtime).errors()}
        errors |= {key: found[i] for key, (found, _) in chances.items()}
        forms = {key: {f: names.count(f) for f in dict.fromkeys(names)} for key, (_, names) in chances.items()}
        columns[name] = {
            **summary([n.error for n in report.networks]),
            **{k: summary(e) | ({"forms": forms[k]} if k in forms else {}) for k, e in errors.items()},
            **({"methods_baseline": {"mean_abs": METHODS_BASELINE[name]}} if name in METHODS_BASELINE else {}),
            "networks": [
                {
                    "name": n.name,
                    "published_ms": n.measured_ms,
                    "predicted_ms": round(n.left_out_ms, 4),
                    "error": round(n.error, 4),
                    **{f"{key}_error": round(found[j], 4) for key, found in errors.items()},
                }
                for j, n in enumerate(report.networks)
            ],
        }
    return columns


def device_models(stack: str) -> list[DeviceModel]:
    """The predictors of a stack, fitted to all networks."""
    shipped = VARIANTS[stack][0]
    both = subjects(stack, shipped)
    reports: list[FitReport] = leave_one_out(both, shipped.prior)
    fitted = fit_rates(both, shipped.prior)
    models = []
    for (gpu, (device, peaks, sheet)), rates, report in zip(GPUS.items(), fitted, reports, strict=True):
        models.append(
            DeviceModel(
                name=f"{gpu}-{NAMES[stack]}-fp16",
                device=device,
                devices=DRIVER_NAMES[gpu],
                accelerator="cuda",
                backend="trtexec" if stack == "tensorrt8" else "torch",
                backend_version="TensorRT 8" if stack == "tensorrt8" else "PyTorch (version not published)",
                dtype="fp16",
                batch=1,
                runtime=shipped.runtime,
                peaks=peaks,
                rates=rates.model_copy(update={k: float(f"{getattr(rates, k):.6g}") for k in shipped.prior.spread}),
                fit=report,
                sources={
                    "latencies": "NVIDIA DeepLearningExamples, PyTorch/Classification/GPUNet, May 2022, batch 1, fp16, "
                    "rounded to 0.01 ms there",
                    "peaks": sheet,
                    "rates": "fitted by benchmarks/latency_published.py; V100 and A100 together",
                },
                date=DATE,
            )
        )
    return models


def picture(columns: dict[str, dict[str, Any]]) -> bytes:
    """Predicted when left out against published, a panel a stack."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(10.5, 5))
    for ax, stack in zip(axes, VARIANTS, strict=True):
        mine = {gpu: columns[f"{gpu}_{stack}_fp16_b1"] for gpu in GPUS}
        every = [n[key] for c in mine.values() for n in c["networks"] for key in ("published_ms", "predicted_ms")]
        low, high = min(every) / 1.15, max(every) * 1.15
        line = np.array([low, high])
        ax.fill_between(line, line * 0.85, line * 1.15, color="#eeeeee", label="±15%")
        ax.fill_between(line, line * 0.92, line * 1.08, color="#d5d5d5", label="±8%")
        for gpu, marker, colour in zip(GPUS, "os", COLOURS, strict=True):
            nets = mine[gpu]["networks"]
            label = f"{gpu.upper()}: mean {mine[gpu]['mean_abs']:.1%}, worst {mine[gpu]['worst']:.1%}"
            ax.plot(
                [n["published_ms"] for n in nets], [n["predicted_ms"] for n in nets], marker, color=colour, label=label
            )
        ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
        ticks = [t for t in (0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 6) if low <= t <= high]
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(plt.FixedLocator(ticks))
            axis.set_major_formatter(plt.FuncFormatter(lambda v, _: f"{v:g}"))
            axis.set_minor_locator(plt.NullLocator())
        ax.set_xlabel("published, ms")
        ax.set_ylabel("predicted when left out of the fit, ms")
        ax.set_title({"tensorrt8": "TensorRT 8, fp16, batch 1", "pytorch": "PyTorch, fp16, batch 1"}[stack])
        ax.legend(fontsize=8, loc="upper left")
    fig.tight_layout()
    for ax, stack in zip(axes, VARIANTS, strict=True):
        nets = [n for gpu in GPUS for n in columns[f"{gpu}_{stack}_fp16_b1"]["networks"]]
        names = [n["name"].rpartition("_")[2].upper() for n in nets]
        colours = [colour for colour in COLOURS for _ in range(len(nets) // len(COLOURS))]
        label_points(ax, [n["published_ms"] for n in nets], [n["predicted_ms"] for n in nets], names, colours)
    return figure_png(fig)


def show(columns: dict[str, dict[str, Any]]) -> None:
    """Print a table a column."""
    console = Console(width=110)
    for name, column in columns.items():
        table = Table(title=name)
        keys = [key for key in ("chosen", "any", "baseline") if key in column]
        for head in ("network", "published ms", "predicted ms", "error", *keys):
            table.add_column(head, justify="left" if head == "network" else "right")
        for n in column["networks"]:
            shares = [f"{n[key]:+.1%}" for key in ("error", *(f"{key}_error" for key in keys))]
            table.add_row(n["name"], f"{n['published_ms']:.2f}", f"{n['predicted_ms']:.3f}", *shares)
        table.add_section()
        rows = (column, *(column[key] for key in keys))
        table.add_row("mean absolute error", "", "", *(f"{r['mean_abs']:.1%}" for r in rows))
        table.add_row("worst", "", "", *(f"{r['worst']:.1%}" for r in rows))
        console.print(table)
        for key in keys:
            if "forms" in column[key]:
                forms = ", ".join(f"{form} ({count} of 7)" for form, count in column[key]["forms"].items())
                console.print(f"{key}: {forms}", soft_wrap=True)
        console.print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--png", type=Path, help="write the picture to this file")
    parser.add_argument("--devices", type=Path, metavar="DIR", help="write the four predictors into this folder")
    parser.add_argument("--quick", action="store_true", help="the first two forms of the model alone")
    args = parser.parse_args()
    columns = {name: column for stack in VARIANTS for name, column in evaluate(stack, args.quick).items()}
    show(columns)
    if args.json:
        write_json(args.json, {"published": columns})
    if args.png:
        write_atomic(args.png, picture(columns))
    for stack in VARIANTS if args.devices else ():
        for model in device_models(stack):
            write_atomic(args.devices / f"{model.name}.json", dump_compact(model.to_dict()) + "\n")


if __name__ == "__main__":
    main()
