"""A detector's ``neck.in_channels`` follows from its backbone's spec: nobody types channel counts.

`install` wraps the build function of MMEngine's ``MODELS`` registries. When a model's config has a backbone of type
PruNet or TimmBackbone, its neck gets the channels of the requested levels, whether ``in_channels`` is missing or
inherited from the config of another backbone. mmdet stays as it is. `follow_spec` does the same to a config that a tool
is to write.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from mmengine import registry as root
from mmengine.config import Config
from mmengine.registry import Registry

from prunet_zoo.mm.backbone import PruNet, plain
from prunet_zoo.mm.timm_backbone import TimmBackbone, timm_channels
from prunet_zoo.models.backbone import resolve_arch
from prunet_zoo.registry import MODELS

_OURS = {name: cls for cls in (PruNet, TimmBackbone) for name in (cls.__name__, f"prunet_zoo.{cls.__name__}", cls)}
_MARK = "_prunet_follows_spec"


def install() -> None:
    """Wrap the build function of the root ``MODELS`` registry and of the children it has; later ones inherit it."""
    waiting = [root.MODELS]
    while waiting:
        registry = waiting.pop()
        waiting += registry.children.values()
        if not hasattr(registry.build_func, _MARK):
            registry.build_func = _following(registry.build_func)


def _following(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_following(cfg: Any, *args: Any, registry: Registry, **kwargs: Any) -> Any:
        return build(_with_channels(cfg, registry), *args, registry=registry, **kwargs)

    setattr(build_following, _MARK, True)
    return build_following


def follow_spec(model: Any, scope: str | None = None) -> Any:
    """Return ``model`` with ``in_channels`` of every neck behind a PruNet or TimmBackbone filled in, at any depth.

    Args:
        model: a model's config; it is not changed. Nothing else in it is touched, and doing it twice changes nothing.
        scope: where type names without a prefix are looked up, the config's ``default_scope``. It is needed only for
            necks without any ``in_channels``.

    Raises:
        UnknownNameError, SpecError: the backbone's ``arch`` or ``out_indices`` are wrong.
    """
    with MODELS.switch_scope_and_registry(scope) as registry:
        return _follow(model, registry)


def _follow(model: Any, registry: Registry) -> Any:
    model = _with_channels(model, registry)
    if isinstance(model, Mapping):
        filled = copy.copy(model)
        for key, value in model.items():
            if isinstance(value, Mapping | list | tuple):
                filled[key] = _follow(value, registry)  # type: ignore[index]
        return filled
    return type(model)(_follow(item, registry) for item in model) if isinstance(model, list | tuple) else model


def _with_channels(cfg: Any, registry: Registry) -> Any:
    """Return ``cfg`` itself, or, where it has a neck that takes ``in_channels`` behind ours, a copy with them set."""
    if isinstance(cfg, Config):
        cfg = cfg._cfg_dict
    if not isinstance(cfg, Mapping):
        return cfg
    backbone, neck = cfg.get("backbone"), cfg.get("neck")
    if not isinstance(backbone, Mapping) or backbone.get("type") not in _OURS or not neck:
        return cfg
    # of several necks the first one meets the backbone
    first = neck[0] if isinstance(neck, list | tuple) else neck
    form = _form(first, registry) if isinstance(first, Mapping) else None
    if form is None:
        return cfg
    channels = backbone_channels(backbone)
    if channels is None:
        return cfg  # the backbone says what is wrong with it
    new = copy.copy(first)
    new["in_channels"] = form(channels)
    filled = copy.copy(cfg)
    filled["neck"] = type(neck)([new, *neck[1:]]) if isinstance(neck, list | tuple) else new  # type: ignore[index]
    return filled


def backbone_channels(backbone: Mapping[str, Any]) -> list[int] | None:
    """Channels of the maps of a PruNet's or TimmBackbone's config; None where an argument is missing or no list.

    Raises:
        UnknownNameError, SpecError: the architecture or ``out_indices`` are wrong.
    """
    cls = _OURS[backbone["type"]]
    parameters = inspect.signature(cls).parameters
    out_indices = backbone.get("out_indices", parameters["out_indices"].default)
    arch, name = backbone.get("arch"), backbone.get("model_name")
    if (arch is None and (cls is PruNet or name is None)) or not isinstance(out_indices, list | tuple):
        return None
    if cls is PruNet:
        return resolve_arch(plain(arch)).channels(tuple(out_indices))
    options = {key: value for key, value in backbone.items() if key != "type" and key not in parameters}
    return timm_channels(name, tuple(out_indices), arch, **options)


def _form(neck: Mapping[str, Any], registry: Registry) -> Callable[[list[int]], Any] | None:
    """How a neck wants its channels: all levels, all from the deepest up, or the deepest alone; None: not at all."""
    given, kind = neck.get("in_channels"), neck.get("type")
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    if name.split(".")[-1] in _SPECIAL:
        return _SPECIAL[name.split(".")[-1]]
    if given is not None:
        return _deepest if isinstance(given, int) else type(given) if isinstance(given, tuple) else list
    cls = _find_class(kind, neck, registry) if isinstance(kind, str) else kind
    parameter = inspect.signature(cls).parameters.get("in_channels") if callable(cls) else None
    if parameter is None:
        return None
    return _deepest if parameter.annotation in (int, "int") else list


def _deepest(channels: list[int]) -> int:
    return channels[-1]


# necks of mmdet whose signature does not tell: YOLOV3Neck lists its inputs from the deepest up
_SPECIAL: dict[str, Callable[[list[int]], Any]] = {"YOLOV3Neck": lambda c: c[::-1], "DilatedEncoder": _deepest}


def _find_class(name: str, neck: Mapping[str, Any], registry: Registry) -> Any:
    """The class of a neck's type name, found as MMEngine will find it when it builds the neck."""
    with registry.switch_scope_and_registry(neck.get("_scope_")) as found:
        return found.get(name)
