"""TimmBackbone: a network of timm as an mmdet backbone, with the arguments and level numbers of `PruNet`.

It is there for comparisons: the same detector with a PruNet or with an EfficientNet is one word. timm builds the
network (``create_model(features_only=True)``); this file adds what a detector's config expects of a backbone. A network
of timm that a search has cut (`PrunedSpec`) is built the same way and then made narrower.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunet_zoo.errors import CheckpointError, SpecError, few, unknown_name
from prunet_zoo.mm.backbone import StrictBackbone, plain, plain_value
from prunet_zoo.models.backbone import check_arguments
from prunet_zoo.models.channels import layer_shape
from prunet_zoo.models.layers import make_norm_factory
from prunet_zoo.models.pruned import PrunedSpec, load_pruned_spec, shrink
from prunet_zoo.models.weights import load_weights
from prunet_zoo.registry import MODELS, register


class Level(NamedTuple):
    """The last map of one stride: channels, stride in px, the module that gives it, its place in timm's list."""

    channels: int
    stride: int
    module: str
    position: int


@register(MODELS)
class TimmBackbone(StrictBackbone):
    """A network of timm. Image (B, 3, H, W) → tuple of maps (B, channels, H / stride, W / stride).

    Args:
        model_name: as timm lists it, with or without the tag of its weights: ``'efficientnet_b0.ra_in1k'``.
        arch: instead of ``model_name`` a network of timm that a search has cut: `PrunedSpec`, dict, or path of its spec
            or weights, of which the spec alone is taken. Name and options are the spec's.
        out_indices: feature levels by stride as of `PruNet`: 0 is stride 2, 1 is stride 4, …; each is the last map of
            its stride. What lies behind the last of them is not built.
        pretrained: load timm's weights in `init_weights` (they are downloaded once, into timm's cache).
        frozen_stages: -1 freezes nothing; n freezes everything up to and with level n (no gradient, fixed statistics).
        norm_cfg: None leaves timm's layers. BN, SyncBN or GN (with ``num_groups``) in the place of BatchNorm; ``eps``
            and ``momentum`` stay the network's unless given; ``requires_grad=False`` freezes scale and shift.
        norm_eval: keep all BatchNorm layers in eval mode while training (fixed statistics).
        with_cp: recompute stages in the backward pass to save memory.
        drop_path_rate: stochastic depth of the network's last block.
        init_cfg: as in MMEngine; of type Pretrained as strict as `PruNet`'s. A file may be timm's (the classifier is
            left out), a detector's or this backbone's.
        timm_options: further arguments of ``timm.create_model``.

    Raises:
        UnknownNameError, SpecError: a bad argument; the message says what is allowed.
        CheckpointError: in `init_weights`: weights cannot be had or do not fit.
    """

    def __init__(
        self,
        model_name: str | None = None,
        out_indices: Sequence[int] = (1, 2, 3, 4),
        pretrained: bool = False,
        frozen_stages: int = -1,
        norm_cfg: Mapping[str, Any] | None = None,
        norm_eval: bool = False,
        with_cp: bool = False,
        drop_path_rate: float = 0.0,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        arch: str | Path | dict[str, Any] | PrunedSpec | None = None,
        **timm_options: Any,
    ) -> None:
        super().__init__()
        check_arguments(out_indices, frozen_stages, norm_cfg, drop_path_rate)
        self.init_cfg = init_cfg
        if arch is not None and pretrained:
            raise SpecError("timm has no weights of a cut network; give the found ones as init_cfg, not pretrained")
        model_name, self.spec, self.options = _which(model_name, arch, timm_options)
        self.model_name, self.pretrained, self.out_indices = model_name, pretrained, tuple(out_indices)
        self.frozen_stages, self.norm_eval, self.with_cp = frozen_stages, norm_eval, with_cp
        levels = _levels(model_name, self.spec, self.options)
        chosen = _choose(model_name, levels, self.out_indices)
        if frozen_stages != -1 and (frozen_stages not in levels or frozen_stages > self.out_indices[-1]):
            allowed = [-1, *(i for i in levels if i <= self.out_indices[-1])]
            raise SpecError(f"frozen_stages of {model_name} must be one of {allowed}, got {frozen_stages}")
        self.out_channels = [level.channels for level in chosen]
        self.feature_info = [
            {"num_chs": level.channels, "reduction": level.stride, "module": level.module} for level in chosen
        ]
        drop_path = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
        positions = [level.position for level in chosen]
        self.net = _create(model_name, features_only=True, out_indices=positions, **drop_path, **self.options)
        if self.spec is not None:
            _narrow(self.net, self.spec)
        _cut(self.net, chosen[-1].module)
        set_norms(self.net, norm_cfg, model_name)
        if with_cp:
            try:
                self.net.set_grad_checkpointing(True)
            except (AttributeError, AssertionError):  # timm's ways to say so
                raise SpecError(f"timm's {model_name} cannot recompute its stages; leave with_cp out") from None
        self._channels_last = str(getattr(self.net, "output_fmt", "")).endswith("NHWC")
        self._frozen = _up_to(self.net, levels[frozen_stages].module, model_name) if frozen_stages >= 0 else []
        self._freeze()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = self.net(x)
        return tuple(m.permute(0, 3, 1, 2).contiguous() for m in maps) if self._channels_last else tuple(maps)

    def _freeze(self) -> None:
        for module in self._frozen:
            module.training = False
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> TimmBackbone:
        """Set training mode, but keep frozen parts (and, with ``norm_eval``, all BatchNorm) in eval mode."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _start(self, configured: bool) -> None:
        """Load timm's weights; ``configured``: ``init_cfg`` has a checkpoint already."""
        if not self.pretrained:
            return
        if configured:
            raise CheckpointError("give pretrained=True or an init_cfg of type 'Pretrained', not both")
        origin = f"timm's {self.model_name}"
        self._loaded(self._take(pretrained_state(self.model_name, **self.options), "", origin), origin)

    def _take(self, state: Mapping[str, torch.Tensor], prefix: str | None, origin: str) -> list[str]:
        wanted = self.state_dict()
        if any(name.endswith(next(iter(wanted))) for name in state):  # a detector's or this backbone's
            return load_weights(self, state, prefix=prefix, origin=origin)
        return load_weights(self.net, _own_names(state, self.net), prefix=prefix, origin=origin)


