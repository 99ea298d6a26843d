"""RoI align and RoI pool on torch, against their formulas pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("torch_ops")

# image, x1, y1, x2, y2 in px of an image twice the size of the 9 × 11 features
ROIS = torch.tensor(
    [
        [0.0, 1, 2, 15, 13],
        [1, 4.4, 3.3, 9.7, 17.9],  # the second image
        [0, -9, -7.4, 6, 5],  # partly outside
        [1, 17, 14, 40, 33],
        [0, 60, 60, 80, 80],  # wholly outside
        [0, 5, 5, 5, 5],  # a point
        [0, 6, 6, 6.8, 20],  # thin
    ],
    dtype=torch.float64,
)
SCALE, BINS = 0.5, (2, 3)


def bilinear(plane: Tensor, y: float, x: float) -> Tensor:
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return plane.new_zeros(())
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = int(y), int(x)
    value = plane.new_zeros(())
    for row, row_part in ((top, 1 - (y - top)), (min(top + 1, height - 1), y - top)):
        for column, part in ((left, 1 - (x - left)), (min(left + 1, width - 1), x - left)):
            value = value + plane[row, column] * row_part * part
    return value


def loop_align(features: Tensor, rois: Tensor, ratio: int, mode: str, aligned: bool) -> Tensor:
    shift = 0.5 if aligned else 0.0
    result = []
    for image, *corners in rois.tolist():
        x1, y1, x2, y2 = (corner * SCALE - shift for corner in corners)
        width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
        step_y, step_x = height / BINS[0], width / BINS[1]
        count_y, count_x = (ratio, ratio) if ratio > 0 else (math.ceil(step_y), math.ceil(step_x))
        for plane in features[int(image)]:
            for i in range(BINS[0]):
                for j in range(BINS[1]):
                    samples = [
                        bilinear(
                            plane, y1 + (i + (a + 0.5) / count_y) * step_y, x1 + (j + (b + 0.5) / count_x) * step_x
                        )
                        for a in range(count_y)
                        for b in range(count_x)
                    ] or [plane.new_zeros(())]
                    stacked = torch.stack(samples)
                    result.append(stacked[stacked.argmax()] if mode == "max" else stacked.mean())
    return torch.stack(result).view(len(rois), -1, *BINS)


def loop_pool(features: Tensor, rois: Tensor) -> Tensor:
    height, width = features.shape[2:]
    result = []
    for image, *corners in rois.tolist():
        x1, y1, x2, y2 = corners[0] * SCALE, corners[1] * SCALE, (corners[2] + 1) * SCALE, (corners[3] + 1) * SCALE
        step_y, step_x = (y2 - y1) / BINS[0], (x2 - x1) / BINS[1]
        for plane in features[int(image)]:
            for i in range(BINS[0]):
                for j in range(BINS[1]):
                    rows = slice(
                        min(max(math.floor(i * step_y + y1), 0), height),
                        min(max(math.ceil((i + 1) * step_y + y1), 0), height),
                    )
                    columns = slice(
                        min(max(math.floor(j * step_x + x1), 0), width),
                        min(max(math.ceil((j + 1) * step_x + x1), 0), width),
                    )
                    pixels = plane[rows, columns]
                    empty = step_x <= 0 or step_y <= 0 or not pixels.numel()
                    result.append(plane.new_zeros(()) if empty else pixels.flatten()[pixels.argmax()])
    return torch.stack(result).view(len(rois), -1, *BINS)


def random_features(device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 9, 11, generator=generator, dtype=torch.float64).to(device).requires_grad_()


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_roi_align_is_the_formula(ratio: int, mode: str, aligned: bool, device: str) -> None:
    from mmcv.ops import RoIAlign

    features, rois = random_features(device), ROIS.to(device)
    ours = RoIAlign(BINS, SCALE, ratio, mode, aligned)(features, rois)
    expected = loop_align(features, ROIS, ratio, mode, aligned)
    torch.testing.assert_close(ours, expected)
    weights = torch.rand(ours.shape, dtype=ours.dtype).to(device)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), features)
    (true,) = torch.autograd.grad((expected * weights).sum(), features)
    torch.testing.assert_close(gradient, true)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_gradcheck(ratio: int, mode: str) -> None:
    from mmcv.ops import roi_align

    assert torch.autograd.gradcheck(
        lambda x: roi_align(x, ROIS, BINS, SCALE, ratio, mode, True), random_features(), nondet_tol=1e-12
    )


def test_roi_pool_is_the_formula(device: str) -> None:
    from mmcv.ops import RoIPool

    reversed_ = torch.tensor([[1.0, 12, 4, 7, 9], [0, 3, 3, 9, 1]], dtype=torch.float64)  # x2 < x1 - 1: malformed
    rois = torch.cat((ROIS, reversed_))
    features = random_features(device)
    ours = RoIPool(BINS, SCALE)(features, rois.to(device))
    expected = loop_pool(features, rois)
    torch.testing.assert_close(ours, expected)
    assert not ours[-2:].any() and not ours[4].any()
    weights = torch.rand(ours.shape, dtype=ours.dtype).to(device)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), features)
    (true,) = torch.autograd.grad((expected * weights).sum(), features)
    torch.testing.assert_close(gradient, true)


def test_roi_pool_gradcheck() -> None:
    from mmcv.ops import roi_pool

    assert torch.autograd.gradcheck(lambda x: roi_pool(x, ROIS, BINS, SCALE), random_features())


def test_of_equal_maxima_the_first_gets_the_gradient() -> None:
    from mmcv.ops import roi_align, roi_pool

    features = torch.ones(1, 1, 4, 4, requires_grad=True)
    roi = torch.tensor([[0.0, 0, 0, 3, 3]])
    (gradient,) = torch.autograd.grad(roi_pool(features, roi, 1, 1.0).sum(), features)
    assert gradient.nonzero().tolist() == [[0, 0, 0, 0]]
    (gradient,) = torch.autograd.grad(roi_align(features, roi, 1, 1.0, 3, "max", False).sum(), features)
    # samples at ½, 1½, 2½
    assert gradient[0, 0, :2, :2].tolist() == [[0.25, 0.25], [0.25, 0.25]] and float(gradient.sum()) == 1


def test_a_maximum_at_minus_one_passes_no_gradient_as_in_mmcv() -> None:
    from mmcv.ops import roi_align

    features = torch.ones(1, 1, 4, 4, requires_grad=True)
    for mode, expected in (("max", 0.0), ("avg", 1.0)):
        # one sample, at y = -1: on the feature map's rim, but also mmcv's mark of "nothing sampled"
        result = roi_align(features, torch.tensor([[0.0, 0, -2, 2, 0]]), 1, 1.0, 1, mode, False)
        assert float(result) == 1 and float(torch.autograd.grad(result.sum(), features)[0].sum()) == expected


@pytest.mark.parametrize("layer", ["avg", "max", "pool"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(layer: str, dtype: torch.dtype, device: str) -> None:
    from mmcv.ops import RoIAlign, RoIPool

    make = RoIPool(BINS, SCALE) if layer == "pool" else RoIAlign(BINS, SCALE, 2, layer)
    features = random_features(device).detach().to(dtype)
    rois = ROIS.to(device, dtype)
    half, single = features.clone().requires_grad_(), features.float().requires_grad_()
    ours, expected = make(half, rois), make(single, rois.float())
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, expected.to(dtype), rtol=0, atol=0)
    ours.sum().backward()
    expected.sum().backward()
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad, single.grad.to(dtype), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("layer", ["avg", "max", "pool"])
def test_no_rois(layer: str, device: str) -> None:
    from mmcv.ops import RoIAlign, RoIPool

    make = RoIPool(7, 0.25) if layer == "pool" else RoIAlign(7, 0.25, 0, layer)
    features = torch.rand(2, 3, 8, 8, device=device, requires_grad=True)
    result = make(features, torch.zeros(0, 5, device=device))
    assert result.shape == (0, 3, 7, 7)
    result.sum().backward()
    assert not features.grad.any()


@pytest.mark.parametrize("layer", ["avg", "max", "pool"])
def test_many_regions_in_parts_are_the_same(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmcv.ops import RoIAlign, RoIPool

    make = RoIPool(BINS, SCALE) if layer == "pool" else RoIAlign(BINS, SCALE, 0, layer)
    features = random_features()
    whole = make(features, ROIS)
    monkeypatch.setattr("prunet_zoo.mm.ops.roi_align._SAMPLES_AT_ONCE", 1)
    monkeypatch.setattr("prunet_zoo.mm.ops.roi_pool._PIXELS_AT_ONCE", 1)
    assert torch.equal(make(features, ROIS), whole)


def test_a_gradient_that_is_not_contiguous() -> None:
    from mmcv.ops import roi_pool

    features = random_features()
    result = roi_pool(features, ROIS, BINS, SCALE)
    weights = torch.rand(3, 2, 2, len(ROIS), dtype=torch.float64).permute(3, 1, 2, 0)  # (N, 2, 2, 3)
    (ours,) = torch.autograd.grad(result, features, weights, retain_graph=True)
    (expected,) = torch.autograd.grad(result, features, weights.contiguous())
    assert torch.equal(ours, expected)


def test_mmdets_extractor_needs_no_switch() -> None:
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

    extractor = SingleRoIExtractor(dict(type="RoIAlign", output_size=7, sampling_ratio=0), 4, [4, 8])
    levels = [torch.rand(1, 4, 16, 16), torch.rand(1, 4, 8, 8)]
    assert extractor(levels, torch.tensor([[0.0, 4, 4, 40, 40], [0, 0, 0, 300, 300]])).shape == (2, 4, 7, 7)
