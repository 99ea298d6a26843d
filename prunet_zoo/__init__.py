"""PruNet model zoo and latency-aware architecture search.

``import prunet_zoo`` registers the backbone, models, datasets, hooks and the search runner in MMEngine where that is
installed, so a config needs ``custom_imports=['prunet_zoo']`` and nothing else; and the zoo's networks in timm, whether
timm is imported before or after. Without MMEngine the import is cheap
(torch is loaded on first use), and models, latency and weights work all the same.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from prunet_zoo import timm_hook
from prunet_zoo.space import SearchSpace, list_spaces, load_space
from prunet_zoo.spec import NetSpec, list_models, load_spec
from prunet_zoo.version import __version__

if TYPE_CHECKING:
    from prunet_zoo.models import load_weights, save_weights
    from prunet_zoo.zoo.create import create_model
    from prunet_zoo.zoo.download import download

__all__ = [
    "NetSpec",
    "SearchSpace",
    "__version__",
    "create_model",
    "download",
    "list_models",
    "list_spaces",
    "load_space",
    "load_spec",
    "load_weights",
    "save_weights",
]

_LAZY = {  # torch is imported only when a model is asked for (PEP 562)
    "create_model": "prunet_zoo.zoo.create",
    "download": "prunet_zoo.zoo.download",
    "load_weights": "prunet_zoo.models",
    "save_weights": "prunet_zoo.models",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'prunet_zoo' has no attribute {name!r}")


if find_spec("mmengine") is not None:
    from prunet_zoo import mm  # noqa: F401  (registers)
timm_hook.install()  # last: where MMEngine is, timm is loaded by now
