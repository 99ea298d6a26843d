"""nms, soft-nms, nms_match and batched_nms on torch, against mmcv's loops written out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prunet_zoo.mm import ops
from prunet_zoo.mm.ops import suppression

pytestmark = pytest.mark.usefixtures("torch_ops")
F32 = np.float32

# small integer corners, so that boxes touch, cover each other and lie exactly on thresholds; scores tie
box = st.tuples(st.integers(0, 14), st.integers(0, 14), st.integers(0, 9), st.integers(0, 9))
scored = st.lists(st.tuples(box, st.integers(0, 12)), max_size=16)
examples = settings(max_examples=120, deadline=None)


@contextmanager
def rows_at_once(count: int) -> Iterator[None]:
    """IoUs computed for so few boxes at once that the few of a test take several turns."""
    before, suppression._ROWS_AT_ONCE = suppression._ROWS_AT_ONCE, count
    try:
        yield
    finally:
        suppression._ROWS_AT_ONCE = before


def arrays(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    boxes = np.array([(x, y, x + w, y + h) for (x, y, w, h), _ in rows], F32).reshape(-1, 4)
    return boxes, np.array([score for _, score in rows], F32) / F32(12)


def iou(a: np.ndarray, b: np.ndarray, offset: int) -> np.float32:
    w = max(F32(0), min(a[2], b[2]) - max(a[0], b[0]) + F32(offset))
    h = max(F32(0), min(a[3], b[3]) - max(a[1], b[1]) + F32(offset))
    areas = [(c[2] - c[0] + F32(offset)) * (c[3] - c[1] + F32(offset)) for c in (a, b)]
    with np.errstate(all="ignore"):
        return w * h / (areas[0] + areas[1] - w * h)


def loop_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float, offset: int) -> list[int]:
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        if not any(iou(boxes[k], boxes[i], offset) > F32(threshold) for k in kept):
            kept.append(int(i))
    return kept


def loop_match(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[list[int]]:
    groups: list[list[int]] = []
    for i in np.argsort(-scores, kind="stable"):
        for group in groups:
            if iou(boxes[group[0]], boxes[i], 0) >= F32(threshold):
                group.append(int(i))
                break
        else:
            groups.append([int(i)])
    return groups


def loop_soft(
    boxes: np.ndarray, scores: np.ndarray, threshold: float, sigma: float, lowest: float, method: str, offset: int
) -> list[tuple[int, float]]:
    """mmcv's loop with its swaps: they decide which of equal scores comes first."""
    left = [[i, boxes[i], F32(scores[i])] for i in range(len(boxes))]
    i = 0
    while i < len(left):
        best = i
        for j in range(i + 1, len(left)):
            if left[j][2] > left[best][2]:
                best = j
        left[i], left[best] = left[best], left[i]
        j = i + 1
        while j < len(left):
            overlap = iou(left[i][1], left[j][1], offset)
            weight = F32(1)
            if method == "gaussian":
                weight = np.exp(-(overlap * overlap) / F32(sigma))
            elif overlap >= F32(threshold):
                weight = F32(0) if method == "naive" else F32(1) - overlap
            left[j][2] = left[j][2] * weight
            if left[j][2] < F32(lowest):
                left[j] = left[-1]
                left.pop()
            else:
                j += 1
        i += 1
    return [(index, float(score)) for index, _, score in left]


@examples
@given(scored, st.sampled_from([0.0, 0.3, 0.5, 0.9]), st.sampled_from([0, 1]))
@example([((0, 0, 1, 1), 9), ((0, 0, 1, 8), 8)], 0.3, 1)  # an IoU of 4/18 and, next, one of exactly 0.3
@example([((0, 0, 3, 1), 9), ((0, 0, 10, 1), 8)], 0.3, 0)
@example([((3, 3, 0, 0), 9), ((3, 3, 0, 0), 8)], 0.0, 0)  # 0 / 0: both stay
def test_nms_is_the_loop(rows: Any, threshold: float, offset: int) -> None:
    boxes, scores = arrays(rows)
    kept = ops.nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold, offset)
    assert kept.tolist() == loop_nms(boxes, scores, threshold, offset)


