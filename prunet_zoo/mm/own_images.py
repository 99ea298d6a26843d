"""``--data-root``: point a config at an image folder of one's own, all of its parts at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config

from prunet_zoo.data.imagefolder import find_split, list_classes
from prunet_zoo.mm.cli import ConfigError


def set_data_root(cfg: Config, root: str | Path | None) -> None:
    """Let every `ImageFolderDataset` of a config read ``root``, and the model have as many classes as it holds.

    Args:
        cfg: a config of a search or of a classifier; None for ``root`` leaves it as it is.
        root: folder with ``train/<class>/`` and ``val/<class>/`` or ``test/<class>/``.

    Raises:
        DataError: the folder is missing or has another layout.
        ConfigError: the config reads no image folder.
    """
    if root is None:
        return
    classes = list_classes(find_split(root, "train"))
    datasets = list(image_folders(cfg._cfg_dict))
    if not datasets:
        raise ConfigError(
            f"--data-root needs a config that reads an image folder (ImageFolderDataset); {cfg.filename} does not"
        )
    for dataset in datasets:
        dataset["data_root"] = str(root)
    cfg.model.num_classes = len(classes)


def image_folders(value: Any) -> Iterator[dict[str, Any]]:
    """The config of every `ImageFolderDataset` in ``value``, at any depth; to be changed in place."""
    if isinstance(value, dict):
        if str(value.get("type", "")).rpartition(".")[2] == "ImageFolderDataset":
            yield value
        for item in value.values():
            yield from image_folders(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from image_folders(item)
