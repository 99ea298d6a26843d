"""The four methods on one space, data set and budget: accuracy, measured latency, search time, memory.

    python benchmarks/methods.py [--json F] [--quick] [--data cifar10] [--seeds 3] [--target-ms T] [--methods M ...]
                                 [--epochs 10] [--train-epochs 15] [--images 300] [--start inherited]
                                 [--data-root D] [--work-dir D]

Space prunet_cpu_small, ONNX Runtime on one CPU thread, one latency table for all. Every method searches for the same
number of epochs, and the network that it found is trained for the same number of epochs more, from the weights that it
inherited. PaS and Archtree prune the space's largest network; what they train before and after pruning is part of the
epochs.

The same epochs are passes over the images that weights are trained on; they are not the same work. Tiered pruning makes
an architecture step on held-out images for each weight step; DDPNAS scores every sub-network that it draws on a
held-out batch; PaS learns its masks in its weight steps; Archtree's importance, recovery steps and scores come on top.
All of it counts in ``search_s``. Archtree grows a smaller tree than its config's (``TREE``).

Two rows say whether searching helps: ``random``, a network of the space drawn at random that meets the budget when
measured, and ``uniform``, the largest network with all widths scaled by one factor. Both are trained from scratch, for
as many epochs as search and training take together. With ``--start scratch`` every network is trained from scratch for
``--train-epochs``: that compares architectures alone.

All networks are measured anew together at the end: ``latency_ms``. Run it again to go on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cifar import ARCHIVE, unpack
from digit_scenes import Job, RunError, from_root, run_jobs
from rich.console import Console
from rich.table import Table
from search_targets import measure_anew

from prunet_zoo.compare.draw import draw_comparison
from prunet_zoo.compare.reports import Found
from prunet_zoo.compare.rows import compare
from prunet_zoo.cost import default_target, space_cost
from prunet_zoo.errors import LatencyError
from prunet_zoo.files import write_atomic, write_json
from prunet_zoo.latency import QUICK, LatencyTable, build_table, progress_bar
from prunet_zoo.mm.cli import run_tool
from prunet_zoo.mm.search_choice import measure_like
from prunet_zoo.page import figure_png
from prunet_zoo.search.target import TargetHitter
from prunet_zoo.space import Encoding, SearchSpace, load_space
from prunet_zoo.spec import NetSpec, load_spec

ROOT = Path(__file__).resolve().parent.parent
SPACE = "prunet_cpu_small"
METHODS, BASELINES = ("tiered", "ddpnas", "pas", "archtree"), ("random", "uniform")
# what keeps a search within minutes: fewer survivors, children, rounds, steps and images than the configs have
TREE = ("beam=2", "children=2", "rounds=6", "measure_most=3", "recovery_steps=10", "held_batches=8")
SMALL_TREE = ("beam=1", "children=1", "rounds=2", "recovery_steps=2")
FULL_OPTIONS, QUICK_OPTIONS = {"archtree": TREE}, {"ddpnas": ("passes=1", "widths=2"), "archtree": SMALL_TREE}
EPOCHS = {
    "all": "passes over the images that weights are trained on",
    "tiered": "and an architecture step on held-out images for each weight step",
    "ddpnas": "and a held-out batch for each sub-network drawn",
    "pas": "masks learn in the weight steps",
    "archtree": "and importance, recovery steps and scores of the tree",
}
DRAWS = 20_000  # random networks at most for one that costs what is asked for
COLUMNS = ("method", "seeds", "top1", "spread", "latency_ms", "over", "search_s", "peak_mb", "MMACs")


def strategy_options(args: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """What differs from the methods' configs."""
    return QUICK_OPTIONS if args.quick else FULL_OPTIONS


def search_job(args: argparse.Namespace, method: str, seed: int, table: Path) -> Job:
    """One search as a user would run it."""
    folder = args.work / f"{method}_{seed}" / "search"
    strategy = strategy_options(args).get(method, ())
    options = [
        f"train_cfg.max_epochs={args.epochs}", f"param_scheduler.T_max={args.epochs}",
        f"train_dataloader.batch_size={args.batch}", f"train_cfg.arch_dataloader.batch_size={args.batch}",
        f"train_dataloader.dataset.max_per_class={args.images}",
        f"train_cfg.arch_dataloader.dataset.max_per_class={args.images}",
        *(f"train_cfg.strategy.{option}" for option in strategy),
    ]  # fmt: skip
    command = (
        "tools/search.py", f"configs/search/{method}_prunet-cpu-small_{args.data}.py", *_data(args),
        "--work-dir", str(folder), "--resume", "--seed", str(seed), "--target-ms", f"{args.target_ms:.6g}",
        "--table", str(table), "--cfg-options", *options,
    )  # fmt: skip
    return Job(f"{method} seed {seed}: search", command, folder)


