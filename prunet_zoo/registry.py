"""Child registries of MMEngine's root registries: MMEngine resolves ``type='prunet_zoo.X'`` through this file.

`register` also puts a class into the root registry, so that it resolves unprefixed in every OpenMMLab package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mmengine import registry as root
from mmengine.registry import Registry

T = TypeVar("T")


def _child(parent: Registry) -> Registry:
    return Registry(parent.name, parent=parent, scope="prunet_zoo", locations=["prunet_zoo.mm"])


MODELS = _child(root.MODELS)
MODEL_WRAPPERS = _child(root.MODEL_WRAPPERS)
DATASETS = _child(root.DATASETS)
HOOKS = _child(root.HOOKS)
LOOPS = _child(root.LOOPS)
METRICS = _child(root.METRICS)
OPTIMIZERS = _child(root.OPTIMIZERS)
PARAM_SCHEDULERS = _child(root.PARAM_SCHEDULERS)
RUNNERS = _child(root.RUNNERS)
TASK_UTILS = _child(root.TASK_UTILS)


def register(registry: Registry, name: str | None = None) -> Callable[[type[T]], type[T]]:
    """Decorator that registers a class as ``prunet_zoo.<name>`` and, in the parent registry, as ``<name>``."""

    def decorate(cls: type[T]) -> type[T]:
        registry.register_module(name=name or cls.__name__, module=cls, force=True)
        registry.parent.register_module(name=name or cls.__name__, module=cls, force=True)
        return cls

    return decorate
