"""Names beside the points of a picture, so that none covers another, a point or the edge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels
MARKER = 7.0  # px around a point that are kept free


def overlap(a: Box, b: Box) -> float:
    """Area that two boxes share, in px²."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def place_boxes(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    inside: Box,
    line: Sequence[tuple[float, float]] = (),
) -> list[Box]:
    """A box of each size near its point: the nearest place where it covers no point and no earlier box.

    Points in a crowd choose first. Where nothing is free within reach, the place that covers least is taken.

    Args:
        points: in px.
        sizes: (width, height) of each box in px.
        inside: the area that boxes must not leave.
        line: the corners of a line that boxes cover only where everything near is taken.
    """
    markers = [(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in points]
    crowd = [sum(math.dist(p, q) < 80 for q in points) for p in points]
    dots = [dot for a, b in pairwise(line) for dot in _dots(a, b)]
    boxes: dict[int, Box] = {}
    for i in sorted(range(len(points)), key=lambda i: -crowd[i]):
        taken = [*markers, *boxes.values()]

        def cost(box: Box, distance: float, taken: list[Box] = taken) -> float:
            covered = sum(overlap(box, other) for other in taken)
            left = (box[2] - box[0]) * (box[3] - box[1]) - overlap(box, inside)
            crossed = sum(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in dots)
            return 1e3 * (covered + 10 * left) + distance + 3 * crossed

        boxes[i] = min(_places(points[i], sizes[i]), key=lambda place: cost(*place))[0]
    return [boxes[i] for i in range(len(points))]


def _dots(a: tuple[float, float], b: tuple[float, float]) -> list[tuple[float, float]]:
    """Points on the way from a to b, one every 3 px."""
    count = max(1, round(math.dist(a, b) / 3))
    return [(a[0] + (b[0] - a[0]) * i / count, a[1] + (b[1] - a[1]) * i / count) for i in range(count + 1)]


def _places(point: tuple[float, float], size: tuple[float, float]) -> list[tuple[Box, float]]:
    """Boxes around a point, and what each place costs: near ones first, right and left before above and below."""
    (x, y), (width, height) = point, size
    found = []
    for ring in range(12):
        gap = MARKER + 2 + 9 * ring
        for step in range(16):
            angle = step * math.pi / 8
            # the side or corner of the box that faces the point stands `gap` away from it
            cx = x + math.cos(angle) * (gap + width / 2)
            cy = y + math.sin(angle) * (gap + height / 2)
            box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            found.append((box, gap + (0.0 if step % 8 == 0 else 1.0)))
    return found


def label_points(
    ax: Any,
    xs: Sequence[float],
    ys: Sequence[float],
    names: Sequence[str],
    colors: Sequence[str],
    line: Sequence[tuple[float, float]] = (),
    size: float = 7.5,
) -> list[Box]:
    """Write ``names`` beside the points of a matplotlib axes whose limits are final.

    Args:
        ax: the axes.
        xs, ys: the points, in the units of the axes.
        names: one a point; ``colors``: of each name and of the thin line to a name that stands further away.
        line: the corners of a line to be left free where that is possible.
        size: of the letters, in points.

    Returns:
        The boxes of the names in px.
    """
    figure = ax.figure
    renderer = figure.canvas.get_renderer()
    style = {"transform": ax.transAxes, "va": "bottom", "fontsize": size, "zorder": 5}
    texts = [ax.text(0, 0, name, color=color, **style) for name, color in zip(names, colors, strict=True)]
    extents = [text.get_window_extent(renderer) for text in texts]
    points = [tuple(ax.transData.transform(point)) for point in zip(xs, ys, strict=True)]
    edge = ax.get_window_extent(renderer)
    boxes = place_boxes(
        points,
        [(e.width + 3, e.height + 1) for e in extents],
        (edge.x0 + 2, edge.y0 + 2, edge.x1 - 2, edge.y1 - 2),
        [tuple(ax.transData.transform(corner)) for corner in line],
    )
    to_axes = ax.transAxes.inverted()
    for text, box, point, color in zip(texts, boxes, points, colors, strict=True):
        near = (min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3]))
        if math.dist(near, point) > MARKER + 5:
            ends = [to_axes.transform(point), to_axes.transform(near)]
            ax.plot(*zip(*ends, strict=True), transform=ax.transAxes, color=color, linewidth=0.6, zorder=1)
        text.set_position(to_axes.transform((box[0] + 1, box[1] + 1)))
    return boxes
