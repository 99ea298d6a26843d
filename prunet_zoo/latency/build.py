"""Building a latency table: what `plan` says is measured, and what is interrupted goes on.

Blocks first, coarsely and then finer where it is needed (`plan`), spread over time (`interleave`). Then whole networks
of all sizes are measured together; blocks during which the processor was slow are measured again, and the networks too,
so that minutes lie between. Of equal lines the one that had most time counts, then the lowest, since what disturbs only
slows. The correction is fitted last, and is void once another line follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from prunet_zoo.errors import LatencyError
from prunet_zoo.files import WriteError
from prunet_zoo.latency.backends import Backend, Session, Setting, get_backend
from prunet_zoo.latency.correction import fit_correction
from prunet_zoo.latency.device import fingerprint
from prunet_zoo.latency.interleave import PATIENCE, time_sets
from prunet_zoo.latency.memory import SMALLER_BATCH, check_memory
from prunet_zoo.latency.plan import (
    Effort,
    Item,
    Template,
    arrange,
    finer_widths,
    first_widths,
    list_templates,
    plan_networks,
)
from prunet_zoo.latency.probes import Probe, block_probe, random_network, randomise, stem_probe, tail_probe
from prunet_zoo.latency.record import Timing, now
from prunet_zoo.latency.references import References, recall, reference_key
from prunet_zoo.latency.subject import MAX_PARAMS_TOGETHER
from prunet_zoo.latency.table import LatencyTable, Shape
from prunet_zoo.latency.tablefile import Header, append, check_same, check_space, read_table, start_table
from prunet_zoo.latency.timing import MIN_CLEAN, run_rounds
from prunet_zoo.space import Encoding, SearchSpace, load_space

Progress = Callable[[int, int, str], None]  # (measured, of how many, what)

PRECISION = 0.01  # half the width of a whole network's interval that is aimed at
SECOND_CHANCES = 2  # for blocks that were measured while the processor was slow
MAX_BLOCK_PARAMS = 150_000_000  # blocks in memory at a time; a backend may keep several copies
MAX_BLOCKS = 100  # visited in turn; an interruption loses no more
MAX_SLOW_BLOCKS = 12  # the same where preparing one takes seconds
FIXED = ("stem", "tail")  # the parts that every network of a space has


class BlockSet(NamedTuple):
    """Blocks whose probes are run in turn; ``fixed``: stem and tail with them."""

    items: list[Item]
    fixed: bool


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
    memory_format: str = "contiguous",
    repeat_slow: bool = False,
) -> LatencyTable:
    """Measure what ``path`` lacks of a table over ``space``; the file grows as it is measured and can be gone on with.

    What had less time than ``effort`` asks for is measured again. A table that was begun with more time goes on with
    that.

    Args:
        space, path: what to measure, and the file.
        backend, threads, dtype, batch, accelerator, memory_format: see `prunet_zoo.latency.measure`.
        effort: how much to measure; None: `Effort()`.
        progress: called with (measured, of how many, what).
        repeat_slow: measure again also in a finished table what the processor was slow for (`LatencyTable.slow`).

    Raises:
        LatencyError: the backend is missing or cannot do what is asked, or ``path`` is a table of another device,
            backend, version, setting or space, or no table.
        SpecError: the space is not additive.
        WriteError: the file cannot be written.
    """
    setting = Setting(threads, dtype, batch, accelerator, memory_format)
    path, space, engine = Path(path), load_space(space), get_backend(backend)
    space.require_additive("a latency table")
    engine.check(setting)  # before anything is written
    if accelerator == "cpu":
        check_memory(space.decode(space.largest(), space.name), None, batch, dtype, SMALLER_BATCH)
    with _alone(path):
        began = not path.exists()
        builder = _Builder(space, path, engine, setting, progress)
        try:
            return builder.build(effort or Effort(), repeat_slow)
        except Exception:
            if began and not builder.table.seconds:  # a header alone
                path.unlink(missing_ok=True)
            raise


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process builds this table meanwhile."""
    lock = FileLock(path.with_name(f"{path.name}.lock"), timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise LatencyError(
            f"another process is building latency table {path}; wait for it, or give another file name"
        ) from None
    except OSError as error:
        raise WriteError(
            f"cannot write latency table {path}: {error.strerror or error}; choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


class _Builder:
    """One build: the table as it stands and where its file ends."""

    def __init__(
        self, space: SearchSpace, path: Path, backend: Backend, setting: Setting, progress: Progress | None
    ) -> None:
        self.space, self.path, self.backend, self.setting = space, path, backend, setting
        self.report = progress or (lambda done, total, what: None)
        header = _make_header(space, backend, setting)
        if not path.exists():
            start_table(path, header)
        found, entries, self.end = read_table(path)
        check_space(path, found, space)
        about = {"kind", "format", "date", "space", "space_name", "space_hash", "fingerprint"}
        asked = header.model_dump(exclude=about)
        check_same(path, found, asked)
        self.table = LatencyTable(found, entries, path)
        self.references: References | None = None
        self.after = 0  # networks that come after the blocks
        if setting.accelerator == "cpu":
            self.references = References(recall(reference_key(fingerprint(backend, setting)["hash"])))

    def build(self, effort: Effort, repeat_slow: bool) -> LatencyTable:
        """See `build_table`."""
        block_seconds = max(effort.block_seconds, self.table.longest["block"])
        network_seconds = max(effort.network_seconds, self.table.longest["network"])
        templates = list_templates(self.space)
        planned = plan_networks(self.space, effort.networks)
        encodings = [e for e in planned if not self.table.has_network(e, network_seconds)]
        wanted = {t: sorted({*first_widths(t.grid, effort), *self._measured(t)}) for t in templates}
        changed = (
            bool(encodings or (repeat_slow and self.table.slow))
            or self.table.correction is None
            or not all(self.table.has_network(e, network_seconds) for e in self.table.networks)
        )
        self.after = len(encodings)
        with self.backend.environment(self.setting), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            while True:
                missing = {
                    t: [w for w in widths if not self.table.has(*t.items([w])[0], block_seconds)]
                    for t, widths in wanted.items()
                }
                sets, fixed = self._arrange(missing), not all(self.table.has_part(p, block_seconds) for p in FIXED)
                if not sets and not fixed:
                    break
                changed = True
                self._measure_blocks(sets, block_seconds, fixed)
                wanted = {
                    t: list(finer_widths(t.grid, self._measured(t), effort, self.table.quantum)) for t in templates
                }
            self._measure_networks(encodings, network_seconds)
            for _ in range(SECOND_CHANCES):
                slow = {t: [w for w in self._measured(t) if self.table.is_slow(*t.items([w])[0])] for t in templates}
                sets, fixed = self._arrange(slow), not self.table.slow.isdisjoint(FIXED)
                if changed and (sets or fixed):
                    self._measure_blocks(sets, block_seconds, fixed)
            if changed:
                self._measure_networks(list(self.table.networks), network_seconds)
        if changed:
            parts = [self.table.parts_of(encoding, ms) for encoding, ms in self.table.networks.items()]
            self._keep([{"kind": "correction", **fit_correction(parts).to_dict()}])
        self.report(1, 1, "done")
        return self.table

    def _measured(self, template: Template) -> dict[int, float]:
        """Latency in ms by width, as far as measured, in rising order of width."""
        return dict(sorted(self.table.points.get(template.key, {}).items()))

    def _arrange(self, widths: dict[Template, list[int]]) -> list[list[Item]]:
        return arrange(widths, smallest=-(-len(self.space.layers) // 3))

    def _keep(self, rows: list[dict[str, Any]]) -> None:
        self.end = append(self.path, rows, self.end)
        self.table.add(rows)

    def _measure_blocks(self, sets: list[list[Item]], seconds: float, fixed: bool) -> None:
        """Measure and keep sets of blocks, ``fixed``: stem and tail too; those for which the processor was hardly ever
        at full speed are marked."""
        middle = len(sets) // 2
        rows = [BlockSet(items, fixed and number == middle) for number, items in enumerate(sets)] or [
            BlockSet([], fixed)
        ]
        have = sum(len(points) for points in self.table.points.values())
        total = have + sum(len(row.items) for row in rows) + self.after
        most = MAX_BLOCKS if self.backend.quick_prepare else MAX_SLOW_BLOCKS
        for chunk in _chunks(rows, most):
            size = sum(len(row.items) for row in chunk)

            def report(share: float, have: int = have, size: int = size) -> None:
                self.report(have + int(share * size), total, "blocks")

            self._keep(self._measure_sets(chunk, seconds, report))
            have += size

    def _measure_sets(
        self, sets: Sequence[BlockSet], seconds: float, report: Callable[[float], None]
    ) -> list[dict[str, Any]]:
        """Lines of the table for some sets. ``report`` gets the share that is done; preparing counts as half."""
        sessions: list[list[Session]] = []
        for number, (items, fixed) in enumerate(sets):
            report(0.5 * number / len(sets))
            probes = [block_probe(None, *shape) for shape in _shapes(items)] + [block_probe(*item) for item in items]
            if fixed:
                probes += [stem_probe(self.space), *tail_probe(self.space)]
            sessions.append([self._prepare(probe) for probe in probes])
        series = time_sets(sessions, seconds, self.references, lambda visits, of: report(0.5 + 0.5 * visits / (of + 1)))
        rows: list[dict[str, Any]] = []
        for (items, fixed), found in zip(sets, series, strict=True):
            slow = sum(found[0].clean(self.references)) < MIN_CLEAN
            about = {"seconds": seconds, "slow": slow}
            rows += _lines(items, fixed, [mine.timing(self.references) for mine in found], about)
        return rows

    def _prepare(self, probe: Probe) -> Session:
        return self.backend.prepare(randomise(probe), (self.setting.batch, *probe.in_shape), self.setting)

    def _groups(self, encodings: list[Encoding]) -> list[list[Encoding]]:
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

    def _measure_networks(self, encodings: list[Encoding], seconds: float) -> None:
        """Measure and keep whole networks, in groups that fit into memory."""
        have = sum(len(points) for points in self.table.points.values())
        groups = self._groups(encodings)
        side = self.space.input_size
        shape = (self.setting.batch, self.space.in_channels, side, side)
        for number, group in enumerate(groups):
            before = sum(map(len, groups[:number]))
            self.report(have + before, have + len(encodings), "whole networks")
            sessions = [self.backend.prepare(random_network(self.space, e), shape, self.setting) for e in group]
            found = run_rounds(sessions, seconds, precision=PRECISION, references=self.references, patience=PATIENCE)
            rows = []
            for encoding, series in zip(group, found, strict=True):
                timing = series.timing(self.references)
                spread = timing.model_dump(include={"p10_ms", "p90_ms", "n"})
                about = {"seconds": seconds, "slow": sum(series.clean(self.references)) < MIN_CLEAN}
                rows.append({"kind": "network", "encoding": encoding, "ms": timing.median_ms, **spread, **about})
            self._keep(rows)


def _chunks(sets: Sequence[BlockSet], most: int) -> list[list[BlockSet]]:
    """Sets that fit into memory together and are visited in turn, of at most ``most`` blocks in all."""
    chunks: list[list[BlockSet]] = []
    params = blocks = 0
    for row in sets:
        mine = sum(item.block.params(item.in_channels) for item in row.items)
        if not chunks or params + mine > MAX_BLOCK_PARAMS or blocks + len(row.items) > most:
            chunks.append([])
            params = blocks = 0
        chunks[-1].append(row)
        params, blocks = params + mine, blocks + len(row.items)
    return chunks


def _shapes(items: Sequence[Item]) -> list[Shape]:
    return list(dict.fromkeys((item.in_channels, item.in_size) for item in items))


def _lines(
    items: Sequence[Item], fixed: bool, timings: Sequence[Timing], about: dict[str, Any]
) -> list[dict[str, Any]]:
    """Lines of the table for one set; ``timings``: a bare frame for each shape, the blocks, then stem and tail.
    ``about``: what is the same of all, the time asked for and whether the processor was slow."""
    shapes = _shapes(items)
    frame = {shape: timing.median_ms for shape, timing in zip(shapes, timings, strict=False)}
    rows: list[dict[str, Any]] = []
    for item, timing in zip(items, timings[len(shapes) :], strict=False):
        base = frame[item.in_channels, item.in_size]
        place = {"in_channels": item.in_channels, "in_size": list(item.in_size)}
        figures = {"ms": timing.median_ms - base, "frame_ms": base, "n": timing.n}
        rows.append({"kind": "block", "block": item.block.to_dict(), **place, **figures, **about})
    if fixed:
        stem, tail, base = (timing.median_ms for timing in timings[-3:])
        rows.append({"kind": "fixed", "part": "stem", "ms": stem, **about})
        rows.append({"kind": "fixed", "part": "tail", "ms": max(0.0, tail - base), "frame_ms": base, **about})
    return rows


def _make_header(space: SearchSpace, backend: Backend, setting: Setting) -> Header:
    return Header(
        device=backend.device_name(setting.accelerator),
        accelerator=setting.accelerator,
        backend=backend.name,
        backend_version=backend.version,
        dtype=setting.dtype,
        batch=setting.batch,
        threads=setting.threads,
        memory_format=setting.memory_format,
        fingerprint=fingerprint(backend, setting),
        space_name=space.name,
        space_hash=space.hash,
        input_size=(space.input_size, space.input_size),
        date=now(),
        space=space.to_dict(),
    )
