"""A detector's levels follow from its backbone's spec: what stands in a config about strides fits the maps it gets.

A searched network may end at stride 16, or jump from 4 to 16; a user may ask for other ``out_indices``. `follow_levels`
then cuts ``out_indices`` to what exists and sets what depends on the strides of the neck's outputs: the anchors' or
points' strides, ``regress_ranges``, the RoI extractors' ``featmap_strides``, the number of levels of a DETR. Where the
spec has what the config asks for, nothing is changed.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.registry import Registry

from prunet_zoo.mm.backbone import PruNet, plain
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.timm_backbone import TimmBackbone, timm_levels
from prunet_zoo.models.backbone import resolve_arch
from prunet_zoo.registry import MODELS

OURS = ("PruNet", "prunet_zoo.PruNet", PruNet)
_TIMM = ("TimmBackbone", "prunet_zoo.TimmBackbone", TimmBackbone)
DEFAULT_OUT_INDICES = inspect.signature(PruNet.__init__).parameters["out_indices"].default
_GENERATORS = ("anchor_generator", "prior_generator", "approx_anchor_generator", "square_anchor_generator")
_LIST_FREE = ("AnchorGenerator", "LegacyAnchorGenerator", "MlvlPointGenerator")  # have no list by level but strides
_PER_LEVEL = ("base_edge_list", "scale_ranges", "base_sizes")  # lists by level that do not follow from strides
_NOT_HEADS = ("backbone", "neck", "data_preprocessor", "train_cfg", "test_cfg", "init_cfg")


def follow_levels(model: Any, scope: str | None = None) -> Any:
    """Return ``model`` with everything that depends on the levels of its PruNet, or cut network of timm, set.

    Args:
        model: a detector's config; it is not changed. One without such a backbone is returned as it is.
        scope: where type names without a prefix are looked up, the config's ``default_scope``; classes' defaults
            (YOLOXHead's strides) are known only where they are registered.

    Raises:
        ConfigError: the neck or a head cannot work with the levels that the spec has.
        UnknownNameError, SpecError: the backbone's ``arch`` is wrong.
    """
    return fit_levels(model, scope)[0]


def fit_levels(model: Any, scope: str | None = None, was: Sequence[int] | None = None) -> tuple[Any, list[str]]:
    """`follow_levels`, which also says what it changed: (config, one short text for each key).

    Args:
        model, scope: as there.
        was: strides of the maps that the neck was made for, where the config's ``out_indices`` do not tell.
    """
    if isinstance(model, Config):
        model = model._cfg_dict
    backbone = model.get("backbone") if isinstance(model, Mapping) else None
    if not isinstance(backbone, Mapping) or backbone.get("type") not in (*OURS, *_TIMM) or not backbone.get("arch"):
        return model, []
    asked = backbone.get("out_indices", DEFAULT_OUT_INDICES)
    if not isinstance(asked, list | tuple) or not all(isinstance(i, int) and i >= 0 for i in asked) or not asked:
        return model, []  # the backbone says what is wrong with it
    model = copy.deepcopy(model)
    has = level_strides(backbone["arch"], of_timm=backbone["type"] in _TIMM)
    indices = [i for i in asked if i in has] or [max(has)]
    changes: list[str] = []
    _set(model["backbone"], "out_indices", tuple(indices), tuple(asked), changes, "backbone")
    last = model["backbone"].get("frozen_stages", -1)
    if isinstance(last, int) and last > indices[-1]:
        _set(model["backbone"], "frozen_stages", indices[-1], last, changes, "backbone")
    usual = [has.get(i, 2 << i) for i in asked]
    with MODELS.switch_scope_and_registry(scope) as registry:
        _Follower(model, registry, changes).follow([has[i] for i in indices], list(was or usual))
    return model, changes


def level_strides(arch: Any, of_timm: bool = False) -> dict[int, int]:
    """Stride of each level that a network has, by index; ``of_timm``: one of timm that was cut. Raises as the backbone
    does for its ``arch``."""
    if of_timm:
        return {index: level.stride for index, level in timm_levels(arch=arch).items()}
    return {index: level.stride for index, level in enumerate(resolve_arch(plain(arch)).feature_levels)}


class _Follower:
    """Sets what follows in one model's config, which it changes."""

    def __init__(self, model: Any, registry: Registry, changes: list[str]) -> None:
        self.model, self.registry, self.changes = model, registry, changes
        self.heads = list(self._walk(model, ""))
        found = [s for _, head in self.heads if (s := self._strides(head)) is not None]
        self.asked: list[int] | None = found[0] if found else None  # strides of the neck's outputs, by the heads

    def follow(self, given: list[int], was: list[int]) -> None:
        """``given``: strides of the backbone's maps; ``was``: those that the config was made for."""
        necks = self.model.get("neck")
        first, others = (necks[0], necks[1:]) if isinstance(necks, list | tuple) and necks else (necks, ())
        kind = type_name(first) if first else None
        rule = _NECKS.get(kind)
        if rule is None:
            if given != was:
                what = f"{kind} takes" if kind else "a head without a neck takes"
                raise ConfigError(
                    f"the network has maps of strides {given}, the config was made for {was}, and {what} no others as "
                    f"far as is known; necks that follow: {few_keys(list(_NECKS))}"
                )
            return
        outs, learned = rule(self, first, given)
        real = len([s for s in outs if s <= given[-1]])
        before = self.asked or outs
        if len(outs) != len(before) or outs != before:
            for neck in others:
                self._follow_later_neck(neck, len(outs))
            for where, head in self.heads:
                self._follow_head(where, head, outs)
        for where, head in self.heads:
            if isinstance(head.get("featmap_strides"), list | tuple):
                self._follow_extractor(where, head, before, outs if learned else outs[:real])
        if isinstance(self.model.get("num_feature_levels"), int) or type_name(self.model) in _MULTI_LEVEL_DETR:
            self._follow_detr(len(outs))

    def put(self, holder: Any, key: str, value: Any, where: str, default: Any = None) -> None:
        """Set a key whose value differs, and note it."""
        _set(holder, key, value, holder.get(key, default), self.changes, where)

    def _walk(self, item: Any, where: str) -> Iterator[tuple[str, Any]]:
        """(place, mapping) of everything in the model's heads."""
        if isinstance(item, Mapping):
            if where:
                yield where, item
            for key, value in item.items():
                if key not in _NOT_HEADS and key not in _GENERATORS:
                    yield from self._walk(value, f"{where}.{key}" if where else str(key))
        elif isinstance(item, list | tuple):
            for number, value in enumerate(item):
                yield from self._walk(value, f"{where}[{number}]")

    def _strides(self, head: Any) -> list[int] | None:
        """The strides that a head works on; None: it has none."""
        if "type" not in head:
            return None
        for key in _GENERATORS:
            if isinstance(head.get(key), Mapping):
                return _numbers(head[key].get("strides"))
        if "strides" in head:
            return _numbers(head["strides"])
        if type_name(head).endswith("Head"):
            return _numbers(self._default(head, "strides"))
        return None

    def _default(self, head: Any, name: str) -> Any:
        """Default of an argument of a head's class or of its ancestors; None where there is none."""
        kind = head.get("type")
        cls = self.registry.get(kind) if isinstance(kind, str) else kind
        for ancestor in inspect.getmro(cls) if isinstance(cls, type) else ():
            own = vars(ancestor).get("__init__")
            parameter = inspect.signature(own).parameters.get(name) if inspect.isfunction(own) else None
            if parameter is not None:
                return None if parameter.default is inspect.Parameter.empty else parameter.default
        return None

    def _follow_head(self, where: str, head: Any, outs: list[int]) -> None:
        old = self._strides(head)
        if old is None or old == outs:
            return
        generators = [key for key in _GENERATORS if isinstance(head.get(key), Mapping)]
        lists = [key for key in _PER_LEVEL if head.get(key) or any(head[g].get(key) for g in generators)]
        odd = [type_name(head[g]) for g in generators if type_name(head[g]) not in _LIST_FREE]
        if isinstance(head.get("in_channels"), list | tuple):
            lists.append("in_channels")
        if lists or odd:
            raise ConfigError(
                f"{type_name(head)} works on maps of strides {old} and here gets {outs}, but its "
                f"{few_keys(lists + odd)} is a choice for each level that does not follow from strides; write a config "
                "for this network's levels, or take a network that has those of the config"
            )
        for key in generators:
            self.put(head[key], "strides", outs, f"{where}.{key}")
        if not generators:
            self.put(head, "strides", outs, where, default=old)
        ranges = head.get("regress_ranges", self._default(head, "regress_ranges"))
        if ranges is not None:
            self.put(head, "regress_ranges", scale_ranges(ranges, old, outs), where)

    def _follow_extractor(self, where: str, extractor: Any, before: list[int], outs: list[int]) -> None:
        """RoIs are taken from the first maps of the neck, but not from those that are only another one's subsample."""
        old = list(extractor["featmap_strides"])
        if old != before[: len(old)]:
            return  # of a map that a module of its own makes (semantic segmentation)
        new = [s for s in outs if s <= old[-1]] or outs[:1]
        self.put(extractor, "featmap_strides", new, where)
        if new[0] != old[0] and type_name(extractor) in ("SingleRoIExtractor", "GenericRoIExtractor"):
            scale = extractor.get("finest_scale", 56)  # px of RoIs that go to the finest map, 56 at stride 4
            self.put(extractor, "finest_scale", scale * new[0] // old[0], where, default=56)

    def _follow_later_neck(self, neck: Any, count: int) -> None:
        if "num_levels" in neck:
            self.put(neck, "num_levels", count, f"neck {type_name(neck)}")
            refine = neck.get("refine_level")
            if isinstance(refine, int) and refine >= count:
                self.put(neck, "refine_level", count - 1, f"neck {type_name(neck)}")
        elif type_name(neck) != "DyHead":
            raise ConfigError(f"the neck's outputs change, and how {type_name(neck)} behind it follows is not known")

    def _follow_detr(self, count: int) -> None:
        model = self.model
        self.put(model, "num_feature_levels", count, "model", default=4)
        for part, attention in (("encoder", "self_attn_cfg"), ("decoder", "cross_attn_cfg")):
            layer = (model.get(part) or {}).get("layer_cfg")
            if isinstance(layer, Mapping) and isinstance(layer.get(attention), Mapping):
                self.put(layer[attention], "num_levels", count, f"{part}.{attention}", default=4)


def _fpn(follower: _Follower, neck: Any, given: list[int]) -> tuple[list[int], bool]:
    """FPN makes further levels behind the last map: the heads' strides stay wherever they can."""
    start, end = neck.get("start_level", 0), neck.get("end_level", -1)
    count, extra = neck["num_outs"], bool(neck.get("add_extra_convs"))
    kept = given[start:] if end in (-1, len(given) - 1) else given[start : end + 1]
    outs = _doubled(kept, count) if kept else []
    valid = kept and (len(kept) <= count if end in (-1, len(given) - 1) else end < len(given) and len(kept) == count)
    if valid and follower.asked in (None, outs):
        return outs, extra
    first, last = (follower.asked[0], follower.asked[-1]) if follower.asked else (given[min(start, len(given) - 1)], 0)
    start = next((i for i, stride in enumerate(given) if stride >= first), len(given) - 1)
    outs = given[start:]
    while 2 * outs[-1] <= last:
        outs.append(2 * outs[-1])
    if follower.asked is None:
        outs = _doubled(outs, count)
    follower.put(neck, "start_level", start, "neck", default=0)
    follower.put(neck, "end_level", -1, "neck", default=-1)
    follower.put(neck, "num_outs", len(outs), "neck")
    return outs, extra


def _pafpn(follower: _Follower, neck: Any, given: list[int]) -> tuple[list[int], bool]:
    outs, extra = _fpn(follower, neck, given)
    _need_doubling(neck, [stride for stride in given if stride >= outs[0]])
    return outs, extra


def _level_by_level(follower: _Follower, neck: Any, given: list[int]) -> tuple[list[int], bool]:
    _need_doubling(neck, given)
    return list(given), True


def _mapper(follower: _Follower, neck: Any, given: list[int]) -> tuple[list[int], bool]:
    """ChannelMapper makes further levels with strided convolutions: the number of levels stays where it can."""
    configured = neck.get("num_outs") or len(given)
    count = max(configured, len(given))
    if follower.asked:
        count = len(given)
        while given[-1] << (count + 1 - len(given)) <= follower.asked[-1]:
            count += 1
    if count != configured:
        follower.put(neck, "num_outs", count, "neck")
    return _doubled(given, count), True


def _deepest(follower: _Follower, neck: Any, given: list[int]) -> tuple[list[int], bool]:
    return given[-1:], True


# how a neck's outputs follow from the strides of its inputs: (strides, whether added levels have weights of their own)
_NECKS: dict[Any, Callable[[_Follower, Any, list[int]], tuple[list[int], bool]]] = {
    "FPN": _fpn,
    "PAFPN": _pafpn,
    "CSPNeXtPAFPN": _level_by_level,
    "YOLOXPAFPN": _level_by_level,
    "ChannelMapper": _mapper,
    "DilatedEncoder": _deepest,
}
_MULTI_LEVEL_DETR = ("DeformableDETR", "DINO", "DDQDETR")


def scale_ranges(ranges: Sequence[Sequence[float]], old: Sequence[int], new: Sequence[int]) -> list[list[float]]:
    """FCOS's ranges of box sides (px) for other strides: a level keeps its upper bound, a new one gets a bound in
    proportion to its stride; the first range is open below, the last one above."""
    upper = {stride: float(pair[1]) for stride, pair in zip(old[:-1], ranges, strict=False)}
    by_stride = ranges[0][1] / old[0] if len(old) > 1 else 8.0  # 64 px at stride 8
    bounds = [upper.get(stride, by_stride * stride) for stride in new[:-1]]
    return [list(pair) for pair in zip([-1.0, *bounds], [*bounds, float(ranges[-1][1])], strict=True)]


def few_keys(keys: Sequence[str]) -> str:
    """Names joined for a message."""
    return ", ".join(dict.fromkeys(keys))


def _doubled(strides: list[int], count: int) -> list[int]:
    more = range(1, count - len(strides) + 1)
    return [*strides, *(strides[-1] << step for step in more)]


def _need_doubling(neck: Any, strides: list[int]) -> None:
    if any(b != 2 * a for a, b in itertools.pairwise(strides)):
        raise ConfigError(
            f"{type_name(neck)} enlarges each map by 2 to join it to the one before, and this network's maps have "
            f"strides {strides}; choose others (--cfg-options model.backbone.out_indices=…), or a detector with FPN"
        )


def type_name(item: Any) -> str:
    """Name of what a config builds, without its scope or module; empty where there is none."""
    kind = item.get("type")
    return (kind if isinstance(kind, str) else getattr(kind, "__name__", "")).split(".")[-1]


def _numbers(strides: Any) -> list[int] | None:
    if not isinstance(strides, list | tuple) or not strides:
        return None
    return [s[0] if isinstance(s, list | tuple) else s for s in strides]


def _set(holder: Any, key: str, value: Any, old: Any, changes: list[str], where: str) -> None:
    same = list(old) == list(value) if isinstance(old, list | tuple) else old == value
    if not same:
        holder[key] = value
        changes.append(f"{where}.{key} {_shown(value)}")


def _shown(value: Any) -> str:
    return str(list(value)).replace(" ", "") if isinstance(value, list | tuple) else str(value)
