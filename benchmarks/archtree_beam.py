"""What does a tree add to greedy pruning? Archtree with B = 4 places against B = 1, in equal time on the device.

    python benchmarks/archtree_beam.py [--json F] [--quick] [--seeds 3] [--images N] [--epochs N] [--finetune N]
                                       [--share 0.8] [--workers 2] [--data-root D] [--work-dir D]

A start network of space `prunet_cpu_small` (irb 3×3 blocks at half of their greatest width) is trained on a part of
CIFAR-10, then pruned to ``share`` of its measured latency (ONNX Runtime, one thread, batch 1) with B = 4, C = 3, and
with B = 1. Equal time: all seconds of the tree count, for measuring and for recovery with scoring. B = 1 measures and
trains every group's removal in each round (C = 10), and each child for more steps. How many is first reckoned from the
seconds that a measurement, a training step and a score took with B = 4; where B = 1 then takes 10% more or less time
than B = 4, it is grown again with the steps corrected, up to three times in all, and the tree nearest in time counts.
``time_ratio`` is B = 1's seconds over B = 4's; rows that are more than 10% off, or whose tree was stopped on its way
(its seconds lack those of the round that was lost), are marked.

Both networks are fine-tuned alike, measured in turn in a process of their own, and tested. 20% of the training images
are held out; they score nodes and are not trained on. What is finished lies in the work directory, in a folder for
each choice of settings, and is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from cifar import ARCHIVE, Split, augment, normalise, read_images
from rich.console import Console
from rich.table import Table

from prunet_zoo.cost import MacsCost, ScaledCost
from prunet_zoo.files import write_json
from prunet_zoo.latency import measure, measure_together
from prunet_zoo.latency.backends.base import cpu_name
from prunet_zoo.latency.record import now
from prunet_zoo.models import create_model, save_weights
from prunet_zoo.search import Archtree, Services
from prunet_zoo.search.archtree_workers import RecoverJob, recover, score
from prunet_zoo.space import load_space
from prunet_zoo.spec import NetSpec, stable_hash
from prunet_zoo.supernet.masked_spec import SpecNet

SPACE, BATCH = "prunet_cpu_small", 128
SETTINGS = ("images", "epochs", "finetune", "rounds", "steps", "share", "workers")  # what a row depends on
TRIES, NEAR = 3, 0.1  # of B = 1 to take as long as B = 4; how near is enough
COLUMNS = ("seed", "beam", "top1", "top1_tree", "top1_start", "measured_ms", "share", "nodes", "steps", "total_s")


class Data:
    """Training, held-out and test images in memory; batches are normalised floats."""

    def __init__(self, source: Path, per_class: int, seed: int) -> None:
        pixels, labels = read_images(source, "train", per_class)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        cut = len(labels) // 5
        self.held_part = pixels[order[:cut]], labels[order[:cut]]
        self.train_part = pixels[order[cut:]], labels[order[cut:]]
        self.test_part = read_images(source, "test", min(1000, 2 * per_class))

    def train(self, seed: int) -> Iterator[Split]:
        """Endless batches of crops and mirror images."""
        pixels, labels = self.train_part
        g = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(labels), generator=g)
            for pick in order.split(BATCH)[: max(1, len(labels) // BATCH)]:
                yield normalise(augment(pixels[pick], g)), labels[pick]

    def fixed(self, part: Split) -> Iterator[Split]:
        """Once through, as they are."""
        for images, labels in zip(part[0].split(256), part[1].split(256), strict=True):
            yield normalise(images), labels


def start_encoding(space: Any) -> tuple[tuple[int, int], ...]:
    """irb with 3×3 kernels at half of their greatest width."""
    return tuple((0, layer.candidate_widths(0)[(len(layer.candidate_widths(0)) - 1) // 2]) for layer in space.layers)


def learn(module: torch.nn.Module, data: Data, epochs: int, lr: float, seed: int) -> dict[str, torch.Tensor]:
    """Weights after so many epochs (SGD, cosine)."""
    steps = epochs * (len(data.train_part[1]) // BATCH)
    return recover(RecoverJob(module, seed, steps, lr), _Lazy(data, seed, steps), [], "cpu").state


class _Lazy:
    """As many batches as are asked for, made one by one."""

    def __init__(self, data: Data, seed: int, steps: int) -> None:
        self.data, self.seed, self.steps = data, seed, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Split]:
        return islice(self.data.train(self.seed), self.steps)


def ms(spec: NetSpec, attempts: int = 1, seconds: float = 0.4) -> dict[str, Any]:
    """The latency record of a network: ONNX Runtime, one thread, batch 1. The tree repeats what it doubts."""
    return measure(spec, backend="onnxruntime", threads=1, seconds=seconds, attempts=attempts).to_dict()


class Watch:
    """Services whose measurements are timed, over all runs of a tree: the times are kept in its folder."""

    def __init__(self, data: Data, folder: Path) -> None:
        self.path = folder / "watch.json"
        known = _read(self.path) if self.path.is_file() else {}
        self.seconds, self.count = known.get("seconds", 0.0), known.get("count", 0)
        self.runs = known.get("runs", 0) + 1
        self._write()
        self.services = Services(
            data.train,
            lambda: data.fixed(data.held_part),
            self._measure,
            folder,
            lambda line: print(line, file=sys.stderr),
        )

    def _measure(self, spec: NetSpec, quick: bool = False) -> dict[str, Any]:
        before = time.perf_counter()
        record = ms(spec, seconds=0.15 if quick else 0.4)
        self.seconds += time.perf_counter() - before
        self.count += 1
        self._write()
        return record

    def _write(self) -> None:
        write_json(self.path, {"seconds": self.seconds, "count": self.count, "runs": self.runs})


def grow(
    args: argparse.Namespace, data: Data, state: dict[str, torch.Tensor], seed: int, name: str, **options: Any
) -> dict[str, Any]:
    """Prune the start network along a tree, fine-tune what is found; returns a row of figures."""
    space = load_space(SPACE)
    net = SpecNet(space, start_encoding(space), state)
    start_ms = _read(args.folder / f"start_{seed}.json")["start_ms"]
    folder = args.folder / name
    watch = Watch(data, folder)
    cost = ScaledCost(MacsCost(), net.spec, start_ms)
    target = args.share * start_ms
    strategy = Archtree(
        target, rounds=args.rounds, recovery_lr=0.02, importance_batches=2, held_batches=None, workers=args.workers,
        pretrain=0.0, **options,
    )  # fmt: skip
    strategy.setup(net, cost, 1, seed, 1, watch.services)
    strategy.explore()
    tree = strategy.details()
    strategy.adopt(strategy.finish())
    encoding = net.best()
    spec, found = net.derive(encoding, f"beam{options['beam']}-seed{seed}")
    model = create_model(spec)
    model.load_state_dict(found)
    before, _ = score(model, list(data.fixed(data.test_part)), "cpu")
    model.load_state_dict(learn(model, data, args.finetune, 0.02, seed))
    top1, loss = score(model, list(data.fixed(data.test_part)), "cpu")
    write_json(folder / "spec.json", spec.to_dict())
    save_weights(folder / "weights.safetensors", model.state_dict(), spec)
    nodes = len(tree["tree"]) - 1
    return {
        "seed": seed,
        "name": name,
        **{key: options[key] for key in ("beam", "children", "recovery_steps")},
        "target_ms": target,
        "top1": round(top1, 2),
        "loss": round(loss, 4),
        "top1_tree": round(before, 2),
        "rounds": tree["rounds"],
        "nodes": nodes,
        "steps": nodes * options["recovery_steps"],
        "networks_measured": tree["networks_measured"],
        "measurements": watch.count,
        "measure_s": round(watch.seconds, 2),
        "train_s": round(tree["seconds"] - watch.seconds, 2),
        "total_s": round(tree["seconds"], 2),
        "runs": watch.runs,
        "missed": tree["missed"],
    }


def time_parts(net: SpecNet, data: Data) -> tuple[float, float]:
    """Seconds of a training step and of what a child costs besides, on the start network in this process."""
    _, module = net.remove([torch.ones(g.channels, dtype=torch.bool) for g in net.groups], "probe")
    held = list(data.fixed(data.held_part))
    times = []
    for steps in (1, 6):
        before = time.perf_counter()
        recover(RecoverJob(module, 0, steps, 1e-4), list(islice(data.train(0), steps)), held, "cpu")
        times.append(time.perf_counter() - before)
    step = (times[1] - times[0]) / 5
    return step, times[0] - step


def first_steps(wide: dict[str, Any], children: int, step: float, fixed: float) -> int:
    """Steps of a child of B = 1 with which as many rounds as B = 4 had (``wide``) would take as long."""
    per_child = wide["train_s"] / wide["nodes"]  # of B = 4, on its way from the start network to the target
    scale = per_child / (fixed + wide["recovery_steps"] * step)
    left = wide["total_s"] / max(1, wide["rounds"]) - children * wide["measure_s"] / max(1, wide["measurements"])
    return max(1, math.floor((left / children / scale - fixed) / step))


def corrected(row: dict[str, Any], seconds: float, step: float, workers: int) -> int:
    """Steps of a child with which the tree of ``row`` would take so many seconds; ``step`` in s."""
    rate = row["nodes"] * step / max(1, workers)  # s for one step more of every child
    return max(1, round(row["recovery_steps"] + (seconds - row["total_s"]) / rate))


def marks(row: dict[str, Any]) -> str:
    """Why the seconds of a row are not to be compared with the other's; '' where they are."""
    why = [f"{row['time_ratio']:.2f} of the time"] if abs(row["time_ratio"] - 1) > NEAR else []
    return ", ".join([*why, "stopped on its way"] if row["runs"] > 1 else why)


