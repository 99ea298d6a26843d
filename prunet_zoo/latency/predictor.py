"""Predictor: the latency of a network on a device that is not at hand.

A device is a JSON file: its peaks from data sheets, rates fitted to figures that somebody measured, and how well each
network is predicted when it is left out of that fit. Four are shipped (`list_devices`); ``tools/latency.py fit`` makes
more from your own measurements. A predictor is a `prunet_zoo.cost.Cost`: exactly additive over blocks.

    >>> from prunet_zoo.spec import load_spec
    >>> predictor = Predictor.load("v100-tensorrt-fp16")
    >>> 0.5 < predictor(load_spec("prunet_p0")) < 0.8
    True
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from prunet_zoo.jsonfile import list_named, load_named
from prunet_zoo.latency.kernels import Kernel, Runtime, block_kernels, network_kernels
from prunet_zoo.latency.roofline import Peaks, Rates, demand, kernel_ms
from prunet_zoo.space import SearchSpace
from prunet_zoo.spec import BlockSpec, Frozen, NetSpec, Size, stable_hash

FOLDER = "latency/devices"
CACHED = 200_000  # blocks; a search of the largest shipped space asks for a few thousand


class FittedNetwork(Frozen):
    """A network of the fit: what was measured, and what is predicted by a fit without it. Latencies in ms."""

    name: str
    hash: str
    input_size: tuple[int, int]
    measured_ms: float = Field(gt=0.0)
    left_out_ms: float = Field(gt=0.0)

    @property
    def error(self) -> float:
        """Relative error when left out."""
        return self.left_out_ms / self.measured_ms - 1


class FitReport(Frozen):
    """How well the model predicts each network when it is left out of the fit (absolute relative errors)."""

    mean_abs: float = Field(ge=0.0)
    worst: float = Field(ge=0.0)
    networks: Annotated[tuple[FittedNetwork, ...], Field(min_length=1)]

    @classmethod
    def of(cls, networks: tuple[FittedNetwork, ...]) -> FitReport:
        """The report of these networks."""
        errors = [abs(n.error) for n in networks]
        return cls(mean_abs=round(sum(errors) / len(errors), 4), worst=round(max(errors), 4), networks=networks)


class DeviceModel(Frozen):
    """A device, a way to run networks on it, and the parameters.

    ``devices``: how the names begin that drivers give to such a device ("Tesla V100-SXM2-16GB"), besides ``device``
    itself: there a network can be measured. ``sources``: where each figure is from.
    """

    kind: Literal["predictor"] = "predictor"
    format: Literal[1] = 1
    name: str = Field(min_length=1, max_length=200)
    device: str
    devices: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    accelerator: str
    backend: str
    backend_version: str
    dtype: Literal["fp32", "fp16", "bf16"]
    batch: int = Field(ge=1)
    threads: int = Field(default=1, ge=1)
    memory_format: str = "contiguous"
    runtime: Runtime
    peaks: Peaks
    rates: Rates
    fit: FitReport
    sources: dict[str, str]
    date: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, every field."""
        return self.model_dump(mode="json")


class KernelLatency(NamedTuple):
    """One kernel of a network: the block it belongs to ("input", "stages.2.0", "tail"), and its latency in ms."""

    block: str
    name: str
    kind: str
    ms: float


