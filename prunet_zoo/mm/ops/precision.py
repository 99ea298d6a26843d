"""The precision that the operators compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """Half precision (float16, bfloat16) as float32, everything else as it is.

    Coordinates, areas and logarithms need more than 11 bits, and torchvision has no bfloat16 kernels. The operators
    round once, when they write their result into the tensor that mmcv gave them.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
