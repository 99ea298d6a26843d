"""Latency: measured (`measure`), looked up (`LatencyTable`, `build_table`), on the backends of `list_backends`.

Names are imported when they are first used: most need torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunet_zoo.latency.backends import Backend, Session, Setting, get_backend, list_backends
    from prunet_zoo.latency.build import QUICK, Effort, build_table
    from prunet_zoo.latency.correction import Correction
    from prunet_zoo.latency.measurement import measure
    from prunet_zoo.latency.progress import progress_bar
    from prunet_zoo.latency.record import Record, Timing
    from prunet_zoo.latency.table import LatencyTable

_HOME = {
    "backends": ("Backend", "Session", "Setting", "get_backend", "list_backends"),
    "build": ("QUICK", "Effort", "build_table"),
    "correction": ("Correction",),
    "measurement": ("measure",),
    "progress": ("progress_bar",),
    "record": ("Record", "Timing"),
    "table": ("LatencyTable",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "QUICK",
    "Backend",
    "Correction",
    "Effort",
    "LatencyTable",
    "Record",
    "Session",
    "Setting",
    "Timing",
    "build_table",
    "get_backend",
    "list_backends",
    "measure",
    "progress_bar",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
