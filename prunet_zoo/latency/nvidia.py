"""The state of an NVIDIA GPU as ``nvidia-smi`` tells it: clocks, throttling, temperature, other processes."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "clocks_throttle_reasons.active",  # drivers from 535 call it clocks_event_reasons and still know this name
    "temperature.gpu",
    "persistence_mode",
)
# bits of nvmlClocksEventReasons that mean "slower than it could be" (NVML's documentation)
THROTTLED = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
IDLE = 0x1  # "nothing is running on the GPU and the clocks are dropping"
SECONDS = 20.0
PROC = Path("/proc")


def gpu_state(gpu: str) -> dict[str, Any]:
    """Ask ``nvidia-smi`` about one GPU (index or UUID).

    Returns:
        Numbers and texts by the names of `FIELDS` with underscores, ``throttled`` (list of causes) and ``idle``;
        only ``{"nvidia_smi": "…"}`` with the reason where it cannot be asked.
    """
    if shutil.which("nvidia-smi") is None:
        return {"nvidia_smi": "not found"}
    try:
        return parse_state(_ask(gpu, f"--query-gpu={','.join(FIELDS)}"))
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        return {"nvidia_smi": f"failed: {error}"}


def other_processes(gpu: str) -> list[int] | None:
    """Ids of other processes that compute on a GPU; None where ``nvidia-smi`` does not tell.

    In a container it tells the ids of the host, this process's too; those that do not exist here do not count.
    """
    try:
        processes = parse_processes(_ask(gpu, "--query-compute-apps=pid,used_memory"))
    except (subprocess.SubprocessError, OSError):
        return None
    return [pid for pid in processes if pid != os.getpid() and (not PROC.is_dir() or (PROC / str(pid)).is_dir())]


def _ask(gpu: str, query: str) -> str:
    command = ["nvidia-smi", f"--id={gpu}", query, "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout


def parse_state(text: str) -> dict[str, Any]:
    """Parse the answer to ``--query-gpu`` of `FIELDS`; a value that the GPU does not tell is None.

    Raises:
        ValueError: the answer has another number of columns.
    """
    rows = [row for row in csv.reader(text.splitlines(), skipinitialspace=True) if row]
    if len(rows) != 1 or len(rows[0]) != len(FIELDS):
        raise ValueError(f"nvidia-smi answered {text.strip()!r}; one line of {len(FIELDS)} values was expected")
    values = {field.replace(".", "_"): _value(cell) for field, cell in zip(FIELDS, rows[0], strict=True)}
    active = values.pop("clocks_throttle_reasons_active")
    bits = int(active, 16) if isinstance(active, str) else 0
    throttled = [cause for bit, cause in THROTTLED.items() if bits & bit]
    return {**values, "throttled": throttled, "idle": bool(bits & IDLE)}


def _value(cell: str) -> float | str | None:
    cell = cell.strip()
    if cell.startswith("[") or cell in ("N/A", ""):  # [N/A], [Not Supported], [Unknown Error]
        return None
    try:
        return float(cell)
    except ValueError:
        return cell


def parse_processes(text: str) -> list[int]:
    """Process ids in the answer to ``--query-compute-apps=pid,used_memory``."""
    firsts = (row[0].strip() for row in csv.reader(text.splitlines()) if row)
    return [int(first) for first in firsts if first.isdigit()]


def gpu_reasons(states: Iterable[dict[str, Any]], others: Sequence[int] | None, tolerance: float) -> list[str]:
    """What disturbs a measurement on a GPU.

    Args:
        states: the GPU at some moments of the measurement, in order (`gpu_state`). Those in which it was idle do not
            count, and a clock that rises is one that wakes up.
        others: ids of other processes on it.
        tolerance: what the clock may fall by, relative to the highest before.
    """
    busy = [state for state in states if not state.get("idle")]
    causes = list(dict.fromkeys(cause for state in busy for cause in state.get("throttled", [])))
    reasons = [f"GPU throttled: {', '.join(causes)}"] if causes else []
    clocks = [state["clocks_sm"] for state in busy if state.get("clocks_sm")]
    falls = [(max(clocks[: i + 1]), clock) for i, clock in enumerate(clocks)]
    top, clock = max(falls, key=lambda fall: fall[0] / fall[1], default=(1.0, 1.0))
    if top / clock - 1 > tolerance:
        reasons.append(f"GPU clock went from {top:.0f} to {clock:.0f} MHz")
    if others:
        reasons.append(f"{len(others)} other process{'es' if len(others) > 1 else ''} on the GPU")
    return reasons
