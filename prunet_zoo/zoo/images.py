"""Images to predict on: found in files, folders and patterns, read as RGB, read ahead of the network."""

from __future__ import annotations

import glob
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from prunet_zoo.errors import DataError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
# what Pillow raises for damaged files of its many formats
_UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
_NOT_TEXT = re.compile(r"[\ud800-\udfff]")  # how Python keeps the bytes of a file name that is not UTF-8
_NOT_IN_A_LINE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # tabs, ends of lines, what steers a terminal
T = TypeVar("T")


class Failure(NamedTuple):
    """An image that could not be read, and why."""

    path: Path
    error: str


def as_text(path: str | Path) -> str:
    """A path as text that can be encoded: bytes that are not UTF-8 become ``\\xff`` and the like."""
    return _NOT_TEXT.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", str(path))


def as_field(path: str | Path) -> str:
    """`as_text` as one field of a line of a table: tabs, ends of lines and other control characters are escaped too."""
    return _NOT_IN_A_LINE.sub(lambda found: repr(found[0])[1:-1], as_text(path))


def find_images(sources: Iterable[str | Path], leave_out: str | Path | None = None) -> list[Path]:
    """Images of files, folders (with all folders in them) and patterns such as ``'photos/**/*.jpg'``.

    Args:
        sources: a file is taken whatever its ending; in a folder, and in folders that a pattern finds, only files with
            an ending of `ENDINGS`, in the order of their names.
        leave_out: a folder inside of which no image is looked for (results of an earlier run), unless a source names it
            or what is in it.

    Returns:
        Each image once, in the order of ``sources``.

    Raises:
        DataError: something does not exist, or there is no image in it.
    """
    found: dict[Path, None] = {}
    hidden = None if leave_out is None else Path(leave_out).resolve()
    for source in sources:
        path = Path(source).expanduser()
        if path.exists():
            images = _images_in(path, hidden)
        elif glob.has_magic(str(path)):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            if not matches:
                raise DataError(f"the pattern {source} matches no file; it is relative to {Path.cwd()}")
            if hidden is not None and not _fixed_part(path).resolve().is_relative_to(hidden):
                matches = [match for match in matches if not match.resolve().is_relative_to(hidden)]
            images = [image for match in matches for image in _images_in(match, hidden, pattern=True)]
        else:
            raise DataError(f"image {source} does not exist; give files, folders or a quoted pattern ('photos/*.jpg')")
        if not images:
            raise DataError(f"there is no image in {source}; known endings are {', '.join(ENDINGS)}")
        found.update(dict.fromkeys(images))
    if not found:
        raise DataError("no image was given; give files, folders or a quoted pattern ('photos/*.jpg')")
    return list(found)


def _fixed_part(pattern: Path) -> Path:
    """The folder that a pattern names before its first ``*``, ``?`` or ``[``."""
    fixed = pattern
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    return fixed


def _images_in(path: Path, hidden: Path | None, pattern: bool = False) -> list[Path]:
    if path.is_file():
        return [path] if not pattern or path.suffix.lower() in ENDINGS else []
    images: list[Path] = []
    for folder, subfolders, files in os.walk(path):
        subfolders[:] = sorted(n for n in subfolders if hidden is None or (Path(folder) / n).resolve() != hidden)
        images += (Path(folder) / n for n in sorted(files) if Path(n).suffix.lower() in ENDINGS and n[0] != ".")
    return images


def read_rgb(path: str | Path) -> Image.Image:
    """Read an image as 8-bit RGB, upright.

    The turn that a camera noted (EXIF) is applied. Grey, palette, CMYK and 16-bit images are converted; transparency is
    dropped, as the evaluation of this package, timm and OpenCV do; of an animation the first frame is taken.

    Raises:
        DataError: no image, damaged, or of a kind whose range of values is not known; the file is named.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(upright)
    except DataError as error:
        raise DataError(f"cannot read image {as_text(path)}: {error}") from None
    except MemoryError:
        raise DataError(f"cannot read image {as_text(path)}: it does not fit into memory") from None
    except _UNREADABLE as error:
        reason = "not an image, or of a format that Pillow does not know"
        raise DataError(
            f"cannot read image {as_text(path)}: {reason if isinstance(error, UnidentifiedImageError) else error}"
        ) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion cuts off everything above 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise DataError("its values are beyond 16 bits; save it with 8 or 16 bits for each channel")
        image = Image.fromarray((values.astype(np.float64) / 257 + 0.5).astype(np.uint8))
    elif image.mode == "F":
        raise DataError("it holds floating-point values, whose range is not known; save it with 8 or 16 bits")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # a palette may be transparent
    return image.convert("RGB")


def read_ahead(
    paths: Sequence[Path], batch_size: int, read: Callable[[Path], T], threads: int = 4
) -> Iterator[tuple[list[tuple[Path, T]], list[Failure]]]:
    """Batches of images that were read; the next batch is read while the caller works on this one.

    Args:
        paths: the images.
        batch_size: how many make a batch; images that cannot be read leave it smaller.
        read: reads one image; called in threads.
        threads: how many read at once.

    Yields:
        What was read with its path, and what `read` refused by a `DataError`.
    """
    batches = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    with ThreadPoolExecutor(threads) as pool:
        waiting: list[Future[T]] = [pool.submit(read, path) for path in batches[0]] if batches else []
        try:
            for number, batch in enumerate(batches):
                now = waiting
                waiting = [pool.submit(read, path) for path in batches[number + 1]] if number + 1 < len(batches) else []
                good: list[tuple[Path, T]] = []
                failed: list[Failure] = []
                for path, future in zip(batch, now, strict=True):
                    try:
                        good.append((path, future.result()))
                    except DataError as error:
                        failed.append(Failure(path, str(error)))
                yield good, failed
        finally:  # the caller stopped: do not read the rest
            for future in waiting:
                future.cancel()