def timm_channels(
    model_name: str | None = None, out_indices: Sequence[int] = (1, 2, 3, 4), arch: Any = None, **options: Any
) -> list[int]:
    """Channels of the levels ``out_indices`` (0 is stride 2) of a network of timm, whole or cut; nothing is loaded.

    Raises:
        UnknownNameError, SpecError: there is no such network or level; the message says which there are.
    """
    name, spec, options = _which(model_name, arch, options)
    return [level.channels for level in _choose(name, _levels(name, spec, options), out_indices)]


def timm_levels(model_name: str | None = None, arch: Any = None, **options: Any) -> dict[int, Level]:
    """The levels that a network has, by number (0 is stride 2); arguments as of `TimmBackbone`."""
    return _levels(*_which(model_name, arch, options))


def _which(
    model_name: str | None, arch: Any, options: Mapping[str, Any]
) -> tuple[str, PrunedSpec | None, dict[str, Any]]:
    """Name in timm, spec where it was cut, and arguments of ``timm.create_model``."""
    if (model_name is None) == (arch is None):
        raise SpecError("TimmBackbone takes either model_name, as timm lists it, or arch, the spec of a found network")
    if model_name is not None:
        return model_name, None, plain_value(options)
    if options:
        raise SpecError(f"TimmBackbone: with arch the options are the spec's; leave {few(options)} out")
    spec = load_pruned_spec(arch if isinstance(arch, PrunedSpec) else plain(arch))  # type: ignore[arg-type]
    spec.params()  # raises where its shapes fit no network
    return str(spec.timm), spec, {**plain_value(spec.options), "in_chans": spec.in_channels}


def _levels(model_name: str, spec: PrunedSpec | None, options: Mapping[str, Any]) -> dict[int, Level]:
    key = repr((model_name, spec and spec.to_json(), sorted(options.items())))
    if key not in _LEVELS:
        _LEVELS[key] = _find_levels(model_name, spec, options)
    return dict(_LEVELS[key])


