"""A PruNet, or a cut network of timm, in the place of a config's backbone: same strides, same meaning of arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.config import ConfigDict

from prunet_zoo.errors import PrunetError, few
from prunet_zoo.mm.backbone import plain
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.levels import DEFAULT_OUT_INDICES, OURS, level_strides, type_name
from prunet_zoo.models.backbone import resolve_arch
from prunet_zoo.models.pruned import PrunedSpec
from prunet_zoo.spec import NetSpec
from prunet_zoo.zoo.index import find_model, is_zoo

_USUAL = tuple(2 << i for i in range(12))  # 2, 4, 8, …


@dataclass(frozen=True)
class _Family:
    """How backbones of a family count their maps."""

    strides: tuple[int, ...]  # total stride of the map with each index
    out_indices: tuple[int, ...]  # the default
    frozen_alike: bool = True  # frozen_stages: 0 is all at stride 2, 1 up to stride 4, …, as ours


_RESNET = _Family(_USUAL[1:], (0, 1, 2, 3))
_CSP = _Family(_USUAL, (2, 3, 4))
_FAMILIES = {
    **dict.fromkeys(
        ("ResNet", "ResNetV1d", "ResNeXt", "Res2Net", "ResNeSt", "RegNet", "DetectoRS_ResNet", "DetectoRS_ResNeXt"),
        _RESNET,
    ),
    **dict.fromkeys(
        ("SwinTransformer", "PyramidVisionTransformer", "PyramidVisionTransformerV2"),
        _Family(_USUAL[1:], (0, 1, 2, 3), frozen_alike=False),
    ),
    "CSPDarknet": _CSP,
    "CSPNeXt": _CSP,
    "Darknet": _Family((1, *_USUAL), (3, 4, 5), frozen_alike=False),
    "MobileNetV2": _Family((2, 4, 8, 16, 16, 32, 32, 32), (1, 2, 4, 7), frozen_alike=False),
    "EfficientNet": _Family((2, 2, 4, 8, 16, 32, 32), (6,), frozen_alike=False),
    "TimmBackbone": _Family(_USUAL, (1, 2, 3, 4)),
}
_PRUNET = _Family(_USUAL, DEFAULT_OUT_INDICES)
_KEPT = ("norm_eval", "with_cp")
_NORM_KEPT = ("type", "requires_grad", "num_groups")  # eps and momentum are of the network that goes


def put_spec(model: Mapping[str, Any], spec: NetSpec | PrunedSpec) -> tuple[ConfigDict, list[int], list[str]]:
    """The backbone of a detector's config as a PruNet of ``spec``, or as a TimmBackbone where that is a network of timm
    that was cut, with maps of the same strides.

    A PruNet keeps its arguments but ``arch`` and, where the new spec counts its levels otherwise, ``out_indices``. Of
    another backbone ``frozen_stages``, ``norm_eval``, ``with_cp`` and the kind of norm stay; its weights do not.

    Args:
        model: the detector's config; it is not changed.
        spec: the new network.

    Returns:
        The new backbone, strides of the old one's maps, and what is to be told to the user.

    Raises:
        ConfigError: the backbone's family is not known, or the detector has no neck that can follow.
    """
    old = model["backbone"]
    is_ours, of_timm = old.get("type") in OURS, isinstance(spec, PrunedSpec)
    if is_ours and isinstance(spec, NetSpec):
        new = ConfigDict({**old, "arch": spec.to_dict()})
        strides = _own_strides(old)
        told = []
        had = tuple(old.get("out_indices", DEFAULT_OUT_INDICES))
        if strides and (indices := match_levels(level_strides(spec), strides)) != had:
            new["out_indices"] = indices
            told.append(f"backbone.out_indices {list(indices)}")
        return new, strides, told
    name = type_name(old)
    family = _PRUNET if is_ours else _FAMILIES.get(name)
    if family is None:
        raise ConfigError(
            f"--arch cannot replace a backbone of type {name!r}, whose levels are not known; known: "
            f"{', '.join(sorted(_FAMILIES))}. Write backbone=dict(_delete_=True, type='PruNet', …) into the config"
        )
    if not model.get("neck"):
        raise ConfigError(
            f"--arch cannot replace the {name} of a detector without a neck: its heads take the channels of {name}"
        )
    strides = (_own_strides(old) if is_ours else []) or _strides(old, name, family)
    levels = level_strides(spec, of_timm)
    kind = "TimmBackbone" if of_timm else "PruNet"
    new = ConfigDict(type=kind, arch=spec.to_dict(), out_indices=match_levels(levels, strides))
    told = [f"backbone {name} → {spec.name}"]
    has = [levels[i] for i in new["out_indices"]]
    if has != strides:
        told.append(f"its maps have strides {has} where the config asks for {strides}")
    frozen = old.get("frozen_stages", -1)
    if frozen >= 0 and family.frozen_alike:
        new["frozen_stages"] = min(frozen, new["out_indices"][-1])
    elif frozen >= 0:
        told.append(f"frozen_stages={frozen} left out, which counts otherwise in {name}")
    new.update({key: old[key] for key in _KEPT if key in old})
    norm = old.get("norm_cfg")
    if norm and norm.get("type") in ("BN", "BN2d", "SyncBN", "GN"):
        new["norm_cfg"] = {key: norm[key] for key in _NORM_KEPT if key in norm}
    source = _pretrained(old)
    if source:
        told.append(f"its weights ({source}) left out")
    return new, strides, told


def match_levels(has: Mapping[int, int], strides: Sequence[int]) -> tuple[int, ...]:
    """Indices of the levels with these strides; where one is missing, all between the least and the greatest; where
    there is none of these either, the deepest. ``has``: stride of each level by its index, see `level_strides`."""
    if set(strides) <= set(has.values()):
        return tuple(i for i, stride in has.items() if stride in strides)
    found = tuple(i for i, stride in has.items() if min(strides) <= stride <= max(strides))
    return found or (max(has),)


def _own_strides(old: Mapping[str, Any]) -> list[int]:
    """Strides of a PruNet's maps; empty where its out_indices are malformed, which it says itself."""
    indices = old.get("out_indices", DEFAULT_OUT_INDICES)
    if not isinstance(indices, list | tuple) or not all(isinstance(i, int) and 0 <= i < len(_USUAL) for i in indices):
        return []
    levels = _levels(old.get("arch"))
    return [levels[i] if i < len(levels) else _USUAL[i] for i in indices]


