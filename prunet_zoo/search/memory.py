"""How much memory a process has held."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def resident_peak_mb() -> float:
    """The greatest resident memory of this process so far, in MB (2^20 bytes).

    From Linux's ``VmHWM`` where there is one: ``ru_maxrss`` there counts the process that started this one too.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    if found:
        return int(found[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
