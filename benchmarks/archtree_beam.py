"""What does a tree add to greedy pruning? Archtree with B = 4 places against B = 1, in equal time on the device.

    python benchmarks/archtree_beam.py [--json F] [--quick] [--seeds 3] [--images N] [--epochs N] [--finetune N]
                                       [--share 0.7] [--workers 2] [--data-root D] [--work-dir D]

A start network of space `prunet_cpu_small` (irb 3×3 blocks at half of their greatest width) is trained on a part of
CIFAR-10, then pruned to ``share`` of its measured latency (ONNX Runtime, one thread, batch 1) with B = 4, C = 3, and
with B = 1. Equal time: all seconds of the tree count, for measuring and for recovery with scoring. B = 1 measures and
trains every group's removal in each round (C = 10), and each child for so many more steps that, by the seconds that a
measurement, a training step and a score took with B = 4, as many rounds would take as long as they did with B = 4.
What both then took is in the table. Both networks are fine-tuned alike, measured in turn in a process of their own,
and tested. 20% of the training images are held out; they score nodes and are not trained on. Rows that a work
directory holds are not made again.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table

from prunet_zoo.errors import DataError
from prunet_zoo.files import write_json
from prunet_zoo.latency import measure, measure_together
from prunet_zoo.models import create_model, save_weights
from prunet_zoo.search import Archtree, MacsCost, Services
from prunet_zoo.search.archtree_workers import RecoverJob, recover, score
from prunet_zoo.space import load_space
from prunet_zoo.spec import NetSpec
from prunet_zoo.supernet.masked_spec import SpecNet

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE = ROOT.parent / "shared" / "data" / "cifar10.tar.xz"
BATCH = 128
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # of CIFAR-10, in 1/255
COLUMNS = ("seed", "beam", "top1", "top1_tree", "top1_start", "measured_ms", "share", "nodes", "steps", "total_s")
Images = tuple[torch.Tensor, torch.Tensor]  # uint8 (N, 3, 32, 32), class indices (N,)


class Proportional(MacsCost):
    """What is expected before anything is measured: time goes with MACs. ``scale`` in ms per MMAC."""

    unit = "ms"

    def __init__(self, scale: float) -> None:
        self.scale, self.hash = scale, f"macs*{scale!r}"

    def block(self, *block: Any) -> float:
        """ms of one block."""
        return self.scale * super().block(*block)

    def __call__(self, spec: NetSpec) -> float:
        return self.scale * super().__call__(spec)


def read_images(source: Path, part: str, per_class: int) -> Images:
    """The first images of each class of ``part`` ('train' or 'test'), of a folder or of a tar file."""
    found: list[tuple[str, np.ndarray[Any, Any]]] = []
    for name, data in _files(source, part, per_class):
        found.append((name, np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))))
    if not found:
        raise DataError(f"{source} has no images {part}/<class>/<number>.jpg; give the folder of CIFAR-10: --data-root")
    classes = sorted({name for name, _ in found})
    pixels = torch.from_numpy(np.stack([image for _, image in found])).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.tensor([classes.index(name) for name, _ in found])


def _files(source: Path, part: str, per_class: int) -> Iterator[tuple[str, bytes]]:
    def wanted(parts: tuple[str, ...]) -> bool:
        number = parts[-1].partition(".")[0]
        return len(parts) > 2 and parts[-3] == part and number.isdigit() and int(number) < per_class

    if source.is_dir():
        for path in sorted(source.glob(f"{part}/*/*.jpg")):
            if wanted(path.parts):
                yield path.parts[-2], path.read_bytes()
        return
    if not source.is_file():
        raise DataError(f"CIFAR-10 is not at {source}; give its folder (train/, test/): --data-root")
    with tarfile.open(source) as archive:
        for member in archive:
            if member.isfile() and wanted(Path(member.name).parts):
                file = archive.extractfile(member)
                assert file is not None
                yield Path(member.name).parts[-2], file.read()


class Data:
    """Training, held-out and test images in memory; batches are normalised floats."""

    def __init__(self, source: Path, per_class: int, seed: int) -> None:
        pixels, labels = read_images(source, "train", per_class)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        cut = len(labels) // 5
        self.held_part = pixels[order[:cut]], labels[order[:cut]]
        self.train_part = pixels[order[cut:]], labels[order[cut:]]
        self.test_part = read_images(source, "test", max(1, per_class // 2))

    def train(self, seed: int) -> Iterator[Images]:
        """Endless batches: random crops of the image with 4 px of border, and mirror images."""
        pixels, labels = self.train_part
        g = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(labels), generator=g)
            for pick in order.split(BATCH)[: max(1, len(labels) // BATCH)]:
                dy, dx = torch.randint(0, 9, (2,), generator=g).tolist()
                batch = F.pad(pixels[pick], (4, 4, 4, 4))[:, :, dy : dy + 32, dx : dx + 32]
                flip = torch.rand(len(pick), generator=g) < 0.5
                yield normalise(torch.where(flip[:, None, None, None], batch.flip(3), batch)), labels[pick]

    def fixed(self, part: Images) -> Iterator[Images]:
        """Once through, as they are."""
        for images, labels in zip(part[0].split(256), part[1].split(256), strict=True):
            yield normalise(images), labels


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) to floats of mean 0 and standard deviation 1."""
    return (pixels.float() - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


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

    def __iter__(self) -> Iterator[Images]:
        return islice(self.data.train(self.seed), self.steps)


def ms(spec: NetSpec, attempts: int = 1) -> dict[str, Any]:
    """The latency record of a network: ONNX Runtime, one thread, batch 1. The tree repeats what it doubts."""
    return measure(spec, backend="onnxruntime", threads=1, seconds=0.4, attempts=attempts).to_dict()


class Watch:
    """Services whose measurements are timed."""

    def __init__(self, data: Data, folder: Path) -> None:
        self.seconds, self.count = 0.0, 0
        self.services = Services(
            data.train,
            lambda: data.fixed(data.held_part),
            self._measure,
            folder,
            lambda line: print(line, file=sys.stderr),
        )

    def _measure(self, spec: NetSpec) -> dict[str, Any]:
        before = time.perf_counter()
        record = ms(spec)
        self.seconds += time.perf_counter() - before
        self.count += 1
        return record


def grow(
    args: argparse.Namespace, data: Data, state: dict[str, torch.Tensor], seed: int, **options: Any
) -> dict[str, Any]:
    """Prune the start network along a tree, fine-tune what is found; returns a row of figures."""
    space = load_space("prunet_cpu_small")
    net = SpecNet(space, start_encoding(space), state)
    whole = args.work_dir / f"start_{seed}.json"
    start_ms = json.loads(whole.read_text(encoding="utf-8"))["start_ms"]
    folder = args.work_dir / f"seed{seed}_beam{options['beam']}"
    watch = Watch(data, folder)
    cost = Proportional(start_ms / MacsCost()(net.spec))
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
        "missed": tree["missed"],
    }


