"""TracedCost: what a network with channels taken out costs, in MACs or in milliseconds scaled from one measurement."""

from __future__ import annotations

from typing import Any

from prunet_zoo.errors import LatencyError
from prunet_zoo.models.pruned import PrunedSpec
from prunet_zoo.spec import stable_hash
from prunet_zoo.supernet.traced_space import TracedSpace


class TracedCost:
    """A `Cost` (`prunet_zoo.cost`) of the networks of one `TracedSpace`.

    With one measurement of the start network it tells milliseconds: as many times fewer as it has fewer MACs (ours, and
    coarse: on most devices a network with half of the MACs takes more than half of the time). A search whose target is
    in ms therefore measures what it proposes and corrects its aim.

    Args:
        space: the space.
        measured_ms: latency of the start network in ms; None: the cost is in MMACs.
        about: where that latency is from, for reports: plain JSON data.

    Raises:
        LatencyError: a latency that is none.
    """

    def __init__(
        self, space: TracedSpace, measured_ms: float | None = None, about: dict[str, Any] | None = None
    ) -> None:
        if measured_ms is not None and not 0 < measured_ms < float("inf"):
            raise LatencyError(f"the start network's latency must be a positive number of ms, got {measured_ms}")
        self.space, self.measured_ms, self.about = space, measured_ms, dict(about or {})
        self.unit = "MMACs" if measured_ms is None else "ms"
        whole = space.macs(space.decode(space.largest()))
        self.scale = 1e-6 if measured_ms is None else measured_ms / whole  # units a multiply-accumulate

    @property
    def hash(self) -> str:
        """Changes when any figure changes."""
        return stable_hash({"space": self.space.hash, "unit": self.unit, "measured_ms": self.measured_ms})

    def __call__(self, spec: PrunedSpec) -> float:
        """MMACs or ms of a network of the space, at the space's input size."""
        return self.space.macs(spec) * self.scale

    def fixed(self, space: Any) -> float:
        """Nothing: no part of such a network keeps its cost while others change."""
        return 0.0

    def block(self, block: Any, in_channels: int, in_size: tuple[int, int]) -> float:
        """Always raises `LatencyError`: the cost of a layer depends on those around it."""
        raise LatencyError(
            f"{self.space.name!r} has no cost by layer; use Pruning-as-Search or Archtree, which take that of a network"
        )

    def describe(self) -> dict[str, Any]:
        """Where the figures are from."""
        if self.measured_ms is None:
            return {"cost": "MACs computed from the layers' shapes"}
        return {"cost": "MACs scaled by the start network's latency", "start_ms": self.measured_ms, **self.about}
