"""Multi-scale deformable attention as mmcv calls it on a GPU, against the formula point by point."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("torch_ops")

SHAPES = [(3, 4), (2, 2)]
BATCH, HEADS, DIM, QUERIES, POINTS = 2, 2, 3, 3, 2


def inputs() -> list[Tensor]:
    """Values, sampling locations and attention weights, in float64."""
    generator = torch.Generator().manual_seed(0)
    keys = sum(h * w for h, w in SHAPES)
    value = torch.randn(BATCH, keys, HEADS, DIM, generator=generator, dtype=torch.float64)
    places = (BATCH, QUERIES, HEADS, len(SHAPES), POINTS)
    locations = torch.rand(*places, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3  # some outside
    weights = torch.rand(places, generator=generator, dtype=torch.float64)
    return [value.requires_grad_(), locations.requires_grad_(), weights.requires_grad_()]


def formula(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Eq. 3 of the paper: a weighted sum of bilinear samples, zero outside."""
    result = []
    for b in range(BATCH):
        for q in range(QUERIES):
            for head in range(HEADS):
                total, start = value.new_zeros(DIM), 0
                for level, (height, width) in enumerate(SHAPES):
                    plane = value[b, start : start + height * width, head].view(height, width, DIM)
                    start += height * width
                    for point in range(POINTS):
                        x = locations[b, q, head, level, point, 0] * width - 0.5
                        y = locations[b, q, head, level, point, 1] * height - 0.5
                        top, left = math.floor(y.item()), math.floor(x.item())
                        for row, row_part in ((top, 1 - (y - top)), (top + 1, y - top)):
                            for column, part in ((left, 1 - (x - left)), (left + 1, x - left)):
                                if 0 <= row < height and 0 <= column < width:
                                    factor = weights[b, q, head, level, point] * row_part * part
                                    total = total + plane[row, column] * factor
                result.append(total)
    return torch.stack(result).view(BATCH, QUERIES, HEADS * DIM)


def on_gpu(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """What `MultiScaleDeformableAttention` calls for tensors on a GPU."""
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    shapes = torch.tensor(SHAPES, device=value.device)
    starts = torch.tensor([0, SHAPES[0][0] * SHAPES[0][1]], device=value.device)
    return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)


def test_is_the_formula(device: str) -> None:
    tensors = inputs()
    ours, expected = on_gpu(*(t.to(device) for t in tensors)), formula(*tensors)
    torch.testing.assert_close(ours.cpu(), expected)
    direction = torch.rand_like(expected)
    gradients = torch.autograd.grad(ours, tensors, direction.to(device))
    for gradient, true in zip(gradients, torch.autograd.grad(expected, tensors, direction), strict=True):
        torch.testing.assert_close(gradient, true)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(on_gpu, inputs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, device: str) -> None:
    """Under autocast the values are half, the locations single precision: mmcv casts them to the values'."""
    value, locations, weights = (t.detach().to(device) for t in inputs())
    half = value.to(dtype).requires_grad_()
    ours = on_gpu(half, locations.float(), weights.float())
    expected = on_gpu(half.detach().float(), locations.to(dtype).float(), weights.to(dtype).float())
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, expected.to(dtype))
    ours.sum().backward()
    assert half.grad.dtype == dtype and torch.isfinite(half.grad).all()


def test_the_layer_is_the_same_on_both(device: str) -> None:
    from mmcv.ops import MultiScaleDeformableAttention

    torch.manual_seed(0)
    layer = MultiScaleDeformableAttention(embed_dims=16, num_heads=2, num_levels=2, num_points=2, dropout=0.0)
    layer.init_weights()
    keys = sum(h * w for h, w in SHAPES)
    query, value = torch.rand(3, 1, 16), torch.rand(keys, 1, 16)
    common = {"reference_points": torch.rand(1, 3, 2, 2), "spatial_shapes": torch.tensor(SHAPES)}
    starts = torch.tensor([0, 12])
    expected = layer(query, value=value, level_start_index=starts, **common)
    ours = layer.to(device)(
        query.to(device),
        value=value.to(device),
        level_start_index=starts.to(device),
        **{name: t.to(device) for name, t in common.items()},
    )
    torch.testing.assert_close(ours.cpu(), expected)
