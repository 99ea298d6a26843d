"""The end of a search: derive, recalibrate, evaluate, write."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.config import Config
from mmengine.runner import set_random_seed
from torch import nn

from prunet_zoo.files import write_atomic, write_json
from prunet_zoo.mm.distributed import from_first
from prunet_zoo.mm.guard import fingerprint
from prunet_zoo.mm.predict import classifier_meta
from prunet_zoo.models import create_model, save_weights
from prunet_zoo.models.pruned import PrunedSpec, build_pruned
from prunet_zoo.search.report import render_report
from prunet_zoo.search.target import TRIES, summary
from prunet_zoo.spec import NetSpec
from prunet_zoo.supernet import recalibrate_batchnorm
from prunet_zoo.supernet.masked import MaskedNet

if TYPE_CHECKING:
    from prunet_zoo.mm.runner import SuperNetRunner
    from prunet_zoo.mm.search_choice import Chosen
    from prunet_zoo.mm.search_loop import SearchLoop


def write_result(runner: SuperNetRunner) -> dict[str, Any]:
    """Decide where it is not decided yet, derive the network found and write `RESULT_FILES` into the work directory;
    returns the report."""
    loop: SearchLoop = runner.train_loop
    chosen = loop.decide()
    return from_first(lambda: _write(runner, loop, chosen))


def _write(runner: SuperNetRunner, loop: SearchLoop, chosen: Chosen) -> dict[str, Any]:
    net, cost, out = loop.searched, loop.cost, Path(runner.work_dir)
    space, target = net.space, loop.strategy.status()["target"]
    # a run that is resumed after its last epoch comes here with other generators: weights must not depend on that
    set_random_seed(runner.seed or 0)
    fresh = net.missing(chosen.encoding)
    if fresh:
        runner.logger.warning(
            f"the target needed blocks that had been pruned, in layers {fresh}: they start with fresh weights"
        )
    spec, model, used = derive_recalibrated(loop, chosen, loop.name or f"{space.name}-{target:g}{cost.unit}")
    top1 = evaluate(model, loop.val_dataloader, runner.model.data_preprocessor) if loop.val_dataloader else None
    rows = loop.history.rows
    trained = sum(row["seconds"] for row in rows)
    measured = chosen.measured
    report = {
        "name": spec.name,
        "method": type(loop.strategy).__name__,
        "data": loop.data_name,
        "config": fingerprint(runner.cfg),
        "space": {"name": space.name, "hash": space.hash, "count": float(space.count())},
        "spec_hash": spec.hash,
        "seed": runner.seed,
        "unit": cost.unit,
        "target": target,
        "predicted": cost(spec),
        "measured": measured,
        "measured_error": None if measured is None else measured["median_ms"] / target - 1,
        "status": chosen.status,
        "reason": chosen.reason,
        "verify": chosen.verify,
        "correction": chosen.correction,
        "tries": chosen.tries,
        "trials": chosen.trials,
        "cost": cost.describe(),
        "top1_inherited": top1,
        "recalibration_batches": used,
        "params": spec.params(),
        "macs": spec.macs(),
        "reinitialised_layers": fresh,
        "encoding": [list(choice) if choice else None for choice in chosen.encoding],
        "found": [list(choice) if choice else None for choice in net.best()],
        "epochs": loop.max_epochs,
        "decided_epoch": chosen.epoch,  # so many epochs were over when the architecture was decided
        "seconds": trained,  # of training
        "search_seconds": trained + chosen.seconds,  # and of exploring, choosing and measuring
        "peak_mb": max([chosen.peak_mb, *(row["peak_mb"] for row in rows)]),
        "history": rows,
        "events": loop.history.events,
        "details": loop.strategy.details(),
    }
    save_weights(out / "weights.safetensors", model.state_dict(), spec, top1_inherited=top1, **_meta(runner, loop))
    write_json(out / "report.json", report)
    write_atomic(out / "report.html", render_report(report, spec, space))
    write_atomic(out / "spec.json", spec.to_json())  # last: where it stands, the search is complete
    runner.logger.info(f"found {summary(report)}; written to {out}")
    if report["status"].startswith("missed"):
        runner.logger.warning(f"the target was {report['status']}. {_advice(loop, chosen)}")
    return report


def _meta(runner: SuperNetRunner, loop: SearchLoop) -> dict[str, Any]:
    """Classes and preprocessing, as the search's images for validation have them: with these the file works alone."""
    loader = runner.cfg.train_cfg.get("val_dataloader")
    known = Config({"val_dataloader": loader if isinstance(loader, Mapping) else {}})
    return classifier_meta(known, loop.dataloader.dataset)


def _advice(loop: SearchLoop, chosen: Chosen) -> str:
    if loop.strategy.measured_choice() is not None or loop.strategy.missed() is not None:  # it has its own rule
        return "Give a target that can be reached (--target-ms), or more to choose from: a finer grid, a wider search"
    more = f"--verify {2 * chosen.verify or TRIES}"
    if chosen.epoch < loop.max_epochs:  # weights were trained for it: another network needs another run
        return f"To try more networks, search again in another --work-dir with {more}"
    return f"To try more networks, run the command with --resume {more}"


def derive_recalibrated(loop: SearchLoop, chosen: Chosen, name: str) -> tuple[Any, nn.Module, int]:
    """The network found with BatchNorm statistics of its own: its spec, its module, and the training batches used.

    The statistics of a masked network are taken before its channels are removed: that removes nothing which the masks
    let through, and holds for branches too that carry another's part after the removal. So they are fresh for every
    method, whether weights were trained on after the decision or not; running averages of a few hundred steps are
    noisier than a mean over as many images with the final weights (arXiv 2105.07576, §3).
    """
    net, module = loop.searched, loop.module
    device = next(module.parameters()).device
    images = (loop.model.data_preprocessor(batch)["inputs"] for batch in _in_order(loop))
    batches = itertools.islice(images, loop.recalibration_batches)
    masked = isinstance(module, MaskedNet)
    used = recalibrate_batchnorm(module, batches) if masked else 0
    spec, state = net.derive(chosen.encoding, name)
    model = build_network(spec).to(device)
    model.load_state_dict(state)
    return spec, model, used if masked else recalibrate_batchnorm(model, batches)


def build_network(spec: NetSpec | PrunedSpec) -> nn.Module:
    """The classifier of a spec, with random weights."""
    return create_model(spec) if isinstance(spec, NetSpec) else build_pruned(spec)


def _in_order(loop: SearchLoop) -> Iterable[Any]:
    """Training batches in the order of epoch 0, whatever epoch the run was resumed in."""
    if hasattr(loop.dataloader.sampler, "set_epoch"):
        loop.dataloader.sampler.set_epoch(0)
    return loop.dataloader


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Any], preprocess: Any) -> float:
    """Top-1 accuracy in percent over a data loader of dict(inputs, label)."""
    device, right, seen = next(model.parameters()).device, 0, 0
    model.eval()
    for batch in loader:
        data = preprocess(batch)
        label = data["label"].to(device)
        right += int((model(data["inputs"].to(device)).argmax(1) == label).sum())
        seen += len(label)
    return 100.0 * right / max(1, seen)
