"""What a run remembers besides weights, optimiser and random numbers: `ExactResumeHook` keeps it in checkpoints.

In mmdet these are the images that `CachedMosaic` and `CachedMixUp` collect (RTMDet), and the image size that
`BatchSyncRandomResize` draws every few steps (YOLOX).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.runner import Runner

CACHE = "results_cache"  # where mmdet's transforms collect images
_DRAWN = {"BatchSyncRandomResize": "_input_size"}  # class of a module → what it draws now and then
_KIND = "__kind__"


class UnknownValueError(TypeError):
    """A value of a kind that is not put into checkpoints."""


def hidden_state(runner: Runner) -> dict[str, Any]:
    """Caches of the training pipeline and drawn image sizes, as data that ``torch.load(weights_only=True)`` takes.

    A cache lies where the pipeline runs. One in a loader's workers, or of a kind that is not known, is left out;
    ``lost`` then says why.
    """
    state: dict[str, Any] = {"caches": {}, "drawn": {name: value for name, _, _, value in _drawn(runner)}, "lost": ""}
    if runner.train_dataloader.num_workers:
        return {**state, "lost": "it lies in the loader's workers (only num_workers=0 can resume with it)"}
    try:
        state["caches"] = {name: encode(getattr(part, CACHE)) for name, part in caching_parts(runner)}
    except UnknownValueError as error:
        state["lost"] = f"it holds {error}"
    return state


def put_back(runner: Runner, state: dict[str, Any]) -> None:
    """Give transforms and modules what `hidden_state` returned, and take from ``state`` what found its place.

    What is left belongs to a pipeline that a hook puts in place later.
    """
    for name, part in caching_parts(runner):
        if name in state["caches"]:
            setattr(part, CACHE, decode(state["caches"].pop(name)))
    for name, module, attribute, _ in _drawn(runner):
        if name in state["drawn"]:
            value = state["drawn"].pop(name)
            setattr(module, attribute, None if value is None else tuple(value))


def warn_of_lost_caches(runner: Runner, state: dict[str, Any]) -> None:
    """Say in the log that a resumed run goes on with an empty cache, where it does."""
    parts = sorted({type(part).__name__ for _, part in caching_parts(runner)})
    if state["lost"] and parts:
        print_log(
            f"{' and '.join(parts)} collect images as they train, which the checkpoint does not have: {state['lost']}. "
            "They start with none, so the weights will not be those of a run without the break, bit for bit",
            "current",
            logging.WARNING,
        )


def caching_parts(runner: Runner) -> list[tuple[str, Any]]:
    """The transforms of the training pipeline that keep images, by place and settings."""
    return [(f"{path} {part!r}", part) for path, part in _transforms(runner.train_dataloader.dataset, "data")]


def _transforms(part: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Go down data sets, pipelines and transforms that hold others."""
    if isinstance(part, list | tuple):
        for i, item in enumerate(part):
            yield from _transforms(item, f"{path}.{i}")
        return
    if isinstance(getattr(part, CACHE, None), list):
        yield path, part
    for name in ("dataset", "datasets", "pipeline", "transforms"):
        inner = vars(part).get(name) if hasattr(part, "__dict__") else None
        if inner is not None and not isinstance(inner, str | Mapping):
            yield from _transforms(inner, f"{path}.{name}")


def _drawn(runner: Runner) -> Iterator[tuple[str, Any, str, Any]]:
    for name, module in runner.model.named_modules():
        attribute = _DRAWN.get(type(module).__name__)
        if attribute is not None:
            yield name, module, attribute, getattr(module, attribute)


def encode(value: Any) -> Any:
    """A value as tensors and plain data. Raises `UnknownValueError` where there is no way."""
    if value is None or (isinstance(value, bool | int | float | str) and type(value).__module__ == "builtins"):
        return value
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, np.ndarray | np.generic):
        array = np.array(value)
        if array.dtype.kind not in "biuf":
            raise UnknownValueError(f"an array of {array.dtype}")
        return {_KIND: "array", "value": torch.from_numpy(array), "scalar": isinstance(value, np.generic)}
    if isinstance(value, Mapping):
        return {_KIND: "dict", "keys": [encode(k) for k in value], "values": [encode(v) for v in value.values()]}
    if isinstance(value, list | tuple):
        return {_KIND: "tuple" if isinstance(value, tuple) else "list", "value": [encode(item) for item in value]}
    return _encode_mmdet(value)


def decode(value: Any) -> Any:
    """What `encode` was given."""
    if not isinstance(value, Mapping):
        return value
    kind = value[_KIND]
    if kind == "array":
        array = value["value"].numpy()
        return array[()] if value["scalar"] else array
    if kind == "dict":
        return {decode(k): decode(v) for k, v in zip(value["keys"], value["values"], strict=True)}
    if kind in ("list", "tuple"):
        return (tuple if kind == "tuple" else list)(decode(item) for item in value["value"])
    return _decode_mmdet(kind, value)


def _encode_mmdet(value: Any) -> dict[str, Any]:
    """Boxes and masks: mmdet is there, since one of its objects is."""
    kind = type(value).__name__
    if kind == "HorizontalBoxes":
        return {_KIND: kind, "value": value.tensor.clone()}
    if kind in ("BitmapMasks", "PolygonMasks"):
        return {_KIND: kind, "value": encode(value.masks), "size": [int(value.height), int(value.width)]}
    raise UnknownValueError(f"a {type(value).__module__}.{kind}")


def _decode_mmdet(kind: str, value: Mapping[str, Any]) -> Any:
    from mmdet.structures import bbox, mask

    if kind in ("BitmapMasks", "PolygonMasks"):
        return getattr(mask, kind)(decode(value["value"]), *value["size"])
    return getattr(bbox, kind)(value["value"], clone=False)
