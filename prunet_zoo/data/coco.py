"""COCO annotation files: read strictly, and looked over for what stops a training run or makes it silently wrong.

A `Problem` stops a run, or is a warning. What every detector fails on, or learns nothing from without a word, stops.
What mmdet leaves out (boxes that are empty or outside, annotations that belong to nothing) is a warning while it is at
most one in ten (or five), as in COCO itself; above that something is wrong with the whole file, and it stops too.

Nothing here knows mmdet; what it does with an annotation is said where a rule follows from it (mmdet 3.3,
``datasets/coco.py``).
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from prunet_zoo.data.coco_masks import find_fault, is_left_out
from prunet_zoo.errors import DataError, few

TOLERATED, A_FEW = 0.1, 5  # share of the annotations (or images), and number, up to which a soft problem is a warning
SOURCE = "prunet_zoo_source"  # in "info" of a copy that we made: the file it was made from
GIVEN = "_given"  # in annotations of such a copy, behind the name of what was changed: what the file has there
_INT, _NUMBER, _ID = (int,), (int, float), (int, str)


@dataclass(frozen=True)
class Problem:
    """One kind of fault: what it is, how often, examples, what to do; and whether training must not start."""

    text: str
    stops: bool


def soft_problem(count: int, total: int, what: str, shown: str, remedy: str) -> Problem:
    """A warning, or, above `TOLERATED` and `A_FEW`, what stops the run."""
    return _problem(count, total, what, shown, remedy, stops=count > max(A_FEW, TOLERATED * total))


@dataclass(frozen=True)
class CocoFile:
    """A file's lists as they are written; ``name`` is what messages call it, ``source`` what it was copied from."""

    path: Path
    name: str
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    source: str | None = None


