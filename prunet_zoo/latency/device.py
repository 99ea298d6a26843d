"""What a measurement was made on: a description of the machine without names of hosts or users."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

from prunet_zoo.jsonfile import stable_hash
from prunet_zoo.latency.backends import Backend, Setting
from prunet_zoo.latency.backends.base import cpu_name
from prunet_zoo.latency.machine import governor
from prunet_zoo.latency.nvidia import gpu_state

# what kernels for inference choose by; x86 and ARM
FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
         "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2")  # fmt: skip
HARDWARE = ("device", "cpu", "cores", "usable_cores", "memory_gib", "flags", "virtual", "system", "gpu")  # hashed


def fingerprint(backend: Backend, setting: Setting) -> dict[str, Any]:
    """Hardware, system and libraries that a latency depends on.

    ``hash`` covers the hardware alone, so it stays the same over updates and restarts. ``virtual``: None where the
    system does not tell. ``gpu``: only for a setting that runs on one.
    """
    data: dict[str, Any] = {
        "device": backend.device_name(setting.accelerator),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "flags": cpu_flags(_read("/proc/cpuinfo")),
        "virtual": is_virtual(_read("/proc/cpuinfo")),
        "system": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "governor": governor(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "backend": backend.name,
        "backend_version": backend.version,
        "gpu": None,
    }
    if setting.accelerator == "cuda":
        data |= {"gpu": _gpu(), "cuda": torch.version.cuda, "driver": gpu_state(gpu_id()).get("driver_version")}
    return {**data, "hash": stable_hash({key: data[key] for key in HARDWARE})}


def usable_cores() -> float:
    """Cores that this process may use at a time: those it may run on, or fewer where its control group has a quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return min(float(cores), cgroup_quota(Path("/sys/fs/cgroup"), _read("/proc/self/cgroup")))


def cgroup_quota(root: Path, groups: str) -> float:
    """CPU quota of a process in cores; infinite without one.

    Args:
        root: where control groups are mounted.
        groups: text of the process's /proc/self/cgroup.
    """
    quota = math.inf
    for line in groups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":  # version 2: every group on the way down may limit
            folders = [root]
            for part in Path(path).parts[1:]:
                folders.append(folders[-1] / part)
            limits = [_read(folder / "cpu.max").split() for folder in folders]
        elif "cpu" in controllers.split(","):
            base = root / "cpu"
            limits = [
                [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
                for folder in (base, base / path.lstrip("/"))
            ]
        else:
            continue
        for limit in limits:
            if len(limit) == 2 and all(part.isdigit() for part in limit) and int(limit[1]):
                quota = min(quota, int(limit[0]) / int(limit[1]))
    return quota


def cpu_flags(cpuinfo: str) -> list[str]:
    """Those of `FLAGS` that the text of /proc/cpuinfo names."""
    return [flag for flag in FLAGS if flag in _flags(cpuinfo)]


def is_virtual(cpuinfo: str) -> bool | None:
    """Whether the text of /proc/cpuinfo is of a virtual machine; None where it has no x86 flags."""
    flags = _flags(cpuinfo)
    return "hypervisor" in flags if "fpu" in flags else None


def _flags(cpuinfo: str) -> set[str]:
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def _memory_gib() -> int | None:
    """Whole GiB of memory."""
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    except (OSError, ValueError, AttributeError):  # Windows
        return None


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():  # a backend with a runtime of its own
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "memory_gib": round(found.total_memory / 2**30),
        "compute_capability": f"{found.major}.{found.minor}",
    }


def gpu_id() -> str:
    """What ``nvidia-smi --id`` takes for the GPU in use."""
    if torch.cuda.is_available():
        uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
        if uuid is not None:
            return f"GPU-{str(uuid).removeprefix('GPU-')}"
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"


def _read(path: str | Path) -> str:
    """A file's text; empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
