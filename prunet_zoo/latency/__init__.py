"""Latency: measured (`measure`), looked up (`LatencyTable`, `build_table`), on the backends of `list_backends`.

Names are imported when they are first used: most need torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunet_zoo.latency.backends import (
        Availability,
        Backend,
        Session,
        Setting,
        available_backends,
        check_output,
        get_backend,
        list_backends,
    )
    from prunet_zoo.latency.breakdown import Breakdown, break_down
    from prunet_zoo.latency.build import build_table
    from prunet_zoo.latency.compare import compare_files
    from prunet_zoo.latency.compare_now import compare_backends, compare_networks
    from prunet_zoo.latency.correction import Correction
    from prunet_zoo.latency.device import fingerprint
    from prunet_zoo.latency.measurement import measure, measure_together
    from prunet_zoo.latency.own_device import fit_device, read_measurements
    from prunet_zoo.latency.plan import QUICK, Effort
    from prunet_zoo.latency.predictor import DeviceModel, Predictor, list_devices
    from prunet_zoo.latency.progress import progress_bar
    from prunet_zoo.latency.record import Record, Timing, append_record, read_records
    from prunet_zoo.latency.report import ReportPlan, make_report
    from prunet_zoo.latency.table import LatencyTable

_HOME = {
    "backends": (
        "Availability",
        "Backend",
        "Session",
        "Setting",
        "available_backends",
        "check_output",
        "get_backend",
        "list_backends",
    ),
    "breakdown": ("Breakdown", "break_down"),
    "build": ("build_table",),
    "plan": ("QUICK", "Effort"),
    "compare": ("compare_files",),
    "compare_now": ("compare_backends", "compare_networks"),
    "correction": ("Correction",),
    "device": ("fingerprint",),
    "measurement": ("measure", "measure_together"),
    "own_device": ("fit_device", "read_measurements"),
    "predictor": ("DeviceModel", "Predictor", "list_devices"),
    "progress": ("progress_bar",),
    "record": ("Record", "Timing", "append_record", "read_records"),
    "report": ("ReportPlan", "make_report"),
    "table": ("LatencyTable",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "QUICK",
    "Availability",
    "Backend",
    "Breakdown",
    "Correction",
    "DeviceModel",
    "Effort",
    "LatencyTable",
    "Predictor",
    "Record",
    "ReportPlan",
    "Session",
    "Setting",
    "Timing",
    "append_record",
    "available_backends",
    "break_down",
    "build_table",
    "check_output",
    "compare_backends",
    "compare_files",
    "compare_networks",
    "fingerprint",
    "fit_device",
    "get_backend",
    "list_backends",
    "list_devices",
    "make_report",
    "measure",
    "measure_together",
    "progress_bar",
    "read_measurements",
    "read_records",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
