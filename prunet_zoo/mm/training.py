"""What tools/train.py and tools/test.py do, for classification and detection alike."""

from __future__ import annotations

import logging
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size, is_main_process
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from prunet_zoo.data.imagefolder import ImageFolderData
from prunet_zoo.errors import CheckpointError, few
from prunet_zoo.files import write_json
from prunet_zoo.mm.backbone import read_state
from prunet_zoo.mm.checkpoint import find_resumable
from prunet_zoo.mm.checks import check_batches, check_classes, check_files, check_pretrained
from prunet_zoo.mm.classifier import load_pretrained
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.coco_checks import check_coco
from prunet_zoo.mm.distributed import from_first, full_precision_on_cpu, processes
from prunet_zoo.mm.guard import check_work_dir, fingerprint_hash
from prunet_zoo.mm.hooks import InterruptHook, find_net, unwrap
from prunet_zoo.mm.interrupts import own_command
from prunet_zoo.mm.lr_scale import scale_schedules
from prunet_zoo.mm.metrics import NoDetectionsHook
from prunet_zoo.mm.progress import ProgressHook
from prunet_zoo.mm.scheme import local_file
from prunet_zoo.models import PruNetBackbone
from prunet_zoo.models.weights import compare, shapes
from prunet_zoo.version import __version__

METRICS = "metrics.json"
_ROBUST_HOOKS = (
    "SyncStatisticsHook",  # first: what a checkpoint holds is what all processes have
    "ExactResumeHook",
    "NonFiniteLossHook",
    "InterruptHook",
    "SaveSafetensors",
    "ProgressHook",
)


def make_data(cfg: Config) -> None:
    """Write the built-in digit scenes where the config's data is to be them and they are missing.

    The config says so by ``digit_scenes = dict(root=..., train=..., val=...)``, or by a ``data_root`` whose last folder
    is called ``digit_scenes``.
    """
    wanted = cfg.get("digit_scenes")
    roots = {str(root).rstrip("/") for root in _data_roots(cfg.to_dict()) if Path(root).name == "digit_scenes"}
    if not (wanted or roots):
        return
    from prunet_zoo.data.scenes import ensure_scenes, write_scenes

    def make() -> None:
        if wanted:
            write_scenes(**dict(wanted))
        else:
            for root in sorted(roots):
                ensure_scenes(root)

    from_first(make)


