"""``--auto-scale-lr`` for schedules that name learning rates: MMEngine scales the optimiser's alone.

`OneCycleLR` replaces the optimiser's rate by its ``eta_max``, and others end at an ``eta_min``. These are scaled by the
same factor here, so that the rate of every step is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.runner import Runner

from prunet_zoo.mm.cli import ConfigError

# which arguments of a schedule are learning rates; what else it takes is relative to the optimiser's
_RATES: dict[str, tuple[str, ...]] = {
    "ConstantLR": (),
    "CosineAnnealingLR": ("eta_min",),
    "CosineRestartLR": ("eta_min",),
    "ExponentialLR": (),
    "LinearLR": (),
    "MultiStepLR": (),
    "OneCycleLR": ("eta_max",),
    "PolyLR": ("eta_min",),
    "QuadraticWarmupLR": (),
    "ReduceOnPlateauLR": ("min_value",),
    "StepLR": (),
}


def scale_schedules(runner: Runner) -> None:
    """Scale the learning rates that a runner's schedules name as `Runner.scale_lr` scales the optimiser's.

    To be called before the runner trains; without ``auto_scale_lr.enable`` nothing is changed.

    Raises:
        ConfigError: a schedule or a value is of a kind that is not known; batch size or base batch size is missing.
    """
    auto = runner.auto_scale_lr or {}
    if not auto.get("enable"):
        return
    batch = (runner._train_dataloader or {}).get("batch_size")
    if not (batch and auto.get("base_batch_size")):
        raise ConfigError("--auto-scale-lr needs train_dataloader.batch_size and auto_scale_lr.base_batch_size")
    factor = runner.world_size * batch / auto["base_batch_size"]
    runner.param_schedulers = scaled(runner.param_schedulers, factor)


def scaled(schedules: Any, factor: float) -> Any:
    """A copy of schedules' configs (one, a list, or a dict of them by optimiser) with learning rates times ``factor``.

    Raises:
        ConfigError: see `scale_schedules`.
    """
    if isinstance(schedules, list | tuple):
        return [scaled(schedule, factor) for schedule in schedules]
    if not isinstance(schedules, Mapping):
        if schedules is None:
            return None
        raise ConfigError(f"--auto-scale-lr cannot scale the schedule {schedules!r}; leave it out and set the rate")
    if "type" not in schedules:
        return {name: scaled(entry, factor) for name, entry in schedules.items()}
    kind = schedules["type"]
    name = (kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))).rpartition(".")[2]
    if name.endswith("Momentum"):
        return schedules
    if name not in _RATES:
        raise ConfigError(
            f"--auto-scale-lr does not know which values of the schedule {name} are learning rates; leave it out and "
            f"set the rates yourself (times {factor:g})"
        )
    changed = {key: _times(schedules[key], factor, f"{name}.{key}") for key in _RATES[name] if key in schedules}
    return {**schedules, **changed}


def _times(value: Any, factor: float, what: str) -> Any:
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [_times(item, factor, what) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"--auto-scale-lr cannot scale {what} = {value!r}, which is not a number; leave it out")
    return value * factor
