"""SearchLoop: alternates weight steps and architecture steps, prunes after every epoch, keeps the history."""

from __future__ import annotations

import inspect
import math
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from prunet_zoo.errors import DataError, TrainingError
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.epoch_loop import ResumableEpochLoop, skip_batches
from prunet_zoo.mm.supernet_model import SuperNetClassifier, average_buffers, average_gradients
from prunet_zoo.registry import LOOPS, TASK_UTILS, register
from prunet_zoo.search import Cost, SearchStrategy, TieredPruning
from prunet_zoo.search.target import TRIES
from prunet_zoo.supernet import SuperNet, drop_parameters

register(TASK_UTILS)(TieredPruning)

TRIALS_FILE = "latency_trials.json"
RESULT_FILES = ("spec.json", "weights.safetensors", "report.json", "report.html")
# of `make_cost`
COST_FIELDS = ("type", "table", "backend", "threads", "batch", "dtype", "accelerator", "memory_format", "device")
PREDICTOR_FIELDS = ("type", "device")
_AVERAGED = ("loss", "acc", "arch_loss", "arch_acc")


@register(LOOPS)
class SearchLoop(ResumableEpochLoop):
    """The search as an MMEngine training loop.

    Args:
        runner: the `SuperNetRunner`.
        dataloader: the part of the training images that the weights learn on.
        arch_dataloader: the other part, for the architecture.
        strategy: config of a `SearchStrategy`, e.g. ``dict(type='TieredPruning', target=0.5)``.
        latency: what a network costs, see `latency_cost.make_cost`.
        max_epochs: epochs of the search.
        val_dataloader: images for the accuracy of the network found; None: it is not evaluated.
        verify: how many networks may be measured, one after another, until one meets the target. 0 takes the table's
            word, and then the result depends on table, config and seed alone.
        recalibration_batches: training batches for the BatchNorm statistics of the network found.
        name: name of the network found; None: from space and target.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict[str, Any],
        arch_dataloader: dict[str, Any],
        strategy: dict[str, Any],
        latency: dict[str, Any],
        max_epochs: int,
        val_dataloader: dict[str, Any] | None = None,
        verify: int = TRIES,
        recalibration_batches: int = 32,
        name: str | None = None,
    ) -> None:
        super().__init__(runner, dataloader, max_epochs)
        self.arch_dataloader = runner.build_dataloader(arch_dataloader, seed=runner.seed)
        self.val_dataloader = runner.build_dataloader(val_dataloader, seed=runner.seed) if val_dataloader else None
        self.strategy: SearchStrategy = _build_strategy(strategy)
        self.latency_cfg = check_cost_config(latency)
        self.verify, self.recalibration_batches, self.name = verify, recalibration_batches, name
        self.history: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self._totals, self._elapsed = dict.fromkeys(_AVERAGED, 0.0), 0.0
        loaders = (self.dataloader, self.arch_dataloader, self.val_dataloader)
        seen = {_content(loader) for loader in loaders if loader is not None}
        if len(seen) > 1:
            both = " and ".join(sorted(map(str, seen)))
            raise DataError(f"the parts of a search read different data: {both}; give one folder to all (--data-root)")
        if verify < 0:
            raise TrainingError(f"train_cfg.verify (--verify) must be 0 or more, got {verify}")
        for loader, part in ((self.dataloader, "weights'"), (self.arch_dataloader, "architecture's")):
            if not len(loader):
                raise DataError(
                    f"the {part} part of the training images gives no batch; lower batch_size or add images"
                )
        if not isinstance(runner.model, SuperNetClassifier):
            raise TypeError(f"SearchLoop needs a SuperNetClassifier as model, got {type(runner.model).__name__}")

    @property
    def supernet(self) -> SuperNet:
        """The super-network."""
        return self.runner.model.supernet

    def prepare(self) -> None:
        """Load or measure the latency table and bind the strategy (before weights are loaded or resumed)."""
        from prunet_zoo.mm.latency_cost import make_cost  # imports backends: not with `import prunet_zoo`

        if not is_main_process():
            barrier()  # the first process measures the table, the others read it
        self.cost: Cost = make_cost(self.supernet.space, self.runner.work_dir, **self.latency_cfg)
        if is_main_process():
            barrier()
        self.strategy.setup(self.supernet, self.cost, self.max_epochs, self.runner.seed, len(self.dataloader))

    def run_epoch(self) -> None:
        """One epoch, or what is left of it: a weight step a batch, after the warm-up each followed by one on θ."""
        runner, done = self.runner, self._iter - self._epoch * len(self.dataloader)
        with_arch = self.strategy.wants_arch_step(self._epoch)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.strategy.start_epoch(self._epoch)
        runner.call_hook("before_train_epoch")
        runner.model.train()
        arch_batches = self._arch_batches(done if with_arch else 0)
        for index, batch in enumerate(self._batches(done), start=done):
            started = time.perf_counter()
            runner.call_hook("before_train_iter", batch_idx=index, data_batch=batch)
            self.strategy.before_weight_step()
            outputs = _floats(runner.model.train_step(batch, runner.optim_wrapper))
            if with_arch:
                outputs |= self._arch_step(next(arch_batches))
            for key in _AVERAGED:
                self._totals[key] += outputs.get(key, 0.0)
            outputs |= self.strategy.status()
            runner.message_hub.update_info("progress", self._state_line(outputs))
            self._elapsed += time.perf_counter() - started
            runner.call_hook("after_train_iter", batch_idx=index, data_batch=batch, outputs=outputs)
            self._iter += 1
        self._close_epoch(with_arch)
        runner.call_hook("after_train_epoch")
        self._epoch += 1

    def _arch_step(self, batch: Any) -> dict[str, float]:
        model, seen = self.runner.model, {}
        amp = hasattr(self.runner.optim_wrapper, "loss_scaler")
        device = next(model.parameters()).device.type

        def loss() -> torch.Tensor:
            # bfloat16 has float32's range, so the tiny gradients of the logits need no loss scaling
            with torch.autocast(device, dtype=torch.bfloat16, enabled=amp):
                value, seen["acc"] = model.arch_loss(batch)
            return value

        figures = self.strategy.arch_step(loss, average_gradients)
        if not all(map(math.isfinite, figures.values())):
            raise TrainingError(
                f"the architecture's loss is not finite in epoch {self._epoch + 1} ({figures}); earlier checkpoints "
                "are kept. Lower the learning rate (--cfg-options optim_wrapper.optimizer.lr=…) and start again."
            )
        return {**figures, "arch_acc": float(seen["acc"])}

    def _arch_batches(self, done: int) -> Iterator[Any]:
        """Batches of the architecture's part without end, from the ``done``-th on.

        Their order depends on seed and epoch alone. The first iterator is made at once, not with the first batch: it
        draws a random number, which has to come before the generators of a resumed run are put back.
        """
        loader, (first, skip) = self.arch_dataloader, divmod(done, len(self.arch_dataloader))

        def start(round_: int) -> Iterator[Any]:
            if hasattr(loader.sampler, "set_epoch"):
                loader.sampler.set_epoch(self._epoch * 1000 + round_)
            return iter(loader)

        def chain(batches: Iterator[Any], round_: int) -> Iterator[Any]:
            while True:
                yield from batches
                round_ += 1
                batches = start(round_)

        skip_batches(loader, skip)
        return chain(start(first), first)

    @staticmethod
    def _state_line(outputs: dict[str, float]) -> str:
        acc = outputs.get("arch_acc", outputs["acc"])
        return (
            f"expected {outputs['expected']:.4g} of {outputs['target']:.4g}, {outputs['candidates']:.0f} candidates, "
            f"depth {outputs['depth']:.0f}, acc {acc:.0f}%"
        )

    def _close_epoch(self, with_arch: bool) -> None:
        average_buffers(self.supernet)
        events, gone = self.strategy.end_epoch(self._epoch)
        self.forget(gone)
        self.events += [event.to_dict() for event in events]
        for event in events:
            self.runner.logger.info(
                f"pruned {event.kind} in layer {event.layer}: {event.what} (probability {event.probability:.3f})"
            )
        steps = len(self.dataloader)
        means = {k: v / steps for k, v in self._totals.items() if with_arch or not k.startswith("arch")}
        self.history.append(
            {
                "epoch": self._epoch + 1,
                "seconds": self._elapsed,
                "steps_per_s": steps / self._elapsed,
                "state_mb": state_mb(self.supernet, self.runner.optim_wrapper.optimizer),
                "peak_mb": peak_memory_mb(),
                "arch": with_arch,
                **means,
                **self.strategy.status(),
                "widths": [choice[1] if choice else 0 for choice in self.supernet.best()],
            }
        )
        self._totals, self._elapsed = dict.fromkeys(_AVERAGED, 0.0), 0.0

    def forget(self, gone: list[torch.nn.Parameter]) -> None:
        """Make the weights' optimiser drop parameters that were pruned, with their state."""
        drop_parameters(self.runner.optim_wrapper.optimizer, gone)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beyond weights and optimiser."""
        return {
            "strategy": self.strategy.state_dict(),
            "cost": self.cost.hash,
            "history": self.history,
            "events": self.events,
            "totals": self._totals,
            "elapsed": self._elapsed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the fresh super-network the structure of the checkpoint; weights and optimiser are loaded after this."""
        if state["cost"] != self.cost.hash:
            raise TrainingError(
                f"the search in {self.runner.work_dir} was run with other latencies than those given now; "
                "give the table that it was started with, or start anew in another --work-dir"
            )
        self.forget(self.strategy.load_state_dict(state["strategy"]))
        self.history, self.events = list(state["history"]), list(state["events"])
        self._totals, self._elapsed = dict(state["totals"]), state["elapsed"]


