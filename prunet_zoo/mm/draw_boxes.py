"""Pictures of single images with the boxes found in them, and where they are written."""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from prunet_zoo.errors import DataError
from prunet_zoo.mm.predict import Box

_PLAIN = "DejaVuSans.ttf"  # comes with matplotlib
LEGIBLE = 512  # px; smaller images are enlarged by a whole number, so that the text on them can be read
_MARGIN = 3  # px around the text of a label
KEPT = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of an RGB image with boxes, class names and scores (none where it is NaN); the best box is drawn last.

    An image whose longer side is under half of `LEGIBLE` px is enlarged by a whole number.
    """
    scale = max(1, LEGIBLE // max(image.size))
    size = image.width * scale, image.height * scale
    picture = image.resize(size, Image.Resampling.BICUBIC) if scale > 1 else image.copy()
    draw = ImageDraw.Draw(picture)
    side = max(size)
    line, height = max(2, round(side / 300)), max(12, round(side / 38))
    for box in reversed(boxes):
        colour = class_colour(box.label)
        x1, y1, x2, y2 = (value * scale for value in box.box)
        corners = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        draw.rectangle(corners, outline=colour, width=line)
    named = [drawable(box.name, f"class {box.label}") for box in boxes]
    fonts = [title_font(height, path) for _, path in named]
    scores = ["" if math.isnan(box.score) else f" {box.score:.2f}" for box in boxes]
    texts = [name + score for (name, _), score in zip(named, scores, strict=True)]
    around = [draw.textbbox((0, 0), text, font=font) for text, font in zip(texts, fonts, strict=True)]  # x1, y1, x2, y2
    sizes = [(math.ceil(a[2] - a[0]) + 2 * _MARGIN, math.ceil(a[3] - a[1]) + 2 * _MARGIN) for a in around]
    places = place_labels([(box.box[0] * scale, box.box[1] * scale) for box in boxes], sizes, size)
    for number in reversed(range(len(boxes))):  # above all boxes, so that no line crosses a text
        (x, y), (width, height), colour = places[number], sizes[number], class_colour(boxes[number].label)
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
        bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
        start = (x + _MARGIN - around[number][0], y + _MARGIN - around[number][1])
        draw.text(start, texts[number], fill=(0, 0, 0) if bright else (255, 255, 255), font=fonts[number])
    return picture


def place_labels(
    corners: Sequence[tuple[float, float]], sizes: Sequence[tuple[int, int]], picture: tuple[int, int]
) -> list[tuple[int, int]]:
    """Where labels go (upper left, px): above their box's corner, or below it at the picture's upper edge.

    A label whose place an earlier one has moves up or down to the nearest place that is free. Where none is free it
    stays, under the earlier one. None leaves the picture, if the picture is as large as the label.

    Args:
        corners: upper left (x, y) of each box, the best first.
        sizes: (width, height) of each label.
        picture: (width, height) of the picture.
    """
    taken: list[tuple[int, int, int, int]] = []
    for corner, (width, height) in zip(corners, sizes, strict=True):
        x = round(min(max(0.0, corner[0]), max(0, picture[0] - width)))
        lowest = max(0, picture[1] - height)
        wanted = round(min(corner[1] - height if corner[1] >= height else max(0.0, corner[1]), lowest))
        beside = [place for place in taken if place[0] < x + width and x < place[2]]
        # a place that is free and near touches an earlier label, or is the wanted one
        candidates = [wanted, *(y for place in beside for y in (place[1] - height, place[3]) if 0 <= y <= lowest)]
        free = [y for y in candidates if all(y >= place[3] or y + height <= place[1] for place in beside)]
        y = min(free, key=lambda y: abs(y - wanted), default=wanted)
        taken.append((x, y, x + width, y + height))
    return [(x, y) for x, y, _, _ in taken]


@cache
def class_colour(label: int) -> tuple[int, int, int]:
    """A colour of its own for each class: neighbours lie far apart on the colour wheel (golden ratio)."""
    red, green, blue = colorsys.hsv_to_rgb((0.02 + label * 0.618034) % 1.0, 0.85, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


@cache
def title_font(size: int, path: str) -> Any:
    """The font of labels and titles; ``size`` in px, ``path`` its file (`drawable`)."""
    return ImageFont.truetype(path, size)


@cache
def plain_font() -> str:
    """File of the font that is there wherever matplotlib is."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / _PLAIN)


@cache
def drawable(text: str, instead: str) -> tuple[str, str]:
    """(text, file of a font that has all its characters), or ``instead`` where no font of this machine has them."""
    wanted = {ord(character) for character in text if not character.isspace()}
    if wanted <= _characters(plain_font()):
        return text, plain_font()
    from matplotlib import font_manager

    for entry in font_manager.fontManager.ttflist:
        if "Last Resort" not in entry.name and wanted <= _characters(entry.fname):  # it draws frames alone
            return text, entry.fname
    return instead, plain_font()


@cache
def _characters(path: str) -> frozenset[int]:
    """Code points that a font can draw; none where it is gone or broken."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def encode(picture: Image.Image, path: str | Path) -> bytes:
    """The bytes of a picture in the format of the path's ending (JPEG or PNG)."""
    buffer = io.BytesIO()
    kind = KEPT[Path(path).suffix.lower()]
    picture.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def picture_paths(images: Sequence[Path], out: str | Path) -> list[Path]:
    """Where the picture of each image goes: below ``out``, in the folders that the images have below their common one.

    So images of the same name in several folders do not meet. JPEG and PNG stay what they are; others become PNG, with
    ``.png`` added to their name.

    Raises:
        DataError: a picture would take the place of one of the images.
    """
    parts = [image.resolve().parts[1:] for image in images]
    folders = [part[:-1] for part in parts]
    depth = 0
    while folders and all(len(f) > depth and f[depth] == folders[0][depth] for f in folders):
        depth += 1
    originals = {image.resolve() for image in images}
    taken: set[str] = set()
    paths = []
    for part in parts:
        target = Path(out).joinpath(*part[depth:])
        if target.suffix.lower() not in KEPT:
            target = target.with_name(target.name + ".png")
        stem, number = target.stem, 2
        while str(target).lower() in taken:  # x.bmp beside x.bmp.png, or a system that ignores case
            target, number = target.with_name(f"{stem}_{number}{target.suffix}"), number + 1
        if target.resolve() in originals:
            raise DataError(f"the picture of {target.name} would overwrite the image itself; give another --out")
        taken.add(str(target).lower())
        paths.append(target)
    return paths
