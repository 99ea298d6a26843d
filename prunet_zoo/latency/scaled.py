"""ScaledMacs: milliseconds from one measurement, in proportion to MACs; a cost where there can be no table."""

from __future__ import annotations

from typing import Any

from prunet_zoo.cost import MacsCost
from prunet_zoo.errors import LatencyError
from prunet_zoo.space import SearchSpace
from prunet_zoo.spec import BlockSpec, NetSpec, stable_hash


class ScaledMacs(MacsCost):
    """A `Cost` in ms: one network of the space was measured, any other takes as many times less as it has fewer MACs.

    The rule is ours, and coarse: on most devices a network with half of the MACs takes more than half of the time. A
    search whose target is in ms therefore measures what it proposes and corrects its aim.

    Args:
        network: the one measured.
        measured_ms: its latency.
        about: where that is from, for reports: plain JSON data.

    Raises:
        LatencyError: a latency that is none.
    """

    unit = "ms"

    def __init__(self, network: NetSpec, measured_ms: float, about: dict[str, Any]) -> None:
        if not 0 < measured_ms < float("inf"):
            raise LatencyError(f"the network's latency must be a positive number of ms, got {measured_ms}")
        self.network, self.measured_ms, self.about = network, measured_ms, about
        self.scale = measured_ms / (network.macs() / 1e6)  # ms a million multiply-accumulates

    @property
    def hash(self) -> str:  # type: ignore[override]
        """Changes with the network and its latency."""
        return stable_hash({"network": self.network.hash, "measured_ms": self.measured_ms})

    def block(self, block: BlockSpec, in_channels: int, in_size: tuple[int, int]) -> float:
        """ms of one block."""
        return super().block(block, in_channels, in_size) * self.scale

    def fixed(self, space: SearchSpace) -> float:
        """ms of stem, tail and classifier; raises `SpecError` for a space that is not additive."""
        encoding = space.largest()
        pairs = zip(space.layers, encoding, strict=True)
        space.require_additive("the fixed part of a cost")
        parts = (self.block(la.block(*ch), la.in_channels, la.in_size) for la, ch in pairs if ch is not None)
        return self(space.decode(encoding)) - sum(parts)

    def __call__(self, spec: NetSpec) -> float:
        """ms of the network at its own input size."""
        return spec.macs() / 1e6 * self.scale

    def describe(self) -> dict[str, Any]:
        """Where the figure is from."""
        return {"cost": "MACs scaled by one measurement", "start_ms": self.measured_ms, **self.about}
