"""MaskedNet: a trained network with a mask on each set of channels that can be taken out (PaS, arXiv 2206.01198).

The paper's mask is a depth-wise 1×1 convolution without bias behind the activation: one weight a channel, 1 at the
start, in the forward pass 1 where it is above ½ and 0 elsewhere, in the backward pass as if it were the weight itself
(straight-through). Which channels form a set (they are kept or removed together), and the grid of kept widths, are the
space's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunet_zoo.space import Choice, Encoding

THRESHOLD = 0.5


@dataclass(frozen=True)
class Group:
    """Channels that are kept or removed together, one by one.

    Attributes:
        name: of the block (``stages.2.1``) or, in a network that is no spec, of the layer that makes the channels.
        channels: their number C in the start network.
        widths: the numbers of channels that may be kept, increasing, at most C.
        sites: modules whose outputs (B, C, H, W) carry the mask, behind the activation.
        norms: BatchNorms of C channels whose scale and shift tell how much a channel matters.
    """

    name: str
    channels: int
    widths: tuple[int, ...]
    sites: tuple[str, ...]
    norms: tuple[str, ...]


class ChannelMask(nn.Module):
    """Depth-wise 1×1 convolution with binary weights. (B, C, H, W) → (B, C, H, W).

    Attributes:
        weight: (C,), 1 at the start.
        frozen: (C,) zeros and ones once the mask is decided, else empty.
    """


class MaskedNet(nn.Module, ABC):
    """A start network with a mask on every group; a `SearchNet`.

    Attributes:
        net: the start network, images (B, C, H, W) → logits (B, num_classes).
        groups: what can be removed, in the order of execution.
    """

    net: nn.Module
    groups: tuple[Group, ...]

    @property
    @abstractmethod
    def space(self) -> Any:
        """`SearchSpace` or `TracedSpace`: one layer a group that offers ``(candidate, width)``."""

    @abstractmethod
    def masks(self) -> list[ChannelMask]:
        """One a group, in order."""

    @abstractmethod
    def keep(self) -> list[torch.Tensor]:
        """What the masks keep: bool (C,) a group."""

    @abstractmethod
    def freeze(self, keep: Sequence[torch.Tensor] | None) -> None:
        """Decide the masks: exactly these channels stay, and the weights of the masks learn no more; None undoes it."""

    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """How many channels each mask keeps."""

    @abstractmethod
    def encode(self, widths: Sequence[int]) -> Encoding:
        """The encoding with so many channels a group, each rounded up to the group's grid."""

    @abstractmethod
    def remove(self, keep: Sequence[torch.Tensor], name: str) -> tuple[Any, nn.Module]:
        """The network without the channels: its spec and its module, with the start network's weights. In eval mode it
        computes what the masked network computes, to 1e-4. The counts must be on the groups' grids."""

    @abstractmethod
    def ranked(self, encoding: Sequence[Choice]) -> list[torch.Tensor]:
        """Which channels to keep for an encoding: those with the greatest mask weights (the lower index first)."""
