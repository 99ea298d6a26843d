"""MMEngine's epoch loop that resumes exactly, also from a checkpoint taken within an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from mmengine.runner import EpochBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader, Sampler

from prunet_zoo.registry import LOOPS, register


class SkipBatches(Sampler[list[int]]):
    """A batch sampler that leaves out its first ``skip`` batches once, without loading their samples."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.skip = batches, 0

    @property
    def sampler(self) -> Sampler[int]:
        """The sampler within, which MMEngine's hooks give the epoch to."""
        return self.batches.sampler

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        for i, batch in enumerate(self.batches):
            if i >= skip:
                yield batch

    def __len__(self) -> int:
        return len(self.batches)


def skip_batches(loader: DataLoader[Any], count: int) -> None:
    """Make the next iterator of ``loader`` start ``count`` batches later."""
    if count and not isinstance(loader.batch_sampler, SkipBatches):
        # DataLoader refuses the assignment, since workers may hold the old one; here none has started yet
        object.__setattr__(loader, "batch_sampler", SkipBatches(loader.batch_sampler))
    if isinstance(loader.batch_sampler, SkipBatches):
        loader.batch_sampler.skip = count


@register(LOOPS)
class ResumableEpochLoop(EpochBasedTrainLoop):
    """`EpochBasedTrainLoop` (same arguments) that continues where a checkpoint was taken, to the step.

    A checkpoint whose ``iter`` lies within an epoch continues with that epoch's next batch: the shuffled order of an
    epoch depends on seed and epoch alone. A validation that the stopped run still owed is made first.
    """

    resumes_within_epoch = True

    def run(self) -> nn.Module:
        """Train until the last epoch."""
        self.runner.call_hook("before_train")
        if self._epoch > 0 and self._iter == self._epoch * len(self.dataloader):
            owed = self.runner.message_hub.runtime_info.get("epoch_validated", 0) != self._epoch
            self._validate(owed)
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._validate(True)
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_epoch(self) -> None:
        """Train one epoch, or what is left of it."""
        done = self._iter - self._epoch * len(self.dataloader)
        self.runner.call_hook("before_train_epoch")
        self.runner.call_hook("pipeline_ready")  # a hook before may have put another one in place
        self.runner.model.train()
        for idx, batch in enumerate(self._batches(done), start=done):
            self.run_iter(idx, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def _batches(self, done: int) -> Iterator[dict[str, torch.Tensor]]:
        if done <= 0:
            return iter(self.dataloader)
        skip_batches(self.dataloader, done)
        batches = iter(self.dataloader)  # draws a number for its workers' seeds
        self.runner.call_hook("within_epoch_resumed")
        return batches

    def _validate(self, owed: bool) -> None:
        self._decide_current_val_interval()
        due = self._epoch >= self.val_begin and (
            self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs
        )
        if owed and due and self.runner.val_loop is not None:
            self.runner.val_loop.run()
