"""Multi-scale deformable attention on a GPU; on a CPU mmcv itself takes the torch formula that is used here."""

from __future__ import annotations

import torch
from torch import Tensor

from prunet_zoo.mm.ops.precision import wide


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Attention to a few points of each level (Deformable DETR, arXiv 2010.04159, eq. 3).

    Args:
        value: (B, sum of H · W, heads, D).
        value_spatial_shapes: (levels, 2), H and W.
        value_level_start_index: (levels,), follows from the shapes.
        sampling_locations: (B, queries, heads, levels, points, 2), x and y in [0, 1].
        attention_weights: (B, queries, heads, levels, points).
        im2col_step: images at once, without effect.

    Returns:
        (B, queries, heads · D).
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    shapes = value_spatial_shapes.tolist()  # once, not one wait for the GPU a number
    output = multi_scale_deformable_attn_pytorch(wide(value), shapes, wide(sampling_locations), wide(attention_weights))
    return output.to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the derivatives by values, locations and weights of `ms_deform_attn_forward` into ``grad_…``."""
    inputs = [wide(t).detach().requires_grad_() for t in (value, sampling_locations, attention_weights)]
    with torch.enable_grad():
        output = ms_deform_attn_forward(
            inputs[0], value_spatial_shapes, value_level_start_index, inputs[1], inputs[2], im2col_step
        )
    grads = torch.autograd.grad(output, inputs, wide(grad_output))
    for target, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        target.copy_(gradient)