_LEVELS: dict[str, dict[int, Level]] = {}  # what has been looked up: a network is built for it


def _find_levels(model_name: str, spec: PrunedSpec | None, options: Mapping[str, Any]) -> dict[int, Level]:
    # on the meta device nothing is allocated or drawn at random
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        net = _create(model_name, features_only=True, **options)
    channels = [int(info["num_chs"]) for info in net.feature_info.info]
    if spec is not None:
        _narrow(net, spec)
        channels = _map_channels(net, spec)
    levels = {}
    for position, info in enumerate(net.feature_info.info):
        stride = int(info["reduction"])
        if stride >= 2 and stride & (stride - 1) == 0:
            number = stride.bit_length() - 2
            levels[number] = Level(channels[position], stride, str(info["module"]), position)
    return levels


def _narrow(net: nn.Module, spec: PrunedSpec) -> None:
    """Give a feature network the shapes that its spec has for the classifier."""
    layers = [name for name, layer in net.named_modules() if layer_shape(layer) is not None]
    pairs = [(own, theirs) for own in layers for theirs in (own, _classifiers_name(own)) if theirs in spec.shapes]
    shrink(net, {own: spec.shapes[theirs] for own, theirs in pairs})


def _map_channels(net: nn.Module, spec: PrunedSpec) -> list[int]:
    """Channels of all maps of a feature network on the meta device."""
    image = torch.zeros(1, spec.in_channels, spec.input_size, spec.input_size, device="meta")
    try:
        maps = net.eval()(image)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SpecError(f"{spec.name!r}, cut from timm's {spec.timm}, cannot be a backbone ({reason})") from error
    channel = -1 if str(getattr(net, "output_fmt", "")).endswith("NHWC") else 1
    return [int(m.shape[channel]) for m in maps]


def _choose(model_name: str, levels: Mapping[int, Level], out_indices: Sequence[int]) -> list[Level]:
    check_arguments(out_indices, -1, None, 0.0)
    chosen = list(out_indices)
    if not chosen or chosen != sorted(set(chosen)):
        raise SpecError(f"out_indices must be increasing and not empty, got {tuple(chosen)}")
    if set(chosen) - set(levels):
        have = ", ".join(f"{number} (stride {level.stride})" for number, level in levels.items())
        raise SpecError(f"out_indices {tuple(chosen)}: timm's {model_name} has the levels {have}")
    return [levels[number] for number in chosen]


def _create(model_name: str, **options: Any) -> Any:
    """``timm.create_model`` with a message for each bad argument."""
    import timm

    if not isinstance(model_name, str):
        raise SpecError(f"model_name must be a name that timm lists, got {model_name!r}")
    if not timm.is_model(model_name):
        raise unknown_name("model_name", model_name, timm.list_models(), "timm.list_models() gives all.")
    try:
        return timm.create_model(model_name, **options)
    except (RuntimeError, TypeError, AssertionError, AttributeError) as error:
        raise SpecError(f"timm cannot build {model_name} as a backbone with {options}: {error}") from error


def pretrained_state(model_name: str, **options: Any) -> dict[str, torch.Tensor]:
    """timm's weights of a network, classifier included, by timm's names.

    Raises:
        CheckpointError: timm has none, or they cannot be downloaded.
    """
    import timm

    published = timm.models.get_pretrained_cfg(model_name)
    if published is None or not published.has_weights:
        known = timm.list_pretrained(model_name.partition(".")[0] + "*")
        raise CheckpointError(f"timm has no weights of {model_name}; it has {few(known)}; or leave pretrained out")
    try:
        return dict(timm.create_model(model_name, pretrained=True, **options).state_dict())
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # OSError: all that the hub's client raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"timm's weights of {model_name} could not be loaded ({type(error).__name__}: {reason}); connect to the "
            "network once, so that timm keeps them, or give a file: pretrained=False, "
            "init_cfg=dict(type='Pretrained', checkpoint='FILE.safetensors')"
        ) from error


