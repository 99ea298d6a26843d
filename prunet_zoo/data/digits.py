"""The built-in classification data: scikit-learn's 1,797 digit scans as RGB images, ready without a download."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from prunet_zoo.data.digits_split import load_scans, split_indices
from prunet_zoo.data.parts import Part, select_part
from prunet_zoo.errors import DataError

CLASSES = tuple("0123456789")


class DigitsData(Dataset[tuple[torch.Tensor, int]]):
    """One split of the digits. Items are (image after ``transform``, digit).

    Args:
        split: ``'train'``, or ``'test'`` (``'val'`` is the same): scans that training never sees.
        transform: from a PIL RGB image of ``size`` px to what the item shall hold.
        size: side of the image in px; the 8×8 scans are enlarged once (bicubic, with a margin).
        part, arch_fraction, seed, max_per_class: see `prunet_zoo.data.parts.select_part`.

    Raises:
        DataError: unknown split or part, a size under 8 px, no scikit-learn.
    """

    classes = CLASSES

    def __init__(
        self,
        split: str = "train",
        transform: Callable[[Image.Image], Any] | None = None,
        size: int = 32,
        part: Part | None = None,
        arch_fraction: float = 0.2,
        seed: int = 0,
        max_per_class: int | None = None,
    ) -> None:
        if split not in ("train", "val", "test"):
            raise DataError(f"split must be 'train', 'val' or 'test', got {split!r}")
        if size < 8:
            raise DataError(f"size must be at least 8 px (the scans are 8×8), got {size}")
        self.split, self.transform = split, transform
        scans = split_indices()[0 if split == "train" else 1]
        keep = select_part(load_scans()[1][scans], part, arch_fraction, seed, max_per_class)
        self.scans = scans[keep]  # indices into scikit-learn's array
        self.labels = [int(label) for label in load_scans()[1][self.scans]]
        self._images = enlarged(size)

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self._images[self.scans[index]]).convert("RGB")
        return (image if self.transform is None else self.transform(image)), self.labels[index]


@cache
def enlarged(size: int) -> NDArray[np.uint8]:
    """All scans as grey images (1797, size, size), white ink on black, with a margin of a 16th of the side."""
    margin = size // 16
    inner = size - 2 * margin
    scans = (load_scans()[0].astype(np.float32) * (255 / 16)).round().astype(np.uint8)  # grey 0..16 to 0..255
    images = np.zeros((len(scans), size, size), np.uint8)
    for i, scan in enumerate(scans):
        image = Image.fromarray(scan).resize((inner, inner), Image.Resampling.BICUBIC)
        images[i, margin : margin + inner, margin : margin + inner] = np.asarray(image)
    images.setflags(write=False)
    return images
