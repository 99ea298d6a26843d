"""Fitting the rates of a predictor to measured networks, and how well each network is predicted when left out.

Few networks are measured, so the fit is drawn towards priors: least squares on log errors, plus ``(log rate - log
prior)² / spread²`` for each rate. Devices fitted together share their rates but for a factor of each, drawn towards 1:
what a runtime makes of an A100's tensor cores tells something of what it makes of a V100's. This is a maximum a
posteriori estimate of a hierarchical model with log-normal errors (Gelman et al., Bayesian Data Analysis, chapter 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.kernels import Runtime, network_kernels
from prunet_zoo.latency.predictor import FitReport, FittedNetwork
from prunet_zoo.latency.roofline import Array, Demand, Peaks, Rates, demand, kernel_ms
from prunet_zoo.spec import NetSpec

ERROR = 0.07  # expected relative error of the model: what the priors are weighed against
DEVICE_SPREAD = 0.25  # of the log factor between a device's rate and the one shared by all
LEAST = 4  # different networks: with fewer, leaving one out says nothing


class Prior(NamedTuple):
    """Rates as expected before anything is measured, and the spread of the log of each one that is to be fitted."""

    rates: Rates
    spread: Mapping[str, float]


# spreads: 0.5 is a factor of 1.6 either way
FUSED_GPU = Prior(
    Rates(overhead_us=4.5, matrix=0.4, depthwise=0.1, memory=0.6),
    {"overhead_us": 0.5, "matrix": 0.7, "depthwise": 0.7, "memory": 0.4},
)
EAGER_GPU = Prior(
    Rates(overhead_us=15.0, light_overhead_us=8.0, matrix=0.4, depthwise=0.1, memory=0.6),
    {"overhead_us": 0.6, "light_overhead_us": 0.6, "matrix": 0.7, "depthwise": 0.7, "memory": 0.4},
)
FUSED_CPU = Prior(
    Rates(overhead_us=2.0, call_us=5.0, matrix=0.5, depthwise=0.3, memory=0.7),
    {"overhead_us": 1.0, "call_us": 1.0, "matrix": 1.0, "depthwise": 1.0, "memory": 1.0},
)
EAGER_CPU = Prior(
    Rates(overhead_us=15.0, light_overhead_us=6.0, call_us=5.0, matrix=0.4, depthwise=0.2, memory=0.5),
    {"overhead_us": 1.0, "light_overhead_us": 1.0, "call_us": 1.0, "matrix": 1.0, "depthwise": 1.0, "memory": 1.0},
)


@dataclass(frozen=True)
class Observation:
    """A network and its measured latency in ms. ``input_size`` is (H, W)."""

    spec: NetSpec
    input_size: tuple[int, int]
    ms: float

    @cached_property
    def hash(self) -> str:
        """Hash of the architecture."""
        return self.spec.hash


@dataclass(frozen=True)
class Subject:
    """A device with a runtime, and what was measured there; make one with `of`.

    ``demands``: what the kernels of each network ask of the device.
    """

    runtime: Runtime
    observations: tuple[Observation, ...]
    demands: tuple[Demand, ...]

    @classmethod
    def of(cls, runtime: Runtime, peaks: Peaks, dtype: str, batch: int, observations: Sequence[Observation]) -> Subject:
        """The subject of these measurements.

        Raises:
            LatencyError: no network, or a latency that is not positive.
        """
        bad = [o for o in observations if not (math.isfinite(o.ms) and o.ms > 0)]
        if bad or not observations:
            given = f"{bad[0].ms} ms of {bad[0].spec.name!r}" if bad else "none"
            raise LatencyError(f"a fit needs networks with positive latencies, got {given}")
        kernels = [[k for _, ks in network_kernels(o.spec, runtime, o.input_size) for k in ks] for o in observations]
        return cls(runtime, tuple(observations), tuple(demand(ks, peaks, dtype, batch) for ks in kernels))

    def predict(self, rates: Rates) -> Array:
        """Latency of each network in ms."""
        return np.array([kernel_ms(d, rates, self.runtime).sum() + rates.call_us * 1e-3 for d in self.demands])

    def without(self, spec_hash: str) -> Subject:
        """The same without one architecture."""
        rows = [(o, d) for o, d in zip(self.observations, self.demands, strict=True) if o.hash != spec_hash]
        return Subject(self.runtime, tuple(o for o, _ in rows), tuple(d for _, d in rows))


def fit_rates(subjects: Sequence[Subject], prior: Prior) -> list[Rates]:
    """Fit the rates of each subject; those of several subjects are drawn towards each other.

    Raises:
        LatencyError: a subject without measured networks.
    """
    from scipy.optimize import least_squares  # takes a while to import

    names = list(prior.spread)
    mean = np.log([getattr(prior.rates, name) for name in names])
    spread = np.array([prior.spread[name] for name in names])
    size, several = len(names), len(subjects) > 1

    def rates(point: Array) -> list[Rates]:
        base = point[:size]
        factors = point[size:].reshape(-1, size) if several else np.zeros((1, size))
        values = [np.exp(np.clip(base + factor, -25.0, 25.0)) for factor in factors]
        return [prior.rates.model_copy(update=dict(zip(names, map(float, v), strict=True))) for v in values]

    measured = [np.log([o.ms for o in s.observations]) for s in subjects]

    def residuals(point: Array) -> Array:
        parts = [(point[:size] - mean) / spread, point[size:] / DEVICE_SPREAD]
        for subject, log_ms, found in zip(subjects, measured, rates(point), strict=True):
            parts.append((np.log(subject.predict(found)) - log_ms) / ERROR)
        return np.concatenate(parts)

    start = np.concatenate([mean, np.zeros(size * len(subjects) if several else 0)])
    return rates(least_squares(residuals, start).x)


def leave_one_out(subjects: Sequence[Subject], prior: Prior) -> list[FitReport]:
    """Predict each architecture from a fit in which it is left out, of every subject; one report a subject.

    Raises:
        LatencyError: fewer than four different architectures in a subject.
    """
    for subject in subjects:
        count = len({o.hash for o in subject.observations})
        if count < LEAST:
            raise LatencyError(
                f"a fit needs at least {LEAST} different networks, got {count}; measure more of them, small and large"
            )
    found: list[list[FittedNetwork | None]] = [[None] * len(s.observations) for s in subjects]
    for spec_hash in dict.fromkeys(o.hash for s in subjects for o in s.observations):
        fitted = fit_rates([s.without(spec_hash) for s in subjects], prior)
        for subject, rates, rows in zip(subjects, fitted, found, strict=True):
            for i, (o, ms) in enumerate(zip(subject.observations, subject.predict(rates), strict=True)):
                if o.hash == spec_hash:
                    rows[i] = FittedNetwork(
                        name=o.spec.name, hash=spec_hash, input_size=o.input_size,
                        measured_ms=o.ms, left_out_ms=float(f"{ms:.6g}"),
                    )  # fmt: skip
    return [FitReport.of(tuple(row for row in rows if row is not None)) for rows in found]