def greedy_row(
    args: argparse.Namespace, data: Data, state: dict[str, torch.Tensor], seed: int, wide: dict[str, Any]
) -> dict[str, Any]:
    """The row of B = 1 that took nearest to the time of B = 4 (``wide``); see the top of the file."""
    space = load_space(SPACE)
    net = SpecNet(space, start_encoding(space), state)
    children, parts = len(net.groups), args.folder / f"parts_{seed}.json"
    if not parts.is_file():
        write_json(parts, time_parts(net, data))
    step, fixed = _read(parts)
    steps = first_steps(wide, children, step, fixed)
    tries: dict[int, dict[str, Any]] = {}
    while len(tries) < TRIES and steps not in tries:
        name = f"seed{seed}_beam1_{len(tries)}"
        path = args.folder / f"{name}.json"
        if not path.is_file():
            options = {"beam": 1, "children": children, "measure_most": children, "recovery_steps": steps}
            row = grow(args, data, state, seed, name, **options)
            write_json(path, {**row, "time_ratio": round(row["total_s"] / wide["total_s"], 3)})
        row = tries[steps] = _read(path)
        if abs(row["time_ratio"] - 1) <= NEAR:
            break
        steps = corrected(row, wide["total_s"], step, args.workers)
    best = min(tries.values(), key=lambda row: abs(math.log(row["time_ratio"])))
    return {**best, "tries": [[row["recovery_steps"], row["time_ratio"]] for row in tries.values()]}


