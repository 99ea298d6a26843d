"""Prunode: a block whose hidden width is searched with the memory and compute of one block (arXiv 2209.11785).

The paper gives the idea, "a stochastic bi-path building block which can search over inner hidden dimensions with O(1)
memory and compute"; its formulas were not at hand and the rules here are ours. Two widths d_S < d_L are alive at a
time, and they share their first d_S channels, so both paths are one execution at width d_L: the hidden channels
d_S…d_L count with p_L, the first d_S with p_S + p_L = 1. The window (d_S, d_L) moves over the grid, see
`window.WidthWindow`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from prunet_zoo.models.blocks import FusedInvertedResidual, InvertedResidual, build_block
from prunet_zoo.models.layers import ConvNormAct, SqueezeExcite
from prunet_zoo.spec import BlockSpec
from prunet_zoo.supernet.window import WidthWindow


class PrunodeBlock(nn.Module):
    """A candidate block at full width of which only the first channels are executed.

    Args:
        spec: the block at its greatest hidden width; a plain convolution has no width to search.
        in_channels: channels of the input.
        widths: grid of hidden widths, increasing; ``(0,)`` for a plain convolution.
        eps: BatchNorm eps of the network.
        window: the rule that moves the two widths; None for a plain convolution.

    Attributes:
        block: the ordinary block with all weights; a derived network takes leading slices of them.
        width_logits: (2,) logits of d_S and d_L.
    """

    def __init__(
        self, spec: BlockSpec, in_channels: int, widths: tuple[int, ...], eps: float, window: WidthWindow | None = None
    ) -> None:
        super().__init__()
        self.spec, self.in_channels, self.widths = spec, in_channels, widths
        self.block = build_block(spec, in_channels, eps)
        self.window = window if spec.hidden is not None else None
        self.width_logits = nn.Parameter(torch.zeros(2)) if self.searches_width else None

    @property
    def searches_width(self) -> bool:
        """Whether there is more than one width to choose from."""
        return self.window is not None and len(self.widths) > 1

    def p_large(self, tau: float = 1.0, noise: torch.Tensor | None = None) -> torch.Tensor | None:
        """Probability of d_L (scalar): softmax of the logits, or with ``noise`` (2,) a Gumbel-softmax sample."""
        if self.width_logits is None:
            return None
        logits = self.width_logits if noise is None else (self.width_logits + noise) / tau
        return logits.softmax(0)[1]

    def forward(self, x: torch.Tensor, p_large: torch.Tensor | None = None, width: int | None = None) -> torch.Tensor:
        """One execution of the block. x: (B, in_channels, H, W) → (B, out_channels, H', W').

        Args:
            x: input map.
            p_large: weight of the channels d_S…d_L (scalar tensor); the execution is at width d_L.
            width: make the choice hard: execute exactly this hidden width.
        """
        if not isinstance(self.block, InvertedResidual | FusedInvertedResidual):
            return self.block(x)
        if width is None:
            assert self.window is not None  # a block with hidden width always has a window
            small, width = self.window.small, self.window.large
        else:
            small, p_large = width, None
        return self._sliced(self.block, x, small, width, p_large)

    @staticmethod
    def _sliced(
        block: InvertedResidual | FusedInvertedResidual,
        x: torch.Tensor,
        small: int,
        width: int,
        p_large: torch.Tensor | None,
    ) -> torch.Tensor:
        h = _sliced_conv(block.expand, x, out=width)
        if isinstance(block, InvertedResidual):
            h = _sliced_conv(block.depthwise, h, out=width, groups=width)
        if isinstance(block.se, SqueezeExcite):
            h = h * _sliced_gate(block.se, h, width)
        weight = block.project.conv.weight[:, :width]
        if p_large is not None and small < width:
            # scaling columns of the 1×1 weight equals scaling the hidden channels, and costs no activation memory
            scale = torch.cat([weight.new_ones(small), p_large.to(weight.dtype).expand(width - small)])
            weight = weight * scale.view(1, -1, 1, 1)
        y = block.project.norm(F.conv2d(h, weight))
        return x + y if block.has_residual else y


def _sliced_conv(layer: ConvNormAct, x: torch.Tensor, out: int, groups: int = 1) -> torch.Tensor:
    """Convolution, BatchNorm, activation with the first ``out`` output channels."""
    conv, norm = layer.conv, layer.norm
    assert isinstance(norm, nn.BatchNorm2d)
    y = F.conv2d(x, conv.weight[:out], None, conv.stride, conv.padding, groups=groups)
    assert norm.running_mean is not None and norm.running_var is not None
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = 0.1 if norm.momentum is None else norm.momentum
    y = F.batch_norm(
        y, norm.running_mean[:out], norm.running_var[:out], norm.weight[:out], norm.bias[:out],
        norm.training, momentum, norm.eps,
    )  # fmt: skip
    return layer.act(y)


def _sliced_gate(se: SqueezeExcite, h: torch.Tensor, width: int) -> torch.Tensor:
    """Sigmoid gate (B, width, 1, 1) of the squeeze-and-excite with its first ``width`` channels."""
    s = F.conv2d(h.mean((2, 3), keepdim=True), se.reduce.weight[:, :width], se.reduce.bias)
    expand_bias = se.expand.bias[:width] if se.expand.bias is not None else None
    return F.conv2d(se.act(s), se.expand.weight[:width], expand_bias).sigmoid()
