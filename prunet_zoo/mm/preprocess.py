"""A detector normalises images as its backbone's weights were trained: ``mean``, ``std`` and the order of channels."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log

from prunet_zoo.errors import CheckpointError
from prunet_zoo.mm.scheme import local_file
from prunet_zoo.zoo.index import Preprocess, find_model, is_zoo
from prunet_zoo.zoo.predict import told

_KEYS = ("mean", "std", "bgr_to_rgb", "rgb_to_bgr")


def follow_weights(cfg: Config, weights: str | Path) -> None:
    """Normalise images as the classifier was trained that ``weights`` are of, where they tell; a change is said.

    Args:
        cfg: a detector's; mmdet's detectors read images as BGR of 0…255.
        weights: a ``.safetensors`` file or ``prunet://NAME``; others tell nothing.
    """
    known: Preprocess | None = None
    if is_zoo(weights):
        known = find_model(str(weights)).preprocess
    elif str(weights).endswith(".safetensors") and "://" not in str(weights):
        known = told(str(weights)).preprocess
    if known is not None:
        scaled = {key: [round(255 * value, 3) for value in getattr(known, key)] for key in ("mean", "std")}
        _replace(cfg, {**scaled, "bgr_to_rgb": True, "rgb_to_bgr": False}, weights)


def follow_checkpoint(cfg: Config, checkpoint: str | Path) -> None:
    """Normalise images as in the run that wrote ``checkpoint`` (a ``.pth``), whose config lies inside it.

    Raises:
        CheckpointError: damaged.
    """
    path = Path(local_file(checkpoint)) if "://" not in str(checkpoint) or is_zoo(checkpoint) else None
    if path is None or path.suffix != ".pth" or not path.is_file():
        return
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged pickle provokes
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    text = (data.get("meta") or {}).get("cfg") if isinstance(data, Mapping) else None
    own = read_preprocessor(text) if isinstance(text, str) else {}
    if own.get("mean") and own.get("std"):
        _replace(cfg, {key: own.get(key, False) for key in _KEYS}, checkpoint)


def read_preprocessor(text: str) -> dict[str, Any]:
    """The plain values of ``data_preprocessor=dict(…)`` of the model in a config's text, which is not executed."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):  # no Python, or zero bytes
        return {}
    models = [s.value for s in body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "model"]
    keywords = models[-1].keywords if models and isinstance(models[-1], ast.Call) else []
    for keyword in keywords:
        if keyword.arg == "data_preprocessor" and isinstance(keyword.value, ast.Call):
            items = [(item.arg, item.value) for item in keyword.value.keywords if item.arg in _KEYS]
            try:
                return {str(name): ast.literal_eval(value) for name, value in items}
            except ValueError:  # an expression: it tells nothing that may be known without running it
                return {}
    return {}


def _replace(cfg: Config, wanted: dict[str, Any], source: str | Path) -> None:
    """Put ``wanted`` into the model's ``data_preprocessor``, and say so where it differs by more than rounding."""
    holder = cfg.model.setdefault("data_preprocessor", {"type": "DetDataPreprocessor"})
    if not str(holder.get("type")).endswith("DetDataPreprocessor"):
        return
    had = {key: holder.get(key) for key in _KEYS}
    if _same(had, wanted):
        return
    shown = f"mean {had['mean']}, std {had['std']}, {_order(had)}"
    new = f"mean {wanted['mean']}, std {wanted['std']}, {_order(wanted)}"
    print_log(f"data_preprocessor: {new}, which {source} was trained with; the config has {shown}", "current")
    holder.update(wanted)


def _order(values: Mapping[str, Any]) -> str:
    return "RGB" if values["bgr_to_rgb"] else "BGR"


def _same(had: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    if had["mean"] is None or _order(had) != _order(wanted):
        return False
    pairs = [pair for key in ("mean", "std") for pair in zip(had[key], wanted[key], strict=False)]
    return all(abs(a - b) <= 0.5 for a, b in pairs)  # ImageNet's figures are written with 2 to 5 digits
