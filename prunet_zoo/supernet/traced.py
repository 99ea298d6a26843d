"""TracedNet: a network that is no `NetSpec` (timm's, or any CNN) with a mask on each set of coupled channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from prunet_zoo.errors import PrunetError, SpecError, few
from prunet_zoo.models.channels import layer_shape, select_channels, take_profile
from prunet_zoo.models.pruned import PrunedSpec, create_start, head_names
from prunet_zoo.models.weights import load_weights
from prunet_zoo.space import Encoding
from prunet_zoo.supernet.masked import Group, MaskedNet
from prunet_zoo.supernet.traced_cost import TracedCost
from prunet_zoo.supernet.traced_groups import Coupled, find_coupled
from prunet_zoo.supernet.traced_space import TracedLayer, TracedSpace

__all__ = ["TracedCost", "TracedLayer", "TracedNet", "TracedSpace"]

SAME = 1e-4  # largest difference of logits between masked and removed, as a share of the largest logit


class TracedNet(MaskedNet):
    """A CNN with a mask on every set of channels that torch-pruning finds to go together.

    The inner channels of blocks are such sets, and so are whole residual streams, whose masks stand behind each
    addition and activation. The network's outputs and its input stay. Before it is used every set is checked: on a copy
    with random norms, the masked network and the one without the channels must compute the same.

    Args:
        net: a name of timm, or a module that is trained already: (B, in_channels, H, W) → (B, num_classes).
        input_size: side of the images in px that MACs are counted for.
        num_classes: classes.
        in_channels: channels of the images.
        step: grid of the widths that may be kept: its multiples and the whole width. Sets of ``step`` channels or fewer
            stay as they are.
        state: trained weights of the start network; strict, but a head for another number of classes starts fresh.
        pretrained: timm's weights, which are downloaded.
        options: further arguments of `timm.create_model` (numbers, texts, lists of them).

    Attributes:
        spec: the start network's.
        skipped: sets of channels that stay as they are, by the first layer that makes them, each with the reason.

    Raises:
        UnknownNameError: timm has no such network.
        SpecError: arguments that do not go together, or nothing can be removed.
        CheckpointError: weights of another network.
        PrunetError: torch-pruning is missing, or cannot follow the network.
    """

    def __init__(
        self,
        net: str | nn.Module,
        input_size: int,
        num_classes: int,
        in_channels: int = 3,
        step: int = 8,
        state: Mapping[str, torch.Tensor] | None = None,
        pretrained: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        named = isinstance(net, str)
        if step < 1:
            raise SpecError(f"step must be at least 1, got {step}")
        if not named and (pretrained or options):
            raise SpecError("TracedNet: pretrained and options are for a name of timm; a module is taken as it is")
        if pretrained and state is not None:
            raise SpecError("TracedNet: state and pretrained exclude each other; give one")
        spec = PrunedSpec.from_dict(
            {
                "name": net if isinstance(net, str) else type(net).__name__,
                "timm": net if named else None,
                "options": dict(options or {}),
                "input_size": input_size,
                "in_channels": in_channels,
                "num_classes": num_classes,
                "shapes": {},
            }
        )
        start = create_start(spec, pretrained) if isinstance(net, str) else net
        if state is not None:
            origin = "the weights given for the start network"
            load_weights(start, state, skip=_other_head(start, state), origin=origin)
        size = (input_size, input_size)
        found, skipped = find_coupled(start, in_channels, size)
        found, narrow = _wide_enough(found, step)
        found, wrong = _checked(start, found, in_channels, size)
        if not found:
            reasons = few(f"{name}: {why}" for name, why in {**skipped, **narrow, **wrong}.items())
            raise SpecError(f"{spec.name!r} has no channels that can be removed in steps of {step} ({reasons})")
        super().__init__(
            start, [Group(c.name, c.channels, _grid(c.channels, step), c.sites, c.norms, c.sources) for c in found]
        )
        self.spec, self.skipped = spec, {**skipped, **narrow, **wrong}
        self._coupled = tuple(found)
        layers = [_layer(i, found[i], group.widths) for i, group in enumerate(self.groups)]
        self._space = TracedSpace(spec, layers, take_profile(start, in_channels, size))

    @property
    def space(self) -> TracedSpace:
        """The networks that arise when channels go."""
        return self._space

    def encode(self, widths: Sequence[int]) -> Encoding:
        """The encoding with so many channels a group, each rounded up to the group's grid."""
        pairs = zip(self.groups, widths, strict=True)
        return tuple((0, next(w for w in group.widths if w >= width)) for group, width in pairs)

    def at(self, widths: Sequence[int]) -> PrunedSpec:
        """The spec with exactly so many channels a group, on the grid or not."""
        return self._space.at(widths)

    def remove(self, keep: Sequence[torch.Tensor], name: str) -> tuple[PrunedSpec, nn.Module]:
        """See `MaskedNet.remove`; the module bears its spec as ``.spec``. Raises `SpecError` where a count is not on
        its group's grid."""
        self._check(keep)
        counts = [int(mine.sum()) for mine in keep]
        for group, count in zip(self.groups, counts, strict=True):
            if count not in group.widths:
                raise SpecError(f"{group.name} can keep {few(group.widths)} channels, not {count}")
        spec = self._space.at(counts, name)
        small: Any = copy.deepcopy(self.net)
        for site in {site for group in self.groups for site in group.sites}:
            hooks = small.get_submodule(site)._forward_hooks
            for key in [k for k, hook in hooks.items() if getattr(hook, "__name__", "") == "on_output"]:
                del hooks[key]
        _cut(small, self._coupled, keep)
        small.spec = spec
        return spec, small


