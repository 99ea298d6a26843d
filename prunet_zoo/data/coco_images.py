"""The images of COCO annotation files: are they there, of the size that is said, and not in train and val both?

Of up to `DECODED` images all are decoded; of more, so many spread over the file, and of the others the end is read,
which is missing where a download or copy was cut off: COCO's 118,000 images take seconds.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from prunet_zoo.data.coco import CocoFile, Problem, soft_problem
from prunet_zoo.errors import few
from prunet_zoo.files import sha256_of

DECODED = 2000  # images of a file that are decoded at most
# what PIL raises for a file that is no image, or is damaged
UNREADABLE = (
    UnidentifiedImageError, OSError, EOFError, SyntaxError, ValueError, IndexError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
_PNG_END = b"IEND\xaeB`\x82"
_ENDS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG": _PNG_END}  # by a format's first bytes: what its files end with
_LAST = 64  # bytes at a file's end in which the mark is looked for
_ORIENTATION, _TURNED = 274, (5, 6, 7, 8)  # the EXIF tag; values by which width and height change places
_PIECE = 1 << 12  # bytes read at both ends of a file before the whole is


def image_path(folder: str | Path, file_name: str) -> str:
    """Where mmdet looks for an image."""
    return os.path.join(folder, file_name)


def find_missing(paths: Iterable[str]) -> list[str]:
    """Those of ``paths`` that are no files; each folder is listed once."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        by_folder[os.path.dirname(path)].append(path)
    missing = []
    for folder, inside in by_folder.items():
        try:
            with os.scandir(folder or ".") as entries:
                names = {entry.name for entry in entries if entry.is_file()}
        except OSError:
            names = set()
        missing += [path for path in inside if os.path.basename(path) not in names]
    return missing


def read_size(path: str | Path) -> tuple[int, int]:
    """Width and height in px as detectors see the image: turned as its EXIF data say. It reads the header alone.

    Raises:
        OSError: it is no image that can be read.
    """
    with Image.open(path) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(_ORIENTATION) in _TURNED else (width, height)


def decode(path: str | Path) -> tuple[int, int]:
    """Read an image whole, a JPEG at an eighth of its size; returns what `read_size` does.

    Raises:
        one of UNREADABLE: it is damaged or cut off.
    """
    with Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION) in _TURNED
        image.draft(None, (1, 1))  # None keeps the mode
        image.load()
        if image.format == "PNG" and _PNG_END not in Path(path).read_bytes():  # OpenCV refuses what PIL can read
            raise OSError("image file is truncated")
    return (height, width) if turned else (width, height)


def has_end(path: str) -> bool:
    """Whether a JPEG or PNG ends as such files do; what stands behind the end is allowed, but seen as no end."""
    try:
        with open(path, "rb") as file:
            first, size = file.read(4), os.fstat(file.fileno()).st_size
            end = next((mark for start, mark in _ENDS.items() if first.startswith(start)), b"")
            file.seek(max(0, size - _LAST))
            return size > 0 and end in file.read()
    except OSError:
        return False


def find_image_problems(coco: CocoFile, folder: str | Path, remedy: str = "") -> list[Problem]:
    """Images that are not there, cannot be read, or have another size than the file says.

    Args:
        coco: a file whose fields are sound (`prunet_zoo.data.coco.find_problems`).
        folder: what its file names are relative to.
        remedy: what to do about missing images.
    """
    paths = [image_path(folder, image["file_name"]) for image in coco.images]
    missing = find_missing(paths)
    if missing:
        shown = few(missing) + _other_spelling(missing[0])
        what = f"{len(missing)} of {len(paths)} images do not exist"
        remedy = remedy or "put them there, or give the folder that the file names start from"
        return [Problem(f"{what}: {shown}; {remedy}", stops=True)]
    step = -(-len(paths) // DECODED)
    unreadable, wrong, looked = [], [], 0
    for i, path in enumerate(paths):
        if i % step and has_end(path):
            continue
        looked += 1
        said = (coco.images[i].get("width"), coco.images[i].get("height"))
        try:
            found = decode(path)
        except UNREADABLE as error:
            unreadable.append(f"{path} ({str(error).replace(repr(path), '').strip() or type(error).__name__})")
            continue
        if None not in said and found != said:
            wrong.append(f"{path} is {found[0]}×{found[1]}, annotated as {said[0]}×{said[1]}")
    problems = []
    if unreadable:
        text = f"{len(unreadable)} of {len(paths)} images are damaged or no images: {few(unreadable)}; replace them"
        problems.append(Problem(text, stops=True))
    if wrong:
        what = "images looked at have another size than the annotations say, so their boxes are elsewhere"
        hint = "annotate the images that are trained on, or scale width, height and boxes"
        problems.append(soft_problem(len(wrong), looked, what, few(wrong), hint))
    return problems


def find_shared(train: Sequence[str], val: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs (training image, validation image) that are one file, or two files with the same bytes."""
    sizes = {path: _file_size(path) for path in [*train, *val]}
    wanted = {sizes[path] for path in val}  # hundreds of thousands of training images: only these are looked into
    candidates = [path for path in train if sizes[path] in wanted]
    originals = set(train)
    pairs = [(path, path) for path in val if path in originals]
    for same in group_by_content([*candidates, *(path for path in val if path not in originals)]):
        first = next((path for path in same if path in originals), None)
        if first is not None:
            pairs += [(first, path) for path in same if path not in originals]
    return pairs


def group_by_content(paths: Iterable[str]) -> list[list[str]]:
    """Groups of two and more files with the same bytes: equal sizes first, then both ends, then the sha256."""
    groups = [list(dict.fromkeys(paths))]
    for key in (_file_size, _ends, lambda path: sha256_of(Path(path))):
        groups = [group for old in groups for group in _split(old, key)]
    return groups


def _split(paths: list[str], key: Callable[[str], Any]) -> list[list[str]]:
    groups = defaultdict(list)
    for path in paths:
        groups[key(path)].append(path)
    groups.pop(None, None)  # what cannot be read is found elsewhere
    return [group for group in groups.values() if len(group) > 1]


def _file_size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _ends(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            start = file.read(_PIECE)
            file.seek(max(0, os.fstat(file.fileno()).st_size - _PIECE))
            return hashlib.sha256(start + file.read(_PIECE)).digest()
    except OSError:
        return None


def _other_spelling(path: str) -> str:
    """Says when the folder has the name in other letters or with another ending, or backslashes stand for folders."""
    if "\\" in path and os.sep == "/":
        return " (backslashes in file_name are no folders here: write / in the annotation file)"
    folder, name = os.path.split(path)
    try:
        near = [other for other in sorted(os.listdir(folder or ".")) if _loose(other) == _loose(name)]
    except OSError:
        return ""
    return f" (there is {near[0]})" if near else ""


def _loose(name: str) -> str:
    return name.rpartition(".")[0].strip().lower() or name.lower()
