"""The COCO data of a config, looked at before the model is built: every `CocoDataset` of the parts that a run uses.

What it finds is said in a line each: warnings are logged, and what would stop a run, or make it silently wrong, is
raised all at once. ``data_check = False`` in a config leaves it out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.logging import print_log

from prunet_zoo.data.coco import CocoFile, Problem, find_problems, read_coco
from prunet_zoo.data.coco_images import find_image_problems, find_shared, image_path
from prunet_zoo.errors import DataError, few
from prunet_zoo.mm.checks import how_to_restore
from prunet_zoo.mm.levels import type_name

# parts of a detector whose num_classes is not that of the data, or that have none
_OTHER_CLASSES = {
    "rpn_head", "backbone", "neck", "data_preprocessor", "train_cfg", "test_cfg", "init_cfg", "semantic_head",
}  # fmt: skip


class Source(NamedTuple):
    """One `CocoDataset` of a config: where it stands, what it reads, and what is done with it."""

    key: str
    ann_file: Path
    images: Path
    classes: Any  # as the config gives them; None: COCO's
    masks: bool
    scored: bool
    open_names: bool  # the names are given to the model as a text, so its heads do not count classes


def check_coco(cfg: Mapping[str, Any], parts: Sequence[str], images: bool = True) -> list[str]:
    """Look over the COCO data of a config; warnings are logged.

    Args:
        cfg: a run's config.
        parts: of 'train', 'val' and 'test', those that the run uses.
        images: look at the images too.

    Returns:
        A line for each file that was looked at.

    Raises:
        DataError: with a line for each kind of problem that must stop a run.
    """
    if cfg.get("data_check") is False:
        return []
    read = _Reader()
    lines: list[str] = []
    problems: list[tuple[str, Problem]] = []
    seen: dict[str, list[str]] = {}
    for part in parts:
        for source in coco_sources(cfg, part):
            classes = class_names(source)
            coco = read(source.ann_file)
            found = find_problems(coco, classes, source.masks, source.scored)
            if images and not any(problem.stops for problem in found):
                found += find_image_problems(coco, source.images, _remedy(source, coco))
                paths = [image_path(source.images, image["file_name"]) for image in coco.images]
                seen.setdefault(part, []).extend(paths)
                found += _evaluator_problems(cfg, part, source, coco, read)
            if not source.open_names:
                found += _head_problems(cfg.get("model"), classes)
            problems += [(f"{part} data ({coco.name})", problem) for problem in found]
            lines.append(
                f"{part}: {coco.name}: {len(coco.images)} images, {len(coco.annotations)} annotations, {len(classes)} "
                f"classes ({few(classes)})"
            )
    problems += [("train and val data", problem) for problem in _shared(seen)]
    _tell(problems)
    return lines


def coco_sources(cfg: Mapping[str, Any], part: str) -> list[Source]:
    """Every `CocoDataset` that a part of a config reads from files, in wrappers (RepeatDataset, …) too."""
    key = f"{part}_dataloader"
    loader = cfg.get(key)
    evaluators = _evaluators(cfg, part)
    kinds = [kind for e in evaluators for kind in _listed(e.get("metric")) if type_name(e) == "CocoMetric"]
    masks = any(type_name(item) == "LoadAnnotations" and item.get("with_mask") for _, item in mappings(loader, key))
    found = []
    for where, item in mappings(loader, key):
        root, file = item.get("data_root") or "", item.get("ann_file")
        if type_name(item) != "CocoDataset" or item.get("backend_args") or not file or "://" in f"{root}{file}":
            continue
        images = Path(root) / ((item.get("data_prefix") or {}).get("img") or "")
        classes = (item.get("metainfo") or {}).get("classes")
        scored = part != "train" and not any(e.get("format_only") for e in evaluators)
        mask_needed = "segm" in kinds if part != "train" else masks
        open_names = bool(item.get("return_classes"))
        found.append(Source(where, Path(root) / file, images, classes, mask_needed, scored, open_names))
    return found


def class_names(source: Source) -> list[str]:
    """Names of the classes that mmdet will give a data set.

    Raises:
        DataError: they are given as one text, or twice.
    """
    given = source.classes
    if given is None:
        from mmdet.datasets import CocoDataset

        return list(CocoDataset.METAINFO["classes"])
    where = f"{source.key}.metainfo.classes"
    if isinstance(given, str):
        if not Path(given).is_file():
            raise DataError(
                f"{where} is the text {given!r}, of which each letter would be a class; write a list of names, "
                f"({given!r},) with a comma for one class"
            )
        given = [line.rstrip("\r\n") for line in Path(given).read_text(encoding="utf-8").splitlines()]
    names = list(given)
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"{where} has names more than once: {few(map(repr, twice))}; give each class once")
    return names


def mappings(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, mapping) of every mapping in a config's value, itself included."""
    if isinstance(value, Mapping):
        yield key, value
        for name, item in value.items():
            yield from mappings(item, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from mappings(item, f"{key}.{number}")


def heads(model: Any, key: str = "model") -> Iterator[tuple[str, Any]]:
    """(key, config) of everything in a detector that has as many outputs as there are classes: ``num_classes``."""
    if isinstance(model, Mapping):
        if isinstance(model.get("num_classes"), int):
            yield key, model
        for name, item in model.items():
            if name not in _OTHER_CLASSES:
                yield from heads(item, f"{key}.{name}")
    elif isinstance(model, list | tuple):
        for number, item in enumerate(model):
            yield from heads(item, f"{key}.{number}")


class _Reader:
    """Reads each annotation file once; of a file that another one follows, only the newest is kept in memory."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.coco: CocoFile | None = None

    def __call__(self, path: Path) -> CocoFile:
        path = path.resolve()
        if self.coco is None or self.path != path:
            self.coco = None  # before the next: COCO's take gigabytes
            self.path, self.coco = path, read_coco(path)
        return self.coco


def _evaluator_problems(
    cfg: Mapping[str, Any], part: str, source: Source, coco: CocoFile, read: _Reader
) -> Iterator[Problem]:
    """A `CocoMetric` that scores against the annotations of other images than those that are predicted."""
    for evaluator in _evaluators(cfg, part) if part != "train" else []:
        file = evaluator.get("ann_file")
        if type_name(evaluator) != "CocoMetric" or not file or "://" in str(file) or evaluator.get("backend_args"):
            continue
        if Path(file).resolve() == source.ann_file.resolve():
            continue
        if _listed_images(coco) != _listed_images(read(Path(file))):
            text = (
                f"{part}_evaluator scores against {file}, which lists other images than {source.key} reads; give both "
                f"the same file (--cfg-options {part}_evaluator.ann_file={source.ann_file})"
            )
            yield Problem(text, stops=True)


def _listed_images(coco: CocoFile) -> set[tuple[str, str]]:
    return {(str(image.get("id")), str(image.get("file_name"))) for image in coco.images}


def _head_problems(model: Any, classes: Sequence[str]) -> list[Problem]:
    wrong = [(key, head["num_classes"]) for key, head in heads(model) if head["num_classes"] != len(classes)]
    if not wrong:
        return []
    shown = few(f"{key}.num_classes is {count}" for key, count in wrong)
    text = f"it has {len(classes)} classes, but {shown}; give --cfg-options {wrong[0][0]}.num_classes={len(classes)}"
    return [Problem(text, stops=True)]


def _shared(seen: Mapping[str, list[str]]) -> list[Problem]:
    if "train" not in seen or "val" not in seen:
        return []
    pairs = find_shared(seen["train"], seen["val"])
    if not pairs:
        return []
    shown = few(a if a == b else f"{a} = {b}" for a, b in pairs)
    text = (
        f"{len(pairs)} of {len(seen['val'])} validation images are training images too: {shown}; the accuracy measured "
        "on them says nothing about other images"
    )
    return [Problem(text, stops=False)]


def _tell(problems: Sequence[tuple[str, Problem]]) -> None:
    """Log the warnings; raise the rest, a line each. What two parts of a config share is said once."""
    lines = {False: [], True: []}  # type: dict[bool, list[str]]
    for where, problem in problems:
        line = f"{where}: {problem.text}"
        if line not in lines[problem.stops]:
            lines[problem.stops].append(line)
    for line in lines[False]:
        print_log(line, "current", logging.WARNING)
    if lines[True]:
        many = "a problem" if len(lines[True]) == 1 else f"{len(lines[True])} problems"
        listed = "\n  ".join(lines[True])
        raise DataError(f"the data has {many} that must be mended first\n  {listed}")


def _remedy(source: Source, coco: CocoFile) -> str:
    """What to do about missing images."""
    if coco.source:
        return "put them there, or give the folder that the file names start from with --images or --val-images"
    return how_to_restore(source.images / "x", f"{source.key}.data_prefix.img")


def _evaluators(cfg: Mapping[str, Any], part: str) -> list[Any]:
    return [item for item in _listed(cfg.get(f"{part}_evaluator")) if isinstance(item, Mapping)]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
