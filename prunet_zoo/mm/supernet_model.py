"""SuperNetClassifier: the super-network as an MMEngine model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import nn

from prunet_zoo.registry import MODELS, register
from prunet_zoo.space import SearchSpace, load_space
from prunet_zoo.supernet import SuperNet


@register(MODELS)
class SuperNetClassifier(BaseModel):
    """Super-network of a search space with a cross-entropy loss.

    It is not wrapped in DistributedDataParallel, whose bookkeeping does not survive blocks being removed: gradients are
    averaged over processes by `average_gradients`.

    Args:
        space: listed name, JSON path, dict or `SearchSpace`.
        num_classes: classes of the data; None takes the space's.
        label_smoothing: of the loss of the weights (the architecture's loss has none).
        data_preprocessor: as in MMEngine.
    """

    def __init__(
        self,
        space: str | Path | dict[str, Any] | SearchSpace,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        data_preprocessor: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        resolved = load_space(space)
        if num_classes is not None:
            resolved = resolved.replace(num_classes=num_classes)
        self.supernet = SuperNet(resolved)
        self.label_smoothing = label_smoothing

    def forward(self, inputs: torch.Tensor, label: torch.Tensor | None = None, mode: str = "tensor") -> Any:
        """Logits for 'tensor', a dict with ``loss`` and ``acc`` (percent) for 'loss', classes for 'predict'.

        inputs: (B, C, H, W) normalised images; label: (B,) class indices.
        """
        logits = self.supernet(inputs)
        if mode == "tensor":
            return logits
        if mode == "predict":
            return logits.argmax(1)
        if label is None:
            raise ValueError("mode 'loss' needs the labels of the batch")
        loss = F.cross_entropy(logits.float(), label, label_smoothing=self.label_smoothing)
        return {"loss": loss, "acc": accuracy(logits, label)}

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, torch.Tensor]:
        """One step of the weights; gradients are averaged over processes before it."""
        with optim_wrapper.optim_context(self):
            batch = self.data_preprocessor(data, True)
            losses = self(batch["inputs"], batch["label"], mode="loss")
        loss, log_vars = self.parse_losses(losses)
        optim_wrapper.backward(optim_wrapper.scale_loss(loss))
        average_gradients(p for group in optim_wrapper.optimizer.param_groups for p in group["params"])
        if optim_wrapper.should_update():
            optim_wrapper.step()
            optim_wrapper.zero_grad()
        return log_vars

    def arch_loss(self, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the mixture on a batch of the architecture's part, and its accuracy (percent)."""
        batch = self.data_preprocessor(data, True)
        logits = self.supernet(batch["inputs"]).float()
        return F.cross_entropy(logits, batch["label"]), accuracy(logits, batch["label"])


def accuracy(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Top-1 accuracy of a batch in percent (scalar)."""
    return (logits.detach().argmax(1) == label).float().mean() * 100


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over all processes of the default group; does nothing in a single process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        if p.grad is None:  # an option that this step did not sample: it takes part so that all processes agree
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 0
    for p in parameters:
        p.grad.copy_(flat[start : start + p.numel()].view_as(p))  # type: ignore[union-attr]
        start += p.numel()


def average_buffers(module: nn.Module) -> None:
    """Average floating-point buffers (BatchNorm statistics) over all processes."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    for buffer in module.buffers():
        if buffer.dtype.is_floating_point:
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()
