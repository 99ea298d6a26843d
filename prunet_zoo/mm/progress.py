"""A progress bar with rate, time left and loss on a terminal; elsewhere MMEngine's plain log lines are enough."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from prunet_zoo.registry import HOOKS, register


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f} it/s" if task.speed else "- it/s")


@register(HOOKS)
class ProgressHook(Hook):
    """Shows a bar over all iterations of a run when stderr is a terminal.

    Beside rate and time left stands the loss, or the text that a loop or hook puts into the message hub's info
    ``progress``.

    Args:
        console: where to draw; None is stderr. The bar is shown only where ``console.is_terminal``.
    """

    priority = "VERY_LOW"

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task: Any = None
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []

    def before_train(self, runner: Runner) -> None:
        console = self.console or Console(stderr=True)
        if not (is_main_process() and console.is_terminal):
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
        )  # fmt: skip
        self._progress = Progress(*columns, console=console, speed_estimate_period=60.0)
        self._task = self._progress.add_task("train", total=runner.max_iters, completed=runner.iter, state="")
        self._progress.start()
        self._redirect_log(runner)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        if self._progress is not None:
            loss = (outputs or {}).get("loss")
            plain = f"loss {float(loss.detach()):.4f}" if isinstance(loss, torch.Tensor) else ""
            state = runner.message_hub.runtime_info.get("progress", plain)
            epoch = f"epoch {runner.epoch + 1}/{runner.max_epochs}"
            self._progress.update(self._task, completed=runner.iter + 1, description=epoch, state=state)

    def after_train(self, runner: Runner) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away and give the log its stream back; may be called twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams = []

    def _redirect_log(self, runner: Runner) -> None:
        """Send console log lines through the streams that rich put in place, which draw above the bar."""
        for handler in runner.logger.handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                self._streams.append((handler, handler.stream))
                handler.setStream(sys.stderr)