class Predictor:
    """Latency of any `NetSpec` on the device of a `DeviceModel`, in ms, for its batch size and dtype."""

    unit = "ms"

    def __init__(self, model: DeviceModel) -> None:
        self.model = model
        self._blocks: dict[tuple[BlockSpec, int, tuple[int, int]], float] = {}

    @classmethod
    def load(cls, name_or_path: str | Path) -> Predictor:
        """Read a shipped device by name, or a file that ``tools/latency.py fit`` wrote (its path ends in .json).

        Raises:
            UnknownNameError: no device of that name is shipped; the nearest are suggested.
            SpecError: the file is missing, no JSON, or not a predictor's; the field is named.
        """
        return cls(load_named(DeviceModel, name_or_path, FOLDER, "latency predictor"))

    @property
    def name(self) -> str:
        """Name of the device model."""
        return self.model.name

    @property
    def hash(self) -> str:
        """12 hex digits over everything that a prediction depends on."""
        data = self.model.model_dump(mode="json", include={"runtime", "peaks", "rates", "dtype", "batch"})
        return stable_hash(["predictor", data])

    def block(self, block: BlockSpec, in_channels: int, in_size: tuple[int, int]) -> float:
        """Latency of one block on a map of ``in_size`` (H, W), in ms."""
        key = (block, in_channels, in_size)
        if key not in self._blocks:
            if len(self._blocks) >= CACHED:
                self._blocks.clear()
            self._blocks[key] = sum(self._ms(block_kernels(block, in_channels, in_size, self.model.runtime)))
        return self._blocks[key]

    def fixed(self, space: SearchSpace) -> float:
        """Latency of what every network of the space has, in ms: the call, the input, stem, tail and classifier.

        Raises:
            SpecError: the space is not additive, so that the tail's latency depends on the last layer.
        """
        space.require_additive("the fixed part of a latency")
        return self._fixed(space.decode(space.largest()), len(space.stem))

    def __call__(self, spec: NetSpec) -> float:
        """Latency of a whole network at its own input size, in ms."""
        return self.predict(spec)

    def predict(self, spec: NetSpec, input_size: Size | None = None) -> float:
        """Latency of a whole network, in ms, at ``input_size`` (one side or (H, W), px; None: its own)."""
        blocks = sum(self.block(p.block, p.in_channels, p.in_size) for p in spec.placed(input_size))
        return self._fixed(spec, 0, input_size) + blocks

    def kernels(self, spec: NetSpec, input_size: Size | None = None) -> list[KernelLatency]:
        """Every kernel in the order in which it runs; what a run costs besides them is the kernel "call"."""
        rows = []
        if self.model.rates.call_us:
            rows.append(KernelLatency("input", "call", "call", self.model.rates.call_us * 1e-3))
        for block, kernels in network_kernels(spec, self.model.runtime, input_size):
            rows += [KernelLatency(block, k.name, k.kind, ms) for k, ms in zip(kernels, self._ms(kernels), strict=True)]
        return rows

    def describe(self) -> dict[str, Any]:
        """Device, backend, setting, sources and the errors of the fit, for reports."""
        model = self.model
        return {
            "predictor": model.name,
            **model.model_dump(mode="json", include={"device", "devices", "accelerator", "backend", "backend_version"}),
            **model.model_dump(mode="json", include={"dtype", "batch", "threads", "memory_format", "date"}),
            "unit": self.unit,
            "fit": {
                "mean_abs": model.fit.mean_abs,
                "worst": model.fit.worst,
                "networks": len(model.fit.networks),
                "errors": {n.name: round(n.error, 4) for n in model.fit.networks},
            },
            "sources": dict(model.sources),
        }

    def _fixed(self, spec: NetSpec, stem: int, input_size: Size | None = None) -> float:
        """The call, the input, the first ``stem`` stages and the tail."""
        placed = list(spec.placed(input_size))
        ends = network_kernels(spec, self.model.runtime, input_size, blocks=False)
        ms = self.model.rates.call_us * 1e-3 + sum(sum(self._ms(kernels)) for _, kernels in ends)
        return ms + sum(self.block(p.block, p.in_channels, p.in_size) for p in placed if p.stage < stem)

    def _ms(self, kernels: list[Kernel]) -> list[float]:
        model = self.model
        wanted = demand(kernels, model.peaks, model.dtype, model.batch)
        return [float(ms) for ms in kernel_ms(wanted, model.rates, model.runtime)]


def list_devices() -> list[str]:
    """Names of the devices that `Predictor.load` takes."""
    return list_named(FOLDER)
