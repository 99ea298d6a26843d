"""PruNetClassifier: the image classifier of a `NetSpec`, with timm's uniform model face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prunet_zoo.models.blocks import build_stages
from prunet_zoo.models.layers import ConvNormAct, NormFactory, PooledHead, init_weights
from prunet_zoo.spec import NetSpec, load_spec


class PruNetClassifier(nn.Module):
    """Stages, tail, global average pooling, dropout, linear classifier.

    Args:
        spec: the architecture; its ``num_classes`` may be 0 (features only).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block.
        norm: factory of norm layers, BatchNorm by default.
    """

    def __init__(
        self, spec: NetSpec, drop_rate: float = 0.0, drop_path_rate: float = 0.0, norm: NormFactory | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.num_classes = spec.num_classes
        self.drop_rate = drop_rate
        self.num_features, self.head_hidden_size = spec.tail.out_channels, spec.tail.features
        self.feature_info = [
            {"num_chs": level.channels, "reduction": level.stride, "module": level.module}
            for level in spec.feature_levels
        ]
        self.stages = build_stages(spec, norm, drop_path_rate)
        last = spec.stages[-1].blocks[-1].out_channels
        self.tail = ConvNormAct(last, spec.tail.out_channels, act=spec.tail.act, eps=spec.bn_eps, norm=norm)
        self.head = PooledHead(spec.tail.out_channels, spec.tail.head_hidden, spec.tail.act)
        self.classifier = self._make_classifier()
        init_weights(self)

    def _make_classifier(self) -> nn.Module:
        return nn.Linear(self.head_hidden_size, self.num_classes) if self.num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one for ``num_classes`` (0: none)."""
        device = self.tail.conv.weight.device
        self.num_classes = num_classes
        self.spec = self.spec.replace(num_classes=num_classes)
        self.classifier = self._make_classifier().to(device)
        init_weights(self.classifier)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Image (B, 3, H, W) → map after the tail (B, num_features, H', W')."""
        for stage in self.stages:
            x = stage(x)
        return self.tail(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map after the tail → logits (B, num_classes), or the classifier's input (B, head_hidden_size) with ``pre_logits``."""
        x = self.head(x)
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def create_model(
    arch: str | Path | dict[str, Any] | NetSpec, num_classes: int | None = None, **options: Any
) -> PruNetClassifier:
    """Build a classifier from a listed name, a spec, a dict or the path of a spec (``.json``) or weights file.

    Args:
        arch: a path ending in ``.safetensors`` gives the network *with* the weights in that file.
        num_classes: classes of the head; None takes the spec's. With a weights file of another number of classes the
            head starts fresh.
        options: ``drop_rate``, ``drop_path_rate``, ``norm`` of `PruNetClassifier`.

    Raises:
        UnknownNameError, SpecError, CheckpointError: with what to do.
    """
    from prunet_zoo.models.weights import load_weights, read_weights_spec

    weights = str(arch) if str(arch).endswith(".safetensors") else None
    spec = read_weights_spec(weights) if weights else load_spec(arch)
    if num_classes is not None and num_classes != spec.num_classes:
        model = PruNetClassifier(spec.replace(num_classes=num_classes), **options)
        if weights:
            load_weights(model, weights, skip=("classifier.",))
        return model
    model = PruNetClassifier(spec, **options)
    if weights:
        load_weights(model, weights)
    return model
