"""A user's COCO JSON made ready to train on: whole, with one set of classes, and a share of its images held out.

What export tools leave out is filled in (a box's area, ``iscrowd``, an image's size, an annotation's id), and
categories that nothing is annotated with are dropped: several tools add one. The files that are trained on are copies;
nothing of the user's is changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from prunet_zoo.data.coco import GIVEN, SOURCE, CocoFile, find_problems, read_coco
from prunet_zoo.data.coco_images import UNREADABLE, find_missing, group_by_content, image_path, read_size
from prunet_zoo.errors import DataError, few
from prunet_zoo.files import write_atomic

_MAX_LOOKED = 50  # images by which a folder is recognised
_MAX_ID = 1 << 53  # pycocotools keeps annotations' ids as floats


class OwnData(NamedTuple):
    """What a run trains on: the two files, the folders of their images, and the classes; ``notes`` are for the user.

    ``train_count``: images that are trained on, without those that the config leaves out.
    """

    train_file: Path
    val_file: Path
    train_images: Path
    val_images: Path
    classes: tuple[str, ...]
    train_count: int
    notes: tuple[str, ...]


def prepare_own_data(
    train_json: str | Path,
    folder: str | Path,
    images: str | Path | None = None,
    val_json: str | Path | None = None,
    val_images: str | Path | None = None,
    val_share: float = 0.2,
    seed: int = 0,
    masks: bool = False,
    drop_empty: bool = False,
    min_size: float = 0,
) -> OwnData:
    """Write the annotation files of a run below ``folder``; the same input gives the same files.

    Args:
        train_json: COCO JSON.
        folder: where the copies go; their names contain a hash of their content.
        images: what the file names of ``train_json`` are relative to; default: looked for around it.
        val_json: another COCO JSON to validate on; default: ``val_share`` of the images is held out.
        val_images: as ``images``, of ``val_json``.
        val_share: share of the images, stratified by their classes; images with the same bytes stay on one side.
        seed: another one holds out others.
        masks: segmentations are needed.
        drop_empty: images without annotation are not trained on (``filter_empty_gt``).
        min_size: nor are images with a shorter side, in px.

    Raises:
        DataError: something is missing, or a file has what training would fail on; all of it is named.
        WriteError: the copies cannot be written.
    """
    if val_json is None and not 0 < val_share < 1:
        raise DataError(f"--val-share must be between 0 and 1, got {val_share:g}")
    train, train_folder, notes = _with_images(_read(train_json, masks), images, "--images")
    if val_json is None:
        train, val = hold_out(train, train_folder, val_share, seed)
        val_folder = train_folder
        notes.append(
            f"{len(val.images)} of the {len(train.images) + len(val.images)} images are held out for validation "
            "(always the same ones; give --val-json to choose them yourself)"
        )
    else:
        val, val_folder, more = _with_images(_read(val_json, masks), val_images, "--val-images")
        notes += [note for note in more if note not in notes]
    categories, unused = _categories(train, val)
    if unused:
        notes.append(f"nothing is annotated as {few(map(repr, unused))}: left out of the classes")
    notes += _unlearnt(train, val, categories)
    copied = _completed(train, train_folder, categories)
    train_file = _write(folder, "train", copied)
    val_file = _write(folder, "val", _completed(val, val_folder, categories))
    count, more = _trained_on(copied, drop_empty, min_size)
    if not count:
        raise DataError(
            f"none of the {len(train.images)} training images of {train.name} can be used: {'; '.join(more)}"
        )
    classes = tuple(category["name"] for category in categories)
    return OwnData(train_file, val_file, train_folder, val_folder, classes, count, (*notes, *more))


def _unlearnt(train: CocoFile, val: CocoFile, categories: Sequence[dict[str, Any]]) -> list[str]:
    """A note on the classes that only validation images have."""
    here, there = (
        {c["name"] for c in coco.categories if c["id"] in {item["category_id"] for item in coco.annotations}}
        for coco in (train, val)
    )
    names = [category["name"] for category in categories if category["name"] in there - here]
    if not names:
        return []
    return [
        f"warning: {few(map(repr, names))} stand in validation images alone: they cannot be learnt and count as AP 0; "
        "annotate more images of them"
    ]


def _trained_on(data: Mapping[str, Any], drop_empty: bool, min_size: float) -> tuple[int, list[str]]:
    """Number of the images of a copy that mmdet trains on, and notes on the others."""
    known = {category["id"] for category in data["categories"]}
    annotated = {item["image_id"] for item in data["annotations"] if item["category_id"] in known}
    images = data["images"]
    large = [image for image in images if min(image["width"], image["height"]) >= min_size]
    kept = [image for image in large if image["id"] in annotated]
    notes = []
    if len(large) < len(images):
        notes.append(f"{len(images) - len(large)} training images have a side under {min_size:g} px and are left out")
    if len(kept) < len(large):
        fate = "left out of training (filter_empty_gt in the config)" if drop_empty else "trained on as background"
        notes.append(f"{len(large) - len(kept)} of {len(images)} training images have no annotation: {fate}")
    return len(kept if drop_empty else large), notes


def hold_out(coco: CocoFile, folder: str | Path, share: float, seed: int) -> tuple[CocoFile, CocoFile]:
    """Divide a file in two: for training, and ``share`` of the images for validation.

    Where an image goes depends on its name, ``seed``, and on what is annotated: each class in turn, from the rarest on,
    gets its share of images, and keeps at least one image to train on. Images with the same bytes go together. Some
    annotated image is always held out, if need be a class's only one.

    Raises:
        DataError: there is nothing to divide.
    """
    paths = {image["id"]: image_path(folder, image["file_name"]) for image in coco.images}
    leader = {path: same[0] for same in group_by_content(sorted(paths.values())) for path in same}
    groups: dict[str, list[tuple[str, Any]]] = defaultdict(list)
    for image in coco.images:
        path = paths[image["id"]]
        groups[leader.get(path, path)].append((image["file_name"], image["id"]))
    drawn = {group: hashlib.sha256(f"{seed}/{min(same)[0]}".encode()).digest() for group, same in groups.items()}
    units = [[i for _, i in groups[group]] for group in sorted(groups, key=lambda name: drawn[name])]
    if len(units) < 2:
        raise DataError(
            f"{coco.name} has {len(units)} different image(s), of which none can be held out for validation; "
            "add images, or give --val-json"
        )
    held = _choose(units, _labels(coco), share)
    if held is None:
        raise DataError(
            f"all annotations of {coco.name} are of one image, which cannot be trained on and validated on; annotate "
            "more images, or give --val-json"
        )
    return _part(coco, held, inside=False), _part(coco, held, inside=True)


def _labels(coco: CocoFile) -> dict[Any, set[Any]]:
    known = {category["id"] for category in coco.categories}
    labels: dict[Any, set[Any]] = defaultdict(set)
    for item in coco.annotations:
        if item["category_id"] in known:
            labels[item["image_id"]].add(item["category_id"])
    return labels


def _choose(units: Sequence[list[Any]], labels: Mapping[Any, set[Any]], share: float) -> set[Any] | None:
    """Ids of the images to hold out, or None; ``units`` are groups of ids that stay together, in the order to take."""
    # of each unit, how many images have a label; None: those without annotation
    kinds = [Counter(label for i in unit for label in labels.get(i) or {None}) for unit in units]
    having: dict[Any, list[int]] = defaultdict(list)
    for number, kind in enumerate(kinds):
        for label in kind:
            having[label].append(number)
    left = {label: len(members) for label, members in having.items()}  # units to train on
    side: dict[int, bool] = {}
    for label in sorted(having, key=lambda name: (len(having[name]), str(name))):
        members = having[label]
        count = sum(kinds[number][label] for number in members)
        wanted = max(1, round(share * count)) - sum(kinds[n][label] for n in members if side.get(n))
        for number in members:
            if number not in side:
                nearer = kinds[number][label] < 2 * wanted  # a group of many images may be too large a share
                side[number] = nearer and all(left[other] > 1 for other in kinds[number])
                if side[number]:
                    wanted -= kinds[number][label]
                    left.update({other: left[other] - 1 for other in kinds[number]})
    annotated = [number for number, kind in enumerate(kinds) if set(kind) != {None}]
    if not any(side[number] for number in annotated or side):  # each class has one image: some have to go without
        candidates = annotated or list(side)
        if len(candidates) < 2:
            return None
        side[min(candidates, key=lambda n: (sum(left[k] < 2 for k in kinds[n] if k is not None), len(units[n])))] = True
    return {i for number, unit in enumerate(units) if side[number] for i in unit}


def _part(coco: CocoFile, held: set[Any], inside: bool) -> CocoFile:
    images = [image for image in coco.images if (image["id"] in held) == inside]
    ids = {image["id"] for image in images}
    known = {image["id"] for image in coco.images}
    # annotations of no image stay with the training images, to be named when these are checked
    annotations = [a for a in coco.annotations if a["image_id"] in ids or not (inside or a["image_id"] in known)]
    return CocoFile(coco.path, coco.name, images, annotations, coco.categories)


def find_images(coco: CocoFile) -> Path:
    """The folder that a file's image names start from: of those around the file, the one that has most of them.

    Raises:
        DataError: none has any; the folders that were looked at are named.
    """
    step = max(1, len(coco.images) // _MAX_LOOKED)
    names = [image["file_name"] for image in coco.images[::step]]
    near = coco.path.resolve().parent
    part = re.sub(r"^(instances|annotations)_|_(annotations|coco)$", "", coco.path.stem.lstrip("_"))
    inside = ["", "images", f"images/{part}", part, f"{part}/images", "JPEGImages", "data", "img", "imgs"]
    folders = dict.fromkeys(Path(os.path.normpath(base / name)) for base in (near, near.parent) for name in inside)
    found = {folder: len(names) - len(find_missing(image_path(folder, name) for name in names)) for folder in folders}
    best = max(found, key=lambda folder: found[folder])
    if not found[best]:
        raise DataError(
            f"the images of {coco.name} ({few(names)}) are in none of the folders around it "
            f"({few(f for f in folders if f.is_dir())}); give the folder that these names start from with --images"
        )
    return best


def _with_images(coco: CocoFile, given: str | Path | None, option: str) -> tuple[CocoFile, Path, list[str]]:
    """A file, the folder of its images, and notes; backslashes in its names become / where that finds the images."""
    slashed = replace(coco, images=[{**i, "file_name": i["file_name"].replace("\\", "/")} for i in coco.images])
    count = sum("\\" in image["file_name"] for image in coco.images)
    if given is None:
        folder = find_images(slashed)
        notes = [f"the images of {coco.name} are taken from {_short(folder)} (another folder: {option} DIR)"]
    else:
        folder, notes = Path(given).absolute(), []
        if not folder.is_dir():
            raise DataError(
                f"{option} {given} is no folder; give the one that the file names in {coco.name} start from"
            )
    if not count or not find_missing(image_path(folder, image["file_name"]) for image in coco.images):
        return coco, folder, notes
    return slashed, folder, [*notes, f"{count} file names of {coco.name} have backslashes, which are read as /"]


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _read(path: str | Path, masks: bool) -> CocoFile:
    """Read a user's file; raises `DataError` with all that cannot be filled in."""
    coco = read_coco(path)
    lines = [problem.text for problem in find_problems(coco, masks=masks, repairable=True) if problem.stops]
    if lines:
        listed = "\n  ".join(lines)
        raise DataError(f"{coco.name} has problems that must be mended first\n  {listed}")
    return coco


