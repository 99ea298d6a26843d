"""Pictures with boxes: what is drawn where, labels that can be read, where pictures are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prunet_zoo.errors import DataError
from prunet_zoo.mm import draw_boxes as draw_boxes_module
from prunet_zoo.mm.draw_boxes import class_colour, draw_boxes, drawable, encode, picture_paths, place_labels, plain_font
from prunet_zoo.mm.predict import Box


def meet(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two areas (x1, y1, x2, y2) have a pixel in common."""
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def test_boxes_are_drawn_where_they_are() -> None:
    image = Image.new("RGB", (600, 400), (128, 128, 128))
    boxes = [Box(1, "cat", 0.9, (100.0, 150.0, 300.0, 350.0)), Box(2, "dog", 0.5, (590.0, -5.0, 640.0, 30.0))]
    pixels = np.asarray(draw_boxes(image, boxes))
    assert pixels.shape == (400, 600, 3)
    colour = class_colour(1)
    for x, y in ((100, 250), (300, 250), (200, 350), (200, 150)):
        assert tuple(pixels[y, x]) == colour
    assert tuple(pixels[250, 200]) == (128, 128, 128)
    assert (np.asarray(image) == 128).all()  # the image itself is left alone
    assert len({class_colour(label) for label in range(80)}) == 80


def test_the_labels_of_boxes_on_the_same_place_can_both_be_read() -> None:
    for place in ((100.0, 150.0, 300.0, 350.0), (0.0, 0.0, 600.0, 400.0), (500.0, 380.0, 600.0, 400.0)):
        image = Image.new("RGB", (600, 400), (128, 128, 128))
        both = [Box(1, "cat", 0.9, place), Box(2, "dog", 0.8, place)]
        picture = np.asarray(draw_boxes(image, both))
        bare = np.asarray(draw_boxes(image, [box._replace(name="") for box in both[:1]]))
        for box in both:
            filled = (picture == class_colour(box.label)).all(axis=2).sum()
            alone = (np.asarray(draw_boxes(image, [box])) == class_colour(box.label)).all(axis=2).sum()
            outline = (bare == class_colour(1)).all(axis=2).sum()
            assert filled > 0.5 * (alone - outline) > 100, (box.name, place)


@given(
    st.lists(st.tuples(st.floats(-50, 700), st.floats(-50, 500)), max_size=12),
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 16)), min_size=12, max_size=12),
)
def test_labels_are_whole_and_none_hides_another(
    corners: list[tuple[float, float]], sizes: list[tuple[int, int]]
) -> None:
    sizes = sizes[: len(corners)]
    places = place_labels(corners, sizes, (600, 400))
    areas = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(places, sizes, strict=True)]
    assert all(x1 >= 0 and y1 >= 0 and x2 <= 600 and y2 <= 400 for x1, y1, x2, y2 in areas)
    for number, one in enumerate(areas):
        assert not any(meet(one, other) for other in areas[:number])


def test_where_there_is_no_room_labels_stay() -> None:
    assert place_labels([(0, 5)] * 3, [(30, 10)] * 3, (30, 20)) == [(0, 5)] * 3
    assert place_labels([(0, 10)] * 3, [(30, 10)] * 3, (30, 20)) == [(0, 0), (0, 10), (0, 0)]


def test_small_images_are_enlarged_and_any_size_can_be_drawn_on() -> None:
    box = [Box(0, "a long name of a class", 1.0, (0.0, 0.0, 3.0, 2.0))]
    assert draw_boxes(Image.new("RGB", (128, 100)), box).size == (512, 400)
    for size in ((1, 1), (300, 2), (2000, 10)):
        picture = draw_boxes(Image.new("RGB", size), box)
        assert picture.width % size[0] == 0 and encode(picture, "x.jpg")[:2] == b"\xff\xd8"
    assert encode(picture, "x.PNG")[1:4] == b"PNG"


def test_names_that_the_font_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawable("Größe №1 żółw", "class 1") == ("Größe №1 żółw", plain_font())
    font_manager = pytest.importorskip("matplotlib.font_manager")
    plain = [f for f in font_manager.fontManager.ttflist if "DejaVu" in f.name or "Last Resort" in f.name]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", plain)
    drawable.cache_clear()
    assert drawable("猫 cat", "class 7") == ("class 7", plain_font())
    image = Image.new("RGB", (600, 400), (128, 128, 128))
    place = (100.0, 150.0, 300.0, 350.0)
    shown, named = (np.asarray(draw_boxes(image, [Box(7, name, 0.5, place)])) for name in ("猫", "class 7"))
    assert (shown == named).all()
    path = next(f.fname for f in plain if "Last Resort" not in f.name and f.fname != plain_font())
    monkeypatch.setattr(
        draw_boxes_module, "_characters", lambda p: frozenset({ord("猫")}) if p == path else frozenset()
    )
    drawable.cache_clear()
    assert drawable("猫", "class 7") == ("猫", path)  # a font of the machine that has it
    drawable.cache_clear()


def test_pictures_of_the_same_name_do_not_meet(tmp_path: Path) -> None:
    names = ["a/1.jpg", "b/1.jpg", "b/1.bmp", "b/1.bmp.png", "b/1.JPG"]
    paths = picture_paths([tmp_path / name for name in names], "out")
    assert paths[:3] == [Path("out/a/1.jpg"), Path("out/b/1.jpg"), Path("out/b/1.bmp.png")]
    assert len({str(path).lower() for path in paths}) == len(names)
    assert picture_paths([tmp_path / "x.tif"], "out") == [Path("out/x.tif.png")]
    with pytest.raises(DataError, match="overwrite the image itself"):
        picture_paths([tmp_path / "1.png", tmp_path / "2.png"], tmp_path)