def _levels(arch: Any) -> list[int]:
    """Strides of the levels of the network that goes; none where it cannot be read, which is no fault here."""
    try:
        if is_zoo(arch):
            arch = find_model(arch).arch  # nothing is downloaded for it
        return [] if arch is None else [level.stride for level in resolve_arch(plain(arch)).feature_levels]
    except PrunetError:
        return []


def _strides(old: Mapping[str, Any], name: str, family: _Family) -> list[int]:
    """Strides of the maps of another backbone.

    Raises:
        ConfigError: an index that it does not have, or several maps of one stride.
    """
    table = family.strides
    if family is _RESNET and old.get("strides"):  # of its stages, behind the stem's 4
        table = tuple(4 * math.prod(old["strides"][: i + 1]) for i in range(len(old["strides"])))
    indices = old.get("out_indices", family.out_indices)
    indices = [indices] if isinstance(indices, int) else list(indices)
    if not indices or not all(isinstance(i, int) and 0 <= i < len(table) for i in indices):
        raise ConfigError(f"out_indices {few(indices)} of {name} are not from 0 to {len(table) - 1}")
    strides = [table[i] for i in indices]
    if sorted(set(strides)) != strides:
        raise ConfigError(
            f"--arch cannot replace this {name}: its maps have strides {strides}, and a PruNet has one map a stride"
        )
    return strides


def _pretrained(old: Mapping[str, Any]) -> str:
    """Where another backbone's weights come from; empty without any."""
    items = old.get("init_cfg") or []
    for item in [items] if isinstance(items, Mapping) else items:
        if item.get("type") == "Pretrained":
            return str(item.get("checkpoint"))
    given = old.get("pretrained")
    return (old.get("model_name", "") if given is True else str(given)) if given else ""