def _categories(train: CocoFile, val: CocoFile) -> tuple[list[dict[str, Any]], list[str]]:
    """Categories that something is annotated with, in the order of the training file; and names of the others."""
    used = [{item["category_id"] for item in coco.annotations} for coco in (train, val)]
    in_val = {category["name"] for category in val.categories if category["id"] in used[1]}
    known = {category["name"] for category in train.categories}
    unknown = sorted(in_val - known)
    if unknown:
        raise DataError(
            f"{val.name} has {len(unknown)} categories that {train.name} does not have: {few(map(repr, unknown))} (it "
            f"has {few(map(repr, sorted(known)))}); name them alike in both"
        )
    kept = {c["name"]: c for c in train.categories if c["id"] in used[0]}
    for category in train.categories:
        if category["name"] in in_val:
            kept.setdefault(category["name"], category)
    ordered = [category for category in train.categories if kept.get(category["name"]) is category]
    return ordered, [name for name in dict.fromkeys(c["name"] for c in train.categories) if name not in kept]


def _completed(coco: CocoFile, folder: Path, categories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The COCO JSON of a copy."""
    target = {category["name"]: category["id"] for category in categories}
    number_of = {c["id"]: target[c["name"]] for c in coco.categories if c["name"] in target}
    # what is of an unknown category stays so, to be named when the copy is checked
    nowhere = max([0, *target.values()]) + 1
    annotations: list[dict[str, Any]] = []
    for item, number in zip(coco.annotations, _numbered(coco.annotations), strict=True):
        area: Any = item.get("area")
        if type(area) not in (int, float) or not 0 < area < math.inf:
            area = item["bbox"][2] * item["bbox"][3]
        filled = {"area": area, "iscrowd": int(bool(item.get("iscrowd")))}
        for key, value in (("id", number), ("category_id", number_of.get(item["category_id"], nowhere))):
            if value != item.get(key):
                filled[f"{key}{GIVEN}"] = item.get(key)  # what messages show
            filled[key] = value
        annotations.append({**item, **filled})
    return {
        "info": {SOURCE: coco.name, "description": "copy made for training; the source is unchanged"},
        "images": [{**image, **_measured(image, folder)} for image in coco.images],
        "annotations": annotations,
        "categories": list(categories),
    }


def _numbered(annotations: Sequence[dict[str, Any]]) -> list[int]:
    """Ids for annotations, as they are where pycocotools can work with them (it takes 0 for no object), and unique."""
    given = [item.get("id") for item in annotations]
    taken = {number for number in given if type(number) is int and 0 < number < _MAX_ID}
    following = max(taken, default=0)
    seen: set[int] = set()
    numbers = []
    for number in given:
        if type(number) is not int or number not in taken or number in seen:
            following = number = following + 1
        seen.add(number)
        numbers.append(number)
    return numbers


def _measured(image: dict[str, Any], folder: Path) -> dict[str, int]:
    """Width and height read from the image where the annotations do not tell them."""
    if all(type(image.get(side)) in (int, float) and image[side] > 0 for side in ("width", "height")):
        return {}
    path = image_path(folder, image["file_name"])
    try:
        width, height = read_size(path)
    except UNREADABLE as error:
        raise DataError(
            f"image {path}, whose size the annotations do not tell, cannot be read: {error}; put it back or remove it "
            "from the annotations"
        ) from None
    return {"width": width, "height": height}


def _write(folder: str | Path, part: str, data: dict[str, Any]) -> Path:
    content = json.dumps({key: value for key, value in data.items() if key != "info"}, sort_keys=True)
    path = Path(folder) / f"{part}-{hashlib.sha256(content.encode()).hexdigest()[:12]}.json"
    if not path.is_file():  # written whole, so what is there is the same
        write_atomic(path, json.dumps(data, ensure_ascii=False))
    return path
