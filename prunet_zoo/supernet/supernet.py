"""SuperNet: all networks of a `SearchSpace` in one module, from which any of them can be derived with its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from prunet_zoo.errors import SpecError
from prunet_zoo.models.blocks import build_block, build_stages
from prunet_zoo.models.layers import ConvNormAct, PooledHead, init_weights
from prunet_zoo.space import Choice, Encoding, SearchSpace
from prunet_zoo.spec import NetSpec
from prunet_zoo.supernet.prunode import PrunodeBlock
from prunet_zoo.supernet.stochastic import BlockCost, StochasticLayer, WindowFactory
from prunet_zoo.supernet.window import WidthWindow


class SuperNet(nn.Module):
    """Stem, stochastic layers, tail, pooling, classifier. Image (B, C, H, W) → logits (B, num_classes).

    Args:
        space: the search space.
        make_window: makes a candidate's `WidthWindow` from its grid; the default rule when None.

    Raises:
        SpecError: the space is not additive: its layers' input channels depend on each other's choices.
    """

    def __init__(self, space: SearchSpace, make_window: WindowFactory | None = None) -> None:
        super().__init__()
        space.require_additive("a super-network")
        self.space = space
        stem = NetSpec(
            input_size=space.input_size, in_channels=space.in_channels, stages=space.stem, tail=space.tail,
            bn_eps=space.bn_eps,
        )  # fmt: skip
        self.stem = build_stages(stem)
        self.layers = nn.ModuleList(
            StochasticLayer(layer, space.bn_eps, make_window or WidthWindow) for layer in space.layers
        )
        tail = space.tail
        self.tail = ConvNormAct(space.layers[-1].out_channels, tail.out_channels, act=tail.act, eps=space.bn_eps)
        self.head = PooledHead(tail.out_channels, tail.head_hidden, tail.act)
        self.classifier = nn.Linear(tail.features, space.num_classes)
        init_weights(self)

    def stochastic_layers(self) -> list[StochasticLayer]:
        """The searchable layers, in order."""
        return list(self.layers)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stem:
            x = stage(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.head(self.tail(x)))

    def arch_parameters(self) -> list[nn.Parameter]:
        """Architecture parameters: the options' and the widths' logits that are left."""
        found: list[nn.Parameter] = []
        for layer in self.stochastic_layers():
            found += list(layer.theta.values())
            found += [b.width_logits for b in layer.blocks().values() if b.width_logits is not None]
        return found

    def weight_parameters(self) -> list[nn.Parameter]:
        """All parameters that are not architecture parameters."""
        arch = {id(p) for p in self.arch_parameters()}
        return [p for p in self.parameters() if id(p) not in arch]

    def sample(self, tau: float, generator: torch.Generator, active: int | None = None) -> None:
        """Draw the Gumbel noise of one step in every layer, see `StochasticLayer.sample`."""
        for layer in self.stochastic_layers():
            layer.sample(tau, generator, active)

    def expected_cost(self, cost: BlockCost, fixed: float) -> torch.Tensor:
        """Differentiable expected cost of the network (scalar): ``fixed`` + that of each layer."""
        total = torch.as_tensor(fixed, device=self.classifier.weight.device)
        for layer in self.stochastic_layers():
            total = total + layer.expected_cost(cost)
        return total

    def set_hard(self, encoding: Sequence[Choice] | None) -> None:
        """Execute exactly this architecture from now on; None goes back to the mixture."""
        if encoding is None:
            for layer in self.stochastic_layers():
                layer.hard = None
            return
        self.space.decode(encoding)  # raises SpecError where the space does not have it
        for layer, choice in zip(self.stochastic_layers(), encoding, strict=True):
            if choice is not None and str(choice[0]) not in layer.candidates:
                raise SpecError(f"layer {layer.layer.index}: candidate {choice[0]} was pruned")
            layer.hard = (choice,)

    def favour(self, encoding: Sequence[Choice]) -> None:
        """Make this architecture what `best` answers."""
        for layer, choice in zip(self.stochastic_layers(), encoding, strict=True):
            layer.favoured = (choice,)

    def best(self) -> Encoding:
        """The likeliest choice of every layer."""
        return tuple(layer.best() for layer in self.stochastic_layers())

    def derive(self, encoding: Sequence[Choice], name: str) -> tuple[NetSpec, dict[str, torch.Tensor]]:
        """Return the network of a choice a layer, and its weights: leading slices of the super-network's.

        A block that was pruned from the super-network (a width adjustment may bring one back) gets fresh weights.
        """
        spec = self.space.decode(encoding, name)
        state = {f"stages.{k}": v for k, v in self.stem.state_dict().items()}
        for end in ("tail", "head", "classifier"):
            state |= {f"{end}.{k}": v for k, v in self.get_submodule(end).state_dict().items()}
        position: dict[int, int] = {}
        for layer, choice in zip(self.stochastic_layers(), encoding, strict=True):
            if choice is None:
                continue
            stage = layer.layer.stage
            index = position.get(stage, 0)
            position[stage] = index + 1
            state |= {f"stages.{stage}.{index}.{k}": v for k, v in self._inherit(layer, choice).items()}
        return spec, {k: v.detach().cpu().clone() for k, v in state.items()}

    def missing(self, encoding: Sequence[Choice]) -> list[int]:
        """Layers whose choice was pruned, so that `derive` cannot give it weights."""
        layers = zip(self.stochastic_layers(), encoding, strict=True)
        return [i for i, (layer, c) in enumerate(layers) if c is not None and str(c[0]) not in layer.candidates]

    def _inherit(self, layer: StochasticLayer, choice: tuple[int, int]) -> dict[str, torch.Tensor]:
        block = build_block(layer.layer.block(*choice), layer.layer.in_channels, self.space.bn_eps)
        init_weights(block)
        wanted = block.state_dict()
        if str(choice[0]) not in layer.candidates:
            return wanted
        source = layer.candidates[str(choice[0])]
        assert isinstance(source, PrunodeBlock)
        full = source.block.state_dict()
        return {k: full[k][tuple(slice(n) for n in v.shape)] for k, v in wanted.items()}

    def structure(self) -> list[list[str]]:
        """Options left in each layer, enough to give a fresh super-network the same shape."""
        return [layer.options for layer in self.stochastic_layers()]

    def prune_to(self, structure: Sequence[Sequence[str]]) -> list[nn.Parameter]:
        """Remove what ``structure`` (from `structure`) lacks; returns the parameters that went."""
        gone: list[nn.Parameter] = []
        for layer, keep in zip(self.stochastic_layers(), structure, strict=True):
            for name in [n for n in layer.options if n not in keep]:
                gone += layer.remove(name)
        return gone

    def candidates_left(self) -> int:
        """Candidate blocks left in all layers."""
        return sum(len(layer.candidates) for layer in self.stochastic_layers())

    def depth(self) -> int:
        """Layers that are not the identity in the likeliest network."""
        return sum(choice is not None for choice in self.best())