def equal_time(
    args: argparse.Namespace, data: Data, row: dict[str, Any], state: dict[str, torch.Tensor]
) -> dict[str, int]:
    """The options of B = 1: every group's removal, and as many steps as the time that B = 4 took leaves room for."""
    space = load_space("prunet_cpu_small")
    net = SpecNet(space, start_encoding(space), state)
    children, rounds = len(net.groups), max(1, row["rounds"])
    _, module = net.remove([torch.ones(g.channels, dtype=torch.bool) for g in net.groups], "probe")
    held = list(data.fixed(data.held_part))
    times = []
    for steps in (1, 6):  # a training step and a score, on the start network
        before = time.perf_counter()
        recover(RecoverJob(module, 0, steps, 1e-4), list(islice(data.train(0), steps)), held, "cpu")
        times.append(time.perf_counter() - before)
    step, fixed = (times[1] - times[0]) / 5, times[0] - (times[1] - times[0]) / 5
    per_child = row["train_s"] / row["nodes"]  # of B = 4, on its way from the start network to the target
    scale = per_child / (fixed + row["recovery_steps"] * step)
    left = row["total_s"] / rounds - children * row["measure_s"] / max(1, row["measurements"])
    steps = (left / children / scale - fixed) / step
    return {"beam": 1, "children": children, "measure_most": children, "recovery_steps": max(1, math.floor(steps))}


