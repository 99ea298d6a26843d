"""Building a latency table: what to measure, in what order, and going on after an interruption.

Blocks are measured in sets. A set takes one width of every other candidate in every place of the space: all narrow in
the first sets, all wide in the last. Run in turn, the probes of a set fill the caches about as a network of that width
does, rather less than more, because the correction can add for caches and not take off. Then whole networks of all
sizes are measured together, and the correction is fitted on them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prunet_zoo.latency.backends import Backend, Setting, get_backend
from prunet_zoo.latency.correction import fit_correction
from prunet_zoo.latency.probes import Probe, block_probe, random_network, randomise, stem_probe, tail_probe
from prunet_zoo.latency.record import now
from prunet_zoo.latency.table import LatencyTable, Shape, template_key
from prunet_zoo.latency.tablefile import Header, append, check_same, check_space, read_table, start_table
from prunet_zoo.latency.timing import time_in_turn, time_together
from prunet_zoo.space import Encoding, SearchSpace, load_space
from prunet_zoo.spec import BlockSpec

Progress = Callable[[int, int, str], None]  # (measured, of how many, what)


@dataclass(frozen=True)
class Effort:
    """How much to measure. ``block_seconds`` and ``network_seconds``: time on each probe and each whole network."""

    max_widths: int = 10  # on a grid with more than `all_widths`
    all_widths: int = 32  # a grid this small is measured whole: a search finds the widths that interpolation flatters
    networks: int = 16
    block_seconds: float = 0.06
    network_seconds: float = 0.4


QUICK = Effort(max_widths=5, all_widths=6, networks=8, block_seconds=0.03, network_seconds=0.15)
MAX_PARAMS_TOGETHER = 60_000_000  # whole networks in memory at a time; a backend may keep several copies


class Item(NamedTuple):
    """One block to be measured."""

    block: BlockSpec
    in_channels: int
    in_size: tuple[int, int]


def plan_blocks(space: SearchSpace, effort: Effort) -> list[list[Item]]:
    """The sets to be measured, from narrow to wide; each distinct block in its place occurs once."""
    groups: dict[tuple[int, str], list[Item]] = {}
    for layer in space.layers:
        for c in range(len(layer.candidates)):
            widths = coarse(layer.candidate_widths(c), effort)
            items = [Item(layer.block(c, w), layer.in_channels, layer.in_size) for w in widths]
            groups.setdefault((c % 2, template_key(*items[0])), []).extend(items)
    count = max(len(items) for items in groups.values())
    sets: list[list[Item]] = [[] for _ in range(2 * count)]
    for (half, _), group in groups.items():
        items = sorted(set(group), key=lambda item: item.block.hidden or 0)  # layers may share a template
        for i, item in enumerate(items):
            place = count // 2 if len(items) == 1 else round(i * (count - 1) / (len(items) - 1))
            sets[2 * place + half].append(item)
    return sets


def coarse(widths: Sequence[int], effort: Effort) -> tuple[int, ...]:
    """The widths to be measured: all of a small grid, otherwise evenly spread ones, both ends included."""
    if len(widths) <= effort.all_widths:
        return tuple(widths)
    steps = effort.max_widths - 1
    return tuple(sorted({widths[round(i * (len(widths) - 1) / steps)] for i in range(steps + 1)}))


def plan_networks(space: SearchSpace, count: int, seed: int = 0) -> list[Encoding]:
    """The smallest and the largest network of the space, and random ones of all sizes between (uniform sampling would
    give middling ones only)."""
    rng = random.Random(seed)
    found: dict[Encoding, None] = {_smallest(space): None, space.largest(): None}
    for i in range(count * 20):
        size = (i % count + 0.5) / count  # 0: small, 1: large
        choices: list[tuple[int, int] | None] = []
        for layer in space.layers:
            if layer.skip and rng.random() < 0.1 + 0.7 * (1 - size):
                choices.append(None)
                continue
            candidate = rng.randrange(len(layer.candidates))
            widths = layer.candidate_widths(candidate)
            share = min(1.0, max(0.0, rng.gauss(size, 0.25)))
            choices.append((candidate, widths[round(share * (len(widths) - 1))]))
        found[tuple(choices)] = None
        if len(found) >= count:
            break
    return list(found)


def _smallest(space: SearchSpace) -> Encoding:
    return tuple(None if layer.skip else (0, layer.candidate_widths(0)[0]) for layer in space.layers)


def build_table(
    space: SearchSpace | str | Path,
    path: str | Path,
    backend: str | Backend = "onnxruntime",
    threads: int = 1,
    dtype: str = "fp32",
    batch: int = 1,
    accelerator: str = "cpu",
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure what ``path`` lacks of a table over ``space``; the file grows as it is measured and can be gone on with.

    Raises:
        LatencyError: the backend is missing or cannot do what is asked, or ``path`` is a table of another device,
            backend, version, setting or space, or no table.
        WriteError: the file cannot be written.
    """
    builder = _Builder(
        load_space(space), Path(path), get_backend(backend), Setting(threads, dtype, batch, accelerator), progress
    )
    return builder.build(effort or Effort())


