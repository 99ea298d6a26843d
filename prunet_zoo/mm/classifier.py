"""PruNetClassifier: the classifier of a `NetSpec`, or a cut network of timm, as an MMEngine model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy

from prunet_zoo.mm.backbone import plain, read_state
from prunet_zoo.mm.scheme import fit_names
from prunet_zoo.mm.timm_backbone import set_norms
from prunet_zoo.models import create_model, load_weights
from prunet_zoo.models.layers import make_norm_factory
from prunet_zoo.models.pruned import (
    PrunedSpec,
    build_pruned,
    create_start,
    head_names,
    is_pruned,
    is_pruned_file,
    load_pruned_spec,
    with_classes,
)
from prunet_zoo.registry import MODELS, register
from prunet_zoo.spec import NetSpec


@register(MODELS)
class PruNetClassifier(BaseModel):
    """Network and cross-entropy. Batches are ``inputs`` (B, 3, H, W), normalised, and ``label`` (B,).

    Args:
        arch: listed name, path of a spec or of weights with their spec, ``prunet://NAME``, dict or `NetSpec`; or the
            `PrunedSpec`, dict or ``spec.json`` of a network of timm that a search has cut, without weights.
        num_classes: classes of the head; None takes the spec's.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block.
        norm_cfg: see `prunet_zoo.models.layers.make_norm_factory`.
        label_smoothing: share of the target spread over all classes.
        mixup: arguments of timm's `Mixup` (``mixup_alpha``, ``cutmix_alpha``, ``prob``, …); None is off. It draws whole
            pairs, so batches must have an even size (``drop_last=True``).
        init_cfg: ``dict(type='Pretrained', checkpoint=path, prefix=None)`` loads every tensor of the network from the
            file or address (``prunet://prunet_p0``) or fails; only a head for another number of classes starts fresh.
            Other types as MMEngine has them.
        data_preprocessor: MMEngine's; the default only moves the batch to the device.

    Raises:
        UnknownNameError, SpecError: bad ``arch``.
        CheckpointError: weights missing, damaged or of another network (when weights are initialised).
    """

    fits_zoo_names = True  # `_load_from_state_dict` renames, and raises where nothing fits

    def __init__(
        self,
        arch: str | Path | dict[str, Any] | NetSpec | PrunedSpec,
        num_classes: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_cfg: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
        mixup: Mapping[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
        data_preprocessor: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        rates = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
        own: Any = arch if isinstance(arch, PrunedSpec) else plain(arch)
        self.net: Any
        if isinstance(own, PrunedSpec) or is_pruned(own) or (isinstance(own, str | Path) and is_pruned_file(own)):
            self.net = _cut_network(load_pruned_spec(own), num_classes, rates)
            set_norms(self.net, norm_cfg, self.net.spec.name)
        else:
            self.net = create_model(own, num_classes, **rates, norm=make_norm_factory(norm_cfg))
        self.label_smoothing = label_smoothing
        self.mixup = None
        if mixup:
            classes = {"num_classes": self.net.num_classes, "label_smoothing": label_smoothing}
            self.mixup = Mixup(**{**classes, **mixup})

    @property
    def spec(self) -> NetSpec | PrunedSpec:
        """The network's architecture."""
        return self.net.spec

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also take the network's bare names, and those with ``backbone.`` before them (``load_from='prunet://…'``)."""
        fit_names(state_dict, prefix, self.net, own="net.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def init_weights(self) -> None:
        """Load ``init_cfg``'s weights; without it, keep the initialisation the network was built with."""
        if isinstance(self.init_cfg, Mapping) and self.init_cfg.get("type") == "Pretrained":
            load_pretrained(self.net, self.init_cfg["checkpoint"], self.init_cfg.get("prefix"))
            self._is_init = True
        elif self.init_cfg:
            super().init_weights()

    def forward(self, inputs: torch.Tensor, label: torch.Tensor | None = None, mode: str = "tensor") -> Any:
        """``'tensor'``: logits (B, classes). ``'loss'``: dict with the loss. ``'predict'``: one dict an image.

        Raises:
            ValueError: unknown mode, or ``'loss'`` without labels.
        """
        if mode == "loss":
            if label is None:
                raise ValueError("mode 'loss' needs labels")
            return {"loss": self._loss(inputs, label)}
        logits = self.net(inputs)
        if mode == "tensor":
            return logits
        if mode == "predict":
            scores = logits.float().softmax(1)
            labels = [None] * len(scores) if label is None else label.tolist()
            return [
                {"pred_scores": score, "pred_label": int(top), "gt_label": truth}
                for score, top, truth in zip(scores.cpu(), scores.argmax(1).tolist(), labels, strict=True)
            ]
        raise ValueError(f"mode must be 'loss', 'predict' or 'tensor', got {mode!r}")

    def _loss(self, inputs: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        if self.mixup is not None:
            inputs, soft = self.mixup(inputs, label)
            return SoftTargetCrossEntropy()(self.net(inputs).float(), soft)
        return F.cross_entropy(self.net(inputs).float(), label, label_smoothing=self.label_smoothing)


def _cut_network(spec: PrunedSpec, num_classes: int | None, rates: dict[str, float]) -> torch.nn.Module:
    """The network of a spec with fresh weights and, where they are not 0, timm's dropout and stochastic depth."""
    spec = spec if num_classes is None else with_classes(spec, num_classes)
    given = {name: rate for name, rate in rates.items() if rate}
    return build_pruned(spec, create_start(spec.replace(options={**spec.options, **given}, shapes={})))


def load_pretrained(
    net: torch.nn.Module, checkpoint: str | Path, prefix: str | None = None, strict_head: bool = False
) -> list[str]:
    """Load a classifier's weights strictly; a head of another number of classes is left as it is, unless `strict_head`.

    Returns:
        Names that were loaded.

    Raises:
        CheckpointError: anything else is missing or of another shape.
    """
    state = read_state(checkpoint)
    own = net.state_dict()
    skip = () if strict_head else tuple(f"{head}." for head in head_names(net) if not _head_fits(state, own, head))
    if prefix and not prefix.endswith("."):
        prefix += "."
    return load_weights(net, state, prefix, skip, origin=checkpoint)


def _head_fits(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], head: str) -> bool:
    """Whether a checkpoint has a layer ``head``, whatever stands before its name, of the network's shape."""
    name = f"{head}.weight"
    found = sorted((key for key in state if key == name or key.endswith(f".{name}")), key=len)
    return bool(found) and name in own and state[found[0]].shape == own[name].shape
