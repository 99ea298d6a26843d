"""Deformable convolutions on torchvision, against the formula point by point; masked convolution."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prunet_zoo.mm.ops.errors import OperandError

pytestmark = pytest.mark.usefixtures("torch_ops")

GEOMETRIES = [  # stride, padding, dilation, groups, deformable groups
    (1, 0, 1, 1, 1),
    (1, 1, 1, 1, 1),
    (2, 1, 1, 2, 1),
    ((1, 2), (2, 1), (2, 1), 1, 2),
    (1, 1, 1, 2, 4),
]


def pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def sample(plane: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear value; zero beyond the rim. The part inside a pixel carries the derivative by the position."""
    height, width = plane.shape
    if not (-1 < y.item() < height and -1 < x.item() < width):
        return plane.new_zeros(())
    top, left = math.floor(y.item()), math.floor(x.item())
    value = plane.new_zeros(())
    for row, row_part in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, part in ((left, 1 - (x - left)), (left + 1, x - left)):
            if 0 <= row < height and 0 <= column < width:
                value = value + plane[row, column] * row_part * part
    return value


def formula(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]
) -> Tensor:
    stride, pad, dilation = (pair(g) for g in geometry[:3])
    groups, deform_groups = geometry[3:]
    batch, channels = x.shape[:2]
    out, per_group, kh, kw = weight.shape
    rows, columns = offset.shape[2:]
    result = x.new_zeros(batch, out, rows, columns).tolist()
    for b, o, i, j in itertools.product(range(batch), range(out), range(rows), range(columns)):
        total = x.new_zeros(()) if bias is None else bias[o]
        for c, k, m in itertools.product(range(per_group), range(kh), range(kw)):
            channel = (o // (out // groups)) * per_group + c
            deform = channel // (channels // deform_groups)
            point = (deform * kh + k) * kw + m
            y = i * stride[0] - pad[0] + k * dilation[0] + offset[b, 2 * point, i, j]
            z = j * stride[1] - pad[1] + m * dilation[1] + offset[b, 2 * point + 1, i, j]
            value = sample(x[b, channel], y, z) * weight[o, c, k, m]
            total = total + (value if mask is None else value * mask[b, point, i, j])
        result[b][o][i][j] = total
    flat = [result[b][o][i][j] for b in range(batch) for o in range(out) for i in range(rows) for j in range(columns)]
    return torch.stack(flat).view(batch, out, rows, columns)


def inputs(geometry: tuple[Any, ...], modulated: bool, scale: float = 1.5) -> list[Tensor]:
    """x, offset, mask, weight, bias: small and random, in float64; without modulation x, offset, weight."""
    generator = torch.Generator().manual_seed(0)
    stride, pad, dilation = (pair(g) for g in geometry[:3])
    groups, deform_groups = geometry[3:]
    size, kernel = (5, 6), (3, 2)
    out = [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, p, d, k, t in zip(size, pad, dilation, kernel, stride, strict=True)
    ]
    points = deform_groups * kernel[0] * kernel[1]
    shapes = [(2, 4, *size), (2, 2 * points, *out), (2, points, *out), (2, 4 // groups, *kernel), (2,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[1] *= scale
    tensors[2] = tensors[2].sigmoid()
    return [t.requires_grad_() for t in (tensors if modulated else [tensors[0], tensors[1], tensors[3]])]


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_is_the_formula(geometry: tuple[Any, ...], modulated: bool, device: str) -> None:
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    tensors = inputs(geometry, modulated)
    moved = [t.to(device) for t in tensors]
    ours = (modulated_deform_conv2d if modulated else deform_conv2d)(*moved, *geometry)
    x, offset, *rest = tensors
    mask, weight, bias = rest if modulated else (None, rest[0], None)
    expected = formula(x, offset, mask, weight, bias, geometry)
    torch.testing.assert_close(ours.cpu(), expected)
    direction = torch.rand_like(expected)
    gradients = torch.autograd.grad(ours, tensors, direction.to(device))
    for gradient, true in zip(gradients, torch.autograd.grad(expected, tensors, direction), strict=True):
        torch.testing.assert_close(gradient, true)


@pytest.mark.parametrize("modulated", [False, True])
def test_gradcheck(modulated: bool) -> None:
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    function = modulated_deform_conv2d if modulated else deform_conv2d
    geometry = GEOMETRIES[2]
    assert torch.autograd.gradcheck(lambda *t: function(*t, *geometry), inputs(geometry, modulated), nondet_tol=1e-12)


@pytest.mark.parametrize("modulated", [False, True])
def test_offsets_of_zero_are_a_convolution(modulated: bool) -> None:
    """And a padded one's points outside pass no gradient to the offsets, though the slope inwards is not zero."""
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    geometry = GEOMETRIES[1]
    tensors = inputs(geometry, modulated, scale=0.0)
    if modulated:
        tensors[2] = torch.ones_like(tensors[2], requires_grad=True)
    ours = (modulated_deform_conv2d if modulated else deform_conv2d)(*tensors, *geometry)
    bias = tensors[4] if modulated else None
    torch.testing.assert_close(
        ours, torch.nn.functional.conv2d(tensors[0], tensors[-2 if modulated else -1], bias, 1, 1)
    )
    (gradient,) = torch.autograd.grad(ours.sum(), tensors[1])
    first_row_of_kernel = gradient.view(2, 3, 2, 2, *gradient.shape[2:])[:, 0]
    assert not first_row_of_kernel[..., 0, :].any() and first_row_of_kernel[..., 1, :].any()


def test_weight_alone_can_be_trained() -> None:
    from mmcv.ops import deform_conv2d

    x, offset, weight = inputs(GEOMETRIES[1], False)
    (together,) = torch.autograd.grad(deform_conv2d(x, offset, weight, *GEOMETRIES[1]).sum(), weight)
    alone = deform_conv2d(x.detach(), offset.detach(), weight, *GEOMETRIES[1])
    assert torch.equal(torch.autograd.grad(alone.sum(), weight)[0], together)


def test_a_second_backward_is_the_second_gradients() -> None:
    """The weight's derivative that waits between mmcv's two calls is taken once."""
    from mmcv.ops import deform_conv2d

    tensors = inputs(GEOMETRIES[1], False)
    result = deform_conv2d(*tensors, *GEOMETRIES[1])
    one = torch.autograd.grad(result, tensors, torch.ones_like(result), retain_graph=True)
    two = torch.autograd.grad(result, tensors, 2 * torch.ones_like(result))
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(second, 2 * first)


@pytest.mark.parametrize("im2col_step", [1, 2, 32])
def test_im2col_step_changes_nothing(im2col_step: int) -> None:
    from mmcv.ops import deform_conv2d

    tensors = inputs(GEOMETRIES[0], False)
    expected = deform_conv2d(*tensors, *GEOMETRIES[0])
    assert torch.equal(deform_conv2d(*tensors, *GEOMETRIES[0], False, im2col_step), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("modulated", [False, True])
def test_half_precision(modulated: bool, dtype: torch.dtype, device: str) -> None:
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    function = modulated_deform_conv2d if modulated else deform_conv2d
    halves = [t.detach().to(device, dtype).requires_grad_() for t in inputs(GEOMETRIES[1], modulated)]
    singles = [t.detach().float().requires_grad_() for t in halves]
    ours, expected = (function(*tensors, *GEOMETRIES[1]) for tensors in (halves, singles))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, expected.to(dtype))
    ours.sum().backward()
    expected.sum().backward()
    for half, single in zip(halves, singles, strict=True):
        torch.testing.assert_close(half.grad, single.grad.to(dtype), rtol=0.02, atol=0.02)


def test_layers_of_mmcv(device: str) -> None:
    """The modules that configs name, also under autocast, where the offsets come in another precision."""
    from mmcv.cnn import build_conv_layer

    torch.manual_seed(0)
    x = torch.rand(2, 4, 8, 8, device=device)
    plain = torch.nn.Conv2d(4, 6, 3, padding=1, bias=False).to(device)
    for type_, factor in (("DCN", 1.0), ("DCNv2", 0.5)):  # DCNv2's weights of points begin at sigmoid(0)
        layer = build_conv_layer(dict(type=type_, deform_groups=2), 4, 6, 3, padding=1, bias=False).to(device)
        layer.weight.data.copy_(plain.weight)
        torch.testing.assert_close(layer(x), factor * plain(x))
        with torch.autocast(device, dtype=torch.bfloat16):
            mixed = layer(x)
        assert mixed.dtype == torch.bfloat16
        mixed.sum().backward()
        assert layer.weight.grad.dtype == torch.float32 and torch.isfinite(layer.conv_offset.weight.grad).all()


@pytest.mark.parametrize(("kernel", "pad"), [(3, 1), (1, 0), (5, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masked_conv_is_the_convolution_at_the_mask(kernel: int, pad: int, dtype: torch.dtype, device: str) -> None:
    from mmcv.ops import MaskedConv2d

    torch.manual_seed(0)
    layer = MaskedConv2d(3, 4, kernel, padding=pad).to(device, dtype).eval()
    x = torch.rand(1, 3, 7, 9, device=device).to(dtype)
    mask = torch.rand(1, 7, 9, device=device) > 0.6
    with torch.no_grad():
        torch.testing.assert_close(layer(x, mask), layer(x) * mask, rtol=2e-3, atol=2e-3)
        assert not layer(x, torch.zeros_like(mask)).any()


def test_a_mask_beyond_the_output_is_refused(device: str) -> None:
    from mmcv.ops import MaskedConv2d

    layer, x = MaskedConv2d(3, 4, 3).to(device).eval(), torch.rand(1, 3, 7, 9, device=device)
    mask = torch.ones(1, 7, 9, dtype=torch.bool, device=device)
    with pytest.raises(OperandError, match=r"mask marks row 6, but the output has 5 x 7 positions.*padding="):
        layer(x, mask)
    mask[:, 5:] = False
    with pytest.raises(OperandError, match="mask marks column 8"):
        layer(x, mask)
    mask[:, :, 7:] = False
    with torch.no_grad():
        torch.testing.assert_close(layer(x, mask), layer(x))
