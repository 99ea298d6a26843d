"""Images in ImageNet's layout: ``root/train/<class>/*.jpg``, and ``root/val`` or ``root/test`` likewise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from prunet_zoo.data.parts import Part, select_part
from prunet_zoo.errors import DataError

Split = Literal["train", "val", "test"]


class ImageFolderData(Dataset[tuple[torch.Tensor, int]]):
    """One split of an image folder. Items are (image after ``transform``, class index).

    Class indices are those of ``train`` (its folder names, sorted) in every split.

    Args:
        root: folder that holds ``train`` and ``val`` or ``test``.
        split: ``'val'`` falls back to ``test`` where there is no ``val``, and the other way round.
        transform: from a PIL RGB image to what the item shall hold.
        part, arch_fraction, seed, max_per_class: see `prunet_zoo.data.parts.select_part`.

    Raises:
        DataError: a folder is missing or empty, a class of ``val`` is not in ``train``, an image cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split = "train",
        transform: Callable[[Image.Image], Any] | None = None,
        part: Part | None = None,
        arch_fraction: float = 0.2,
        seed: int = 0,
        max_per_class: int | None = None,
    ) -> None:
        self.root, self.split, self.transform = Path(root), split, transform
        train = find_split(self.root, "train")
        self.classes = list_classes(train)
        folder = train if split == "train" else find_split(self.root, split)
        samples = _list_images(folder, self.classes)
        keep = select_part([label for _, label in samples], part, arch_fraction, seed, max_per_class)
        self.samples = [samples[i] for i in keep]
        self.labels = [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        image = read_image(path)
        return (image if self.transform is None else self.transform(image)), label


def find_split(root: str | Path, split: Split) -> Path:
    """Folder of a split; raises `DataError` that says which layout is expected."""
    root = Path(root)
    if split not in ("train", "val", "test"):
        raise DataError(f"split must be 'train', 'val' or 'test', got {split!r}")
    layout = "expected <root>/train/<class>/<image> and <root>/val/<class>/<image> (or test instead of val)"
    if not root.is_dir():
        raise DataError(f"image folder {root} does not exist; {layout}")
    names = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}[split]
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"image folder {root} has no {' nor '.join(repr(n) for n in names)}; {layout}")


def list_classes(folder: Path) -> list[str]:
    """Sorted names of the class folders in ``folder``; raises `DataError` when there are none."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise DataError(f"{folder} is empty: it holds no class folders; expected {folder}/<class>/<image>")
    return classes


def read_image(path: str | Path) -> Image.Image:
    """Read an image as RGB; raises `DataError` that names the file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"cannot read image {path}: {reason}; replace or remove the file, then run again") from None


def _list_images(folder: Path, classes: list[str]) -> list[tuple[str, int]]:
    """(path, index in ``classes``) of every image under ``folder``."""
    here = list_classes(folder)
    unknown = [name for name in here if name not in set(classes)]
    if unknown:
        shown = ", ".join(map(repr, unknown[:5])) + (", …" if len(unknown) > 5 else "")
        raise DataError(
            f"{folder} has {len(unknown)} class folder(s) that train lacks: {shown}. "
            f"Add them to {folder.parent / 'train'} or remove them from {folder}."
        )
    index = {name: i for i, name in enumerate(classes)}
    data = ImageFolder(str(folder), allow_empty=True)
    samples = [(path, index[data.classes[label]]) for path, label in data.samples]
    if not samples:
        raise DataError(f"{folder} holds no image; known endings are {', '.join(IMG_EXTENSIONS)}")
    filled = {label for _, label in samples}
    empty = [name for name in here if index[name] not in filled]
    if empty:
        shown = ", ".join(map(repr, empty[:5])) + (", …" if len(empty) > 5 else "")
        raise DataError(f"{folder} has {len(empty)} class folder(s) without an image: {shown}; fill or remove them")
    return samples
