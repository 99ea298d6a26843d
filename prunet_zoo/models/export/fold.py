"""BatchNorm folded into the convolution before it, wherever that is exact.

In eval mode a BatchNorm is y = γ (x - μ) / √(σ² + ε) + β, per channel, so behind a convolution with weight W and bias b
it is the convolution with γ W / √(σ² + ε) and γ (b - μ) / √(σ² + ε) + β (arXiv 1712.05877, section 3.2). Which layers
stand behind which is not read from class or attribute names but seen in a run: two layers are folded when everything
that the convolution gives goes to that BatchNorm and to nothing else, and that BatchNorm gets nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from prunet_zoo.models.layers import ConvNormAct
from prunet_zoo.models.rep import switch_to_deploy

Pair = tuple[_ConvNd, _BatchNorm]
_PLAIN = (_BatchNorm.forward, nn.SyncBatchNorm.forward)  # that of BatchNorm1d to 3d, and of subclasses without another


def fold_batchnorm(module: nn.Module, example: torch.Tensor | None = None) -> nn.Module:
    """Return a copy in eval mode with BatchNorm folded into convolutions; it computes the same up to rounding.

    Rep blocks become the one convolution that they are deployed as (`RepBlock.switch_to_deploy`). What cannot be folded
    exactly stays: other norms, a BatchNorm before its convolution, one of several behind a shared convolution.

    Args:
        module: takes one tensor.
        example: an input on the module's device. The pairs are those of a run on it. None: those within `ConvNormAct`
            are folded, all that networks of a `NetSpec` have.

    Raises:
        SpecError: a rep block with another norm than BatchNorm.
    """
    folded = copy.deepcopy(module).eval()
    switch_to_deploy(folded)
    pairs = _known_pairs(folded) if example is None else _seen_pairs(folded, example)
    rest = {norm: _fold(conv, norm) for conv, norm in pairs}
    for parent in folded.modules():
        for name, child in parent._modules.items():
            if child in rest:
                setattr(parent, name, rest[child])
    return folded


def count_batchnorms(module: nn.Module) -> int:
    """How many BatchNorm layers a network has."""
    return sum(isinstance(layer, _BatchNorm) for layer in module.modules())


def _fold(conv: _ConvNd, norm: _BatchNorm) -> nn.Module:
    """Put ``norm`` into ``conv``; returns what stands in its place."""
    tensors = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    wide: list[Any] = [None if t is None else t.detach().double() for t in tensors]
    w, b, mean, var, gamma, beta = wide
    weight, bias = fuse_conv_bn_weights(w, b, mean, var, norm.eps, gamma, beta)
    conv.weight, conv.bias = (nn.Parameter(t.to(conv.weight.dtype), requires_grad=False) for t in (weight, bias))
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()


def _is_foldable(norm: nn.Module) -> bool:
    """Whether the layer is known to do nothing but what `_fold` accounts for."""
    known = type(norm).forward in _PLAIN or type(norm) is BatchNormAct2d
    return isinstance(norm, _BatchNorm) and known and norm.running_mean is not None


def _known_pairs(module: nn.Module) -> list[Pair]:
    layers = [layer for layer in module.modules() if isinstance(layer, ConvNormAct)]
    pairs: list[tuple[Any, Any]] = [(layer.conv, layer.norm) for layer in layers if _is_foldable(layer.norm)]
    return pairs


def _seen_pairs(module: nn.Module, example: torch.Tensor) -> list[Pair]:
    convs = _by_tensor((m, m._parameters.get("weight")) for m in module.modules() if isinstance(m, _ConvNd))
    norms = _by_tensor((m, m._buffers["running_mean"]) for m in module.modules() if _is_foldable(m))
    watch = _Watch(set(convs), set(norms))
    with torch.no_grad(), watch:
        out = module(example)
    watch.use(tree_leaves(out))
    return [(convs[weight], norms[mean]) for weight, mean in watch.pairs()]


def _by_tensor(owned: Iterable[tuple[Any, torch.Tensor | None]]) -> dict[int, Any]:
    """Module by the id of its tensor; tensors of several modules are left out."""
    owners: dict[int, list[Any]] = {}
    for module, tensor in owned:
        if tensor is not None:
            owners.setdefault(id(tensor), []).append(module)
    return {key: modules[0] for key, modules in owners.items() if len(modules) == 1}


class _Watch(TorchDispatchMode):
    """Sees every operator of a run, and so where the outputs of convolutions go.

    Args:
        convs: ids of convolutions' weights.
        norms: ids of BatchNorms' running means.
    """

    def __init__(self, convs: set[int], norms: set[int]) -> None:
        super().__init__()
        self.convs, self.norms = convs, norms
        self.made: Any = WeakTensorKeyDictionary()  # output of a convolution → id of its weight
        self.goes_to: dict[int, set[int]] = {}  # convolution → BatchNorms; -1: something else
        self.comes_from: dict[int, set[int | None]] = {}  # BatchNorm → convolutions; None: something else

    def use(self, values: Iterable[Any]) -> None:
        """Note that something else gets these values: outputs of convolutions, or their weights."""
        for value in values:
            if isinstance(value, torch.Tensor):
                conv = id(value) if id(value) in self.convs else self.made.get(value)
                if conv is not None:
                    self.goes_to.setdefault(conv, set()).add(-1)

    def pairs(self) -> list[tuple[int, int]]:
        """Ids of convolutions and BatchNorms that belong to each other alone."""
        single = [(conv, next(iter(norms))) for conv, norms in self.goes_to.items() if len(norms) == 1]
        return [(conv, norm) for conv, norm in single if self.comes_from.get(norm) == {conv}]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and id(args[1]) in self.convs:
            self.use([args[0]])
            self.made[out] = id(args[1])
            seen = self.goes_to.setdefault(id(args[1]), set())
            if args[6]:  # transposed: the weight's channels lie otherwise
                seen.add(-1)
        elif "batch_norm" in func.__name__ and len(args) > 5 and id(args[3]) in self.norms and args[5] is False:
            source = self.made.get(args[0])
            self.comes_from.setdefault(id(args[3]), set()).add(source)
            if source is not None:
                self.goes_to[source].add(id(args[3]))
        else:
            self.use(tree_leaves((args, kwargs)))
        return out
