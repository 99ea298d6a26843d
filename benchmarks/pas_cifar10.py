"""Pruning-as-Search against magnitude pruning and torch-pruning's BN-scale pruner: a small ResNet at half of its MACs.

    python benchmarks/pas_cifar10.py [--json F] [--quick] [--first-seed 0] [--seeds 3] [--epochs-pretrain 16]
                                     [--epochs 10] [--images N] [--sweep-reg] [--sweep-pas-lr]

CIFAR-10 of ``../shared/data`` (the first N training images, equally many a class; all test images); a ResNet of timm's
class for 32 px (3×3 stem, four stages of one BasicBlock). For each seed one network is trained; every method starts
from it and gets the same number of epochs, in two parts with the same learning rates: one in the dense network, then
``--finetune`` of them, with a new cosine, in the pruned one.

- pas: the masks learn in the first part (`prunet_zoo.search.pas`).
- magnitude: the first part trains on; then channels go by the L2 norm of what belongs to them, globally.
- bn_scale: the first part adds the L1 penalty on BatchNorm's scales (``--reg``); then channels go by those, globally.

The last two are torch-pruning's (`MagnitudeImportance`, `BNScalePruner`), removing a little at a time, until the
network has at most half of the MACs; no layer falls under a tenth of its channels. PaS may take any width too. The same
channels may go in all three: inner ones of the blocks and whole residual streams.

``--sweep-reg`` and ``--sweep-pas-lr`` choose bn_scale's penalty and the learning rate of PaS's masks for the table: the
value that is best on training images that no network is trained on, from a start network of a seed that is not in the
table (``--sweep-seed``). What each value gave stands in the JSON.

A run goes on where it was stopped: what is finished, by seed and method, lies in ``--work``.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cifar import ARCHIVE, CLASSES, SIZE, Split, augment, normalise, read_images
from rich.console import Console
from rich.table import Table
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from prunet_zoo.files import write_atomic, write_json
from prunet_zoo.latency import progress_bar
from prunet_zoo.latency.backends.base import cpu_name
from prunet_zoo.latency.record import now
from prunet_zoo.models.channels import layer_shape, take_profile
from prunet_zoo.search.pas import PruningAsSearch
from prunet_zoo.spec import stable_hash
from prunet_zoo.supernet.traced import TracedCost, TracedNet

ROOT = Path(__file__).resolve().parents[1]
BATCH, HELD = 128, 2000  # HELD: images that `sweep` compares values on
METHODS = ("pas", "magnitude", "bn_scale")
SWEEPS = {"reg": ("bn_scale", (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)), "pas_lr": ("pas", (0.1, 0.25, 0.5, 1.0))}
SETTINGS = (
    "epochs_pretrain", "epochs", "finetune", "images", "share", "reg", "pas_lr", "lr", "lr_search", "lr_finetune",
)  # fmt: skip


def small_resnet() -> nn.Module:
    """14.8 MMACs at 32 px. The deep stem is asked for because its width can be chosen, and then replaced."""
    net = ResNet(BasicBlock, (1, 1, 1, 1), CLASSES, stem_type="deep", stem_width=8, channels=(16, 32, 64, 96))
    net.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net


def count_macs(net: nn.Module) -> int:
    """Multiply-accumulates for one image."""
    return take_profile(net, 3, (SIZE, SIZE)).macs({})


def load_cifar(work: Path, images: int, tests: int) -> tuple[Split, Split, Split]:
    """The first ``images`` for training, the next ones for `sweep`, test images; decoded once and kept in ``work``."""
    file = work / f"images_{images}_{tests}.pt"
    if not file.is_file():
        of_class, held = images // CLASSES, min(images, HELD) // CLASSES
        x, y = read_images(ARCHIVE, "train", of_class + held)
        test = read_images(ARCHIVE, "test", tests // CLASSES)
        first = torch.arange(len(y)) % (of_class + held) < of_class  # images stand class by class
        buffer = io.BytesIO()
        torch.save([x[first], y[first], x[~first], y[~first], *test], buffer)
        write_atomic(file, buffer.getvalue())
    a, b, c, d, e, f = torch.load(file, weights_only=True)
    return (a, b), (c, d), (e, f)


class Trainer:
    """SGD on a network that may change between epochs; the order of images depends on the seed alone."""

    def __init__(self, train: Split, seed: int, tell: Callable[[], None]) -> None:
        self.images, self.labels = train
        self.draw, self.tell = torch.Generator().manual_seed(seed), tell

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.images) // BATCH

    def run(
        self,
        net: nn.Module,
        lrs: list[float],
        penalty: Callable[[], torch.Tensor | None] = lambda: None,
        start_epoch: Callable[[int], Any] = lambda epoch: None,
        before_step: Callable[[], Any] = lambda: None,
        after_step: Callable[[], Any] = lambda: None,
        leave: list[nn.Parameter] | None = None,
    ) -> None:
        """Train for ``len(lrs)`` steps at those learning rates; ``leave``: parameters that another learns."""
        left = {id(p) for p in leave or []}
        weights = [p for p in net.parameters() if id(p) not in left]
        optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        net.train()
        for step, lr in enumerate(lrs):
            if step % self.steps == 0:
                start_epoch(step // self.steps)
                order = torch.randperm(len(self.images), generator=self.draw)
            chosen = order[step % self.steps * BATCH :][:BATCH]
            optimizer.param_groups[0]["lr"] = lr
            loss = F.cross_entropy(net(normalise(augment(self.images[chosen], self.draw))), self.labels[chosen])
            extra = penalty()
            optimizer.zero_grad()
            (loss if extra is None else loss + extra).backward()
            before_step()
            optimizer.step()
            after_step()
            self.tell()


def cosine(peak: float, steps: int) -> list[float]:
    """Learning rates of a cosine to 0, after a rise over a twentieth of the steps."""
    rise = max(1, steps // 20)
    return [
        peak * min(1.0, (i + 1) / rise) * 0.5 * (1 + float(np.cos(np.pi * max(0, i - rise) / max(1, steps - rise))))
        for i in range(steps)
    ]


@torch.no_grad()
def accuracy(net: nn.Module, test: Split) -> float:
    """Top-1 in percent."""
    net.eval()
    right = sum(
        int((net(normalise(x)).argmax(1) == y).sum())
        for x, y in zip(test[0].split(500), test[1].split(500), strict=True)
    )
    return 100 * right / len(test[1])


def prune_pas(net: nn.Module, trainer: Trainer, args: argparse.Namespace, seed: int) -> nn.Module:
    """Learn masks in the first part; the network without the masked channels."""
    masked = TracedNet(copy.deepcopy(net), SIZE, CLASSES, step=1)
    cost = TracedCost(masked.space)
    target = args.share * cost(masked.spec)
    strategy = PruningAsSearch(target=target, lr=args.pas_lr, finetune=args.finetune / args.epochs)
    strategy.setup(masked, cost, epochs=args.epochs, seed=seed, steps_per_epoch=trainer.steps)
    assert strategy.decision_epoch == args.epochs - args.finetune
    trainer.run(
        masked, [args.lr_search] * trainer.steps * strategy.decision_epoch, penalty=strategy.penalty,
        start_epoch=strategy.start_epoch, after_step=strategy.after_weight_step, leave=masked.arch_parameters(),
    )  # fmt: skip
    strategy.explore()
    strategy.adopt(strategy.finish(share=0.98))
    return masked.remove(masked.keep(), "pas")[1]


def prune_magnitude(net: nn.Module, trainer: Trainer, args: argparse.Namespace, seed: int) -> nn.Module:
    """Train on, then take out the channels of the least L2 norm."""
    import torch_pruning as tp

    own = copy.deepcopy(net)
    trainer.run(own, [args.lr_search] * trainer.steps * (args.epochs - args.finetune))
    importance = tp.importance.MagnitudeImportance(p=2)
    return take_out(own, tp.pruner.BasePruner(own, **pruner_options(own, importance)), args.share)


def prune_bn_scale(net: nn.Module, trainer: Trainer, args: argparse.Namespace, seed: int) -> nn.Module:
    """Train on with the penalty on BatchNorm's scales, then take out the channels of the least."""
    import torch_pruning as tp

    own = copy.deepcopy(net)
    pruner = tp.pruner.BNScalePruner(own, reg=args.reg, **pruner_options(own, tp.importance.BNScaleImportance()))
    trainer.run(
        own,
        [args.lr_search] * trainer.steps * (args.epochs - args.finetune),
        before_step=lambda: pruner.regularize(own),
    )
    return take_out(own, pruner, args.share)


