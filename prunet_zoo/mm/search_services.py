"""What a search method may ask of its loop: batches that depend on a seed alone, measurements, a folder, a log."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from prunet_zoo.mm.search_model import SearchModel, average_figure
from prunet_zoo.registry import DATASETS
from prunet_zoo.search.strategy import Batch, Measure, Services

FOLDER = "method"  # of the work directory: files of the method's own
_HELD_SEED = 20_190  # only matters for data that cannot be had without augmentation


def make_services(
    model: SearchModel,
    train: DataLoader[Any],
    held: DataLoader[Any],
    held_config: Mapping[str, Any],
    measure: Measure | None,
    work_dir: str | Path,
    tell: Callable[[str], None],
) -> Services:
    """The services of a run.

    Args:
        model: turns what a loader gives into batches on its device.
        train, held: the loops' loaders of the weights' and of the architecture's part; only data set, batch size and
            workers are taken from them, so that every process sees the same batches.
        held_config: config of the second, from which the data set is built again without augmentation.
        measure, tell: see `Services`.
        work_dir: the run's.
    """

    def prepared(batches: Iterator[Any]) -> Iterator[Batch]:
        for batch in batches:
            data = model.data_preprocessor(batch, True)
            yield data["inputs"], data["label"]

    def train_batches(seed: int) -> Iterator[Batch]:
        order = _Shuffled(len(train.dataset), _batch_size(train), seed)  # type: ignore[arg-type]
        return prepared(Isolated(lambda: iter(_loader(train, train.dataset, order, seed)), seed))

    plain: list[Dataset[Any]] = []

    def held_batches() -> Iterator[Batch]:
        if not plain:
            plain.append(without_augmentation(held_config.get("dataset"), held.dataset))
        count, size = len(plain[0]), _batch_size(held)  # type: ignore[arg-type]
        order = [list(range(i, min(i + size, count))) for i in range(0, count, size)]
        return prepared(Isolated(lambda: iter(_loader(held, plain[0], order, _HELD_SEED)), _HELD_SEED))

    return Services(train_batches, held_batches, measure, Path(work_dir) / FOLDER, tell, average_figure)


def without_augmentation(config: Any, as_is: Dataset[Any]) -> Dataset[Any]:
    """The data set of ``config`` built anew with ``augment=False``; ``as_is`` where it does not know that argument."""
    if not isinstance(config, Mapping):
        return as_is
    cls = DATASETS.get(str(config.get("type")))
    if cls is None or "augment" not in inspect.signature(cls).parameters:
        return as_is
    return DATASETS.build({**config, "augment": False})


def _batch_size(loader: DataLoader[Any]) -> int:
    size = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size
    if size is None:  # `SkipBatches` around the usual sampler
        size = loader.batch_sampler.batches.batch_size  # type: ignore[union-attr]
    return int(size)


def _loader(like: DataLoader[Any], data: Dataset[Any], order: Any, seed: int) -> DataLoader[Any]:
    return DataLoader(
        data,
        batch_sampler=order,
        num_workers=like.num_workers,
        collate_fn=like.collate_fn,
        pin_memory=like.pin_memory,
        worker_init_fn=like.worker_init_fn,
        generator=torch.Generator().manual_seed(seed),  # of the workers' seeds
    )


class _Shuffled(Sampler[list[int]]):
    """Batches of equal size from one random order after another, without end; a last part of a batch is left out."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed = count, min(size, count), seed

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(self.count, generator=generator).tolist()
            for i in range(0, self.count - self.size + 1, self.size):
                yield order[i : i + self.size]


class Isolated:
    """An iterator with random numbers (Python's, NumPy's, torch's on the CPU) of its own.

    What it draws depends on its seed alone, and who uses it finds the generators as they were.
    """

    def __init__(self, start: Callable[[], Iterator[Any]], seed: int) -> None:
        self._start, self._seed = start, seed
        self._inner: Iterator[Any] | None = None
        self._state: tuple[Any, ...] = ()

    def __iter__(self) -> Isolated:
        return self

    def __next__(self) -> Any:
        outside = _generators()
        try:
            if self._inner is None:
                random.seed(self._seed)
                np.random.seed(self._seed % 2**32)
                torch.default_generator.manual_seed(self._seed)
                self._inner = self._start()
            else:
                _set_generators(self._state)
            item = next(self._inner)
            self._state = _generators()
            return item
        finally:
            _set_generators(outside)


def _generators() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_generators(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
