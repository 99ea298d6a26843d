"""CIFAR-10 for the benchmarks: a folder's or the shared archive's images as tensors, normalised, cropped, mirrored.

Both hold ``train/<class>/<number>.jpg`` and ``test/<class>/<number>.jpg``.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from prunet_zoo.errors import DataError

ARCHIVE = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10.tar.xz"
SIZE, CLASSES, BORDER = 32, 10, 4  # px, -, px of border that crops are taken from
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
Split = tuple[torch.Tensor, torch.Tensor]  # uint8 images (N, 3, 32, 32), classes (N,)


def read_images(source: Path, part: str, stop: int, start: int = 0) -> Split:
    """Images ``start`` to ``stop - 1`` of each class of ``part`` ('train' or 'test'), by class, then by number.

    Raises:
        DataError: there are none.
    """
    found = sorted(_files(source, part, range(start, stop)))
    if not found:
        raise DataError(f"{source} has no images {part}/<class>/<number>.jpg; give a folder of CIFAR-10 that has them")
    classes = sorted({name for name, _, _ in found})
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for _, _, data in found]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([classes.index(name) for name, _, _ in found])


def _files(source: Path, part: str, numbers: range) -> Iterator[tuple[str, int, bytes]]:
    if source.is_dir():
        for path in source.glob(f"{part}/*/*.jpg"):
            if (number := _number(path)) in numbers:
                yield path.parent.name, number, path.read_bytes()
        return
    if not source.is_file():
        raise DataError(f"CIFAR-10 is not at {source}; give its folder (train/, test/): --data-root")
    with tarfile.open(source) as archive:
        for member in archive:
            path = Path(member.name)
            if member.isfile() and path.parts[-3:-2] == (part,) and (number := _number(path)) in numbers:
                file = archive.extractfile(member)
                assert file is not None
                yield path.parent.name, number, file.read()


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdigit() else -1


def unpack(archive: Path, work: Path, per_class: int) -> Path:
    """The folder, in ``work``, of the first training images of each class and all test images; made where it is not.

    Raises:
        DataError: there is no archive.
    """
    unpacked = work / f"cifar10_{per_class}"
    if unpacked.is_dir():
        return unpacked
    if not archive.is_file():
        raise DataError(f"CIFAR-10 is not at {archive}; give its folder (train/, test/): --data-root")

    def wanted(path: Path) -> bool:
        return path.parts[-3:-2] != ("train",) or _number(path) < per_class

    with tempfile.TemporaryDirectory(dir=work) as folder, tarfile.open(archive) as packed:
        packed.extractall(folder, members=[m for m in packed if wanted(Path(m.name))], filter="data")
        Path(folder).chmod(0o755)
        next(path.parent for path in Path(folder).glob("**/train")).rename(unpacked)
    return unpacked


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) to floats of about mean 0 and standard deviation 1."""
    return (images.float() / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def augment(images: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """A crop of the images padded by 4 px, one place an image, half of them mirrored: (B, 3, 32, 32) uint8."""
    count = len(images)
    padded = F.pad(images, (BORDER,) * 4)
    at = torch.randint(0, 2 * BORDER + 1, (2, count), generator=draw)
    rows = (at[0][:, None] + torch.arange(SIZE)).view(count, 1, SIZE, 1)
    flip = torch.rand(count, generator=draw) < 0.5
    steps = torch.where(flip[:, None], torch.arange(SIZE - 1, -1, -1), torch.arange(SIZE))
    columns = (at[1][:, None] + steps).view(count, 1, 1, SIZE)
    channels = torch.arange(3).view(1, 3, 1, 1)
    return padded[torch.arange(count).view(count, 1, 1, 1), channels, rows, columns]
