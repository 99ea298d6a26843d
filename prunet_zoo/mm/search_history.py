"""What a search notes of its epochs: figures, what was pruned, seconds, memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from prunet_zoo.search.memory import resident_peak_mb
from prunet_zoo.search.strategy import PruneEvent

_AVERAGED = ("loss", "acc", "penalty_loss", "arch_loss", "arch_acc")


@dataclass
class History:
    """Rows by epoch and events; the sums of the epoch that runs.

    Attributes:
        rows: one dict an epoch, plain JSON data.
        events: what was pruned, see `PruneEvent`.
        seconds: spent on the steps of the epoch so far.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    _totals: dict[str, float] = field(default_factory=dict)

    def add_step(self, figures: Mapping[str, float], seconds: float) -> None:
        """Note a weight step and what followed it."""
        self.seconds += seconds
        for key in _AVERAGED:
            if key in figures:
                self._totals[key] = self._totals.get(key, 0.0) + figures[key]

    def add_events(self, events: Iterable[PruneEvent]) -> list[str]:
        """Note what was pruned; returns a line for people on each."""
        events = list(events)
        self.events += [event.to_dict() for event in events]
        return [f"{_what(e)} in layer {e.layer}: {e.what}{_likely(e)}" for e in events]

    def close_epoch(self, epoch: int, steps: int, figures: Mapping[str, Any]) -> None:
        """End an epoch of so many ``steps``: its row has their means, seconds, steps/s and ``figures``."""
        means = {key: total / steps for key, total in self._totals.items()}
        speed = steps / max(self.seconds, 1e-9)
        self.rows.append({"epoch": epoch + 1, "seconds": self.seconds, "steps_per_s": speed, **means, **figures})
        self._totals, self.seconds = {}, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"rows": self.rows, "events": self.events, "seconds": self.seconds, "totals": self._totals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.rows, self.events = list(state["rows"]), list(state["events"])
        self.seconds, self._totals = float(state["seconds"]), dict(state["totals"])


def _what(event: PruneEvent) -> str:
    return "widened" if event.kind == "widened" else f"pruned {event.kind}"


def _likely(event: PruneEvent) -> str:
    return "" if event.kind in ("channels", "widened") else f" (probability {event.probability:.3f})"


def state_mb(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Memory in MB that weights, buffers, gradients and the optimiser's moments hold: what pruning gives back."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [p.grad for p in module.parameters() if p.grad is not None]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def peak_memory_mb(workers_mb: float = 0.0) -> float:
    """Peak memory in MB: of the GPU since `reset_peak_memory` where there is one (this process's alone), else this
    process's resident maximum so far and ``workers_mb``, that of the method's other processes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_peak_mb() + workers_mb


def reset_peak_memory() -> None:
    """Let `peak_memory_mb` count anew, where it can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
