"""One measurement as a record: the figures and everything they depend on."""

from __future__ import annotations

import datetime
from typing import Any

from pydantic import Field

from prunet_zoo.spec import Frozen, parse


class Timing(Frozen):
    """Latency in ms with its spread: ``median_ms`` of the quieter rounds, percentiles and count of all runs."""

    median_ms: float = Field(ge=0.0)
    p10_ms: float = Field(ge=0.0)
    p90_ms: float = Field(ge=0.0)
    n: int = Field(ge=1)
    rounds: int = Field(ge=1)
    warmup_runs: int = Field(ge=0)
    interrupted: int = Field(default=0, ge=0)  # runs that count with their CPU time


class Record(Timing):
    """One measurement with everything it depends on. JSON in and out (`to_dict`, `from_dict`)."""

    spec_name: str
    spec_hash: str
    input_size: tuple[int, int]
    device: str
    accelerator: str
    backend: str
    backend_version: str
    dtype: str
    batch: int
    threads: int
    date: str  # ISO 8601, UTC

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, every field."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, data: Any) -> Record:
        """Read back what `to_dict` gave; raises `SpecError` naming the field."""
        return parse(cls, data, "latency record")


def now() -> str:
    """The time in ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
