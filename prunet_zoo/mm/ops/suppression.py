"""Suppression of overlapping boxes: nms by torchvision, soft-nms and nms_match as loops over kept boxes in NumPy.

All three compute in float32, as mmcv does, so that a box on the threshold falls to the same side. Of equal scores `nms`
and `nms_match` take the first box first; mmcv leaves that to an unstable sort. Boxes are x1, y1, x2, y2 in px.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import nms as torchvision_nms

Floats = NDArray[np.float32]
NAIVE, LINEAR, GAUSSIAN = 0, 1, 2  # mmcv's numbers of soft-nms's methods


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
    rows = _with_areas(boxes, scores, offset)
    index = np.arange(kept)
    i = 0
    while i < kept:
        score = rows[i:kept, 4]
        # of equal scores the first one; a NaN (two boxes without an area) is no candidate, but stays where it stands
        best = i if np.isnan(score[0]) else i + int(np.nanargmax(score))
        rows[[i, best]], index[[i, best]] = rows[[best, i]], index[[best, i]]
        others = rows[i + 1 : kept]
        others[:, 4] *= _soft_weights(_iou(rows[i], others, offset), iou_threshold, sigma, method)
        lost = others[:, 4] < np.float32(min_score)
        if lost.any():
            kept = _close_gaps(rows, index, i + 1, lost)
        i += 1
    dets[:kept] = torch.from_numpy(rows[:kept, :5])
    return torch.from_numpy(index[:kept])


def _soft_weights(iou: Floats, threshold: float, sigma: float, method: int) -> Floats:
    if method == GAUSSIAN:
        return np.exp(-(iou * iou) / np.float32(sigma))
    fallen = 1 - iou if method == LINEAR else np.zeros_like(iou)
    return np.where(iou >= np.float32(threshold), fallen, np.float32(1))


def _close_gaps(rows: Floats, index: NDArray[np.int64], first: int, lost: NDArray[np.bool_]) -> int:
    """Drop the ``lost`` rows from ``first`` on as mmcv does: each gap is filled from the end. Returns the new count.

    The order matters: of equal scores the first one is taken next.
    """
    kept = first + int(np.count_nonzero(~lost))
    gaps = first + np.flatnonzero(lost)
    gaps = gaps[gaps < kept]
    last = first + np.flatnonzero(~lost)[::-1][: len(gaps)]
    rows[gaps], index[gaps] = rows[last], index[last]
    return kept


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Greedy suppression that says who suppressed whom.

    Args:
        dets: (N, 5), boxes and scores.
        iou_threshold: a box belongs to a better one when their IoU is at least this (`nms` wants more than this).

    Returns:
        For each kept box, best first: its index, then those of the boxes that it suppressed, best first.
    """
    order = dets[:, 4].detach().float().sort(descending=True, stable=True).indices.cpu()
    left = _with_areas(dets[:, :4].cpu()[order], dets[:, 4].cpu()[order], 0)
    index = order.numpy()
    groups = []
    while len(left):
        matched = _iou(left[0], left[1:], 0) >= np.float32(iou_threshold)
        groups.append([int(index[0]), *index[1:][matched].tolist()])
        left, index = left[1:][~matched], index[1:][~matched]
    return groups


def _with_areas(boxes: Tensor, scores: Tensor, offset: int) -> Floats:
    """Rows (N, 6): x1, y1, x2, y2, score, area."""
    corners = boxes.detach().float()
    side = corners[:, 2:] - corners[:, :2] + offset
    columns = (corners, scores.detach().float().view(-1, 1), side[:, :1] * side[:, 1:])
    return torch.cat(columns, dim=1).numpy()


def _iou(one: Floats, others: Floats, offset: int) -> Floats:
    """IoU (N,) of a row with each of N others, NaN where neither has an area."""
    near = np.maximum(one[:2], others[:, :2])
    far = np.minimum(one[2:4], others[:, 2:4])
    side = np.maximum(far - near + np.float32(offset), 0)
    inter = side[:, 0] * side[:, 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return inter / (one[5] + others[:, 5] - inter)
