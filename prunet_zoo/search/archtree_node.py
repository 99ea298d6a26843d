"""Nodes of the tree of pruned networks, the removals that may be made of them, and which of them survive."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from prunet_zoo.supernet.masked import MaskedNet


@dataclass(frozen=True)
class TreeSettings:
    """See `Archtree`, whose arguments these are."""

    beam: int
    children: int
    rounds: int
    removal: float
    measure_most: int
    recovery_steps: int
    recovery_lr: float
    importance: str
    importance_batches: int


def judges(net: MaskedNet, importance: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """By what the channels of each group are judged: its BatchNorms; for 'taylor', where it has none, the layers that
    make the channels. Neither: the group stays whole.

    For 'magnitude' BatchNorms alone count: their |γ| and the size of a layer's weights cannot be compared.
    """
    found = []
    for group in net.groups:
        norms = tuple(n for n in group.norms if getattr(net.net.get_submodule(n), "weight", None) is not None)
        found.append((norms, group.sources if importance == "taylor" and not norms else ()))
    return found


@dataclass
class Node:
    """A pruned network.

    Attributes:
        lineage: (group, channels kept) of each removal, from the root on.
        keep: what is kept of each group, bool (C,).
        state: weights of the network without the channels, on the CPU.
        latency: in ms (the cost's unit where nothing is measured).
        accuracy: top-1 on held-out images in percent; ``loss``: mean cross-entropy there.
        end: '' while it may have children; 'budget': at the budget; 'under': the grid's last step fell below 0.95 T;
            'stuck': above T and nothing can be taken out; 'unsure': its measurements leave open where it is.
    """

    lineage: tuple[tuple[int, int], ...]
    keep: list[torch.Tensor]
    state: dict[str, torch.Tensor] = field(repr=False)
    latency: float
    accuracy: float
    loss: float
    end: str = ""

    @property
    def counts(self) -> tuple[int, ...]:
        """Channels kept, a group each."""
        return tuple(int(mask.sum()) for mask in self.keep)

    @property
    def rank(self) -> tuple[float, float, tuple[tuple[int, int], ...]]:
        """Better nodes come first."""
        return -self.accuracy, self.loss, self.lineage

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors."""
        return {**self.__dict__, "lineage": [list(step) for step in self.lineage]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Node:
        """The node that `state_dict` gave."""
        return cls(**{**state, "lineage": tuple((int(g), int(w)) for g, w in state["lineage"])})


@dataclass
class Child:
    """A removal that may be made: of ``parent``, from ``before`` to ``after`` channels of ``group``."""

    parent: Node
    group: int
    before: int
    after: int
    predicted: float  # saving by the cost's word, in its unit
    expected: float  # latency, ms
    lost: float  # importance of the channels that go
    latency: float = math.nan

    @property
    def counts(self) -> tuple[int, ...]:
        """Channels kept, a group each."""
        counts = list(self.parent.counts)
        counts[self.group] = self.after
        return tuple(counts)

    @property
    def saves(self) -> float:
        """Expected saving in ms."""
        return self.parent.latency - self.expected

    def price(self, latency: float) -> float:
        """Importance lost for each ms saved, where the network takes ``latency``."""
        saved = self.parent.latency - latency
        return self.lost / saved if saved > 0 else math.inf


def select(nodes: Iterable[Node], places: int) -> list[Node]:
    """The survivors: the best first, at most half of the places to children of one node; places that stay empty then
    go to the best of the others."""
    ordered = sorted(nodes, key=lambda node: node.rank)
    most = math.ceil(places / 2)
    families: Counter[tuple[tuple[int, int], ...]] = Counter()
    first: list[Node] = []
    for node in ordered:
        if len(first) < places and families[node.lineage[:-1]] < most:
            families[node.lineage[:-1]] += 1
            first.append(node)
    chosen = {node.lineage for node in first}
    rest = [node for node in ordered if node.lineage not in chosen]
    return sorted([*first, *rest[: max(0, places - len(first))]], key=lambda node: node.rank)


def nearest(children: Iterable[Child]) -> list[Child]:
    return sorted(children, key=lambda c: (-c.expected, c.group))


def node_name(lineage: Iterable[tuple[int, int]]) -> str:
    return "/".join(f"{group}:{width}" for group, width in lineage) or "root"