def read_coco(path: str | Path) -> CocoFile:
    """Read an annotation file.

    Raises:
        DataError: it is missing, no JSON, or has not the three lists that COCO files have.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DataError(f"annotation file {path} is no JSON ({error}); export it again as COCO JSON") from None
    if not isinstance(data, dict):
        raise DataError(f"annotation file {path} is no COCO JSON: it holds a {type(data).__name__}, {_EXPECTED}")
    parts = [data.get(key, []) for key in ("images", "annotations", "categories")]
    missing = [key for key in ("images", "categories") if key not in data]
    wrong = [
        key
        for key, part in zip(("images", "annotations", "categories"), parts, strict=True)
        if not isinstance(part, list) or not all(isinstance(item, dict) for item in part)
    ]
    if missing or wrong:
        what = f"has no {few(map(repr, missing))}" if missing else f"{few(map(repr, wrong))}: no list of objects"
        raise DataError(f"annotation file {path} is no COCO JSON: it {what}, {_EXPECTED}")
    info = data.get("info")
    source = info.get(SOURCE) if isinstance(info, dict) else None
    return CocoFile(
        path, f"{source}, as copied to {path}" if source else str(path), parts[0], parts[1], parts[2], source
    )


_EXPECTED = "where {'images': […], 'annotations': […], 'categories': […]} was expected; export it as COCO JSON"


def find_problems(
    coco: CocoFile,
    classes: Sequence[str] | None = None,
    masks: bool = False,
    scored: bool = False,
    repairable: bool = False,
) -> list[Problem]:
    """What is wrong with a file's content; see `prunet_zoo.data.coco_images` for the images themselves.

    Args:
        coco: the file.
        classes: names that a config has, in its order; None: the config will take those of the file.
        masks: masks are trained or scored, so each annotation needs its segmentation.
        scored: pycocotools is to score results against the file.
        repairable: what `prunet_zoo.data.coco_split` fills in (area, iscrowd, image sizes, annotations' ids) may lack.
    """
    problems = _field_problems(coco, scored, repairable)
    if problems:  # what follows computes with these values
        return problems
    problems = _class_problems(coco, classes)
    if any(problem.stops for problem in problems):
        classes = None  # that nothing of the config's classes is annotated has been said
    for_masks = scored if masks else None
    return [*_duplicates(coco, repairable), *problems, *_annotation_problems(coco, classes, for_masks, repairable)]


def _field_problems(coco: CocoFile, scored: bool, repairable: bool) -> list[Problem]:
    """Fields that lack or have another type; mmdet and pycocotools fail on each of them."""
    images, annotations = coco.images, coco.annotations
    rows: list[tuple[str, Sequence[dict[str, Any]], str, Callable[[list[Any]], list[int]], str]] = [
        ("images", images, "id", _not(_ID), "a number"),
        ("images", images, "file_name", _not((str,)), "a text"),
        ("annotations", annotations, "image_id", _not(_ID), "the id of an image"),
        ("annotations", annotations, "category_id", _not(_INT), "the id of a category"),
        ("annotations", annotations, "bbox", _bad_boxes, "four finite numbers x, y, width, height in px"),
        ("categories", coco.categories, "id", _not(_INT), "a number"),
        ("categories", coco.categories, "name", _not((str,)), "a text"),
    ]
    if not repairable:
        rows += [("images", images, side, _not_positive, "the image's size in px") for side in ("width", "height")]
        rows.append(("annotations", annotations, "id", _not(_ID), "a number"))
        rows.append(("annotations", annotations, "area", _not_finite, "a number (px²)"))
    if scored and not repairable:
        rows.append(("annotations", annotations, "iscrowd", _not((int, bool)), "0 or 1 (pycocotools needs it)"))
    problems = []
    for part, items, key, find, wanted in rows:
        bad = find([item.get(key) for item in items])
        if bad:
            shown = few(_show_item(part, items[i], i, key) for i in bad)
            problems.append(_problem(len(bad), len(items), f"{part} have a bad {key!r}", shown, f"it must be {wanted}"))
    if not images:
        problems.append(Problem("it has no images", stops=True))
    if not coco.categories:
        problems.append(Problem("it has no categories", stops=True))
    return problems


def _duplicates(coco: CocoFile, repairable: bool) -> list[Problem]:
    """Of two images, annotations or categories with one id, one is lost or both are mixed up."""
    problems = []
    for part, items in (("images", coco.images), ("annotations", coco.annotations), ("categories", coco.categories)):
        if part == "annotations" and repairable:
            continue
        twice = _repeated(item["id"] for item in items)
        if twice:
            text = f"{len(twice)} ids of {part} are given more than once: {few(twice)}; each needs an id of its own"
            problems.append(Problem(text, stops=True))
    files = _repeated(item["file_name"] for item in coco.images)
    if files:
        what = "file names belong to more than one image: each of these entries has only a part of the boxes"
        problems.append(soft_problem(len(files), len(coco.images), what, few(files), "join their annotations"))
    return problems


def _class_problems(coco: CocoFile, classes: Sequence[str] | None) -> list[Problem]:
    """Names that the config and the file do not share, or not in one order: mmdet numbers classes as the file does."""
    names = [category["name"] for category in coco.categories]
    used = {item["category_id"] for item in coco.annotations}
    taken = names if classes is not None else [c["name"] for c in coco.categories if c["id"] in used]
    twice = [name for name in _repeated(taken) if classes is None or name in set(classes)]
    problems = []
    if twice:
        text = f"{len(twice)} names belong to more than one category: {few(map(repr, twice))}; rename or join them"
        problems.append(Problem(text, stops=True))
    if classes is None:
        return problems
    here, wanted = set(names), set(classes)
    missing = [name for name in classes if name not in here]
    unknown = [name for name in names if name not in wanted]
    if missing:
        near = {name: difflib.get_close_matches(name, unknown, n=1, cutoff=0.6) for name in missing}
        folded = {other.strip().lower(): other for other in unknown}
        meant = {name: folded.get(name.strip().lower()) or (near[name] or [None])[0] for name in missing}
        shown = few(repr(n) + (f" (meant {meant[n]!r}?)" if meant[n] else "") for n in missing)
        what = f"class names of the config are no category of the file, which has {few(map(repr, names))}"
        remedy = "set metainfo.classes and the heads' num_classes as in the file, or give --train-json, which does"
        problems.append(_problem(len(missing), len(classes), what, shown, remedy))
    elif unknown:
        what = "categories are not among the config's classes; their boxes are left out"
        problems.append(_problem(len(unknown), len(names), what, few(map(repr, unknown)), "", stops=False))
    ordered = [name for name in names if name in wanted]
    if not missing and not twice and ordered != list(classes):
        place = next(i for i, (a, b) in enumerate(zip(ordered, classes, strict=False)) if a != b)
        text = (
            "the config's classes stand in another order than the file's categories, by which mmdet numbers them "
            f"(number {place} is {classes[place]!r} in the config, {ordered[place]!r} in the file), so names would be "
            f"mixed up; give the classes as {few(map(repr, ordered))}"
        )
        problems.append(Problem(text, stops=True))
    return problems


def _annotation_problems(
    coco: CocoFile, classes: Sequence[str] | None, masks: bool | None, repairable: bool
) -> list[Problem]:
    """Annotations that mmdet leaves out, and those that it fails on; ``masks``: whether scored, None: not used."""
    items = coco.annotations
    if not items:
        return [Problem("it has no annotations; there is nothing to learn from or to score against", stops=True)]
    index = {image["id"]: i for i, image in enumerate(coco.images)}
    image = np.array([index.get(item["image_id"], -1) for item in items])
    sizes = np.array([[_size(entry, "width"), _size(entry, "height")] for entry in coco.images] + [[np.inf, np.inf]])
    width, height = sizes[image].T  # of an unknown image: the last row
    x, y, w, h = np.array([item["bbox"] for item in items], dtype=np.float64).T
    area = w * h if repairable else np.array([item["area"] for item in items], dtype=np.float64)
    known = {category["id"] for category in coco.categories}
    negative = (w < 0) | (h < 0)
    empty = ~negative & ((w < 1) | (h < 1) | (area <= 0))  # mmdet leaves out what is under 1 px
    outside = ~negative & ((x < -1) | (y < -1) | (x + w > width + 1) | (y + h > height + 1))
    hint = "COCO's boxes are x, y, width, height in px"
    if ((x >= 0) & (y >= 0) & (x + w <= 1) & (y + h <= 1)).mean() > 0.5:
        hint += "; these look like shares of the image's width and height"
    elif outside.mean() > TOLERATED:
        hint += "; these may be x1, y1, x2, y2, or of images of another size"
    left_out = "annotations belong to no {} of the file and are left out"
    found = [
        (image < 0, left_out.format("image"), "image_id"),
        (np.array([item["category_id"] not in known for item in items]), left_out.format("category"), "category_id"),
        (negative, "boxes have a negative width or height and are left out", ""),
        (empty, "boxes are empty (under 1 px) and are left out", ""),
        (outside, "boxes reach more than 1 px out of their image", ""),
    ]
    problems = []
    for where, what, key in found:
        at = np.flatnonzero(where).tolist()
        if at:
            shown = few(_show_annotation(items[i], coco, int(image[i]), key) for i in at)
            problems.append(soft_problem(len(at), len(items), what, shown, "" if key else hint))
    wanted = known if classes is None else {c["id"] for c in coco.categories if c["name"] in set(classes)}
    across = np.minimum(x + w, width) > np.maximum(x, 0)
    down = np.minimum(y + h, height) > np.maximum(y, 0)
    usable = (image >= 0) & ~negative & ~empty & across & down
    usable &= np.array([item["category_id"] in wanted for item in items])
    if not usable.any():
        text = (
            f"none of its {len(items)} annotations can be used: each has an unknown image, another class or a bad box"
        )
        problems.append(Problem(text, stops=True))
    if masks is not None:
        read = (image >= 0) & ~found[1][0] if masks else usable  # pycocotools reads what mmdet leaves out too
        at = np.flatnonzero(read).tolist()
        problems += _mask_problems([(items[i], height[i], width[i]) for i in at], scored=masks)
    return problems


def _mask_problems(items: Sequence[tuple[dict[str, Any], float, float]], scored: bool) -> list[Problem]:
    """Segmentations that lack (mmdet fails on one), that are none (mmdet ignores the object), or do harm.

    Args:
        items: annotations, each with the height and width of its image in px.
        scored: pycocotools reads them.
    """
    absent, harmful, left_out = [], [], []
    for item, height, width in items:
        segmentation = item.get("segmentation")
        if not segmentation:
            absent.append(called(item))
        elif fault := find_fault(segmentation, height, width, scored):
            harmful.append(f"{called(item)} ({fault})")
        elif is_left_out(segmentation):
            left_out.append(called(item))
    remedy = "export masks too, or take a config for boxes (RetinaNet, RTMDet, Faster R-CNN, …)"
    kinds = (
        (absent, "annotations have no segmentation, which the config trains or scores", remedy, _problem),
        (harmful, "segmentations are malformed, which ends training or gives other masks", "mend them", _problem),
        (
            left_out,
            "segmentations are neither polygons of at least three points nor RLE, and are ignored",
            remedy,
            soft_problem,
        ),
    )
    return [make(len(bad), len(items), what, few(bad), what_to_do) for bad, what, what_to_do, make in kinds if bad]


def _size(image: dict[str, Any], key: str) -> float:
    value: Any = image.get(key)
    return value if type(value) in _NUMBER and 0 < value < np.inf else np.inf


def _not(types: tuple[type, ...]) -> Callable[[list[Any]], list[int]]:
    """Finds the values of no such type; true and false are no numbers, an empty text is none."""

    def find(values: list[Any]) -> list[int]:
        if set(map(type, values)) <= set(types) and "" not in values:
            return []
        return [i for i, value in enumerate(values) if type(value) not in types or value == ""]

    return find


def _not_finite(values: list[Any]) -> list[int]:
    bad = _not(_NUMBER)(values)
    try:
        return bad or np.flatnonzero(~np.isfinite(np.array(values, dtype=np.float64))).tolist()
    except OverflowError:  # an integer of hundreds of digits
        return [i for i, value in enumerate(values) if not abs(value) < 1e300]


def _not_positive(values: list[Any]) -> list[int]:
    bad = _not_finite(values)
    return bad or [i for i, value in enumerate(values) if value <= 0]


def _bad_boxes(values: list[Any]) -> list[int]:
    bad = [i for i, value in enumerate(values) if type(value) is not list or len(value) != 4]
    if not bad:
        rows = {i // 4 for i in _not_finite(list(chain.from_iterable(values)))}
        bad = sorted(rows)
    return bad


def _repeated(values: Iterable[Hashable]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _problem(count: int, total: int, what: str, shown: str, remedy: str, stops: bool = True) -> Problem:
    return Problem(f"{count} of {total} {what}: {shown}{f'; {remedy}' if remedy else ''}", stops)


def _show_item(part: str, item: dict[str, Any], index: int, key: str) -> str:
    called = item.get("file_name") or item.get("name") or item.get("id", f"number {index}")
    value = repr(item[key]) if key in item else "missing"
    return f"{called if part != 'annotations' else item.get('id', f'number {index}')} ({value[:60]})"


def called(item: dict[str, Any]) -> str:
    """An annotation by the id that the user's file gives it."""
    given = item.get(f"id{GIVEN}", item.get("id"))
    return "an annotation without id" if given is None else f"annotation {given}"


def _show_annotation(item: dict[str, Any], coco: CocoFile, image: int, key: str) -> str:
    """An annotation by its id, with the value of ``key`` or with its box and image."""
    if key:
        return f"{called(item)} ({key} {item.get(f'{key}{GIVEN}', item[key])!r})"
    box = ", ".join(f"{value:g}" for value in item["bbox"])
    if image < 0:
        return f"{called(item)} [{box}]"
    entry = coco.images[image]
    size = f"{entry.get('width')}×{entry.get('height')}"
    return f"{called(item)} [{box}] in {entry['file_name']} ({size})"
