"""BatchNorm recalibration: statistics of a derived network measured anew on training images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """Replace the running statistics of every BatchNorm by the mean over ``batches`` of images (B, C, H, W).

    The momentum is 1/n for the n-th batch (cumulative average), as in "Rethinking BatchNorm in BatchNorm"
    (arXiv 2105.07576, §3). Mode, momentum and weights of the model are left as they were.

    Returns:
        Number of batches used; 0 leaves the statistics untouched.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    saved = [(m.momentum, m.training) for m in norms]
    training, used = model.training, 0
    device = next(model.parameters()).device
    model.eval()
    try:
        for images in batches:
            if not used:
                for m in norms:
                    m.reset_running_stats()
                    m.momentum, m.training = None, True
            model(images.to(device))
            used += 1
    finally:
        model.train(training)
        for m, (momentum, was_training) in zip(norms, saved, strict=True):
            m.momentum, m.training = momentum, was_training
    return used