def pruner_options(net: Any, importance: Any) -> dict[str, Any]:
    """What both pruners of torch-pruning get; they trace the network, in eval mode."""
    return {
        "example_inputs": torch.zeros(1, 3, SIZE, SIZE),
        "importance": importance,
        "global_pruning": True,
        "pruning_ratio": 0.9,
        "max_pruning_ratio": 0.9,
        "iterative_steps": 400,  # about a channel at a time
        "ignored_layers": [net.fc],
    }


def take_out(net: nn.Module, pruner: Any, share: float) -> nn.Module:
    """Let torch-pruning remove channels until at most ``share`` of the MACs are left."""
    whole = take_profile(net, 3, (SIZE, SIZE))
    limit = share * whole.macs({})

    def left() -> int:
        return whole.macs({name: layer_shape(net.get_submodule(name)) or () for name in whole.layers})

    for _ in range(400):
        for group in pruner.step(interactive=True):
            group.prune()
            if left() <= limit:
                return net
    raise SystemExit(f"torch-pruning stops at {count_macs(net) / 1e6:.2f} MMACs, above {limit / 1e6:.2f}")


PRUNE = {"pas": prune_pas, "magnitude": prune_magnitude, "bn_scale": prune_bn_scale}


def start_file(args: argparse.Namespace, seed: int) -> Path:
    """The start network's weights: by what they depend on, for sweeps and tables alike."""
    return args.work / "start" / stable_hash([args.epochs_pretrain, args.images, args.lr, BATCH]) / f"{seed}.pt"


