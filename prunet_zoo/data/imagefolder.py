"""Images in ImageNet's layout: ``root/train/<class>/*.jpg``, and ``root/val`` or ``root/test`` likewise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from prunet_zoo.data.parts import Part, select_part
from prunet_zoo.errors import DataError, few

Split = Literal["train", "val", "test"]
IMAGENET = "imagenet-1k"


class ImageFolderData(Dataset[tuple[torch.Tensor, int]]):
    """One split of an image folder. Items are (image after ``transform``, class index).

    Class indices are those of ``train`` (its folder names, sorted) in every split, unless ``classes`` are given.

    Args:
        root: folder that holds ``train`` and ``val`` or ``test``. To test on it need not have ``train``; it may also be
            the folder of classes itself.
        split: ``'val'`` falls back to ``test`` where there is no ``val``, and the other way round.
        transform: from a PIL RGB image to what the item shall hold.
        part, arch_fraction, seed, max_per_class: see `prunet_zoo.data.parts.select_part`.
        classes: names of a network's classes by index, or ``'imagenet-1k'``, by which the folders are labelled
            (`match_classes`); some of the classes are enough. None: see above.

    Attributes:
        classes: names by index. ``labelled_by``: what the labels follow from, in words.

    Raises:
        DataError: a folder is missing or empty, a class is not known, an image cannot be read.
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
        classes: str | Sequence[str] | None = None,
    ) -> None:
        self.root, self.split, self.transform = Path(root), split, transform
        folder = find_test_folder(self.root, split)
        if classes is not None:
            self.classes, index, self.labelled_by = match_classes(folder, classes)
        else:
            train = self.root / "train"
            named = train if train.is_dir() else folder
            self.classes, self.labelled_by = list_classes(named), f"order of the folders in {named.name}"
            index = _check_known(folder, self.classes)
        samples = _list_images(folder, index)
        keep = select_part([label for _, label in samples], part, arch_fraction, seed, max_per_class)
        self.samples = [samples[i] for i in keep]
        self.labels = [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        image = read_image(path)
        return (image if self.transform is None else self.transform(image)), label


_LAYOUT = "expected <root>/train/<class>/<image> and <root>/val/<class>/<image> (or test instead of val)"


def find_split(root: str | Path, split: Split) -> Path:
    """Folder of a split; raises `DataError` that says which layout is expected."""
    root = Path(root)
    if split not in ("train", "val", "test"):
        raise DataError(f"split must be 'train', 'val' or 'test', got {split!r}")
    if not root.is_dir():
        raise DataError(f"image folder {root} does not exist; {_LAYOUT}")
    names = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}[split]
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"image folder {root} has no {' nor '.join(repr(n) for n in names)}; {_LAYOUT}")


def find_test_folder(root: str | Path, split: Split) -> Path:
    """Folder of a split; to test on, ``root`` itself where it holds none of 'train', 'val' and 'test' but classes."""
    root = Path(root)
    splits = any((root / name).is_dir() for name in ("train", "val", "test"))
    if split in ("val", "test") and not splits and root.is_dir() and any(entry.is_dir() for entry in root.iterdir()):
        return root
    return find_split(root, split)


def list_classes(folder: Path) -> list[str]:
    """Sorted names of the class folders in ``folder``; raises `DataError` when there are none."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        loose = sum(entry.suffix.lower() in IMG_EXTENSIONS for entry in folder.iterdir())
        state = f"holds {loose} images, but no class folders" if loose else "is empty: it holds no class folders"
        raise DataError(f"{folder} {state}; expected {folder}/<class>/<image>")
    return classes


@cache
def wordnet_ids() -> tuple[str, ...]:
    """``n01440764``, …: the 1000 classes of ImageNet-1k by index. They are sorted."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo(IMAGENET).label_names())


def match_classes(folder: Path, classes: str | Sequence[str]) -> tuple[list[str], dict[str, int], str]:
    """Label the class folders in ``folder`` with a network's classes.

    ImageNet's folders are named by WordNet ids, and some of the classes are enough. Where no name is one, all 1000 are
    needed, named by their numbers, or else in the order of their sorted names. Folders of a network with class names
    bear these names.

    Args:
        folder: of class folders.
        classes: ``'imagenet-1k'``, or the names by index.

    Returns:
        Names of all classes by index, index of each folder, and in words what this follows from.

    Raises:
        DataError: a folder that is none of the classes, or too few folders to know the order.
    """
    here = list_classes(folder)
    imagenet = classes == IMAGENET
    if isinstance(classes, str) and not imagenet:
        raise DataError(f"classes must be {IMAGENET!r} or a list of names, got {classes!r}")
    names = list(wordnet_ids() if imagenet else classes)
    index = {name: i for i, name in enumerate(names)}
    unknown = [name for name in here if name not in index]
    if not unknown:
        return names, {name: index[name] for name in here}, "WordNet ids" if imagenet else "class names"
    if imagenet and len(unknown) == len(here) == len(names):
        if all(name.isdecimal() for name in here) and sorted(map(int, here)) == list(range(len(names))):
            return names, {name: int(name) for name in here}, "numbers of the folders"
        return names, {name: i for i, name in enumerate(here)}, "order of all 1000 folders"
    wanted = (
        "the network has the 1000 classes of ImageNet-1k: name the folders by their WordNet ids (n01440764, …; some of "
        "them are enough), or give all 1000 in their order"
        if imagenet
        else f"the network's {len(names)} classes are {few(map(repr, names))}"
    )
    raise DataError(
        f"{folder} has {len(here)} class folders, of which {len(unknown)} are no class of the network: "
        f"{few(map(repr, unknown))}; {wanted}"
    )


def read_image(path: str | Path) -> Image.Image:
    """Read an image as RGB; raises `DataError` that names the file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"cannot read image {path}: {reason}; replace or remove the file, then run again") from None


def _check_known(folder: Path, classes: list[str]) -> dict[str, int]:
    """Index in ``classes`` (of train) of each class folder in ``folder``."""
    here = list_classes(folder)
    unknown = [name for name in here if name not in set(classes)]
    if unknown:
        raise DataError(
            f"{folder} has {len(unknown)} class folder(s) that train lacks: {few(map(repr, unknown))}. "
            f"Add them to {folder.parent / 'train'} or remove them from {folder}."
        )
    index = {name: i for i, name in enumerate(classes)}
    return {name: index[name] for name in here}


def _list_images(folder: Path, index: dict[str, int]) -> list[tuple[str, int]]:
    """(path, label) of every image under ``folder``, whose class folders have the labels of ``index``."""
    data = ImageFolder(str(folder), allow_empty=True)
    samples = [(path, index[data.classes[label]]) for path, label in data.samples]
    if not samples:
        raise DataError(f"{folder} holds no image; known endings are {', '.join(IMG_EXTENSIONS)}")
    filled = {label for _, label in samples}
    empty = [name for name, label in index.items() if label not in filled]
    if empty:
        raise DataError(
            f"{folder} has {len(empty)} class folder(s) without an image: {few(map(repr, empty))}; fill or remove them"
        )
    return samples
