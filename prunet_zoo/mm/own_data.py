"""``--train-json`` and ``--data-root``: train any config on one's own data without editing it."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config

from prunet_zoo.data.coco_split import OwnData, prepare_own_data
from prunet_zoo.errors import DataError, few
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.coco_checks import heads, mappings, type_name
from prunet_zoo.mm.interrupts import is_first
from prunet_zoo.mm.network import is_detection
from prunet_zoo.mm.own_images import set_data_root

MIN_STEPS = 1000  # of a run; on few images the epochs of a config made for many would be over before anything is learnt
_PARTS = ("train", "val", "test")
_OF_JSON = ("images", "val_json", "val_images", "val_share")
# where a detection data set has its annotations: the usual layouts, the more telling first
_TRAIN_FILES = (
    "annotations/instances_train*.json",
    "annotations/train*.json",
    "train/_annotations.coco.json",
    "instances_train*.json",
    "train*.json",
    "annotations/instances_default.json",
    "*annotations*.json",
    "annotations/*.json",
    "*.json",
)
_VAL_FILES = (
    "annotations/instances_val*.json",
    "annotations/val*.json",
    "val*/_annotations.coco.json",
    "instances_val*.json",
    "val*.json",
)


def add_own_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --data-root, and for detection --train-json with --images, --val-json, --val-images and --val-share."""
    group = parser.add_argument_group("your own data")
    group.add_argument(
        "--data-root",
        metavar="D",
        help="classification: a folder with train/<class>/ and val/<class>/; detection: one with a COCO JSON in it",
    )
    group.add_argument("--train-json", metavar="FILE", help="detection: your COCO JSON; classes are taken from it")
    group.add_argument("--images", metavar="DIR", help="folder that its file names start from; else looked for")
    group.add_argument("--val-json", metavar="FILE", help="COCO JSON to validate on; else images are held out")
    group.add_argument("--val-images", metavar="DIR", help="folder that its file names start from; else looked for")
    group.add_argument("--val-share", type=float, metavar="S", help="share of the images held out; default 0.2")


def set_own_data(cfg: Config, args: argparse.Namespace, training: bool = True) -> None:
    """Let a config read the data that the arguments of `add_own_data_arguments` name; without any it stays as it is.

    Args:
        cfg: changed in place; its ``work_dir`` gets the annotation files.
        args: the arguments.
        training: few images are repeated, and the learning rate follows the batch size.

    Raises:
        ConfigError: the arguments do not fit each other or the config. DataError: they do not fit the data.
    """
    train_json, val_json = args.train_json, args.val_json
    given = [f"--{name.replace('_', '-')}" for name in _OF_JSON if getattr(args, name) is not None]
    if train_json and args.data_root:
        raise ConfigError("give either --train-json or --data-root")
    if args.data_root and is_detection(cfg):
        train_json, found = find_annotations(args.data_root)
        val_json = val_json or found
    elif train_json is None:
        if given:
            raise ConfigError(f"{few(given)} needs --train-json FILE")
        set_data_root(cfg, args.data_root)
        return
    if not is_detection(cfg):
        raise ConfigError(
            f"--train-json needs a detector's config; {args.config} is of a classifier, which takes --data-root D"
        )
    if val_json is None and args.val_images is not None:
        raise ConfigError("--val-images needs --val-json FILE")
    left_out = _train_dataset(cfg).get("filter_cfg") or {}
    own = prepare_own_data(
        train_json,
        Path(cfg.work_dir) / "data",
        args.images,
        val_json,
        args.val_images,
        0.2 if args.val_share is None else args.val_share,
        masks=needs_masks(cfg),
        drop_empty=bool(left_out.get("filter_empty_gt")),
        min_size=left_out.get("min_size") or 0,
    )
    notes = [*own.notes, *use_own_data(cfg, own)]
    if training:
        options = args.cfg_options or {}
        chosen = any(key.partition(".")[0] == "train_cfg" for key in options)
        notes += fit_schedule(cfg, own.train_count, "auto_scale_lr.enable" in options, chosen)
    if is_first():
        print(*notes, sep="\n", flush=True)


