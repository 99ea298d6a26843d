"""The part of a detector's config that lies in its published file, as text that is data and never code.

A file of weights comes from anywhere. A Python config would run whatever stands in it, and MMEngine's registries import
what a dotted ``type`` names, so the text is a Python literal (tuples stay tuples, as mmdet wants them), and its types
are plain names, which only what is registered can answer to.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config

from prunet_zoo.errors import CheckpointError
from prunet_zoo.mm.cli import ConfigError

_TYPE = re.compile(r"((mmdet|mmcv|mmengine|prunet_zoo)\.)?[A-Za-z_]\w*")
_TEXT = re.compile(r"[\w.+\-/ ]*")  # mmcv's NMS evaluates its operator's name: no brackets, no calls
_LEFT_OUT = ("init_cfg", "pretrained", "backend_args", "file_client_args")  # the file holds all weights
_PACKAGES = ("prunet_zoo", "mmdet", "mmcv", "mmengine")


def write_config(cfg: Config) -> str:
    """Text of what inference takes: the model, and how an image is prepared.

    Raises:
        ConfigError: the config needs code that the file cannot bring along.
    """
    imports = [str(name) for name in (cfg.get("custom_imports") or {}).get("imports", [])]
    strange = [name for name in imports if name.split(".")[0] not in _PACKAGES]
    if strange:
        raise ConfigError(
            f"the config imports {', '.join(strange)}, which a published file cannot bring along: it may use "
            "modules of mmdet, mmcv and prunet_zoo alone"
        )
    plain = cfg.to_dict()
    data = {
        "default_scope": plain.get("default_scope") or "mmdet",
        "model": _without(plain["model"]),
        "test_pipeline": _without(_pipeline(plain.get("test_dataloader", {}).get("dataset", {}))),
    }
    text = repr(data)
    try:
        if parse_config(text).to_dict() != Config(_as_config(data)).to_dict():
            raise ConfigError("the config's model does not survive being written as text")
    except CheckpointError as error:
        raise ConfigError(f"the config cannot be published: {error}") from None
    return text


def parse_config(text: Any) -> Config:
    """The config of `write_config`'s text: ``model``, ``default_scope`` and ``test_dataloader.dataset.pipeline``.

    Raises:
        CheckpointError: it is no such text, or holds what could run code.
    """
    try:
        data = ast.literal_eval(text)
        model, pipeline, scope = data["model"], data["test_pipeline"], data["default_scope"]
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"it carries a damaged config: {type(error).__name__}: {error}") from None
    if not isinstance(model, dict) or not (isinstance(pipeline, list) and pipeline) or scope not in _PACKAGES:
        raise CheckpointError("it carries a damaged config: a model, a test pipeline and mmdet's scope are wanted")
    for where, value in _texts({"model": model, "test_pipeline": pipeline}):
        fits = _TYPE if where.endswith(".type") else _TEXT
        if not isinstance(value, str) or not fits.fullmatch(value):
            raise CheckpointError(f"its config has {value!r} as {where}, which is not a plain name and could run code")
    return Config(_as_config(data))


def _as_config(data: dict[str, Any]) -> dict[str, Any]:
    pipeline = {"dataset": {"pipeline": data["test_pipeline"]}}
    return {"default_scope": data["default_scope"], "model": data["model"], "test_dataloader": pipeline}


def _texts(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every text, of every ``type`` and of every key itself, at any depth."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            path = f"{where}.{key}".lstrip(".")
            yield f"{where or 'config'} key", key if isinstance(key, str) else str(key)
            if key == "type" and not isinstance(item, str):
                yield path, item
            yield from _texts(item, path)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _texts(item, f"{where}[{number}]")
    elif isinstance(value, str):
        yield where, value


def _without(value: Any) -> Any:
    """The same without the keys that name files."""
    if isinstance(value, Mapping):
        return {key: _without(item) for key, item in value.items() if key not in _LEFT_OUT}
    return type(value)(_without(item) for item in value) if isinstance(value, list | tuple) else value


def _pipeline(dataset: Mapping[str, Any]) -> list[Any]:
    """The test pipeline, in a data set or what it wraps (mmdet's `get_test_pipeline_cfg` for plain data)."""
    if dataset.get("pipeline"):
        return list(dataset["pipeline"])
    inner = dataset.get("dataset") or next(iter(dataset.get("datasets") or []), None)
    if not inner:
        raise ConfigError("the config has no test_dataloader whose data set has a pipeline")
    return _pipeline(inner)
