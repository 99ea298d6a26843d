"""PruNet: the backbone of a `NetSpec` as an MMEngine module, for mmdet, mmseg and mmpretrain configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from mmengine.model.weight_init import update_init_info
from mmengine.runner import CheckpointLoader

from prunet_zoo.errors import CheckpointError, PrunetError, SpecError
from prunet_zoo.mm.scheme import fit_names, local_file
from prunet_zoo.models import PruNetBackbone, load_state, load_weights
from prunet_zoo.models.weights import check_form
from prunet_zoo.registry import MODELS, register
from prunet_zoo.spec import NetSpec
from prunet_zoo.zoo.index import find_model, is_zoo


class StrictBackbone(BaseModule):
    """A backbone whose ``init_cfg`` of type Pretrained is strict: every tensor of it must be in the checkpoint."""

    init_cfg: dict[str, Any] | list[dict[str, Any]] | None

    def init_weights(self) -> None:
        """Apply ``init_cfg``: what MMEngine's initialisers do, then the checkpoint or else the backbone's own start."""
        if self._is_init:
            return
        configured = self.init_cfg
        items = [configured] if isinstance(configured, Mapping) else list(configured or [])
        pretrained = [item for item in items if item["type"] in ("Pretrained", PretrainedInit)]
        self.init_cfg = [item for item in items if item not in pretrained]
        try:
            super().init_weights()
        finally:
            self.init_cfg = configured
        self._start(bool(pretrained))  # again: an initialiser of the detector's reaches here as well
        for item in pretrained:
            self._load(item)

    def _start(self, configured: bool) -> None:
        """Load the weights that the backbone brings itself; ``configured``: ``init_cfg`` names a checkpoint."""

    def _load(self, cfg: Mapping[str, Any]) -> None:
        """Load one ``dict(type='Pretrained', …)``."""
        if not cfg.get("checkpoint"):
            raise CheckpointError("init_cfg of type 'Pretrained' needs 'checkpoint', the path or URL of a weights file")
        checkpoint, prefix = str(cfg["checkpoint"]), cfg.get("prefix")
        if prefix and not prefix.endswith("."):
            prefix += "."
        self._loaded(self._take(read_state(checkpoint), prefix, checkpoint), checkpoint)

    def _loaded(self, names: list[str], origin: str) -> None:
        kind = type(self).__name__
        print_log(f"{kind}: loaded all {len(names)} tensors of the backbone from {origin}", logger="current")
        if hasattr(self, "_params_init_info"):  # MMEngine's record of where each parameter's value comes from
            update_init_info(self, init_info=f"{kind}: loaded from {origin}")

    def _take(self, state: Mapping[str, torch.Tensor], prefix: str | None, origin: str) -> list[str]:
        """Copy the weights of the backbone out of ``state``; returns their names, raises `CheckpointError`."""
        return load_weights(self, state, prefix=prefix, origin=origin)


@register(MODELS)
class PruNet(PruNetBackbone, StrictBackbone):
    """`PruNetBackbone` with MMEngine's ``init_cfg``. Image (B, 3, H, W) → tuple of maps, one for each of out_indices.

    ``detector.backbone.switch_to_deploy()`` folds rep blocks for deployment, see `PruNetBackbone.switch_to_deploy`.

    Args:
        arch: listed name, path of a spec (``.json``) or of weights, dict or `NetSpec`. Of a weights file
            (``.safetensors``, spec inside, or ``prunet://NAME``) the backbone's weights are loaded too, unless
            ``init_cfg`` is Pretrained.
        out_indices: feature levels by stride: 0 is stride 2, 1 is stride 4, …
        frozen_stages, norm_cfg, norm_eval, with_cp, drop_path_rate: see `PruNetBackbone`.
        usual_padding: maps of ceil(side / stride) px, which necks such as PAFPN need, also of GPUNet-0/1/2, whose fused
            blocks were trained without padding: see `PruNetBackbone`. False keeps the classifier's maps exactly.
        init_cfg: as in MMEngine. ``dict(type='Pretrained', checkpoint=…, prefix=…)`` is strict here: every tensor of
            the backbone must be in the checkpoint (a classifier's, a detector's or a backbone's; ``prefix`` is found
            when not given), else it raises. ``checkpoint`` is a file, or an address such as ``prunet://prunet_p0``.

    Raises:
        UnknownNameError, SpecError: a bad argument; the message says what is allowed.
        CheckpointError: when a weights file does not fit (the one in ``init_cfg``: on `init_weights`).
    """

    def __init__(
        self,
        arch: str | Path | dict[str, Any] | NetSpec,
        out_indices: Sequence[int] = (1, 2, 3, 4),
        frozen_stages: int = -1,
        norm_cfg: Mapping[str, Any] | None = None,
        norm_eval: bool = False,
        with_cp: bool = False,
        drop_path_rate: float = 0.0,
        usual_padding: bool = True,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        options = (frozen_stages, norm_cfg, norm_eval, with_cp, drop_path_rate, usual_padding)
        super().__init__(plain(arch), out_indices, *options)
        self.init_cfg = init_cfg

    fits_zoo_names = True  # `_load_from_state_dict` renames, and raises where nothing fits

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also take a classifier's names (``load_checkpoint(backbone, 'prunet://prunet_p0')``)."""
        check_form(self, state_dict, [prefix + other for other in ("", "backbone.", "net.")])
        fit_names(state_dict, prefix, self, own="")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _start(self, configured: bool) -> None:
        if self._arch_weights is not None and not configured:
            self._load({"checkpoint": self._arch_weights})

    def _take(self, state: Mapping[str, torch.Tensor], prefix: str | None, origin: str) -> list[str]:
        try:
            return super()._take(state, prefix, origin)
        except CheckpointError as error:
            held = find_model(origin).arch if is_zoo(origin) else None
            if held in (None, self.spec.name):
                raise
            raise CheckpointError(
                f"{origin} holds {held}, the network is {self.spec.name}: change init_cfg.checkpoint too ({error})"
            ) from None


def read_state(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, or of what lies at an address that one of MMEngine's loaders knows.

    Raises:
        CheckpointError: missing or damaged. UnknownNameError, DownloadError: of a model of the zoo.
    """
    return load_remote(str(checkpoint)) if "://" in str(checkpoint) else load_state(checkpoint)


def load_remote(url: str) -> dict[str, torch.Tensor]:
    """Read the state dict behind a URL or scheme with MMEngine's loaders; raises `CheckpointError` if it cannot."""
    try:
        data = CheckpointLoader.load_checkpoint(url, map_location="cpu")
    except PrunetError:
        raise  # of the zoo: it says itself what to do
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"cannot load {url!r} ({error}); give the path of a file (.safetensors or .pth), an https:// address, "
            "prunet:// and a name of the zoo, or a scheme that MMEngine knows"
        ) from error
    state = data.get("state_dict", data) if isinstance(data, Mapping) else None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"what lies at {url!r} holds no state dict")
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def plain(arch: Any) -> str | Path | dict[str, Any] | NetSpec:
    """Turn a spec written into a config (MMEngine's `ConfigDict`, a dict with its own rules) into plain data, and
    ``prunet://NAME`` into the path of its weights."""
    if isinstance(arch, Mapping):
        return {key: plain_value(value) for key, value in arch.items()}
    if is_zoo(arch):
        return local_file(arch)
    if isinstance(arch, str | Path | NetSpec):
        return arch
    raise SpecError(f"arch must be a name, a path, a dict or a NetSpec, got {type(arch).__name__}")


def plain_value(value: Any) -> Any:
    """Turn MMEngine's `ConfigDict` at any depth into plain dicts and lists."""
    if isinstance(value, Mapping):
        return {key: plain_value(item) for key, item in value.items()}
    return [plain_value(item) for item in value] if isinstance(value, list | tuple) else value
