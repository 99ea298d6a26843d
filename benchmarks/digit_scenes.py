"""What classification pretraining gives a detector: three detectors with one searched backbone, with it and without.

    python benchmarks/digit_scenes.py [--json F] [--quick] [--spec FILE --weights FILE] [--detectors NAME ...]
                                      [--work-dir D] [--seeds N ...] [--jobs N]

Trains RetinaNet, RTMDet and Faster R-CNN on the digit scenes, each from the classifier's weights and from random ones,
everything else the same: config, network, data, seed, schedule. Without --spec and --weights, the network is searched
for and trained as a classifier first, with the quickstart's commands. The classifier has seen the training scans only,
and its last weights are taken: the best ones were chosen on the scans that the validation scenes are made of.

Prints mAP and mAP50 after the last epoch, the gain, and the epoch that first reached mAP50 0.90; --json writes these
with the values of every epoch, and a plot of them beside it (.png). The learning rate falls to zero at the last epoch,
so the earlier values are those of an unfinished schedule. Stopped at any time, the same command goes on.

The runs: 3 detectors × 2 starts × 5 epochs of 3,000 scenes, about 4 to 9 minutes of one CPU core each.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prunet_zoo.data.scenes import write_scenes
from prunet_zoo.errors import CheckpointError, PrunetError
from prunet_zoo.files import write_atomic, write_json
from prunet_zoo.latency.record import now
from prunet_zoo.mm.cli import run_tool
from prunet_zoo.mm.interrupts import Interrupted, StopSignals, resume_command
from prunet_zoo.spec import NetSpec, load_spec

ROOT = Path(__file__).resolve().parent.parent
SPACE = "prunet_cpu_small"
SEARCH = "configs/search/tiered_prunet-cpu-small_digits.py"
CLASSIFY = "configs/classification/prunet-cpu-small_digits.py"
MIDDLING = "configs/classification/prunet-cpu-small.json"
DETECTORS = {
    "retinanet": "configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py",
    "rtmdet": "configs/detection/rtmdet_prunet-cpu-small_digit-scenes.py",
    "faster-rcnn": "configs/detection/faster-rcnn_prunet-cpu-small_fpn_digit-scenes.py",
}
TITLES = {"retinanet": "RetinaNet", "rtmdet": "RTMDet", "faster-rcnn": "Faster R-CNN"}
INITS = ("classifier", "random")
COLOURS = {"classifier": "#1f77b4", "random": "#7f7f7f"}
WANTED = 0.90  # mAP50
TARGET_MS = 0.07


def from_root(path: Path) -> Path:
    """``path`` as the child processes see it, which run in the repository: relative to it if it lies in there."""
    full = path.resolve()
    return full.relative_to(ROOT) if full.is_relative_to(ROOT) else full


class RunError(PrunetError, RuntimeError):
    """A tool that the benchmark called ended with an error, or left no result."""


@dataclass(frozen=True)
class Job:
    """A child process that leaves its results in ``folder``, its output in ``log``."""

    name: str
    command: tuple[str, ...]
    folder: Path

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return ROOT / self.folder.with_name(self.folder.name + ".log")


def run_jobs(jobs: Sequence[Job], at_once: int, console: Console) -> None:
    """Run all jobs, at most ``at_once`` together, each on one thread.

    Raises:
        RunError: one failed; the others were stopped after they had saved.
        Interrupted: a signal came; all were stopped after they had saved.
    """
    env = {"OMP_NUM_THREADS": "1", **os.environ}  # small networks gain nothing from a second thread
    waiting, running, failed = list(jobs), dict[Job, tuple[subprocess.Popen[bytes], float]](), None
    told = False
    with StopSignals() as signals:
        while running or (waiting and not failed and signals.requested is None):
            while waiting and len(running) < at_once and not failed and signals.requested is None:
                job = waiting.pop(0)
                console.print(f"$ python {shlex.join(job.command)}", style="dim", highlight=False, soft_wrap=True)
                job.log.parent.mkdir(parents=True, exist_ok=True)
                with job.log.open("ab") as log:
                    child = subprocess.Popen([sys.executable, *job.command], cwd=ROOT, env=env, stdout=log, stderr=log)
                running[job] = child, time.perf_counter()
            for job, (child, start) in list(running.items()):
                if child.poll() is not None:
                    del running[job]
                    failed = failed or (job if child.returncode else None)
                    state = f"status {child.returncode}" if child.returncode else "done"
                    console.print(f"{job.name}: {state} after {time.perf_counter() - start:.0f} s", highlight=False)
            if (failed or signals.requested is not None) and not told:
                told = True
                for child, _ in running.values():
                    child.terminate()  # SIGTERM: the tools save and end
            time.sleep(0.2)
    if signals.requested is not None:
        raise Interrupted(signals.requested, f"stopped. Go on with:\n    {resume_command(resumable=False)}")
    if failed:
        lines = failed.log.read_text(errors="replace").strip().splitlines()
        raise RunError(f"{failed.name} failed: {lines[-1] if lines else 'no output'} (all of it: {failed.log})")


def prepare_network(work: Path, seed: int, quick: bool, console: Console) -> tuple[Path, Path]:
    """Search for a network and train it as a classifier, or go on with it; returns its spec and its last weights."""
    table, search, classifier = work / "latency_table.jsonl", work / "search", work / "classifier"
    spec = search / "spec.json"
    common = ("--seed", str(seed), "--resume", "--work-dir")
    steps = [
        Job("latency table", ("tools/latency.py", "table", SPACE, "--out", str(table)), work / "table"),
        Job(
            "search",
            ("tools/search.py", SEARCH, "--target-ms", str(TARGET_MS), "--table", str(table),
             *common, str(search)),
            search,
        ),
        Job(
            "classifier",
            ("tools/train.py", CLASSIFY, "--arch", str(spec), "--weights", str(search / "weights.safetensors"),
             *common, str(classifier)),
            classifier,
        ),
    ]  # fmt: skip
    if quick:  # a given network, two epochs
        spec = Path(MIDDLING)
        short = ("--cfg-options", "train_cfg.max_epochs=2", "train_cfg.val_begin=2", "param_scheduler.0.total_steps=2")
        command = ("tools/train.py", CLASSIFY, "--arch", str(spec), *common, str(classifier), *short)
        steps = [Job("classifier", command, classifier)]
    run_jobs(steps, 1, console)
    return spec, classifier / "last.safetensors"


def quick_options(work: Path) -> list[str]:
    """The ``--cfg-options`` of a run on a few scenes."""
    root = str(write_scenes(ROOT / work / "scenes", train=48, val=16)) + "/"
    loaders = [f"{part}_dataloader.dataset.data_root={root}" for part in ("train", "val", "test")]
    metrics = [f"{part}_evaluator.ann_file={root}annotations/instances_val.json" for part in ("val", "test")]
    return [*loaders, *metrics, "train_cfg.max_epochs=2", "param_scheduler.0.total_steps=2"]


def detector_job(
    work: Path, detector: str, init: str, seed: int, spec: Path, weights: Path, options: Sequence[str] = ()
) -> Job:
    """One training run of a detector, evaluated after every epoch."""
    folder = work / f"{detector}_{init}_seed{seed}"
    start = ("--weights", str(weights)) if init == "classifier" else ()
    command = (
        "tools/train.py", DETECTORS[detector], "--arch", str(spec), *start, "--work-dir", str(folder),
        "--seed", str(seed), "--resume", "--cfg-options", "train_cfg.val_interval=1", *options,
    )  # fmt: skip
    return Job(folder.name, command, folder)


def read_curve(folder: Path) -> list[dict[str, float]]:
    """mAP and mAP50 after each epoch, from the logs of a run (several of them where it was stopped and went on)."""
    epochs: dict[int, dict[str, float]] = {}
    for log in sorted((ROOT / folder).glob("*/vis_data/scalars.json")):
        for line in log.read_text().splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue  # cut off by a kill; the run that went on has written the epoch again
            if "coco/bbox_mAP_50" in values:
                epoch = int(values["step"])
                names = {"map": "coco/bbox_mAP", "map50": "coco/bbox_mAP_50"}
                epochs[epoch] = {"epoch": epoch, **{name: float(values[key]) for name, key in names.items()}}
    return [epochs[epoch] for epoch in sorted(epochs)]


def read_row(job: Job, detector: str, init: str, seed: int) -> dict[str, Any]:
    """What a finished run has left behind.

    Raises:
        RunError: its record or the value of an epoch is missing.
    """
    try:
        record = json.loads((ROOT / job.folder / "metrics.json").read_text())
        metrics = record["metrics"]
        last, result = int(metrics["epoch"]), {k: float(metrics[f"coco/bbox_{v}"]) for k, v in _NAMES.items()}
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{job.folder} has no whole metrics.json ({error}); remove the folder and run again") from None
    curve = read_curve(job.folder)
    if [point["epoch"] for point in curve] != list(range(1, last + 1)):
        raise RunError(
            f"the logs in {job.folder} hold epochs {[int(p['epoch']) for p in curve]} of {last}; "
            "remove the folder and run again"
        )
    return {
        "detector": detector,
        "init": init,
        "seed": seed,
        **result,
        "epochs_to_0.90": next((int(p["epoch"]) for p in curve if p["map50"] >= WANTED), None),
        "seconds": record["seconds"],
        "params": record["params"],
        "backbone_params": record["backbone_params"],
        "curve": curve,
        "config": DETECTORS[detector],
        "device": record["device"],
        "threads": record["threads"],
        "date": record["date"],
        "versions": record["versions"],
    }


_NAMES = {"map": "mAP", "map50": "mAP_50", "map75": "mAP_75"}


def mean_of(rows: Sequence[Mapping[str, Any]], detector: str, init: str, key: str) -> float | None:
    """Mean of a figure over the seeds; None where a run has none."""
    values = [row[key] for row in rows if (row["detector"], row["init"]) == (detector, init)]
    return None if not values or None in values else statistics.fmean(values)


def show(rows: Sequence[Mapping[str, Any]], spec: NetSpec, console: Console) -> None:
    """Print the table: means over the seeds."""
    seeds = sorted({row["seed"] for row in rows})
    table = Table(
        title=f"{spec.name} ({spec.params():,} parameters) on digit scenes; {rows[0]['device']}; seeds {seeds}"
    )
    for name in ("detector", "start", "mAP", "mAP50", "gain in mAP", "in mAP50", "epochs to 0.90", "seconds"):
        table.add_column(name, justify="left" if name in ("detector", "start") else "right")
    for detector in dict.fromkeys(row["detector"] for row in rows):
        for init in INITS:
            values = {k: mean_of(rows, detector, init, k) for k in ("map", "map50", "epochs_to_0.90", "seconds")}
            gains = [_gain(rows, detector, key) if init == "classifier" else "" for key in ("map", "map50")]
            reached = values["epochs_to_0.90"]
            table.add_row(
                TITLES[detector] if init == INITS[0] else "", init, f"{values['map']:.3f}", f"{values['map50']:.3f}",
                *gains, "never" if reached is None else f"{reached:g}", f"{values['seconds']:.0f}",
            )  # fmt: skip
    console.print(table)


def _gain(rows: Sequence[Mapping[str, Any]], detector: str, key: str) -> str:
    first, second = (mean_of(rows, detector, init, key) for init in INITS)
    return "" if first is None or second is None else f"{first - second:+.3f}"


def plot(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draw mAP50 by epoch, a panel a detector: a thin line a run, a thick one for the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    detectors = list(dict.fromkeys(row["detector"] for row in rows))
    figure, axes = plt.subplots(1, len(detectors), figsize=(3.2 * len(detectors), 3), sharey=True, squeeze=False)
    for axis, detector in zip(axes[0], detectors, strict=True):
        for init in INITS:
            runs = [row["curve"] for row in rows if (row["detector"], row["init"]) == (detector, init)]
            epochs = [point["epoch"] for point in runs[0]]
            lines = [[point["map50"] for point in run] for run in runs]
            for line in lines if len(lines) > 1 else []:
                axis.plot(epochs, line, color=COLOURS[init], linewidth=0.7, alpha=0.5)
            mean = [statistics.fmean(values) for values in zip(*lines, strict=True)]
            axis.plot(epochs, mean, "o-", color=COLOURS[init], markersize=4, label=f"from {init} weights")
            axis.annotate(f"{mean[-1]:.3f}", (epochs[-1], mean[-1]), xytext=(0, 5 if init == "classifier" else -12),
                          textcoords="offset points", ha="right", fontsize=8, color=COLOURS[init])  # fmt: skip
        axis.axhline(WANTED, color="black", linewidth=0.6, linestyle=":")
        axis.set(title=TITLES[detector], xlabel="epoch", xticks=epochs, ylim=(0, 1.04))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("mAP50, digit scenes")
    axes[0, -1].legend(loc="lower right", frameon=False, fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomic(out, buffer.getvalue())


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows to this file, and the plot beside it")
    parser.add_argument(
        "--quick", action="store_true", help="2 epochs of 48 scenes, no search: does it run? (2 minutes)"
    )
    parser.add_argument("--spec", type=Path, metavar="FILE", help="network; default: searched for, 0.07 ms")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="its classifier (last.safetensors)")
    parser.add_argument("--detectors", nargs="+", choices=tuple(DETECTORS), default=list(DETECTORS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="every run once for each")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time; each takes one core")
    parser.add_argument("--work-dir", type=Path, metavar="D", help="default: work_dirs/benchmark_digit_scenes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then report."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if (args.spec is None) != (args.weights is None):
        parser.error("--spec and --weights belong together: the network and its classifier's weights")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    console = Console(width=120)
    default = ROOT / "work_dirs" / ("benchmark_digit_scenes" + ("_quick" if args.quick else ""))
    work = from_root(args.work_dir or default)
    if args.spec:
        spec, weights = from_root(args.spec), from_root(args.weights)
        if not (ROOT / weights).is_file():
            raise CheckpointError(f"weights file {weights} does not exist")
    else:
        spec, weights = prepare_network(work, args.seeds[0], args.quick, console)
    network = load_spec(ROOT / spec)
    options = quick_options(work) if args.quick else []
    plan = [(d, init, seed) for seed in args.seeds for d in args.detectors for init in INITS]
    jobs = [detector_job(work, *what, spec, weights, options) for what in plan]
    run_jobs(jobs, args.jobs, console)
    rows = [read_row(job, *what) for job, what in zip(jobs, plan, strict=True)]
    show(rows, network, console)
    if args.json:
        command = shlex.join(["python", "benchmarks/digit_scenes.py", *(sys.argv[1:] if argv is None else argv)])
        write_json(
            args.json,
            {"spec": network.to_dict(), "spec_hash": network.hash, "rows": rows, "command": command, "date": now()},
        )
        plot(rows, args.json.with_suffix(".png"))
        console.print(f"{args.json}, {args.json.with_suffix('.png')}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    run_tool(main)
