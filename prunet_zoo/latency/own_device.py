"""A predictor for your own device, fitted to networks measured there (``tools/latency.py fit``).

Measurements are a log of ``tools/latency.py measure … --log FILE`` or a latency table, whose whole networks are taken.
All must be of one device, backend and setting.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from prunet_zoo.errors import LatencyError, few
from prunet_zoo.latency.fit import (
    EAGER_CPU,
    EAGER_GPU,
    FUSED_CPU,
    FUSED_GPU,
    Observation,
    Prior,
    Subject,
    fit_rates,
    leave_one_out,
)
from prunet_zoo.latency.kernels import Runtime
from prunet_zoo.latency.predictor import DeviceModel, Predictor
from prunet_zoo.latency.record import Record, now, read_records
from prunet_zoo.latency.roofline import Peaks
from prunet_zoo.latency.table import LatencyTable
from prunet_zoo.latency.tablefile import read_table
from prunet_zoo.models.pruned import is_pruned
from prunet_zoo.spec import Activation, NetSpec

_EAGER = ("torch", "cuda-graph")
_FUSES_ALL = ("tensorrt", "trtexec", "onnxruntime-tensorrt", "openvino", "torch-compile")
_ALL: tuple[Activation, ...] = ("relu", "silu", "hard_swish")
_RELU: tuple[Activation, ...] = ("relu",)
# of a device about which nothing is said: the priors' spread is then `_UNSAID` at least
_GPU_PEAKS = Peaks(matrix_tflops=100.0, vector_tflops=30.0, bandwidth_gbs=1000.0, units=80, align=8)
_CPU_CORE = Peaks(matrix_tflops=0.1, vector_tflops=0.1, bandwidth_gbs=15.0, tiles=((4, 16),))
_UNSAID = 1.0


class Place(NamedTuple):
    """Where and how something was measured; all measurements of a fit have the same."""

    device: str
    accelerator: str
    backend: str
    backend_version: str
    dtype: str
    batch: int
    threads: int
    memory_format: str = "contiguous"


class Measured(NamedTuple):
    """What a file holds: one observation for each network and input size. ``skipped``: reason → how many records."""

    place: Place
    observations: tuple[Observation, ...]
    skipped: dict[str, int]


def read_measurements(path: str | Path) -> Measured:
    """Read a log of records or a latency table.

    Of several records of the same network the median counts. Disturbed records are skipped, so are a table's networks
    that were only measured while the processor was slow, and networks of timm: they have no spec.

    Raises:
        LatencyError: missing, damaged, neither of both, without networks, or of several devices or settings.
    """
    return _from_table(path) if _is_table(path) else _from_records(path, read_records(path))


def _is_table(path: str | Path) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):  # the reader of records says what is wrong
        return False
    return isinstance(first, dict) and first.get("kind") == "header"


def _from_table(path: str | Path) -> Measured:
    header, entries, _ = read_table(path)
    table = LatencyTable(header, entries, path)
    if not table.networks:
        raise LatencyError(f"latency table {path} has no whole networks yet; let its build finish, then fit")
    place = Place(**{name: getattr(header, name) for name in Place._fields if hasattr(header, name)})
    kept = {encoding: ms for encoding, ms in table.networks.items() if not table.is_slow_network(encoding)}
    if not kept:
        raise LatencyError(
            f"the processor was slow whenever networks of latency table {path} were measured; run the command that "
            "built it again while nothing else runs, then fit"
        )
    found = tuple(
        Observation(table.space.decode(encoding, f"{table.space.name}-{i}"), header.input_size, ms)
        for i, (encoding, ms) in enumerate(kept.items(), 1)
    )
    slow = len(table.networks) - len(kept)
    return Measured(place, found, {"measured on a slow processor": slow} if slow else {})


def _from_records(path: str | Path, records: Iterable[Record]) -> Measured:
    skipped: dict[str, int] = {}
    places: dict[Place, None] = {}
    times: dict[tuple[str, tuple[int, int]], list[float]] = {}
    specs: dict[str, NetSpec] = {}
    for record in records:
        no_spec = record.spec is None or is_pruned(record.spec)  # kernels are known of a `NetSpec` alone
        reason = "disturbed" if record.disturbed else "without a spec" if no_spec else None
        if reason or record.spec is None:
            skipped[str(reason)] = skipped.get(str(reason), 0) + 1
            continue
        places[Place(*(getattr(record, name) for name in Place._fields))] = None
        spec = NetSpec.from_dict(record.spec)
        specs[spec.hash] = spec
        times.setdefault((spec.hash, record.input_size), []).append(record.median_ms)
    if not times:
        left = f" ({', '.join(f'{n} {why}' for why, n in skipped.items())})" if skipped else ""
        raise LatencyError(
            f"{path} has no record to fit to{left}; measure networks: python tools/latency.py measure ARCH --log {path}"
        )
    _check_one_place(path, list(places))
    found = tuple(Observation(specs[h], size, statistics.median(ms)) for (h, size), ms in times.items())
    return Measured(next(iter(places)), found, skipped)


def _check_one_place(path: str | Path, places: list[Place]) -> None:
    for name in Place._fields:
        values = list(dict.fromkeys(getattr(place, name) for place in places))
        if len(values) > 1:
            raise LatencyError(
                f"{path} holds records of {name.replace('_', ' ')} {' and '.join(repr(v) for v in values[:3])}; "
                "a predictor is of one: put the records of each into a file of its own"
            )


def fit_device(
    measured: Measured, name: str, like: Predictor | None = None, peaks: dict[str, Any] | None = None
) -> DeviceModel:
    """Fit a predictor to measured networks.

    Args:
        measured: what was measured, and where.
        name: name of the new predictor.
        like: a predictor whose peaks and rates are expected; None: those of an ordinary GPU or CPU, held loosely.
        peaks: fields of `Peaks` that are known, from a data sheet.

    Raises:
        LatencyError: fewer than four different networks, or a backend, device or dtype that does not fit ``like``.
    """
    place, given = measured.place, {k: v for k, v in (peaks or {}).items() if v is not None}
    runtime = _runtime(place, like)
    if like and like.model.dtype != place.dtype and "matrix_tflops" not in given:
        raise LatencyError(
            f"the measurements are in {place.dtype}, but the peaks of {like.name!r} are those of {like.model.dtype}; "
            f"give the device's peaks in {place.dtype}: --peak-tflops N (and --vector-tflops N)"
        )
    base = like.model.peaks if like else _default_peaks(place)
    prior = _prior(place, runtime, like)
    known = base.model_copy(update=given)
    subject = Subject.of(runtime, known, place.dtype, place.batch, measured.observations)
    report = leave_one_out([subject], prior)[0]
    rates = fit_rates([subject], prior)[0]
    origin = f"of {like.name}" if like else f"assumed for a {'GPU' if place.accelerator == 'cuda' else 'CPU'}"
    return DeviceModel(
        name=name,
        **place._asdict(),
        runtime=runtime,
        peaks=known,
        rates=rates.model_copy(update={k: float(f"{getattr(rates, k):.6g}") for k in prior.spread}),
        fit=report,
        sources={
            "rates": f"fitted to {len(measured.observations)} networks measured on the device",
            "peaks": f"{', '.join(given)} given; the others {origin}" if given else origin,
            "prior": f"rates of {like.name}" if like else "rates of an ordinary device",
            **({"left out": f"not fully: {seen}"} if (seen := seen_before(measured, like)) else {}),
        },
        date=now(),
    )


def seen_before(measured: Measured, like: Predictor | None) -> str | None:
    """Which networks tell of themselves although they are left out, because ``like`` was fitted to them (on its own
    device); None where there is none."""
    known = {n.hash for n in like.model.fit.networks} if like else set()
    names = list(dict.fromkeys(o.spec.name for o in measured.observations if o.hash in known))
    if like is None or not names:
        return None
    return f"{like.name}, whose rates are expected, was fitted to {few(names)} too, measured on its own device"


def _runtime(place: Place, like: Predictor | None) -> Runtime:
    if place.backend in _EAGER:
        asynchronous = place.accelerator == "cuda" and place.backend == "torch"
        runtime = Runtime(fuses=False, fused_activations=(), asynchronous=asynchronous)
    else:
        fused = _ALL if place.backend in _FUSES_ALL else _RELU
        runtime = Runtime(fused_activations=fused, folds=place.backend != "torch-compile")
    if like and like.model.runtime.fuses != runtime.fuses:
        kinds = {True: "fuses layers", False: "runs layer by layer"}
        raise LatencyError(
            f"the measurements are of {place.backend!r}, which {kinds[runtime.fuses]}, but {like.name!r} is of "
            f"{like.model.backend!r}, which {kinds[not runtime.fuses]}; give another --like, or none"
        )
    if like and like.model.accelerator != place.accelerator:
        raise LatencyError(
            f"the measurements are of a {place.accelerator!r} device, {like.name!r} of {like.model.accelerator!r}; "
            "give another --like, or none"
        )
    return runtime


def _default_peaks(place: Place) -> Peaks:
    if place.accelerator != "cpu":
        return _GPU_PEAKS
    core = _CPU_CORE
    return core.model_copy(
        update={
            "matrix_tflops": core.matrix_tflops * place.threads,
            "vector_tflops": core.vector_tflops * place.threads,
            "units": place.threads,
        }
    )


def _prior(place: Place, runtime: Runtime, like: Predictor | None) -> Prior:
    if place.accelerator == "cpu":
        prior = FUSED_CPU if runtime.fuses else EAGER_CPU
    else:
        prior = FUSED_GPU if runtime.fuses else EAGER_GPU
    if like:
        return Prior(like.model.rates, {k: v for k, v in prior.spread.items() if getattr(like.model.rates, k)})
    return Prior(prior.rates, {k: max(v, _UNSAID) for k, v in prior.spread.items()})


def describe_skipped(measured: Measured) -> str:
    """What was left out and why, for a person; empty when nothing was."""
    return few(f"{count} {why}" for why, count in measured.skipped.items())
