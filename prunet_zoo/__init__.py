"""PruNet model zoo and latency-aware architecture search.

``import prunet_zoo`` registers the backbone, models, datasets, hooks and the search runner in MMEngine where that is
installed, so a config needs ``custom_imports=['prunet_zoo']`` and nothing else. Without MMEngine the import is cheap
(torch is loaded on first use), and models, latency and weights work all the same.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from prunet_zoo.space import SearchSpace, list_spaces, load_space
from prunet_zoo.spec import NetSpec, list_models, load_spec
from prunet_zoo.version import __version__

if TYPE_CHECKING:
    from prunet_zoo.models import create_model, load_weights, save_weights

__all__ = [
    "NetSpec",
    "SearchSpace",
    "__version__",
    "create_model",
    "list_models",
    "list_spaces",
    "load_space",
    "load_spec",
    "load_weights",
    "save_weights",
]

_FROM_MODELS = {"create_model", "load_weights", "save_weights"}


def __getattr__(name: str) -> Any:  # torch is imported only when a model is asked for (PEP 562)
    if name in _FROM_MODELS:
        from prunet_zoo import models

        return getattr(models, name)
    raise AttributeError(f"module 'prunet_zoo' has no attribute {name!r}")


if find_spec("mmengine") is not None:
    from prunet_zoo import mm  # noqa: F401  (registers)
