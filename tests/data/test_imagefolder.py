from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prunet_zoo.data.imagefolder import ImageFolderData, find_split
from prunet_zoo.errors import DataError


def write_images(folder: Path, count: int, mode: str = "RGB") -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).convert(mode).save(folder / f"{i}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("cat", "dog", "emu"):
        write_images(tmp_path / "train" / name, 10)
    write_images(tmp_path / "val" / "dog", 3)
    write_images(tmp_path / "val" / "emu", 2, mode="L")
    return tmp_path


def test_labels_are_those_of_train_in_every_split(root: Path) -> None:
    val = ImageFolderData(root, "val")
    assert val.classes == ["cat", "dog", "emu"]
    assert val.labels == [1, 1, 1, 2, 2]  # val has no cat, and still dog is 1
    image, label = val[4]
    assert (image.mode, image.size, label) == ("RGB", (8, 8), 2)  # grey files come as RGB


def test_test_stands_in_for_val(root: Path) -> None:
    (root / "val").rename(root / "test")
    assert len(ImageFolderData(root, "val")) == 5
    assert find_split(root, "test").name == "test"


def test_parts_and_limit(root: Path) -> None:
    weights, arch = (ImageFolderData(root, part=part) for part in ("weights", "arch"))
    assert (len(weights), len(arch)) == (24, 6)
    assert not {p for p, _ in weights.samples} & {p for p, _ in arch.samples}
    assert len(ImageFolderData(root, max_per_class=4)) == 12


def test_missing_and_empty_folders(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; expected <root>/train/<class>"):
        ImageFolderData(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="has no 'train'"):
        ImageFolderData(tmp_path / "bare")
    (tmp_path / "bare" / "train").mkdir()
    with pytest.raises(DataError, match="is empty"):
        ImageFolderData(tmp_path / "bare")
    (tmp_path / "bare" / "train" / "cat").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        ImageFolderData(tmp_path / "bare")
    write_images(tmp_path / "bare" / "train" / "dog", 1)
    with pytest.raises(DataError, match="without an image: 'cat'"):
        ImageFolderData(tmp_path / "bare")
    (tmp_path / "bare" / "train" / "cat").rmdir()
    with pytest.raises(DataError, match="has no 'val' nor 'test'"):
        ImageFolderData(tmp_path / "bare", "val")


def test_class_in_val_that_train_lacks(root: Path) -> None:
    write_images(root / "val" / "yak", 1)
    with pytest.raises(DataError, match="train lacks: 'yak'"):
        ImageFolderData(root, "val")


@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_unreadable_image_is_named(root: Path, content: bytes | None) -> None:
    bad = root / "train" / "cat" / "3.png"
    bad.write_bytes(bad.read_bytes()[:45] if content is None else content)
    data = ImageFolderData(root)
    with pytest.raises(DataError, match=r"cannot read image .*train/cat/3\.png"):
        for i in range(len(data)):
            data[i]


def test_cifar10(cifar10: Path) -> None:
    train, test = ImageFolderData(cifar10), ImageFolderData(cifar10, "val")
    assert (len(train), len(test), len(train.classes)) == (4000, 1000, 10)
    assert train[0][0].size == (32, 32)
