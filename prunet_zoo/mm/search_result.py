"""The end of a search: derive, recalibrate, evaluate, measure, write."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.runner import set_random_seed

from prunet_zoo.errors import LatencyError
from prunet_zoo.files import write_atomic, write_json
from prunet_zoo.latency import measure
from prunet_zoo.mm.search_loop import TRIALS_FILE
from prunet_zoo.models import PruNetClassifier, create_model, save_weights
from prunet_zoo.search.adjust import LOWEST
from prunet_zoo.search.report import render_report
from prunet_zoo.space import Encoding
from prunet_zoo.spec import NetSpec
from prunet_zoo.supernet import recalibrate_batchnorm

if TYPE_CHECKING:
    from prunet_zoo.mm.runner import SuperNetRunner
    from prunet_zoo.mm.search_loop import SearchLoop


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
    encoding, trials, correction = choose(loop, out / TRIALS_FILE)
    # a run that is resumed after its last epoch comes here with other generators: weights must not depend on that
    set_random_seed(runner.seed or 0)
    spec, state = supernet.derive(encoding, loop.name or f"{supernet.space.name}-{target:g}{cost.unit}")
    device = next(supernet.parameters()).device
    model = create_model(spec).to(device)
    model.load_state_dict(state)
    batches = (loop.runner.model.data_preprocessor(b)["inputs"] for b in _in_order(loop))
    fresh = supernet.missing(encoding)
    if fresh:
        runner.logger.warning(
            f"the target needed blocks that had been pruned, in layers {fresh}: they start with fresh weights"
        )
    used = recalibrate_batchnorm(model, itertools.islice(batches, loop.recalibration_batches))
    top1 = evaluate(model, loop.val_dataloader, runner.model.data_preprocessor) if loop.val_dataloader else None
    predicted = cost(spec) * correction
    measured = measure_like(spec, cost.describe())
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
        "verify": loop.verify,
        "correction": correction,
        "trials": trials,
        "cost": cost.describe(),
        "top1_inherited": top1,
        "recalibration_batches": used,
        "params": spec.params(),
        "macs": spec.macs(),
        "reinitialised_layers": fresh,
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
    if measured is not None and not 0.95 <= measured["median_ms"] / target <= 1.0:
        runner.logger.warning(
            f"the network measures {100 * (measured['median_ms'] / target - 1):+.1f}% off its target: a table is a few "
            "percent off for one network. To adjust it by measurements, run the command again with --resume --verify 4"
        )
    return report


def _in_order(loop: SearchLoop) -> Iterable[Any]:
    """Training batches in the order of epoch 0, whatever epoch the run was resumed in."""
    if hasattr(loop.dataloader.sampler, "set_epoch"):
        loop.dataloader.sampler.set_epoch(0)
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


def choose(loop: SearchLoop, path: Path) -> tuple[Encoding, list[dict[str, Any]], float]:
    """The architecture found. With ``loop.verify`` it is measured, and adjusted again where it misses the target.

    A table is a few percent off for a single network. So a network that measures outside of (0.97 T, T] is adjusted
    anew, to a target for the table that is corrected by measured / predicted. Trials are kept in ``path``, so that a
    run that is stopped here goes on with the same figures.

    Returns:
        The encoding; what was tried (target for the table, table's prediction, measurement); the factor by which
        the table was corrected for the encoding, 1 if its word was taken.
    """
    target, cost = loop.strategy.status()["target"], loop.cost
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    trials: list[dict[str, Any]] = []
    encodings: list[Encoding] = []
    aim = target
    for round_ in range(loop.verify + 1):
        try:
            encoding = loop.strategy.finish(aim)
        except LatencyError:
            if not encodings:
                raise
            break  # the corrected target lies outside of the space
        spec = loop.supernet.space.decode(encoding)
        if round_ < len(known) and known[round_]["spec_hash"] == spec.hash:
            trial = known[round_]
        else:
            record = measure_like(spec, cost.describe()) if loop.verify else None
            measured = None if record is None else record["median_ms"]
            trial = {"aim": aim, "predicted": cost(spec), "measured": measured, "spec_hash": spec.hash}
        trials.append(trial)
        encodings.append(encoding)
        if loop.verify:
            write_json(path, trials)
        if trial["measured"] is None or LOWEST * target < trial["measured"] <= target:
            return encoding, trials, target / aim
        aim = target * trial["predicted"] / trial["measured"]
    middle = (1 + LOWEST) / 2 * target
    nearest = min(range(len(trials)), key=lambda i: abs(trials[i]["measured"] - middle))
    return encodings[nearest], trials, target / trials[nearest]["aim"]


def measure_like(spec: NetSpec, source: dict[str, Any]) -> dict[str, Any] | None:
    """Measure a network the way its table was measured; None where backend or device are not this machine's."""
    if "backend" not in source:
        return None
    settings = {key: source[key] for key in ("backend", "batch", "threads", "dtype", "accelerator")}
    try:
        record = measure(spec, **settings, seconds=1.0)
    except LatencyError:  # the table is from another machine, whose backend this one lacks
        return None
    return record.to_dict() if record.device == source["device"] else None
