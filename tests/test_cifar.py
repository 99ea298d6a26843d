"""benchmarks/cifar.py: the same images of a folder and of an archive, which of them, and their augmentation."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from prunet_zoo.errors import DataError


@pytest.fixture(scope="module")
def cifar(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("cifar")


@pytest.fixture
def archive(grey_images: Path) -> Path:
    with tarfile.open(grey_images.parent / "images.tar.xz", "w:xz") as packed:
        for part in ("train", "test"):
            packed.add(grey_images / part, part)
    return grey_images.parent / "images.tar.xz"


def test_a_folder_and_an_archive_give_the_same_images(cifar: ModuleType, grey_images: Path, archive: Path) -> None:
    for images, labels in (cifar.read_images(source, "train", 4, 1) for source in (grey_images, archive)):
        assert images.dtype == torch.uint8 and images.shape == (6, 3, 32, 32) and labels.tolist() == [0, 0, 0, 1, 1, 1]
        greys = images.float().mean((1, 2, 3))
        torch.testing.assert_close(greys, torch.tensor([10.0, 20, 30, 110, 120, 130]), rtol=0, atol=1)
    for source in (grey_images, grey_images / "none"):
        with pytest.raises(DataError, match="give"):
            cifar.read_images(source, "train", 9, 7)


def test_unpacks_as_much_as_is_needed_once(cifar: ModuleType, grey_images: Path, archive: Path) -> None:
    unpacked = cifar.unpack(archive, grey_images.parent, 2)
    assert len(list(unpacked.glob("train/*/*.jpg"))) == 4 and len(list(unpacked.glob("test/*/*.jpg"))) == 10
    archive.unlink()
    assert cifar.unpack(archive, grey_images.parent, 2) == unpacked
    with pytest.raises(DataError, match="data-root"):
        cifar.unpack(archive, grey_images.parent, 3)


def test_augmented_images_are_crops_of_the_padded_ones_half_of_them_mirrored(cifar: ModuleType) -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8, generator=draw)
    made = cifar.augment(images, draw)
    padded, mirrored = torch.nn.functional.pad(images, (4, 4, 4, 4)), 0
    for image, frame in zip(made, padded, strict=True):
        crops = frame.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 9, 9, 32, 32)
        plain, flipped = ((crops == x[:, None, None]).all(-1).all(-1).all(0).any() for x in (image, image.flip(-1)))
        assert plain or flipped
        mirrored += bool(flipped)
    assert 70 < mirrored < 130


def test_normalised_images_have_the_data_sets_mean(cifar: ModuleType) -> None:
    grey = (255 * torch.tensor(cifar.MEAN)).round().to(torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert cifar.normalise(grey).abs().max() < 0.01
