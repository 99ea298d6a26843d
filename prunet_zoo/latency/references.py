"""How fast the processor is at the moment: three small fixed works, timed between the rounds of a measurement.

``clock``: SHA-256 of 16 KiB, one chain of dependent instructions in the nearest cache, so it follows the clock.
``compute``: products of 64×64 matrices, which also feel another thread on the same core's arithmetic units (of another
virtual machine too, which no operating system shows). ``cache``: the sum of a list of 50,000 numbers that lie scattered
over about 2 MB, which a neighbour slows who fills the caches that cores share: eager PyTorch, whose time is mostly
walking through small objects and code, becomes up to half slower then. All count in CPU time of the thread.

A value says something beside the best of the same machine: `remember` keeps the best ones in the user's cache folder,
by device, by how its clock is set and by the libraries that do the works. They only ever fall: after a change that no
key holds (the BIOS, the cooling), delete the file (`reference_file`).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import ssl
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prunet_zoo.files import WriteError, write_json
from prunet_zoo.jsonfile import stable_hash
from prunet_zoo.latency.machine import governor, limit_mhz
from prunet_zoo.zoo.home import expand_user

NAMES = ("clock", "compute", "cache")
TOLERANCES = (0.03, 0.03, 0.08)  # of a look over the best one, in a round that counts as clean
SCATTERED = 50_000
KEPT = 8  # values remembered of each work
TYPICAL = 2  # index of the one among them that counts as best: a lower one may be an error of the CPU clock

Look = tuple[float, ...]  # µs of each work


class References:
    """The works. Calling it does each and returns their times in µs.

    Args:
        remembered: the best time of each work on this machine, in µs; None: not known.
    """

    def __init__(self, remembered: Sequence[float] | None = None) -> None:
        self.remembered = None if remembered is None else tuple(remembered)
        self.looks: list[Look] = []
        self._bytes = bytes(16384)
        self._matrix = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
        self._product = np.empty_like(self._matrix)
        self._list = [1.5 * i for i in range(SCATTERED)]
        random.Random(0).shuffle(self._list)
        self()  # imports and caches
        self.looks.clear()

    def __call__(self) -> Look:
        look = (_fastest(self._hash), _fastest(self._multiply), _fastest(self._sum))
        self.looks.append(look)
        return look

    def _hash(self) -> None:
        hashlib.sha256(self._bytes).digest()

    def _multiply(self) -> None:
        for _ in range(3):
            np.dot(self._matrix, self._matrix, out=self._product)

    def _sum(self) -> None:
        sum(self._list)

    @property
    def fast(self) -> Look:
        """The lower tenth of each work's times so far: its time when nothing slows it, if that happened at all."""
        return tuple(float(np.quantile(times, 0.1)) for times in zip(*self.looks, strict=True))

    @property
    def best(self) -> Look:
        """`fast`, or what is remembered where that is less."""
        if self.remembered is None:
            return self.fast
        return tuple(map(min, self.fast, self.remembered))

    def slowness(self, looks: Sequence[Look]) -> float:
        """How much slower than the best the slowest of some looks is: 0.1 is 10%."""
        best = self.best
        return max(us / fast for look in looks for us, fast in zip(look, best, strict=True)) - 1

    def are_clean(self, rows: Sequence[Sequence[Look]]) -> list[bool]:
        """Of each row, whether none of its looks is slower than the best by more than the tolerances."""
        limits = [fast * (1 + tolerance) for fast, tolerance in zip(self.best, TOLERANCES, strict=True)]
        return [all(us <= most for look in row for us, most in zip(look, limits, strict=True)) for row in rows]


def _fastest(work: object) -> float:
    """Least CPU time of three calls, in µs."""
    clock = time.thread_time_ns
    times = []
    for _ in range(3):
        start = clock()
        work()  # type: ignore[operator]
        times.append(clock() - start)
    return min(times) * 1e-3


def reference_file() -> Path:
    """Where the best times are remembered: in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand_user(cache, "the cache folder") / "prunet_zoo" / "references.json"


def reference_key(device_hash: str) -> str:
    """What the best times depend on: the hardware, how its clock is set (where it can be read), what does the works."""
    clock = [value for value in (governor(), limit_mhz()) if value is not None]
    return stable_hash([device_hash, platform.python_version(), np.__version__, ssl.OPENSSL_VERSION, *clock])


def recall(key: str) -> Look | None:
    """The best times remembered under ``key``; None where there are none, or the file is not readable as such."""
    kept = _kept().get(key)
    if kept is None:
        return None
    return tuple(sorted(times)[: TYPICAL + 1][-1] for times in kept)


def remember(key: str, fast: Look) -> bool:
    """Remember the times of one measurement under ``key``; whether the file could be written."""
    kept = _kept()
    before = kept.get(key, [[] for _ in fast])
    kept[key] = [sorted([*times, us])[:KEPT] for times, us in zip(before, fast, strict=True)]
    if kept[key] == before:
        return True
    try:
        write_json(reference_file(), kept)
    except WriteError:  # a measurement is good without a memory; the record says so
        return False
    return True


def _kept() -> dict[str, list[list[float]]]:
    try:
        data = json.loads(reference_file().read_bytes())
    except (OSError, ValueError):  # a cache: what cannot be read is made anew
        return {}
    return {key: rows for key, rows in data.items() if _is_rows(rows)} if isinstance(data, dict) else {}


def _is_rows(rows: object) -> bool:
    """Whether data holds times of each work."""
    return (
        isinstance(rows, list)
        and len(rows) == len(NAMES)
        and all(isinstance(times, list) and times for times in rows)
        and all(isinstance(us, float | int) and us > 0 for times in rows for us in times)
    )
