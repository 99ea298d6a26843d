"""TracedCost: what a network with channels taken out costs, in MACs."""

from __future__ import annotations

from typing import Any

from prunet_zoo.errors import LatencyError
from prunet_zoo.models.pruned import PrunedSpec
from prunet_zoo.spec import stable_hash
from prunet_zoo.supernet.traced_space import TracedSpace


class TracedCost:
    """A `Cost` (`prunet_zoo.cost`) of the networks of one `TracedSpace`: multiply-accumulates in millions. For
    milliseconds see `prunet_zoo.cost.ScaledCost`."""

    unit = "MMACs"

    def __init__(self, space: TracedSpace) -> None:
        self.space = space

    @property
    def hash(self) -> str:
        """Changes with the space."""
        return stable_hash({"space": self.space.hash, "unit": self.unit})

    def __call__(self, spec: PrunedSpec) -> float:
        """MMACs of a network of the space, at the space's input size."""
        return self.space.macs(spec) / 1e6

    def fixed(self, space: Any) -> float:
        """Nothing: no part of such a network keeps its cost while others change."""
        return 0.0

    def block(self, block: Any, in_channels: int, in_size: tuple[int, int]) -> float:
        """Always raises `LatencyError`: the cost of a layer depends on those around it."""
        raise LatencyError(
            f"{self.space.name!r} has no cost by layer; use Pruning-as-Search or Archtree, which take that of a network"
        )

    def describe(self) -> dict[str, Any]:
        """No device is involved."""
        return {"cost": "MACs computed from the layers' shapes"}