def run_seed(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Both rows of a seed; those that the folder holds are read."""
    data = Data(args.data_root or ARCHIVE, args.images, seed)
    space = load_space(SPACE)
    start, weights = args.folder / f"start_{seed}.json", args.folder / f"start_{seed}.safetensors"
    if not start.is_file():
        torch.manual_seed(seed)
        net = SpecNet(space, start_encoding(space))
        model = create_model(net.spec)
        model.load_state_dict(learn(model, data, args.epochs, 0.1, seed))
        save_weights(weights, model.state_dict(), net.spec)
        top1, _ = score(model, list(data.fixed(data.test_part)), "cpu")
        write_json(start, {"start_ms": ms(net.spec, 3)["median_ms"], "top1_start": round(top1, 2)})
    state = create_model(weights).state_dict()
    name = f"seed{seed}_beam4"
    path = args.folder / f"{name}.json"
    if not path.is_file():
        options = {"beam": 4, "children": 3, "measure_most": 3, "recovery_steps": args.steps}
        write_json(path, {**grow(args, data, state, seed, name, **options), "time_ratio": 1.0})
    wide = _read(path)
    rows = []
    for row in (wide, greedy_row(args, data, state, seed, wide)):
        rows.append({**row, **_read(start), "marks": marks(row)})
        print(f"seed {seed}, B = {row['beam']}: {row['top1']}%, {row['total_s']:.0f} s", file=sys.stderr)
    return rows


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def measure_anew(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Add the latency of every network, measured in turn in a process that has done nothing else."""
    specs = [str(args.folder / row["name"] / "spec.json") for row in rows]
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *specs], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit("the networks could not be measured, see above")
    for row, record in zip(rows, json.loads(done.stdout), strict=True):
        row |= {"measured_ms": round(record["median_ms"], 5), "share": round(record["median_ms"] / row["target_ms"], 4)}
        row |= {"within": 0.95 < row["share"] <= 1.0, "disturbed": list(record["disturbed"])}
        row |= {key: record[key] for key in ("device", "backend", "backend_version", "threads", "date")}


