"""Convolution at the masked positions only (guided anchoring, arXiv 1901.03278): mmcv unfolds, multiplies and folds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prunet_zoo.mm.ops.errors import OperandError


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Write the windows around the masked positions into ``col``.

    Args:
        im: (1, C, H, W).
        mask_h_idx, mask_w_idx: row and column of each position (M,).
        col: (C · kernel_h · kernel_w, M), overwritten.
        kernel_h, kernel_w: window.
        pad_h, pad_w: zeros around the image.
    """
    padded = F.pad(im[0], (pad_w, kernel_w - 1, pad_h, kernel_h - 1))
    rows = mask_h_idx + torch.arange(kernel_h, device=im.device).view(-1, 1, 1)
    columns = mask_w_idx + torch.arange(kernel_w, device=im.device).view(-1, 1)
    col.copy_(padded[:, rows, columns].view_as(col))  # (C, kernel_h, kernel_w, M)


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Write the columns (channels, M) to their positions of ``im`` (1, channels, height, width).

    Raises:
        OperandError: a position lies outside of ``im``.
    """
    for axis, index, size in (("row", mask_h_idx, height), ("column", mask_w_idx, width)):
        if index.numel() and (last := int(index.max())) >= size:
            raise OperandError(
                f"masked_conv2d: the mask marks {axis} {last}, but the output has {height} x {width} positions. A mask "
                "has the input's size, and the output must have it, too: give padding=(kernel_size - 1) // 2, or mark "
                "positions of the output only."
            )
    im.view(channels, height, width)[:, mask_h_idx, mask_w_idx] = col
