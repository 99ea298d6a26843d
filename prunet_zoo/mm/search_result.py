"""The end of a search: derive, recalibrate, evaluate, measure, write."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.runner import set_random_seed

from prunet_zoo.errors import PrunetError, TrainingError
from prunet_zoo.files import write_atomic, write_json
from prunet_zoo.latency import Setting, get_backend, measure
from prunet_zoo.mm.search_loop import TRIALS_FILE
from prunet_zoo.models import PruNetClassifier, create_model, save_weights
from prunet_zoo.search.adjust import LOWEST
from prunet_zoo.search.report import render_report
from prunet_zoo.search.target import TRIES, TargetHitter, summary
from prunet_zoo.space import Encoding
from prunet_zoo.spec import NetSpec
from prunet_zoo.supernet import recalibrate_batchnorm

if TYPE_CHECKING:
    from prunet_zoo.mm.runner import SuperNetRunner
    from prunet_zoo.mm.search_loop import SearchLoop

SECONDS, ATTEMPTS = 0.6, 3  # of a measurement: time for its runs, how often it is made at most until two agree


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
    chosen = choose(loop, out / TRIALS_FILE, runner.logger.info)
    encoding, measured = chosen.encoding, chosen.measured
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
    predicted = cost(spec)
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
        "status": chosen.status,
        "reason": chosen.reason,
        "verify": loop.verify,
        "correction": chosen.correction,
        "tries": len(chosen.trials),
        "trials": chosen.trials,
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
    runner.logger.info(f"found {summary(report)}; written to {out}")
    if report["status"].startswith("missed"):
        more = f"--resume --verify {2 * loop.verify or TRIES}"
        runner.logger.warning(f"the target was {report['status']}. To try more networks, run the command with {more}")
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


@dataclass(frozen=True)
class Chosen:
    """The architecture found and how far its latency can be trusted.

    ``status`` is "measured" (it meets the target; ``reason`` says what there is to doubt), "predicted" (it cannot be
    measured here, ``reason`` says why) or "missed: …". ``measured`` is a latency record, None where it was not
    measured; ``correction`` the factor by which measured networks like it differ from the table, 1 where its word was
    taken.
    """

    encoding: Encoding
    status: str
    reason: str | None = None
    measured: dict[str, Any] | None = None
    correction: float = 1.0
    trials: list[dict[str, Any]] = field(default_factory=list)


def choose(loop: SearchLoop, path: Path, tell: Callable[[str], None] = lambda line: None) -> Chosen:
    """The architecture found: with ``loop.verify`` the one that measures what was asked for, see `TargetHitter`.

    What is measured is kept in ``path``, so that a run that is stopped here goes on with the same figures.
    """
    target, cost, space = loop.strategy.status()["target"], loop.cost, loop.supernet.space
    source = cost.describe()
    why = why_not_measured(source)
    if why is not None:
        return Chosen(loop.strategy.finish(), "predicted", why)
    if not loop.verify:
        encoding = loop.strategy.finish()
        measured = measure_like(space.decode(encoding), source)
        off = measured["median_ms"] / target - 1
        doubt = f"the measurement was disturbed: {'; '.join(measured['disturbed'])}" if measured["disturbed"] else None
        missed = f"the table's word was taken (--verify 0), the network measures {100 * off:+.1f}% off the target"
        missed += f"; {doubt}" if doubt else ""
        return _chosen(encoding, None if LOWEST - 1 < off <= 0 else missed, doubt, measured=measured)
    log = TrialLog(path, lambda spec: measure_like(spec, source))
    found = TargetHitter(space, cost, loop.strategy.finish, log, target, loop.verify, tell).run()
    return _chosen(
        found.trial.encoding,
        found.missed,
        found.doubt,
        measured=found.trial.record,
        correction=found.correction,
        trials=[trial.to_dict() for trial in found.trials],
    )


def _chosen(encoding: Encoding, missed: str | None, doubt: str | None = None, **figures: Any) -> Chosen:
    if missed is None:
        return Chosen(encoding, "measured", doubt, **figures)
    return Chosen(encoding, f"missed: {missed}", missed, **figures)


class TrialLog:
    """Measures, and keeps what was measured in a file, in order; what the file holds already is not measured again.

    Raises:
        TrainingError: the file is damaged.
    """

    def __init__(self, path: Path, measure: Callable[[NetSpec], dict[str, Any]]) -> None:
        self.path, self.measure, self.used = path, measure, 0
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            try:
                self.rows = [row for row in json.loads(path.read_text(encoding="utf-8")) if "record" in row]
            except (ValueError, TypeError) as error:
                raise TrainingError(f"{path} is damaged ({error}); remove it to measure again") from None

    def __call__(self, spec: NetSpec, noted: dict[str, Any]) -> dict[str, Any]:
        """The record of a network; ``noted`` is kept with it."""
        if self.used == len(self.rows) or self.rows[self.used]["spec_hash"] != spec.hash:
            del self.rows[self.used :]
            self.rows.append({**noted, "record": self.measure(spec)})
            write_json(self.path, self.rows)
        self.used += 1
        return dict(self.rows[self.used - 1]["record"])


def _setting(source: dict[str, Any]) -> dict[str, Any]:
    return {key: source[key] for key in ("threads", "dtype", "batch", "accelerator", "memory_format") if key in source}


def why_not_measured(source: dict[str, Any]) -> str | None:
    """Why a network cannot be measured here as its cost was (`Cost.describe`); None where it can."""
    if "backend" not in source:
        return "what was searched for is no latency"
    other = f"the latencies are of {source['device']} with {source['backend']}, which this machine lacks"
    try:
        backend = get_backend(source["backend"])
        backend.check(Setting(**_setting(source)))
        mine = backend.device_name(source["accelerator"])
    except PrunetError as error:
        return f"{other}: {error}"
    known = mine == source["device"] or mine.startswith(tuple(source.get("devices", ())))
    return None if known else f"{other}: it has {mine}"


def measure_like(spec: NetSpec, source: dict[str, Any]) -> dict[str, Any]:
    """Measure a network the way its table was measured (`Cost.describe`); returns the record as plain data."""
    return measure(spec, backend=source["backend"], **_setting(source), seconds=SECONDS, attempts=ATTEMPTS).to_dict()
