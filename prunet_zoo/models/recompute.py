"""Gradient checkpointing of a block: its maps are calculated again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``block(x)`` with less memory and more time: the same result, gradients and BatchNorm statistics."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(block)

    y: torch.Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return y


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Within it BatchNorm leaves its statistics alone: the first calculation has counted the batch already."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)
