"""PruningAsSearch: binary masks on the channels of a trained network, learnt with its weights (arXiv 2206.01198).

From the paper: a depth-wise 1×1 convolution behind the activation with one weight a channel, 1 at the start, in the
forward pass 1[w > ½], in the backward pass straight through; the loss ``CE + α·(M − M*)²`` on all parameters, M the
cost of the masked network as a function of its binary masks; two phases, the search from trained weights and then the
fine-tuning of the weights with the masks frozen; the physical removal of the channels.

Two modes. ``multiplier=False`` is the published loss; its M comes near M*, and is brought onto it in the last tenth of
the search as below (ours). The default is ours: the loss is the CE alone, and after every
step the masks move along the direction of the cost just so far that M = M* (an exact line search on the multiplier of
the constraint M ≤ M*). The published term has no place there: M is never above M*, so its gradient would only turn
channels on.

Ours in both: M is any `Cost`, linear in the mask weights about the present widths; α counts in parts of the start
network's cost; the step of the masks is scaled to the size of their gradient; M* falls from the start network's cost to
the target over the first part of the search; how widths are put on the space's grid, into (share·T, T], at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from prunet_zoo.cost import Cost
from prunet_zoo.errors import SpecError
from prunet_zoo.search.adjust import LOWEST
from prunet_zoo.search.aim import given_target, pruned_target
from prunet_zoo.search.strategy import GradSync, PruneEvent, SearchStrategy, Services
from prunet_zoo.search.threshold import TIE, Thresholds, fit_widths
from prunet_zoo.search.width_cost import WidthCost
from prunet_zoo.space import Encoding
from prunet_zoo.supernet.masked import MaskedNet

_ALPHA = 20.0
_MEMORY = 0.99  # of the mean square of the masks' gradient, per step
_REFRESH = 16  # steps between two looks at the slopes of the cost
_TOLERANCE = 0.005  # M may be so far beneath M*, relative, before the multiplier moves
_ROUNDINGS = 3  # weights are float32: two channels that are nearly equal may go together
_POWER = 0.5  # 1: the price of a channel's cost alone, which makes bottlenecks of dear layers; 0: all layers alike
_SETTLE = 0.1  # of the search's steps, the last ones, in which the published loss has the thresholds held as well
_FLAT = 0.05  # slopes count as at least this share of their mean where thresholds move: all channels cost something


class PruningAsSearch(SearchStrategy):
    """Masks and weights learn together until the masked network costs T; then the weights alone.

    Args:
        target: T, in the unit of the cost; None: a third of the way from the least to the start network's cost.
        alpha: α of ``α·((M − M*) / M_start)²``, the published loss, with ``multiplier=False`` only; None: 20. The
            paper's α for M in GMACs is this one divided by M_start²: 5 for ResNet-50 (4.1) is 84 here, 0.1 for
            RepVGG-B1 (11.8) is 14.
        lr: how far noise alone moves a mask's weight in the whole search, in the root mean square. A step is
            lr/√steps by the gradient over its root mean square.
        pretrain: share of the epochs before the masks learn; 0 where the start network is trained.
        finetune: share of the epochs after the decision; 0: none.
        ramp: share of the search after which M* has come down from the start network's cost to T, on a straight line;
            0: it is T from the start, as published.
        multiplier: after every step move all thresholds by a common shift, in proportion to the root of what a channel
            of the group costs, so that M is just beneath M*; the loss is the CE alone. False: the published loss; they
            are moved so in the last tenth of the search alone.

    Raises:
        LatencyError: the target is no positive number.
        SpecError: another argument is out of range, or there is an ``alpha`` besides the multiplier.
    """

    arch_in_weight_step = True

    def __init__(
        self,
        target: float | None = None,
        alpha: float | None = None,
        lr: float = 0.25,
        pretrain: float = 0.0,
        finetune: float = 0.5,
        ramp: float = 0.7,
        multiplier: bool = True,
    ) -> None:
        self.target = given_target(target)
        for name, value, high in (("pretrain", pretrain, 0.9), ("finetune", finetune, 0.9), ("ramp", ramp, 1.0)):
            if not 0 <= value <= high:
                raise SpecError(f"PruningAsSearch: {name} must be between 0 and {high}, got {value!r}")
        if multiplier and alpha is not None:
            raise SpecError("PruningAsSearch: alpha is of the published loss; give multiplier=False too, or no alpha")
        alpha = _ALPHA if alpha is None else alpha
        if not 0 <= alpha < math.inf or not 0 < lr < math.inf:
            raise SpecError(f"PruningAsSearch: alpha must be 0 or more and lr positive, got {alpha!r} and {lr!r}")
        if pretrain + finetune >= 1:
            raise SpecError(f"PruningAsSearch: pretrain {pretrain} and finetune {finetune} leave no epoch to search in")
        self.alpha, self.lr, self.ramp, self.multiplier = alpha, lr, ramp, multiplier
        self.pretrain, self.finetune = pretrain, finetune
        self.step, self.mean_square, self.expected = 0, 0.0, math.nan
        self.slopes: list[float] = []
        self.decided: Encoding | None = None

    def setup(
        self,
        supernet: MaskedNet,
        cost: Cost,
        epochs: int,
        seed: int,
        steps_per_epoch: int,
        services: Services | None = None,
    ) -> None:
        """See `SearchStrategy.setup`; raises `SpecError` for a super-network that has no masks."""
        if not isinstance(supernet, MaskedNet):
            raise SpecError(
                f"PruningAsSearch prunes a masked network (SpecNet, TracedNet), not a {type(supernet).__name__}"
            )
        self.net, self.cost = supernet, WidthCost(supernet, cost)
        low, high = self.cost.least, self.cost.start
        self.target = pruned_target(self.target, low, high, cost.unit)
        self.search_from = self.pretrain_epochs = min(epochs - 1, math.ceil(epochs * self.pretrain))
        room = epochs - self.search_from - 1
        tuned = min(room, max(1, round(epochs * self.finetune))) if self.finetune else 0
        self._tell_of_phases(epochs, tuned, services)
        self.decision_epoch = epochs - tuned if tuned else None
        self.steps = max(1, (epochs - tuned - self.search_from) * steps_per_epoch)
        self.searching = False
        self.reported = supernet.widths()
        self.expected, self.slopes = self.cost(self.reported), self.cost.slopes(self.reported)

    def _tell_of_phases(self, epochs: int, tuned: int, services: Services | None) -> None:
        """Say which phases a run is too short for."""
        missing = [
            name
            for name, share, has in (("pretrain", self.pretrain, self.search_from), ("finetune", self.finetune, tuned))
            if share and not has
        ]
        if missing and services is not None:
            needed = 1 + (self.pretrain > 0) + (self.finetune > 0)
            services.tell(
                f"PruningAsSearch: {epochs} epochs have no room for {' and '.join(missing)}: masks learn in all that "
                f"there are besides; train {needed} epochs or more"
            )

    def start_epoch(self, epoch: int) -> None:
        """Whether the masks learn in this epoch."""
        before = self.decision_epoch is None or epoch < self.decision_epoch
        self.searching = self.search_from <= epoch and before and self.decided is None

    def before_weight_step(self) -> None:
        """Nothing: every step runs the masked network."""

    def wants_arch_step(self, epoch: int) -> bool:
        """Never: masks learn with the weights, on the same batches."""
        return False

    def arch_step(self, loss: Callable[[], torch.Tensor], sync: GradSync | None = None) -> dict[str, float]:
        """Not asked for, see `wants_arch_step`; the masks stay as they are."""
        return {}

    def goal(self) -> float:
        """M* of this step."""
        done = 1.0 if self.ramp == 0 else min(1.0, self.step / (self.ramp * self.steps))
        return self.cost.start + (self.target - self.cost.start) * done

    def penalty(self) -> torch.Tensor | None:
        """Of the published loss, while the masks learn: ``α·((M − M*) / M_start)²``, exact at the present widths,
        straight through to the weights of the masks along the slopes of the cost; else 0. With the multiplier None."""
        if self.multiplier:
            return None
        if not self.searching:
            return torch.zeros(())
        counts = torch.stack([mask.binary().sum() for mask in self.net.masks()])
        slopes = torch.as_tensor(self.slopes, dtype=counts.dtype, device=counts.device)
        off = (self.expected - self.goal()) + (slopes * (counts - counts.detach())).sum()
        return self.alpha * (off / self.cost.start) ** 2

    @torch.no_grad()
    def after_weight_step(self) -> tuple[list[PruneEvent], list[nn.Parameter]]:
        """One step of the masks on the gradients that the weights' step left, then the multiplier."""
        weights = self.net.arch_parameters()
        if self.searching:
            self._descend(weights)
            self.step += 1
            if self.step % _REFRESH == 0:
                self.slopes = self.cost.slopes(self.net.widths())
            if self.multiplier or self.step > (1 - _SETTLE) * self.steps:
                self._hold(weights)
            self.expected = self.cost(self.net.widths())
        for weight in weights:
            weight.grad = None
        return [], []

    def _descend(self, weights: Sequence[nn.Parameter]) -> None:
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        square = float(torch.cat([g.flatten() for g in grads]).double().square().mean())
        if not math.isfinite(square) or square == 0:
            return  # mixed precision leaves out the step of the weights as well
        self.mean_square = _MEMORY * self.mean_square + (1 - _MEMORY) * square
        typical = self.mean_square / (1 - _MEMORY ** (self.step + 1))
        size = self.lr / math.sqrt(self.steps) / math.sqrt(max(typical, 1e-30))
        for weight, grad in zip(weights, grads, strict=True):
            weight.sub_(size * grad.to(weight.dtype))

    def _hold(self, weights: Sequence[nn.Parameter]) -> None:
        """Move all weights by a common shift so that M is in ((1 − tolerance)·M*, M*], as far as channels allow."""
        goal = self.goal()
        enough = (1 - _TOLERANCE) * goal
        for _ in range(_ROUNDINGS):
            now = self.cost(self.net.widths())
            if enough <= now <= goal or (now < goal and now >= self.cost.start):
                return
            thresholds = self._thresholds()
            shift = thresholds.solve(self.cost, goal, enough)
            for weight, rate in zip(weights, thresholds.rates, strict=True):
                weight.sub_(shift * rate)

    def _thresholds(self, tie: float = 0.0) -> Thresholds:
        """The groups' mask weights, and rates by what their channels cost."""
        mean = sum(self.slopes) / len(self.slopes)
        rates = [max(slope / mean, _FLAT) ** _POWER if mean > 0 else 1.0 for slope in self.slopes]
        arrays = [w.detach().double().cpu().numpy() for w in self.net.arch_parameters()]
        if self.decided is not None:  # its own channels first
            arrays = [np.where(k.cpu().numpy(), a + 1e3, a) for a, k in zip(arrays, self.net.keep(), strict=True)]
        return Thresholds(arrays, rates, [grid[0] for grid in self.cost.grids], tie)

    def end_epoch(self, epoch: int) -> tuple[list[PruneEvent], list[nn.Parameter]]:
        """Tells whose widths changed in the epoch (masks may come back, so some grow); probability: the share kept."""
        widths = self.net.widths()
        events = [
            PruneEvent(
                epoch,
                layer,
                "channels" if new < old else "widened",
                f"{group.name}: {old} → {new} channels",
                new / group.channels,
            )
            for group, layer, old, new in zip(self.net.groups, self.net.layers, self.reported, widths, strict=True)
            if new != old
        ]
        self.reported = widths
        return events, []

    def finish(self, target: float | None = None, share: float = LOWEST) -> Encoding:
        """See `SearchStrategy.finish`: widths on the grid near the learnt ones, see `fit_widths`. Once `adopt` has
        decided, and no other target is asked for, what was decided."""
        if self.decided is not None and target is None:
            return self.decided
        target = self.target if target is None else target
        return self.net.encode(fit_widths(self.cost, self._thresholds(TIE), target, share))

    def adopt(self, encoding: Encoding) -> None:
        """Freeze the masks: in each group the channels with the greatest weights stay, as many as ``encoding`` says."""
        self.net.freeze(self.net.ranked(encoding))
        self.decided, self.searching = tuple(encoding), False
        self.expected = self.cost(self.net.widths())

    def status(self) -> dict[str, float]:
        """M, target, M*, channels left, depth."""
        return {
            "expected": self.expected,
            "target": self.target,
            "goal": self.goal(),
            "candidates": self.net.candidates_left(),
            "depth": self.net.depth(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Steps, scale of the gradient, slopes, the decision and its masks. The masks' weights are the network's."""
        return {
            "step": self.step,
            "mean_square": self.mean_square,
            "expected": self.expected,
            "slopes": list(self.slopes),
            "reported": list(self.reported),
            "decided": None if self.decided is None else [list(c) if c else None for c in self.decided],
            "keep": None if self.decided is None else self.net.keep(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[nn.Parameter]:
        """Restore `state_dict`; the network's tensors are loaded by the caller afterwards."""
        self.step, self.mean_square = int(state["step"]), float(state["mean_square"])
        self.expected, self.slopes = float(state["expected"]), list(state["slopes"])
        self.reported = tuple(state["reported"])
        decided = state["decided"]
        self.decided = None if decided is None else tuple((c[0], c[1]) if c else None for c in decided)
        self.net.freeze(state["keep"])
        return []
