"""Suppression of overlapping boxes: nms by torchvision, soft-nms and nms_match as loops over kept boxes in NumPy.

The loops find the IoUs that they need ready, computed for many boxes at once.

All three compute in float32, as mmcv does, so that a box on the threshold falls to the same side. Of equal scores `nms`
and `nms_match` take the first box first; mmcv leaves that to an unstable sort. Boxes are x1, y1, x2, y2 in px.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import nms as torchvision_nms

Floats = NDArray[np.float32]
NAIVE, LINEAR, GAUSSIAN = 0, 1, 2  # mmcv's numbers of soft-nms's methods
_ROWS_AT_ONCE = 64  # boxes whose IoUs with all others are computed together: few, so that they stay in the cache


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: (N, 4).
        scores: (N,).
        iou_threshold: a box goes when its IoU with a better one is greater than this.
        offset: 1 counts both end pixels (a side is x2 - x1 + 1), 0 does not.

    Returns:
        Indices (K,) of the kept boxes, best first.
    """
    boxes, scores = boxes.float(), scores.float()
    if offset:
        # moving the far corner by one pixel gives mmcv's sides, up to the rounding of their sum
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    # mmcv compares in single precision, torchvision with a double: an IoU of exactly 0.3 must not exceed 0.3
    return torchvision_nms(boxes, scores, torch.tensor(iou_threshold, dtype=torch.float32).item())


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (arXiv 1704.04503): the best box in turn; the scores of the others fall by their IoU with it.

    Args:
        boxes: (N, 4).
        scores: (N,).
        dets: (N, 5); the first K rows are overwritten with boxes and their new scores.
        iou_threshold: of `NAIVE` and `LINEAR`; a smaller IoU leaves a score as it is.
        sigma: of `GAUSSIAN`: a score is multiplied by exp(-IoU² / sigma).
        min_score: boxes whose score falls below are dropped.
        method: 0 (zero above the threshold), 1 (linear) or 2 (Gaussian).
        offset: 1 counts both end pixels, 0 does not.

    Returns:
        Indices (K,) of the boxes in ``dets``, best first.
    """
    kept = len(boxes)
    columns = _columns(boxes, offset)
    left = scores.detach().float().cpu().numpy().copy()  # the score at each place
    index = np.arange(kept)  # the box at each place
    weights: dict[int, Floats] = {}  # of some boxes: what their choice leaves of each other score
    lowest = np.float32(min_score)
    for i in itertools.count():
        if i >= kept:
            break
        best = _best_place(left, i, kept)
        left[i], left[best] = left[best], left[i]
        index[i], index[best] = index[best], index[i]
        box = int(index[i])
        if box not in weights:
            likely = _likely_next(left[i:kept], index[i:kept])
            iou = _iou(columns[:, likely, None], columns[:, None], offset)
            weights = dict(zip(likely.tolist(), _soft_weights(iou, iou_threshold, sigma, method), strict=True))
        others = left[i + 1 : kept]
        others *= weights[box][index[i + 1 : kept]]
        lost = others < lowest
        if lost.any():
            kept = _close_gaps(left, index, i + 1, lost)
    order = torch.from_numpy(index[:kept])
    dets[:kept, :4] = boxes.detach().cpu()[order]
    dets[:kept, 4] = torch.from_numpy(left[:kept])
    return order


def _best_place(left: Floats, first: int, end: int) -> int:
    """Place of the best score from ``first`` on: of equal ones the first.

    A NaN (of two boxes without an area) is no candidate, but stays where it stands.
    """
    best = first + int(left[first:end].argmax())  # the place of a NaN where there is one
    if np.isnan(left[best]):
        return first if np.isnan(left[first]) else first + int(np.nanargmax(left[first:end]))
    return best


def _likely_next(left: Floats, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first box and those with the best scores now: most of them will be the next ones chosen."""
    if len(left) <= _ROWS_AT_ONCE:
        return index.copy()
    best = np.argpartition(-left[1:], _ROWS_AT_ONCE - 2)[: _ROWS_AT_ONCE - 1]  # NaN last
    return np.concatenate((index[:1], index[1:][best]))


def _soft_weights(iou: Floats, threshold: float, sigma: float, method: int) -> Floats:
    if method == GAUSSIAN:
        return np.exp(-(iou * iou) / np.float32(sigma))
    fallen = 1 - iou if method == LINEAR else np.zeros_like(iou)
    return np.where(iou >= np.float32(threshold), fallen, np.float32(1))


def _close_gaps(left: Floats, index: NDArray[np.int64], first: int, lost: NDArray[np.bool_]) -> int:
    """Drop the ``lost`` places from ``first`` on as mmcv does: each gap is filled from the end. Returns the new count.

    The order matters: of equal scores the first one is taken next.
    """
    kept = first + int(np.count_nonzero(~lost))
    gaps = first + np.flatnonzero(lost)
    gaps = gaps[gaps < kept]
    last = first + np.flatnonzero(~lost)[::-1][: len(gaps)]
    left[gaps], index[gaps] = left[last], index[last]
    return kept


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Greedy suppression that says who suppressed whom.

    Args:
        dets: (N, 5), boxes and scores.
        iou_threshold: a box belongs to a better one when their IoU is at least this (`nms` wants more than this).

    Returns:
        For each kept box, best first: its index, then those of the boxes that it suppressed, best first.
    """
    order = dets[:, 4].detach().float().sort(descending=True, stable=True).indices
    columns = _columns(dets[order, :4], 0)
    left = order.cpu().numpy()
    groups = []
    while len(left):
        rows = min(len(left), _ROWS_AT_ONCE)
        matched = _iou(columns[:, :rows, None], columns[:, None], 0) >= np.float32(iou_threshold)
        free = np.ones(len(left), np.bool_)
        for i in range(rows):
            if free[i]:
                mine = matched[i]
                mine &= free
                mine[: i + 1] = False
                groups.append([int(left[i]), *left[mine].tolist()])
                free ^= mine
        free[:rows] = False
        left, columns = left[free], columns[:, free]
    return groups


def _columns(boxes: Tensor, offset: int) -> Floats:
    """x1, y1, x2, y2 and area, (5, N)."""
    corners = boxes.detach().float().cpu()
    side = corners[:, 2:] - corners[:, :2] + offset
    return torch.cat((corners.T, (side[:, 0] * side[:, 1])[None])).contiguous().numpy()


def _iou(some: Floats, others: Floats, offset: int) -> Floats:
    """IoU of `_columns` that broadcast to each other, NaN where neither box has an area."""
    width = np.minimum(some[2], others[2])
    width -= np.maximum(some[0], others[0])
    height = np.minimum(some[3], others[3])
    height -= np.maximum(some[1], others[1])
    for side in (width, height):
        if offset:
            side += np.float32(offset)
        np.maximum(side, 0, out=side)
    inter = np.multiply(width, height, out=width)
    union = np.add(some[4], others[4], out=height)
    union -= inter
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.divide(inter, union, out=union)
