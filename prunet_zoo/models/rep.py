"""The rep block (RepVGG, arXiv 2101.03697): three branches while it is trained, one convolution where it is deployed.

In eval mode each branch is linear: a BatchNorm is a scale and a shift of each channel, so a convolution before it takes
both in; a 1×1 kernel is a k×k kernel with zeros around it, and the identity is the kernel with a single 1 (section 3.3
of the paper). Their sum is one kernel and one bias, exact but for rounding.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunet_zoo.errors import CheckpointError, SpecError
from prunet_zoo.models.layers import ConvNormAct, NormFactory, make_act, make_norm_factory
from prunet_zoo.spec import BlockSpec

Folded = tuple[torch.Tensor, torch.Tensor]  # kernel (out, in, k, k), bias (out,)


class RepBlock(nn.Module):
    """act(BN(k×k conv(x)) + BN(1×1 conv(x)) [+ BN(x)]). (B, in, H, W) → (B, out, H', W').

    Attributes:
        dense, point: the two convolutions, each with its norm.
        identity: the norm of the input; None where the shape changes.
        conv: the one convolution, with bias, of the deployed form; None in the form that is trained. The branches are
            gone where it is there.
    """

    def __init__(self, spec: BlockSpec, in_channels: int, eps: float, norm: NormFactory | None = None) -> None:
        super().__init__()
        out, kernel, stride = spec.out_channels, spec.kernel_size, spec.stride
        self.dense: ConvNormAct | None = ConvNormAct(in_channels, out, kernel, stride, act=None, eps=eps, norm=norm)
        self.point: ConvNormAct | None = ConvNormAct(in_channels, out, 1, stride, act=None, eps=eps, norm=norm)
        make_norm = norm or make_norm_factory()
        self.identity: nn.Module | None = make_norm(out, eps) if spec.has_identity(in_channels) else None
        self.conv: nn.Conv2d | None = None
        self.act = make_act(spec.act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.conv is not None:
            y = self.conv(x)
        else:
            y = self.dense(x) + self.point(x)  # type: ignore[misc]
            if self.identity is not None:
                y = y + self.identity(x)
        return self.act(y)

    @property
    def is_deployed(self) -> bool:
        """Whether the branches are folded."""
        return self.conv is not None

    def equivalent(self) -> Folded:
        """Kernel (out, in, k, k) and bias (out,) of the convolution that computes what the branches do in eval mode.

        Raises:
            SpecError: a norm is no BatchNorm with running statistics, so that it depends on the input.
        """
        if self.conv is not None:
            assert self.conv.bias is not None
            return self.conv.weight.detach().clone(), self.conv.bias.detach().clone()
        kernel, bias = self._fold()
        dtype = self.kxk().conv.weight.dtype
        return kernel.to(dtype), bias.to(dtype)

    def kxk(self) -> ConvNormAct:
        """The k×k branch of the form that is trained."""
        assert self.dense is not None
        return self.dense

    def _fold(self) -> Folded:
        """`equivalent` in float64, of the form that is trained."""
        assert self.point is not None
        weight = self.kxk().conv.weight
        scale, bias = affine(self.kxk().norm)
        kernel = scale.view(-1, 1, 1, 1) * weight.detach().double()
        scale, shift = affine(self.point.norm)
        kernel = kernel + _pad(scale.view(-1, 1, 1, 1) * self.point.conv.weight.detach().double(), weight.shape[-1])
        bias = bias + shift
        if self.identity is not None:
            scale, shift = affine(self.identity)
            kernel, bias = kernel + _dirac(scale, weight), bias + shift
        return kernel, bias

    def switch_to_deploy(self) -> RepBlock:
        """Fold the branches into one convolution, in place; returns the block. Nothing happens a second time.

        The running statistics are used, also where the block is in training mode.

        Raises:
            SpecError: see `equivalent`.
        """
        if self.conv is not None:
            return self
        kernel, bias = self._fold()
        like = self.kxk().conv
        conv = nn.Conv2d(like.in_channels, like.out_channels, like.kernel_size, like.stride, like.padding)  # type: ignore[arg-type]
        learns = like.weight.requires_grad
        conv.weight = nn.Parameter(kernel.to(like.weight.dtype), requires_grad=learns)
        conv.bias = nn.Parameter(bias.to(like.weight.dtype), requires_grad=learns)
        self.conv = conv.train(self.training)
        self.dense = self.point = self.identity = None
        return self

    def absorb(self, kernel: torch.Tensor, bias: torch.Tensor) -> RepBlock:
        """Make the block, in the form that is trained, compute in eval mode what one convolution does; returns it.

        The k×k branch takes it over, the other branches get scale 0. Running statistics are those of a normalised
        output, so in training mode, where BatchNorm takes those of the batch, it is another function.

        Args:
            kernel: (out, in, k, k).
            bias: (out,).
        """
        if self.conv is not None:
            raise SpecError("a deployed rep block has no branches to absorb a kernel; use one that is not deployed")
        for norm in (self.kxk().norm, *self._others()):
            _check_norm(norm)
            if norm.weight is None:
                raise SpecError(
                    "a rep block absorbs a kernel into its norms' scales; leave affine=False out of norm_cfg"
                )
        dense = self.kxk()
        ones = torch.ones_like(bias, dtype=torch.double)
        with torch.no_grad():
            dense.conv.weight.copy_(kernel)
        _set_norm(dense.norm, ones, bias.double(), 0.0 * ones, ones)
        for branch in self._others():
            _silence(branch)
        return self

    def _others(self) -> list[nn.Module]:
        """Norms of the branches besides the k×k one."""
        assert self.point is not None
        return [self.point.norm] if self.identity is None else [self.point.norm, self.identity]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        reason = misfit_of_form(self, state_dict, prefix)
        if reason is not None:
            raise CheckpointError(reason)
        super()._load_from_state_dict(state_dict, prefix, *args)


def misfit_of_form(block: RepBlock, names: Container[str], prefix: str) -> str | None:
    """What to say where tensors ``names`` under ``prefix`` are of the block's other form; None where they are not."""
    deployed = f"{prefix}conv.weight" in names
    trained = f"{prefix}dense.conv.weight" in names
    if deployed and not trained and not block.is_deployed:
        return (
            f"{prefix}conv.weight: these weights are of a network that was switched to its deployed form, the network "
            "is in the form that is trained: call switch_to_deploy() of the network before loading, or load weights "
            "that were saved before the switch"
        )
    if trained and not deployed and block.is_deployed:
        return (
            f"{prefix}dense.conv.weight: these weights are of the form that is trained, the network is switched to its "
            "deployed form: load them into a fresh network, then call its switch_to_deploy()"
        )
    return None


