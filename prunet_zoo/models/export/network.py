"""What is exported: a network, what is known of it, and the graph that is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

Run = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Scaling:
    """How an RGB image of 0…255 becomes the network's input: ``(x - mean) / std`` by channel.

    ``mean`` and ``std`` are in units of 0…255, in the order of the network's channels, which ``bgr`` says are BGR.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False

    @property
    def is_none(self) -> bool:
        """Whether the network takes images of 0…255 as they are, but for the order of channels."""
        return not any(self.mean) and all(value == 1.0 for value in self.std)


@dataclass
class Network:
    """A network to be exported.

    Args:
        module: takes a batch (B, channels, H, W), returns one tensor or several, nested as it likes.
        name: what to call it, and its file.
        input_size: H, W in px.
        channels: of the input.
        outputs: what to call its outputs; one name for each, or one that is numbered where there are several.
        weights: where they are from; None: they are random.
        scaling: None: not known.
        about: what a file should tell of it: JSON values by key (classes, preprocessing, strides, …).
    """

    module: nn.Module
    name: str
    input_size: tuple[int, int]
    channels: int = 3
    outputs: tuple[str, ...] = ("output",)
    weights: str | None = None
    scaling: Scaling | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


class Graph(nn.Module):
    """What is written: float32 in and out, several outputs as a tuple. (B, C, H, W) → (B, …), ….

    Args:
        net: the network.
        scaling: the input is an RGB image of 0…255, which is scaled here; None: the input is what the network takes.
        half: compute in float16 between input and outputs; the network's weights are converted.
    """

    def __init__(self, net: nn.Module, scaling: Scaling | None = None, half: bool = False) -> None:
        super().__init__()
        self.net = net.half() if half else net
        self.half_inside, self.scaled, self.flipped = half, scaling is not None, bool(scaling and scaling.bgr)
        if scaling is not None:
            for name, values in (("mean", scaling.mean), ("std", scaling.std)):
                self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> Any:
        if self.flipped:
            x = torch.index_select(x, 1, torch.tensor([2, 1, 0], device=x.device))
        if self.scaled:
            x = (x - self.mean) / self.std  # type: ignore[operator]
        outs = flat(self.net(x.half() if self.half_inside else x))
        outs = tuple(out.float() for out in outs) if self.half_inside else outs
        return outs[0] if len(outs) == 1 else outs


def flat(outs: Any) -> Run:
    """The tensors of a nested result, in order."""
    return tuple(leaf for leaf in tree_leaves(outs) if isinstance(leaf, torch.Tensor))


def numbered(names: Iterable[str], count: int) -> tuple[str, ...]:
    """``names`` where there are as many as outputs, else the first one with a number for each."""
    names = tuple(names)
    return names if len(names) == count else tuple(f"{names[0]}_{i}" for i in range(count))
