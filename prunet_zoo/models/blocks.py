"""The blocks of a `BlockSpec`: conv, irb, fused_irb, rep; and the stages made of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import DropPath
from torch import nn

from prunet_zoo.models.layers import ConvNormAct, NormFactory, SqueezeExcite
from prunet_zoo.models.rep import RepBlock, slice_rep, switch_to_deploy
from prunet_zoo.spec import BlockSpec, NetSpec

__all__ = [
    "ConvBlock",
    "FusedInvertedResidual",
    "InvertedResidual",
    "RepBlock",
    "build_block",
    "build_stages",
    "slice_rep",
    "switch_to_deploy",
]


class ConvBlock(nn.Module):
    """k×k convolution, norm, activation. (B, in, H, W) → (B, out, H', W')."""

    def __init__(self, spec: BlockSpec, in_channels: int, eps: float, norm: NormFactory | None = None) -> None:
        super().__init__()
        self.conv = ConvNormAct(
            in_channels, spec.out_channels, spec.kernel_size, spec.stride, spec.pad, act=spec.act, eps=eps, norm=norm
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class _ResidualBlock(nn.Module):
    """What both inverted residual blocks share: the residual connection and its stochastic depth."""

    def __init__(self, spec: BlockSpec, in_channels: int, drop_path: float) -> None:
        super().__init__()
        self.has_residual = spec.has_residual(in_channels)
        self.drop_path = DropPath(drop_path) if drop_path and self.has_residual else nn.Identity()

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return x + self.drop_path(y) if self.has_residual else y


class InvertedResidual(_ResidualBlock):
    """IRB (arXiv 1801.04381): 1×1 expand, k×k depth-wise, [SE], 1×1 project, residual where shape allows."""

    def __init__(
        self, spec: BlockSpec, in_channels: int, eps: float, norm: NormFactory | None = None, drop_path: float = 0.0
    ) -> None:
        super().__init__(spec, in_channels, drop_path)
        hidden, squeeze = spec.hidden or 0, spec.se_channels(in_channels)
        self.expand = ConvNormAct(in_channels, hidden, act=spec.act, eps=eps, norm=norm)
        self.depthwise = ConvNormAct(
            hidden, hidden, spec.kernel_size, spec.stride, spec.pad, groups=hidden, act=spec.act, eps=eps, norm=norm
        )
        self.se = SqueezeExcite(hidden, squeeze, spec.act) if squeeze else nn.Identity()
        self.project = ConvNormAct(hidden, spec.out_channels, act=None, eps=eps, norm=norm)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.se(self.depthwise(self.expand(x))))


class FusedInvertedResidual(_ResidualBlock):
    """Fused IRB (arXiv 2104.00298): k×k expand, [SE], 1×1 project, residual where shape allows."""

    def __init__(
        self, spec: BlockSpec, in_channels: int, eps: float, norm: NormFactory | None = None, drop_path: float = 0.0
    ) -> None:
        super().__init__(spec, in_channels, drop_path)
        hidden, squeeze = spec.hidden or 0, spec.se_channels(in_channels)
        self.expand = ConvNormAct(
            in_channels, hidden, spec.kernel_size, spec.stride, spec.pad, act=spec.act, eps=eps, norm=norm
        )
        self.se = SqueezeExcite(hidden, squeeze, spec.act) if squeeze else nn.Identity()
        self.project = ConvNormAct(hidden, spec.out_channels, act=None, eps=eps, norm=norm)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.se(self.expand(x)))


def build_block(
    spec: BlockSpec, in_channels: int, eps: float, norm: NormFactory | None = None, drop_path: float = 0.0
) -> nn.Module:
    """Return the module of ``spec`` for ``in_channels`` inputs; ``eps`` is the network's where the block has none."""
    eps = eps if spec.bn_eps is None else spec.bn_eps
    if spec.type == "conv":
        return ConvBlock(spec, in_channels, eps, norm)
    if spec.type == "rep":
        return RepBlock(spec, in_channels, eps, norm)
    block = InvertedResidual if spec.type == "irb" else FusedInvertedResidual
    return block(spec, in_channels, eps, norm, drop_path)


def build_stages(
    spec: NetSpec, norm: NormFactory | None = None, drop_path_rate: float = 0.0, last: tuple[int, int] | None = None
) -> nn.ModuleList:
    """Build the stages of a network, up to and with block ``last`` = (stage, index) when given.

    ``drop_path_rate`` is the stochastic depth (arXiv 1603.09382) of the network's last block; it grows linearly from 0.
    """
    placed = list(spec.placed())
    rates: Sequence[float] = [drop_path_rate * i / max(1, len(placed) - 1) for i in range(len(placed))]
    stages: list[list[nn.Module]] = []
    for place, rate in zip(placed, rates, strict=True):
        if last is not None and (place.stage, place.index) > last:
            break
        if place.stage == len(stages):
            stages.append([])
        stages[-1].append(build_block(place.block, place.in_channels, spec.bn_eps, norm, rate))
    return nn.ModuleList(nn.Sequential(*blocks) for blocks in stages)
