"""SearchModel: what a search trains, as an MMEngine model; the loss of its weights and averages over processes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import nn

from prunet_zoo.search.strategy import SearchNet


class SearchModel(BaseModel):
    """A network that is searched in, with a cross-entropy loss.

    It is not wrapped in DistributedDataParallel, whose bookkeeping does not survive blocks being removed: gradients are
    averaged over processes by `average_gradients`.

    Args:
        label_smoothing: of the loss of the weights (the architecture's loss has none).
        data_preprocessor: as in MMEngine.

    Attributes:
        penalty: a term of the strategy's that is added to the loss of a weight step, see `SearchStrategy.penalty`.
        arch_in_weight_step: whether the strategy uses the gradients that a weight step leaves on the architecture's
            parameters.
        trained: whether its weights are those of a trained network.
    """

    trained = False

    def __init__(self, label_smoothing: float = 0.0, data_preprocessor: dict[str, Any] | None = None) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.label_smoothing = label_smoothing
        self.penalty: Callable[[], torch.Tensor | None] = _no_penalty
        self.arch_in_weight_step = False

    @property
    @abstractmethod
    def searched(self) -> SearchNet:
        """What the strategy searches in, a module too: images (B, C, H, W) → logits (B, num_classes)."""

    def init_weights(self) -> None:
        """Nothing: the network was initialised, or loaded, when it was built."""

    def forward(self, inputs: torch.Tensor, label: torch.Tensor | None = None, mode: str = "tensor") -> Any:
        """Logits for 'tensor', a dict with ``loss`` and ``acc`` (percent) for 'loss', classes for 'predict'.

        inputs: (B, C, H, W) normalised images; label: (B,) class indices.
        """
        logits = self.searched(inputs)  # type: ignore[operator]
        if mode == "tensor":
            return logits
        if mode == "predict":
            return logits.argmax(1)
        if label is None:
            raise ValueError("mode 'loss' needs the labels of the batch")
        loss = F.cross_entropy(logits.float(), label, label_smoothing=self.label_smoothing)
        return {"loss": loss, "acc": accuracy(logits, label)}

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, torch.Tensor]:
        """One step of the weights; gradients are averaged over processes before it.

        The gradients that the step leaves on the architecture's parameters are the strategy's to use; with AMP they are
        divided by the loss scale, as the weights' are.
        """
        with optim_wrapper.optim_context(self):
            batch = self.data_preprocessor(data, True)
            losses = self(batch["inputs"], batch["label"], mode="loss")
        penalty = self.penalty()
        if penalty is not None:
            losses["penalty_loss"] = penalty  # whatever has "loss" in its name is summed; "loss" stays cross-entropy
        loss, log_vars = self.parse_losses(losses)
        optim_wrapper.backward(optim_wrapper.scale_loss(loss))
        arch = [p for p in self.searched.arch_parameters() if p.requires_grad] if self.arch_in_weight_step else []
        weights = [p for group in optim_wrapper.optimizer.param_groups for p in group["params"]]
        average_gradients([*weights, *arch])
        _unscale(arch, optim_wrapper)
        if optim_wrapper.should_update():
            optim_wrapper.step()
            optim_wrapper.zero_grad()
        return log_vars

    def arch_loss(self, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy on a batch of the architecture's part, and its accuracy (percent)."""
        batch = self.data_preprocessor(data, True)
        logits = self.searched(batch["inputs"]).float()  # type: ignore[operator]
        return F.cross_entropy(logits, batch["label"]), accuracy(logits, batch["label"])


def _no_penalty() -> None:
    return None


def _unscale(parameters: Iterable[nn.Parameter], optim_wrapper: OptimWrapper) -> None:
    """Undo AMP's loss scale; a gradient that overflowed counts as none, as the weights' step is left out then."""
    scaler = getattr(optim_wrapper, "loss_scaler", None)
    if scaler is None:
        return
    scale = scaler.get_scale()
    for p in parameters:
        if p.grad is not None:
            p.grad = (p.grad / scale).nan_to_num(0.0, 0.0, 0.0)


def accuracy(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Top-1 accuracy of a batch in percent (scalar)."""
    return (logits.detach().argmax(1) == label).float().mean() * 100


def is_alone() -> bool:
    """Whether this is the only process of the run."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over all processes of the default group; does nothing in a single process."""
    if is_alone():
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
    if is_alone():
        return
    for buffer in module.buffers():
        if buffer.dtype.is_floating_point:
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


def average_figure(figure: float) -> float:
    """The mean of a figure over all processes; each of them must ask."""
    if is_alone():
        return figure
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    value = torch.tensor(figure, dtype=torch.float64, device=device)
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


def send_tensors(module: nn.Module) -> None:
    """Give all processes the first one's parameters and buffers."""
    if is_alone():
        return
    for tensor in [*module.parameters(), *module.buffers()]:
        dist.broadcast(tensor.detach(), 0)
