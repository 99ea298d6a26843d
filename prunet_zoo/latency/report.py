"""The latency report: the zoo and timm's networks measured in one run, with pictures, in a folder that can be gone on
with.

    DIR/records.jsonl   one record a network, appended group by group
    DIR/blocks.json     one breakdown a network
    DIR/report.json     all figures of the page
    DIR/report.html     the page, with its pictures inside; the pictures are also there as PNG files

Networks are measured in groups that fit into memory, within a group round by round in turn. The smallest network stands
in every group: how far its figures lie apart shows how comparable the groups are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prunet_zoo.errors import LatencyError
from prunet_zoo.files import write_json
from prunet_zoo.jsonfile import parse, read_json
from prunet_zoo.latency.accuracy import KnownNetwork, accuracy_sources, pareto
from prunet_zoo.latency.backends import Backend, Setting, get_backend
from prunet_zoo.latency.breakdown import Breakdown, break_down
from prunet_zoo.latency.measurement import measure_together
from prunet_zoo.latency.predictions import Prediction, from_predictors, from_table, left_out_networks
from prunet_zoo.latency.record import ATTEMPTS, Record, append_record, now, read_records
from prunet_zoo.latency.subject import MAX_PARAMS_TOGETHER, TIMM
from prunet_zoo.latency.table import LatencyTable
from prunet_zoo.spec import NetSpec, load_spec

Progress = Callable[[int, int, str], None]  # (done, of how many, what)


@dataclass(frozen=True)
class ReportPlan:
    """What a report is to hold.

    ``networks``: to be measured and drawn. ``tables``: files; ``random``: networks measured for each. ``blocks``: names
    or paths of specs that are measured block by block. ``attempts``: of a network whose measurement is disturbed, at
    most. ``seconds``: time on each network, ``block_seconds``: on each block.
    """

    networks: Sequence[KnownNetwork]
    tables: Sequence[Path] = ()
    random: int = 16
    blocks: Sequence[str] = ()
    attempts: int = ATTEMPTS
    backend: str | Backend = "onnxruntime"
    setting: Setting = field(default_factory=Setting)
    seconds: float = 0.4
    block_seconds: float = 0.06


class How(NamedTuple):
    """On what a network is measured."""

    backend: str | Backend
    setting: Setting


@cache
def _timm_params(name: str) -> int:
    import timm

    with torch.device("meta"):  # counted, not made
        return sum(p.numel() for p in timm.create_model(name).parameters())


class Job(NamedTuple):
    """A network to be measured at one input side (px)."""

    arch: str | NetSpec
    side: int

    @property
    def name(self) -> str:
        """What its record is called."""
        return self.arch.name if isinstance(self.arch, NetSpec) else self.arch

    @property
    def params(self) -> int:
        """Number of parameters."""
        if isinstance(self.arch, str) and self.arch.startswith(TIMM):
            return _timm_params(self.arch.removeprefix(TIMM))
        return load_spec(self.arch).params()

    def is_of(self, record: Record) -> bool:
        """Whether a record is of this network at this size."""
        same = record.spec_hash == self.arch.hash if isinstance(self.arch, NetSpec) else record.spec_name == self.arch
        return same and record.input_size == (self.side, self.side)


def make_report(out: str | Path, plan: ReportPlan, progress: Progress | None = None) -> dict[str, Any]:
    """Measure what ``out`` lacks, and write the report there.

    Records of the same network, setting, backend version and device that lie in the folder are not measured again,
    unless they were disturbed, or made with less effort: once where two attempts are to be made, or in less time.

    Args:
        out: the folder.
        plan: what to measure.
        progress: called with (done, of how many, what).

    Returns:
        The data of ``report.json``.

    Raises:
        LatencyError: the backend is missing, a table is of another device, or the folder holds a damaged file.
        WriteError: a file cannot be written.
    """
    from prunet_zoo.latency.report_page import write_page  # matplotlib takes a while to import

    work = _Work(Path(out), plan, progress or (lambda done, total, what: None))
    networks, predictions, breakdowns, reference = work.measure()
    data = _as_json(networks, reference, predictions, breakdowns)
    write_json(work.out / "report.json", data)
    write_page(work.out, networks, predictions, breakdowns, data)
    return data


class _Work:
    """One report on its way: what the folder holds, what is still to be measured."""

    def __init__(self, out: Path, plan: ReportPlan, report: Progress) -> None:
        self.out, self.plan, self.report = out, plan, report
        self.engine = get_backend(plan.backend)
        self.engine.check(plan.setting)
        self.tables = [LatencyTable.load(path) for path in plan.tables]
        for table in self.tables:
            table.require()
        self.specs = [left_out_networks(table, plan.random) for table in self.tables]
        self.log, self.blocks_file = out / "records.jsonl", out / "blocks.json"
        self.records = read_records(self.log) if self.log.exists() else []
        self.breakdowns = _read_breakdowns(self.blocks_file)
        self.done, self.total = 0, 0

    def measure(self) -> _Content:
        """Measure what is missing; returns everything that the page shows."""
        own = [Job(n.name, n.input_size) for n in self.plan.networks]
        runs = [(own, How(self.engine, self.plan.setting))]
        for table, specs in zip(self.tables, self.specs, strict=True):
            side = table.space.input_size
            runs.append(([Job(spec, side) for spec in specs], _how(table)))
        missing = [[job for job in jobs if not any(map(self._is_good, self._all(job, how)))] for jobs, how in runs]
        blocks = [spec for spec in map(load_spec, self.plan.blocks) if self._find_breakdown(spec) is None]
        self.total = sum(map(len, missing)) + len(blocks)
        for (jobs, how), lacking in zip(runs, missing, strict=True):
            self._measure(lacking, _smallest(jobs), how)
        for spec in blocks:
            self.report(self.done, self.total, f"blocks of {spec.name}")
            self._keep_breakdown(break_down(spec, self.engine, self.plan.setting, self.plan.block_seconds))
            self.done += 1
        self.report(self.total, self.total, "done")
        return self._collect(runs)

    def _measure(self, jobs: Sequence[Job], reference: Job, how: How) -> None:
        """Measure networks in groups, families mixed, each with the reference network in it."""
        others = [job for job in jobs if job != reference]
        random.Random(0).shuffle(others)
        groups = _groups(others, MAX_PARAMS_TOGETHER - reference.params)
        if jobs and not groups:
            groups = [[]]
        for number, group in enumerate(groups):
            start = self.done

            def report(done: int, total: int, what: str, start: int = start) -> None:
                # the first is the reference, which is not counted
                self.report(start + max(0, done - 1), self.total, what.rpartition(", ")[2])

            measure_together(
                [(job.arch, job.side) for job in (reference, *group)],
                how.backend,
                seconds=self.plan.seconds,
                attempts=self.plan.attempts,
                progress=report,
                keep=self._keep,
                **asdict(how.setting),
            )
            self.done += len(group) + (number == 0 and reference in jobs)

    def _keep(self, record: Record) -> None:
        append_record(self.log, record)
        self.records.append(record)

    def _find(self, job: Job, how: How) -> Record | None:
        """The newest good record of a network under a setting on this device, or the newest one."""
        found = self._all(job, how)
        best = [record for record in found if self._is_good(record)] or found
        return best[-1] if best else None

    def _is_good(self, record: Record) -> bool:
        """Whether a record is as this report would make it, and undisturbed."""
        enough = record.attempts >= min(2, self.plan.attempts)
        return enough and not record.disturbed and (record.seconds is None or record.seconds >= self.plan.seconds)

    def _all(self, job: Job, how: How) -> list[Record]:
        fields = _fields(get_backend(how.backend), how.setting)
        return [r for r in self.records if job.is_of(r) and all(getattr(r, k) == v for k, v in fields.items())]

    def _find_breakdown(self, spec: NetSpec) -> Breakdown | None:
        fields = {**_fields(self.engine, self.plan.setting), "spec_hash": spec.hash}
        found = [b for b in self.breakdowns if all(getattr(b, k) == v for k, v in fields.items())]
        return found[-1] if found else None

    def _keep_breakdown(self, breakdown: Breakdown) -> None:
        self.breakdowns.append(breakdown)
        write_json(self.blocks_file, [b.model_dump(mode="json") for b in self.breakdowns])

    def _collect(self, runs: Sequence[tuple[list[Job], How]]) -> _Content:
        (own, own_how), *others = runs
        predictions = []
        for table, specs, (jobs, how) in zip(self.tables, self.specs, others, strict=True):
            predictions.append(from_table(table, specs, self._found(jobs, how)))
        blocks = [self._find_breakdown(load_spec(name)) for name in self.plan.blocks]
        return _Content(
            networks=list(zip(self.plan.networks, self._found(own, own_how), strict=True)),
            predictions=predictions + from_predictors(),
            breakdowns=[b for b in blocks if b is not None],
            reference=self._all(_smallest(own), own_how),
        )

    def _found(self, jobs: Sequence[Job], how: How) -> list[Record]:
        found = [self._find(job, how) for job in jobs]
        return [record for record in found if record is not None]


class _Content(NamedTuple):
    """What a report shows; ``reference``: all records of the network that stands in every group."""

    networks: list[tuple[KnownNetwork, Record]]
    predictions: list[Prediction]
    breakdowns: list[Breakdown]
    reference: list[Record]


def _as_json(
    networks: Sequence[tuple[KnownNetwork, Record]],
    reference: Sequence[Record],
    predictions: Sequence[Prediction],
    breakdowns: Sequence[Breakdown],
) -> dict[str, Any]:
    best = pareto((record.median_ms, network.top1) for network, record in networks)
    medians = [record.median_ms for record in reference]
    return {
        "date": now(),
        "networks": [{**network.model_dump(mode="json"), "record": record.to_dict()} for network, record in networks],
        "pareto": [networks[i][0].label for i in best],
        "reference": {"name": reference[0].spec_name, "median_ms": medians, "spread": max(medians) / min(medians) - 1},
        "predictions": [prediction.to_dict() for prediction in predictions],
        "blocks": [breakdown.to_dict() for breakdown in breakdowns],
        "sources": accuracy_sources(),
    }


def _smallest(jobs: Sequence[Job]) -> Job:
    return min(jobs, key=lambda job: job.params)


def _groups(jobs: Sequence[Job], params: int) -> list[list[Job]]:
    """Jobs in order, in groups of at most so many parameters; a larger network has a group for itself."""
    groups: list[list[Job]] = []
    left = 0
    for job in jobs:
        if not groups or job.params > left:
            groups.append([])
            left = params
        groups[-1].append(job)
        left -= job.params
    return groups


def _how(table: LatencyTable) -> How:
    header = table.header
    fields = (header.threads, header.dtype, header.batch, header.accelerator, header.memory_format)
    return How(header.backend, Setting(*fields))


def _fields(engine: Backend, setting: Setting) -> dict[str, Any]:
    """What a record or breakdown must have to be of this device and setting."""
    device = engine.device_name(setting.accelerator)
    return {**asdict(setting), "backend": engine.name, "backend_version": engine.version, "device": device}


def _read_breakdowns(path: Path) -> list[Breakdown]:
    if not path.exists():
        return []
    rows = read_json(path, "breakdowns of a latency report")
    if not isinstance(rows, list):
        raise LatencyError(f"{path} holds no list of breakdowns; delete it, and the blocks are measured again")
    return [parse(Breakdown, row, f"{path}, entry {i}") for i, row in enumerate(rows)]
