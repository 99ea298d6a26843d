"""PruNetClassifier: the image classifier of a `NetSpec`, with the uniform face of timm's models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from prunet_zoo.errors import SpecError
from prunet_zoo.models.blocks import build_stages, switch_to_deploy
from prunet_zoo.models.layers import ConvNormAct, NormFactory, PooledHead, init_weights
from prunet_zoo.spec import NetSpec, load_spec

POOLS = ("avg", "max", "avgmax", "")  # those that keep the number of features, which the spec tells


class PruNetClassifier(nn.Module):
    """Stages, tail, global pooling, head convolution where the spec has one, dropout, linear classifier.

    Feature levels are those of the spec: index 0 is the last map of stride 2, index 1 of stride 4, and so on.

    Args:
        spec: the architecture.
        num_classes: classes of the classifier, 0 for pooled features without one; None takes the spec's.
        in_chans: channels of the image; None takes the spec's.
        global_pool: ``'avg'``, ``'max'``, ``'avgmax'``, or ``''`` for none: the output is then a map, so that
            ``num_classes`` must be 0.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block.
        norm: factory of norm layers, BatchNorm by default.

    Attributes:
        spec: the architecture with the classes and image channels that the network has now.
        num_features: channels of `forward_features`; ``head_hidden_size``: of the classifier's input.
        feature_info: channels, stride (``reduction``) and module of each feature level.
        pretrained_cfg: what timm should know about the network; ``default_cfg`` is its older name.

    Raises:
        SpecError: an argument is out of range; the message says what is allowed.
    """

    def __init__(
        self,
        spec: NetSpec,
        num_classes: int | None = None,
        in_chans: int | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm: NormFactory | None = None,
    ) -> None:
        super().__init__()
        _check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        spec = _adapt(spec, num_classes, in_chans)
        _check_pool(global_pool, spec.num_classes)
        self.spec = spec
        self.num_classes, self.in_chans = spec.num_classes, spec.in_channels
        self.drop_rate = float(drop_rate)
        self.grad_checkpointing = False
        self.num_features, self.head_hidden_size = spec.tail.out_channels, spec.tail.features
        self.feature_info = _feature_info(spec)
        self.stages = build_stages(spec, norm, drop_path_rate)
        places = [(place.stage, place.index) for place in spec.placed()]
        # last block of each level, counted through all stages
        self._level_ends = [places.index((level.stage, level.block)) for level in spec.feature_levels]
        last = spec.stages[-1].blocks[-1].out_channels
        self.tail = ConvNormAct(last, spec.tail.out_channels, act=spec.tail.act, eps=spec.bn_eps, norm=norm)
        self.head = PooledHead(spec.tail.out_channels, spec.tail.head_hidden, spec.tail.act, global_pool)
        self.classifier = self._make_classifier()
        init_weights(self)
        self.pretrained_cfg = self.default_cfg = self._own_cfg()

    def _make_classifier(self) -> nn.Module:
        return nn.Linear(self.head_hidden_size, self.num_classes) if self.num_classes else nn.Identity()

    def _own_cfg(self) -> dict[str, Any]:
        """What the spec tells of timm's ``pretrained_cfg``; the zoo adds weights and preprocessing."""
        side = self.spec.input_size
        first = next(name for name, module in self.named_modules() if isinstance(module, nn.Conv2d))
        return {
            "architecture": self.spec.name,
            "input_size": (self.spec.in_channels, side, side),
            "num_classes": self.num_classes,
            "pool_size": list(self.spec.placed())[-1].out_size,
            "first_conv": first,
            "classifier": "classifier",
        }

    @property
    def global_pool(self) -> str:
        """Type of the global pooling; ``''`` for none."""
        return self.head.global_pool

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one for ``num_classes`` (0: none), on the same device and in the same type.

        ``global_pool`` changes the pooling too; None keeps it.
        """
        pool = self.head.global_pool if global_pool is None else global_pool
        spec = _adapt(self.spec, num_classes, None)
        _check_pool(pool, num_classes)
        if pool != self.head.global_pool:
            self.head.set_pool(pool)
            self.head.train(self.training)
        like = next(self.parameters())
        self.spec, self.num_classes = spec, num_classes
        self.classifier = self._make_classifier().to(device=like.device, dtype=like.dtype).train(self.training)
        init_weights(self.classifier)

    @torch.jit.ignore
    def switch_to_deploy(self) -> PruNetClassifier:
        """Fold the branches of every rep block, see `PruNetBackbone.switch_to_deploy`."""
        switch_to_deploy(self)
        return self

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass to save memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay besides norms and biases: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters for layer-wise learning rates: by block, or ``coarse`` by stage."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stages\.0\.", "blocks": [(blocks, None), (r"^tail\.", (99999,))]}

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Maps of the feature levels on the way to `forward_features`.

        Args:
            x: images (B, C, H, W).
            indices: levels, negative ones from the end; an integer takes the last so many, None all.
            norm: accepted for timm's sake: every map has its block's norm behind it.
            stop_early: compute nothing behind the last level asked for; needs ``intermediates_only``.
            output_fmt: ``'NCHW'``, the only one.
            intermediates_only: return the maps alone.

        Returns:
            Output of `forward_features`, and the maps (B, channels, H / stride, W / stride) in the order of `indices`.

        Raises:
            SpecError: no such level, or arguments that exclude each other.
        """
        if output_fmt != "NCHW":
            raise SpecError("output_fmt must be 'NCHW': these are convolutional networks")
        if stop_early and not intermediates_only:
            raise SpecError("stop_early=True needs intermediates_only=True: the network's end is not computed")
        take = _take_levels(len(self._level_ends), indices)
        last = self._level_ends[max(take)]
        found: list[int] = []
        maps: list[torch.Tensor] = []
        count = 0
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                if not stop_early or count <= last:
                    if self.grad_checkpointing and not torch.jit.is_scripting():
                        x = checkpoint(block, x, use_reentrant=False)
                    else:
                        x = block(x)
                if count in self._level_ends:
                    level = self._level_ends.index(count)
                    if level in take:
                        found.append(level)
                        maps.append(x)
                count += 1
        maps = [maps[found.index(level)] for level in take]
        if intermediates_only:
            return maps
        return self.tail(x), maps

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) → map after the tail (B, num_features, H', W')."""
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
        return self.tail(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map after the tail → logits (B, num_classes).

        With ``pre_logits``: the classifier's input (B, head_hidden_size); without pooling, a map of so many channels.
        """
        x = self.head(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of ``indices`` do not need: blocks behind the last of them, tail and head.

        What is left is a feature extractor. Its ``spec`` stays that of the whole network, with ``num_classes`` 0.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: remove tail, head and classifier even where all blocks stay.
            prune_head: remove head and classifier even where all blocks stay.

        Returns:
            The levels, counted from 0.
        """
        take = _take_levels(len(self._level_ends), indices)
        last, end = max(take), self._level_ends[max(take)]
        places = [(s, i) for s, stage in enumerate(self.stages) for i, _ in enumerate(stage.children())]
        prune_end = end < len(places) - 1
        if prune_end:
            stage, block = places[end]
            kept = list(self.stages)[: stage + 1]
            kept[-1] = nn.Sequential(*list(kept[-1].children())[: block + 1])
            self.stages = nn.ModuleList(kept)
        if prune_end or prune_norm:
            self.tail = nn.Identity()  # type: ignore[assignment]
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_end or prune_norm or prune_head:
            self.head, self.head_hidden_size = PooledHead(self.num_features, global_pool=""), self.num_features
            self.reset_classifier(0, "")
        self._level_ends, self.feature_info = self._level_ends[: last + 1], self.feature_info[: last + 1]
        return take


def _feature_info(spec: NetSpec) -> list[dict[str, Any]]:
    return [{"num_chs": lv.channels, "reduction": lv.stride, "module": lv.module} for lv in spec.feature_levels]


def _take_levels(count: int, indices: int | list[int] | None) -> list[int]:
    """Levels counted from 0, of ``count`` levels; TorchScript compiles this."""
    if indices is None:
        indices = count
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise SpecError(f"the last {indices} feature levels were asked for; there are {count}")
        return [count - indices + i for i in range(indices)]
    take: list[int] = []
    for i in indices:
        level = count + i if i < 0 else i
        if not 0 <= level < count:
            raise SpecError(f"feature level {i} does not exist; there are {count}: 0 to {count - 1}")
        take.append(level)
    if len(take) == 0:
        raise SpecError("indices must name at least one feature level")
    return take


def _adapt(spec: NetSpec, num_classes: int | None, in_chans: int | None) -> NetSpec:
    """``spec`` with other classes and image channels; None keeps the spec's."""
    changes = {"num_classes": num_classes, "in_channels": in_chans}
    changes = {k: v for k, v in changes.items() if v is not None and v != getattr(spec, k)}
    return spec.replace(**changes) if changes else spec


def _check_pool(global_pool: Any, num_classes: int) -> None:
    if global_pool not in POOLS:
        raise SpecError(f"global_pool must be one of {', '.join(map(repr, POOLS))}; got {global_pool!r}")
    if not global_pool and num_classes:
        raise SpecError(
            f"global_pool='' gives a map, which a classifier ({num_classes} classes) cannot take: give num_classes=0"
        )


def _check_rates(**rates: Any) -> None:
    for name, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise SpecError(f"{name} must be a number from 0 to below 1; got {rate!r}")


def create_model(
    arch: str | Path | dict[str, Any] | NetSpec, num_classes: int | None = None, **options: Any
) -> PruNetClassifier:
    """Build a classifier from a listed name, a spec, a dict or the path of a spec (``.json``) or weights file.

    Args:
        arch: a path ending in ``.safetensors`` gives the network *with* the weights in that file.
        num_classes: classes of the head; None takes the spec's. With a weights file of another number of classes the
            head starts fresh; of other image channels (``in_chans``), the first convolution is adapted as timm does.
        options: ``in_chans``, ``global_pool``, ``drop_rate``, ``drop_path_rate``, ``norm`` of `PruNetClassifier`.

    Raises:
        UnknownNameError, SpecError, CheckpointError: with what to do.
    """
    from timm.models import adapt_input_conv

    from prunet_zoo.models.weights import load_state, load_weights, read_weights_spec

    weights = str(arch) if str(arch).endswith(".safetensors") else None
    spec = read_weights_spec(weights) if weights else load_spec(arch)
    model = PruNetClassifier(spec, num_classes, **options)
    if weights:
        state = load_state(weights)
        first = f"{model.pretrained_cfg['first_conv']}.weight"
        if model.in_chans != spec.in_channels and first in state:
            state[first] = adapt_input_conv(model.in_chans, state[first])
        load_weights(
            model, state, skip=("classifier.",) if model.num_classes != spec.num_classes else (), origin=weights
        )
    return model
