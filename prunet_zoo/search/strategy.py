"""The seam between a search loop and a method. A strategy assumes a super-network and a cost, and nothing of MMEngine.

A loop does, for every epoch::

    if epoch == strategy.decision_epoch:       # methods that train on after the architecture is found
        strategy.explore()                     # long work of the method's own, with `Services`
        strategy.adopt(encoding)               # that of `measured_choice`, or of `finish` once it met the target
    strategy.start_epoch(epoch)
    for batch in training_part:
        strategy.before_weight_step()          # chooses what the forward pass executes
        … ordinary training step of the weights, with strategy.penalty() added to the loss …
        if strategy.wants_arch_step(epoch):
            strategy.arch_step(lambda: cross_entropy_on_a_batch_of_the_other_part())
        events, gone = strategy.after_weight_step()
    events, gone = strategy.end_epoch(epoch)   # the optimiser of the weights forgets the parameters in ``gone``

and at the end (or at ``decision_epoch``) ``strategy.finish()`` gives the architecture. In several processes every one
has a strategy of its own, and all must come to the same; `explore` runs in the first alone, the others get its state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from prunet_zoo.cost import Cost
from prunet_zoo.search.adjust import LOWEST
from prunet_zoo.space import Choice, Encoding

GradSync = Callable[[Iterable[nn.Parameter]], None]
Batch = tuple[torch.Tensor, torch.Tensor]  # normalised images (B, C, H, W), class indices (B,)
Record = dict[str, Any]  # a latency record as plain data, see `target`


class Measure(Protocol):
    """Measures a network (`NetSpec`, `PrunedSpec` or module)."""

    def __call__(self, network: Any, quick: bool = False) -> Record:
        """Its latency record; ``quick``: with little effort, enough to rank networks."""
        ...


class SearchNet(Protocol):
    """What is searched in, as the loop and the results see it: a `SuperNet` or a `MaskedNet`."""

    @property
    def space(self) -> Any:
        """The `SearchSpace`, or what a network that is no `NetSpec` offers in its place."""
        ...

    def arch_parameters(self) -> list[nn.Parameter]:
        """What the weights' optimiser must leave alone."""
        ...

    def best(self) -> Encoding:
        """The likeliest architecture."""
        ...

    def derive(self, encoding: Sequence[Choice], name: str) -> tuple[Any, dict[str, torch.Tensor]]:
        """The network of an encoding (a `NetSpec`, or a `PrunedSpec`) and its inherited weights, on the CPU."""
        ...

    def missing(self, encoding: Sequence[Choice]) -> list[int]:
        """Layers for which `derive` has no weights."""
        ...

    def candidates_left(self) -> int:
        """Options (blocks, or channels) that are left."""
        ...

    def depth(self) -> int:
        """Layers of the likeliest network."""
        ...


@dataclass(frozen=True)
class Services:
    """What a method may ask of its loop besides a super-network and a cost.

    Attributes:
        train: endless batches of the weights' part; their order depends on the seed that it is called with alone.
        held: batches of the architecture's part, once through in a fixed order, without augmentation where the data
            allows.
        measure: the latency record of a network, measured as the cost was; None where the device is not at hand.
        folder: a folder in that of the run, for files of the method's own (written to a temporary name and renamed).
        tell: called with a line of text for people; long work calls it where it can be stopped and resumed.
        mean: of a figure over all processes, each of which must ask; in a single one the figure itself.
    """

    train: Callable[[int], Iterator[Batch]]
    held: Callable[[], Iterator[Batch]]
    measure: Measure | None
    folder: Path
    tell: Callable[[str], None] = lambda line: None
    mean: Callable[[float], float] = lambda figure: figure


@dataclass(frozen=True)
class MeasuredChoice:
    """The architecture found by a method that has measured on the device itself.

    ``record``: its latency; ``trials``: what else was measured, plain data (``predicted``, ``measured`` in ms, …);
    ``missed``: why it does not meet the target, None when it does; ``doubt``: what there is to doubt where it does;
    ``networks``: how many were measured.
    """

    encoding: Encoding
    record: Record
    trials: tuple[dict[str, Any], ...] = ()
    missed: str | None = None
    doubt: str | None = None
    networks: int = 1


@dataclass(frozen=True)
class PruneEvent:
    """Something that was taken away, or came back: when, in which layer, what, at which probability."""

    epoch: int
    layer: int
    kind: str  # 'block', 'skip', 'layer', 'choice' or 'channels'; 'widened': channels that came back
    what: str
    probability: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


class SearchStrategy(ABC):
    """A search method. Everything it knows between two steps is in `state_dict`.

    Attributes:
        decision_epoch: the epoch before which the architecture is decided, because the method trains on with it; None:
            it is decided when the last epoch is over.
        arch_in_weight_step: the method uses the gradients that a weight step leaves on the architecture's parameters:
            the loop averages them over processes too.
        lowest: a network meets the target T when it costs more than this share of it, and at most T.
        pretrain_epochs: of a method that prunes a trained network, the epochs of training before it prunes, known after
            `setup`; None of others.
    """

    decision_epoch: int | None = None
    lowest: float = LOWEST
    pretrain_epochs: int | None = None
    arch_in_weight_step: bool = False

    @abstractmethod
    def setup(
        self,
        supernet: Any,  # the method says which `SearchNet` it needs
        cost: Cost,
        epochs: int,
        seed: int,
        steps_per_epoch: int,
        services: Services | None = None,
    ) -> None:
        """Bind to a super-network and a cost; raises `LatencyError` when the target is out of the space's range."""

    def explore(self) -> None:  # noqa: B027 (most methods have no such part)
        """Work of the method's own at ``decision_epoch``, before `finish` is asked; resumable by its own files."""

    def measured_choice(self) -> MeasuredChoice | None:
        """After `explore`: the architecture, where the method has measured it itself and nobody else need do so; None:
        `finish` is asked."""
        return None

    def missed(self) -> str | None:
        """Why the network that `finish` gives does not cost what was asked for, by the cost's word; None when it
        does."""
        return None

    def details(self) -> dict[str, Any]:
        """What the method has to say in the report, as plain JSON data."""
        return {}

    def adopt(self, encoding: Encoding) -> None:  # noqa: B027
        """The architecture is decided; the epochs that are left train its weights."""

    def penalty(self) -> torch.Tensor | None:
        """Added to the loss of a weight step (scalar, differentiable); None: nothing."""
        return None

    def after_weight_step(self) -> tuple[list[PruneEvent], list[nn.Parameter]]:
        """Called when a weight step is done; returns what was pruned and its parameters, as `end_epoch` does."""
        return [], []

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
        """Figures for the progress bar and the history; at least expected, target, candidates, depth."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly, as plain data and tensors."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> list[nn.Parameter]:
        """Go on from `state_dict`: prunes the super-network to its structure (returns the parameters that went)."""
