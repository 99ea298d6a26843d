"""`measure` and `measure_together`: the latency of networks on this machine, as records.

What disturbs only slows, and on a machine that others use too it may do so for seconds without a trace. So a network is
measured at least twice, some time apart, until the two fastest measurements agree and nothing was found that disturbed
them (`Watch.judge`); the record is of those that agree. Otherwise it says what disturbed it.

Where a backend prepares quickly (`Backend.quick_prepare`) each measurement is of a network prepared anew: where its
weights lie in memory makes a difference too. What the others build is built once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends import Backend, Session, Setting, check_output, get_backend
from prunet_zoo.latency.conditions import Verdict, Watch, wide
from prunet_zoo.latency.device import fingerprint, gpu_id, usable_cores
from prunet_zoo.latency.record import ATTEMPTS, Record, now
from prunet_zoo.latency.references import References, recall, reference_key, remember
from prunet_zoo.latency.subject import Arch, Subject, subject_groups
from prunet_zoo.latency.timing import Series, join_series, run_rounds
from prunet_zoo.spec import Size

PRECISION = 0.01  # half the width of the interval that is aimed at
MIN_ROUNDS = 15  # below, the interval is too narrow to be true
AGREE = 0.01  # difference of two measurements that confirm each other
APART_SECONDS = 1.0  # between the beginnings of two measurements of a network
GPU_WARM_SECONDS = 0.5  # until a GPU has raised its clock

Progress = Callable[[int, int, str], None]  # (measured, of how many, what)


def measure(
    arch: Arch,
    backend: str | Backend = "onnxruntime",
    input_size: Size | None = None,
    batch: int = 1,
    threads: int = 1,
    dtype: str = "fp32",
    accelerator: str = "cpu",
    seconds: float = 0.4,
    memory_format: str = "contiguous",
    attempts: int = ATTEMPTS,
) -> Record:
    """Measure the latency of a network in eval mode.

    Args:
        arch: a listed name, spec, dict, path of a spec (``.json``) or of weights (``.safetensors``), a ready module
            with a ``spec``, or ``timm/NAME``. A network given without weights gets random ones of ordinary scale.
        backend: a name of `list_backends`.
        input_size: one side or (H, W), px; None takes the network's own.
        batch: images a run.
        threads: CPU threads.
        dtype: "fp32", "fp16" or "bf16", as the backend can.
        accelerator: "cpu" or "cuda".
        seconds: time to spend on runs, besides warm-up; up to three times as much where the interval stays wide.
        memory_format: "contiguous" (NCHW) or "channels_last" (NHWC).
        attempts: measurements to make at most until two agree and are undisturbed; 1 makes one and asks for no other.

    Returns:
        The record; ``disturbed`` is empty, or says why the figure is not to be relied on.

    Raises:
        LatencyError: the backend is missing or cannot do what is asked.
        UnknownNameError, SpecError, CheckpointError: about ``arch`` or ``backend``.
    """
    return measure_together(
        [arch], backend, input_size, batch, threads, dtype, accelerator, seconds, memory_format, attempts
    )[0]


def measure_together(
    archs: Sequence[Arch | tuple[Arch, Size]],
    backend: str | Backend = "onnxruntime",
    input_size: Size | None = None,
    batch: int = 1,
    threads: int = 1,
    dtype: str = "fp32",
    accelerator: str = "cpu",
    seconds: float = 0.4,
    memory_format: str = "contiguous",
    attempts: int = ATTEMPTS,
    progress: Progress | None = None,
    keep: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Measure networks that are to be compared: round by round in turn, in groups that fit into memory, so that a slow
    minute slows all of a group.

    Args:
        archs: as `measure` takes them, or pairs (arch, input size).
        backend, input_size, batch, threads, dtype, accelerator, memory_format: see `measure`.
        seconds: time to spend on the runs of each network.
        attempts: measurements of each at most; those that are not confirmed yet are repeated together.
        progress: called with (networks done, of how many, what is next).
        keep: called with each record as soon as it is made, such as to log it.

    Returns:
        A record each, in order.
    """
    engine, setting = get_backend(backend), Setting(threads, dtype, batch, accelerator, memory_format)
    engine.check(setting)
    if attempts < 1:
        raise LatencyError(f"attempts must be at least 1, got {attempts}")
    report = progress or (lambda done, total, what: None)
    bench = _Bench(engine, setting, seconds, attempts)
    records: list[Record] = []
    for group in subject_groups(archs, input_size):
        report(len(records), len(archs), ", ".join(subject.name for subject in group[:2]))
        for record in bench.measure_group(group):
            records.append(record)
            if keep is not None:
                keep(record)
    report(len(archs), len(archs), "done")
    return records