class _Builder:
    """One build: the table as it stands and where its file ends."""

    def __init__(
        self, space: SearchSpace, path: Path, backend: Backend, setting: Setting, progress: Progress | None
    ) -> None:
        backend.check(setting)
        self.space, self.path, self.backend, self.setting = space, path, backend, setting
        self.report = progress or (lambda done, total, what: None)
        header = _make_header(space, backend, setting)
        if not path.exists():
            start_table(path, header)
        found, entries, self.end = read_table(path)
        check_space(path, found, space)
        asked = header.model_dump(exclude={"kind", "format", "date", "space", "space_name", "space_hash"})
        check_same(path, found, asked)
        self.table = LatencyTable(found, entries, path)

    def build(self, effort: Effort) -> LatencyTable:
        sets = [[i for i in items if not self.table.has(*i)] for items in plan_blocks(self.space, effort)]
        encodings = [e for e in plan_networks(self.space, effort.networks) if e not in self.table.networks]
        fixed = not {"stem", "tail"} <= set(self.table.parts)
        total, done = sum(map(len, sets)) + len(encodings), 0
        with self.backend.environment(self.setting), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for number, items in enumerate(sets):
                with_fixed = fixed and number == len(sets) // 2
                if items or with_fixed:
                    self.report(done, total, "blocks")
                    self._keep(self._measure_set(items, with_fixed, effort.block_seconds))
                    done += len(items)
            for group in self._chunks(encodings):
                self.report(done, total, "whole networks")
                self._keep(self._measure_networks(group, effort.network_seconds))
                done += len(group)
        if total or fixed or self.table.correction is None:
            parts = [self.table.parts_of(encoding, ms) for encoding, ms in self.table.networks.items()]
            self._keep([{"kind": "correction", **fit_correction(parts).to_dict()}])
        self.report(total, total, "done")
        return self.table

    def _keep(self, rows: list[dict[str, Any]]) -> None:
        self.end = append(self.path, rows, self.end)
        self.table.add(rows)

    def _measure_set(self, items: list[Item], with_fixed: bool, seconds: float) -> list[dict[str, Any]]:
        shapes: list[Shape] = list(dict.fromkeys((i.in_channels, i.in_size) for i in items))
        probes = [block_probe(None, *shape) for shape in shapes]
        probes += [block_probe(*item) for item in items]
        if with_fixed:
            probes += [stem_probe(self.space), *tail_probe(self.space)]
        sessions = [self._prepare(probe) for probe in probes]
        timings = [t.median_ms for t in time_in_turn(sessions, seconds)]
        frame = dict(zip(shapes, timings, strict=False))
        rows: list[dict[str, Any]] = []
        for item, ms in zip(items, timings[len(shapes) :], strict=False):
            base = frame[item.in_channels, item.in_size]
            place = {"in_channels": item.in_channels, "in_size": list(item.in_size)}
            rows.append({"kind": "block", "block": item.block.to_dict(), **place, "ms": ms - base, "frame_ms": base})
        if with_fixed:
            stem, tail, base = timings[-3:]
            rows.append({"kind": "fixed", "part": "stem", "ms": stem})
            rows.append({"kind": "fixed", "part": "tail", "ms": max(0.0, tail - base), "frame_ms": base})
        return rows

    def _prepare(self, probe: Probe) -> Any:
        return self.backend.prepare(randomise(probe), (self.setting.batch, *probe.in_shape), self.setting)

    def _chunks(self, encodings: list[Encoding]) -> list[list[Encoding]]:
        """Groups of networks that fit into memory together."""
        groups: list[list[Encoding]] = []
        params = 0
        for encoding in encodings:
            mine = self.space.decode(encoding).params()
            if not groups or params + mine > MAX_PARAMS_TOGETHER:
                groups.append([])
                params = 0
            groups[-1].append(encoding)
            params += mine
        return groups

    def _measure_networks(self, encodings: list[Encoding], seconds: float) -> list[dict[str, Any]]:
        side = self.space.input_size
        shape = (self.setting.batch, self.space.in_channels, side, side)
        sessions = [self.backend.prepare(random_network(self.space, e), shape, self.setting) for e in encodings]
        timings = time_together(sessions, seconds)
        return [
            {
                "kind": "network",
                "encoding": encoding,
                "ms": t.median_ms,
                "p10_ms": t.p10_ms,
                "p90_ms": t.p90_ms,
                "n": t.n,
            }
            for encoding, t in zip(encodings, timings, strict=True)
        ]


def _make_header(space: SearchSpace, backend: Backend, setting: Setting) -> Header:
    return Header(
        device=backend.device_name(setting.accelerator),
        accelerator=setting.accelerator,
        backend=backend.name,
        backend_version=backend.version,
        dtype=setting.dtype,
        batch=setting.batch,
        threads=setting.threads,
        space_name=space.name,
        space_hash=space.hash,
        input_size=(space.input_size, space.input_size),
        date=now(),
        space=space.to_dict(),
    )