def switch_to_deploy(module: nn.Module) -> int:
    """Fold the branches of every rep block of ``module``, in place; returns how many were folded.

    Raises:
        SpecError: a rep block's norm cannot be folded; then no block was changed.
    """
    blocks = [m for m in module.modules() if isinstance(m, RepBlock) and not m.is_deployed]
    for block in blocks:
        for norm in (block.kxk().norm, *block._others()):
            _check_norm(norm)
    for block in blocks:
        block.switch_to_deploy()
    return len(blocks)


def slice_rep(block: RepBlock, keep_in: torch.Tensor, keep_out: torch.Tensor, spec: BlockSpec, eps: float) -> RepBlock:
    """The block with a part of its channels, in the form that is trained.

    In eval mode it computes exactly `equivalent` of ``block`` with the rows ``keep_out`` and the columns ``keep_in``.
    The rule for the identity is ours: where ``keep_in`` and ``keep_out`` are the same (or ``block`` has none) every
    branch is sliced, and training and recalibrating BatchNorm go on as with the whole block. Otherwise channel i of the
    input does not stand where channel i of the output does, and the k×k branch carries the identity: its kernel is that
    of both. Its running mean follows exactly from those of the two branches, its variance as if they were uncorrelated.
    So with new statistics of the same data, the mean of each channel stays and its scale changes by what their
    correlation is. If the new block has a norm of its input by its shape, that has scale 0.

    Args:
        block: in either form.
        keep_in: indices of the input channels that stay, int64 (n,).
        keep_out: of the output channels, int64 (m,).
        spec: of the new block; its out_channels are m, its kernel and stride those of ``block``.
        eps: of the new block's norms, where the spec has none of its own.

    Raises:
        SpecError: the spec does not fit, or a norm is no BatchNorm with running statistics.
    """
    source = block.conv if block.conv is not None else block.kxk().conv
    if (spec.type, spec.out_channels) != ("rep", len(keep_out)) or len(keep_in) == 0:
        raise SpecError(f"{len(keep_out)} output and {len(keep_in)} input channels were chosen for {spec.to_dict()}")
    if (spec.kernel_size, spec.stride) != (source.kernel_size[0], source.stride[0]):
        raise SpecError(f"a slice has the kernel and stride of its block, {source}; the spec is {spec.to_dict()}")
    rows, columns = keep_out.to(source.weight.device), keep_in.to(source.weight.device)
    new = RepBlock(spec, len(columns), eps if spec.bn_eps is None else spec.bn_eps)
    new.to(device=source.weight.device, dtype=source.weight.dtype).train(block.training)
    if block.conv is not None:
        kernel, bias = block.equivalent()
        return new.absorb(kernel[rows][:, columns], bias[rows])
    assert new.point is not None and block.point is not None
    with torch.no_grad():
        for mine, theirs in ((new.kxk(), block.kxk()), (new.point, block.point)):
            mine.conv.weight.copy_(theirs.conv.weight[rows][:, columns])
            _copy_norm(mine.norm, theirs.norm, rows)
        if block.identity is not None and torch.equal(rows, columns):
            assert new.identity is not None  # the block has one, and as many channels come in as go out
            _copy_norm(new.identity, block.identity, rows)
            return new
        if block.identity is not None:
            _carry_identity(new, block, rows, columns)
        if new.identity is not None:
            _silence(new.identity)
    return new


