"""Publish a trained network: one safetensors file that works alone and tells what it is and what it scores *now*."""

from __future__ import annotations

import copy
import json
import shlex
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from prunet_zoo.errors import CheckpointError, PrunetError
from prunet_zoo.files import sha256_of, write_atomic
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.hooks import find_net
from prunet_zoo.mm.network import is_detection
from prunet_zoo.mm.predict import checkpoint_meta, classifier_classes, detector_classes, load_detector, preprocess_of
from prunet_zoo.mm.publish_config import write_config
from prunet_zoo.mm.testing import fit_loader, prepare_test
from prunet_zoo.mm.training import METRICS, load_strictly, test
from prunet_zoo.models import load_state, save_weights
from prunet_zoo.spec import NetSpec
from prunet_zoo.zoo.index import IMAGENET
from prunet_zoo.zoo.predict import class_names, load_classifier


class PublishError(PrunetError, ValueError):
    """A network cannot be published as it was asked for."""


def publish(
    cfg: Config,
    checkpoint: str | Path,
    out: str | Path,
    licence: str,
    name: str | None = None,
    arch: str | Path | None = None,
    data_root: str | Path | None = None,
    commands: Sequence[str] = (),
    force: bool = False,
) -> dict[str, Any]:
    """Write the weights of a classifier or detector with all that a user needs to predict with them.

    The optimizer and whatever else a run keeps is left behind; of a run with averaged weights (`EMAHook`) these are
    taken, as its checkpoints have them. The tensors are evaluated on the config's test data as they will be in the
    file, and the file is tried alone before it takes its place.

    Args:
        cfg: the config that the network was trained with.
        checkpoint: a run's ``.pth``, or a classifier's ``.safetensors``, whose spec is then the architecture.
        out: the ``.safetensors`` to write.
        licence: under which others may use it, such as ``'Apache-2.0'``.
        name: what the network is called; None: the name of ``out``.
        arch: architecture, where the config has another.
        data_root: images to test a classifier on, where they are not those of the config.
        commands: that made the checkpoint; empty: the one in the ``metrics.json`` beside it.
        force: replace ``out`` if it is there.

    Returns:
        The metadata written, with ``file``, ``sha256`` and ``bytes``.

    Raises:
        PublishError: ``out`` exists or has another ending, or no command is known.
        CheckpointError: the checkpoint does not fit, holds more than the network, or numbers that are not finite.
        ConfigError, DataError: the config or its test data.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise PublishError(f"--out must end in .safetensors, got {out}")
    if out.exists() and not force:
        raise PublishError(f"{out} exists; give another --out, or --force to replace it")
    if not Path(checkpoint).is_file():
        raise CheckpointError(f"checkpoint {checkpoint} does not exist")
    made_by = list(commands) or _recorded_command(Path(checkpoint))
    detection = is_detection(cfg)
    prepare_test(
        cfg, str(checkpoint), None if arch is None else str(arch), None if data_root is None else str(data_root)
    )
    state, spec = _take_weights(cfg, checkpoint)
    meta = {"name": name or out.stem, **_describe(cfg, checkpoint, spec), "licence": licence}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        trial = Path(folder) / "weights.safetensors"
        save_weights(trial, state, spec)
        meta |= _evaluate(cfg, trial, Path(folder) / "run")
        words = ["python", "tools/publish.py", meta["config"], str(checkpoint), "--out", str(out), "--licence", licence]
        meta["command"] = [*made_by, shlex.join(words)]
        save_weights(trial, state, spec, **meta)
        (load_detector if detection else load_classifier)(trial, device="cpu")  # raises where the file is not enough
        data = trial.read_bytes()
    write_atomic(out, data)
    return {**meta, "file": str(out), "sha256": sha256_of(out), "bytes": len(data)}


def _recorded_command(checkpoint: Path) -> list[str]:
    """The command that ``tools/train.py`` has written beside its checkpoints."""
    try:
        return [str(json.loads((checkpoint.parent / METRICS).read_text(encoding="utf-8"))["command"])]
    except (OSError, ValueError, KeyError, TypeError):
        raise PublishError(
            f"there is no {METRICS} of tools/train.py beside {checkpoint}, so how the network was made is not known; "
            "say it with --command '…'"
        ) from None


def _take_weights(cfg: Config, checkpoint: str | Path) -> tuple[dict[str, torch.Tensor], NetSpec]:
    """The tensors of the config's model out of the checkpoint: all of them and nothing else; and the network's spec."""
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope")):
        model: nn.Module = MODELS.build(copy.deepcopy(cfg.model))
    net = find_net(model)
    if net is None or not isinstance(net.spec, NetSpec):
        raise ConfigError(f"a published network has a PruNet in it; the config's model is {cfg.model.get('type')!r}")
    load_strictly(model, checkpoint)
    state = dict((model if is_detection(cfg) else net).state_dict())
    left = [key for key in load_state(checkpoint) if not any(key == name or key.endswith(f".{name}") for name in state)]
    if left:
        raise CheckpointError(
            f"{checkpoint} holds {len(left)} tensors that the config's model does not have: {', '.join(left[:3])}; "
            "give the config it was trained with"
        )
    bad = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise CheckpointError(f"{checkpoint} holds numbers that are not finite, in {', '.join(bad[:3])}")
    return state, net.spec


def _describe(cfg: Config, checkpoint: str | Path, spec: NetSpec) -> dict[str, Any]:
    """What the file tells of the network, but what was measured."""
    filename = Path(cfg.filename or "")
    try:
        shown = filename.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        shown = filename.name  # no path of this machine in a file for others
    known = checkpoint_meta(checkpoint)
    if is_detection(cfg):
        classes = detector_classes(cfg, known)
        return {"task": "detection", "config": shown, "classes": classes, "config_text": write_config(cfg)}
    names = classifier_classes(cfg, known, spec.num_classes)
    return {
        "task": "classification",
        "config": shown,
        "classes": IMAGENET if names == class_names(IMAGENET) else names,
        "preprocess": preprocess_of(cfg).model_dump(mode="json"),
    }


def _evaluate(cfg: Config, weights: Path, work_dir: Path) -> dict[str, Any]:
    """Metrics on the config's test data, measured now, with where and when."""
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f"publish_{uuid.uuid4().hex}"  # MMEngine keeps what belongs to a name; the folder goes
    if cfg.get("test_dataloader") is not None:
        fit_loader(cfg.test_dataloader)
    record = test(cfg, weights)
    metrics = {key: value for key, value in record["metrics"].items() if value != -1}  # COCO's: nothing of that size
    if not metrics:
        raise ConfigError("the config's test_evaluator gives no metric")
    keys = ["images", "params", "device", "threads", "date", "versions"]
    if not is_detection(cfg):  # a detector's MACs would be its backbone's alone
        keys += ["macs", "input_size"]
    return {"metrics": metrics, **{key: record[key] for key in keys}}