def _own_names(state: Mapping[str, torch.Tensor], net: nn.Module) -> dict[str, torch.Tensor]:
    """Rename tensors from timm's classifier to its feature network, where timm names a stage 'stages_0' that is
    'stages.0' in the classifier, or puts the classifier's body under 'model.'."""
    renamed = dict(state)
    for own in net.state_dict():
        theirs = _classifiers_name(own)
        for name in state:
            if name == theirs or name.endswith(f".{theirs}"):
                renamed.setdefault(name.removesuffix(theirs) + own, state[name])
    for name in list(renamed):  # old files lack BatchNorm's counter, which is of no use with a fixed momentum
        if name.endswith("running_mean"):
            renamed.setdefault(name.removesuffix("running_mean") + "num_batches_tracked", torch.tensor(0))
    return renamed


def _classifiers_name(own: str) -> str:
    first, _, rest = own.partition(".")
    if first in ("model", "body"):
        return rest
    return ".".join(part for part in (re.sub(r"_([^_]+)$", r".\1", first), rest) if part)


def _cut(net: nn.Module, last: str) -> None:
    """Drop the blocks behind the module ``last`` where timm keeps them (in networks with their own feature class)."""
    blocks = getattr(net, "blocks", None)
    if isinstance(blocks, nn.Sequential):
        first, _, rest = last.partition(".")
        number = rest.partition(".")[0]
        order = [name for name, _ in net.named_children()]
        if first == "blocks" and number.isdigit():
            net.blocks = blocks[: int(number) + 1]
        elif first in order and order.index(first) < order.index("blocks"):  # the stem is enough
            net.blocks = blocks[:0]


def _up_to(net: nn.Module, last: str, model_name: str) -> list[nn.Module]:
    """The modules up to and with ``last``, each without its children; timm registers modules in the order of use."""
    names = [name for name, _ in net.named_modules()]
    spelled = next((n for n in (last, last.replace(".", "_", 1), f"model.{last}", f"body.{last}") if n in names), None)
    if spelled is None:
        raise SpecError(f"the stages of timm's {model_name} cannot be told apart; leave frozen_stages at -1")
    end = max(i for i, name in enumerate(names) if name == spelled or name.startswith(f"{spelled}."))
    return [module for _, module in list(net.named_modules())[: end + 1]]


def set_norms(net: nn.Module, norm_cfg: Mapping[str, Any] | None, model_name: str) -> None:
    """Put the norm of ``norm_cfg`` in the place of every BatchNorm, with its activation where timm joins the two."""
    if norm_cfg is None:
        return
    make_norm_factory(norm_cfg)  # says what is wrong with it
    kind = norm_cfg.get("type", "BN")
    found = [(name, module) for name, module in net.named_modules() if isinstance(module, _BatchNorm)]
    if not found:
        raise SpecError(f"timm's {model_name} has no BatchNorm that norm_cfg could change; leave norm_cfg out")
    unfit = set(norm_cfg) & {"affine", "track_running_stats"}
    if unfit:
        raise SpecError(f"norm_cfg of TimmBackbone does not take {sorted(unfit)}")
    for name, old in found:
        new = _make_norm(old, kind, norm_cfg)
        for parameter in new.parameters():
            parameter.requires_grad_(norm_cfg.get("requires_grad", True))
        parent, _, attribute = name.rpartition(".")
        setattr(net.get_submodule(parent), attribute, new)


def _make_norm(old: _BatchNorm, kind: str, norm_cfg: Mapping[str, Any]) -> nn.Module:
    from timm.layers import GroupNormAct, convert_sync_batchnorm

    if kind == "GN":
        # checks the channels, too
        layer = make_norm_factory(norm_cfg)(old.num_features, old.eps)
        if not hasattr(old, "act"):
            return layer
        eps = norm_cfg.get("eps", old.eps)
        joined = GroupNormAct(old.num_features, num_groups=norm_cfg["num_groups"], eps=eps, apply_act=False)
        joined.drop, joined.act = old.drop, old.act  # type: ignore[assignment]
        return joined
    new: Any = convert_sync_batchnorm(old) if kind == "SyncBN" else old
    new.eps = norm_cfg.get("eps", old.eps)
    new.momentum = norm_cfg.get("momentum", old.momentum)
    return new