@examples
@given(scored, st.sampled_from([0.0, 0.3, 0.5, 0.9]), st.sampled_from([2, 3, 64]))
@example([((0, 0, 1, 2), 9), ((0, 0, 2, 2), 8)], 0.5, 64)  # on the threshold: together, where nms keeps both
def test_nms_match_is_the_loop(rows: Any, threshold: float, at_once: int) -> None:
    boxes, scores = arrays(rows)
    with rows_at_once(at_once):
        groups = ops.nms_match(torch.from_numpy(np.c_[boxes, scores]), threshold)
    assert groups == loop_match(boxes, scores, threshold)
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))


@examples
@given(
    scored,
    st.sampled_from([0.1, 0.3, 0.5]),
    st.sampled_from([0.0, 1e-3, 0.2]),
    st.sampled_from(["naive", "linear", "gaussian"]),
    st.sampled_from([0, 1]),
    st.sampled_from([2, 3, 64]),
)
@example([((0, 0, 9, 9), 12), ((0, 0, 9, 8), 6), ((0, 0, 9, 7), 6), ((12, 12, 2, 2), 6)], 0.3, 0.2, "naive", 0, 64)
@example([((3, 3, 0, 0), 9), ((3, 3, 0, 0), 8), ((3, 3, 1, 1), 7)], 0.3, 1e-3, "gaussian", 0, 2)
def test_soft_nms_is_the_loop(
    rows: Any, threshold: float, lowest: float, method: str, offset: int, at_once: int
) -> None:
    boxes, scores = arrays(rows)
    dets = torch.full((len(rows), 5), -1.0)
    number = ["naive", "linear", "gaussian"].index(method)
    given_ = (torch.from_numpy(boxes), torch.from_numpy(scores))
    with rows_at_once(at_once):
        inds = ops.softnms(*given_, dets, threshold, 0.5, lowest, number, offset)
    expected = loop_soft(boxes, scores, threshold, 0.5, lowest, method, offset)
    assert inds.tolist() == [index for index, _ in expected]
    np.testing.assert_allclose(dets[: len(inds), 4], [score for _, score in expected], rtol=1e-6)
    assert torch.equal(dets[: len(inds), :4], torch.from_numpy(boxes)[inds])


def test_nms_through_mmcv(device: str) -> None:
    from mmcv.ops import nms

    boxes = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [0, 0, 10, 11]], device=device)
    scores = torch.tensor([0.5, 0.6, 0.7], device=device)
    dets, kept = nms(boxes, scores, 0.5)
    assert kept.tolist() == [2, 1]  # the touching box stays
    assert dets.shape == (2, 5) and dets.device.type == kept.device.type == device
    assert nms(boxes, scores, 0.5, score_threshold=0.65)[1].tolist() == [2]
    assert nms(boxes, scores, 0.5, max_num=1)[1].tolist() == [2]
    assert nms(boxes[:0], scores[:0], 0.5)[1].numel() == 0
    assert nms(boxes[:1], scores[:1], 0.5)[1].tolist() == [0]
    arrays_of_numpy = nms(boxes.cpu().numpy(), scores.cpu().numpy(), 0.5)
    assert all(isinstance(part, np.ndarray) for part in arrays_of_numpy)


def test_offset_decides_for_adjacent_pixels() -> None:
    boxes, scores = torch.tensor([[0.0, 0, 0, 9], [0, 0, 1, 9]]), torch.tensor([0.9, 0.8])
    # with the offset the widths are 1 and 2 px: IoU ½; without it the first box has no area
    assert ops.nms(boxes, scores, 0.45, offset=1).tolist() == [0]
    assert ops.nms(boxes, scores, 0.45, offset=0).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype, device: str) -> None:
    from mmcv.ops import nms, nms_match, soft_nms

    # areas of 160 000 px² overflow half precision
    boxes = torch.tensor([[0.0, 0, 400, 400], [0, 0, 400, 384], [512, 512, 896, 896]], device=device, dtype=dtype)
    scores = torch.tensor([0.75, 0.875, 0.5], device=device, dtype=dtype)
    dets, kept = nms(boxes, scores, 0.5)
    assert kept.tolist() == [1, 2] and dets.dtype == dtype
    dets, kept = soft_nms(boxes, scores, method="naive")
    assert kept.tolist() == [1, 2] and dets.dtype == dtype
    assert [g.tolist() for g in nms_match(torch.cat((boxes, scores[:, None]), 1), 0.5)] == [[1, 0], [2]]


