"""Networks, or one on several backends, measured round by round in turn, so that a slow minute slows all of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from prunet_zoo.errors import LatencyError, few
from prunet_zoo.latency.backends import Backend, Session, Setting, get_backend
from prunet_zoo.latency.compare import Ratio, Summary, combine_intervals, paired_interval
from prunet_zoo.latency.conditions import Watch
from prunet_zoo.latency.device import fingerprint, gpu_id, usable_cores
from prunet_zoo.latency.measurement import GPU_WARM_SECONDS
from prunet_zoo.latency.record import Timing
from prunet_zoo.latency.references import References, recall, reference_key
from prunet_zoo.latency.subject import Arch, Subject, load_subject
from prunet_zoo.latency.timing import run_rounds
from prunet_zoo.spec import Size

MIN_ROUNDS = 30  # an interval over fewer is too narrow to be true


@dataclass(frozen=True)
class Contestant:
    """One network on one backend: its timing, the median of each round in ms, and what disturbed it.

    ``solo``: its rounds were not in turn with the others'.
    """

    name: str
    backend: str
    timing: Timing
    rounds: tuple[float, ...]
    disturbed: tuple[str, ...]
    solo: bool

    def ratio_to(self, base: Contestant, base_name: str, name: str) -> Ratio:
        """How long this takes relative to ``base``."""
        ratio, low, high = combine_intervals(base.timing, self.timing)
        if not (self.solo or base.solo):
            low, high = (ratio * share for share in paired_interval(base.rounds, self.rounds))
        return Ratio(
            base=base_name,
            other=name,
            base_ms=base.timing.median_ms,
            other_ms=self.timing.median_ms,
            ratio=ratio,
            low=low,
            high=high,
            disturbed=bool(self.disturbed or base.disturbed),
        )


def compare_networks(
    archs: Sequence[Arch],
    backend: str | Backend = "onnxruntime",
    setting: Setting | None = None,
    input_size: Size | None = None,
    seconds: float = 1.0,
) -> list[Ratio]:
    """Measure networks in turn; each with the first.

    Args:
        archs: two or more, as `prunet_zoo.latency.measure` takes them.
        backend: a name of `list_backends`.
        setting: how they are run; None: one thread, fp32, batch 1, on the CPU.
        input_size: one side or (H, W) in px; None takes each network's own.
        seconds: time for each.

    Raises:
        LatencyError: fewer than two networks, or the backend is missing or cannot do what is asked.
    """
    if len(archs) < 2:
        raise LatencyError(f"comparing networks needs two or more, got {few(archs)}; or one with --backends A B")
    base, *others = _run([load_subject(a, input_size) for a in archs], [get_backend(backend)], setting, seconds)
    return [other.ratio_to(base, base.name, other.name) for other in others]


def compare_backends(
    archs: Sequence[Arch],
    backends: Sequence[str | Backend],
    setting: Setting | None = None,
    input_size: Size | None = None,
    seconds: float = 1.0,
) -> list[Summary]:
    """Measure networks on several backends in turn; each backend with the first.

    Args:
        archs: one or more, as `prunet_zoo.latency.measure` takes them.
        backends: two or more names of `list_backends`.
        setting, input_size, seconds: see `compare_networks`.

    Raises:
        LatencyError: fewer than two backends, or one is missing or cannot do what is asked.
    """
    engines = [get_backend(backend) for backend in backends]
    if len({engine.name for engine in engines}) < max(2, len(engines)):
        raise LatencyError(f"comparing backends needs two different ones or more, got {few(backends)}")
    found = _run([load_subject(arch, input_size) for arch in archs], engines, setting, seconds)
    rows = [found[i :: len(engines)] for i in range(len(engines))]  # by backend
    first = engines[0]
    return [
        Summary(
            base=first.name,
            other=engine.name,
            changed={
                "backend": (first.name, engine.name),
                "backend_version": (first.version, engine.version),
            },
            ratios=tuple(b.ratio_to(a, a.name, b.name) for a, b in zip(rows[0], row, strict=True)),
        )
        for engine, row in zip(engines[1:], rows[1:], strict=True)
    ]


def _run(
    subjects: Sequence[Subject], engines: Sequence[Backend], setting: Setting | None, seconds: float
) -> list[Contestant]:
    """Every network on every backend, network by network."""
    setting = setting or Setting()
    for engine in engines:
        engine.check(setting)
    on_cpu = setting.accelerator == "cpu"
    key = reference_key(fingerprint(engines[0], setting)["hash"])
    references = References(recall(key)) if on_cpu else None
    names, sessions = [], []
    with ExitStack() as stack:
        for engine in engines:
            stack.enter_context(engine.environment(setting))
        for subject in subjects:
            for engine in engines:
                names.append((subject.name, engine.name))
                sessions.append(_prepare(engine, subject, setting))
        watch = Watch(setting, usable_cores(), references, None if on_cpu else gpu_id())
        warm = 0.0 if on_cpu else GPU_WARM_SECONDS
        found = run_rounds(sessions, seconds, MIN_ROUNDS, references=references, warm_seconds=warm, look=watch.look)
        watch.stop()
    contestants = []
    for (name, backend), session, series in zip(names, sessions, found, strict=True):
        verdict = watch.judge(session, series)
        medians = tuple(statistics.median(group) for group in series.rounds)
        contestants.append(Contestant(name, backend, verdict.timing, medians, verdict.reasons, session.solo))
    return contestants


def _prepare(engine: Backend, subject: Subject, setting: Setting) -> Session:
    return engine.prepare(subject.module, (setting.batch, subject.channels, *subject.size), setting)
