"""RoI pooling (Fast R-CNN, arXiv 1504.08083): the greatest pixel of each bin of a region.

torchvision's operator rounds a region to whole pixels first, mmcv's only its bins' edges (outwards), so this is plain
torch. RoIs are (N, 5): index of the image, then x1, y1, x2, y2 in px of the image, both end pixels counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunet_zoo.mm.ops.precision import wide

_PIXELS_AT_ONCE = 1 << 24  # times 4 bytes


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Write the bins' maxima into ``output`` and their places into ``argmax``.

    Args:
        input: (B, C, H, W).
        rois: (N, 5).
        output: (N, C, pooled_height, pooled_width), overwritten; 0 in a bin without a pixel.
        argmax: like ``output``, overwritten: y · W + x of the maximum, -1 in a bin without a pixel.
        pooled_height, pooled_width: bins.
        spatial_scale: from px of the image to px of the feature map.
    """
    features = wide(input)
    channels, height, width = features.shape[1:]
    regions = rois.to(features.dtype)
    y, y_count = _bins(regions[:, 2] * spatial_scale, (regions[:, 4] + 1) * spatial_scale, pooled_height, height)
    x, x_count = _bins(regions[:, 1] * spatial_scale, (regions[:, 3] + 1) * spatial_scale, pooled_width, width)
    valid = (regions[:, 3] + 1 > regions[:, 1]) & (regions[:, 4] + 1 > regions[:, 2])  # of a malformed one nothing
    values = features.new_zeros(len(rois), pooled_height, pooled_width, channels)
    places = torch.full_like(values, -1, dtype=torch.int)
    # pixels as rows of channels, and a row that is never the greatest for the places that a smaller bin leaves over
    pixels = features.permute(0, 2, 3, 1).reshape(-1, channels)
    pixels = torch.cat((pixels, pixels.new_full((1, channels), -torch.inf)))
    image = regions[:, 0].long() * (height * width)
    extents = torch.stack((y_count.amax(1), x_count.amax(1)), dim=1) * valid.view(-1, 1)
    groups, group_of = extents.unique(dim=0, return_inverse=True)
    outputs = channels * pooled_height * pooled_width
    for number, (tall, wide_) in enumerate(groups.tolist()):
        if min(tall, wide_) == 0:
            continue
        at_once = max(1, _PIXELS_AT_ONCE // (outputs * tall * wide_))
        for rows in (group_of == number).nonzero().view(-1).split(at_once):
            place = _places(y[rows], y_count[rows], tall, x[rows], x_count[rows], wide_, width)
            index = (image[rows].view(-1, 1, 1, 1) + place).where(place >= 0, len(pixels) - 1)
            found = pixels[index.flatten()].view(*index.shape, channels).max(dim=3)
            empty = (place < 0).all(dim=3, keepdim=True)
            values[rows] = found.values.masked_fill(empty, 0)
            places[rows] = place.gather(3, found.indices).masked_fill(empty, -1).int()
    output.copy_(values.permute(0, 3, 1, 2))
    argmax.copy_(places.permute(0, 3, 1, 2))


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Write the derivative by the features into ``grad_input`` (B, C, H, W): each gradient goes to its maximum."""
    channels, height, width = grad_input.shape[1:]
    grad = wide(grad_output)
    plane = rois[:, 0].long().view(-1, 1) * channels + torch.arange(channels, device=grad.device)
    index = plane.view(*plane.shape, 1, 1) * (height * width) + argmax.long().clamp(min=0)
    flat = grad.new_zeros(grad_input.numel())
    flat.index_add_(0, index.flatten(), (grad * (argmax >= 0)).flatten())
    grad_input.copy_(flat.view_as(grad_input))


def _bins(start: Tensor, end: Tensor, bins: int, size: int) -> tuple[Tensor, Tensor]:
    """First pixel and number of pixels of each bin along one axis, each (N, bins); cut off at the image's edge."""
    step = ((end - start) / bins).view(-1, 1)
    number = torch.arange(bins, device=start.device)
    first = (number * step + start.view(-1, 1)).floor().clamp(0, size).long()
    last = ((number + 1) * step + start.view(-1, 1)).ceil().clamp(0, size).long()
    return first, (last - first).clamp(min=0)


def _places(y: Tensor, y_count: Tensor, tall: int, x: Tensor, x_count: Tensor, wide_: int, width: int) -> Tensor:
    """y · width + x of the pixels of each bin (N, bins in y, bins in x, tall · wide_), -1 where it has no pixel."""
    down = torch.arange(tall, device=y.device)
    along = torch.arange(wide_, device=x.device)
    rows = (y.unsqueeze(2) + down).view(*y.shape, 1, tall, 1)
    columns = (x.unsqueeze(2) + along).view(len(x), 1, x.size(1), 1, wide_)
    has_row = (down < y_count.unsqueeze(2)).view(*y.shape, 1, tall, 1)
    has_column = (along < x_count.unsqueeze(2)).view(len(x), 1, x.size(1), 1, wide_)
    return (rows * width + columns).where(has_row & has_column, -1).flatten(3)
