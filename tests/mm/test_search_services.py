"""What a method may ask of its loop: batches that depend on a seed alone, and nobody's random numbers are touched."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from prunet_zoo.mm.datasets import DigitsDataset
from prunet_zoo.mm.epoch_loop import SkipBatches
from prunet_zoo.mm.search_services import FOLDER, Isolated, make_services, without_augmentation
from prunet_zoo.search.strategy import Services

HELD = dict(dataset=dict(type="DigitsDataset", part="arch", max_per_class=5))


def services(tmp_path: Path, workers: int = 0) -> Services:
    train = DataLoader(DigitsDataset(max_per_class=5), 8, shuffle=True, drop_last=True, num_workers=workers)
    held = DataLoader(DigitsDataset(part="arch", max_per_class=15), 8, shuffle=True, drop_last=True)
    model: Any = SimpleNamespace(data_preprocessor=lambda batch, training: batch)
    return make_services(model, train, held, HELD, None, tmp_path, lambda line: None)


def first(batches: Any, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(itertools.islice(batches, count))


def same(a: list, b: list) -> bool:
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_for_training_depend_on_the_seed_alone(tmp_path: Path, workers: int):
    given = services(tmp_path, workers)
    once = first(given.train(3), 9)  # 50 images, 6 batches a round: without end
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    again = given.train(3)
    other = given.train(4)
    mixed = []
    for _ in range(9):  # other draws in between
        mixed.append(next(again))
        torch.rand(3), random.random(), np.random.rand(), next(other)
    assert same(once, mixed) and not same(once, first(given.train(4), 9))
    assert {len(y) for _, y in once} == {8} and {tuple(x.shape[1:]) for x, _ in once} == {(3, 32, 32)}
    assert not torch.equal(once[0][0], once[6][0])


def test_the_held_part_is_whole_in_order_and_without_augmentation(tmp_path: Path):
    given = services(tmp_path)
    once, again = list(given.held()), list(given.held())
    plain = DigitsDataset(part="arch", max_per_class=5, augment=False)
    assert same(once, again) and [len(y) for _, y in once] == [8, 2]
    assert torch.equal(torch.cat([x for x, _ in once]), torch.stack([item["inputs"] for item in plain]))
    assert torch.cat([y for _, y in once]).tolist() == plain.labels
    assert given.folder == tmp_path / FOLDER and given.measure is None and given.mean(0.25) == 0.25


def test_who_draws_batches_finds_the_generators_as_they_were(tmp_path: Path):
    given = services(tmp_path)

    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    def seeded() -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seeded()
    wanted = draw()
    seeded()
    first(given.train(0), 2), list(given.held())
    assert draw() == wanted

    def faulty() -> Any:
        yield torch.rand(1)
        raise OSError("gone")

    seeded()
    drawn = Isolated(faulty, 7)
    next(drawn)
    with pytest.raises(OSError, match="gone"):
        next(drawn)
    assert draw() == wanted


def test_data_that_knows_no_augmentation_and_loaders_that_were_resumed(tmp_path: Path):
    data: Any = [1, 2]
    assert without_augmentation(dict(type="NoSuchDataset"), data) is data and without_augmentation(None, data) is data
    given = services(tmp_path)
    wanted = first(given.train(3), 2)
    loader = DataLoader(DigitsDataset(max_per_class=5), 8, shuffle=True, drop_last=True)
    object.__setattr__(loader, "batch_sampler", SkipBatches(loader.batch_sampler))
    model: Any = SimpleNamespace(data_preprocessor=lambda batch, training: batch)
    resumed = make_services(model, loader, loader, HELD, None, tmp_path, lambda line: None)
    assert same(first(resumed.train(3), 2), wanted)
