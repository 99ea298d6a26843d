"""Hooks of a robust run: exact resume, NaN loss, signals, weights as safetensors. The progress bar is in `progress`."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import (
    all_gather_object,
    all_reduce,
    barrier,
    get_comm_device,
    get_rank,
    get_world_size,
    is_main_process,
)
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from prunet_zoo.errors import TrainingError
from prunet_zoo.mm.checkpoint import AtomicCheckpointHook
from prunet_zoo.mm.guard import claim_work_dir, fingerprint_hash
from prunet_zoo.mm.hidden_state import hidden_state, put_back, warn_of_lost_caches
from prunet_zoo.mm.interrupts import Interrupted, StopSignals, calm_workers, resume_command
from prunet_zoo.mm.rng import rng_state, set_rng_state
from prunet_zoo.models import save_weights
from prunet_zoo.models.pruned import PrunedSpec
from prunet_zoo.registry import HOOKS, register
from prunet_zoo.spec import NetSpec


@register(HOOKS)
class ExactResumeHook(Hook):
    """Random number generators and `hidden_state` go into checkpoints and come back: a resumed run gives the same bits.

    That holds on CPU with ``num_workers=0`` and a seed, for as many processes as the run was started with. Validation
    leaves the generators as they were, so its interval does not change what is learned.
    """

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self._pending: dict[str, Any] | None = None  # generators to be put back
        self._hidden: dict[str, Any] | None = None  # hidden state to be put back
        self._gathered: list[dict[str, Any]] | None = None  # of all processes, for the next checkpoint
        self._before_val: dict[str, Any] | None = None

    def before_train(self, runner: Runner) -> None:
        if is_main_process():  # only now: a command that was refused must not change whose work directory it is
            claim_work_dir(runner.work_dir, runner.cfg)

    def before_gathering(self, runner: Runner) -> None:
        """Called by `AtomicCheckpointHook` in all processes, before the first one writes a checkpoint."""
        mine = {"rng": rng_state(), "hidden": hidden_state(runner)}
        self._gathered = all_gather_object(mine) if get_world_size() > 1 else [mine]

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        checkpoint["meta"].update(config_hash=fingerprint_hash(runner.cfg), processes=get_world_size())
        checkpoint["rng"] = rng_state()
        if self._gathered is not None:  # else it is not one to resume from: best_*.pth
            checkpoint["states"], self._gathered = self._gathered, None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if not runner._resume:
            return
        there, here = checkpoint["meta"].get("processes", get_world_size()), get_world_size()
        if there != here:
            raise TrainingError(
                f"the run in {runner.work_dir} was started with {there} processes, now there are {here}: an epoch has "
                f"another number of steps. Resume with {there}, or start anew from its weights (--cfg-options "
                "load_from=…) in another --work-dir"
            )
        states = checkpoint.get("states")
        self._pending = states[get_rank()]["rng"] if states else checkpoint.get("rng")
        self._hidden = dict(states[get_rank()]["hidden"]) if states else None

    def before_train_epoch(self, runner: Runner) -> None:
        if self._hidden is not None:
            put_back(runner, self._hidden)
        if runner.iter == runner.epoch * len(runner.train_dataloader):
            self._restore(runner)

    def pipeline_ready(self, runner: Runner) -> None:
        """Called by `ResumableEpochLoop` after all ``before_train_epoch``: a hook may have changed the pipeline."""
        if self._hidden is not None:
            put_back(runner, self._hidden)
            warn_of_lost_caches(runner, self._hidden)
        self._hidden = None

    def within_epoch_resumed(self, runner: Runner) -> None:
        """Called by `ResumableEpochLoop` once its dataloader has started within an epoch."""
        self._restore(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        self._before_val = rng_state()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if self._before_val is not None:
            set_rng_state(self._before_val)
        if runner._train_loop is not None:
            runner.message_hub.update_info("epoch_validated", runner.epoch)

    def _restore(self, runner: Runner) -> None:
        state, self._pending = self._pending, None
        if state is not None:
            set_rng_state(state)


@register(HOOKS)
class NonFiniteLossHook(Hook):
    """Stops a run whose loss, or whose weights at a checkpoint, are NaN or infinite; checkpoints from before stay."""

    priority = "VERY_HIGH"

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        for name, value in (outputs or {}).items():
            number = _as_number(value) if "loss" in name else 0.0
            if not math.isfinite(number):
                self._stop(runner, f"{name} is {number} at iteration {runner.iter + 1}")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint["state_dict"].items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                self._stop(runner, f"weight {name} is not finite after iteration {runner.iter + 1}")

    def _stop(self, runner: Runner, what: str) -> None:
        last = runner.message_hub.runtime_info.get("last_ckpt")
        kept = f"The last checkpoint, {last}, is from before it." if last else "No checkpoint had been saved yet."
        rates = runner.optim_wrapper.get_lr()
        rate = max((max(v) for v in rates.values() if v), default=0.0)
        raise TrainingError(
            f"{what} (epoch {runner.epoch + 1}, learning rate {rate:.3g}). {kept} Lower the learning rate or clip the "
            "gradient (--cfg-options optim_wrapper.clip_grad.max_norm=1), leave out --amp, and look for broken labels."
        )


def _as_number(value: Any) -> float:
    """A loss as a float: tensors are summed, whatever is no number counts as 0."""
    if isinstance(value, torch.Tensor):
        return float(value.detach().sum())
    return float(value) if isinstance(value, int | float) else 0.0


@register(HOOKS)
class InterruptHook(Hook):
    """On Ctrl-C or SIGTERM: finish the step, save, say how to continue (`Interrupted`).

    Within an epoch it saves if the loop can resume there (`ResumableEpochLoop`, `IterBasedTrainLoop`); otherwise the
    last checkpoint counts. During validation it stops at once if the epoch is already saved, else after it.
    """

    priority = "LOWEST"  # when optimiser, schedule, averages and checkpoint of the step are done

    def __init__(self) -> None:
        self.signals = StopSignals()

    def before_train(self, runner: Runner) -> None:
        self.signals.__enter__()
        for loop in (runner.train_loop, runner.val_loop):
            if loop is not None:
                calm_workers(loop.dataloader)

    def after_train(self, runner: Runner) -> None:
        self.signals.__exit__(None, None, None)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        # after the last step of an epoch `after_train_epoch` follows, which saves a whole epoch
        if self._requested() and not self._ends_epoch(runner):
            loop = runner.train_loop
            can_resume = getattr(loop, "resumes_within_epoch", False) or isinstance(loop, IterBasedTrainLoop)
            self._stop(runner, runner.iter + 1, (runner.epoch, runner.iter + 1) if can_resume else None)

    def after_train_epoch(self, runner: Runner) -> None:
        if self._requested():
            epochs = runner.epoch + (not isinstance(runner.train_loop, IterBasedTrainLoop))
            self._stop(runner, runner.iter, (epochs, runner.iter))

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner._train_loop is not None and self._requested() and self._is_saved(runner, runner.iter):
            self._stop(runner, runner.iter, None)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if runner._train_loop is not None and self._requested():
            self._stop(runner, runner.iter, (runner.epoch, runner.iter))

    @staticmethod
    def _ends_epoch(runner: Runner) -> bool:
        by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
        return by_epoch and (runner.iter + 1) % len(runner.train_dataloader) == 0

    def _requested(self) -> bool:
        if get_world_size() == 1:
            return self.signals.requested is not None
        # all processes must stop after the same step, or they wait for each other for ever
        flag = torch.tensor([self.signals.requested or 0], device=get_comm_device(None))
        all_reduce(flag, op="max")
        self.signals.requested = int(flag.item()) or None
        return self.signals.requested is not None

    @staticmethod
    def _is_saved(runner: Runner, steps: int) -> bool:
        return bool(runner.message_hub.runtime_info.get("last_ckpt_iter", -1) == steps)

    def _stop(self, runner: Runner, done: int, at: tuple[int, int] | None) -> None:
        """Save the state after ``at`` = (whole epochs, steps) unless it is saved already, and raise `Interrupted`."""
        signum = int(self.signals.requested or signal.SIGINT)
        saver = next((h for h in runner.hooks if isinstance(h, AtomicCheckpointHook)), None)
        if at is not None and saver is not None and not self._is_saved(runner, at[1]):
            saver.save_now(runner, *at)
        barrier()
        self.signals.__exit__(None, None, None)
        last = runner.message_hub.runtime_info.get("last_ckpt")
        saved = f"The state is saved in {last}." if last else "Nothing had been saved yet: it will start anew."
        message = (
            f"stopped after {done} of {runner.max_iters} iterations. {saved} Continue with:\n    {resume_command()}"
        )
        raise Interrupted(signum, message)


@register(HOOKS)
class SaveSafetensors(Hook):
    """Writes ``best.safetensors`` after each new best validation and ``last.safetensors`` at the end of a run.

    They hold the weights of the classifier's net, or of a detector's backbone, without prefix, with the `NetSpec` and
    the metrics in the metadata; averaged weights where an `EMAHook` is on. Best and last metrics and the time spent are
    kept for `metrics.json`.

    Args:
        metric: what is to be greatest (least, for names with ``loss``); None takes the checkpoint hook's ``save_best``,
            else the first metric of the evaluation.
    """

    priority = "LOW"  # after EMAHook has put the weights back, before the checkpoint notes the new best

    def __init__(self, metric: str | None = None) -> None:
        self.metric = metric
        self._since = time.perf_counter()

    def before_train(self, runner: Runner) -> None:
        self._since = time.perf_counter() - runner.message_hub.runtime_info.get("seconds_trained", 0.0)

    def after_train_epoch(self, runner: Runner) -> None:
        self._note_time(runner)

    def _note_time(self, runner: Runner) -> None:
        # kept with the checkpoint, so that the time of a resumed run is that of all its parts
        runner.message_hub.update_info("seconds_trained", time.perf_counter() - self._since)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        metrics = {k: float(v) for k, v in (metrics or {}).items() if isinstance(v, int | float)}
        if not metrics or runner._train_loop is None:
            return
        self._note_time(runner)
        info = runner.message_hub
        info.update_info("last_metrics", {"epoch": runner.epoch, **metrics})
        name = self._name(runner, metrics)
        sign = -1.0 if "loss" in name else 1.0
        best = info.runtime_info.get("best_metrics", {}).get(name)
        if best is None or sign * metrics[name] > sign * best:
            info.update_info("best_metrics", {"epoch": runner.epoch, **metrics})
            self._write(runner, "best.safetensors", metrics)

    def after_train(self, runner: Runner) -> None:
        self._note_time(runner)
        self._write(runner, "last.safetensors", runner.message_hub.runtime_info.get("last_metrics", {}))

    def _name(self, runner: Runner, metrics: dict[str, float]) -> str:
        name = self.metric
        if name is None:
            saver = next((h for h in runner.hooks if isinstance(h, AtomicCheckpointHook)), None)
            wanted = (getattr(saver, "save_best", None) or ["auto"])[0]
            name = next(iter(metrics)) if wanted == "auto" else wanted
        if name not in metrics:
            raise TrainingError(
                f"the best weights are chosen by {name!r}, but the evaluation gives {', '.join(metrics)}"
            )
        return name

    @staticmethod
    def _write(runner: Runner, name: str, metrics: Mapping[str, float]) -> None:
        if not is_main_process():
            return
        net = find_net(averaged_model(runner))
        if net is not None:
            meta = {"metrics": dict(metrics), "epoch": runner.epoch, **_for_prediction(runner)}
            save_weights(Path(runner.work_dir) / name, net.state_dict(), net.spec, **meta)  # type: ignore[arg-type]


def _for_prediction(runner: Runner) -> dict[str, Any]:
    """What tools/predict.py and tools/test.py want to know of a classifier besides its weights; of a detector, whose
    backbone alone is written, nothing."""
    from prunet_zoo.mm.predict import classifier_meta

    return classifier_meta(runner.cfg, runner.train_dataloader.dataset) if "backbone" not in runner.cfg.model else {}


def averaged_model(runner: Runner) -> nn.Module:
    """The run's model with the weights that are to be used: those of `EMAHook` where it is on."""
    for hook in runner.hooks:
        if isinstance(hook, EMAHook) and hasattr(hook, "ema_model"):
            return hook.ema_model.module
    return unwrap(runner.model)


def unwrap(model: Any) -> Any:
    """The model within DDP's wrapper."""
    return model.module if is_model_wrapper(model) else model


def find_net(model: nn.Module) -> nn.Module | None:
    """The network of a spec in an MMEngine model: the classifier's ``net``, a detector's ``backbone`` if a PruNet."""
    for name, kinds in (("net", NetSpec | PrunedSpec), ("backbone", NetSpec)):
        net = getattr(model, name, None)
        if isinstance(getattr(net, "spec", None), kinds):
            return net
    return None
