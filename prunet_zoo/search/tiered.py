"""TieredPruning: Prunode widths, block pruning, layer pruning, and a latency target in milliseconds (arXiv 2209.11785).

The paper fixes the three tiers (search of inner widths with O(1) memory and compute; pruning of blocks inside a
stochastic layer during the search; pruning of whole stochastic layers). The update rules, the thresholds, the dual
variable for the target and the final adjustment are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from prunet_zoo.cost import Cost
from prunet_zoo.errors import SpecError
from prunet_zoo.search.adjust import LOWEST, adjust_widths
from prunet_zoo.search.aim import given_target, space_target
from prunet_zoo.search.strategy import GradSync, PruneEvent, SearchStrategy, Services
from prunet_zoo.space import Encoding
from prunet_zoo.supernet import PrunodeBlock, StochasticLayer, SuperNet, drop_parameters
from prunet_zoo.supernet.stochastic import SKIP


class TieredPruning(SearchStrategy):
    """Differentiable search whose objective is ``CE + λ·log(E[cost] / T)`` with λ ≥ 0 by dual ascent.

    Args:
        target: T, in the unit of the cost (ms for a latency table); None takes `default_target`.
        warmup: share of the epochs in which only weights learn.
        tau: Gumbel-softmax temperature at the start and the end of the architecture's learning (geometric annealing).
        lr: learning rate of Adam on the architecture's logits.
        dual_lr: step of λ per unit of log(E[cost] / T).
        damping: weight of the quadratic term ½·log(E[cost] / T)², which keeps the dual ascent from swinging and the
            search near the cost that the network will be given in the end.
        block_kappa: an option under block_kappa / n (n options left in the layer) is removed (tier 2).
        layer_threshold: a layer whose skip is likelier than this is removed (tier 3).
        settle: share of the architecture's epochs before anything is removed.
        active: execute only so many sampled options of a layer in a step (None: all).
    """

    def __init__(
        self,
        target: float | None = None,
        warmup: float = 0.2,
        tau: tuple[float, float] = (4.0, 0.4),
        lr: float = 0.03,
        dual_lr: float = 0.02,
        damping: float = 1.0,
        block_kappa: float = 0.4,
        layer_threshold: float = 0.75,
        settle: float = 0.2,
        active: int | None = None,
    ) -> None:
        self.target = given_target(target)
        for name, value, low, high in (
            ("warmup", warmup, 0.0, 0.9),
            ("block_kappa", block_kappa, 0.0, 1.0),
            ("layer_threshold", layer_threshold, 0.5, 1.0),
            ("settle", settle, 0.0, 0.9),
        ):
            if not low <= value <= high:
                raise SpecError(f"TieredPruning: {name} must be between {low} and {high}, got {value!r}")
        if active is not None and active < 1:
            raise SpecError(f"TieredPruning: active must be 1 or more sampled options (or None for all), got {active}")
        for name, value in (("lr", lr), ("tau", tau[0]), ("tau", tau[1])):
            if not 0 < value < math.inf:
                raise SpecError(f"TieredPruning: {name} must be positive, got {value!r}")
        self.warmup, self.tau_range, self.lr = warmup, tau, lr
        self.dual_lr, self.damping, self.active = dual_lr, damping, active
        self.block_kappa, self.layer_threshold, self.settle = block_kappa, layer_threshold, settle
        self.dual, self.tau, self.expected, self.narrowed = 0.0, tau[0], math.nan, False

    def setup(
        self,
        supernet: SuperNet,
        cost: Cost,
        epochs: int,
        seed: int,
        steps_per_epoch: int,
        services: Services | None = None,
    ) -> None:
        """See `SearchStrategy.setup`."""
        supernet.space.require_additive("tiered pruning")
        self.target = space_target(self.target, cost, supernet.space)
        adjust_widths(supernet.space, cost, supernet.best(), self.target, 0.0)  # fails now rather than at the end
        self.supernet, self.cost, self.epochs = supernet, cost, epochs
        self.fixed = cost.fixed(supernet.space)
        self.warmup_epochs = min(epochs - 1, math.ceil(epochs * self.warmup))
        self.narrow_epoch = epochs - max(1, round(0.1 * (epochs - self.warmup_epochs)))
        self.generator = torch.Generator().manual_seed(seed)
        self._block_costs: dict[tuple[str, int, tuple[int, int]], float] = {}
        self.optimizer = torch.optim.Adam(supernet.arch_parameters(), lr=self.lr, betas=(0.5, 0.999))
        with torch.no_grad():
            self.expected = float(supernet.expected_cost(self._block_cost, self.fixed))

    def _block_cost(self, block: Any, in_channels: int, in_size: tuple[int, int]) -> float:
        key = (str(block), in_channels, in_size)
        if key not in self._block_costs:
            self._block_costs[key] = self.cost.block(block, in_channels, in_size)
        return self._block_costs[key]

    def start_epoch(self, epoch: int) -> None:
        """Anneal the temperature over the epochs after the warm-up."""
        first, last = self.tau_range
        span = max(1, self.epochs - self.warmup_epochs - 1)
        share = min(1.0, max(0.0, (epoch - self.warmup_epochs) / span))
        self.tau = first * (last / first) ** share
        if epoch >= self.narrow_epoch and not self.narrowed:
            self._narrow_windows()
            self.narrowed = True  # a run that is resumed within this epoch has done it

    def before_weight_step(self) -> None:
        """Sample the mixture of the next step."""
        self.supernet.sample(self.tau, self.generator, self.active)

    def wants_arch_step(self, epoch: int) -> bool:
        """θ is frozen during the warm-up."""
        return epoch >= self.warmup_epochs

    def arch_step(self, loss: Callable[[], torch.Tensor], sync: GradSync | None = None) -> dict[str, float]:
        """One step on θ and the width logits, one of dual ascent, and the windows' moves."""
        self.supernet.sample(self.tau, self.generator, self.active)
        parameters = self.supernet.arch_parameters()
        self.optimizer.zero_grad()
        ce = loss()
        expected = self.supernet.expected_cost(self._block_cost, self.fixed)
        excess = (expected / self.target).log()
        penalty = self.dual * excess + 0.5 * self.damping * excess**2
        # the weights' gradients of this pass are not wanted: differentiate by the architecture alone
        grads = torch.autograd.grad(ce.float() + penalty, parameters, allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = torch.zeros_like(parameter) if grad is None else grad
        if sync is not None:
            sync(parameters)
        self.optimizer.step()
        self.dual = max(0.0, self.dual + self.dual_lr * float(excess.detach()))
        self.expected = float(expected.detach())
        self._move_windows()
        return {"arch_loss": float(ce.detach()), "expected": self.expected, "dual": self.dual}

    def _move_windows(self) -> None:
        for block in self._prunodes():
            logits = block.width_logits
            assert logits is not None and logits.grad is not None and block.window is not None
            # a step that did not run the block counts too: with `active` the loss speaks seldom and loudly, the cost
            # always and softly, and only over all steps do they balance
            p_large = float(logits.detach().softmax(0)[1])
            if block.window.observe(p_large, float(logits.grad[1])):
                with torch.no_grad():
                    logits.zero_()
                self.optimizer.state.pop(logits, None)

    def _narrow_windows(self) -> None:
        """Put every window at its chosen width and a neighbour: what runs last is what is kept."""
        for block in self._prunodes():
            assert block.window is not None and block.width_logits is not None
            block.window.narrow()
            with torch.no_grad():
                block.width_logits.zero_()
            self.optimizer.state.pop(block.width_logits, None)

    def _prunodes(self) -> list[PrunodeBlock]:
        layers = self.supernet.stochastic_layers()
        return [block for layer in layers for block in layer.blocks().values() if block.searches_width]

    def end_epoch(self, epoch: int) -> tuple[list[PruneEvent], list[nn.Parameter]]:
        """Tiers 2 and 3: remove options that are unlikely and layers whose skip has won."""
        events: list[PruneEvent] = []
        gone: list[nn.Parameter] = []
        settled = self.warmup_epochs + math.ceil(self.settle * (self.epochs - self.warmup_epochs))
        if epoch + 1 < settled or not self.wants_arch_step(epoch):
            return events, gone
        for index, layer in enumerate(self.supernet.stochastic_layers()):
            if len(layer.options) < 2:
                continue
            p = dict(zip(layer.options, layer.probabilities().detach().cpu().tolist(), strict=True))
            if p.get(SKIP, 0.0) > self.layer_threshold:
                events.append(PruneEvent(epoch, index, "layer", SKIP, p[SKIP]))
                gone += layer.remove_layer()
                continue
            for name in [n for n in p if p[n] < self.block_kappa / len(p)]:
                what = SKIP if name == SKIP else describe_candidate(layer, name)
                events.append(PruneEvent(epoch, index, "skip" if name == SKIP else "block", what, p[name]))
                gone += layer.remove(name)
        drop_parameters(self.optimizer, gone)
        return events, gone

    def finish(self, target: float | None = None, share: float = LOWEST) -> Encoding:
        """The likeliest architecture with its widths adjusted into (share·T, T]; ``target`` stands in for T."""
        target = self.target if target is None else target
        found = self.supernet.best()
        preference: dict[tuple[int, int | None], float] = {}
        for index, layer in enumerate(self.supernet.stochastic_layers()):
            if len(layer.options):
                logp = layer.probabilities().detach().log().cpu().tolist()
                for name, value in zip(layer.options, logp, strict=True):
                    preference[index, None if name == SKIP else int(name)] = value
        return adjust_widths(self.supernet.space, self.cost, found, target, self.dual, preference, share)

    def status(self) -> dict[str, float]:
        """Expected cost, target, λ, τ, candidates left, depth."""
        return {
            "expected": self.expected,
            "target": self.target,
            "dual": self.dual,
            "tau": self.tau,
            "candidates": self.supernet.candidates_left(),
            "depth": self.supernet.depth(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Structure, windows, optimiser, dual variable, generator."""
        return {
            "structure": self.supernet.structure(),
            "windows": [[li, n, b.window.state_dict()] for li, n, b in self._windows()],
            "optimizer": self.optimizer.state_dict(),
            "dual": self.dual,
            "expected": self.expected,
            "narrowed": self.narrowed,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[nn.Parameter]:
        """Restore `state_dict`; the super-network's tensors are loaded by the caller afterwards."""
        gone = self.supernet.prune_to(state["structure"])
        drop_parameters(self.optimizer, gone)
        saved = {(li, n): s for li, n, s in state["windows"]}
        for li, name, block in self._windows():
            block.window.load_state_dict(saved[li, name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.dual, self.expected, self.narrowed = state["dual"], state["expected"], state["narrowed"]
        self.generator.set_state(state["generator"])
        return gone

    def _windows(self) -> list[tuple[int, str, Any]]:
        return [
            (index, name, block)
            for index, layer in enumerate(self.supernet.stochastic_layers())
            for name, block in layer.blocks().items()
            if block.window is not None
        ]


def describe_candidate(layer: StochasticLayer, name: str) -> str:
    """Short text of a candidate for people: ``irb k3``, ``fused_irb k5 se silu``."""
    spec = layer.layer.candidates[int(name)]
    extra = [f"se{spec.se_ratio:g}"] if spec.se_ratio else []
    return " ".join([spec.type, f"k{spec.kernel_size}", *extra, *([spec.act] if spec.act != "relu" else [])])
