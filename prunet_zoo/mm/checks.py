"""What a run needs of its data, looked at before it starts: files, batches, number of classes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.runner import Runner
from torch.utils.data import DataLoader

from prunet_zoo.errors import CheckpointError, DataError, few
from prunet_zoo.mm.hooks import unwrap
from prunet_zoo.mm.scheme import local_file
from prunet_zoo.zoo.index import is_zoo

_FETCH = os.path.join("torch", "utils", "data", "_utils", "fetch.py")
_LOADERS = ("dataloader", "arch_dataloader", "val_dataloader")  # of a loop, the search's too


def check_files(cfg: Mapping[str, Any], parts: tuple[str, ...]) -> None:
    """See that annotation files and image folders are there.

    Args:
        cfg: a run's config; data sets without ``ann_file`` and ``data_prefix`` check themselves when they are built.
        parts: of 'train', 'val' and 'test', those that the run uses.

    Raises:
        DataError: naming the path, the key of the config and what to do.
    """
    for part in parts:
        for key in (f"{part}_dataloader", f"{part}_evaluator"):
            for where, path in _data_paths(cfg.get(key), key):
                if not path.exists():
                    what = "annotation file" if where.endswith("ann_file") else "image folder"
                    raise DataError(f"{what} {path} does not exist ({where}); {how_to_restore(path, where)}")


def check_pretrained(model: Any, where: str = "model") -> None:
    """See that the weights which a model's config starts from are there; those of the zoo are downloaded now.

    Raises:
        CheckpointError: naming the path, the key of the config and what to do.
        UnknownNameError, DownloadError: of a model of the zoo.
    """
    for key, item in _items(model):
        check_pretrained(item, f"{where}.{key}")
    if not isinstance(model, Mapping) or model.get("type") != "Pretrained":
        return
    path = model.get("checkpoint")
    if is_zoo(path):
        local_file(str(path))
    elif isinstance(path, str | Path) and "://" not in str(path) and not Path(path).is_file():
        raise CheckpointError(
            f"weights file {path} does not exist ({where}); give the weights to start from with --weights FILE, or "
            f"start from random ones with --cfg-options {where}=None"
        )


def check_batches(runner: Runner) -> None:
    """See that the training images fill a batch.

    Raises:
        DataError: there are fewer than a batch takes, and incomplete batches are left out.
    """
    loader = runner.train_loop.dataloader
    if len(loader):
        return
    count, size = len(loader.dataset), loader.batch_size
    raise DataError(
        f"{count} training images give no batch of {size} for each process (drop_last leaves incomplete batches out); "
        "lower the batch size (--cfg-options train_dataloader.batch_size=…) or add images"
    )


def check_classes(runner: Runner, training: bool = True) -> None:
    """See that a classifier, or what is searched in, has as many classes as each of its data sets. Detectors pass.

    Args:
        runner: of a `PruNetClassifier` or `SearchModel`.
        training: look at the data for training and validation, else at that for testing.

    Raises:
        DataError: the numbers differ.
    """
    have = _model_classes(unwrap(runner.model))
    if have is None:
        return
    loops = (runner.train_loop, runner.val_loop) if training else (runner.test_loop,)
    for loader in (getattr(loop, name, None) for loop in loops for name in _LOADERS):
        if not isinstance(loader, DataLoader):
            continue
        classes = (getattr(loader.dataset, "metainfo", None) or {}).get("classes")
        if classes is not None and len(classes) != have:
            root = getattr(getattr(loader.dataset, "data", None), "root", None)
            data = "the data" if root is None else root
            raise DataError(
                f"{data} has {len(classes)} classes ({few(classes)}), the model's num_classes is {have}; "
                f"give --cfg-options model.num_classes={len(classes)} or other data"
            )


def _model_classes(model: Any) -> int | None:
    """Classes of our own models; None for others."""
    for name in ("net", "searched"):
        net = getattr(model, name, None)
        for owner in (net, getattr(net, "space", None)):
            if isinstance(getattr(owner, "num_classes", None), int):
                return int(owner.num_classes)  # type: ignore[union-attr]
    return None


def from_data(error: BaseException) -> bool:
    """Whether an error arose while a data set gave a sample, in this process or in a worker."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(_FETCH):
            return True
        trace = trace.tb_next
    return "Original Traceback" in str(error)


def unreadable_image(error: BaseException) -> str:
    """Path of the image that mmcv could not decode; empty text for other errors."""
    found = re.findall(r"failed to load image: (.+)", str(error))
    return found[-1].strip() if found else ""  # a worker's error has mmcv's line of code before it


def how_to_restore(path: str | Path, key: str = "") -> str:
    """What to do about missing data at ``path``, which ``key`` of the config names."""
    from prunet_zoo.data.scenes import MARKER  # not above: `python -m` would find it imported before it runs

    for folder in Path(path).parents:
        if (folder / MARKER).is_file():
            return f"remove {folder}, then run again: the digit scenes are made anew"
    if key.partition(".")[0].endswith("_evaluator"):
        return f"put it there or name another one (--cfg-options {key}=…)"
    if key:
        dataset = key.rpartition(".")[0].removesuffix(".data_prefix")
        return f"put the data there or name another place (--cfg-options {dataset}.data_root=…)"
    return "put it back, or remove it from the annotations"


def _data_paths(value: Any, key: str) -> Iterator[tuple[str, Path]]:
    """(key, path) of what a dataloader's or evaluator's config reads, at any depth; URLs and other stores are left."""
    if isinstance(value, Mapping) and not value.get("backend_args"):
        root = value.get("data_root") or ""
        prefixes = value.get("data_prefix") or {}
        entries = {"ann_file": value.get("ann_file")}
        if isinstance(prefixes, Mapping):
            entries |= {f"data_prefix.{name}": prefix for name, prefix in prefixes.items()}
        else:
            entries["data_prefix"] = prefixes
        for name, entry in entries.items():
            if isinstance(entry, str) and entry and "://" not in f"{root}{entry}":
                yield (f"{key}.{name}", Path(root) / entry)
    for name, item in _items(value):
        yield from _data_paths(item, f"{key}.{name}")


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else []