def _data_roots(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if isinstance(value.get("data_root"), str):
            yield value["data_root"]
        for item in value.values():
            yield from _data_roots(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _data_roots(item)


def make_robust(cfg: Config) -> None:
    """Give any config, mmdet's own too, what makes a run robust: whole checkpoints, exact resume, signals, NaN stop."""
    hooks = cfg.setdefault("default_hooks", {})
    saver = hooks.setdefault("checkpoint", {"type": "CheckpointHook", "interval": 1, "max_keep_ckpts": 3})
    if saver.get("type") == "CheckpointHook":
        saver.type = "AtomicCheckpointHook"
    custom = list(cfg.get("custom_hooks") or [])
    present = {hook.get("type") for hook in custom if isinstance(hook, Mapping)}
    cfg.custom_hooks = custom + [{"type": name} for name in _ROBUST_HOOKS if name not in present]
    loop = cfg.get("train_cfg")
    if loop is not None and (loop.get("type") == "EpochBasedTrainLoop" or loop.get("by_epoch") is True):
        loop.pop("by_epoch", None)
        loop.type = "ResumableEpochLoop"


def prepare_resume(cfg: Config) -> None:
    """Check the work directory and, with ``cfg.resume``, choose the checkpoint to go on from.

    Raises:
        TrainingError: the work directory belongs to a run of another config.
    """
    resume = bool(cfg.get("resume"))
    from_first(lambda: check_work_dir(cfg.work_dir, cfg, resume))
    if resume:
        newest = from_first(lambda: find_resumable(cfg.work_dir, fingerprint_hash(cfg)))
        cfg.resume, cfg.load_from = newest is not None, None if newest is None else str(newest)
        if newest is None:
            print_log(
                f"no checkpoint in {cfg.work_dir} to resume from: starting at the beginning", "current", logging.WARNING
            )


def train(cfg: Config) -> dict[str, Any]:
    """Train as the config says; returns what is written to ``metrics.json`` in the work directory.

    Raises:
        PrunetError: whatever the user can mend. `Interrupted` after a signal.
    """
    with processes(cfg):
        full_precision_on_cpu(cfg)
        make_data(cfg)
        make_robust(cfg)
        prepare_resume(cfg)
        runner = build_runner(cfg)
        try:
            runner.train()
        finally:
            close_hooks(runner)
        record = describe_run(runner, dict(runner.message_hub.runtime_info))
        if is_main_process():
            write_json(Path(runner.work_dir) / METRICS, record)
        return record


def build_runner(cfg: Config, training: bool = True) -> Runner:
    """The config's runner, whose data has been looked at.

    Args:
        cfg: the config.
        training: the runner is to train (or search); else it is to test.

    Raises:
        DataError: annotations or images are missing, are too few for a batch, or have other classes than the model.
        CheckpointError: the weights to start from are missing.
        ConfigError: ``auto_scale_lr`` with a schedule that cannot be scaled.
    """

    def look() -> None:
        parts = ("train", "val") if training else ("test",)
        check_files(cfg, parts)
        check_coco(cfg, parts)
        if training:
            check_pretrained(cfg.model)

    from_first(look)
    _lay_out_once()
    for part in ("train", "val", "test"):
        _fit_workers(cfg.get(f"{part}_dataloader"))
    runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    runner.register_hook(NoDetectionsHook())  # here, not in the config: a run that was begun without it can be resumed
    if training:
        scale_schedules(runner)
        check_batches(runner)
    check_classes(runner, training)
    return runner


def _lay_out_once() -> None:
    """MMEngine lays the config's text out anew for every checkpoint, about a second each: keep the last result."""
    module: Any = sys.modules[Config.__module__]
    usual, known = module.FormatCode, dict[str, tuple[str, bool]]()
    if usual.__name__ == "format_code":
        return

    def format_code(text: str, **options: Any) -> tuple[str, bool]:
        key = repr((text, options))
        if key not in known:
            known.clear()
            known[key] = usual(text, **options)
        return known[key]

    module.FormatCode = format_code


def _fit_workers(loader: Any) -> None:
    """Leave out what torch refuses of a dataloader without workers (``--cfg-options …_dataloader.num_workers=0``)."""
    if isinstance(loader, Mapping) and loader.get("num_workers", 1) == 0:
        loader["persistent_workers"] = False  # type: ignore[index]
        loader.pop("prefetch_factor", None)  # type: ignore[attr-defined]


def close_hooks(runner: Runner) -> None:
    """Take away the progress bar and the signal handlers, however the run ended."""
    for hook in runner.hooks:
        if isinstance(hook, ProgressHook):
            hook.close()
        elif isinstance(hook, InterruptHook):
            hook.signals.__exit__(None, None, None)


def test(cfg: Config, checkpoint: str | Path) -> dict[str, Any]:
    """Evaluate a checkpoint on the config's test data; every tensor of the model must be in it.

    Args:
        cfg: a config with ``test_dataloader`` and ``test_evaluator``.
        checkpoint: a run's ``.pth``, ``prunet://NAME``, or for a classifier ``.safetensors``.

    Raises:
        CheckpointError: missing, damaged, or of another model. ConfigError: the config has no test data.
        UnknownNameError, DownloadError: of a model of the zoo.
    """
    if cfg.get("test_dataloader") is None:
        raise ConfigError("the config has no test_dataloader, so there is nothing to test on")
    if "://" not in str(checkpoint) and not Path(checkpoint).is_file():
        raise CheckpointError(f"checkpoint {checkpoint} does not exist")
    with processes(cfg):
        from_first(lambda: local_file(checkpoint))
        make_data(cfg)
        cfg.resume, cfg.load_from = False, None
        runner = build_runner(cfg, training=False)
        load_strictly(runner.model, checkpoint)
        metrics = {k: float(v) for k, v in runner.test().items() if isinstance(v, int | float)}
        record = describe_run(runner, {"last_metrics": metrics})
        data = runner.test_dataloader.dataset
        return {**record, "checkpoint": str(checkpoint), "images": len(data), **_describe_images(data)}


def _describe_images(data: Any) -> dict[str, Any]:
    """Of images in folders: where they lie, and what their labels follow from."""
    folder = getattr(data, "data", None)
    if not isinstance(folder, ImageFolderData):
        return {}
    return {"data_root": str(folder.root), "labelled_by": folder.labelled_by}


def load_strictly(model: nn.Module, checkpoint: str | Path) -> None:
    """Load all weights of an MMEngine model (classifier or detector) from a file or an address.

    Raises:
        CheckpointError: something is missing or does not fit; names are given.
    """
    model = unwrap(model)
    net = find_net(model)
    if net is not None and not isinstance(net, PruNetBackbone):
        load_pretrained(net, checkpoint, strict_head=True)
        return
    state = read_state(checkpoint)
    own = model.state_dict()
    missing, _, wrong = compare(shapes(own), shapes(state))  # what else a training run has saved is left out
    if missing or wrong:
        what = f"lacks {len(missing)} tensors ({few(missing)})" if missing else f"has other shapes ({wrong[0]})"
        raise CheckpointError(
            f"{checkpoint} does not fit the config's model: it {what}. Give the config (or --arch) it was trained with."
        )
    model.load_state_dict({name: state[name] for name in own})


def summary(metrics: Mapping[str, float]) -> str:
    """Metrics in a line for the terminal."""
    return ", ".join(f"{name} {value:g}" for name, value in metrics.items()) or "not evaluated"


def describe_run(runner: Runner, info: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run: metrics, size of the network, seconds, and what is needed to make it again."""
    model = unwrap(runner.model)
    record: dict[str, Any] = {
        "task": "detection" if hasattr(model, "backbone") else "classification",
        "config": runner.cfg.filename or "",
        "metrics": info.get("last_metrics", {}),
        "best": info.get("best_metrics", {}),
        "seconds": round(float(info.get("seconds_trained", 0.0)), 2),
        "params": sum(p.numel() for p in model.parameters()),
    }
    net = find_net(model)
    if net is not None:
        spec: Any = net.spec
        record["arch"] = {"name": spec.name, "hash": spec.hash}
        record["input_size"] = runner.cfg.get("input_size") or spec.input_size
        record["macs"] = network_macs(net, record["input_size"])
        if isinstance(net, PruNetBackbone):
            record["backbone_params"] = sum(p.numel() for p in net.parameters())
    record.update(
        command=shlex.join(own_command("python")),
        processes=get_world_size(),
        device=device_name(),
        threads=torch.get_num_threads(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seed=runner.seed,
        versions={"prunet_zoo": __version__, "torch": torch.__version__, "python": platform.python_version()},
    )
    return record


def network_macs(net: nn.Module, input_size: int) -> int:
    """Multiply-accumulates of a classifier, or of a detector's backbone up to its last level, for one image."""
    spec: Any = net.spec
    if not isinstance(net, PruNetBackbone):
        return int(spec.macs(input_size))
    last = spec.feature_levels[net.out_indices[-1]]
    placed = (p for p in spec.placed(input_size) if (p.stage, p.index) <= (last.stage, last.block))
    return sum(p.block.macs(p.in_channels, p.in_size) for p in placed)


def device_name() -> str:
    """Name of the device that the run used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
