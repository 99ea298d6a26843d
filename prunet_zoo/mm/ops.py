"""Plain torch in the place of mmcv's compiled operators, with their signatures: nms and sigmoid focal loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Greedy non-maximum suppression as mmcv's, computed by torchvision.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2 in px.
        scores: (N,).
        iou_threshold: a box goes when its IoU with a better one is greater than this.
        offset: 1 counts both end pixels (a side is x2 - x1 + 1), 0 does not.

    Returns:
        Indices (K,) of the kept boxes, best first.
    """
    from torchvision.ops import nms as torchvision_nms

    # torchvision wants one dtype for both; half precision overflows in areas and is missing on CPU
    boxes, scores = boxes.float(), scores.float()
    if offset:
        # moving the far corner by one pixel gives mmcv's areas and intersections exactly
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    # mmcv compares in single precision, torchvision with a double: an IoU of exactly 0.3 must not exceed 0.3
    return torchvision_nms(boxes, scores, torch.tensor(iou_threshold, dtype=torch.float32).item())


def _focal_parts(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return whether each (sample, class) is the target, p, log p and log(1 - p), all (N, C), in float32."""
    x = input.float()
    is_target = target.view(-1, 1) == torch.arange(x.size(1), device=x.device)
    return is_target, x.sigmoid(), F.logsigmoid(x), F.logsigmoid(-x)


def _write(output: Tensor, value: Tensor, target: Tensor, weight: Tensor) -> None:
    if weight.numel():
        # background (target == number of classes) has no weight of its own
        padded = torch.cat((weight.float(), weight.new_ones(1, dtype=torch.float32)))
        value = value * padded[target.clamp(max=weight.numel())].view(-1, 1)
    output.copy_(value)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the focal loss (arXiv 1708.02002, eq. 5, a sigmoid for each class) into ``output``.

    Args:
        input: logits (N, C).
        target: class of each sample (N,), C for background.
        weight: (C,) weights of classes, or empty.
        output: (N, C), overwritten.
        gamma: focusing exponent.
        alpha: weight of positives; 1 - alpha of negatives.
    """
    is_target, p, log_p, log_q = _focal_parts(input, target)
    loss = torch.where(is_target, -alpha * (1 - p) ** gamma * log_p, -(1 - alpha) * p**gamma * log_q)
    _write(output, loss, target, weight)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of `sigmoid_focal_loss_forward` by each logit into ``grad_input`` (N, C)."""
    is_target, p, log_p, log_q = _focal_parts(input, target)
    positive = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * log_p)
    negative = -(1 - alpha) * p**gamma * (gamma * (1 - p) * log_q - p)
    _write(grad_input, torch.where(is_target, positive, negative), target, weight)


def get_compiler_version() -> str:
    """What mmcv reports about its build."""
    return "not compiled"


def get_compiling_cuda_version() -> str:
    """What mmcv reports about its build."""
    return "not compiled"
