"""StochasticLayer: candidate blocks and skip, mixed by Gumbel-softmax; candidates can be taken away for good."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from prunet_zoo.space import Choice, SearchLayer
from prunet_zoo.spec import BlockSpec
from prunet_zoo.supernet.prunode import PrunodeBlock
from prunet_zoo.supernet.window import WidthWindow

SKIP = "skip"
BlockCost = Callable[[BlockSpec, int, tuple[int, int]], float]
WindowFactory = Callable[[tuple[int, ...]], WidthWindow]


class StochasticLayer(nn.Module):
    """One layer of the super-network: ``y = Σ_i p_i · block_i(x)``, ``p = gumbel_softmax(θ, τ)``.

    Args:
        layer: what the space offers here.
        eps: BatchNorm eps of the network.
        make_window: makes the `WidthWindow` of a candidate from its grid of widths.

    Attributes:
        candidates: the blocks left, keyed by candidate index.
        theta: one scalar logit for each option left (candidates and ``skip``).
        hard: when set, only this choice is executed; ``None`` in it is skip.
        favoured: when set, what `best` answers: for methods that keep no θ here.
    """

    def __init__(self, layer: SearchLayer, eps: float, make_window: WindowFactory) -> None:
        super().__init__()
        self.layer = layer
        blocks = {}
        for c, spec in enumerate(layer.candidates):
            widths = layer.candidate_widths(c)
            window = make_window(widths) if spec.hidden is not None else None
            blocks[str(c)] = PrunodeBlock(spec, layer.in_channels, widths, eps, window)
        self.candidates = nn.ModuleDict(blocks)
        options = [*blocks, SKIP] if layer.skip else list(blocks)
        self.theta = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in options})
        self.hard: tuple[Choice] | None = None
        self.favoured: tuple[Choice] | None = None
        self._tau = 1.0
        self._noise: dict[str, torch.Tensor] = {}
        self._width_noise: dict[str, torch.Tensor] = {}
        self._active: list[str] | None = None

    @property
    def options(self) -> list[str]:
        """Names of the options left: candidate indices as text, and ``skip``."""
        return list(self.theta)

    def blocks(self) -> dict[str, PrunodeBlock]:
        """The candidates left, by name."""
        return dict(self.candidates.items())  # type: ignore[arg-type]

    def sample(self, tau: float, generator: torch.Generator, active: int | None = None) -> None:
        """Draw Gumbel noise for the next forward passes; with ``active`` only the best so many options are executed.

        Taking the options with the greatest perturbed logits is sampling without replacement from softmax(θ)
        (Gumbel top-k, arXiv 1903.06059), so memory does not grow with the number of candidates.
        """
        self._tau = tau
        self._noise = {name: _gumbel((), generator) for name in self.theta}
        self._width_noise = {n: _gumbel((2,), generator) for n, b in self.blocks().items() if b.searches_width}
        self._active = None
        if active is not None and active < len(self.theta):
            score = {name: float(self.theta[name].detach().cpu() + self._noise[name]) for name in self.theta}
            kept = sorted(score, key=lambda name: -score[name])[:active]
            self._active = [name for name in self.theta if name in kept]

    def probabilities(self, names: list[str] | None = None, noisy: bool = False) -> torch.Tensor:
        """softmax(θ) over ``names`` (all options by default); ``noisy``: the Gumbel-softmax sample that was drawn."""
        names = self.options if names is None else names
        logits = torch.stack([self.theta[name] for name in names])
        if noisy and self._noise:
            noise = torch.stack([self._noise[name] for name in names])
            logits = (logits + noise.to(logits.device)) / self._tau
        return logits.softmax(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.hard is not None:
            (choice,) = self.hard
            if choice is None:
                return x
            block = self.candidates[str(choice[0])]
            return block(x, width=choice[1] or None)
        names = self._active if self._active is not None else self.options
        if not names:
            return x  # the layer is gone
        if len(names) == 1:
            return self._run(names[0], x)
        p = self.probabilities(names, noisy=True)
        y = p[0] * self._run(names[0], x)
        for i in range(1, len(names)):
            y = y + p[i] * self._run(names[i], x)
        return y

    def _run(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name == SKIP:
            return x
        block = self.candidates[name]
        assert isinstance(block, PrunodeBlock)
        noise = self._width_noise.get(name)
        p_large = block.p_large(self._tau, noise.to(x.device) if noise is not None else None)
        return block(x, p_large=p_large)

    def expected_cost(self, cost: BlockCost) -> torch.Tensor:
        """Differentiable expectation of the layer's cost under softmax(θ) and the width probabilities (scalar)."""
        device = next(iter(self.theta.values())).device if len(self.theta) else torch.device("cpu")
        total = torch.zeros((), device=device)
        for p, name in zip(self.probabilities() if len(self.theta) else (), self.options, strict=True):
            if name != SKIP:
                total = total + p * self._block_cost(name, cost)
        return total

    def _block_cost(self, name: str, cost: BlockCost) -> torch.Tensor | float:
        block = self.candidates[name]
        assert isinstance(block, PrunodeBlock)
        p_large = block.p_large()
        large = self.choice_cost((int(name), block.window.large if block.window else 0), cost)
        if p_large is None or block.window is None:
            return large
        small = self.choice_cost((int(name), block.window.small), cost)
        return p_large * large + (1 - p_large) * small

    def choice_cost(self, choice: Choice, cost: BlockCost) -> float:
        """Cost of one choice here."""
        if choice is None:
            return 0.0
        return cost(self.layer.block(*choice), self.layer.in_channels, self.layer.in_size)

    def remove(self, name: str) -> list[nn.Parameter]:
        """Take an option away for good and return its parameters, so that optimisers can forget them."""
        gone = [self.theta.pop(name)]
        if name != SKIP:
            gone += list(self.candidates[name].parameters())
            del self.candidates[name]
        self._active = None
        return gone

    def remove_layer(self) -> list[nn.Parameter]:
        """Skip has won: take every block away; the layer is the identity from now on."""
        return [p for name in self.options for p in self.remove(name)]

    def best(self) -> Choice:
        """The likeliest option with its window's width; None is skip."""
        if self.favoured is not None:
            return self.favoured[0]
        if not len(self.theta):
            return None
        p = self.probabilities().detach().cpu()
        name = self.options[int(p.argmax())]
        if name == SKIP:
            return None
        block = self.candidates[name]
        assert isinstance(block, PrunodeBlock)
        return int(name), block.window.final() if block.window else 0


def _gumbel(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Standard Gumbel noise on the CPU: -log(-log U)."""
    u = torch.rand(shape, generator=generator).clamp_(1e-9, 1 - 1e-7)
    return -(-u.log()).log()


def drop_parameters(optimizer: torch.optim.Optimizer, gone: Iterable[nn.Parameter]) -> None:
    """Make an optimiser forget parameters, with their state (momentum, moments)."""
    lost = {id(p) for p in gone}
    for group in optimizer.param_groups:
        for p in [p for p in group["params"] if id(p) in lost]:
            optimizer.state.pop(p, None)
        group["params"] = [p for p in group["params"] if id(p) not in lost]
