"""What ``--arch`` and ``--weights`` do to a config's model: the network, what follows from it, where it starts from."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log

from prunet_zoo.errors import CheckpointError
from prunet_zoo.mm.channels import follow_spec
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.scheme import local_file, zoo_spec
from prunet_zoo.models.backbone import resolve_arch
from prunet_zoo.spec import NetSpec
from prunet_zoo.zoo.index import is_zoo


def is_detection(cfg: Config) -> bool:
    """Whether the config's model has a backbone of its own, as mmdet's have; else it is our classifier."""
    return "backbone" in cfg.model


def set_arch(cfg: Config, arch: str | Path | NetSpec | None) -> None:
    """Put an architecture (``--arch``: name, spec, weights file or ``prunet://NAME``) into the model, and what follows.

    None keeps the config's. The spec itself goes into the config, so that its copy in the work directory depends on no
    other file; a neck's channels follow. A backbone other than PruNet is left alone.

    Raises:
        ConfigError: ``arch`` for a model that takes none.
    """
    holder = cfg.model.backbone if is_detection(cfg) else cfg.model
    ours = str(holder.get("type")).removeprefix("prunet_zoo.") in ("PruNet", "PruNetClassifier")
    if arch is not None and not ours:
        raise ConfigError(f"--arch needs a PruNet in the config's model, which has {holder.get('type')!r}")
    arch = holder.get("arch") if arch is None else arch
    if isinstance(arch, NetSpec):
        holder.arch = arch.to_dict()
    elif ours and isinstance(arch, str | Path):
        if str(arch).endswith(".safetensors") or is_zoo(arch):
            print_log(f"of {arch} the architecture alone is taken; --weights {arch} starts from its weights", "current")
        holder.arch = (zoo_spec(str(arch)) if is_zoo(arch) else resolve_arch(arch)).to_dict()
    if is_detection(cfg):
        if cfg.get("default_scope") == "mmdet":
            register_mmdet()  # which necks take in_channels is known of registered ones alone
        cfg.model = follow_spec(cfg.model, cfg.get("default_scope"))


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
    classifier, or a detector's backbone.

    Raises:
        CheckpointError: there is no such file. UnknownNameError, DownloadError: of a model of the zoo.
    """
    if weights is None:
        return
    if "://" not in str(weights) and not Path(weights).is_file():
        raise CheckpointError(f"weights file {weights} does not exist")
    local_file(weights)  # fetched now: nothing is built in vain where it cannot be had
    holder = cfg.model.backbone if is_detection(cfg) else cfg.model
    holder.pop("pretrained", None)
    holder.pop("init_cfg", None)
    holder.init_cfg = {"type": "Pretrained", "checkpoint": str(weights)}
