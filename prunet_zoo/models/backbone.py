"""PruNetBackbone: the feature maps of a `NetSpec` for a detector, with mmdet's argument meanings; plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunet_zoo.errors import SpecError
from prunet_zoo.models.blocks import build_stages, switch_to_deploy
from prunet_zoo.models.layers import init_weights, make_norm_factory
from prunet_zoo.models.recompute import recompute
from prunet_zoo.models.weights import load_weights, read_weights_spec
from prunet_zoo.spec import NetSpec, load_spec


class PruNetBackbone(nn.Module):
    """Backbone of a `NetSpec`. Image (B, C, H, W) → tuple of maps (B, channels, H / stride, W / stride).

    Module names equal those of `PruNetClassifier`, so a classifier's weights fit by name. What lies behind the last
    requested level is not built.

    Args:
        arch: listed name, path of a spec (``.json``) or of weights, dict or `NetSpec`. Of a weights file
            (``.safetensors``, spec inside) the backbone's weights are loaded too.
        out_indices: feature levels by stride: 0 is stride 2, 1 is stride 4, …; each is the last layer of its stride.
        frozen_stages: -1 freezes nothing; n freezes everything up to and with feature level n (no gradient, norms in
            eval mode), so 0 is the stem's stride 2, 1 up to stride 4, as in mmdet's ResNet.
        norm_cfg: see `make_norm_factory`; BatchNorm with the spec's eps by default.
        norm_eval: keep all BatchNorm layers in eval mode while training (fixed statistics).
        with_cp: recompute each block in the backward pass to save memory.
        drop_path_rate: stochastic depth of the network's last block.
        usual_padding: pad every convolution by kernel_size // 2, also those that the arch leaves without padding
            (`NetSpec.with_usual_padding`): maps then have ceil(side / stride) px, as necks that enlarge a map by 2 and
            join it to the next (PAFPN) need. False: as the arch has it, equal to the classifier's maps.

    Raises:
        UnknownNameError, SpecError: with what is allowed.
        CheckpointError: the weights file is missing or damaged, or lacks tensors of the backbone.
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
        usual_padding: bool = False,
    ) -> None:
        super().__init__()
        check_arguments(out_indices, frozen_stages, norm_cfg, drop_path_rate)
        spec = resolve_arch(arch)
        self.spec = spec.with_usual_padding() if usual_padding else spec
        self._arch_weights = str(arch) if _is_weights(arch) else None
        self.out_indices = tuple(out_indices)
        if not self.out_indices or list(self.out_indices) != sorted(set(self.out_indices)):
            raise SpecError(f"out_indices must be increasing and not empty, got {self.out_indices}")
        self.out_channels = self.spec.channels(self.out_indices)
        levels = self.spec.feature_levels
        if not -1 <= frozen_stages <= self.out_indices[-1]:
            raise SpecError(
                f"frozen_stages must be from -1 to the last of out_indices {self.out_indices}, got {frozen_stages}"
            )
        self.frozen_stages, self.norm_eval, self.with_cp = frozen_stages, norm_eval, with_cp
        self.feature_info = [
            {"num_chs": levels[i].channels, "reduction": levels[i].stride, "module": levels[i].module}
            for i in self.out_indices
        ]
        self._taps = {(levels[i].stage, levels[i].block) for i in self.out_indices}
        self.stages = build_stages(self.spec, make_norm_factory(norm_cfg), drop_path_rate, max(self._taps))
        init_weights(self)
        if self._arch_weights is not None:
            load_weights(self, self._arch_weights)
        self._freeze()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outs = []
        saving = self.with_cp and self.training and torch.is_grad_enabled()
        for s, stage in enumerate(self.stages):
            for i, block in enumerate(stage.children()):
                x = recompute(block, x) if saving else block(x)
                if (s, i) in self._taps:
                    outs.append(x)
        return tuple(outs)

    def switch_to_deploy(self) -> PruNetBackbone:
        """Fold the branches of every rep block into one convolution, in place; returns the backbone.

        What it computes in eval mode stays, up to rounding. A second call changes nothing. Weights are loaded before.

        Raises:
            SpecError: the norms are no BatchNorm.
        """
        switch_to_deploy(self)
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        level = self.spec.feature_levels[self.frozen_stages]
        return [
            block
            for s, stage in enumerate(self.stages)
            for i, block in enumerate(stage.children())
            if (s, i) <= (level.stage, level.block)
        ]

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.eval()
            for parameter in module.parameters():
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> PruNetBackbone:
        """Set training mode, but keep frozen parts (and, with ``norm_eval``, all BatchNorm) in eval mode."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def resolve_arch(arch: str | Path | dict[str, Any] | NetSpec) -> NetSpec:
    """`load_spec` that also takes a ``.safetensors`` file with its spec inside."""
    return read_weights_spec(str(arch)) if _is_weights(arch) else load_spec(arch)


def _is_weights(arch: Any) -> bool:
    return isinstance(arch, str | Path) and str(arch).endswith(".safetensors")


def check_arguments(out_indices: Any, frozen_stages: Any, norm_cfg: Any, drop_path_rate: Any) -> None:
    """Raise `SpecError` for an argument of another type than the backbone takes, or a rate out of range."""
    is_list = isinstance(out_indices, Sequence) and not isinstance(out_indices, str | bytes)
    if not (is_list and all(_is_int(i) for i in out_indices)):
        raise SpecError(f"out_indices must be a list of integers, such as (1, 2, 3, 4); got {out_indices!r}")
    if not _is_int(frozen_stages):
        raise SpecError(f"frozen_stages must be an integer, -1 for nothing; got {frozen_stages!r}")
    if not (norm_cfg is None or isinstance(norm_cfg, Mapping)):
        raise SpecError(f"norm_cfg must be None or a dict, such as dict(type='BN'); got {norm_cfg!r}")
    is_number = isinstance(drop_path_rate, int | float) and not isinstance(drop_path_rate, bool)
    if not (is_number and 0 <= drop_path_rate < 1):
        raise SpecError(f"drop_path_rate must be a number from 0 to below 1; got {drop_path_rate!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
