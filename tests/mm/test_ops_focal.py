"""Focal losses on torch, against autograd through the published formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prunet_zoo.mm.ops.errors import OperandError

pytestmark = pytest.mark.usefixtures("torch_ops")


def sample(classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, classes, generator=generator, dtype=torch.float64).mul(4).requires_grad_()
    return logits, torch.randint(0, classes, (12,), generator=generator)


def sigmoid_formula(logits: Tensor, target: Tensor, gamma: float, alpha: float, weight: Tensor | None) -> Tensor:
    """(N, C); eq. 5 of the paper, term by term."""
    classes = logits.size(1)
    is_target = F.one_hot(target, classes + 1)[:, :classes].bool()
    p = torch.where(is_target, logits.sigmoid(), 1 - logits.sigmoid())
    a = torch.where(is_target, alpha, 1 - alpha)
    factor = 1.0 if weight is None else torch.cat((weight, torch.ones(1)))[target].view(-1, 1)
    return -a * (1 - p) ** gamma * p.log() * factor


def softmax_formula(logits: Tensor, target: Tensor, gamma: float, alpha: float, weight: Tensor | None) -> Tensor:
    """(N,)."""
    p = logits.softmax(1)[torch.arange(len(target)), target]
    factor = 1.0 if weight is None else weight[target]
    return -alpha * (1 - p) ** gamma * p.log() * factor


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_sigmoid_focal_loss_is_the_formula(gamma: float, reduction: str, weighted: bool, device: str) -> None:
    from mmcv.ops import sigmoid_focal_loss

    logits, target = sample()
    target[:3] = 5  # background
    weight = torch.rand(5, dtype=torch.float64) if weighted else None
    moved = None if weight is None else weight.to(device)
    ours = sigmoid_focal_loss(logits.to(device), target.to(device), gamma, 0.1, moved, reduction)
    expected = sigmoid_formula(logits, target, gamma, 0.1, weight)
    expected = {"none": expected, "sum": expected.sum(), "mean": expected.sum() / 12}[reduction]
    torch.testing.assert_close(ours.cpu(), expected)
    (gradient,) = torch.autograd.grad(ours.sum(), logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])  # (of "none" mmcv itself cannot take the derivative)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_softmax_focal_loss_is_the_formula(gamma: float, reduction: str, weighted: bool, device: str) -> None:
    from mmcv.ops import softmax_focal_loss

    logits, target = sample()
    weight = torch.rand(5, dtype=torch.float64) if weighted else None
    moved = None if weight is None else weight.to(device)
    ours = softmax_focal_loss(logits.to(device), target.to(device), gamma, 0.1, moved, reduction)
    expected = softmax_formula(logits, target, gamma, 0.1, weight)
    expected = expected.sum() if reduction == "sum" else expected.mean()
    torch.testing.assert_close(ours.cpu(), expected)
    (gradient,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("name", ["sigmoid_focal_loss", "softmax_focal_loss"])
def test_gradcheck(name: str) -> None:
    import mmcv.ops

    logits, target = sample()
    assert torch.autograd.gradcheck(lambda x: getattr(mmcv.ops, name)(x, target, 2.0, 0.25, None, "sum"), logits)


def test_mmdets_loss_on_a_gpu_is_its_loss_on_a_cpu() -> None:
    """mmdet calls mmcv's operator on GPUs only, and a formula of its own elsewhere: both must train alike."""
    from mmcv.ops import sigmoid_focal_loss
    from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss

    logits, target = sample()
    ours = sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    torch.testing.assert_close(ours, py_sigmoid_focal_loss(logits, F.one_hot(target, 5), reduction="none"))


def test_confident_mistakes_cost_what_they_should() -> None:
    from mmcv.ops import sigmoid_focal_loss

    logits = torch.tensor([[-200.0, 30.0], [200.0, -300.0]], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([0, 0]), 2.0, 0.25, None, "none")
    torch.testing.assert_close(loss, torch.tensor([[0.25 * 200, 0.75 * 30], [0.0, 0.0]]))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.75], [0.0, 0.0]]))


def test_a_certain_softmax_has_a_finite_derivative() -> None:
    from mmcv.ops import softmax_focal_loss

    for gamma in (0.0, 0.5, 1.0, 2.0):
        logits = torch.tensor([[200.0, 0], [200, 0], [0, 0]], requires_grad=True)
        loss = softmax_focal_loss(logits, torch.tensor([0, 1, -1]), gamma, 1.0, None, "sum")
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
        assert not logits.grad[[0, 2]].any()  # certain and right; no target


def test_a_softmax_has_no_background_class() -> None:
    from mmcv.ops import sigmoid_focal_loss, softmax_focal_loss

    logits, target = sample()
    target[4] = 5  # the background of sigmoid_focal_loss
    assert sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "sum").isfinite()
    for weight in (None, torch.rand(5, dtype=torch.float64)):
        with pytest.raises(OperandError, match=r"target of 5, but 5 logits a sample: targets are 0 to 4\. .*negative"):
            softmax_focal_loss(logits, target, 2.0, 0.25, weight, "sum")


@pytest.mark.parametrize("name", ["sigmoid_focal_loss", "softmax_focal_loss"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype, device: str) -> None:
    import mmcv.ops

    logits, target = sample()
    half = logits.detach().to(device, dtype).requires_grad_()
    single = half.detach().float().requires_grad_()
    loss = getattr(mmcv.ops, name)
    ours, expected = (loss(x, target.to(device), 2.0, 0.25, None, "sum") for x in (half, single))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), expected, rtol=0.02, atol=0.02)
    ours.backward()
    expected.backward()
    torch.testing.assert_close(half.grad.float(), single.grad, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", ["sigmoid_focal_loss", "softmax_focal_loss"])
def test_no_samples(name: str) -> None:
    from prunet_zoo.mm import ops

    empty, target = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    output = torch.zeros(0, 3) if name.startswith("sigmoid") else torch.zeros(0)
    getattr(ops, f"{name}_forward")(empty, target, torch.zeros(0), output, 2.0, 0.25)
    buffer = [] if name.startswith("sigmoid") else [torch.zeros(0)]
    getattr(ops, f"{name}_backward")(empty, target, torch.ones(3), *buffer, torch.zeros(0, 3), 2.0, 0.25)
