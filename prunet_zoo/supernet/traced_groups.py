"""Which channels of a CNN can be removed together, and where a mask stands in for it: by torch-pruning's graph.

torch-pruning (DepGraph, arXiv 2301.12900) follows one forward pass and tells, for the outputs of each convolution,
every layer that loses channels with it. Pruning-as-Search (arXiv 2206.01198) masks behind the activation, in residual
nets behind addition and activation. Finding those places in any network is ours: masked channels are zero from the mask
on, as long as only operations follow that keep zero (pooling, activations, products, depth-wise convolutions without
bias); a choice of places is right when every convolution that takes the channels in sees zeros. Of the right ones we
take the last, so that a sum has one mask behind it instead of one on each branch.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunet_zoo.errors import PrunetError
from prunet_zoo.models.channels import is_depthwise, layer_shape

# names of autograd's nodes, in lower case: zero stays zero; what only moves or averages values is no place for a mask
_MOVES = ("pool", "mean", "view", "reshape", "squeeze", "flatten", "clone", "alias", "permute", "transpose", "expand")
_ACTIVATIONS = ("relu", "silu", "hardswish", "hardtanh", "gelu", "elu", "mish", "tanh", "dropout")
_REORDERS = ("_ConcatOp", "_SplitOp", "_SliceOp", "_UnbindOp")


@dataclass(frozen=True)
class Part:
    """A layer that loses channels with a group: its channel ``index[i]`` belongs to the group's channel ``root[i]``."""

    module: str
    side: str  # 'out' or 'in'
    index: torch.Tensor
    root: torch.Tensor


@dataclass(frozen=True)
class Coupled:
    """Channels that go together: what loses them, and the modules behind which a mask does the same."""

    name: str
    channels: int
    parts: tuple[Part, ...]
    sites: tuple[str, ...]
    norms: tuple[str, ...]
    sources: tuple[str, ...] = ()  # convolutions and linear layers whose outputs the channels are


class _Unfit(Exception):
    """Why a group cannot be offered."""


def find_coupled(net: nn.Module, in_channels: int, size: tuple[int, int]) -> tuple[list[Coupled], dict[str, str]]:
    """Trace a CNN on an image of (in_channels, H, W).

    Returns:
        The groups in the order of execution, and by name of its first layer why another group is none. What the
        network's output depends on one by one, as the classifier's channels, is in neither.

    Raises:
        PrunetError: torch-pruning is not installed, or cannot follow the network.
    """
    trace = _Trace(net, in_channels, size)
    found: list[Coupled] = []
    skipped: dict[str, str] = {}
    for raw in trace.groups():
        name = trace.first_source(raw)
        try:
            found.append(trace.coupled(raw, name))
        except _Unfit as why:
            if str(why):
                skipped[name] = str(why)
    order = {name: i for i, name in enumerate(trace.order)}
    found.sort(key=lambda group: order[group.name])
    return found, dict(sorted(skipped.items(), key=lambda item: order[item[0]]))


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ModuleNotFoundError:
        raise PrunetError("networks that are no specs need torch-pruning: pip install 'prunet-zoo[prune]'") from None
    return torch_pruning