def pretrained(train: Split, args: argparse.Namespace, seed: int, tell: Callable[[], None]) -> nn.Module:
    """The start network of a seed, trained or read."""
    torch.manual_seed(seed)
    net, file = small_resnet(), start_file(args, seed)
    if file.is_file():
        net.load_state_dict(torch.load(file, weights_only=True))
        return net
    trainer = Trainer(train, seed, tell)
    trainer.run(net, cosine(args.lr, args.epochs_pretrain * trainer.steps))
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    write_atomic(file, buffer.getvalue())
    return net


def run_one(
    net: nn.Module,
    method: str,
    train: Split,
    test: Split,
    args: argparse.Namespace,
    seed: int,
    tell: Callable[[], None],
) -> dict[str, Any]:
    """One row: prune by a method, fine-tune, test."""
    start = time.monotonic()
    torch.manual_seed(seed)
    trainer = Trainer(train, 1000 + seed, tell)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning's
        small = PRUNE[method](net, trainer, args, seed)
    fresh = accuracy(small, test)
    trainer.run(small, cosine(args.lr_finetune, args.finetune * trainer.steps))
    return {
        "method": method,
        "seed": seed,
        "top1": accuracy(small, test),
        "top1_before_finetune": fresh,
        "start_top1": accuracy(net, test),
        "mmacs": count_macs(small) / 1e6,
        "start_mmacs": count_macs(net) / 1e6,
        "params": sum(p.numel() for p in small.parameters()),
        "seconds": round(time.monotonic() - start, 1),
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean accuracy by method, and how far PaS is ahead of each other one on the same seeds, in points."""
    by = {m: {row["seed"]: row["top1"] for row in rows if row["method"] == m} for m in METHODS}
    means = {m: statistics.mean(found.values()) for m, found in by.items() if found}
    ahead = {
        m: {"mean": statistics.mean(gaps), "least": min(gaps), "seeds": len(gaps)}
        for m, found in by.items()
        if m != "pas" and (gaps := [by["pas"][s] - top1 for s, top1 in found.items() if s in by["pas"]])
    }
    return {"mean_top1": means, "pas_ahead": ahead}


def show(rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Print the table."""
    seeds = sorted({row["seed"] for row in rows})
    table = Table("method", *(f"seed {s}" for s in seeds), "mean", "PaS ahead by", "share of MACs", "seconds")
    for method in METHODS:
        mine = {row["seed"]: row for row in rows if row["method"] == method}
        if mine:
            ahead = summary["pas_ahead"].get(method)
            shares = [row["mmacs"] / row["start_mmacs"] for row in mine.values()]
            table.add_row(
                method, *(f"{mine[s]['top1']:.2f}" if s in mine else "" for s in seeds),
                f"{summary['mean_top1'][method]:.2f}", "" if ahead is None else f"{ahead['mean']:+.2f}",
                f"{min(shares):.1%} to {max(shares):.1%}",
                f"{statistics.mean(row['seconds'] for row in mine.values()):.0f}",
            )  # fmt: skip
    console = Console(width=110)
    console.print(table)
    starts = {row["seed"]: f"{row['start_top1']:.2f}" for row in rows}
    console.print(f"start networks: {', '.join(starts.values())} % top-1, {rows[0]['start_mmacs']:.2f} MMACs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="F")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs on 1,000 images")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from the first on")
    parser.add_argument("--epochs-pretrain", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=10, help="of each method, fine-tuning included")
    parser.add_argument("--finetune", type=int, default=6, help="of these, in the pruned network")
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--share", type=float, default=0.5, help="of the MACs that is left")
    parser.add_argument("--reg", type=float, default=5e-4, help="of bn_scale's penalty")
    parser.add_argument("--pas-lr", type=float, default=0.25, help="learning rate of PaS's masks")
    for name, (method, values) in SWEEPS.items():
        tried = ", ".join(f"{value:g}" for value in values)
        parser.add_argument(f"--sweep-{name.replace('_', '-')}", action="store_true", help=f"{method}: best of {tried}")
    parser.add_argument("--sweep-seed", type=int, default=100, help="of the sweeps; none of the table's")
    parser.add_argument("--lr", type=float, default=0.1, help="peak, to train the start network")
    parser.add_argument("--lr-search", type=float, default=0.02, help="constant, before channels go")
    parser.add_argument("--lr-finetune", type=float, default=0.05, help="peak, after")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--work", type=Path, default=ROOT / "work_dirs" / "pas_cifar10", metavar="DIR")
    args = parser.parse_args()
    tests = 10_000
    if args.quick:
        args.seeds, args.epochs_pretrain, args.epochs, args.finetune, args.images, tests = 1, 2, 2, 1, 1000, 1000
    if not 0 < args.finetune < args.epochs:
        parser.error("--finetune takes from 1 to one less than --epochs")
    if args.images + min(args.images, HELD) > 50_000:
        parser.error(f"--images must leave {HELD} training images to compare values on: at most {50_000 - HELD}")
    if args.first_seed <= args.sweep_seed < args.first_seed + args.seeds:
        parser.error(f"--sweep-seed {args.sweep_seed} is a seed of the table")
    train, held, test = load_cifar(args.work, args.images, tests)
    sweeps = {name: sweep(args, name, train, held) for name in SWEEPS if getattr(args, f"sweep_{name}")}
    for name, tried in sweeps.items():
        setattr(args, name, tried["best"])
    rows = run(args, train, test)
    summary = summarise(rows)
    show(rows, summary)
    if args.json is not None:
        given = ("first_seed", "seeds", *(name for name in SETTINGS if name not in sweeps))
        options = [f"--{name} {getattr(args, name)}" for name in given] + [f"--sweep_{name}" for name in sweeps]
        about = {
            "command": f"python benchmarks/pas_cifar10.py {' '.join(options).replace('_', '-')}",
            "device": cpu_name(),
            "threads": torch.get_num_threads(),
            "date": now(),
            "setting": {**settings_of(args), "tests": tests},
            "sweeps": sweeps,
        }
        write_json(args.json, {**about, **summary, "rows": rows})


def settings_of(args: argparse.Namespace, methods: tuple[str, ...] = METHODS) -> dict[str, Any]:
    """What the rows of some methods depend on, besides seed and method."""
    others = [name for name, (method, _) in SWEEPS.items() if method not in methods]
    return {**{name: getattr(args, name) for name in SETTINGS if name not in others}, "batch": BATCH}


def sweep(args: argparse.Namespace, name: str, train: Split, held: Split) -> dict[str, Any]:
    """What each value of an option gives its method on images that are not trained on, and the best one."""
    method, values = SWEEPS[name]
    tried: dict[str, float] = {}
    for value in values:
        own = argparse.Namespace(**{**vars(args), name: value})
        own.first_seed, own.seeds, own.methods = args.sweep_seed, 1, [method]
        tried[f"{value:g}"] = run(own, train, held)[0]["top1"]
    best = max(values, key=lambda value: tried[f"{value:g}"])
    return {"seed": args.sweep_seed, "held_images": len(held[1]), "top1": tried, "best": best}


def run(args: argparse.Namespace, train: Split, test: Split) -> list[dict[str, Any]]:
    """All rows; those that are there already are read. ``test``: what the networks found are tested on."""
    steps = len(train[0]) // BATCH
    jobs = [(seed, method) for seed in range(args.first_seed, args.first_seed + args.seeds) for method in args.methods]
    files = {job: row_file(args, *job, len(test[1])) for job in jobs}
    open_jobs = [job for job in jobs if not files[job].is_file()]
    starts = {seed for seed, _ in open_jobs if not start_file(args, seed).is_file()}
    total = steps * (len(open_jobs) * args.epochs + len(starts) * args.epochs_pretrain)
    done, what = 0, ""
    with progress_bar("pas_cifar10") as progress:

        def tell() -> None:
            nonlocal done
            done += 1
            progress(done, max(total, done), what)

        for seed, method in open_jobs:
            what = f"seed {seed}, start network"
            net = pretrained(train, args, seed, tell)
            what = f"seed {seed}, {method}"
            write_json(files[seed, method], run_one(net, method, train, test, args, seed, tell))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files.values()]


def row_file(args: argparse.Namespace, seed: int, method: str, tests: int) -> Path:
    """Where a row lies: by what it depends on. ``tests``: images, which tell those of the sweeps from the others."""
    return args.work / stable_hash({**settings_of(args, (method,)), "tests": tests}) / f"{method}_{seed}.json"


if __name__ == "__main__":
    main()
