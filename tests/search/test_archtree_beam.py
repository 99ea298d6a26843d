"""Parts of benchmarks/archtree_beam.py: what it reads, holds out and expects."""

from __future__ import annotations

import importlib.util
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from prunet_zoo.errors import DataError
from prunet_zoo.search import MacsCost
from prunet_zoo.space import load_space

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "archtree_beam.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("archtree_beam", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of five images a part, each of one grey."""
    for part in ("train", "test"):
        for k, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(5):
                Image.fromarray(np.full((32, 32, 3), 100 * k + 10 * i, np.uint8)).save(folder / f"{i:04d}.jpg")
    return tmp_path / "images"


def test_a_folder_and_an_archive_give_the_same_images(bench: ModuleType, images: Path) -> None:
    with tarfile.open(images.parent / "images.tar.xz", "w:xz") as archive:
        archive.add(images, "cifar")
    folder = bench.read_images(images, "train", 3)
    packed = bench.read_images(images.parent / "images.tar.xz", "train", 3)
    assert folder[0].shape == (6, 3, 32, 32) and sorted(folder[1].tolist()) == [0, 0, 0, 1, 1, 1]
    assert all(torch.equal(a.sort(0).values, b.sort(0).values) for a, b in zip(folder, packed, strict=True))
    with pytest.raises(DataError, match="data-root"):
        bench.read_images(images / "none", "train", 3)


def test_held_out_images_are_not_trained_on(bench: ModuleType, images: Path) -> None:
    data = bench.Data(images, 5, seed=0)
    train, held = (part[0].float().mean((1, 2, 3)).round().tolist() for part in (data.train_part, data.held_part))
    assert len(train) == 8 and len(held) == 2 and not set(train) & set(held)
    first, again, other = (next(data.train(seed))[1].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_the_expected_latency_goes_with_macs(bench: ModuleType) -> None:
    space = load_space("prunet_cpu_small")
    spec = space.decode(bench.start_encoding(space))
    assert bench.Proportional(0.5)(spec) == pytest.approx(0.5 * MacsCost()(spec))
