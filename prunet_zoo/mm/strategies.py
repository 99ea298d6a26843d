"""The search methods that a config can name, and the models that they search in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from mmengine.config import Config
from mmengine.model import BaseModel
from pydantic import ConfigDict, TypeAdapter, ValidationError

from prunet_zoo import search
from prunet_zoo.errors import unknown_name
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.masked_model import MaskedClassifier
from prunet_zoo.mm.search_model import SearchModel
from prunet_zoo.mm.supernet_model import SuperNetClassifier
from prunet_zoo.registry import MODELS, TASK_UTILS, register
from prunet_zoo.search.strategy import SearchStrategy

MODELS_OF: dict[str, type[SearchModel]] = {
    "TieredPruning": SuperNetClassifier,
    "DDPNAS": SuperNetClassifier,
    "PruningAsSearch": MaskedClassifier,
    "Archtree": MaskedClassifier,
}
# of train_cfg, each with the smallest value that makes sense
WHOLE_NUMBERS = {"max_epochs": 1, "verify": 0, "recalibration_batches": 0}


def check_config(cfg: Config) -> None:
    """Raise `ConfigError` where a config is not one of a search, or one of its parts is of another kind: a text where a
    dict is wanted, or no whole number."""
    loop = cfg.get("train_cfg")
    search_parts = isinstance(loop, Mapping) and "strategy" in loop and "latency" in loop
    if cfg.get("runner_type") != "SuperNetRunner" or not search_parts:
        raise ConfigError(
            f"{cfg.filename} is not a search config: it needs runner_type='SuperNetRunner' and a train_cfg with "
            "strategy and latency; see configs/search/"
        )
    parts = {"model": cfg.get("model"), **{f"train_cfg.{name}": loop[name] for name in ("strategy", "latency")}}
    for field, value in parts.items():
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{field} must be a dict, got {value!r}; write {field}=dict(type=…) in the config, or "
                f"--cfg-options {field}.type=…"
            )
    for name, least in WHOLE_NUMBERS.items():
        value = loop.get(name, None if name == "max_epochs" else least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(
                f"train_cfg.{name} must be a whole number, {least} or more, got {value!r}; write --cfg-options "
                f"train_cfg.{name}=N"
            )


def build_strategy(config: dict[str, Any]) -> SearchStrategy:
    """The strategy of ``train_cfg.strategy``.

    Raises:
        ConfigError: an unknown type or argument, or an argument of another type.
        LatencyError, SpecError: an argument is out of range.
    """
    name = str(config.get("type", ""))
    if name in MODELS_OF:
        register(TASK_UTILS)(getattr(search, name))  # here: the methods are not loaded with `import prunet_zoo`
    cls = TASK_UTILS.get(name)
    if cls is None:
        raise ConfigError(f"train_cfg.strategy.type: {unknown_name('search strategy', name, MODELS_OF)}")
    known = sorted(inspect.signature(cls).parameters)
    odd = ", ".join(sorted(set(config) - {"type"} - set(known)))
    if odd:
        raise ConfigError(f"train_cfg.strategy does not take {odd}; {cls.__name__} takes {', '.join(known)}")
    hints = get_type_hints(cls.__init__) if name in MODELS_OF else {}
    for key, value in config.items():
        if key in hints and key != "type":
            _check_type(f"train_cfg.strategy.{key}", value, hints[key])
    return TASK_UTILS.build(dict(config))


def _check_type(field: str, value: Any, hint: Any) -> None:
    value = tuple(value) if isinstance(value, list) else value  # a config's lists stand for tuples
    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{field}: {error.errors()[0]['msg']}, got {value!r}") from None


def check_model(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where the config of a search's model has keys that the model does not take, or values of
    another type."""
    cls = MODELS.get(config["type"]) if isinstance(config.get("type"), str) else config.get("type")
    if not (isinstance(cls, type) and issubclass(cls, SearchModel)):
        return  # told by `check_fit`, or by the registry
    known = sorted(set(inspect.signature(cls).parameters))
    odd = ", ".join(sorted(set(config) - {"type"} - set(known)))
    if odd:
        raise ConfigError(f"model does not take {odd}; {cls.__name__} takes {', '.join(known)}")
    hints = get_type_hints(cls.__init__) if cls in MODELS_OF.values() else {}
    for key, value in config.items():
        if key in hints:
            _check_type(f"model.{key}", value, hints[key])


def check_fit(strategy: SearchStrategy, model: BaseModel) -> SearchModel:
    """The model, as what a search can be made in.

    Raises:
        ConfigError: it is not one of a search, not of the kind that the strategy searches in, or of untrained weights
            where the strategy starts from trained ones.
    """
    method = type(strategy).__name__
    if not isinstance(model, SearchModel):
        both = " or ".join(sorted({cls.__name__ for cls in MODELS_OF.values()}))
        raise ConfigError(f"a search needs model.type={both}, got {type(model).__name__}")
    wanted = MODELS_OF.get(method, SearchModel)
    if not isinstance(model, wanted):
        raise ConfigError(
            f"{method} searches in a {wanted.__name__}, but the config's model is a {type(model).__name__}; set "
            f"model=dict(type='{wanted.__name__}', …), or take another train_cfg.strategy"
        )
    if isinstance(model, MaskedClassifier) and getattr(strategy, "pretrain", None) == 0 and not model.trained:
        raise ConfigError(
            f"{method} prunes a trained network, but the model has no weights and train_cfg.strategy.pretrain is 0; "
            "give model.weights (or model.pretrained for timm), or a share of the epochs to train in first"
        )
    return model


def check_start(strategy: SearchStrategy, model: SearchModel, epochs: int) -> None:
    """Raise `ConfigError` where a method that prunes a trained network would start with an untrained one: the epochs,
    which `SearchStrategy.setup` has shared out, leave none to train in first."""
    if strategy.pretrain_epochs == 0 and isinstance(model, MaskedClassifier) and not model.trained:
        raise ConfigError(
            f"{type(strategy).__name__} prunes a trained network, but the model has no weights and of {epochs} epochs "
            "none is left to train in first; give model.weights, more epochs (train_cfg.max_epochs) or a larger "
            "train_cfg.strategy.pretrain"
        )
