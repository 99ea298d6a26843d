"""DDPNAS in a super-network (arXiv 1905.13543): `DDPNASearch` whose accuracies come from shared weights.

Published: a sub-network is trained for an epoch and then validated. Ours: its epoch may be a part of the loop's epochs,
the warm-up, what its BatchNorm statistics are, and how the result is fitted to the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from prunet_zoo.cost import Cost
from prunet_zoo.errors import SpecError, TrainingError
from prunet_zoo.search.adjust import LOWEST
from prunet_zoo.search.aim import given_target, space_target
from prunet_zoo.search.ddpnas import Credit, DDPNASearch, Removal, Update, check_settings
from prunet_zoo.search.ddpnas_fit import fit_to_target
from prunet_zoo.search.strategy import GradSync, PruneEvent, SearchStrategy, Services
from prunet_zoo.search.tiered import describe_candidate
from prunet_zoo.space import Choice, Encoding
from prunet_zoo.supernet import SuperNet
from prunet_zoo.supernet.stochastic import SKIP

_FEW = 20  # steps for a sub-network


class DDPNAS(SearchStrategy):
    """Sub-networks drawn without replacement; after each phase every layer loses its worst choice.

    The schedule has N = T·(K + … + 2) sub-networks. The loop's steps are shared out evenly among them: each is trained
    for an epoch, as published, where the loop has N epochs, and for a part of one where it has fewer (ours).

    While a sub-network is trained, the BatchNorm statistics are averages over its own steps: the momentum of the n-th
    step is 1/n, but not under the network's own. What earlier sub-networks, of other widths, left there is gone with
    the first step, and the validation sees the statistics of the network that it validates (ours).

    Args:
        target: T, in the unit of the cost (ms for a latency table); None takes `default_target`. No sub-network that is
            trained costs more.
        passes: T of the schedule.
        update: 'first': θ ← E + ½·θ; 'momentum': v ← γ·v + (1 − γ)·E, θ ← θ + v.
        gamma: γ.
        widths: how many widths of a candidate's grid are choices, evenly spaced from end to end.
        warmup: share of the steps, at the start, in which each trains a sub-network of its own, drawn uniformly; 0:
            none, as published.
        credit: 'sample': as published; 'adjusted': ours; see `DDPNASearch`.
        batches: how many batches a validation takes; None: all of the architecture's part.
    """

    def __init__(
        self,
        target: float | None = None,
        passes: int = 3,
        update: Update = "first",
        gamma: float = 0.9,
        widths: int = 3,
        warmup: float = 0.0,
        credit: Credit = "adjusted",
        batches: int | None = None,
    ) -> None:
        self.target = given_target(target)
        check_settings(passes, update, gamma, widths, credit)
        if not 0.0 <= warmup <= 0.9:
            raise SpecError(f"DDPNAS: warmup must be between 0.0 and 0.9, got {warmup!r}")
        if batches is not None and batches < 1:
            raise SpecError(f"DDPNAS: batches must be 1 or more (or None for all), got {batches}")
        self.passes, self.update, self.gamma, self.widths = passes, update, gamma, widths
        self.warmup, self.credit, self.batches = warmup, credit, batches
        self.epoch = self.step = 0

    def setup(
        self,
        supernet: SuperNet,
        cost: Cost,
        epochs: int,
        seed: int,
        steps_per_epoch: int,
        services: Services | None = None,
    ) -> None:
        """See `SearchStrategy.setup`.

        Raises:
            TrainingError: the loop has fewer steps than the schedule has sub-networks, or gives no services.
        """
        if services is None:
            raise TrainingError("DDPNAS validates sub-networks as it goes: give it Services with held()")
        self.target = space_target(self.target, cost, supernet.space)
        self.supernet, self.price, self.services = supernet, cost, services
        self.search = DDPNASearch(
            supernet.space, self.passes, self.update, self.gamma, seed, self.target, cost, self.widths, self.credit,
            lowest=LOWEST * self.target,
        )  # fmt: skip
        steps = epochs * steps_per_epoch
        self.warmup_steps = math.ceil(self.warmup * steps)
        self.steps = steps - self.warmup_steps
        if self.steps < self.search.total:
            needed = math.ceil(self.search.total / (1 - self.warmup) / steps_per_epoch + 1e-9)
            raise TrainingError(
                f"DDPNAS trains {self.search.total} sub-networks here (passes={self.passes}, up to {self.search.first} "
                f"choices in a layer), for one step each at least, but {epochs} epochs have {self.steps} steps; train "
                f"{needed} epochs (as published: {self.search.total}), or lower passes or widths"
            )
        if self.search.done:
            services.tell("DDPNAS: the target leaves one choice in every layer; this network is trained alone")
        else:
            services.tell(
                f"DDPNAS: {self.search.total} sub-networks, {self.steps / self.search.total:.1f} steps each "
                f"(as published: an epoch, here {steps_per_epoch} steps)"
            )
        if self.steps < _FEW * self.search.total:
            services.tell(
                f"DDPNAS: fewer than {_FEW} steps each tell sub-networks badly apart; train "
                f"{math.ceil(_FEW * self.search.total / (1 - self.warmup) / steps_per_epoch)} epochs, or lower passes "
                "or widths"
            )
        norms = [m for m in supernet.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._norms = [(m, m.momentum) for m in norms if m.momentum is not None]
        self._seen = 0  # removals that the super-network has followed
        self._executed: Encoding | None = None
        self._favour()
        self.finish()  # fails now rather than at the end

    def start_epoch(self, epoch: int) -> None:
        """Note the epoch, for the events."""
        self.epoch = epoch

    def before_weight_step(self) -> None:
        """Execute the sub-network whose turn it is: one of the warm-up, one of the schedule, or at last the result."""
        turn = self.step - self.warmup_steps
        if turn < 0:
            self._execute(self.search.encoding(self.search.single(f"warmup/{self.step}")), 0)
        elif self.search.done:
            self._execute(self.search.encoding(self.search.best()), turn - self._end(len(self.search.evaluated) - 1))
        else:
            self._execute(self.search.encoding(self.search.ask()), turn - self._end(len(self.search.evaluated) - 1))

    def _end(self, index: int) -> int:
        """Steps after the warm-up that are done when the ``index``-th sub-network is."""
        return (index + 1) * self.steps // max(1, self.search.total)

    def _execute(self, encoding: Encoding, before: int) -> None:
        """``before``: steps that the sub-network has been trained for in this turn."""
        if encoding != self._executed:
            self.supernet.set_hard(encoding)
            self._executed = encoding
        for norm, momentum in self._norms:
            norm.momentum = max(momentum, 1 / (before + 1))

    def after_weight_step(self) -> tuple[list[PruneEvent], list[nn.Parameter]]:
        """At the end of a sub-network's turn: validate it, credit its choices, and prune where a phase is over."""
        self.step += 1
        due = self.step - self.warmup_steps
        if due > 0 and not self.search.done and due == self._end(len(self.search.evaluated)):
            self.search.tell(self._validate())
        return self._follow()

    @torch.no_grad()
    def _validate(self) -> float:
        """Accuracy (a fraction) of what the last step trained, on the architecture's part, with running statistics."""
        supernet, was = self.supernet, self.supernet.training
        device = supernet.classifier.weight.device
        right = seen = 0
        supernet.eval()
        try:
            for index, (images, labels) in enumerate(self.services.held()):
                if index == self.batches:
                    break
                found = supernet(images.to(device)).argmax(1)
                right += int((found == labels.to(device)).sum())
                seen += len(labels)
        finally:
            supernet.train(was)
        if not seen:
            raise TrainingError("the architecture's part of the data gave no batch to validate a sub-network on")
        return self.services.mean(right / seen)

    def _follow(self) -> tuple[list[PruneEvent], list[nn.Parameter]]:
        """Take out of the super-network what the search has removed since; blocks go with their weights."""
        new = self.search.removed[self._seen :]
        if not new:
            return [], []
        self._seen = len(self.search.removed)
        events: list[PruneEvent] = []
        gone: list[nn.Parameter] = []
        for removal in new:
            events.append(self._event(removal))
        for index in sorted({removal.layer for removal in new}):
            layer, left = self.supernet.stochastic_layers()[index], self._left(index)
            names = {SKIP if choice is None else str(choice[0]) for choice in left}
            for name in [n for n in layer.options if n not in names]:
                last = max(r.probability for r in new if r.layer == index)
                if name != SKIP and len(layer.layer.candidate_widths(int(name))) > 1:
                    events.append(PruneEvent(self.epoch, index, "block", describe_candidate(layer, name), last))
                gone += layer.remove(name)
            if left == [None]:
                events.append(PruneEvent(self.epoch, index, "layer", SKIP, 1.0))
        self._favour()
        return events, gone

    def _left(self, index: int) -> list[Choice]:
        return [self.search.choices[index][c] for c in self.search.survivors[index]]

    def _event(self, removal: Removal) -> PruneEvent:
        choice = self.search.choices[removal.layer][removal.choice]
        if choice is None:
            return PruneEvent(self.epoch, removal.layer, "skip", SKIP, removal.probability)
        layer = self.supernet.stochastic_layers()[removal.layer]
        kind, what = "choice", describe_candidate(layer, str(choice[0]))
        if len(layer.layer.candidate_widths(choice[0])) > 1:
            what += f" width {choice[1]}"
        else:
            kind = "block"
        return PruneEvent(self.epoch, removal.layer, kind, what, removal.probability)

    def _favour(self) -> None:
        """Tell the super-network what its likeliest architecture is."""
        self.supernet.favour(self.search.encoding(self.search.best()))

    def wants_arch_step(self, epoch: int) -> bool:
        """Never: θ follows accuracies, not gradients."""
        return False

    def arch_step(self, loss: Callable[[], torch.Tensor], sync: GradSync | None = None) -> dict[str, float]:
        """There are no steps on θ; raises `TrainingError`."""
        raise TrainingError("DDPNAS learns from accuracies and has no architecture steps (wants_arch_step is False)")

    def end_epoch(self, epoch: int) -> tuple[list[PruneEvent], list[nn.Parameter]]:
        """Nothing: phases end between steps."""
        return [], []

    def finish(self, target: float | None = None, share: float = LOWEST) -> Encoding:
        """The choices of greatest Σθ, widths fitted on their fine grid, see `fit_to_target`."""
        target = self.target if target is None else target
        held = [
            {int(name) for name in layer.options if name != SKIP} for layer in self.supernet.stochastic_layers()
        ]  # candidates that have weights
        return fit_to_target(self.supernet.space, self.price, self.search, held, target, share)

    def status(self) -> dict[str, float]:
        """Cost of the best so far, target, blocks and choices left, depth, sub-networks done, held accuracy (%)."""
        best = self.search.best()
        figures = {
            "expected": self.search.cost(best),
            "target": self.target,
            "candidates": float(self.supernet.candidates_left()),
            "depth": float(sum(choice is not None for choice in self.search.encoding(best))),
            "choices": float(sum(map(len, self.search.survivors))),
            "evaluated": float(len(self.search.evaluated)),
        }
        if self.search.evaluated:
            figures["held_acc"] = 100 * self.search.evaluated[-1].accuracy
        return figures

    def details(self) -> dict[str, Any]:
        """For the report: the choices, their θ (of a removed one: when it went), and every sub-network's accuracy."""
        state = self.search.state_dict()
        return {
            "choices": [[c and list(c) for c in layer] for layer in self.search.choices],
            "total": self.search.total,
            **{key: state[key] for key in ("theta", "survivors", "removed", "evaluated")},
        }

    def state_dict(self) -> dict[str, Any]:
        """The search, the step, and the super-network's structure: plain data."""
        return {
            "search": self.search.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "seen": self._seen,
            "structure": self.supernet.structure(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[nn.Parameter]:
        """Restore `state_dict`; the super-network's tensors are loaded by the caller afterwards."""
        gone = self.supernet.prune_to(state["structure"])
        self.search.load_state_dict(state["search"])
        self.step, self.epoch, self._seen = state["step"], state["epoch"], state["seen"]
        self._executed = None
        self._favour()
        return gone
