"""Small networks that show what one part of a network costs inside a network.

A block run alone pays what a network pays once: the call, and a change of memory layout at its edges. So a block is run
between a cheap 1×1 convolution from one channel and a global pooling, and the same pair without the block is
subtracted.
"""

from __future__ import annotations

import torch
from torch import nn

from prunet_zoo.models.blocks import build_block, build_stages
from prunet_zoo.models.classifier import PruNetClassifier
from prunet_zoo.models.layers import ConvNormAct, PooledHead
from prunet_zoo.space import SearchSpace
from prunet_zoo.spec import BlockSpec


class Pool(nn.Module):
    """Global average pooling as the classifier does it: (B, C, H, W) → (B, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class Probe(nn.Sequential):
    """[1×1 convolution from one channel] → part under test → [pooling]; takes (B, *in_shape)."""

    def __init__(self, *layers: nn.Module, in_shape: tuple[int, int, int]) -> None:
        super().__init__(*layers)
        self.in_shape = in_shape


def block_probe(block: BlockSpec | None, in_channels: int, in_size: tuple[int, int], bn_eps: float = 1e-3) -> Probe:
    """The probe of a block for input (in_channels, H, W); ``None`` gives the bare frame, to be subtracted."""
    middle = [] if block is None else [build_block(block, in_channels, bn_eps)]
    return Probe(ConvNormAct(1, in_channels, act=None), *middle, Pool(), in_shape=(1, *in_size))


def stem_probe(space: SearchSpace) -> Probe:
    """The stem with pooling: stands for the call itself, the input's layout change and the stem."""
    spec = space.decode(space.largest())
    stages = build_stages(spec, last=(len(space.stem) - 1, len(space.stem[-1].blocks) - 1))
    return Probe(*stages, Pool(), in_shape=(space.in_channels, space.input_size, space.input_size))


def tail_probe(space: SearchSpace) -> tuple[Probe, Probe]:
    """Tail, pooling and classifier in the frame of a probe, and the frame."""
    *_, last = space.decode(space.largest()).placed()
    channels, size = last.block.out_channels, last.out_size
    tail = ConvNormAct(channels, space.tail.out_channels, act=space.tail.act, eps=space.bn_eps)
    head = PooledHead(space.tail.out_channels, space.tail.head_hidden, space.tail.act)
    classifier = nn.Linear(space.tail.features, space.num_classes)
    probe = Probe(ConvNormAct(1, channels, act=None), tail, head, classifier, in_shape=(1, *size))
    return probe, block_probe(None, channels, size)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms random statistics and scales of ordinary size, in place: no signal dies out, none becomes denormal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                for tensor, low, high in (
                    (layer.weight, 0.5, 1.5), (layer.bias, -0.5, 0.5),
                    (layer.running_mean, -0.5, 0.5), (layer.running_var, 0.5, 1.5),
                ):  # fmt: skip
                    if tensor is not None:
                        tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))
    return module.eval()


def random_network(space: SearchSpace, encoding: tuple[tuple[int, int] | None, ...]) -> PruNetClassifier:
    """A whole network of the space with random weights."""
    network = PruNetClassifier(space.decode(encoding))
    randomise(network)
    return network