def run_seed(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Both rows of a seed; those that the work directory holds are read."""
    data = Data(args.data_root or ARCHIVE, args.images, seed)
    space = load_space("prunet_cpu_small")
    start, weights = args.work_dir / f"start_{seed}.json", args.work_dir / f"start_{seed}.safetensors"
    if not start.is_file():
        torch.manual_seed(seed)
        net = SpecNet(space, start_encoding(space))
        model = create_model(net.spec)
        model.load_state_dict(learn(model, data, args.epochs, 0.1, seed))
        save_weights(weights, model.state_dict(), net.spec)
        top1, _ = score(model, list(data.fixed(data.test_part)), "cpu")
        write_json(start, {"start_ms": ms(net.spec, 3)["median_ms"], "top1_start": round(top1, 2)})
    state = create_model(weights).state_dict()
    about = json.loads(start.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = []
    for beam in (4, 1):
        path = args.work_dir / f"row_{seed}_{beam}.json"
        if not path.is_file():
            wide = {"beam": 4, "children": 3, "measure_most": 3, "recovery_steps": args.steps}
            options = wide if beam == 4 else equal_time(args, data, rows[0], state)
            write_json(path, {**grow(args, data, state, seed, **options), **about})
        rows.append(json.loads(path.read_text(encoding="utf-8")))
        print(f"seed {seed}, B = {beam}: {rows[-1]['top1']}%", file=sys.stderr)
    return rows


def measure_anew(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Add the latency of every network, measured in turn in a process that has done nothing else."""
    specs = [str(args.work_dir / f"seed{row['seed']}_beam{row['beam']}" / "spec.json") for row in rows]
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
    for column in COLUMNS:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row[c]) if c != "share" else f"{row[c]:.3f}" for c in COLUMNS))
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
        "--images", type=int, help="training images of each class, 20%% of them held out (default: 800)"
    )
    parser.add_argument("--epochs", type=int, help="of the start network (default: 6)")
    parser.add_argument("--finetune", type=int, help="epochs of fine-tuning (default: 3)")
    parser.add_argument("--rounds", type=int, help="in about how many rounds the target is reached (default: 9)")
    parser.add_argument("--steps", type=int, help="recovery steps of a child with B = 4 (default: 10)")
    parser.add_argument("--share", type=float, help="target over the start network's latency (default: 0.7)")
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
    quick = {"seeds": 1, "images": 50, "epochs": 2, "finetune": 1, "rounds": 2, "steps": 2, "share": 0.9}
    usual = {"seeds": 3, "images": 800, "epochs": 6, "finetune": 3, "rounds": 9, "steps": 10, "share": 0.7}
    for name, value in (quick if args.quick else usual).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.work_dir = args.work_dir or Path("work_dirs/archtree_beam" + ("_quick" if args.quick else ""))
    args.work_dir.mkdir(parents=True, exist_ok=True)
    rows = [row for seed in range(args.seeds) for row in run_seed(args, seed)]
    measure_anew(args, rows)
    means = show(rows, args.images)
    if args.json:
        about = {name: getattr(args, name) for name in ("images", "epochs", "finetune", "rounds", "share", "workers")}
        write_json(args.json, {"rows": rows, **means, **about, "space": "prunet_cpu_small", "data": "CIFAR-10"})


if __name__ == "__main__":
    main()
