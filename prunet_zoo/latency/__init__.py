"""Latency: measured (`measure`), looked up (`LatencyTable`, `build_table`), on the backends of `list_backends`."""

from prunet_zoo.latency.backends import Backend, Session, Setting, get_backend, list_backends
from prunet_zoo.latency.build import QUICK, Effort, build_table
from prunet_zoo.latency.correction import Correction
from prunet_zoo.latency.measure import Record, Timing, measure
from prunet_zoo.latency.progress import progress_bar
from prunet_zoo.latency.table import LatencyTable

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
