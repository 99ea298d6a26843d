"""SearchLoop: drives a search strategy through the epochs, lets it decide, keeps the history."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.dist import is_main_process
from mmengine.runner import Runner, set_random_seed
from torch.utils.data import DataLoader

from prunet_zoo.errors import DataError, TrainingError
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.distributed import from_first
from prunet_zoo.mm.epoch_loop import ResumableEpochLoop, skip_batches
from prunet_zoo.mm.rng import rng_state, set_rng_state
from prunet_zoo.mm.search_history import History, peak_memory_mb, reset_peak_memory, state_mb
from prunet_zoo.mm.search_model import SearchModel, average_buffers, average_gradients, is_alone, send_tensors
from prunet_zoo.mm.search_services import make_services
from prunet_zoo.mm.search_stop import keep_before_long_work, stop_if_asked
from prunet_zoo.mm.strategies import build_strategy, check_fit, check_start
from prunet_zoo.registry import LOOPS, register
from prunet_zoo.search.strategy import Measure, PruneEvent, Record, SearchNet, SearchStrategy
from prunet_zoo.search.target import TRIES
from prunet_zoo.supernet import drop_parameters

if TYPE_CHECKING:
    from prunet_zoo.cost import Cost
    from prunet_zoo.mm.search_choice import Chosen

TRIALS_FILE = "latency_trials.json"
RESULT_FILES = ("spec.json", "weights.safetensors", "report.json", "report.html")
# of `make_cost`
COST_FIELDS = ("type", "table", "backend", "threads", "batch", "dtype", "accelerator", "memory_format", "device")
PREDICTOR_FIELDS = ("type", "device")


@register(LOOPS)
class SearchLoop(ResumableEpochLoop):
    """The search as an MMEngine training loop.

    Args:
        runner: the `SuperNetRunner`.
        dataloader: the part of the training images that the weights learn on.
        arch_dataloader: the other part, for the architecture.
        strategy: config of a `SearchStrategy`, e.g. ``dict(type='TieredPruning', target=0.5)``.
        latency: what a network costs, see `latency_cost.make_cost`.
        max_epochs: epochs of the search, those in which a method trains the network found included.
        val_dataloader: images for the accuracy of the network found; None: it is not evaluated.
        verify: how many networks may be measured, one after another, until one meets the target. 0 takes the table's
            word, and then the result depends on table, config and seed alone.
        recalibration_batches: training batches for the BatchNorm statistics of the network found.
        name: name of the network found; None: from space and target.

    Attributes:
        history: figures of the epochs and what was pruned.
        chosen: the architecture found; None until it is decided.
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
        self.arch_config = dict(arch_dataloader)
        self.arch_dataloader = runner.build_dataloader(arch_dataloader, seed=runner.seed)
        self.val_dataloader = runner.build_dataloader(val_dataloader, seed=runner.seed) if val_dataloader else None
        self.strategy: SearchStrategy = build_strategy(strategy)
        self.latency_cfg = check_cost_config(latency)
        self.verify, self.recalibration_batches, self.name = verify, recalibration_batches, name
        self.history = History()
        self.chosen: Chosen | None = None
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
        self.model: SearchModel = check_fit(self.strategy, runner.model)

    @property
    def searched(self) -> SearchNet:
        """What the strategy searches in."""
        return self.model.searched

    @property
    def module(self) -> torch.nn.Module:
        """The same, as a module."""
        return self.model.searched  # type: ignore[return-value]

    @property
    def data_name(self) -> str:
        """What the images are called: their folder's name, or the kind of data."""
        return Path(_content(self.dataloader)[0]).name

    def prepare(self) -> None:
        """Load or measure the latency table and bind the strategy (before weights are loaded or resumed)."""
        from prunet_zoo.mm.latency_cost import make_cost  # imports backends: not with `import prunet_zoo`

        def bind() -> None:
            self.cost: Cost = make_cost(self.searched.space, self.runner.work_dir, **self.latency_cfg)

        from_first(bind)  # it measures the table, the others read it
        if not is_main_process():
            bind()
        loaders = (self.dataloader, self.arch_dataloader, self.arch_config)
        services = make_services(self.model, *loaders, self._measure(), self.runner.work_dir, self._tell)
        bound = (self.searched, self.cost, self.max_epochs, self.runner.seed, len(self.dataloader), services)
        self.strategy.setup(*bound)
        check_start(self.strategy, self.model, self.max_epochs)
        self.model.penalty = self.strategy.penalty
        self.model.arch_in_weight_step = self.strategy.arch_in_weight_step

    def _measure(self) -> Measure | None:
        """Measures a network as the cost was; None where the device is not at hand, or the table's word is taken."""
        from prunet_zoo.mm import search_choice

        source = self.cost.describe()
        if not self.verify or search_choice.why_not_measured(source) is not None:
            return None

        def measure(network: Any, quick: bool = False) -> Record:
            return search_choice.measure_like(network, source, quick)

        return measure

    def _tell(self, line: str) -> None:
        self.runner.logger.info(line)
        stop_if_asked(self.runner)

    def run_epoch(self) -> None:
        """One epoch, or what is left of it: a weight step a batch, and what the strategy does after each."""
        runner, done = self.runner, self._iter - self._epoch * len(self.dataloader)
        decided_before = self.strategy.decision_epoch
        if self.chosen is None and decided_before is not None and self._epoch >= decided_before:
            self.decide()
        with_arch = self.strategy.wants_arch_step(self._epoch)
        reset_peak_memory()
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
            self._note_pruned(*self.strategy.after_weight_step())
            self.history.add_step(outputs, time.perf_counter() - started)
            outputs |= self.strategy.status()
            runner.message_hub.update_info("progress", self._state_line(outputs))
            runner.call_hook("after_train_iter", batch_idx=index, data_batch=batch, outputs=outputs)
            self._iter += 1
        self._close_epoch(with_arch)
        runner.call_hook("after_train_epoch")
        self._epoch += 1

    def decide(self) -> Chosen:
        """Let the strategy explore, choose the architecture and make the strategy adopt it, once for all.

        Random numbers are the seed's own here, and afterwards what they were before: a run that is stopped in here and
        resumed goes on with the same figures.
        """
        from prunet_zoo.mm.search_choice import Chosen, choose

        if self.chosen is not None:
            return self.chosen
        trains_on = self.strategy.decision_epoch is not None
        if trains_on:
            keep_before_long_work(self.runner)
        outside, training = rng_state(), self.runner.model.training
        set_random_seed(self.runner.seed or 0)

        def work() -> tuple[dict[str, Any], dict[str, Any] | None]:
            reset_peak_memory()
            started = time.perf_counter()
            self.strategy.explore()
            path = Path(self.runner.work_dir) / TRIALS_FILE
            chosen = choose(self, path, self._tell)
            seconds = time.perf_counter() - started
            # what earlier runs spent before they were stopped is known to the method's files alone
            seconds = max(seconds, float(self.strategy.details().get("seconds", 0.0)))
            peak = peak_memory_mb(float(self.strategy.details().get("workers_mb", 0.0)))
            chosen = replace(chosen, verify=self.verify, epoch=self._epoch, seconds=seconds, peak_mb=peak)
            return chosen.to_dict(), self.strategy.state_dict() if trains_on and not is_alone() else None

        decision, state = from_first(work)
        if state is not None and not is_main_process():
            self.forget(self.strategy.load_state_dict(state))
        self.chosen = Chosen.from_dict(decision)
        self.strategy.adopt(self.chosen.encoding)
        send_tensors(self.module)
        self.runner.model.train(training)
        set_rng_state(outside)
        if self._epoch < self.max_epochs:
            self.runner.logger.info(f"decided: {self.chosen.status}; the network found is trained on")
        return self.chosen

    def _arch_step(self, batch: Any) -> dict[str, float]:
        seen: dict[str, Any] = {}
        amp = hasattr(self.runner.optim_wrapper, "loss_scaler")
        device = next(self.model.parameters()).device.type

        def loss() -> torch.Tensor:
            # bfloat16 has float32's range, so the tiny gradients of the logits need no loss scaling
            with torch.autocast(device, dtype=torch.bfloat16, enabled=amp):
                value, seen["acc"] = self.model.arch_loss(batch)
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

    def _state_line(self, outputs: dict[str, float]) -> str:
        acc = outputs.get("arch_acc", outputs["acc"])
        return (
            f"expected {outputs['expected']:.4g} of {outputs['target']:.4g} {self.cost.unit}, "
            f"{outputs['candidates']:.0f} candidates, depth {outputs['depth']:.0f}, acc {acc:.0f}%"
        )

    def _close_epoch(self, with_arch: bool) -> None:
        started = time.perf_counter()
        average_buffers(self.module)
        self._note_pruned(*self.strategy.end_epoch(self._epoch))
        self.history.seconds += time.perf_counter() - started
        figures = {
            "state_mb": state_mb(self.module, self.runner.optim_wrapper.optimizer),
            "peak_mb": peak_memory_mb(),
            "arch": with_arch,
            **self.strategy.status(),
            "widths": [choice[1] if choice else 0 for choice in self.searched.best()],
        }
        self.history.close_epoch(self._epoch, len(self.dataloader), figures)

    def _note_pruned(self, events: list[PruneEvent], gone: list[torch.nn.Parameter]) -> None:
        self.forget(gone)
        for line in self.history.add_events(events):
            self.runner.logger.info(line)

    def forget(self, gone: list[torch.nn.Parameter]) -> None:
        """Make the weights' optimiser drop parameters that were pruned, with their state."""
        if gone:
            drop_parameters(self.runner.optim_wrapper.optimizer, gone)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beyond weights and optimiser."""
        return {
            "strategy": self.strategy.state_dict(),
            "cost": self.cost.hash,
            "history": self.history.state_dict(),
            "chosen": None if self.chosen is None else self.chosen.to_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the fresh network the structure of the checkpoint; weights and optimiser are loaded after this."""
        from prunet_zoo.mm.search_choice import Chosen

        if state["cost"] != self.cost.hash:
            raise TrainingError(
                f"the search in {self.runner.work_dir} was run with other latencies than those given now; "
                "give the table that it was started with, or start anew in another --work-dir"
            )
        self.forget(self.strategy.load_state_dict(state["strategy"]))
        self.history.load_state_dict(state["history"])
        self.chosen = None if state["chosen"] is None else Chosen.from_dict(state["chosen"])


def _content(loader: DataLoader[Any]) -> tuple[str, int]:
    """What a loader reads: its folder (or kind of data) and number of classes."""
    dataset = loader.dataset
    root = getattr(getattr(dataset, "data", None), "root", type(dataset).__name__)
    return str(root), len(getattr(dataset, "metainfo", {}).get("classes", ()))


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