def _grid(channels: int, step: int) -> tuple[int, ...]:
    return (*range(step, channels, step), channels)


def _layer(index: int, coupled: Coupled, widths: tuple[int, ...]) -> TracedLayer:
    shrinks = tuple((part.module, part.side, len(part.index) // coupled.channels) for part in coupled.parts)
    return TracedLayer(index, coupled.name, widths, shrinks)


def _wide_enough(found: list[Coupled], step: int) -> tuple[list[Coupled], dict[str, str]]:
    narrow = {c.name: f"has only {c.channels} channels (step {step})" for c in found if c.channels <= step}
    uneven = {c.name: "its layers take the channels unevenly" for c in found if _is_uneven(c)}
    out = {**narrow, **uneven}
    return [c for c in found if c.name not in out], out


def _is_uneven(coupled: Coupled) -> bool:
    """Whether a layer does not have the same number of channels for each of the group's."""
    counts = [torch.bincount(part.root, minlength=coupled.channels) for part in coupled.parts]
    return any(bool((count != count[0]).any()) for count in counts)


def _other_head(net: Any, state: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """The classifier's name where a checkpoint's has another shape: it is left out of loading."""
    own = net.state_dict()
    return tuple(
        f"{head}." for head in head_names(net)
        if any(key.startswith(f"{head}.") and key in state and state[key].shape != own[key].shape for key in own)
    )  # fmt: skip


def _cut(net: nn.Module, coupled: Sequence[Coupled], keep: Sequence[torch.Tensor]) -> None:
    """Take the channels that are not kept out of a network, in place."""
    stays: dict[str, dict[str, torch.Tensor]] = {}
    for group, mine in zip(coupled, keep, strict=True):
        kept = mine.detach().cpu()
        for part in group.parts:
            shape = layer_shape(net.get_submodule(part.module))
            assert shape is not None
            length = shape[1] if part.side == "in" else shape[0]
            side = stays.setdefault(part.module, {}).setdefault(part.side, torch.ones(length, dtype=torch.bool))
            side[part.index[~kept[part.root]]] = False
    for name, sides in stays.items():
        index = {side: stay.nonzero().flatten() for side, stay in sides.items()}
        select_channels(net.get_submodule(name), index.get("out"), index.get("in"))


def _checked(
    net: nn.Module, found: list[Coupled], in_channels: int, size: tuple[int, int]
) -> tuple[list[Coupled], dict[str, str]]:
    """The groups whose mask does what removal does, and why the others are left out."""
    if not found or _error(net, found, in_channels, size) <= SAME:
        return found, {}
    errors = {group.name: _error(net, [group], in_channels, size) for group in found}
    wrong = {
        name: f"masked and removed differ by {error:.1e} of the largest logit"
        for name, error in errors.items()
        if not error <= SAME
    }
    left = [group for group in found if group.name not in wrong]
    if not wrong or (left and not _error(net, left, in_channels, size) <= SAME):
        raise PrunetError(f"{type(net).__name__}: masks and removal agree set by set, but not together")
    return left, wrong


@torch.no_grad()
def _error(net: nn.Module, found: list[Coupled], in_channels: int, size: tuple[int, int]) -> float:
    """Largest difference between masked and removed, as a share of the largest logit, with random norms and channels;
    infinite where masks or removal break the network."""
    draw = torch.Generator().manual_seed(0)
    own = copy.deepcopy(net).cpu().double().eval()
    for layer in own.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (layer.weight, 0.5, 1.5), (layer.bias, -0.5, 0.5), (layer.running_mean, -0.5, 0.5),
                (layer.running_var, 0.5, 1.5),
            ):  # fmt: skip
                if tensor is not None:
                    tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=draw))
    image = torch.randn(2, in_channels, *size, generator=draw).double()
    keep = [torch.rand(group.channels, generator=draw) < 0.5 for group in found]
    for mine in keep:
        mine[0], mine[-1] = True, False
    handles = []
    for group, mine in zip(found, keep, strict=True):
        mask = mine.double().view(1, -1, 1, 1)
        for site in group.sites:
            hook = lambda module, args, output, mask=mask: output * mask  # noqa: E731
            handles.append(own.get_submodule(site).register_forward_hook(hook))
    try:
        masked = own(image)
        for handle in handles:
            handle.remove()
        _cut(own, found, keep)
        removed = own(image)
    except (RuntimeError, ValueError, AssertionError, IndexError):
        return float("inf")
    error = float((masked - removed).abs().max() / masked.abs().max())
    return error if error == error else float("inf")