class _Trace:
    """One forward pass as torch-pruning's graph, and the modules that made each tensor of it."""

    def __init__(self, net: nn.Module, in_channels: int, size: tuple[int, int]) -> None:
        tp = _torch_pruning()
        own = copy.deepcopy(net).float().cpu().eval().requires_grad_(True)
        self.names = {module: name for name, module in own.named_modules()}
        self.made: dict[Any, list[tuple[str, nn.Module, tuple[int, ...]]]] = {}  # by autograd's node
        self.order: list[str] = []  # layers as they are executed
        handles = [m.register_forward_hook(self._note) for m in own.modules() if m is not own]
        self.graph = tp.DependencyGraph()
        try:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # a list: of a tensor torch-pruning tries the image without its batch first, and some layers run twice
                self.graph.build_dependency(own, [torch.zeros(1, in_channels, *size)], verbose=False)
        except (RuntimeError, ValueError, AssertionError, AttributeError, TypeError, KeyError, IndexError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise PrunetError(
                f"torch-pruning cannot follow {type(net).__name__} on input of {size[0]}×{size[1]} px ({reason})"
            ) from error
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.grad_fn is not None:
            self.made.setdefault(output.grad_fn, []).append((self.names[module], module, tuple(output.shape)))
            self.order.append(self.names[module])

    def groups(self) -> Iterator[Any]:
        return iter(list(self.graph.get_all_groups(root_module_types=(nn.Conv2d, nn.Linear))))

    def first_source(self, raw: Any) -> str:
        """The first executed layer that makes the channels."""
        names = [self.names[d.target.module] for d, _ in raw if self._makes(d)]
        return min(names, key=self.order.index)

    def _makes(self, dep: Any) -> bool:
        layer = dep.target.module
        return isinstance(layer, nn.Conv2d | nn.Linear) and not is_depthwise(layer) and not self._takes(dep)

    def _takes(self, dep: Any) -> bool:
        """Whether a dependency is the loss of input channels of a dense layer."""
        layer = dep.target.module
        if not isinstance(layer, nn.Conv2d | nn.Linear) or is_depthwise(layer):
            return False
        return bool(dep.handler == self.graph.get_pruner_of_module(layer).prune_in_channels)

    def coupled(self, raw: Any, name: str) -> Coupled:
        """The group of torch-pruning's ``raw``; raises `_Unfit` with the reason, without one for the outputs."""
        nodes = [dep.target for dep, _ in raw]
        if any(type(node.module).__name__ == "_OutputOp" for node in nodes):
            raise _Unfit  # what the network returns
        if any(type(node.module).__name__ in _REORDERS for node in nodes):
            raise _Unfit("its channels are concatenated, split or sliced")
        parts = [self._part(item) for item in raw if type(item.dep.target.module).__module__ != "torch_pruning.ops"]
        channels = 1 + max(int(part.root.max()) for part in parts)
        takers = [dep.target for dep, _ in raw if self._takes(dep)]
        if not takers:  # the network's own outputs
            raise _Unfit
        if all(self._is_gate(node) for node in takers):
            raise _Unfit("the squeeze of a squeeze-and-excite block costs next to nothing")
        carriers = [dep.target for dep, _ in raw if not self._takes(dep)]
        sites = self._sites(carriers, takers, channels)
        whole = dict.fromkeys(part.module for part in parts if part.side == "out" and len(part.index) == channels)
        norms = tuple(n for n in whole if len(layer_shape(self._module(n)) or ()) == 1)
        sources = tuple(n for n in whole if n not in norms)
        return Coupled(name, channels, tuple(parts), sites, norms, sources)

    def _module(self, name: str) -> nn.Module:
        return next(m for m, n in self.names.items() if n == name)

    def _part(self, item: Any) -> Part:
        layer = item.dep.target.module
        shape = layer_shape(layer) if isinstance(layer, nn.Module) else None
        if shape is None:
            kind = type(layer).__name__
            raise _Unfit(f"{kind} {self.names.get(layer, 'of a module')} cannot lose channels here")
        name = self.names[layer]
        if len(shape) == 3 and shape[2] > 1 and not is_depthwise(layer):
            raise _Unfit(f"{name} is a convolution with {shape[2]} groups")
        side = "in" if self._takes(item.dep) else "out"
        return Part(name, side, torch.tensor(item.idxs), torch.tensor(item.root_idxs))

    def _is_gate(self, node: Any) -> bool:
        """Whether a layer's outputs go through a sigmoid: the second convolution of squeeze-and-excite."""
        following = [out.grad_fn.name().lower() for out in node.outputs if out.grad_fn is not None]
        return bool(following) and all("sigmoid" in kind for kind in following)

    def _sites(self, carriers: list[Any], takers: list[Any], channels: int) -> tuple[str, ...]:
        places = {}
        for node in carriers:
            site = self._site(node, channels)
            if site is not None:
                places[node] = site
        chosen = sorted(places, key=lambda node: self.order.index(places[node]))
        if not _all_zero(takers, set(chosen)):
            raise _Unfit("no activation, sum or BatchNorm was found behind which all its consumers see zeros")
        for node in list(chosen):  # the earliest first: the last places stay
            rest = [other for other in chosen if other is not node]
            if _all_zero(takers, set(rest)):
                chosen = rest
        return tuple(places[node] for node in chosen)

    def _site(self, node: Any, channels: int) -> str | None:
        """The module behind which the node's tensor, (B, channels, H, W), can be masked."""
        if node.grad_fn is None or _is(node.grad_fn, (*_MOVES, "mul", "convolution", "addmm")):
            return None
        for name, module, shape in self.made.get(node.grad_fn, []):
            once = self.order.count(name) == 1  # one activation may serve several places: a mask would be on all
            if once and not isinstance(module, nn.Identity) and len(shape) == 4 and shape[1] == channels:
                return name
        return None


def _is(grad_fn: Any, kinds: tuple[str, ...]) -> bool:
    return any(kind in grad_fn.name().lower() for kind in kinds)


def _all_zero(takers: list[Any], masked: set[Any]) -> bool:
    """Whether the masked channels are zero wherever a dense layer takes them in."""
    known: dict[Any, bool] = {}

    def zero(node: Any) -> bool:
        if node not in known:
            known[node] = False  # a cycle proves nothing
            known[node] = node in masked or _keeps_zero(node, zero)
        return known[node]

    return all(any(True for _ in _data(node)) and all(zero(before) for before in _data(node)) for node in takers)


def _data(node: Any) -> Iterator[Any]:
    """What a layer takes in, without the transposed weight that a linear layer's autograd node has as well."""
    for before in node.inputs:
        if before.grad_fn is None or not before.grad_fn.name().lower().startswith("tbackward"):
            yield before


def _keeps_zero(node: Any, zero: Any) -> bool:
    if node.grad_fn is None or not node.inputs:
        return False
    if _is(node.grad_fn, ("mul",)):
        return any(zero(before) for before in node.inputs)
    depthwise = isinstance(node.module, nn.Conv2d) and is_depthwise(node.module) and node.module.bias is None
    is_sum = "add" in node.grad_fn.name().lower() and "addmm" not in node.grad_fn.name().lower()
    if depthwise or is_sum or _is(node.grad_fn, (*_MOVES, *_ACTIVATIONS)):
        return all(zero(before) for before in node.inputs)
    return False
