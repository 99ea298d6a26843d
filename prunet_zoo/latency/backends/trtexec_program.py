"""The program ``trtexec`` of TensorRT 8.0 to 11: its version and options, running it, and reading what it writes."""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunet_zoo.errors import LatencyError

_BANNER = re.compile(r"TensorRT\.trtexec \[TensorRT v([\d.]+)\]")
_OPTION = re.compile(r"^ {1,8}(--[A-Za-z0-9]+)", re.MULTILINE)  # descriptions go on further to the right
_RUNS = re.compile(r"Timing trace has (\d+) queries")
_NUMBER = r"([0-9.]+(?:e[+-]?\d+)?)"
_ONE_LINE = re.compile(rf"\bGPU Compute Time: min = .*?\bmedian = {_NUMBER} ms")
_MANY_LINES = re.compile(rf"\bGPU Compute\s*\n(?:.*\n){{0,4}}?.*\bmedian: {_NUMBER} ms")
_NOT_FINITE = re.compile(r"(?<![\w.\"])(-?)(nan|inf)(?![\w\"])", re.IGNORECASE)


@dataclass(frozen=True)
class Program:
    """A ``trtexec`` whose ``--help`` has been read. ``options``: "--onnx" and so on."""

    path: Path
    version: str
    options: frozenset[str]

    @classmethod
    def open(cls, path: Path) -> Program:
        """Ask the program for its help.

        Raises:
            LatencyError: it does not run, or it is no trtexec.
        """
        text = _call(path, ["--help"])[1]  # releases differ in the exit status
        banner, options = _BANNER.search(text), frozenset(_OPTION.findall(text))
        missing = {"--onnx", "--saveEngine", "--loadEngine", "--exportTimes"} - options
        if banner is None or missing:
            lacks = ", ".join(sorted(missing)) if missing else "its version"
            raise LatencyError(
                f"{path} is no trtexec of TensorRT 8 or newer: its --help does not tell {lacks}. "
                f"It said: {_last_lines(text)}"
            )
        return cls(path, decode_version(banner[1]), options)

    @property
    def strongly_typed(self) -> bool:
        """Whether the ONNX file alone says what runs in fp16 (TensorRT 11, which has no ``--fp16``)."""
        return "--fp16" not in self.options

    def run(self, *options: str) -> str:
        """Run with ``options`` and return what it printed; raises `LatencyError` with its last error lines."""
        status, text = _call(self.path, list(options))
        if status != 0 or "&&&& FAILED" in text:
            raise LatencyError(f"trtexec {self.version} failed (exit status {status}): {_last_lines(text)}")
        return text


def _call(path: Path, options: list[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(
            [str(path), *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        )  # fmt: skip
    except OSError as error:
        raise LatencyError(f"cannot run {path}: {error.strerror or error}") from None
    return done.returncode, done.stdout


def _last_lines(text: str) -> str:
    """The last error lines of a log, or its last lines where none is marked."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.split("[E]", 1)[1].strip() for line in lines if "[E]" in line]
    return "; ".join((errors or lines)[-3:]) or "nothing"


def decode_version(text: str) -> str:
    """ "8601" → "8.6.1", "100400" → "10.4.0": how the banner writes a version until 9 and from 10 on."""
    if "." in text:
        return ".".join(text.split(".")[:3])
    number = int(text)
    if number >= 10000:
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    return f"{number // 1000}.{number // 100 % 10}.{number % 100}"


def read_median(log: str) -> float:
    """The median "GPU Compute Time" of a performance summary, ms.

    Raises:
        LatencyError: the log has no such line.
    """
    found = _ONE_LINE.search(log) or _MANY_LINES.search(log)
    if found is None:
        raise LatencyError(f'trtexec printed no "GPU Compute Time" with a median; its last lines: {_last_lines(log)}')
    return float(found[1])


def read_times(path: Path, log: str) -> list[float]:
    """GPU compute time of each run after warm-up, ms, from the file of ``--exportTimes``.

    Older releases (8.2) also write the warm-up, at the beginning; the log says how many runs count. The median of
    those must be the one that trtexec printed.
    """
    rows = _load(path, "--exportTimes")
    try:
        times = [float(row["computeMs"]) for row in rows]
    except (TypeError, KeyError, ValueError):
        raise LatencyError(f"trtexec wrote timings without computeMs: {str(rows)[:200]}") from None
    counted = _RUNS.search(log)
    if counted is None or int(counted[1]) > len(times) or int(counted[1]) == 0:
        raise LatencyError(
            f"trtexec exported {len(times)} runs, its log says {counted[1] if counted else 'nothing of how many count'}"
        )
    times = times[-int(counted[1]) :]
    printed, median = read_median(log), statistics.median(times)
    if not math.isclose(printed, median, rel_tol=2e-3, abs_tol=1e-4):
        raise LatencyError(
            f"trtexec printed a median of {printed} ms, the runs that it exported have {median} ms: "
            "this release counts differently; please report it with its version"
        )
    return times


def read_output(path: Path) -> np.ndarray:
    """The first output tensor in a file of ``--exportOutput``."""
    rows = _load(path, "--exportOutput")
    try:
        shape = [int(side) for side in rows[0]["dimensions"].split("x")]
        return np.asarray(rows[0]["values"], dtype=np.float32).reshape(shape)
    except (TypeError, KeyError, IndexError, ValueError, AttributeError):
        raise LatencyError(f"trtexec wrote an output that cannot be read: {str(rows)[:200]}") from None


def _load(path: Path, option: str) -> Any:
    """JSON as trtexec writes it: C++ prints numbers that are not finite as nan and inf."""
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(_NOT_FINITE.sub(lambda m: "NaN" if m[2].lower() == "nan" else f"{m[1]}Infinity", text))
    except (OSError, ValueError) as error:
        raise LatencyError(f"trtexec {option} wrote no file that can be read: {error}") from None