class _Bench:
    """One device and setting, for any number of networks."""

    def __init__(self, engine: Backend, setting: Setting, seconds: float, attempts: int) -> None:
        self.engine, self.setting, self.seconds, self.attempts = engine, setting, seconds, attempts
        self.on_cpu = setting.accelerator == "cpu"
        self.gpu = None if self.on_cpu else gpu_id()
        self.cores = usable_cores()
        self.fingerprint = fingerprint(engine, setting)
        self.key = reference_key(self.fingerprint["hash"])

    def measure_group(self, group: list[Subject]) -> list[Record]:
        with self.engine.environment(self.setting):
            sessions = [self._prepare(subject) for subject in group]
            if not self.on_cpu or self.setting.dtype != "fp32":  # where arithmetic may leave its range unnoticed
                for subject, session in zip(group, sessions, strict=True):
                    self._check(subject, session)
            found: list[list[Visit]] = [[] for _ in sessions]
            pending = list(range(len(sessions)))
            for number in range(self.attempts):
                start = time.monotonic()
                if number and self.engine.quick_prepare:
                    for i in pending:
                        sessions[i] = self._prepare(group[i])
                for i, visit in zip(pending, self._attempt([sessions[i] for i in pending]), strict=True):
                    found[i].append(visit)
                pending = [i for i in pending if self._is_open(found[i])]
                if not pending or number + 1 == self.attempts:
                    break
                time.sleep(max(0.0, APART_SECONDS - (time.monotonic() - start)))
        return [
            self._record(subject, settle(visits), len(visits)) for subject, visits in zip(group, found, strict=True)
        ]

    def _prepare(self, subject: Subject) -> Session:
        return self.engine.prepare(subject.module, self._shape(subject), self.setting)

    def _shape(self, subject: Subject) -> tuple[int, int, int, int]:
        return self.setting.batch, subject.channels, *subject.size

    def _check(self, subject: Subject, session: Session) -> None:
        try:
            check_output(session, subject.module, self._shape(subject), self.setting.dtype)
        except LatencyError as error:
            raise LatencyError(f"{subject.name} with backend {self.engine.name!r}: {error}") from None

    def _is_open(self, visits: list[Visit]) -> bool:
        return len(visits) < min(2, self.attempts) or bool(settle(visits).reasons)

    def _attempt(self, sessions: list[Session]) -> list[Visit]:
        references = References(recall(self.key)) if self.on_cpu else None
        watch = Watch(self.setting, self.cores, references, self.gpu)
        warm = 0.0 if self.on_cpu else GPU_WARM_SECONDS
        series = run_rounds(sessions, self.seconds, MIN_ROUNDS, PRECISION, references, warm, look=watch.look)
        watch.stop()
        verdicts = [watch.judge(session, runs) for session, runs in zip(sessions, series, strict=True)]
        if references is not None and references.looks:
            kept = remember(self.key, references.fast)
            verdicts = [replace(v, clock={**v.clock, "remembered": kept}) for v in verdicts]
        return [Visit(runs, verdict, references) for runs, verdict in zip(series, verdicts, strict=True)]

    def _record(self, subject: Subject, verdict: Verdict, attempts: int) -> Record:
        spec: dict[str, Any] | None = None if subject.spec is None else subject.spec.to_dict()
        return Record(
            **verdict.timing.model_dump(),
            spec_name=subject.name,
            spec_hash="" if subject.spec is None else subject.spec.hash,
            spec=spec,
            input_size=subject.size,
            device=self.fingerprint["device"],
            accelerator=self.setting.accelerator,
            backend=self.engine.name,
            backend_version=self.engine.version,
            dtype=self.setting.dtype,
            batch=self.setting.batch,
            threads=self.setting.threads,
            memory_format=self.setting.memory_format,
            disturbed=verdict.reasons,
            attempts=attempts,
            seconds=self.seconds,
            clock=verdict.clock,
            fingerprint=self.fingerprint,
            date=now(),
        )


class Visit(NamedTuple):
    """One measurement of a network: its runs, what was found about them, and how the processor was watched."""

    series: Series
    verdict: Verdict
    references: References | None


def settle(visits: Sequence[Visit]) -> Verdict:
    """What several measurements of one network say together: the figure of the fastest and of those within `AGREE` of
    it, with the reasons of the least disturbed among them. Where no other agrees, that is a reason too. Percentiles and
    counts are of all measurements, and ``clock`` has the figure of each (``visits_ms``)."""
    ordered = sorted(visits, key=lambda visit: visit.verdict.timing.median_ms)
    fastest = ordered[0].verdict.timing.median_ms
    near = [visit for visit in ordered if visit.verdict.timing.median_ms <= fastest * (1 + AGREE)]
    best = min(near, key=lambda visit: len(visit.verdict.reasons))
    everything = join_series([visit.series for visit in visits])
    timing = join_series([visit.series for visit in near]).timing(best.references, everything)
    clock = {**best.verdict.clock, "visits_ms": [visit.verdict.timing.median_ms for visit in visits]}
    settled = replace(best.verdict, timing=timing, clock=clock)
    if len(near) > 1:
        return replace(settled, reasons=(*best.verdict.reasons, *wide(timing)))
    reasons = [*best.verdict.reasons, *best.verdict.doubts]
    if len(ordered) > 1:
        slower = ordered[1].verdict.timing.median_ms / fastest - 1
        reasons.append(f"no other of {len(ordered)} measurements agrees: the next was {slower:.1%} slower")
    return replace(settled, reasons=tuple(reasons))
