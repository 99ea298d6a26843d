"""SpecNet: a network of a `SearchSpace` with a mask on every width that can be chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from prunet_zoo.errors import CheckpointError, SpecError, few
from prunet_zoo.models.blocks import RepBlock, slice_rep
from prunet_zoo.models.classifier import PruNetClassifier
from prunet_zoo.models.weights import compare, load_weights, shapes
from prunet_zoo.space import Choice, Encoding, SearchSpace
from prunet_zoo.spec import BlockSpec, NetSpec, PlacedBlock
from prunet_zoo.supernet.masked import Group, MaskedNet

# the module behind which the mask of a block stands, and the BatchNorms of the masked channels
_SITES = {"irb": "depthwise.act", "fused_irb": "expand.act", "rep": "act"}
_NORMS = {"irb": ("expand.norm", "depthwise.norm"), "fused_irb": ("expand.norm",), "rep": ("dense.norm", "point.norm")}
Cut = tuple[torch.Tensor | None, torch.Tensor | None]  # which rows and columns of a tensor stay; None: all


class SpecNet(MaskedNet):
    """The classifier of a start network, with a mask on

    - the hidden channels of each irb (behind the activation of the depth-wise convolution, before SE) and fused_irb
      (behind that of the expansion);
    - the output channels of each rep block whose layer has a width of its own, behind the activation of the summed
      branches.

    A layer without a width to choose has no mask. Nor has a rep block in front of an inverted residual block with a
    residual connection or SE: their form depends on the number of their input channels. Where the block would get a
    residual connection only at one width of the rep block's grid, the grid goes without that width.

    Args:
        space: the search space. Its grid below the start's own widths is what may be kept.
        start: the start network, which must be one of the space; None: the space's largest.
        state: weights of its classifier; None: fresh ones.

    Attributes:
        start: the start network's encoding.
        spec: and its spec.

    Raises:
        SpecError: the start is not in the space, or there is no width to choose.
        CheckpointError: weights of another network.
    """

    net: PruNetClassifier

    def __init__(
        self,
        space: SearchSpace,
        start: NetSpec | Sequence[Choice] | None = None,
        state: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        named = start.name if isinstance(start, NetSpec) else space.name
        chosen = space.largest() if start is None else start
        encoding = space.encode(chosen) if isinstance(chosen, NetSpec) else tuple(chosen)
        spec = space.decode(encoding, named)
        net = PruNetClassifier(spec)
        if state is not None:
            load_weights(net, state, origin="the weights given for the start network")
        found = list(_groups(space, encoding, spec))
        if not found:
            raise SpecError(f"{spec.name!r} has no width to choose in space {space.name!r}; give a wider start network")
        super().__init__(net, [group for group, _ in found], [layer for _, layer in found])
        self._space, self.start, self.spec = space, encoding, spec

    @property
    def space(self) -> SearchSpace:
        """The search space."""
        return self._space

    def encode(self, widths: Sequence[int]) -> Encoding:
        """The encoding with so many channels a group, each rounded up to the group's grid."""
        found = list(self.start)
        for group, layer, width in zip(self.groups, self.layers, widths, strict=True):
            choice = self.start[layer]
            assert choice is not None
            found[layer] = choice[0], next(w for w in group.widths if w >= width)
        return tuple(found)

    def at(self, widths: Sequence[int]) -> NetSpec:
        """The spec with exactly so many channels a group, on the grid or not."""
        mine = {group.name: width for group, width in zip(self.groups, widths, strict=True)}
        stages: list[list[BlockSpec]] = [[] for _ in self.spec.stages]
        for place in self.spec.placed():
            field = "out_channels" if place.block.type == "rep" else "hidden"
            changes = {field: mine[place.name]} if place.name in mine else {}
            stages[place.stage].append(place.block.model_copy(update=changes) if changes else place.block)
        return self.spec.model_copy(
            update={
                "stages": tuple(
                    s.model_copy(update={"blocks": tuple(b)}) for s, b in zip(self.spec.stages, stages, strict=True)
                )
            }
        )

    def remove(self, keep: Sequence[torch.Tensor], name: str) -> tuple[NetSpec, PruNetClassifier]:
        """See `MaskedNet.remove`; raises `SpecError` where a count is not on its group's grid."""
        spec = self._spec_of(keep, name)
        kept = self._kept(keep)
        device = next(self.net.parameters()).device
        small = PruNetClassifier(spec).to(device).train(self.net.training)
        own, state = self.net.state_dict(), small.state_dict()
        for path, cut in self._cuts(kept).items():
            state[path] = _take(own[path], cut)
        for place, before, mine in self._reps(kept):
            block = slice_rep(self._rep(place), before, mine, _narrow(place.block, mine), spec.bn_eps)
            state |= {f"{place.name}.{k}": v for k, v in block.state_dict().items()}
        small.load_state_dict(state)
        return spec, small

    @torch.no_grad()
    def restore(self, keep: Sequence[torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """See `MaskedNet.restore`. Where a rep block's k×k branch carries its identity, the identity of the channels
        that stay gets scale 0."""
        spec = self._spec_of(keep, "restored")
        odd = compare(shapes(PruNetClassifier(spec).state_dict()), shapes(dict(state)))
        if any(odd):
            names = few(name for names in odd for name in names)
            raise CheckpointError(f"these are no weights of the network without the channels: {names} differ")
        kept, own = self._kept(keep), self.net.state_dict()
        for path, cut in self._cuts(kept).items():
            _put(own[path], state[path], cut)
        for place, before, mine in self._reps(kept):
            block = self._rep(place)
            small = slice_rep(block, before, mine, _narrow(place.block, mine), spec.bn_eps)
            own_state = {
                k.removeprefix(f"{place.name}."): v for k, v in state.items() if k.startswith(f"{place.name}.")
            }
            small.load_state_dict(own_state)
            _restore_rep(block, small, before, mine)

    def _spec_of(self, keep: Sequence[torch.Tensor], name: str) -> NetSpec:
        self._check(keep)
        counts = [int(k.sum()) for k in keep]
        for group, count in zip(self.groups, counts, strict=True):
            if count not in group.widths:
                raise SpecError(f"{group.name} can keep {few(group.widths)} channels, not {count}")
        return self.space.decode(self.encode(counts), name)

    def _kept(self, keep: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Indices of the channels that stay, by name of the block."""
        device = next(self.net.parameters()).device
        pairs = zip(self.groups, keep, strict=True)
        return {group.name: mine.nonzero().flatten().to(device) for group, mine in pairs}

    def _flow(self, kept: dict[str, torch.Tensor]) -> Iterator[tuple[PlacedBlock, torch.Tensor | None]]:
        """The start network's blocks, each with the input channels that stay (None: all)."""
        before: torch.Tensor | None = None
        for place in self.spec.placed():
            yield place, before
            before = kept.get(place.name) if place.block.type == "rep" else None

    def _reps(self, kept: dict[str, torch.Tensor]) -> Iterator[tuple[PlacedBlock, torch.Tensor, torch.Tensor]]:
        """The rep blocks with the indices of their input and output channels that stay."""
        device = next(self.net.parameters()).device
        for place, before in self._flow(kept):
            if place.block.type == "rep":
                inputs = torch.arange(place.in_channels, device=device) if before is None else before
                every = torch.arange(place.block.out_channels, device=device)
                yield place, inputs, kept.get(place.name, every)

    def _rep(self, place: PlacedBlock) -> RepBlock:
        block = self.net.get_submodule(place.name)
        assert isinstance(block, RepBlock)
        return block

    def _cuts(self, kept: dict[str, torch.Tensor]) -> dict[str, Cut]:
        """What stays of every tensor outside of rep blocks."""
        cuts: dict[str, Cut] = {}
        last: torch.Tensor | None = None
        for place, before in self._flow(kept):
            mine = kept.get(place.name)
            last = mine if place.block.type == "rep" else None
            if place.block.type != "rep":
                for name in self.net.get_submodule(place.name).state_dict():
                    cuts[f"{place.name}.{name}"] = _cut(name, mine, before)
        for end in ("tail", "head", "classifier"):
            for name in self.net.get_submodule(end).state_dict():
                cuts[f"{end}.{name}"] = (None, last if (end, name) == ("tail", "conv.weight") else None)
        return cuts


def _groups(space: SearchSpace, start: Encoding, spec: NetSpec) -> Iterator[tuple[Group, int]]:
    """The groups of a start network, each with its layer in the space."""
    places = list(spec.placed())
    chosen = [i for i, choice in enumerate(start) if choice is not None]
    first = len(places) - len(chosen)  # the stem's blocks come before the space's
    for at, index in enumerate(chosen, start=first):
        place, choice = places[at], start[index]
        follower = places[at + 1] if at + 1 < len(places) else None
        assert choice is not None
        widths = tuple(w for w in space.layers[index].candidate_widths(choice[0]) if 0 < w <= choice[1])
        kind, name = place.block.type, place.name
        if kind == "rep" and follower is not None:
            widths = tuple(w for w in widths if _same_form(follower, w))
        if len(widths) < 2:
            continue
        norms = _NORMS[kind] + (("identity",) if place.block.has_identity(place.in_channels) else ())
        sites = (f"{name}.{_SITES[kind]}",)
        yield Group(name, choice[1], widths, sites, tuple(f"{name}.{norm}" for norm in norms)), index


def _same_form(place: PlacedBlock, width: int) -> bool:
    """Whether a block is what it is in the start network, but narrower, where it gets ``width`` input channels."""
    if width == place.in_channels:
        return True
    return not (
        place.block.has_residual(place.in_channels)
        or place.block.has_residual(width)  # a connection that the masked network does not have
        or place.block.se_channels(place.in_channels) > 0
    )


def _cut(name: str, mine: torch.Tensor | None, before: torch.Tensor | None) -> Cut:
    """Rows and columns that stay of a tensor of a conv, irb or fused_irb block.

    Args:
        name: of the tensor in its block.
        mine: hidden channels that stay.
        before: input channels that stay.
    """
    part, _, rest = name.partition(".")
    weight = rest == "conv.weight"
    if part == "conv":
        return None, before if weight else None
    if part == "expand":
        return mine, before if weight else None
    if part == "depthwise":
        return mine, None
    if part == "se":
        return (mine, None) if rest.startswith("expand.") else (None, mine if rest == "reduce.weight" else None)
    return None, mine if weight else None  # project


def _take(tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    rows, columns = cut
    if tensor.dim() and rows is not None:
        tensor = tensor[rows]
    return tensor if columns is None else tensor[:, columns]


def _put(target: torch.Tensor, value: torch.Tensor, cut: Cut) -> None:
    """Write ``value`` where `_take` reads."""
    rows, columns = cut
    value = value.to(target.device, target.dtype)
    if rows is not None and columns is not None:
        target[rows[:, None], columns] = value
    elif rows is not None and target.dim():
        target[rows] = value
    elif columns is not None:
        target[:, columns] = value
    else:
        target.copy_(value)


def _narrow(block: BlockSpec, keep: torch.Tensor) -> BlockSpec:
    return block.model_copy(update={"out_channels": len(keep)})


def _restore_rep(block: RepBlock, small: RepBlock, before: torch.Tensor, mine: torch.Tensor) -> None:
    """Put a slice of a rep block back, so that the block computes on the channels that stay what the slice does."""
    whole: Any = block
    part: Any = small
    same = whole.identity is not None and torch.equal(before, mine)
    if part.identity is not None and not same:  # between channels that are not each other's in the whole block
        part.absorb(*part.equivalent())
    for own, new in ((whole.dense, part.dense), (whole.point, part.point)):
        _put(own.conv.weight, new.conv.weight, (mine, before))
        _put_norm(own.norm, new.norm, mine)
    if same:
        _put_norm(whole.identity, part.identity, mine)
    elif whole.identity is not None:
        whole.identity.weight[mine] = 0.0
        whole.identity.bias[mine] = 0.0


def _put_norm(norm: nn.Module, new: nn.Module, rows: torch.Tensor) -> None:
    own, theirs = norm.state_dict(), new.state_dict()
    for name, tensor in own.items():
        _put(tensor, theirs[name], (rows if tensor.dim() else None, None))
