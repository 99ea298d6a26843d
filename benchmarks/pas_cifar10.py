"""Pruning-as-Search against magnitude pruning and torch-pruning's BN-scale pruner: a small ResNet at half of its MACs.

    python benchmarks/pas_cifar10.py [--json F] [--quick] [--seeds 3] [--epochs-pretrain 16] [--epochs 10] [--images N]

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

A run goes on where it was stopped: what is finished, by seed and method, lies in ``--work``.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import statistics
import tarfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from prunet_zoo.errors import DataError
from prunet_zoo.files import write_atomic, write_json
from prunet_zoo.latency import progress_bar
from prunet_zoo.latency.backends.base import cpu_name
from prunet_zoo.latency.record import now
from prunet_zoo.models.channels import layer_shape, take_profile
from prunet_zoo.search.pas import PruningAsSearch
from prunet_zoo.spec import stable_hash
from prunet_zoo.supernet.traced import TracedCost, TracedNet

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = ROOT.parent / "shared" / "data" / "cifar10.tar.xz"
SIZE, CLASSES, BATCH = 32, 10, 128
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
METHODS = ("pas", "magnitude", "bn_scale")
Split = tuple[torch.Tensor, torch.Tensor]  # uint8 images (N, 3, 32, 32), classes (N,)
Progress = Callable[[int, int, str], None]


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


def load_cifar(work: Path, images: int, tests: int) -> tuple[Split, Split]:
    """The first images of each class, decoded once and kept in ``work``."""
    file = work / f"cifar10_{images}_{tests}.pt"
    if not file.is_file():
        if not ARCHIVE.is_file():
            raise DataError(f"CIFAR-10 is not at {ARCHIVE}")
        parts = [_decode("train", images // CLASSES), _decode("test", tests // CLASSES)]
        buffer = io.BytesIO()
        torch.save([tensor for part in parts for tensor in part], buffer)
        write_atomic(file, buffer.getvalue())
    x, y, test_x, test_y = torch.load(file, weights_only=True)
    return (x, y), (test_x, test_y)


def _decode(part: str, per_class: int) -> Split:
    found: dict[str, list[tuple[str, np.ndarray]]] = {}
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            names = member.name.strip("/").split("/")
            file = archive.extractfile(member) if member.isfile() and names[-3:-2] == [part] else None
            if file is not None and int(names[-1].split(".")[0]) < per_class:
                pixels = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
                found.setdefault(names[-2], []).append((names[-1], pixels))
    rows = [
        (i, pixels) for i, name in enumerate(sorted(found)) for _, pixels in sorted(found[name], key=lambda r: r[0])
    ]
    images = torch.from_numpy(np.stack([pixels for _, pixels in rows])).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([i for i, _ in rows])


def scaled(images: torch.Tensor) -> torch.Tensor:
    """Normalised floats of uint8 images."""
    return (images.float() / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def augmented(images: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """A crop of the images padded by 4 px, one place an image, half of them mirrored: (B, 3, 32, 32) uint8."""
    count = len(images)
    padded = F.pad(images, (4, 4, 4, 4))
    at = torch.randint(0, 9, (2, count), generator=draw)
    rows = (at[0][:, None] + torch.arange(SIZE)).view(count, 1, SIZE, 1)
    flip = torch.rand(count, generator=draw) < 0.5
    steps = torch.where(flip[:, None], torch.arange(SIZE - 1, -1, -1), torch.arange(SIZE))
    columns = (at[1][:, None] + steps).view(count, 1, 1, SIZE)
    channels = torch.arange(3).view(1, 3, 1, 1)
    return padded[torch.arange(count).view(count, 1, 1, 1), channels, rows, columns]


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
            loss = F.cross_entropy(net(scaled(augmented(self.images[chosen], self.draw))), self.labels[chosen])
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
        int((net(scaled(x)).argmax(1) == y).sum()) for x, y in zip(test[0].split(500), test[1].split(500), strict=True)
    )
    return 100 * right / len(test[1])


def prune_pas(net: nn.Module, trainer: Trainer, args: argparse.Namespace, seed: int) -> nn.Module:
    """Learn masks in the first part; the network without the masked channels."""
    masked = TracedNet(copy.deepcopy(net), SIZE, CLASSES, step=1)
    cost = TracedCost(masked.space)
    target = args.share * cost(masked.spec)
    strategy = PruningAsSearch(target=target, finetune=args.finetune / args.epochs)
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


def pretrained(folder: Path, train: Split, args: argparse.Namespace, seed: int, tell: Callable[[], None]) -> nn.Module:
    """The start network of a seed, trained or read."""
    torch.manual_seed(seed)
    net, file = small_resnet(), folder / f"start_{seed}.pt"
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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs-pretrain", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=10, help="of each method, fine-tuning included")
    parser.add_argument("--finetune", type=int, default=6, help="of these, in the pruned network")
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--share", type=float, default=0.5, help="of the MACs that is left")
    parser.add_argument("--reg", type=float, default=5e-4, help="of bn_scale's penalty")
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
    setting = {
        k: v for k, v in vars(args).items() if k not in ("json", "quick", "seeds", "methods", "work")
    } | {"tests": tests, "batch": BATCH}  # fmt: skip
    folder = args.work / stable_hash(setting)
    train, test = load_cifar(args.work, args.images, tests)
    rows = run(args, folder, train, test)
    summary = summarise(rows)
    show(rows, summary)
    if args.json is not None:
        about = {
            "command": f"python benchmarks/pas_cifar10.py --seeds {args.seeds} --images {args.images} "
            f"--epochs-pretrain {args.epochs_pretrain} --epochs {args.epochs} --finetune {args.finetune}",
            "device": cpu_name(),
            "threads": torch.get_num_threads(),
            "date": now(),
            "setting": setting,
        }
        write_json(args.json, {**about, **summary, "rows": rows})


def run(args: argparse.Namespace, folder: Path, train: Split, test: Split) -> list[dict[str, Any]]:
    """All rows; those that are there already are read."""
    steps = len(train[0]) // BATCH
    jobs = [(seed, method) for seed in range(args.seeds) for method in args.methods]
    open_jobs = [job for job in jobs if not _file(folder, *job).is_file()]
    starts = {seed for seed, _ in open_jobs if not (folder / f"start_{seed}.pt").is_file()}
    total = steps * (len(open_jobs) * args.epochs + len(starts) * args.epochs_pretrain)
    done, what = 0, ""
    with progress_bar("pas_cifar10") as progress:

        def tell() -> None:
            nonlocal done
            done += 1
            progress(done, max(total, done), what)

        for seed, method in open_jobs:
            what = f"seed {seed}, start network"
            net = pretrained(folder, train, args, seed, tell)
            what = f"seed {seed}, {method}"
            write_json(_file(folder, seed, method), run_one(net, method, train, test, args, seed, tell))
    return [json.loads(_file(folder, *job).read_text(encoding="utf-8")) for job in jobs]


def _file(folder: Path, seed: int, method: str) -> Path:
    return folder / f"{method}_{seed}.json"


if __name__ == "__main__":
    main()
