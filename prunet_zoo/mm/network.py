"""What ``--arch`` and ``--weights`` do to a config's model: the network, what follows from it, where it starts from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log

from prunet_zoo.errors import CheckpointError
from prunet_zoo.mm.backbone import plain
from prunet_zoo.mm.channels import follow_spec
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.levels import OURS, fit_levels
from prunet_zoo.mm.preprocess import follow_weights
from prunet_zoo.mm.replace import put_spec
from prunet_zoo.mm.scheme import local_file, zoo_spec
from prunet_zoo.models.backbone import resolve_arch
from prunet_zoo.models.pruned import PrunedSpec, is_pruned_file, load_pruned_spec
from prunet_zoo.spec import NetSpec
from prunet_zoo.zoo.index import is_zoo


def is_detection(cfg: Config) -> bool:
    """Whether the config's model has a backbone of its own, as mmdet's have; else it is our classifier."""
    return "backbone" in cfg.model


def set_arch(cfg: Config, arch: str | Path | NetSpec | PrunedSpec | None) -> None:
    """Put an architecture (``--arch``: name, spec, weights file or ``prunet://NAME``) into the model, and what follows.

    None keeps the config's. The spec itself goes into the config, so that its copy in the work directory depends on no
    other file. A detector's backbone of another known family is replaced by a PruNet with maps of the same strides, and
    any by a TimmBackbone where ``arch`` is a network of timm that was cut (see `put_spec`); the neck's channels and
    whatever depends on its levels follow. What changes is said in the log.

    Raises:
        ConfigError: ``arch`` for a model that takes none, or levels that the detector cannot work with.
    """
    if not is_detection(cfg):
        _set_classifier_arch(cfg, arch)
        return
    if cfg.get("default_scope") == "mmdet":
        register_mmdet()  # which necks take in_channels, and heads' defaults, are known of registered ones alone
    scope = cfg.get("default_scope")
    strides: list[int] | None = None
    told: list[str] = []
    arch = cfg.model.backbone.get("arch") if arch is None and cfg.model.backbone.get("type") in OURS else arch
    if isinstance(arch, Mapping):
        arch = NetSpec.from_dict(plain(arch))
    if arch is not None:
        cfg.model.backbone, strides, told = put_spec(cfg.model, _find_spec(arch))
    cfg.model, changes = fit_levels(cfg.model, scope, strides)
    if changes:
        told.append("levels follow the network: " + ", ".join(changes))
    if told:
        print_log("--arch: " + "; ".join(told), "current")
    cfg.model = follow_spec(cfg.model, scope)


def _set_classifier_arch(cfg: Config, arch: str | Path | NetSpec | PrunedSpec | None) -> None:
    ours = str(cfg.model.get("type")).removeprefix("prunet_zoo.") == "PruNetClassifier"
    if arch is not None and not ours:
        raise ConfigError(f"--arch needs a PruNet in the config's model, which has {cfg.model.get('type')!r}")
    arch = cfg.model.get("arch") if arch is None else arch
    if ours and isinstance(arch, str | Path | NetSpec | PrunedSpec):
        cfg.model.arch = _find_spec(arch).to_dict()


def _find_spec(arch: str | Path | NetSpec | PrunedSpec) -> NetSpec | PrunedSpec:
    if isinstance(arch, NetSpec | PrunedSpec):
        return arch
    if str(arch).endswith(".safetensors") or is_zoo(arch):
        print_log(f"of {arch} the architecture alone is taken; --weights {arch} starts from its weights", "current")
    if is_zoo(arch):
        return zoo_spec(str(arch))
    return load_pruned_spec(arch) if is_pruned_file(arch) else resolve_arch(arch)


def register_mmdet() -> None:
    """Put mmdet's modules into its registries; raises `ConfigError` where mmdet cannot be imported."""
    try:
        from mmdet.utils import register_all_modules
    except ImportError as error:
        raise ConfigError(
            f"the config is mmdet's, which cannot be imported ({error}); pip install 'prunet-zoo[mm]'"
        ) from None
    register_all_modules(init_default_scope=False)


def set_weights(cfg: Config, weights: str | Path | None) -> None:
    """Start from a classifier's weights (``--weights``, a file or an address such as ``prunet://prunet_p0``): the whole
    classifier, or a detector's backbone, which then also normalises images as these weights were trained.

    A detector without weights whose backbone is to stay frozen is warned of.

    Raises:
        CheckpointError: there is no such file. UnknownNameError, DownloadError: of a model of the zoo.
    """
    if weights is None:
        _warn_of_random(cfg)
        return
    if "://" not in str(weights) and not Path(weights).is_file():
        raise CheckpointError(f"weights file {weights} does not exist")
    local_file(weights)  # fetched now: nothing is built in vain where it cannot be had
    holder = cfg.model.backbone if is_detection(cfg) else cfg.model
    holder.pop("pretrained", None)
    holder.pop("init_cfg", None)
    holder.init_cfg = {"type": "Pretrained", "checkpoint": str(weights)}
    if is_detection(cfg):
        follow_weights(cfg, weights)


def _warn_of_random(cfg: Config) -> None:
    """Say where a backbone with random weights, or a part of it, is not to be trained."""
    if not is_detection(cfg) or cfg.get("load_from"):
        return
    backbone = cfg.model.backbone
    if backbone.get("type") not in OURS and not backbone.get("arch"):
        return
    fixed = [key for key, off in (("frozen_stages", -1), ("norm_eval", False)) if backbone.get(key, off) != off]
    if fixed and not backbone.get("init_cfg") and not str(backbone.get("arch")).endswith(".safetensors"):
        off = " ".join(f"model.backbone.{key}={-1 if key == 'frozen_stages' else False}" for key in fixed)
        print_log(
            f"the backbone starts from random weights, but {' and '.join(fixed)} fix a part of it: give --weights "
            f"FILE, or --cfg-options {off}",
            "current",
            logging.WARNING,
        )
