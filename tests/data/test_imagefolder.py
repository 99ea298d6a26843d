from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prunet_zoo.data.imagefolder import IMAGENET, ImageFolderData, find_split, match_classes, wordnet_ids
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


def test_val_alone_and_a_folder_of_classes(root: Path) -> None:
    """To test on, train is not needed: the classes are then those of val."""
    shutil.rmtree(root / "train")
    for place, split in ((root, "val"), (root, "test"), (root / "val", "val")):
        data = ImageFolderData(place, split)
        assert data.classes == ["dog", "emu"] and data.labels == [0, 0, 0, 1, 1]
    with pytest.raises(DataError, match="has no 'train'"):
        ImageFolderData(root)
    (root / "val/dog/0.png").rename(root / "0.png")
    for name in ("dog", "emu"):
        shutil.rmtree(root / "val" / name)
    (root / "0.png").rename(root / "val/0.png")
    with pytest.raises(DataError, match="val holds 1 images, but no class folders"):
        ImageFolderData(root, "val")


def test_folders_are_labelled_by_the_networks_classes(root: Path) -> None:
    data = ImageFolderData(root, "val", classes=["emu", "yak", "dog"])
    assert data.labels == [2, 2, 2, 0, 0] and data.classes == ["emu", "yak", "dog"]
    assert data.labelled_by == "class names"
    with pytest.raises(
        DataError, match=r"2 class folders, of which 1 are no class of the network: 'dog'; .* 'emu', 'yak'"
    ):
        ImageFolderData(root, "val", classes=["emu", "yak"])
    with pytest.raises(DataError, match=r"2 are no class of the network.*WordNet ids"):
        ImageFolderData(root, "val", classes=IMAGENET)
    with pytest.raises(DataError, match="must be 'imagenet-1k'"):
        match_classes(root / "val", "imagenet")


@given(chosen=st.sets(st.integers(0, 999), min_size=1, max_size=12))
@settings(max_examples=20, deadline=None)
def test_some_of_imagenets_folders(chosen: set[int]) -> None:
    """Any of the WordNet ids get the index of ImageNet's class, however many of them are there."""
    assert len(set(wordnet_ids())) == 1000 and wordnet_ids()[207] == "n02099601"  # golden retriever
    with tempfile.TemporaryDirectory() as folder:
        for index in chosen:
            (Path(folder) / wordnet_ids()[index]).mkdir()
        _, labels, by = match_classes(Path(folder), IMAGENET)
    assert labels == {wordnet_ids()[index]: index for index in chosen} and by == "WordNet ids"


@pytest.mark.parametrize("form", ["{}", "{:04d}", "class_{:04d}"])
def test_all_1000_folders_without_wordnet_ids(tmp_path: Path, form: str) -> None:
    """Numbers are numbers, also where 10 would be sorted before 2; other names count by their order."""
    for index in range(1000):
        (tmp_path / form.format(index)).mkdir()
    _, labels, by = match_classes(tmp_path, IMAGENET)
    assert labels == {form.format(index): index for index in range(1000)}
    assert by == ("order of all 1000 folders" if form.startswith("class") else "numbers of the folders")
    (tmp_path / form.format(999)).rename(tmp_path / wordnet_ids()[999])  # one WordNet id among others
    with pytest.raises(DataError, match="999 are no class"):
        match_classes(tmp_path, IMAGENET)
    (tmp_path / wordnet_ids()[999]).rmdir()
    with pytest.raises(DataError, match="999 are no class"):
        match_classes(tmp_path, IMAGENET)


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
