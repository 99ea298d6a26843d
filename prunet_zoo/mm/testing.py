"""What tools/test.py does to a config before the test: the network, the images, and the network's own preprocessing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from prunet_zoo.data.imagefolder import IMAGENET, find_test_folder, list_classes, wordnet_ids
from prunet_zoo.data.transforms import evaluation
from prunet_zoo.mm.backbone import read_state
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.network import is_detection, set_arch
from prunet_zoo.mm.own_images import image_folders
from prunet_zoo.mm.preprocess import follow_checkpoint
from prunet_zoo.mm.scheme import zoo_spec
from prunet_zoo.zoo.home import shared_folder
from prunet_zoo.zoo.index import SCHEME, Preprocess, find_model, is_zoo, load_index
from prunet_zoo.zoo.predict import Told, told


def find_config(config: str, checkpoint: str | None) -> tuple[str, str]:
    """The config file and the checkpoint of ``CONFIG CHECKPOINT``, or of a NAME of the zoo, which has both.

    Raises:
        UnknownNameError: neither a config file nor a name. ConfigError: a config without a checkpoint.
    """
    if config.endswith(".py") or (Path(config).is_file() and not is_zoo(config)):
        if checkpoint is None:
            raise ConfigError(
                f"CHECKPOINT is missing: give the weights to test with {config} (a file, or prunet:// and one of "
                f"{', '.join(load_index())})"
            )
        return config, checkpoint
    entry = find_model(config)
    path = shared_folder("configs") / entry.config
    return str(path), SCHEME + entry.name if checkpoint is None else checkpoint


def look_into(checkpoint: str) -> Told:
    """What a checkpoint of the zoo, or a ``.safetensors`` file, tells of its network; a run's ``.pth`` tells nothing.

    Raises:
        CheckpointError: missing, damaged, or what it tells is malformed. UnknownNameError, DownloadError: of the zoo.
    """
    if is_zoo(checkpoint):
        entry = find_model(checkpoint)
        return Told(zoo_spec(checkpoint), entry.classes, entry.preprocess, entry.name)
    if checkpoint.endswith(".safetensors"):
        return told(checkpoint)
    return Told(None, None, None, Path(checkpoint).stem)


def prepare_test(cfg: Config, checkpoint: str, arch: str | None = None, data_root: str | None = None) -> None:
    """Fit a config to what is to be tested: architecture, number of classes, images, preprocessing, labels.

    Args:
        cfg: of a classifier or a detector; it is changed.
        checkpoint: the weights. What they tell of their network comes before the config's; see `look_into`.
        arch: the architecture, where neither the config's nor the checkpoint's is meant.
        data_root: folder with ``val/<class>/``, or that folder itself; None: the config's data.

    Raises:
        DataError: the folder is missing or holds no classes, or they are not the network's.
        ConfigError: the config reads no images from folders. Others: as `look_into`.
    """
    known = look_into(checkpoint)
    set_arch(cfg, known.spec if arch is None else arch)
    if is_detection(cfg):
        if data_root is not None:
            raise ConfigError("--data-root is for classifiers; a detector's data are in its config's test_dataloader")
        follow_checkpoint(cfg, checkpoint)
        return
    if cfg.get("test_dataloader") is None:
        raise ConfigError("the config has no test_dataloader, so there is nothing to test on")
    classes = _count_classes(known, checkpoint)
    if classes is not None:
        cfg.model.num_classes = classes
    _set_images(cfg, known, data_root)


def _count_classes(known: Told, checkpoint: str) -> int | None:
    """Number of the checkpoint's classes; None where it has no head (loading it says so)."""
    if known.spec is not None:
        return known.spec.num_classes
    heads = [tensor for name, tensor in read_state(checkpoint).items() if name.endswith("classifier.weight")]
    return int(heads[0].shape[0]) if heads else None


def _set_images(cfg: Config, known: Told, data_root: str | None) -> None:
    """Let the test read ``data_root`` with the network's own preprocessing and labels, as far as they are known."""
    loader = cfg.test_dataloader
    datasets = list(image_folders(loader))
    if data_root is not None and not datasets:
        if known.preprocess is None:
            raise ConfigError(
                f"--data-root needs a config that tests on an image folder (ImageFolderDataset), or weights that tell "
                f"their preprocessing; {cfg.filename} and these weights do not"
            )
        loader.dataset = {"type": "ImageFolderDataset", "data_root": data_root, "split": "val"}
        datasets = [loader.dataset]
    for dataset in datasets:
        if data_root is not None:
            dataset["data_root"] = str(data_root)
            for key in ("part", "max_per_class"):
                dataset.pop(key, None)
        list_classes(find_test_folder(dataset["data_root"], dataset.get("split", "val")))  # said before all is built
        if known.preprocess is not None:
            dataset["transform"] = own_transform(known.preprocess)
        classes = known.classes or _guess_classes(cfg.model.get("num_classes"), dataset)
        if classes is not None:
            dataset["classes"] = classes


def _guess_classes(count: int | None, dataset: Mapping[str, Any]) -> str | None:
    """ImageNet, where the network has 1000 classes and every folder is named by a WordNet id of ImageNet-1k."""
    if count != 1000:
        return None
    names = list_classes(find_test_folder(dataset["data_root"], dataset.get("split", "val")))
    return IMAGENET if set(names) <= set(wordnet_ids()) else None


def own_transform(preprocess: Preprocess) -> dict[str, Any]:
    """The config of a transform that does ``preprocess``."""
    fields = preprocess.model_dump()
    return {"type": "imagenet", "size": fields.pop("input_size"), **fields}


def fit_loader(loader: dict[str, Any]) -> None:
    """Let a test's dataloader suit this machine: no more workers than cores, none of which outlives the only pass, no
    pinned memory without a GPU. The result does not depend on these."""
    loader["persistent_workers"] = False
    loader["num_workers"] = min(int(loader.get("num_workers") or 0), available_cores())
    if not torch.cuda.is_available():
        loader["pin_memory"] = False


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def preprocessing(cfg: Config) -> dict[str, Any] | None:
    """What the test does to an image before the network; None where it reads no images from folders."""
    found = next(image_folders(cfg.test_dataloader), None)
    return None if found is None else evaluation(found.get("transform", {"type": "imagenet"}))