def show(rows: list[dict[str, Any]], images: int) -> dict[str, Any]:
    """Print the table; returns the means."""
    first = rows[0]
    title = f"{first['device']}, {first['backend']}, {first['threads']} thread; {8 * images} training images"
    table = Table(title=f"{title}; {first['date'][:10]}")
    for column in (*COLUMNS, "marks"):
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row[c]) if c != "share" else f"{row[c]:.3f}" for c in COLUMNS), row["marks"])
    console = Console(width=140)
    console.print(table)
    mean = {b: sum(r["top1"] for r in rows if r["beam"] == b) / (len(rows) / 2) for b in (4, 1)}
    total = {b: sum(r["total_s"] for r in rows if r["beam"] == b) for b in (4, 1)}
    hits = sum(row["within"] for row in rows)
    console.print(
        f"top-1, mean: B = 4 {mean[4]:.2f}%, B = 1 {mean[1]:.2f}%; seconds: {total[4]:.0f} and {total[1]:.0f}; "
        f"measured in (0.95 T, 1.00 T]: {hits} of {len(rows)}",
        highlight=False,
    )  # fmt: skip
    return {"top1_beam4": round(mean[4], 2), "top1_beam1": round(mean[1], 2), "seconds": [total[4], total[1]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="one seed, few images and steps: shows that it runs")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 3)")
    parser.add_argument(
        "--images",
        type=int,
        help="training images of each class, 20%% of them held out; test images are twice as many (default: 500)",
    )
    parser.add_argument("--epochs", type=int, help="of the start network (default: 6)")
    parser.add_argument("--finetune", type=int, help="epochs of fine-tuning (default: 3)")
    parser.add_argument("--rounds", type=int, help="in about how many rounds the target is reached (default: 9)")
    parser.add_argument("--steps", type=int, help="recovery steps of a child with B = 4 (default: 8)")
    parser.add_argument("--share", type=float, help="target over the start network's latency (default: 0.8)")
    parser.add_argument("--workers", type=int, default=2, help="processes that train children")
    parser.add_argument(
        "--data-root", type=Path, help="folder of CIFAR-10 (train/, test/); default: the shared archive"
    )
    parser.add_argument("--work-dir", type=Path, help="default: work_dirs/archtree_beam")
    parser.add_argument("--measure", nargs="+", metavar="SPEC", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        taken = measure_together(args.measure, backend="onnxruntime", threads=1, seconds=2.0)
        print(json.dumps([record.to_dict() for record in taken]))
        return
    quick = {"seeds": 1, "images": 50, "epochs": 2, "finetune": 1, "rounds": 2, "steps": 2, "share": 0.95}
    usual = {"seeds": 3, "images": 500, "epochs": 6, "finetune": 3, "rounds": 9, "steps": 8, "share": 0.8}
    for name, value in (quick if args.quick else usual).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.work_dir = args.work_dir or Path("work_dirs/archtree_beam" + ("_quick" if args.quick else ""))
    setting = {**{name: getattr(args, name) for name in SETTINGS}, "space": SPACE, "data": "CIFAR-10", "batch": BATCH}
    args.folder = args.work_dir / stable_hash(setting)
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = [row for seed in range(args.seeds) for row in run_seed(args, seed)]
    measure_anew(args, rows)
    means = show(rows, args.images)
    if args.json:
        options = "".join(f" --{name} {getattr(args, name)}" for name in ("seeds", *SETTINGS))
        about = {
            "command": f"python benchmarks/archtree_beam.py{options}",
            "device": cpu_name(),
            "date": now(),
            "seeds": list(range(args.seeds)),
            "setting": setting,
        }
        write_json(args.json, {**about, **means, "rows": rows})


if __name__ == "__main__":
    main()
