"""Focal loss (arXiv 1708.02002, eq. 5) over sigmoids and over a softmax, with their derivatives.

mmcv has these for GPUs only. Its kernel computes log(max(p, 1e-38)) of a rounded p, so a confident mistake (a logit
beyond ±17) costs 87 there whatever the logit; here it costs what the formula says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prunet_zoo.mm.ops.errors import OperandError
from prunet_zoo.mm.ops.precision import wide

_TINY = torch.finfo(torch.float32).tiny  # mmcv's floor of a probability inside a logarithm


def _signed(input: Tensor, target: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logit z of the right answer, its sign and its weight for each sample and class, all (N, C).

    With z = x for the target's class and -x for the others, p = sigmoid(z) is the probability of being right, and one
    formula serves both.
    """
    x = wide(input)
    is_target = target.view(-1, 1) == torch.arange(x.size(1), device=x.device)
    sign = is_target.to(x.dtype).mul_(2).sub_(1)
    factor = torch.where(is_target, x.new_full((), alpha), x.new_full((), 1 - alpha))
    return sign * x, sign, factor


def _write(output: Tensor, value: Tensor, target: Tensor, weight: Tensor) -> None:
    if weight.numel():
        # background (target == number of classes) has no weight of its own
        padded = torch.cat((weight.to(value.dtype), value.new_ones(1)))
        value = value * padded[target.clamp(max=weight.numel())].view(-1, *[1] * (value.dim() - 1))
    output.copy_(value)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the focal loss with a sigmoid for each class into ``output``.

    Args:
        input: logits (N, C).
        target: class of each sample (N,), C for background.
        weight: (C,) weights of classes, or empty.
        output: (N, C), overwritten.
        gamma: focusing exponent.
        alpha: weight of positives; 1 - alpha of negatives.
    """
    z, _, factor = _signed(input, target, alpha)
    _write(output, -factor * torch.sigmoid(-z) ** gamma * F.logsigmoid(z), target, weight)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of `sigmoid_focal_loss_forward` by each logit into ``grad_input`` (N, C)."""
    z, sign, factor = _signed(input, target, alpha)
    q = torch.sigmoid(-z)
    # d/dz of -q^gamma log p, where q = 1 - p; exp(log p) is p
    log_p = F.logsigmoid(z)
    slope = q**gamma * (gamma * log_p.exp() * log_p - q)
    _write(grad_input, sign * factor * slope, target, weight)


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the focal loss of the target's probability into ``output``.

    Args:
        input: probabilities (N, C), already a softmax.
        target: class of each sample (N,), below C (a softmax has no background of its own); a negative one costs
            nothing.
        weight: (C,) weights of classes, or empty.
        output: (N,), overwritten.
        gamma: focusing exponent.
        alpha: weight of all samples.

    Raises:
        OperandError: a target is C or more.
    """
    p = _target_probability(input, target)
    loss = -alpha * (1 - p) ** gamma * p.clamp(min=_TINY).log()
    _write(output, loss.masked_fill(target < 0, 0), target, weight)


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of `softmax_focal_loss_forward` by each logit.

    Args:
        input: probabilities (N, C).
        target: class of each sample (N,).
        weight: (C,) weights of classes, or empty.
        buff: (N,), overwritten: the derivative by the logarithm of the target's probability.
        grad_input: (N, C), overwritten.
        gamma: focusing exponent.
        alpha: weight of all samples.
    """
    p = _target_probability(input, target)
    q = 1 - p
    slope = -(q**gamma)
    if gamma:
        # where q is 0, q^(gamma - 1) may be infinite; its product with log p = 0 is 0
        slope = slope + torch.where(q > 0, gamma * q ** (gamma - 1) * p * p.clamp(min=_TINY).log(), 0)
    _write(buff, (alpha * slope).masked_fill(target < 0, 0), target, weight)
    probability = wide(input)
    is_target = target.view(-1, 1) == torch.arange(input.size(1), device=input.device)
    grad_input.copy_(wide(buff).view(-1, 1) * (is_target.to(probability.dtype) - probability))


def _target_probability(input: Tensor, target: Tensor) -> Tensor:
    """(N,) of (N, C); of class 0 where there is no target."""
    classes = input.size(1)
    if target.numel() and (highest := int(target.max())) >= classes:
        raise OperandError(
            f"softmax_focal_loss got a target of {highest}, but {classes} logits a sample: targets are 0 to "
            f"{classes - 1}. For a background class give one logit more, for samples that are not to count a negative "
            "target (in sigmoid_focal_loss the number of classes stands for the background)."
        )
    return wide(input).gather(1, target.clamp(min=0).view(-1, 1)).view(-1)
