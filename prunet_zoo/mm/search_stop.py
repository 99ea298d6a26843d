"""Long work of a search between two steps of training: a checkpoint before it, and signals heeded while it runs."""

from __future__ import annotations

from mmengine.runner import Runner

from prunet_zoo.mm.checkpoint import AtomicCheckpointHook
from prunet_zoo.mm.hooks import InterruptHook
from prunet_zoo.mm.search_model import is_alone


def keep_before_long_work(runner: Runner) -> None:
    """Save the state unless a checkpoint has it: what the work leaves in files is of use to a resumed run alone."""
    saver = next((hook for hook in runner.hooks if isinstance(hook, AtomicCheckpointHook)), None)
    if saver is not None and runner.message_hub.runtime_info.get("last_ckpt_iter", -1) != runner.iter:
        saver.save_now(runner, runner.epoch, runner.iter)


def stop_if_asked(runner: Runner) -> None:
    """Stop after Ctrl-C or SIGTERM (`Interrupted`), where the state is in a checkpoint and in the work's own files.

    Several processes wait for each other here, so one cannot leave: they stop after the next step of training.
    """
    hook = next((hook for hook in runner.hooks if isinstance(hook, InterruptHook)), None)
    if hook is not None and is_alone() and hook.signals.requested is not None:
        hook._stop(runner, runner.iter, None)
