"""--auto-scale-lr: the rate of every step is scaled, also where the schedule names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mmengine.hooks import Hook
from mmengine.runner import Runner

from prunet_zoo.mm.cli import ConfigError, load_config
from prunet_zoo.mm.lr_scale import scaled
from prunet_zoo.mm.training import build_runner, make_robust

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES: dict[str, Any] = {
    "one cycle": [dict(type="OneCycleLR", eta_max=8e-3, total_steps=2, pct_start=0.5, convert_to_iter_based=True)],
    "cosine": dict(type="CosineAnnealingLR", T_max=2, eta_min=1e-3, by_epoch=True, convert_to_iter_based=True),
    "cosine, relative": dict(type="CosineAnnealingLR", T_max=10, eta_min_ratio=0.1, by_epoch=False),
    "polynomial": [
        dict(type="LinearLR", start_factor=0.1, end=3, by_epoch=False),
        dict(type="PolyLR", eta_min=2e-3, begin=3, end=10, by_epoch=False),
    ],
}


class Rates(Hook):
    """Notes the learning rate of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.seen.append(runner.optim_wrapper.get_lr()["lr"][0])


def rates(config: Path, work_dir: Path, schedule: Any, **auto: Any) -> list[float]:
    cfg = load_config(config, {"train_cfg.max_epochs": 2, "log_level": "WARNING", "visualizer": None})
    cfg.param_scheduler, cfg.auto_scale_lr, cfg.work_dir = schedule, auto, str(work_dir)
    cfg.experiment_name = work_dir.name
    make_robust(cfg)
    runner, hook = build_runner(cfg), Rates()
    runner.register_hook(hook, priority="LOWEST")
    runner.train()
    return hook.seen


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_rate_changes_by_the_factor(tiny_config: Path, tmp_path: Path, name: str) -> None:
    plain = rates(tiny_config, tmp_path / f"{name} plain", SCHEDULES[name], enable=False, base_batch_size=32)
    half = rates(tiny_config, tmp_path / f"{name} half", SCHEDULES[name], enable=True, base_batch_size=32)  # it is 16
    assert len(plain) == 10 and len(set(plain)) > 4
    assert half == pytest.approx([rate / 2 for rate in plain], rel=1e-9)


def test_what_is_left_alone_and_what_is_refused() -> None:
    momentum = dict(type="CosineAnnealingMomentum", eta_min=0.5)
    several = {"a": [dict(type="mmengine.OneCycleLR", eta_max=[1.0, 2.0])], "b": momentum}
    assert scaled(several, 0.5) == {"a": [dict(type="mmengine.OneCycleLR", eta_max=[0.5, 1.0])], "b": momentum}
    assert several["a"][0]["eta_max"] == [1.0, 2.0]
    assert scaled(None, 2.0) is None and scaled(dict(type="PolyLR", eta_min=None), 2.0)["eta_min"] is None
    with pytest.raises(ConfigError, match="does not know which values of the schedule MyLR"):
        scaled([dict(type="MyLR", peak=1.0)], 2.0)
    with pytest.raises(ConfigError, match=r"cannot scale OneCycleLR\.eta_max = 'high'"):
        scaled(dict(type="OneCycleLR", eta_max="high"), 2.0)


def shipped() -> list[Path]:
    """The configs of runs; of the detectors on COCO their bases, which hold the schedules."""
    folders = ("classification", "detection", "search", "_base_/detectors")
    paths = [path for folder in folders for path in sorted((ROOT / "configs" / folder).glob("*.py"))]
    return [path for path in paths if path.parent.name != "detection" or not path.name.endswith("_coco.py")]


@pytest.mark.parametrize("path", shipped(), ids=lambda p: p.stem)
def test_shipped_schedules_can_be_scaled(path: Path) -> None:
    scaled(load_config(path).param_scheduler, 2.0)