def _carry_identity(new: RepBlock, block: RepBlock, rows: torch.Tensor, columns: torch.Tensor) -> None:
    """Put the identity of ``block`` into the k×k branch of ``new``, which is a slice of that of ``block``."""
    dense, identity = block.kxk(), block.identity
    assert identity is not None
    (scale, shift), (own, own_shift) = affine(dense.norm), affine(identity)
    weight = dense.conv.weight.double()
    kernel = scale.view(-1, 1, 1, 1) * weight + _dirac(own, weight)
    mean = scale * dense.norm.running_mean + own * identity.running_mean  # type: ignore[operator]
    var = scale**2 * dense.norm.running_var + own**2 * identity.running_var  # type: ignore[operator]
    var = var.clamp_min(1e-12)
    new.kxk().conv.weight.copy_(kernel[rows][:, columns])
    bias = (shift + own_shift + mean)[rows]
    _set_norm(new.kxk().norm, torch.ones_like(bias), bias, mean[rows], var[rows])


def affine(norm: nn.Module) -> Folded:
    """Scale and shift (C,), float64, of a BatchNorm in eval mode; raises `SpecError` for another norm."""
    _check_norm(norm)
    n: Any = norm
    mean, var = n.running_mean.double(), n.running_var.double()
    scale = (var + n.eps).rsqrt()
    if n.weight is not None:
        scale = scale * n.weight.detach().double()
    shift = -mean * scale
    return scale, shift if n.bias is None else shift + n.bias.detach().double()


def _check_norm(norm: nn.Module) -> None:
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        raise SpecError(
            f"a rep block with {norm} cannot be folded, because that depends on the input: build the network with "
            "norm_cfg=dict(type='BN') or 'SyncBN', with running statistics"
        )


def _set_norm(norm: Any, scale: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> None:
    """Make a norm ``scale · (x - mean) + bias`` in eval mode, with these running statistics."""
    with torch.no_grad():
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.weight.copy_(scale * (norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(bias)


def _copy_norm(new: Any, norm: Any, keep: torch.Tensor) -> None:
    """Make ``new`` the norm of the channels ``keep``, also where its eps is another."""
    _check_norm(norm)
    scale, _ = affine(norm)
    new.momentum = norm.momentum
    bias = torch.zeros_like(scale[keep]) if norm.bias is None else norm.bias.detach()[keep].double()
    _set_norm(new, scale[keep], bias, norm.running_mean[keep], norm.running_var[keep])
    if new.eps == norm.eps and norm.weight is not None:
        new.weight.copy_(norm.weight[keep])  # to the last bit
    new.num_batches_tracked.copy_(norm.num_batches_tracked)


def _silence(norm: Any) -> None:
    """Make a branch give 0, in training mode too."""
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.zero_()


def _pad(kernel: torch.Tensor, side: int) -> torch.Tensor:
    """A 1×1 kernel as one of ``side``×``side``."""
    return F.pad(kernel, [side // 2] * 4)


def _dirac(scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The kernel of x → scale · x, of the shape of ``like``; float64."""
    kernel = torch.zeros(like.shape, dtype=torch.double, device=like.device)
    middle = like.shape[-1] // 2
    index = torch.arange(len(scale), device=like.device)
    kernel[index, index, middle, middle] = scale
    return kernel