def find_annotations(root: str | Path) -> tuple[Path, Path | None]:
    """The COCO JSON to train on in a folder, and the one to validate on where there is one.

    Raises:
        DataError: there is none, or more than one that may be meant.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"--data-root {root} is no folder; give the one that holds your COCO JSON and images")
    train, val = (_first_match(root, patterns) for patterns in (_TRAIN_FILES, _VAL_FILES))
    if train is None:
        raise DataError(
            f"{root} holds no COCO JSON (looked for {', '.join(_TRAIN_FILES)}); give the file with --train-json"
        )
    return train, None if val == train else val


def _first_match(root: Path, patterns: tuple[str, ...]) -> Path | None:
    for pattern in patterns:
        found = sorted(path for path in root.glob(pattern) if path.is_file())
        if len(found) > 1:
            raise DataError(
                f"{root} holds {len(found)} files that may be meant: {few(found)}; give one with --train-json, and the "
                "one to validate on with --val-json"
            )
        if found:
            return found[0]
    return None


def needs_masks(cfg: Config) -> bool:
    """Whether a config trains or scores masks."""
    items = [item for part in _PARTS for key in ("dataloader", "evaluator") for item in _inside(cfg, f"{part}_{key}")]
    return any(
        (type_name(item) == "LoadAnnotations" and item.get("with_mask"))
        or (type_name(item) == "CocoMetric" and "segm" in str(item.get("metric")))
        for item in items
    )


def use_own_data(cfg: Config, own: OwnData) -> list[str]:
    """Put the data into a config, of a detector: files, classes, number of classes in every head.

    Returns:
        What to tell the user.

    Raises:
        ConfigError: the config trains on other data sets, or its model has no head whose classes can be set.
    """
    from prunet_zoo.mm.draw_boxes import class_colour

    count = len(own.classes)
    found = list(heads(cfg.model))
    if not found or any("num_things_classes" in item for _, item in mappings(cfg.model)):
        raise ConfigError(
            f"{cfg.filename}: the classes of the model's heads ({type_name(cfg.model)}) cannot be set from a file; "
            "write a config with metainfo and num_classes of your own"
        )
    for _, head in found:
        head["num_classes"] = count
    metainfo = {"classes": own.classes, "palette": [class_colour(label) for label in range(count)]}
    for part in _PARTS:
        file, images = (own.train_file, own.train_images) if part == "train" else (own.val_file, own.val_images)
        place = {"data_root": f"{file.parent}/", "ann_file": file.name, "data_prefix": {"img": f"{images}/"}}
        for dataset in _coco_datasets(cfg, part):
            dataset.update(**place, metainfo=metainfo)
        for evaluator in _inside(cfg, f"{part}_evaluator"):
            if type_name(evaluator) == "CocoMetric":
                evaluator["ann_file"] = str(file)
    cfg.pop("digit_scenes", None)
    if "data_root" in cfg:  # left over from a base file; the built-in data would be made for it
        cfg.data_root = f"{own.train_file.parent}/"
    return [f"{count} classes: {few(own.classes)}"]


def fit_schedule(cfg: Config, images: int, keep_scaling: bool = False, keep_length: bool = False) -> list[str]:
    """Repeat few images, log often enough, scale the learning rate to the batch.

    Args:
        cfg: changed in place.
        images: how many there are to train on.
        keep_scaling: leave ``auto_scale_lr.enable`` as it is.
        keep_length: do not repeat images: the user has chosen how long to train.

    Returns:
        What to tell the user.
    """
    notes = []
    batch = cfg.train_dataloader.get("batch_size", 1) * int(os.environ.get("WORLD_SIZE", 1))
    steps = math.ceil(images / batch)
    epochs = cfg.get("train_cfg", {}).get("max_epochs")
    if epochs and keep_length:
        notes.append(f"{images} training images, {steps} steps an epoch: {epochs} epochs make {steps * epochs} steps")
    elif epochs and steps * epochs < MIN_STEPS:
        times = math.ceil(MIN_STEPS / (steps * epochs))
        dataset = _train_dataset(cfg)
        inner = dict(dataset)
        dataset.clear()
        dataset.update(type="RepeatDataset", times=times, dataset=inner)
        notes.append(
            f"{images} training images are {steps} steps an epoch: each image is taken {times} times an epoch, so that "
            f"{epochs} epochs make {steps * times * epochs} steps"
        )
        steps *= times
    logger = cfg.get("default_hooks", {}).get("logger")
    if logger is not None and logger.get("interval", 10) > max(1, steps // 2):
        logger.interval = max(1, steps // 2)
    scaling = cfg.get("auto_scale_lr")
    base = (scaling or {}).get("base_batch_size")
    if base and not keep_scaling:
        scaling.enable = True
        if base != batch:
            notes.append(
                f"the learning rate is times {batch / base:g}: the config's is for batches of {base} images, here they "
                f"have {batch} (--cfg-options auto_scale_lr.enable=False leaves it)"
            )
    return notes


def _train_dataset(cfg: Config) -> Any:
    """The one `CocoDataset` that a config trains on."""
    found = list(_coco_datasets(cfg, "train"))
    if len(found) != 1:
        kinds = {type_name(item) for item in _inside(cfg, "train_dataloader") if "ann_file" in item}
        raise ConfigError(
            f"--train-json needs a config that trains on one CocoDataset; {cfg.filename} has {len(found)} "
            f"(its data sets: {few(sorted(kinds)) or 'none'})"
        )
    return found[0]


def _coco_datasets(cfg: Config, part: str) -> Iterator[Any]:
    return (item for item in list(_inside(cfg, f"{part}_dataloader")) if type_name(item) == "CocoDataset")


def _inside(cfg: Config, key: str) -> Iterator[Any]:
    return (item for _, item in mappings(cfg.get(key)))