def test_soft_nms_through_mmcv(device: str) -> None:
    from mmcv.ops import soft_nms

    boxes = torch.tensor([[4.0, 3, 5, 3], [4, 3, 5, 4], *[[3.0, 1, 3, 1]] * 4], device=device)
    scores = torch.tensor([0.9, 0.9, 0.5, 0.5, 0.4, 0.0], device=device, requires_grad=True)
    dets, kept = soft_nms(boxes, scores, iou_threshold=0.6, sigma=0.5)
    assert len(dets) == len(kept) == 5 and dets.device.type == device  # the example of mmcv's documentation
    for count in (0, 1):
        dets, kept = soft_nms(boxes[:count], scores[:count])
        assert kept.tolist() == list(range(count)) and dets.shape == (count, 5)
    assert all(isinstance(part, np.ndarray) for part in soft_nms(boxes.cpu().numpy(), scores.detach().cpu().numpy()))


def test_nms_match_through_mmcv(device: str) -> None:
    from mmcv.ops import nms_match

    dets = torch.tensor([[0.0, 0, 10, 10, 0.5], [0, 0, 10, 9, 0.9], [20, 20, 30, 30, 0.7]], device=device)
    assert [group.tolist() for group in nms_match(dets, 0.5)] == [[1, 0], [2]]
    assert nms_match(dets[:0], 0.5) == []
    assert [group.tolist() for group in nms_match(dets[:1].cpu().numpy(), 0.5)] == [[0]]


@pytest.mark.parametrize("type_", ["nms", "soft_nms"])
@pytest.mark.parametrize("split", [False, True])
def test_batched_nms_keeps_classes_apart(type_: str, split: bool, device: str) -> None:
    """The same boxes in each class give each class's own result, in one go and beyond ``split_thr`` class by class."""
    from mmcv.ops import batched_nms, nms, soft_nms

    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 60, (240, 2), generator=generator).float()
    boxes = torch.cat((corner, corner + torch.randint(1, 30, (240, 2), generator=generator)), 1).to(device)
    scores = torch.rand(240, generator=generator).to(device)
    labels = torch.randint(0, 3, (240,), generator=generator).to(device)
    config = {"type": type_, "iou_threshold": 0.5, **({"split_thr": 100} if split else {})}
    dets, kept = batched_nms(boxes, scores, labels, config)
    expected: dict[int, float] = {}
    for label in range(3):
        mine = (labels == label).nonzero().view(-1)
        alone, chosen = (nms if type_ == "nms" else soft_nms)(boxes[mine], scores[mine], iou_threshold=0.5)
        expected |= dict(zip(mine[chosen].tolist(), alone[:, 4].tolist(), strict=True))
    assert dict(zip(kept.tolist(), dets[:, 4].tolist(), strict=True)) == pytest.approx(expected)
    assert dets[:, 4].tolist() == sorted(dets[:, 4].tolist(), reverse=True)
    # (of no boxes at all mmcv itself cannot tell the classes apart; mmdet does not ask)
    none, kept = batched_nms(boxes[:0], scores[:0], labels[:0], config, class_agnostic=True)
    assert none.shape == (0, 5) and kept.numel() == 0


def test_more_than_ten_thousand_boxes_are_split() -> None:
    from mmcv.ops import batched_nms

    torch.manual_seed(0)
    corner = torch.rand(10_500, 2) * 500
    boxes, scores = torch.cat((corner, corner + 20), 1), torch.rand(10_500)
    labels = torch.randint(0, 20, (10_500,))
    config = {"type": "nms", "iou_threshold": 0.5}
    dets, kept = batched_nms(boxes, scores, labels, config)
    whole, together = batched_nms(boxes, scores, labels, {**config, "split_thr": 20_000})
    # (shifting the classes apart rounds the corners, so a box on the threshold may fall to the other side)
    assert len(set(kept.tolist()) ^ set(together.tolist())) <= 0.001 * len(kept)
    assert len(dets) == len(kept) and len(whole) == len(together) and len(kept) < 10_500


def test_soft_nms_of_a_thousand_boxes_is_fast() -> None:
    torch.manual_seed(0)
    corner = torch.rand(1000, 2) * 300
    boxes, scores = torch.cat((corner, corner + 10 + torch.rand(1000, 2) * 90), 1), torch.rand(1000)
    start = time.process_time()
    ops.softnms(boxes, scores, torch.empty(1000, 5), 0.3, 0.5, 0.0, 2, 0)
    assert time.process_time() - start < 0.3
