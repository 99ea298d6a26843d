"""The tree of pruned networks: survivors propose children, children are measured, trained a little and scored.

Published (arXiv 2311.10549): structured pruning driven by latency; several pruned sub-models explored in parallel, like
a tree; latency measured on the target hardware as the search goes. The rules here are ours:

- A child of a node lacks the least important channels of one group more. For each group the grid width is taken whose
  saving is expected nearest to an even share of what is left to save: (latency − 0.98 T) in steps of about
  (latency of the root − T) / rounds. No more than a quarter (``removal``) of the group's channels go at once, or one
  step of its grid where that is more: of many groups none can save such a share. There are more rounds then.
- The groups whose channels matter least for each ms that they are expected to save are measured, and of those the
  ``children`` that matter least for each ms that they do save are trained for a few steps and scored.
- Groups whose channels cannot be judged (see `archtree_node.judges`) stay whole.
- No two nodes of the tree keep the same numbers of channels.
- The best survive by held-out accuracy, ties by loss. At most half of the places go to children of one node as long as
  children of others are there.
- A node in (0.95 T, 0.99 T] is finished and keeps its place; two measurements with full effort say so, all others are
  ranked with little. One that falls below is not taken; the removal is tried with fewer channels. Only where the grid
  has nothing else, the least step below ends the branch (``end`` 'under').

With one place this is greedy pruning.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from prunet_zoo.search.archtree_latency import ACCEPTED, Latencies, Savings
from prunet_zoo.search.archtree_node import Child, Node, TreeSettings, judges, nearest, node_name, select
from prunet_zoo.search.archtree_workers import Evaluator, ImportanceJob, RecoverJob
from prunet_zoo.search.target import CENTRE
from prunet_zoo.spec import stable_hash
from prunet_zoo.supernet.masked import MaskedNet

_ROOM = 0.96  # of T: no child is proposed that is expected below


class Tree:
    """The search. `grow` makes a round; between two rounds everything is in `state_dict`.

    Args:
        net: the start network; its weights are the root's. They are changed while a round runs and put back after it.
        latencies: of networks by the numbers of channels kept.
        evaluator: trains and scores.
        settings: of the search.
        target: T.
        seed: what every node's training depends on, besides its lineage.
    """

    def __init__(
        self,
        net: MaskedNet,
        latencies: Latencies,
        evaluator: Evaluator,
        settings: TreeSettings,
        target: float,
        seed: int,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.net, self.latencies, self.evaluator, self.settings = net, latencies, evaluator, settings
        self.target, self.seed, self.tell = target, seed, tell
        self.start = {name: tensor.clone() for name, tensor in net.net.state_dict().items()}
        by = judges(net, settings.importance)
        self.norms, self.sources = tuple(norms for norms, _ in by), tuple(sources for _, sources in by)
        self.round = 0
        self.open: list[Node] = []
        self.ended: list[Node] = []
        self.seen: set[tuple[int, ...]] = set()
        self.rows: list[dict[str, Any]] = []

    def plant(self) -> None:
        """Make the root: the start network, measured and scored."""
        counts = tuple(group.channels for group in self.net.groups)
        keep = [torch.ones(count, dtype=torch.bool) for count in counts]
        _, module = self.net.remove(keep, "root")
        found = self.evaluator.run([RecoverJob(module, self.seed, 0, 0.0)])[0]
        root = Node((), keep, found.state, self.latencies(counts), found.accuracy, found.loss)
        self._set_scale(root.latency)
        self.seen.add(counts)
        self.rows.append(self._row(root, True))
        self._place(root)

    def _set_scale(self, latency: float, rows: Sequence[Sequence[Any]] = ()) -> None:
        self.root_latency = latency
        self.step = max(latency - self.target, 1e-3 * self.target) / self.settings.rounds
        predicted = self.latencies.predicted([group.channels for group in self.net.groups])
        self.savings = Savings(latency / predicted, self.step, rows)

    @property
    def finished(self) -> list[Node]:
        """Nodes at the budget, the best first."""
        return sorted((node for node in self.ended if node.end == "budget"), key=lambda node: node.rank)

    @property
    def best(self) -> Node:
        """The best node at the budget; where there is none, the one nearest to it."""
        nodes = self.finished
        return nodes[0] if nodes else min(self.ended, key=lambda node: abs(math.log(node.latency / self.target)))

    def grow(self) -> None:
        """One round: every open node has children, the best survive."""
        self.round += 1
        importance = self._importance(self.open)
        chosen: list[Child] = []
        taken = set(self.seen)
        for node, values in zip(self.open, importance, strict=True):
            found = self._children(node, values, taken)
            taken.update(child.counts for child in found)
            chosen += found
            if not found:
                self._place(node, last=True)
        places = self.settings.beam - len(self.finished)
        nodes = self._train(chosen if places else [], dict(zip(map(id, self.open), importance, strict=True)))
        self.seen.update(node.counts for node in nodes)
        survivors = select(nodes, places)
        kept = {node.lineage for node in survivors}
        self.rows += [self._row(node, node.lineage in kept) for node in nodes]
        self.open = []
        for node in survivors:
            self._place(node)

    def _place(self, node: Node, last: bool = False) -> None:
        """End a node or leave it open; ``last``: it has no children. No node ends without full measurements."""
        row = next(row for row in self.rows if row["node"] == node_name(node.lineage))
        if last or self.latencies.is_near(node.latency):
            node.latency = row["latency"] = self.latencies.confirm(node.counts)
        if self.latencies.meets(node.counts, comfort=not last):
            node.end = "budget"
        elif node.latency <= ACCEPTED * self.target:
            node.end = "under"
        elif last:
            node.end = "stuck" if node.latency > self.target else "unsure"
        else:
            self.open.append(node)
            return
        row["end"] = node.end
        self.ended.append(node)

    def _importance(self, nodes: Sequence[Node]) -> list[list[torch.Tensor]]:
        """Of the channels that each node keeps, a tensor a group."""
        jobs = []
        for node in nodes:
            _, module = self.net.remove(node.keep, "node")
            module.load_state_dict(node.state)
            kind, seed = self.settings.importance, self._seed(node.lineage, "importance")
            steps = self.settings.importance_batches if kind == "taylor" else 0
            jobs.append(ImportanceJob(module, seed, node.counts, self.norms, kind, steps, self.sources))
        return self.evaluator.run(jobs)

    def _seed(self, lineage: Iterable[tuple[int, int]], what: str) -> int:
        return int(stable_hash([self.seed, what, [list(step) for step in lineage]]), 16) % 2**31

    def _children(self, node: Node, importance: list[torch.Tensor], taken: set[tuple[int, ...]]) -> list[Child]:
        """The removals that are made of a node: proposed, measured, and the best of them chosen."""
        judged = [g for g, by in enumerate(zip(self.norms, self.sources, strict=True)) if any(by)]
        proposals = [c for g in judged if (c := self._propose(node, g, importance[g], None))]
        proposals = [child for child in proposals if child.counts not in taken]
        usual = [child for child in proposals if child.expected > _ROOM * self.target]
        coarse = [child for child in proposals if child not in usual] if node.latency > self.target else []
        fits: list[Child] = []
        under: list[Child] = []
        measured = 0
        for queue in (sorted(usual, key=lambda c: (c.price(c.expected), c.group)), nearest(coarse)):
            if fits:
                break
            while queue and (measured < self.settings.measure_most or not fits):
                child = queue.pop(0)
                self._measure(child)
                measured += 1
                if child.latency > ACCEPTED * self.target:
                    fits.append(child)
                    continue
                under.append(child)
                finer = self._propose(node, child.group, importance[child.group], child.after)
                if finer is not None and finer.counts not in taken:
                    queue.insert(0, finer)
        if not fits and node.latency > self.target:
            return sorted(under, key=lambda c: (-c.latency, c.group))[:1]
        fits.sort(key=lambda c: (c.price(c.latency), c.group))
        return [child for child in fits if child.latency < node.latency][: self.settings.children] or fits[:1]

    def _measure(self, child: Child) -> None:
        child.latency = self.latencies(child.counts, child.expected)
        saved = child.parent.latency - child.latency
        self.savings.add(child.group, child.before, child.after, child.predicted, saved)

    def _propose(self, node: Node, group: int, importance: torch.Tensor, above: int | None) -> Child | None:
        """The removal of a group, of those not too great, that is expected to save nearest to what is wanted; the least
        one where all save too much. ``above``: only what keeps more channels than that, a finer one."""
        before = node.counts[group]
        widths = [w for w in self.net.groups[group].widths if w < before and (above is None or w > above)]
        if not widths:
            return None
        if above is not None:
            # the narrowest that is now expected to fit, but half of the widths are left out: estimates may stay wrong
            fits = lambda w: self._child(node, group, importance, w).expected > _ROOM * self.target  # noqa: E731
            at = max(bisect.bisect_left(widths, True, key=fits), len(widths) // 2)
            return self._child(node, group, importance, widths[min(at, len(widths) - 1)])
        most = self.settings.removal * before
        widths = [w for w in widths if before - w <= most] or widths[-1:]
        gap = node.latency - CENTRE * self.target
        wanted = gap / max(1, round(gap / self.step))
        # savings fall as widths grow: the first that saves less than wanted, and the one before it
        at = bisect.bisect_left(widths, True, key=lambda w: self._child(node, group, importance, w).saves < wanted)
        near = [self._child(node, group, importance, w) for w in widths[max(0, at - 1) : at + 1]]
        fitting = [child for child in near if child.expected > _ROOM * self.target]
        if not fitting:
            return self._child(node, group, importance, widths[-1])
        return min(fitting, key=lambda child: abs(child.saves - wanted))

    def _child(self, node: Node, group: int, importance: torch.Tensor, after: int) -> Child:
        before = node.counts[group]
        lost = float(importance.sort().values[: before - after].sum())
        child = Child(node, group, before, after, 0.0, 0.0, lost)
        child.predicted = self.latencies.predicted(node.counts) - self.latencies.predicted(child.counts)
        child.expected = node.latency - self.savings.estimate(group, before, after, child.predicted)
        return child

    def _train(self, chosen: Sequence[Child], importance: dict[int, list[torch.Tensor]]) -> list[Node]:
        """Take the channels out, let the networks recover, score them."""
        keeps = [self._keep(child, importance[id(child.parent)][child.group]) for child in chosen]
        lineages = [(*child.parent.lineage, (child.group, child.after)) for child in chosen]
        steps, lr = self.settings.recovery_steps, self.settings.recovery_lr
        jobs = [
            RecoverJob(module, self._seed(lineage, "recovery"), steps, lr)
            for lineage, module in zip(lineages, self._modules(chosen, keeps), strict=True)
        ]
        found = self.evaluator.run(jobs)
        return [
            Node(lineage, keep, done.state, child.latency, done.accuracy, done.loss)
            for child, keep, lineage, done in zip(chosen, keeps, lineages, found, strict=True)
        ]

    def _modules(self, chosen: Sequence[Child], keeps: Sequence[list[torch.Tensor]]) -> Iterator[nn.Module]:
        """The children's networks with their parents' weights."""
        parent: Node | None = None
        try:
            for child, keep in zip(chosen, keeps, strict=True):
                if child.parent is not parent:
                    parent = child.parent
                    self.net.restore(parent.keep, parent.state)
                yield self.net.remove(keep, "child")[1]
        finally:
            self.net.net.load_state_dict(self.start)

    @staticmethod
    def _keep(child: Child, importance: torch.Tensor) -> list[torch.Tensor]:
        """The parent's channels without the least important of the group (the lower index first)."""
        keep = [mask.clone() for mask in child.parent.keep]
        gone = importance.argsort(stable=True)[: child.before - child.after]
        keep[child.group][keep[child.group].nonzero().flatten()[gone]] = False
        return keep

    def _row(self, node: Node, survives: bool) -> dict[str, Any]:
        """A node as plain data, for people and pictures."""
        return {
            "round": self.round,
            "node": node_name(node.lineage),
            "parent": node_name(node.lineage[:-1]) if node.lineage else None,
            "latency": node.latency,
            "accuracy": node.accuracy,
            "loss": node.loss,
            "widths": list(node.counts),
            "survives": survives,
            "end": node.end,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next round depends on, as plain data and tensors."""
        return {
            "round": self.round,
            "root_latency": self.root_latency,
            "savings": [list(row) for row in self.savings.rows],
            "seen": sorted(list(counts) for counts in self.seen),
            "open": [node.state_dict() for node in self.open],
            "ended": [node.state_dict() for node in self.ended],
            "rows": self.rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._set_scale(state["root_latency"], state["savings"])
        self.round, self.rows = state["round"], list(state["rows"])
        self.seen = {tuple(counts) for counts in state["seen"]}
        self.open = [Node.from_state(node) for node in state["open"]]
        self.ended = [Node.from_state(node) for node in state["ended"]]