def train_job(args: argparse.Namespace, method: str, seed: int) -> Job:
    """The training of a network found, or of a baseline's."""
    home = args.work / f"{method}_{seed}"
    inherited = args.start == "inherited" and method in METHODS
    epochs = args.train_epochs if inherited or args.start == "scratch" else args.epochs + args.train_epochs
    weights = ("--weights", str(home / "search" / "weights.safetensors")) if inherited else ()
    options = [
        f"train_cfg.max_epochs={epochs}", f"train_cfg.val_begin={epochs}",
        f"param_scheduler.0.total_steps={epochs}",
        f"train_dataloader.batch_size={args.batch}", f"train_dataloader.dataset.max_per_class={args.images}",
    ]  # fmt: skip
    command = (
        "tools/train.py", f"configs/classification/prunet-cpu-small_{args.data}.py", *_data(args),
        "--arch", str(home / "search" / "spec.json"), *weights, "--work-dir", str(home / "train"), "--resume",
        "--seed", str(seed), "--cfg-options", *options,
    )  # fmt: skip
    return Job(f"{method} seed {seed}: training", command, home / "train")


def _data(args: argparse.Namespace) -> tuple[str, ...]:
    return ("--data-root", str(args.data_root)) if args.data == "cifar10" else ()


def draw_random(space: SearchSpace, cost: LatencyTable, seed: int, aim: float, share: float) -> Encoding:
    """The first random network whose cost is in (share · aim, aim] ms; raises `LatencyError` where none is."""
    rng = random.Random(f"{seed} {aim:.6g}")
    for _ in range(DRAWS):
        encoding = space.sample(rng)
        if share * aim < space_cost(cost, space, encoding) <= aim:
            return encoding
    raise LatencyError(f"none of {DRAWS} random networks costs about {aim:.4g} ms")


def scale_uniformly(space: SearchSpace, cost: LatencyTable, aim: float, share: float) -> Encoding:
    """The largest network with all widths times one factor, the greatest that costs at most ``aim`` ms; then, from the
    last layer to the first, one step of its grid wider where that still does."""
    full = [choice for choice in space.largest() if choice is not None]
    grids = [layer.candidate_widths(candidate) for layer, (candidate, _) in zip(space.layers, full, strict=True)]

    def encode(places: Sequence[int]) -> Encoding:
        rows = zip(full, grids, places, strict=True)
        return tuple((candidate, grid[place]) for (candidate, _), grid, place in rows)

    def fits(places: Sequence[int]) -> bool:
        return space_cost(cost, space, encode(places)) <= aim

    scaled = ([round(step / 256 * len(grid)) - 1 for grid in grids] for step in range(256, 0, -1))
    places = next((near for near in scaled if min(near) >= 0 and fits(near)), None)
    if places is None:
        raise LatencyError(f"the largest network at its least widths costs more than {aim:.4g} ms")
    for layer in reversed(range(len(grids))):
        wider = [place + (i == layer) for i, place in enumerate(places)]
        if wider[layer] < len(grids[layer]) and fits(wider):
            places = wider
    if space_cost(cost, space, encode(places)) <= share * aim:
        raise LatencyError(f"no network of uniform width costs about {aim:.4g} ms")
    return encode(places)


def choose_baseline(args: argparse.Namespace, method: str, seed: int, space: SearchSpace, cost: LatencyTable) -> None:
    """Write ``spec.json`` and ``report.json`` of a network that meets the budget when measured, without a search."""
    folder = ROOT / args.work / f"{method}_{seed}" / "search"
    if (folder / "spec.json").is_file():
        return
    start = time.perf_counter()
    pick = partial(draw_random, space, cost, seed) if method == "random" else partial(scale_uniformly, space, cost)
    found = TargetHitter(space, cost, pick, _measure(cost), args.target_ms).run()
    spec = space.decode(found.trial.encoding, f"{method}-{args.target_ms:g}ms")
    status = "measured" if found.missed is None else f"missed: {found.missed}"
    report = {"seconds": time.perf_counter() - start, "status": status, "macs": spec.macs(), "params": spec.params()}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", {**report, "tries": len(found.trials), "measured": found.trial.record})
    write_atomic(folder / "spec.json", spec.to_json())


def _measure(cost: LatencyTable) -> Callable[[NetSpec, dict[str, Any]], dict[str, Any]]:
    source = cost.describe()
    return lambda spec, noted: measure_like(spec, source)


