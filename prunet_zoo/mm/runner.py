"""SuperNetRunner: an MMEngine Runner whose model gets smaller while it runs, and which ends with a network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.nn as nn
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

from prunet_zoo.errors import CheckpointError
from prunet_zoo.mm.search_loop import RESULT_FILES, TRIALS_FILE, SearchLoop
from prunet_zoo.mm.search_services import FOLDER
from prunet_zoo.registry import HOOKS, RUNNERS, register
from prunet_zoo.supernet import drop_parameters


@register(HOOKS)
class SearchStateHook(Hook):
    """Keeps the state of a search in its checkpoints and restores the structure before weights are loaded."""

    priority = "VERY_HIGH"

    def before_train(self, runner: Runner) -> None:
        """Remove what an earlier search left: its results must not pass for those of the one that starts now."""
        Runner.dump_config(runner)
        if is_main_process() and not runner._resume:
            for name in (*RESULT_FILES, TRIALS_FILE):
                (Path(runner.work_dir) / name).unlink(missing_ok=True)
            shutil.rmtree(Path(runner.work_dir) / FOLDER, ignore_errors=True)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add the loop's state."""
        checkpoint["search"] = runner.train_loop.state_dict()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Prune the network to the checkpoint's structure, and see that every tensor will find its place."""
        if "search" not in checkpoint:
            raise CheckpointError(
                "this checkpoint is not one of a search; start without --resume or give another --work-dir"
            )
        runner.train_loop.load_state_dict(checkpoint["search"])
        have, want = set(checkpoint["state_dict"]), set(runner.model.state_dict())
        if have != want:
            odd = sorted(have ^ want)
            raise CheckpointError(f"the checkpoint's network differs in {len(odd)} tensors: {', '.join(odd[:4])}, …")


@register(RUNNERS)
class SuperNetRunner(Runner):
    """Runs a `SearchLoop`: binds strategy and cost, keeps logits and masks from the weights' optimiser, writes results.

    ``train()`` ends with ``spec.json``, ``weights.safetensors``, ``report.json`` and ``report.html`` in the work
    directory.
    """

    def dump_config(self) -> None:
        """Nothing: MMEngine calls this when a runner is made, `SearchStateHook` writes the config when it starts."""

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Move the model to the device; see `SearchModel` for why there is no DDP wrapper."""
        return model.to(get_device())

    def build_optim_wrapper(self, optim_wrapper: dict[str, Any] | OptimWrapper) -> OptimWrapper:
        """Build the weights' optimiser; architecture parameters belong to the strategy's own."""
        wrapper = super().build_optim_wrapper(optim_wrapper)
        drop_parameters(wrapper.optimizer, self.model.searched.arch_parameters())
        return wrapper

    def train(self) -> nn.Module:
        """Search; returns the model as it stands at the end."""
        from prunet_zoo.mm.search_result import write_result  # pictures and backends: not with `import prunet_zoo`

        configured: dict[str, Any] = self._train_loop
        loop = self.build_train_loop(configured)
        if not isinstance(loop, SearchLoop):
            raise TypeError(f"SuperNetRunner needs train_cfg.type='SearchLoop', got {type(loop).__name__}")
        self._train_loop: Any = loop
        loop.prepare()
        self.register_hook(SearchStateHook())
        model = super().train()
        write_result(self)
        return model
