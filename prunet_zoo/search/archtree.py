"""Archtree: a trained network is pruned along a tree, latency is measured as it goes (arXiv 2311.10549).

What is published and what is ours stands in `archtree_tree`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from prunet_zoo.cost import Cost
from prunet_zoo.errors import LatencyError, SpecError, TrainingError, few
from prunet_zoo.search.adjust import LOWEST
from prunet_zoo.search.aim import given_target, pruned_target
from prunet_zoo.search.archtree_latency import ACCEPTED, Latencies
from prunet_zoo.search.archtree_node import Node, TreeSettings, judges
from prunet_zoo.search.archtree_run import run_tree, weights_hash
from prunet_zoo.search.archtree_tree import Tree
from prunet_zoo.search.archtree_workers import Evaluator
from prunet_zoo.search.strategy import GradSync, MeasuredChoice, PruneEvent, SearchStrategy, Services
from prunet_zoo.search.target import Trial, percent_off
from prunet_zoo.space import Encoding
from prunet_zoo.supernet.masked import MaskedNet

FOLDER = "archtree"  # of the services' folder


class Archtree(SearchStrategy):
    """Train (or load) the start network, prune it along a tree, fine-tune the best network found.

    Where the device is at hand every latency is measured on it; where it is not, and for MACs, the cost's word counts.

    Args:
        target: T, in the unit of the cost (ms for a latency table); None: a third of the way from the fastest network
            that the start network can become to the start network itself.
        beam: B, how many nodes survive a round. 1 is greedy pruning.
        children: C, how many children of a node are trained.
        rounds: the target is reached in about so many rounds where ``removal`` lets it; more where groups are many.
        removal: the greatest share of a group's channels that one removal takes (one step of its grid may take more).
        measure_most: networks that are measured for a node, of which the ``children`` best are trained; None: C + 1.
        recovery_steps: training steps of a child before it is scored.
        recovery_lr: their learning rate at the start (SGD, see `archtree_workers.recover`).
        importance: 'taylor' or 'magnitude', see `archtree_workers.channel_importance`.
        importance_batches: batches that 'taylor' is averaged over.
        held_batches: held-out batches that a score is of; None: all.
        workers: processes that train children at the same time, each with one thread; 0: this process alone. Nothing is
            trained while something is measured.
        pretrain: share of the epochs before the tree, 0 for trained weights. The rest fine-tunes.

    Raises:
        LatencyError, SpecError: an argument is out of range.
    """

    lowest = ACCEPTED

    def __init__(
        self,
        target: float | None = None,
        beam: int = 4,
        children: int = 4,
        rounds: int = 10,
        removal: float = 0.25,
        measure_most: int | None = None,
        recovery_steps: int = 20,
        recovery_lr: float = 0.02,
        importance: str = "taylor",
        importance_batches: int = 4,
        held_batches: int | None = 32,
        workers: int = 0,
        pretrain: float = 0.5,
    ) -> None:
        self.target = given_target(target)
        measure_most = children + 1 if measure_most is None else measure_most
        for name, value, low in (
            ("beam", beam, 1),
            ("children", children, 1),
            ("rounds", rounds, 1),
            ("measure_most", measure_most, children),
            ("recovery_steps", recovery_steps, 0),
            ("importance_batches", importance_batches, 1),
            ("held_batches", 1 if held_batches is None else held_batches, 1),
            ("workers", workers, 0),
        ):
            if value < low:
                raise SpecError(f"Archtree: {name} must be {low} or more, got {value!r}")
        if importance not in ("taylor", "magnitude"):
            raise SpecError(f"Archtree: importance must be 'taylor' or 'magnitude', got {importance!r}")
        if not 0 < recovery_lr < math.inf:
            raise SpecError(f"Archtree: recovery_lr must be positive, got {recovery_lr!r}")
        if not 0 < removal <= 1:
            raise SpecError(f"Archtree: removal must be above 0 and at most 1, got {removal!r}")
        if not 0 <= pretrain <= 0.95:
            raise SpecError(f"Archtree: pretrain must be between 0 and 0.95, got {pretrain!r}")
        self.settings = TreeSettings(
            beam, children, rounds, removal, measure_most, recovery_steps, recovery_lr, importance, importance_batches
        )
        self.held_batches, self.workers, self.pretrain = held_batches, workers, pretrain
        self.expected = math.nan
        self.found: dict[str, Any] = {}
        self._nodes: list[Node] = []

    def setup(
        self,
        supernet: MaskedNet,
        cost: Cost,
        epochs: int,
        seed: int,
        steps_per_epoch: int,
        services: Services | None = None,
    ) -> None:
        """See `SearchStrategy.setup`."""
        judged = [any(by) for by in judges(supernet, self.settings.importance)]
        bare = [group.name for group, by in zip(supernet.groups, judged, strict=True) if not by]
        hint = "; importance='taylor' may judge them" if self.settings.importance != "taylor" else ""
        if not any(judged):
            raise SpecError(f"Archtree has nothing to judge channels by: no BatchNorm in {few(bare)}{hint}")
        if bare and services is not None:
            services.tell(f"Archtree leaves {few(bare)} whole: no BatchNorm to judge their channels by{hint}")
        self.supernet, self.cost, self.seed, self.services = supernet, cost, seed, services
        least = [g.widths[0] if by else g.channels for g, by in zip(supernet.groups, judged, strict=True)]
        low = cost(self._decode(least)[1])
        high = cost(self._decode([group.channels for group in supernet.groups])[1])
        self.target = pruned_target(self.target, low, high, cost.unit)
        self.expected = high
        self.decision_epoch = self.pretrain_epochs = min(round(self.pretrain * epochs), max(0, epochs - 1))

    def _decode(self, counts: Sequence[int]) -> tuple[Encoding, Any]:
        encoding = self.supernet.encode(counts)
        return encoding, self.supernet.space.decode(encoding)

    @property
    def measures(self) -> bool:
        """Whether latencies are measured; else the cost's word is taken."""
        return self.services is not None and self.services.measure is not None and self.cost.unit == "ms"

    def explore(self) -> None:
        """Grow the tree; goes on from its files.

        Raises:
            TrainingError: there are no services, or the files are damaged or of another search.
        """
        if self.services is None:
            raise TrainingError("Archtree trains and measures by itself: give `setup` the loop's services")
        folder, net = self.services.folder / FOLDER, self.supernet
        measure = self.services.measure if self.measures else None
        latencies = Latencies(self._decode, self.cost, measure, self.target, folder / "latencies.json")
        device = str(next(net.net.parameters()).device)
        about = {
            **self.settings.__dict__,
            "target": self.target,
            "seed": self.seed,
            "held_batches": self.held_batches,
            "cost": self.cost.hash,
            "measured": self.measures,
            "weights": weights_hash(net.net),
        }
        with Evaluator(self.services, folder / "jobs", self.workers, self.held_batches, device) as evaluator:
            tree = Tree(net, latencies, evaluator, self.settings, self.target, self.seed)
            seconds = run_tree(tree, folder, about, self.services.tell)
        self._nodes = tree.finished or [tree.best]
        self.found = self._summary(tree, latencies, seconds, evaluator.workers_mb)
        self.expected = tree.best.latency

    def _summary(self, tree: Tree, latencies: Latencies, seconds: float, workers_mb: float) -> dict[str, Any]:
        """What is known of the tree, as plain data."""
        best = tree.best
        trial = latencies.trial(best.counts)
        missed = None if latencies.meets(best.counts) else why_missed(best, self.target, trial)
        choice: dict[str, Any] | None = None
        if trial is not None:
            disturbed = "; ".join(trial.disturbed)
            choice = {
                "encoding": best_encoding(trial.encoding),
                "record": trial.record,
                "trials": [t.to_dict() for node in tree.finished if (t := latencies.trial(node.counts))],
                "missed": missed,
                "doubt": f"although disturbed, its repeats agree: {disturbed}" if disturbed else None,
                "networks": len(latencies.rows),
            }
        return {
            "choice": choice,
            "details": {
                "tree": tree.rows,
                "chosen": "/".join(f"{g}:{w}" for g, w in best.lineage) or "root",
                "groups": [group.name for group in self.supernet.groups],
                "networks_measured": len(latencies.rows),
                "measurements": sum(len(row["quick"]) + len(row["records"]) for row in latencies.rows.values()),
                "rounds": tree.round,
                "seconds": seconds,
                "workers_mb": workers_mb,
                "missed": missed,
            },
        }

    def measured_choice(self) -> MeasuredChoice | None:
        """The best network that measures in (0.95 T, T]; None before `explore` and where nothing is measured."""
        choice = self.found.get("choice")
        if choice is None:
            return None
        encoding = tuple(None if c is None else (c[0], c[1]) for c in choice["encoding"])
        trials = tuple(choice["trials"])
        return MeasuredChoice(encoding, choice["record"], trials, choice["missed"], choice["doubt"], choice["networks"])

    def missed(self) -> str | None:
        """Why the best network of the tree is not at the budget."""
        why: str | None = self.found.get("details", {}).get("missed")
        return why

    def details(self) -> dict[str, Any]:
        """The tree: a row a node, the one chosen, how many networks were measured."""
        return dict(self.found.get("details", {}))

    def finish(self, target: float | None = None, share: float = LOWEST) -> Encoding:
        """The best network found; with ``target`` the best whose cost is in (share·target, target].

        Raises:
            TrainingError: the tree has not been grown.
            LatencyError: no network of the tree costs that.
        """
        if not self._nodes:
            raise TrainingError("Archtree: the tree has not been grown; call `explore` first")
        for node in self._nodes:
            encoding, spec = self._decode(node.counts)
            if target is None or share * target < self.cost(spec) <= target:
                return encoding
        raise LatencyError(f"no network that the tree found costs between {share * (target or 0):.4g} and {target:.4g}")

    def adopt(self, encoding: Encoding) -> None:
        """Put the weights of a node into the start network and freeze the masks to its channels.

        Raises:
            SpecError: it is not a network of the tree.
        """
        node = next((node for node in self._nodes if self._decode(node.counts)[0] == tuple(encoding)), None)
        if node is None:
            raise SpecError("Archtree can only go on with a network that its tree found at the budget")
        self.supernet.restore(node.keep, node.state)
        self.supernet.freeze(node.keep)
        self._nodes = []  # their weights need not be in every checkpoint

    def start_epoch(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch."""

    def before_weight_step(self) -> None:
        """The whole network is trained, or what the masks leave."""

    def wants_arch_step(self, epoch: int) -> bool:
        """Never: the tree uses the held-out part."""
        return False

    def arch_step(self, loss: Callable[[], torch.Tensor], sync: GradSync | None = None) -> dict[str, float]:
        """There is nothing to learn by gradient."""
        return {}

    def end_epoch(self, epoch: int) -> tuple[list[PruneEvent], list[nn.Parameter]]:
        """Nothing is pruned outside of `explore`."""
        return [], []

    def status(self) -> dict[str, float]:
        """Latency (of the start network by the cost's word, then of the network found), target, channels, depth."""
        return {
            "expected": self.expected,
            "target": self.target,
            "candidates": self.supernet.candidates_left(),
            "depth": self.supernet.depth(),
        }

    def state_dict(self) -> dict[str, Any]:
        """What was found; nodes with their weights between `explore` and `adopt`. Masks are the network's."""
        return {"expected": self.expected, "found": self.found, "nodes": [node.state_dict() for node in self._nodes]}

    def load_state_dict(self, state: dict[str, Any]) -> list[nn.Parameter]:
        """Restore `state_dict`; the network's tensors, masks among them, are loaded by the caller."""
        self.expected, self.found = state["expected"], dict(state["found"])
        self._nodes = [Node.from_state(node) for node in state["nodes"]]
        return []


def best_encoding(encoding: Encoding) -> list[list[int] | None]:
    """An encoding as plain data."""
    return [None if choice is None else list(choice) for choice in encoding]


def why_missed(node: Node, target: float, trial: Trial | None) -> str:
    """Why a node, the best there is, is not at the budget; ``trial``: what was measured of it."""
    off = percent_off(node.latency, target)
    if ACCEPTED * target < node.latency <= target and trial is not None:
        figures = ", ".join(f"{record['median_ms']:.4g}" for record in trial.records)
        reasons = next((record["disturbed"] for record in trial.records if record["disturbed"]), None)
        told = f"was disturbed ({'; '.join(reasons)})" if reasons else "is too uncertain"
        return f"the measurement of the nearest network {told}: {figures} ms"
    if node.latency > target:
        return (
            f"nothing more can be taken out of the networks of the tree: the nearest takes {off} more than the target"
        )
    if not node.lineage:
        return f"the start network takes {off} less than the target already"
    return f"the width grid is too coarse here: the nearest network takes {off} less than the target"