def _content(loader: DataLoader[Any]) -> tuple[str, int]:
    """What a loader reads: its folder (or kind of data) and number of classes."""
    dataset = loader.dataset
    root = getattr(getattr(dataset, "data", None), "root", type(dataset).__name__)
    return str(root), len(getattr(dataset, "metainfo", {}).get("classes", ()))


def _build_strategy(config: dict[str, Any]) -> SearchStrategy:
    cls = TASK_UTILS.get(config.get("type", ""))
    if cls is None:
        raise ConfigError(f"train_cfg.strategy.type {config.get('type')!r} is not a registered strategy")
    known = set(inspect.signature(cls).parameters)
    if not set(config) - {"type"} <= known:
        odd = ", ".join(sorted(set(config) - {"type"} - known))
        raise ConfigError(f"train_cfg.strategy does not take {odd}; {cls.__name__} takes {', '.join(sorted(known))}")
    return TASK_UTILS.build(dict(config))


def check_cost_config(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``train_cfg.latency``; raises `ConfigError` for a field that `make_cost` does not take."""
    predicted = config.get("type") == "predictor"
    fields = PREDICTOR_FIELDS if predicted else COST_FIELDS
    odd = ", ".join(sorted(set(config) - set(fields)))
    if odd:
        of = " of type='predictor' (its setting is the device's)" if predicted else ""
        raise ConfigError(f"train_cfg.latency{of} does not take {odd}; it takes {', '.join(fields)}")
    unused = [name for name in ("table", "device") if config.get("type") == "macs" and config.get(name) is not None]
    if unused:
        raise ConfigError(f"train_cfg.latency of type='macs' has no use for {' and '.join(unused)}; leave it out")
    return dict(config)


def _floats(figures: dict[str, Any]) -> dict[str, float]:
    return {k: float(v.detach() if isinstance(v, torch.Tensor) else v) for k, v in figures.items()}


def state_mb(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Memory in MB that weights, buffers, gradients and the optimiser's moments hold: what pruning gives back."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [p.grad for p in module.parameters() if p.grad is not None]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def peak_memory_mb() -> float:
    """Peak memory in MB: of the GPU in this epoch where there is one, else the process's resident maximum so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
