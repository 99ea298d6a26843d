"""The end of a search: derive, recalibrate, evaluate, measure, write."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.dist import barrier, is_main_process

from prunet_zoo.errors import LatencyError
from prunet_zoo.files import write_atomic, write_json
from prunet_zoo.latency import measure
from prunet_zoo.models import PruNetClassifier, create_model, save_weights
from prunet_zoo.search.report import render_report
from prunet_zoo.spec import NetSpec
from prunet_zoo.supernet import recalibrate_batchnorm

if TYPE_CHECKING:
    from prunet_zoo.mm.runner import SuperNetRunner
    from prunet_zoo.mm.search_loop import SearchLoop

RESULT_FILES = ("spec.json", "weights.safetensors", "report.json", "report.html")


def write_result(runner: SuperNetRunner) -> dict[str, Any]:
    """Derive the network found and write `RESULT_FILES` into the work directory; returns the report."""
    report: dict[str, Any] = {}
    if is_main_process():
        report = _write(runner)
    barrier()
    return report


def _write(runner: SuperNetRunner) -> dict[str, Any]:
    loop: SearchLoop = runner.train_loop
    supernet, cost, out = loop.supernet, loop.cost, Path(runner.work_dir)
    target = loop.strategy.status()["target"]
    encoding = loop.strategy.finish()
    spec, state = supernet.derive(encoding, loop.name or f"{supernet.space.name}-{target:g}{cost.unit}")
    device = next(supernet.parameters()).device
    model = create_model(spec).to(device)
    model.load_state_dict(state)
    batches = (loop.runner.model.data_preprocessor(b)["inputs"] for b in _in_order(loop))
    used = recalibrate_batchnorm(model, itertools.islice(batches, loop.recalibration_batches))
    top1 = evaluate(model, loop.val_dataloader, runner.model.data_preprocessor) if loop.val_dataloader else None
    predicted = cost(spec)
    measured = _measure(spec, cost.describe())
    report = {
        "name": spec.name,
        "method": type(loop.strategy).__name__,
        "space": {"name": supernet.space.name, "hash": supernet.space.hash, "count": float(supernet.space.count())},
        "spec_hash": spec.hash,
        "seed": runner.seed,
        "unit": cost.unit,
        "target": target,
        "predicted": predicted,
        "measured": measured,
        "measured_error": None if measured is None else measured["median_ms"] / target - 1,
        "cost": cost.describe(),
        "top1_inherited": top1,
        "recalibration_batches": used,
        "params": spec.params(),
        "macs": spec.macs(),
        "encoding": [list(choice) if choice else None for choice in encoding],
        "found": [list(choice) if choice else None for choice in supernet.best()],
        "seconds": sum(row["seconds"] for row in loop.history),
        "history": loop.history,
        "events": loop.events,
    }
    save_weights(out / "weights.safetensors", model.state_dict(), spec, top1_inherited=top1)
    write_json(out / "report.json", report)
    write_atomic(out / "report.html", render_report(report, spec, supernet.space))
    write_atomic(out / "spec.json", spec.to_json())  # last: where it stands, the search is complete
    runner.logger.info(
        f"found {spec.name}: predicted {predicted:.4g} {cost.unit} for a target of {target:.4g}"
        + ("" if measured is None else f", measured {measured['median_ms']:.4g} ms")
        + f", {spec.params() / 1e6:.2f} M parameters, {spec.macs() / 1e6:.1f} MMACs; written to {out}"
    )
    return report


def _in_order(loop: SearchLoop) -> Iterable[Any]:
    """Training batches in the order of epoch 0, whatever epoch the run was resumed in."""
    if hasattr(loop.dataloader.sampler, "set_epoch"):
        loop.dataloader.sampler.set_epoch(0)
    torch.manual_seed(loop.runner.seed or 0)
    return loop.dataloader


@torch.no_grad()
def evaluate(model: PruNetClassifier, loader: Iterable[Any], preprocess: Any) -> float:
    """Top-1 accuracy in percent over a data loader of dict(inputs, label)."""
    device, right, seen = next(model.parameters()).device, 0, 0
    model.eval()
    for batch in loader:
        data = preprocess(batch)
        label = data["label"].to(device)
        right += int((model(data["inputs"].to(device)).argmax(1) == label).sum())
        seen += len(label)
    return 100.0 * right / max(1, seen)


def _measure(spec: NetSpec, source: dict[str, Any]) -> dict[str, Any] | None:
    """Measure the network the way the table was measured, where the backend and device are those of this machine."""
    if "backend" not in source:
        return None
    try:
        record = measure(
            spec, backend=source["backend"], batch=source["batch"], threads=source["threads"], dtype=source["dtype"]
        )
    except LatencyError:  # the table is from another machine, whose backend this one lacks
        return None
    return record.to_dict() if record.device == source["device"] else None