def make_row(args: argparse.Namespace, method: str, seed: int, record: dict[str, Any]) -> dict[str, Any]:
    """The figures of one search, its training and the last measurement."""
    home, told = ROOT / args.work / f"{method}_{seed}", {}
    try:
        report = json.loads((home / "search" / "report.json").read_text(encoding="utf-8"))
        trained = json.loads((home / "train" / "metrics.json").read_text(encoding="utf-8"))
        told["top1"] = round(float(trained["metrics"]["top1"]), 3)
        told["search_s"] = round(report.get("search_seconds", report["seconds"]), 1)
        told |= {"status": report["status"], "macs": report["macs"], "params": report["params"]}
        told["train_s"] = round(trained["seconds"], 1)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{home} holds no whole result ({error!r}); remove the folder and run again") from None
    latency = record["median_ms"]
    return {
        "method": method,
        "seed": seed,
        "target_ms": args.target_ms,
        "latency_ms": round(latency, 5),
        "ci_ms": [round(record["ci_low_ms"], 5), round(record["ci_high_ms"], 5)],
        "within": 0.95 * args.target_ms < latency <= args.target_ms,
        "disturbed": list(record["disturbed"]),
        "top1_inherited": report.get("top1_inherited"),
        "peak_mb": report.get("peak_mb"),
        "spec_hash": record["spec_hash"],
        **told,
        **{key: record[key] for key in ("device", "backend", "backend_version", "threads", "dtype", "batch", "date")},
    }


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a method: means over the seeds, and the range of the accuracy."""
    out = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        top1s, peaks = [row["top1"] for row in mine], [row["peak_mb"] for row in mine if row["peak_mb"] is not None]
        out.append(
            {
                "method": method,
                "seeds": len(mine),
                "top1": statistics.fmean(top1s),
                "top1_range": [min(top1s), max(top1s)],
                "latency_ms": statistics.fmean(row["latency_ms"] for row in mine),
                "over": sum(row["latency_ms"] > row["target_ms"] for row in mine),
                "search_s": statistics.fmean(row["search_s"] for row in mine),
                "peak_mb": max(peaks, default=None),
                "macs": statistics.fmean(row["macs"] for row in mine),
            }
        )
    return out


def show(rows: Sequence[dict[str, Any]], summary: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Print the table."""
    first = rows[0]
    title = f"{about['space']}, {about['data']}, ≤ {first['target_ms']:.4g} ms; {first['device']}, {first['backend']}"
    table = Table(title=f"{title}, {first['threads']} thread(s); {first['date'][:10]}")
    for column in COLUMNS:
        table.add_column(column)
    for row in summary:
        low, high = row["top1_range"]
        table.add_row(
            row["method"], str(row["seeds"]), f"{row['top1']:.2f}", f"{low:.2f} to {high:.2f}",
            f"{row['latency_ms']:.4g}", str(row["over"]), f"{row['search_s']:.0f}",
            "–" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
            f"{row['macs'] / 1e6:.2f}",
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    console.print("over: networks that measure more than the target. search_s, latency_ms: means.", highlight=False)


def as_found(row: dict[str, Any], about: dict[str, Any]) -> Found:
    """A row as the picture of tools/report.py takes it."""
    setting = tuple((key, row[key]) for key in ("device", "backend", "dtype", "batch", "threads"))
    return Found(
        folder="", name=row["method"], method=row["method"], space=about["space"], data=about["data"], seed=row["seed"],
        unit="ms", target=row["target_ms"], cost=row["latency_ms"], low=row["ci_ms"][0], high=row["ci_ms"][1],
        kind="measured", setting=setting, status=row["status"], disturbed=bool(row["disturbed"]), top1=row["top1"],
        macs=row["macs"], params=row["params"], seconds=row["search_s"], peak_mb=row["peak_mb"],
    )  # fmt: skip


def hold_to_plan(args: argparse.Namespace) -> None:
    """Keep the figures that all rows share in the work directory, and refuse to mix rows of other ones."""
    names = ("data", "quick", "epochs", "train_epochs", "images", "batch", "start", "target_ms")
    plan, path = {name: getattr(args, name) for name in names}, ROOT / args.work / "plan.json"
    plan["strategy"] = {method: list(options) for method, options in strategy_options(args).items()}
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        differing = [f"{key}: {old.get(key)} there, {plan[key]} here" for key in plan if old.get(key) != plan[key]]
        if differing:
            raise RunError(f"{args.work} has other settings ({'; '.join(differing)}); take another --work-dir")
    write_json(path, plan)


def make_table(args: argparse.Namespace, space: SearchSpace) -> tuple[Path, LatencyTable]:
    """The latency table of all searches, measured once (and gone on with)."""
    path = args.work / "latency_table.jsonl"
    with progress_bar("latency table") as progress:
        return path, build_table(space, ROOT / path, effort=QUICK if args.quick else None, progress=progress)


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows to F and the picture beside it")
    parser.add_argument("--quick", action="store_true", help="digits, one seed, a few images and epochs, a rough table")
    parser.add_argument("--data", choices=("cifar10", "digits"), help="default: cifar10; digits with --quick")
    parser.add_argument("--seeds", type=int, help="seeds 0 to N-1 (default: 3; 1 with --quick)")
    parser.add_argument("--epochs", type=int, help="of a search (default: 10; 4 with --quick)")
    parser.add_argument("--train-epochs", type=int, help="of training afterwards (default: 15; 2 with --quick)")
    parser.add_argument("--images", type=int, help="training images of each class (default: 300; 40 with --quick)")
    parser.add_argument("--target-ms", type=float, metavar="T", help="default: a third of the way up the space's range")
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, *BASELINES), default=[*METHODS, *BASELINES])
    parser.add_argument("--start", choices=("inherited", "scratch"), default="inherited", help="of the training")
    parser.add_argument("--data-root", type=Path, metavar="D", help="CIFAR-10 in an image folder")
    parser.add_argument("--work-dir", type=Path, metavar="D", help="default: work_dirs/methods[_quick]")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="trainings at once (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Search one after another, so that nothing disturbs measurements; then train; then measure all anew."""
    args = make_parser().parse_args(argv)
    quick = args.quick
    args.data = args.data or ("digits" if quick else "cifar10")
    for name, full, short in (("seeds", 3, 1), ("epochs", 10, 4), ("train_epochs", 15, 2), ("images", 300, 40)):
        if getattr(args, name) is None:
            setattr(args, name, short if quick else full)
        if getattr(args, name) < 1:
            raise RunError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(args, name)}")
    args.batch = 16 if quick else 64
    args.work = from_root(args.work_dir or ROOT / "work_dirs" / ("methods_quick" if quick else "methods"))
    (ROOT / args.work).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if args.data == "cifar10":
        here = ROOT / "data" / "cifar10"
        found = args.data_root or (here if here.is_dir() else unpack(ARCHIVE, ROOT / args.work, args.images))
        args.data_root = from_root(found)
    space, console = load_space(SPACE), Console(stderr=True)
    path, table = make_table(args, space)
    if args.target_ms is None:
        plan = ROOT / args.work / "plan.json"  # a table that goes on being measured must not move the target
        known = json.loads(plan.read_text(encoding="utf-8")).get("target_ms") if plan.is_file() else None
        args.target_ms = known or default_target(table, space)
    hold_to_plan(args)
    pairs = [(method, seed) for seed in range(args.seeds) for method in args.methods]
    for method, seed in pairs:
        if method in BASELINES:
            choose_baseline(args, method, seed, space, table)
    run_jobs([search_job(args, m, s, path) for m, s in pairs if m in METHODS], 1, console)
    waiting = [train_job(args, *pair) for pair in pairs]
    run_jobs([job for job in waiting if not (ROOT / job.folder / "metrics.json").is_file()], args.jobs, console)
    specs = [ROOT / args.work / f"{method}_{seed}" / "search" / "spec.json" for method, seed in pairs]
    distinct = {load_spec(str(spec)).hash: spec for spec in specs}
    records = dict(zip(distinct, measure_anew(list(distinct.values()), table), strict=True))
    rows = [make_row(args, *pair, records[load_spec(str(spec)).hash]) for pair, spec in zip(pairs, specs, strict=True)]
    rows.sort(key=lambda row: (args.methods.index(row["method"]), row["seed"]))
    about = {"space": SPACE, "data": args.data, "images_per_class": args.images, "epochs": args.epochs}
    about |= {"train_epochs": args.train_epochs, "start": args.start, "target_ms": args.target_ms}
    about |= {"strategy": strategy_options(args), "epochs_are": EPOCHS}
    summary = summarise(rows)
    show(rows, summary, about)
    if args.json:
        write_json(args.json, {"rows": rows, "summary": summary, **about})
        figure = draw_comparison(compare(as_found(row, about) for row in rows), "top-1 after training (%)")
        if figure is not None:
            write_atomic(args.json.with_suffix(".png"), figure_png(figure))
    return 0


if __name__ == "__main__":
    run_tool(main)
