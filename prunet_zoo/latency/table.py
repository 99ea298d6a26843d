"""LatencyTable: what each block of a search space costs on one device, looked up.

A table holds each distinct (block, input channels, map size) of a space, with hidden widths on a coarse grid; between
them it interpolates linearly on a curve that is made non-decreasing (isotonic regression). The whole-network
`Correction` is included in every figure that it gives. It is the cost function of a search: ``table(spec)`` in ms,
exactly ``table.fixed(spec) + Σ table.block(...)``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends import get_backend
from prunet_zoo.latency.correction import Correction, NetworkParts
from prunet_zoo.latency.tablefile import Header, check_same, check_space, read_table
from prunet_zoo.space import SearchSpace
from prunet_zoo.spec import BlockSpec, NetSpec, parse, stable_hash

QUANTA = (1, 4, 8, 16, 32, 64)
Shape = tuple[int, tuple[int, int]]  # input channels, (H, W) of the map before the block


def template_key(block: BlockSpec, in_channels: int, in_size: tuple[int, int]) -> str:
    """A stable name of a block without its hidden width, in its place; what does not change latency is left out."""
    data = block.to_dict()
    data.pop("hidden", None)
    data.pop("bn_eps", None)
    if block.pad == block.kernel_size // 2:
        data.pop("padding", None)
    inside = ",".join(f"{k}={data[k]}" for k in sorted(data))
    return f"{inside}|{in_channels}x{in_size[0]}x{in_size[1]}"


def _block_name(key: str, width: int) -> str:
    return f"{key} {width}"


class Curve:
    """Latency over hidden width: measured points, made non-decreasing, with straight lines between.

    Args:
        points: latency in ms by width.
        quantum: channels that the device computes at a time: between the points, a width counts as its next multiple.
    """

    def __init__(self, points: Mapping[int, float], quantum: int = 1) -> None:
        from scipy.optimize import isotonic_regression  # takes a while to import

        self.widths, self.quantum = sorted(points), quantum
        measured = np.array([max(0.0, points[w]) for w in self.widths])
        self.ms: list[float] = [float(v) for v in isotonic_regression(measured).x]

    def __call__(self, width: int) -> float | None:
        """Latency in ms at ``width``; None outside of what was measured."""
        if not self.widths[0] <= width <= self.widths[-1]:
            return None
        i = bisect_left(self.widths, width)
        if self.widths[i] == width:
            return self.ms[i]
        share = _share(self.widths[i - 1], width, self.widths[i], self.quantum)
        return self.ms[i - 1] * (1 - share) + self.ms[i] * share


def _share(low: int, width: int, high: int, quantum: int) -> float:
    """Where ``width`` lies between two others, 0 to 1, each rounded up to a multiple of ``quantum``."""
    a, b, c = (-(-w // quantum) for w in (low, width, high))
    return (b - a) / (c - a) if c > a else 1.0


def leave_out_errors(points: Mapping[int, float], quantum: int = 1) -> dict[int, float]:
    """How far each measured width but the outer two is off the straight line between its neighbours.

    Args:
        points: latency in ms by width.
        quantum: see `Curve`.

    Returns:
        For the index of each inner width, in rising order: |line - measured| as a share of what was measured, or of a
        tenth of the curve's greatest latency where that is more: what costs next to nothing may be off by more.
    """
    widths = sorted(points)
    floor = 0.1 * max(points.values(), default=0.0)
    errors = {}
    for i in range(1, len(widths) - 1):
        (a, b, c), (left, mine, right) = widths[i - 1 : i + 2], (points[w] for w in widths[i - 1 : i + 2])
        line = left + (right - left) * _share(a, b, c, quantum)
        errors[i] = abs(line - mine) / max(mine, floor, 1e-9)
    return errors


def find_quantum(curves: Iterable[Mapping[int, float]]) -> int:
    """Channels that a device computes at a time (vector registers, tiles of a matrix unit): of `QUANTA` the one with
    which measured widths are predicted best from their neighbours; 1 where that hardly matters."""
    rows = [points for points in curves if len(points) > 2]
    if not rows:
        return 1
    off = {q: sum(e for points in rows for e in leave_out_errors(points, q).values()) for q in QUANTA}
    best = min(QUANTA, key=lambda q: off[q])
    return best if off[best] < 0.9 * off[1] else 1


class LatencyTable:
    """Latencies of the blocks of one space on one device, backend and setting. Make one with `load` or `build_table`.

    Args:
        header: what was measured, on what.
        entries: the lines after the header.
        path: the file it came from, for messages.
    """

    unit = "ms"

    def __init__(self, header: Header, entries: Iterable[dict[str, Any]], path: str | Path = "(in memory)") -> None:
        self.header = header
        self.path = Path(path)
        self.space = header.search_space()
        self.points: dict[str, dict[int, float]] = {}
        self.parts: dict[str, float] = {}
        self.networks: dict[tuple[Any, ...], float] = {}
        self.correction: Correction | None = None
        self.slow: set[str] = set()  # names of what was only measured while the processor was slow
        self.seconds: dict[str, float | None] = {}  # name → time that it was measured for; None: not known
        self.longest = {"block": 0.0, "network": 0.0}  # of these times
        self.add(entries)

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a finished table.

        Raises:
            LatencyError: the file is missing, damaged, or a build of it was interrupted.
        """
        header, entries, _ = read_table(path)
        table = cls(header, entries, path)
        if table.correction is None:
            raise LatencyError(
                f"latency table {path} is unfinished; go on with the same command that began it: "
                f"python tools/latency.py table {header.space_name} --num-classes {table.space.num_classes} "
                f"--out {path} --backend {header.backend} --threads {header.threads} --batch {header.batch} "
                f"--dtype {header.dtype} --device {header.accelerator} --memory-format {header.memory_format}"
            )
        return table

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Take in entries (lines of the file); of a block, part or network measured twice the lower latency counts."""
        for entry in entries:
            try:
                self._add(entry)
            except (KeyError, TypeError, ValueError) as error:
                raise LatencyError(
                    f"latency table {self.path}: damaged entry {entry} ({error}); delete that line"
                ) from None
        self._curves: dict[str, Curve] = {}
        self._quantum: int | None = None
        self._cache: dict[tuple[BlockSpec, int, tuple[int, int]], float] = {}

    def _add(self, entry: dict[str, Any]) -> None:
        kind = entry["kind"]
        if kind == "correction":
            self.correction = parse(Correction, {k: v for k, v in entry.items() if k != "kind"}, "correction")
            return
        if kind == "block":
            block = parse(BlockSpec, entry["block"], "block")
            h, w = entry["in_size"]
            key, width = template_key(block, int(entry["in_channels"]), (int(h), int(w))), block.hidden or 0
            self._take(self.points.setdefault(key, {}), width, _block_name(key, width), entry)
        elif kind == "fixed":
            part = str(entry["part"])
            self._take(self.parts, part, part, entry)
        elif kind == "network":
            encoding = tuple(None if c is None else (int(c[0]), int(c[1])) for c in entry["encoding"])
            self._take(self.networks, encoding, str(encoding), entry)
        else:
            raise ValueError(f"unknown kind {kind!r}")
        if kind in self.longest:
            self.longest[kind] = max(self.longest[kind], float(entry.get("seconds") or 0.0))
        self.correction = None  # was fitted without this line

    def _take(self, figures: dict[Any, float], place: Any, name: str, entry: dict[str, Any]) -> None:
        """Put a line's latency in its place. Of several lines the one that was measured for longer counts, and of equal
        time (or where a line does not tell) the lowest, since what disturbs only slows."""
        ms, slow = float(entry["ms"]), bool(entry.get("slow"))
        seconds = None if entry.get("seconds") is None else float(entry["seconds"])
        if place in figures:
            before = self.seconds[name]
            if seconds is None or before is None or seconds == before:
                ms, slow = min(ms, figures[place]), slow and name in self.slow
                seconds = None if seconds is None else before
            elif seconds < before:
                return
        figures[place], self.seconds[name] = ms, seconds
        (self.slow.add if slow else self.slow.discard)(name)

    def has(self, block: BlockSpec, in_channels: int, in_size: tuple[int, int], seconds: float = 0.0) -> bool:
        """Whether this very block was measured, for so much time at least."""
        return self._has(_block_name(template_key(block, in_channels, in_size), block.hidden or 0), seconds)

    def has_part(self, part: str, seconds: float = 0.0) -> bool:
        """The same of the "stem" or the "tail"."""
        return self._has(part, seconds)

    def has_network(self, encoding: Sequence[tuple[int, int] | None], seconds: float = 0.0) -> bool:
        """The same of a whole network."""
        return self._has(str(tuple(encoding)), seconds)

    def _has(self, name: str, seconds: float) -> bool:
        known = self.seconds.get(name, -1.0)
        return known is None or known >= seconds  # a file of before this was kept does not tell

    def is_slow(self, block: BlockSpec, in_channels: int, in_size: tuple[int, int]) -> bool:
        """Whether a block was only measured while the processor was slow."""
        return _block_name(template_key(block, in_channels, in_size), block.hidden or 0) in self.slow

    def is_slow_network(self, encoding: Sequence[tuple[int, int] | None]) -> bool:
        """The same of a whole network."""
        return str(tuple(encoding)) in self.slow

    def raw(self, block: BlockSpec, in_channels: int, in_size: tuple[int, int]) -> float:
        """Latency of a block's probe in ms, before correction.

        Raises:
            LatencyError: the table does not hold the block, or its width lies outside of what was measured.
        """
        key = template_key(block, in_channels, in_size)
        if key not in self._curves:
            if key not in self.points:
                raise LatencyError(
                    f"latency table {self.path} (space {self.header.space_name!r}) has no block {block.to_dict()} for "
                    f"{in_channels} channels of {in_size[0]}×{in_size[1]} px; is the network from another space?"
                )
            self._curves[key] = Curve(self.points[key], self.quantum)
        curve = self._curves[key]
        value = curve(block.hidden or 0)
        if value is None:
            raise LatencyError(
                f"latency table {self.path}: hidden width {block.hidden} of {block.to_dict()} is outside of what was "
                f"measured, {curve.widths[0]} to {curve.widths[-1]}"
            )
        return value

    def block(self, block: BlockSpec, in_channels: int, in_size: tuple[int, int]) -> float:
        """Latency in ms that a block adds to a network, correction included; errors as in `raw`."""
        key = (block, in_channels, in_size)
        if key not in self._cache:
            correction = self.correction or Correction()
            self._cache[key] = correction.block(self.raw(*key), block.params(in_channels))
        return self._cache[key]

    def fixed(self, network: SearchSpace | NetSpec) -> float:
        """Latency in ms of all that a search cannot change: the call, stem, tail and classifier.

        Raises:
            LatencyError: ``network`` has another stem, tail, input or number of classes than the table's space.
        """
        stem = network.stem if isinstance(network, SearchSpace) else network.stages[: len(self.space.stem)]
        if stem != self.space.stem:
            raise LatencyError(f"{network.name!r} has another stem than space {self.space.name!r} of {self.path}")
        for field in ("input_size", "in_channels", "tail", "num_classes"):
            mine, other = getattr(self.space, field), getattr(network, field)
            if mine != other:
                raise LatencyError(
                    f"{network.name!r} has {field} {other}, latency table {self.path} was measured for {mine}; "
                    "build a table for the space with that value"
                    + (" (python tools/latency.py table … --num-classes N)" if field == "num_classes" else "")
                )
        return (self.correction or Correction()).fixed * self._fixed_raw()

    def _fixed_raw(self) -> float:
        missing = {"stem", "tail"} - set(self.parts)
        if missing:
            raise LatencyError(
                f"latency table {self.path} lacks the {' and '.join(sorted(missing))}; go on building it"
            )
        return self.parts["stem"] + self.parts["tail"]

    def __call__(self, spec: NetSpec) -> float:
        """Predicted latency of a network of the space in ms; raises `LatencyError` for any other network."""
        return self.fixed(spec) + sum(self.block(*place) for place in self._searchable(spec))

    def _searchable(self, spec: NetSpec) -> list[tuple[BlockSpec, int, tuple[int, int]]]:
        return [(p.block, p.in_channels, p.in_size) for p in spec.placed() if p.stage >= len(self.space.stem)]

    def parts_of(self, encoding: Sequence[tuple[int, int] | None], measured_ms: float) -> NetworkParts:
        """The sums over a network that its correction is fitted on."""
        blocks = self._searchable(self.space.decode(encoding))
        return NetworkParts(
            blocks_ms=sum(self.raw(*place) for place in blocks),
            fixed_ms=self._fixed_raw(),
            blocks=len(blocks),
            params=sum(block.params(channels) for block, channels, _ in blocks),
            measured_ms=measured_ms,
        )

    def require(self, space: SearchSpace | None = None, device: str | None = None, **asked: Any) -> None:
        """Check that the table is of what it is wanted for.

        Args:
            space: the space it must be of; None: any.
            device: the device it must be of; None: this machine's.
            asked: other fields of the header (``backend``, ``threads``, ``dtype``, ``batch``, ``accelerator``).

        Raises:
            LatencyError: naming both sides.
        """
        if space is not None:
            check_space(self.path, self.header, space)
        check_same(self.path, self.header, asked)
        if device is None:
            device = get_backend(self.header.backend).device_name(self.header.accelerator)
        check_same(self.path, self.header, {"device": device})

    def describe(self) -> dict[str, Any]:
        """Device, backend, setting and accuracy, for reports."""
        data = self.header.model_dump(mode="json", exclude={"kind", "space", "format", "fingerprint"})
        correction = (self.correction or Correction()).to_dict()
        blocks = sum(len(points) for points in self.points.values())
        data["interpolation"] = self.interpolation()
        data["slow"] = len(self.slow)
        return {**data, "unit": self.unit, "blocks": blocks, "correction": correction, "path": str(self.path)}

    @property
    def quantum(self) -> int:
        """Channels that the device computes at a time, as far as the measured widths tell."""
        if self._quantum is None:
            self._quantum = find_quantum(self.points.values())
        return self._quantum

    def interpolation(self) -> dict[str, float | None]:
        """Error of interpolation between measured widths: each inner width left out and predicted by its neighbours,
        across twice the gap (so this is an upper estimate); median and worst over the table, None where no width has
        two neighbours."""
        errors = [e for points in self.points.values() for e in leave_out_errors(points, self.quantum).values()]
        return (
            {"typical": float(np.median(errors)), "worst": max(errors)} if errors else {"typical": None, "worst": None}
        )

    @property
    def hash(self) -> str:
        """12 hex digits over everything that a lookup depends on: reports and resumed searches compare it."""
        correction = (self.correction or Correction()).to_dict()
        points = {k: sorted(v.items()) for k, v in self.points.items()}
        return stable_hash([self.header.space_hash, points, self.parts, correction])
