"""The seam between a search loop and a method. A strategy assumes a super-network and a cost, and nothing of MMEngine.

A loop does, for every epoch::

    strategy.start_epoch(epoch)
    for batch in training_part:
        strategy.before_weight_step()          # chooses what the forward pass executes
        … ordinary training step of the weights …
        if strategy.wants_arch_step(epoch):
            strategy.arch_step(lambda: cross_entropy_on_a_batch_of_the_other_part())
    events, gone = strategy.end_epoch(epoch)   # the optimiser of the weights forgets the parameters in ``gone``

and at the end ``strategy.finish()`` gives the architecture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from prunet_zoo.cost import Cost
from prunet_zoo.search.adjust import LOWEST
from prunet_zoo.space import Encoding
from prunet_zoo.supernet import SuperNet

GradSync = Callable[[Iterable[nn.Parameter]], None]


@dataclass(frozen=True)
class PruneEvent:
    """Something that was taken away for good: when, in which layer, what, at which probability."""

    epoch: int
    layer: int
    kind: str  # 'block', 'skip' or 'layer'
    what: str
    probability: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


class SearchStrategy(ABC):
    """A search method. Everything it knows between two epochs is in `state_dict`."""

    @abstractmethod
    def setup(self, supernet: SuperNet, cost: Cost, epochs: int, seed: int, steps_per_epoch: int) -> None:
        """Bind to a super-network and a cost; raises `LatencyError` when the target is out of the space's range."""

    @abstractmethod
    def start_epoch(self, epoch: int) -> None:
        """Set what holds for the epoch (temperature, …)."""

    @abstractmethod
    def before_weight_step(self) -> None:
        """Choose what the next forward pass executes."""

    @abstractmethod
    def wants_arch_step(self, epoch: int) -> bool:
        """Whether architecture steps alternate with weight steps in this epoch."""

    @abstractmethod
    def arch_step(self, loss: Callable[[], torch.Tensor], sync: GradSync | None = None) -> dict[str, float]:
        """One step of the architecture. ``loss`` runs the super-network on a batch of the other part of the data;
        ``sync`` averages gradients over processes. Returns figures to log."""

    @abstractmethod
    def end_epoch(self, epoch: int) -> tuple[list[PruneEvent], list[nn.Parameter]]:
        """Prune; returns what went and its parameters."""

    @abstractmethod
    def finish(self, target: float | None = None, share: float = LOWEST) -> Encoding:
        """The architecture found, its cost adjusted into (share·T, T]; ``target`` stands in for T where a measurement
        asks for it. Raises `LatencyError` where the space has no such network."""

    @abstractmethod
    def status(self) -> dict[str, float]:
        """Figures for the progress bar and the history."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly, as plain data and tensors."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> list[nn.Parameter]:
        """Go on from `state_dict`: prunes the super-network to its structure (returns the parameters that went)."""
