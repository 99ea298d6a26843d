"""Pictures of single images with the boxes found in them, and where they are written."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from prunet_zoo.errors import DataError
from prunet_zoo.mm.predict import Box

LEGIBLE = 512  # px; smaller images are enlarged by a whole number, so that the text on them can be read
_KEPT = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of an RGB image with boxes, class names and scores; the best box is drawn last.

    An image whose longer side is under half of `LEGIBLE` px is enlarged by a whole number.
    """
    scale = max(1, LEGIBLE // max(image.size))
    size = image.width * scale, image.height * scale
    picture = image.resize(size, Image.Resampling.BICUBIC) if scale > 1 else image.copy()
    draw = ImageDraw.Draw(picture)
    side = max(size)
    line, font = max(2, round(side / 300)), _font(max(12, round(side / 38)))
    for box in reversed(boxes):
        colour = class_colour(box.label)
        x1, y1, x2, y2 = (value * scale for value in box.box)
        corners = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        draw.rectangle(corners, outline=colour, width=line)
    for box in reversed(boxes):  # above all boxes, so that no line crosses a text
        _label(draw, (box.box[0] * scale, box.box[1] * scale), f"{box.name} {box.score:.2f}", box.label, font, size)
    return picture


def _label(
    draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, label: int, font: Any, size: tuple[int, int]
) -> None:
    """Text on its class's colour above ``corner``, or below it at the upper edge; never outside of the picture."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 6
    x = min(max(0.0, corner[0]), max(0.0, size[0] - width))
    y = corner[1] - height if corner[1] >= height else max(0.0, corner[1])
    y = min(y, max(0.0, size[1] - height))
    colour = class_colour(label)
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    draw.text((x + 3 - left, y + 3 - top), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)


@cache
def class_colour(label: int) -> tuple[int, int, int]:
    """A colour of its own for each class: neighbours lie far apart on the colour wheel (golden ratio)."""
    red, green, blue = colorsys.hsv_to_rgb((0.02 + label * 0.618034) % 1.0, 0.85, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


@cache
def _font(size: int) -> Any:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def encode(picture: Image.Image, path: str | Path) -> bytes:
    """The bytes of a picture in the format of the path's ending (JPEG or PNG)."""
    buffer = io.BytesIO()
    kind = _KEPT[Path(path).suffix.lower()]
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
        if target.suffix.lower() not in _KEPT:
            target = target.with_name(target.name + ".png")
        stem, number = target.stem, 2
        while str(target).lower() in taken:  # x.bmp beside x.bmp.png, or a system that ignores case
            target, number = target.with_name(f"{stem}_{number}{target.suffix}"), number + 1
        if target.resolve() in originals:
            raise DataError(f"the picture of {target.name} would overwrite the image itself; give another --out")
        taken.add(str(target).lower())
        paths.append(target)
    return paths
