"""Deformable convolution, v1 (arXiv 1703.06211) and modulated (v2, arXiv 1811.11168), by torchvision's kernels.

torchvision and mmcv lay out offsets alike (y, x of each kernel point, a deformable group after the other). They differ
in one derivative, see `_zero_outside`. How many images are unfolded at once (``im2col_step``) changes no result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

from prunet_zoo.mm.ops.precision import wide


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Write the deformable convolution into ``output``.

    Args:
        input: (B, C, H, W).
        weight: (O, C / group, kH, kW).
        offset: (B, deformable_group · kH · kW · 2, H_out, W_out) in px.
        output: (B, O, H_out, W_out), overwritten.
        columns, ones: scratch of mmcv's, not needed here.
        kW, kH: kernel.
        dW, dH: stride.
        padW, padH: zeros around the input.
        dilationW, dilationH: distance of kernel points.
        group: groups of the convolution.
        deformable_group: groups of channels with offsets of their own.
        im2col_step: images at once, without effect.
    """
    geometry = ((dH, dW), (padH, padW), (dilationH, dilationW))
    output.copy_(deform_conv2d(wide(input), wide(offset), wide(weight), None, *geometry))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Write the derivatives by input and offset of `deform_conv_forward`.

    torchvision computes all derivatives at once and mmcv asks for the weight's next, with the same ``columns``: it
    waits there, as an attribute.
    """
    geometry = (dH, dW, padH, padW, dilationH, dilationW)
    grads = _backward(gradOutput, input, weight, offset, None, geometry, group, deformable_group)
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])
    columns.weight_gradient = grads[1]  # type: ignore[attr-defined]


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add ``scale`` times the derivative by the weight of `deform_conv_forward` to ``gradWeight``."""
    gradient = columns.__dict__.pop("weight_gradient", None)
    if gradient is None:  # nobody asked for the input's derivative
        geometry = (dH, dW, padH, padW, dilationH, dilationW)
        weight = gradWeight  # its values have no part in its own derivative
        gradient = _backward(gradOutput, input, weight, offset, None, geometry, group, deformable_group)[1]
    gradWeight.add_(gradient.to(gradWeight.dtype), alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Write the modulated deformable convolution into ``output``.

    The arguments are those of `deform_conv_forward`, and ``mask`` (B, deformable_group · kernel_h · kernel_w, H_out,
    W_out), the weight of each sampled point, and ``bias`` (O,), which counts if ``with_bias``.
    """
    geometry = ((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w))
    added = wide(bias) if with_bias else None
    output.copy_(deform_conv2d(wide(input), wide(offset), wide(weight), added, *geometry, mask=wide(mask)))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Write the derivatives of `modulated_deform_conv_forward` into the tensors named ``grad_``."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    grads = _backward(grad_output, input, weight, offset, mask, geometry, group, deformable_group)
    for target, value in zip((grad_input, grad_weight, grad_offset, grad_mask), grads, strict=False):
        target.copy_(value)
    if with_bias:
        grad_bias.copy_(grads[4])


def _backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    geometry: tuple[int, int, int, int, int, int],
    groups: int,
    offset_groups: int,
) -> tuple[Tensor, ...]:
    """Derivatives by input, weight, offset, mask and bias; ``geometry``: stride, padding, dilation, each y and x."""
    grad, input, weight, offset = wide(grad), wide(input), wide(weight), wide(offset)
    modulation = input.new_zeros(input.size(0), 1) if mask is None else wide(mask)
    bias = input.new_zeros(weight.size(0))
    grads = torch.ops.torchvision._deform_conv2d_backward(
        grad, input, weight, offset, modulation, bias, *geometry, groups, offset_groups, mask is not None
    )
    _zero_outside(grads[2], offset, input.shape[2:], weight.shape[2:], geometry)
    return grads


def _zero_outside(
    gradient: Tensor,
    offset: Tensor,
    size: torch.Size,
    kernel: torch.Size,
    geometry: tuple[int, int, int, int, int, int],
) -> None:
    """Set the offset's derivative to zero where a point lies a pixel or more outside of the input, as mmcv does.

    At exactly one pixel outside the value has a kink: torchvision takes the slope towards the inside. That is no rare
    case: a padded convolution whose offsets begin at zero has all its outermost points there.
    """
    stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x = geometry
    (height, width), (kernel_y, kernel_x) = size, kernel
    rows, columns = offset.shape[2:]

    def positions(count: int, stride: int, pad: int, points: int, dilation: int) -> Tensor:
        steps = torch.arange(count, device=offset.device) * stride - pad
        return steps + torch.arange(points, device=offset.device).view(-1, 1) * dilation  # (points, count)

    grid = (offset.size(0), -1, kernel_y, kernel_x, 2, rows, columns)
    by_point = offset.view(grid)
    y = by_point[:, :, :, :, 0] + positions(rows, stride_y, pad_y, kernel_y, dilation_y).view(kernel_y, 1, rows, 1)
    x = by_point[:, :, :, :, 1] + positions(columns, stride_x, pad_x, kernel_x, dilation_x).view(kernel_x, 1, columns)
    outside = (y <= -1) | (y >= height) | (x <= -1) | (x >= width)
    gradient.view(grid).masked_fill_(outside.unsqueeze(4), 0)
