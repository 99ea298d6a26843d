"""Classification data sets for MMEngine: items ``dict(inputs=(3, H, W) float tensor, label=int)``.

Dataloaders need ``collate_fn=dict(type='default_collate')``, which gives ``inputs`` (B, 3, H, W) and ``label`` (B,).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from prunet_zoo.data.digits import DigitsData
from prunet_zoo.data.imagefolder import ImageFolderData, Split
from prunet_zoo.data.parts import Part
from prunet_zoo.data.transforms import make_transform
from prunet_zoo.registry import DATASETS, register


class _Classification(Dataset[dict[str, Any]]):
    """What both data sets share. ``metainfo['classes']`` are the class names by index."""

    def __init__(self, data: ImageFolderData | DigitsData) -> None:
        self.data = data
        self.metainfo = {"classes": tuple(data.classes)}

    @property
    def labels(self) -> list[int]:
        """Class index of every item."""
        return self.data.labels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.data[index]
        return {"inputs": image, "label": label}


@register(DATASETS)
class ImageFolderDataset(_Classification):
    """Images in ImageNet's layout.

    Args:
        data_root: folder with ``train`` and ``val`` or ``test``; to test on, ``val`` alone, or that folder itself.
        split: ``'train'``, ``'val'`` or ``'test'``.
        transform: see `prunet_zoo.data.transforms.make_transform`.
        augment: use the transform's training version; None means for the split ``'train'``.
        part, arch_fraction, part_seed, max_per_class: see `prunet_zoo.data.parts.select_part`.
        classes: the network's, by which folders are labelled; see `prunet_zoo.data.imagefolder.ImageFolderData`.
    """

    def __init__(
        self,
        data_root: str,
        split: Split = "train",
        transform: Mapping[str, Any] = {"type": "imagenet"},
        augment: bool | None = None,
        part: Part | None = None,
        arch_fraction: float = 0.2,
        part_seed: int = 0,
        max_per_class: int | None = None,
        classes: str | Sequence[str] | None = None,
    ) -> None:
        train = split == "train" if augment is None else augment
        make = make_transform(transform, train)
        options = (part, arch_fraction, part_seed, max_per_class, classes)
        super().__init__(ImageFolderData(data_root, split, make, *options))


@register(DATASETS)
class DigitsDataset(_Classification):
    """The built-in digit scans.

    Args:
        split: ``'train'``, or ``'test'`` (``'val'`` is the same).
        transform, augment, part, arch_fraction, part_seed, max_per_class: as for `ImageFolderDataset`.
        size: side of the image in px before the transform.
    """

    def __init__(
        self,
        split: str = "train",
        transform: Mapping[str, Any] = {"type": "digits"},
        augment: bool | None = None,
        size: int = 32,
        part: Part | None = None,
        arch_fraction: float = 0.2,
        part_seed: int = 0,
        max_per_class: int | None = None,
    ) -> None:
        train = split == "train" if augment is None else augment
        make = make_transform(transform, train)
        super().__init__(DigitsData(split, make, size, part, arch_fraction, part_seed, max_per_class))
