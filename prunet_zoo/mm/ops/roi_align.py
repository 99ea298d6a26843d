"""RoI align (Mask R-CNN, arXiv 1703.06870): each bin of a region averages, or takes the maximum of, sampled points.

RoIs are (N, 5): index of the image, then x1, y1, x2, y2 in px of the image. The average is torchvision's own operator.
The maximum takes the samples from it: with one sample a bin and as many bins as there are samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from prunet_zoo.mm.ops.precision import wide

MAX = 0  # mmcv's number of the pooling mode; 1 is the average
_SAMPLES_AT_ONCE = 1 << 24  # 64 MiB of float32


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the bins' values into ``output``.

    Args:
        input: (B, C, H, W).
        rois: (N, 5).
        output: (N, C, aligned_height, aligned_width), overwritten.
        argmax_y, argmax_x: like ``output`` if ``pool_mode`` is 0, overwritten: where the maximum was sampled, in px of
            the feature map; -1 where nothing was sampled (so a maximum at exactly -1 passes no gradient, as in mmcv).
        aligned_height, aligned_width: bins.
        spatial_scale: from px of the image to px of the feature map.
        sampling_ratio: samples a bin and axis; 0: about one a pixel.
        pool_mode: 0 for the maximum, 1 for the average.
        aligned: whether pixel centres are at half coordinates (and no RoI is blown up to one pixel).
    """
    features, regions = _same_precision(input, rois)
    bins = (aligned_height, aligned_width)
    if pool_mode != MAX:
        align = torch.ops.torchvision.roi_align
        output.copy_(align(features, regions, spatial_scale, *bins, sampling_ratio, aligned))
        return
    # a region of no size has no samples; as in the average, its bins are 0
    values = features.new_zeros(output.shape)
    where_y, where_x = (features.new_full(output.shape, -1) for _ in range(2))
    start, size = _extent(regions, spatial_scale, aligned)
    step = size / size.new_tensor(bins)
    for rows, counts in _by_samples(step, sampling_ratio, math.prod(values.shape[1:])):
        part, at = _maxima(features, regions[rows], counts, bins, spatial_scale, aligned)
        values[rows] = part
        for axis, where in enumerate((where_y, where_x)):
            number = at // counts[1] if axis == 0 else at % counts[1]
            first = torch.arange(bins[axis], device=at.device).view((-1, 1) if axis == 0 else (1, -1))
            width = step[rows, axis].view(-1, 1, 1, 1)
            where[rows] = start[rows, axis].view(-1, 1, 1, 1) + first * width + (number + 0.5) * width / counts[axis]
    output.copy_(values)
    argmax_y.copy_(where_y)
    argmax_x.copy_(where_x)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the derivative by the features into ``grad_input`` (B, C, H, W); the arguments are those of the forward."""
    grad, regions = _same_precision(grad_output, rois)
    if pool_mode == MAX:
        grad_input.copy_(_spread(grad, regions, wide(argmax_y), wide(argmax_x), grad_input.shape))
        return
    backward = torch.ops.torchvision._roi_align_backward
    bins = (aligned_height, aligned_width)
    grad_input.copy_(backward(grad, regions, spatial_scale, *bins, *grad_input.shape, sampling_ratio, aligned))


def _same_precision(features: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
    features = wide(features)
    return features, rois.to(features.dtype)


def _extent(rois: Tensor, spatial_scale: float, aligned: bool) -> tuple[Tensor, Tensor]:
    """First corner and size of the regions, each (N, 2) as y and x, in px of the feature map."""
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    start, size = corners[:, [1, 0]], corners[:, [3, 2]] - corners[:, [1, 0]]
    return start, size if aligned else size.clamp(min=1)


def _by_samples(step: Tensor, sampling_ratio: int, outputs: int) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Indices of regions with the same number of samples in y and x, not too many at once, and that number."""
    counts = torch.full_like(step, sampling_ratio) if sampling_ratio > 0 else step.ceil()
    groups, group_of = counts.long().unique(dim=0, return_inverse=True)
    for number, (y, x) in enumerate(groups.tolist()):
        if min(y, x) > 0:
            rows = (group_of == number).nonzero().view(-1)
            for part in rows.split(max(1, _SAMPLES_AT_ONCE // (outputs * y * x))):
                yield part, (y, x)


def _maxima(
    features: Tensor, rois: Tensor, counts: tuple[int, int], bins: tuple[int, int], spatial_scale: float, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Maximum of each bin and the number of its sample (row-major, the first of equal ones), each (N, C, *bins)."""
    (y, x), (height, width) = counts, bins
    align = torch.ops.torchvision.roi_align
    samples = align(features, rois, spatial_scale, height * y, width * x, 1, aligned)
    by_bin = samples.view(*samples.shape[:2], height, y, width, x).transpose(3, 4)
    found = by_bin.reshape(*by_bin.shape[:4], y * x).max(dim=4)
    return found.values, found.indices


def _spread(grad: Tensor, rois: Tensor, y: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    """Add each gradient to the four pixels around its sample at (y, x), by their bilinear weights."""
    batch, channels, height, width = shape
    inside = (y != -1) & (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y_pair, y_part = _neighbours(y.where(inside, 0), height)
    x_pair, x_part = _neighbours(x.where(inside, 0), width)
    plane = rois[:, 0].long().view(-1, 1) * channels + torch.arange(channels, device=grad.device)
    start = plane.view(*plane.shape, 1, 1) * (height * width)
    grad = grad * inside
    flat = grad.new_zeros(batch * channels * height * width)
    for row, row_part in zip(y_pair, y_part, strict=True):
        for column, column_part in zip(x_pair, x_part, strict=True):
            index = start + row * width + column
            flat.index_add_(0, index.flatten(), (grad * row_part * column_part).flatten())
    return flat.view(shape)


def _neighbours(position: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two pixels around a position along one axis, and their weights; outside, the pixel at the edge."""
    position = position.clamp(min=0, max=size - 1)
    low = position.floor()
    part = position - low
    return (low.long(), (low.long() + 1).clamp(max=size - 1)), (1 - part, part)
