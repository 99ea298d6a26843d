"""Pictures of what a detector is trained on: images with boxes, masks and names after the config's augmentation."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image, ImageDraw

from prunet_zoo.errors import DataError
from prunet_zoo.files import write_atomic
from prunet_zoo.mm.checks import unreadable_image
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.coco_checks import mappings, type_name
from prunet_zoo.mm.draw_boxes import KEPT, class_colour, draw_boxes, drawable, encode, title_font
from prunet_zoo.mm.network import register_mmdet
from prunet_zoo.mm.predict import Box

SHEET = "sheet.png"
_COLUMNS, _TILE, _TITLE, _GAP = 4, 320, 22, 8  # of the sheet: images in a row, and sizes in px
_TRANSPARENCY = 0.55  # how much of the image is seen through a mask


def browse(cfg: Config, part: str = "train", number: int = 12, out: str | Path = "browse", seed: int = 0) -> list[Path]:
    """Draw samples of a config's data as a detector gets them.

    Args:
        cfg: any mmdet config.
        part: 'train', 'val' or 'test'.
        number: how many samples, drawn without repetition; all when there are fewer.
        out: a folder for single pictures and the sheet of all, or a ``.png`` or ``.jpg`` for the sheet alone.
        seed: of the choice and of the augmentation: the same one gives the same pictures.

    Returns:
        What was written, the sheet first.

    Raises:
        ConfigError: the config has no such data, or they are no detection data; ``out`` is another kind of picture.
        DataError: there is nothing to draw, or an image cannot be read.
    """
    if number < 1:
        raise ConfigError(f"--number must be at least 1, got {number}")
    out = Path(out)
    alone = out.suffix.lower() in KEPT
    if not alone and out.suffix.lower() in {*Image.registered_extensions(), ".svg"}:
        raise ConfigError(f"--out {out}: the sheet is written as .png or .jpg; give F.png, F.jpg or a folder")
    samples = load_samples(cfg, part, number, seed)
    pictures = [(title, draw_sample(image, sample, classes)) for title, image, sample, classes in samples]
    sheet = out if alone else out / SHEET
    write_atomic(sheet, encode(contact_sheet(pictures), sheet))
    written = [sheet]
    if sheet != out:
        for place, (title, picture) in enumerate(pictures):
            path = out / f"{place:03d}_{Path(title).stem}.png"
            write_atomic(path, encode(picture, path))
            written.append(path)
    return written


def load_samples(cfg: Config, part: str, number: int, seed: int) -> list[tuple[str, Image.Image, Any, Sequence[str]]]:
    """(file name, RGB image, data sample, class names) of ``number`` samples, augmented."""
    loader = cfg.get(f"{part}_dataloader")
    if not loader or not loader.get("dataset"):
        raise ConfigError(f"{cfg.filename} has no {part}_dataloader with a dataset, so there is nothing to draw")
    if cfg.get("default_scope") == "mmdet":
        register_mmdet()
    init_default_scope(cfg.get("default_scope", "mmdet"))
    wanted = copy.deepcopy(loader.dataset)
    for _, item in mappings(wanted):
        if type_name(item) == "RepeatDataset":
            item["times"] = 1  # each image once
    dataset = DATASETS.build(wanted)
    if not len(dataset):
        raise DataError(f"the {part} data of {cfg.filename} has no image (images without boxes may be left out)")
    # MMEngine fails so late on a class name that does not exist that this is the first place to see it
    classes = (dataset.metainfo or {}).get("classes") or ()
    chosen = random.Random(seed).sample(range(len(dataset)), min(number, len(dataset)))
    samples = []
    for index in chosen:
        _set_seed(seed, index)
        try:
            packed = dataset[index]
        except FileNotFoundError as error:
            raise DataError(f"an image of the {part} data is missing: {error}") from None
        except AssertionError as error:
            if not (path := unreadable_image(error)):
                raise
            raise DataError(f"image {path} of the {part} data cannot be read: it is damaged or cut off") from None
        sample = packed.get("data_samples") if isinstance(packed, dict) else None
        if sample is None or "gt_instances" not in sample:
            raise ConfigError(
                f"the {part} data of {cfg.filename} gives no boxes; its pipeline must end with PackDetInputs"
            )
        samples.append((_title(sample, dataset, index), _as_image(packed["inputs"], cfg), sample, classes))
    return samples


def draw_sample(image: Image.Image, sample: Any, classes: Sequence[str]) -> Image.Image:
    """An image with the masks, boxes and class names of a data sample; ignored objects are marked so."""
    found = [(sample.gt_instances, "")]
    if "ignored_instances" in sample:
        found.append((sample.ignored_instances, " (ignored)"))
    boxes: list[Box] = []
    for instances, mark in found:
        if "bboxes" not in instances:
            continue
        corners = getattr(instances.bboxes, "tensor", instances.bboxes).tolist()
        labels = [int(label) for label in instances.labels]
        if "masks" in instances:
            image = _with_masks(image, instances.masks, labels)
        for box, label in zip(corners, labels, strict=True):
            name = classes[label] if label < len(classes) else f"class {label}"
            boxes.append(Box(label, f"{name}{mark}", float("nan"), tuple(box)))
    return draw_boxes(image, boxes)


def contact_sheet(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """All pictures in rows, each below its title."""
    columns = min(_COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = _TILE + _GAP, _TILE + _TITLE + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (title, picture) in enumerate(pictures):
        x, y = _GAP + place % columns * width, _GAP + place // columns * height
        shown, path = drawable(title, f"sample {place}")
        font = title_font(13, path)
        while len(shown) > 4 and draw.textlength(shown, font=font) > _TILE:
            shown = "…" + shown[2:]
        draw.text((x, y), shown, fill="black", font=font)
        scale = _TILE / max(picture.size)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (x, y + _TITLE))
    return sheet


def _set_seed(seed: int, index: int) -> None:
    """Augmentation draws from the generators of Python, numpy and torch."""
    number = seed * 1_000_003 + index
    random.seed(number)
    np.random.seed(number % (1 << 32))
    torch.manual_seed(number)


def _title(sample: Any, dataset: Any, index: int) -> str:
    """The image's file name; pipelines that drop it leave it in the data set."""
    path = sample.get("img_path")
    while path is None and dataset is not None:
        if hasattr(dataset, "get_data_info"):
            path = dataset.get_data_info(index).get("img_path", f"image {index}")
        dataset = getattr(dataset, "dataset", None)
    return Path(str(path)).name


def _as_image(inputs: Any, cfg: Config) -> Image.Image:
    """The RGB image of a pipeline's output (3, H, W), whose channels stand as mmcv reads them: blue, green, red."""
    pixels = inputs.detach().float().cpu().numpy().transpose(1, 2, 0)
    if pixels.min() < 0 or pixels.max() > 255:  # a pipeline that normalises: stretched to what can be seen
        pixels = (pixels - pixels.min()) * (255 / max(float(pixels.max() - pixels.min()), 1e-6))
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 2::-1]).round().astype(np.uint8))


def _with_masks(image: Image.Image, masks: Any, labels: Sequence[int]) -> Image.Image:
    """Blend masks (N, H, W) in their classes' colours over an image."""
    pixels = np.asarray(image, dtype=np.float32).copy()
    for mask, label in zip(masks.to_ndarray(), labels, strict=True):
        inside = mask.astype(bool)
        pixels[inside] = _TRANSPARENCY * pixels[inside] + (1 - _TRANSPARENCY) * np.array(class_colour(label))
    return Image.fromarray(pixels.round().astype(np.uint8))
