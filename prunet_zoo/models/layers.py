"""Layers that blocks are made of: activation and norm by name, convolution + norm + activation, squeeze-and-excite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from torch import nn

from prunet_zoo.errors import SpecError
from prunet_zoo.spec import Activation

NormFactory = Callable[[int, float], nn.Module]  # (channels, eps) → layer

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "hard_swish": nn.Hardswish}


def make_act(act: Activation, inplace: bool = True) -> nn.Module:
    """Return the activation layer of a spec's ``act``."""
    return _ACTIVATIONS[act](inplace=inplace)


def make_norm_factory(norm_cfg: Mapping[str, Any] | None = None) -> NormFactory:
    """Return ``(channels, eps) -> layer`` for an MMEngine-style ``norm_cfg``.

    Args:
        norm_cfg: ``type`` is BN, SyncBN or GN; ``eps``, ``momentum`` and ``num_groups`` (GN) are passed on,
            ``requires_grad=False`` freezes scale and shift. None is plain BatchNorm. The eps of the spec holds unless
            ``norm_cfg`` gives one.

    Raises:
        SpecError: unknown type or argument.
    """
    cfg = dict(norm_cfg or {"type": "BN"})
    kind, requires_grad = cfg.pop("type", "BN"), cfg.pop("requires_grad", True)
    allowed = {"GN": {"eps", "num_groups"}}.get(kind, {"eps", "momentum", "affine", "track_running_stats"})
    if kind not in ("BN", "BN2d", "SyncBN", "GN"):
        raise SpecError(f"norm_cfg.type {kind!r} is not known; use BN, SyncBN or GN")
    if set(cfg) - allowed:
        raise SpecError(
            f"norm_cfg of type {kind} does not take {sorted(set(cfg) - allowed)}; it takes {sorted(allowed)}"
        )
    if kind == "GN" and "num_groups" not in cfg:
        raise SpecError("norm_cfg of type GN needs num_groups")

    def make(channels: int, eps: float) -> nn.Module:
        options = {"eps": eps, **cfg}
        layer: nn.Module
        if kind == "GN":
            if channels % options["num_groups"]:
                raise SpecError(f"GN with num_groups={options['num_groups']} does not divide {channels} channels")
            layer = nn.GroupNorm(num_channels=channels, **options)
        elif kind == "SyncBN":
            layer = nn.SyncBatchNorm(channels, **options)
        else:
            layer = nn.BatchNorm2d(channels, **options)
        for parameter in layer.parameters():
            parameter.requires_grad_(requires_grad)
        return layer

    return make


class ConvNormAct(nn.Module):
    """Convolution without bias, norm, and (unless ``act`` is None) an activation. (B, C, H, W) → (B, C', H', W')."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        act: Activation | None = "relu",
        eps: float = 1e-3,
        norm: NormFactory | None = None,
    ) -> None:
        super().__init__()
        pad = kernel_size // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, pad, groups=groups, bias=False)
        self.norm = (norm or make_norm_factory())(out_channels, eps)
        self.act = make_act(act) if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


class SqueezeExcite(nn.Module):
    """Channel gate from globally pooled features (SE, arXiv 1709.01507): reduce, act, expand, sigmoid."""

    def __init__(self, channels: int, squeeze: int, act: Activation = "relu") -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeeze, 1)
        self.act = make_act(act)
        self.expand = nn.Conv2d(squeeze, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class PooledHead(nn.Module):
    """What stands between the last map and the linear classifier: global pooling and, with ``hidden``, a 1×1
    convolution (no norm, no bias) + activation on the pooled features. (B, C, H, W) → (B, features).

    Args:
        channels: C.
        hidden: output channels of the convolution; None: no convolution, features are the C channels.
        act: its activation.
        global_pool: ``'avg'``, another type of timm's `SelectAdaptivePool2d`, or ``''`` for no pooling: the convolution
            is then applied to each position and the output stays a map (B, features, H, W).
    """

    def __init__(
        self, channels: int, hidden: int | None = None, act: Activation = "relu", global_pool: str = "avg"
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, hidden, 1, bias=False) if hidden else nn.Identity()
        self.act = make_act(act) if hidden else nn.Identity()
        self.set_pool(global_pool)

    def set_pool(self, global_pool: str) -> None:
        """Change the type of pooling."""
        self.global_pool = global_pool
        # 'fast' is a plain mean over H and W, which exporters turn into one node
        flat = bool(global_pool) and not isinstance(self.conv, nn.Conv2d)
        self.pool = SelectAdaptivePool2d(pool_type="fast" if global_pool == "avg" else global_pool, flatten=flat)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv(self.pool(x)))
        return x.flatten(1) if self.global_pool else x


def init_weights(module: nn.Module) -> None:
    """Initialise as EfficientNet: convolutions N(0, sqrt(2 / fan_out)), norms 1 and 0, linear U(±1/sqrt(fan_in))."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
            nn.init.normal_(m.weight, 0.0, (2.0 / fan_out) ** 0.5)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Linear):
            bound = m.in_features**-0.5
            nn.init.uniform_(m.weight, -bound, bound)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.modules.batchnorm._BatchNorm | nn.GroupNorm) and m.affine:
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
