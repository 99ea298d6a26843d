"""What else happens on this machine while a measurement runs: other processes, the hypervisor, throttling.

Linux tells in /proc and /sys; what a system does not tell is None. Of the processors, those count that this process may
run on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
PROC = Path("/proc")


@dataclass(frozen=True)
class Snapshot:
    """Counters at one moment: seconds since some start, and the number of times that a core was throttled."""

    wall: float
    own: float  # CPU time of this process
    busy: float | None  # CPU time of all processes
    stolen: dict[str, float] | None  # by core: what the hypervisor gave to other machines while this one had work
    throttled: int | None


@dataclass(frozen=True)
class Meanwhile:
    """What happened between two snapshots.

    ``others``: cores that other processes kept busy. ``steal``: share of its time that the hypervisor took from the
    core that lost most. ``throttled``: times that a core was slowed for its heat. ``load``: load average over a minute.
    ``pressure``: per cent of the last 10 s in which some task waited for a processor.
    """

    others: float | None
    steal: float | None
    throttled: int | None
    load: float | None
    pressure: float | None
    governor: str | None
    mhz: float | None


def snapshot() -> Snapshot:
    """Read the counters."""
    busy, stolen = cpu_seconds(_read(PROC / "stat"), _allowed())
    counts = [_read(path).strip() for path in CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    throttled = sum(int(count) for count in counts if count.isdigit()) if counts else None
    return Snapshot(time.perf_counter(), time.process_time(), busy, stolen, throttled)


def meanwhile(before: Snapshot, after: Snapshot) -> Meanwhile:
    """What happened between two snapshots."""
    wall = max(after.wall - before.wall, 1e-9)
    others = steal = throttled = None
    if before.busy is not None and after.busy is not None:
        others = max(0.0, (after.busy - before.busy - (after.own - before.own)) / wall)
    if before.stolen is not None and after.stolen is not None:
        lost = [seconds - before.stolen[core] for core, seconds in after.stolen.items() if core in before.stolen]
        steal = max(lost, default=0.0) / wall
    if before.throttled is not None and after.throttled is not None:
        throttled = after.throttled - before.throttled
    return Meanwhile(others, steal, throttled, _load(), pressure(_read(PROC / "pressure" / "cpu")), governor(), _mhz())


def cpu_seconds(stat: str, allowed: Collection[int] | None = None) -> tuple[float | None, dict[str, float] | None]:
    """Seconds that processors were busy, together, and that were stolen from each ("cpu0", …).

    Args:
        stat: the text of /proc/stat.
        allowed: numbers of the processors that count; None: all.
    """
    busy, stolen = 0.0, {}
    for line in stat.splitlines():
        name, *fields = line.split() or [""]
        number = name.removeprefix("cpu")
        if name == number or not number.isdigit() or (allowed is not None and int(number) not in allowed):
            continue
        if len(fields) >= 8 and all(f.isdigit() for f in fields):
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(f) for f in fields[:8])
            hertz = os.sysconf("SC_CLK_TCK")
            busy += (user + nice + system + irq + softirq) / hertz
            stolen[name] = steal / hertz
    return (busy, stolen) if stolen else (None, None)


def _allowed() -> set[int] | None:
    """Numbers of the processors that this process may run on; None where the system does not tell."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return None if affinity is None else affinity(0)


def pressure(text: str) -> float | None:
    """``avg10`` of the line ``some`` of /proc/pressure/cpu."""
    for line in text.splitlines():
        kind, *pairs = line.split()
        for key, _, value in (pair.partition("=") for pair in pairs):
            if kind == "some" and key == "avg10":
                return float(value)
    return None


def governor() -> str | None:
    """The frequency governors in use: "performance", "powersave"…; None where the system sets no clock (as in VMs)."""
    names = sorted({_read(path).strip() for path in CPUS.glob("cpu[0-9]*/cpufreq/scaling_governor")} - {""})
    return ", ".join(names) or None


def limit_mhz() -> float | None:
    """The highest clock that a core may take as the system is set; None where it sets no clock."""
    return highest_mhz(_read(path) for path in CPUS.glob("cpu[0-9]*/cpufreq/scaling_max_freq"))


def _mhz() -> float | None:
    """The highest clock of a core at the moment."""
    return highest_mhz(_read(path) for path in CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))


def highest_mhz(khz: Iterable[str]) -> float | None:
    """The highest of some files' clocks in MHz."""
    return max((int(text) / 1e3 for text in khz if text.strip().isdigit()), default=None)


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):  # Windows
        return None


def _read(path: Path) -> str:
    """A file's text; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
