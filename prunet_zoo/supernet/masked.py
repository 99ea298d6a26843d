"""MaskedNet: a trained network with a mask on each set of channels that can be taken out (PaS, arXiv 2206.01198).

The paper's mask is a depth-wise 1×1 convolution without bias behind the activation: one weight a channel, 1 at the
start, in the forward pass 1 where it is above ½ and 0 elsewhere, in the backward pass as if it were the weight itself
(straight-through). Which channels form a set (they are kept or removed together), and the grid of kept widths, are the
space's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunet_zoo.errors import CheckpointError, SpecError, few
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
        sources: convolutions and linear layers whose outputs are the channels; () where they are not known.
    """

    name: str
    channels: int
    widths: tuple[int, ...]
    sites: tuple[str, ...]
    norms: tuple[str, ...]
    sources: tuple[str, ...] = ()


class ChannelMask(nn.Module):
    """Depth-wise 1×1 convolution with binary weights. (B, C, H, W) → (B, C, H, W), or any map with channels second.

    A mask never goes empty (ours; the paper leaves it open): the ``least`` greatest weights count as on, wherever they
    are. Where weights are equal the lower index comes first.

    Args:
        channels: C.
        least: channels that stay at least.

    Attributes:
        weight: (C,), 1 at the start.
        frozen: bool (C,), what stays, once the mask is decided; else empty.
    """

    frozen: torch.Tensor

    def __init__(self, channels: int, least: int = 1) -> None:
        super().__init__()
        self.least = min(least, channels)
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("frozen", torch.empty(0, dtype=torch.bool))

    @torch.no_grad()
    def kept(self) -> torch.Tensor:
        """The channels that pass: bool (C,)."""
        if self.frozen.numel():
            return self.frozen.clone()
        on = self.weight > THRESHOLD
        on[self.order()[: self.least]] = True
        return on

    @torch.no_grad()
    def order(self) -> torch.Tensor:
        """Channels by their weights, the greatest first, those of a decided mask before all others: int64 (C,)."""
        order = self.weight.sort(descending=True, stable=True).indices
        if not self.frozen.numel():
            return order
        return order[self.frozen[order].byte().sort(descending=True, stable=True).indices]

    def binary(self) -> torch.Tensor:
        """The weights of the forward pass, zeros and ones (C,), with gradient 1 to ``weight`` until it is decided."""
        hard = self.kept().to(self.weight.dtype)
        return hard if self.frozen.numel() else hard + (self.weight - self.weight.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.binary().to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))

    def on_output(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """A forward hook. Being a bound method it is copied and pickled with the network that it hangs on."""
        return self(output)

    def freeze(self, keep: torch.Tensor | None) -> None:
        """Decide: exactly the channels of ``keep`` (bool (C,)) stay; None undoes it."""
        kept = torch.empty(0, dtype=torch.bool) if keep is None else keep.detach().clone()
        self.frozen = kept.to(self.weight.device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}frozen")
        if found is not None and found.shape != self.frozen.shape:  # decided there and not here, or the reverse
            self.frozen = torch.zeros(found.shape, dtype=torch.bool, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class MaskedNet(nn.Module, ABC):
    """A start network with a mask on every group; a `SearchNet`.

    The masks hang on their sites as forward hooks: the start network's modules and names stay what they are.

    Args:
        net: the start network.
        groups: what can be removed, in the order of execution.
        layers: for each group its place in an encoding; None: one layer a group.

    Attributes:
        net: the start network, images (B, C, H, W) → logits (B, num_classes).
        groups: as given.
        layers: as given.
    """

    net: nn.Module
    groups: tuple[Group, ...]
    layers: tuple[int, ...]

    def __init__(self, net: nn.Module, groups: Sequence[Group], layers: Sequence[int] | None = None) -> None:
        super().__init__()
        self.net, self.groups = net, tuple(groups)
        self.layers = tuple(range(len(self.groups)) if layers is None else layers)
        self.channel_masks = nn.ModuleList(ChannelMask(g.channels, g.widths[0]) for g in self.groups)
        for group, mask in zip(self.groups, self.masks(), strict=True):
            for site in group.sites:
                net.get_submodule(site).register_forward_hook(mask.on_output)

    @property
    @abstractmethod
    def space(self) -> Any:
        """`SearchSpace` or `TracedSpace`: layer ``layers[g]`` offers ``(candidate, width)`` for group g."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def masks(self) -> list[ChannelMask]:
        """One a group, in order."""
        return list(self.channel_masks)  # type: ignore[arg-type]

    def arch_parameters(self) -> list[nn.Parameter]:
        """The masks' weights."""
        return [mask.weight for mask in self.masks()]

    def weight_parameters(self) -> list[nn.Parameter]:
        """The start network's parameters."""
        return list(self.net.parameters())

    def keep(self) -> list[torch.Tensor]:
        """What the masks keep: bool (C,) a group."""
        return [mask.kept() for mask in self.masks()]

    def freeze(self, keep: Sequence[torch.Tensor] | None) -> None:
        """Decide the masks: exactly these channels stay, and the weights of the masks learn no more; None undoes it.

        Raises:
            SpecError: not one bool a channel of every group.
        """
        if keep is not None:
            self._check(keep)
        for i, mask in enumerate(self.masks()):
            mask.freeze(None if keep is None else keep[i])

    def _check(self, keep: Sequence[torch.Tensor]) -> None:
        given, wanted = [tuple(k.shape) for k in keep], [(g.channels,) for g in self.groups]
        if given != wanted or any(k.dtype != torch.bool for k in keep):
            raise SpecError(f"keep: {len(wanted)} bool tensors of shapes {few(wanted)} are needed, got {few(given)}")

    def widths(self) -> tuple[int, ...]:
        """How many channels each mask keeps."""
        return tuple(torch.stack([k.sum() for k in self.keep()]).tolist()) if self.groups else ()

    @abstractmethod
    def encode(self, widths: Sequence[int]) -> Encoding:
        """The encoding with so many channels a group, each rounded up to the group's grid."""

    def at(self, widths: Sequence[int]) -> Any:
        """The spec with so many channels a group, for a cost; here each is rounded up to the group's grid."""
        return self.space.decode(self.encode(widths))

    @abstractmethod
    def remove(self, keep: Sequence[torch.Tensor], name: str) -> tuple[Any, nn.Module]:
        """The network without the channels: its spec and its module, with the start network's weights. In eval mode it
        computes what the masked network computes, to 1e-4. The counts must be on the groups' grids."""

    @torch.no_grad()
    def restore(self, keep: Sequence[torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `remove`: put the weights of the network without the channels back into the start network.

        What ``state`` does not have (the channels that are gone) stays as it is. Where each entry belongs is found by
        removing the channels of a network whose weights are their own indices.

        Args:
            keep: bool (C,) a group.
            state: a state dict of the module that ``remove(keep)`` gives.

        Raises:
            CheckpointError: it has other names or shapes than that module.
        """
        own = self.net.state_dict()
        saved = {name: tensor.clone() for name, tensor in own.items()}
        places: dict[str, list[torch.Tensor]] = {}
        try:
            for axis in (0, 1):  # kernels are never cut
                for tensor in own.values():
                    if tensor.dim() > axis:
                        line = torch.arange(tensor.shape[axis], device=tensor.device)
                        tensor.copy_(line.view([-1 if d == axis else 1 for d in range(tensor.dim())]))
                _, module = self.remove(keep, "restore")
                for name, tensor in module.state_dict().items():
                    if tensor.dim() > axis:
                        line = tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)[:, 0]
                        places.setdefault(name, []).append(line.long())
            shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        finally:
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        if shapes != {name: tuple(tensor.shape) for name, tensor in state.items()}:
            odd = sorted(n for n in {*shapes, *state} if n not in state or tuple(state[n].shape) != shapes.get(n))
            raise CheckpointError(f"these are no weights of the network without the channels: {few(odd)} differ")
        for name, tensor in state.items():
            target, value = own[name], tensor.to(own[name].device, own[name].dtype)
            where = [line.to(target.device) for line in places.get(name, [])]
            if len(where) == 2:
                target[where[0][:, None], where[1]] = value
            elif where:
                target[where[0]] = value
            else:
                target.copy_(value)

    def ranked(self, encoding: Sequence[Choice]) -> list[torch.Tensor]:
        """Which channels to keep for an encoding: those with the greatest mask weights (the lower index first); of a
        decided mask its own channels first.

        Raises:
            SpecError: a width that its group does not offer.
        """
        found = []
        for group, layer, mask in zip(self.groups, self.layers, self.masks(), strict=True):
            choice = encoding[layer]
            if choice is None or choice[1] not in group.widths:
                raise SpecError(f"{group.name} can keep {few(group.widths)} channels; the encoding says {choice}")
            keep = torch.zeros_like(mask.weight, dtype=torch.bool)
            keep[mask.order()[: choice[1]]] = True
            found.append(keep)
        return found

    def best(self) -> Encoding:
        """The encoding of what the masks keep, rounded up to the grid."""
        return self.encode(self.widths())

    def derive(self, encoding: Sequence[Choice], name: str) -> tuple[Any, dict[str, torch.Tensor]]:
        """The network of an encoding, its channels as `ranked` has them: its spec and its weights, on the CPU."""
        spec, module = self.remove(self.ranked(encoding), name)
        return spec, {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}

    def missing(self, encoding: Sequence[Choice]) -> list[int]:
        """Nothing: every channel keeps its weights."""
        return []

    def candidates_left(self) -> int:
        """Channels that the masks keep, of all groups together."""
        return sum(self.widths())

    def depth(self) -> int:
        """Layers of the network: channels go, layers stay."""
        return sum(choice is not None for choice in self.best())
