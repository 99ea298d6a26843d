"""Finding images, reading them as RGB, reading ahead."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prunet_zoo.errors import DataError
from prunet_zoo.zoo.images import as_field, as_text, find_images, read_ahead, read_rgb


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_folders_are_searched_in_the_order_of_names(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.JPG", "a/x.png", "1.jpeg", "notes.txt", "b/.hidden.png", "a/deep/y.webp")
    found = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path])]
    assert found == ["1.jpeg", "a/x.png", "a/deep/y.webp", "b/2.JPG"]


def test_files_of_any_ending_patterns_and_no_image_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "scan", "a/1.png", "a/b/2.png", "a/b/2.txt", "odd[1].png")
    monkeypatch.chdir(tmp_path)
    assert find_images(["scan"]) == [Path("scan")]
    assert find_images(["odd[1].png"]) == [Path("odd[1].png")]  # a file of that name is no pattern
    assert find_images(["a/**/*", "./a/1.png"]) == [Path("a/1.png"), Path("a/b/2.png")]
    assert len(find_images(["a", "a/1.png", "a/*.png"])) == 2


def test_results_of_an_earlier_run_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "out/1.png")
    assert find_images([tmp_path], leave_out=tmp_path / "out") == [tmp_path / "1.png"]
    assert find_images([tmp_path / "out" / "1.png"], leave_out=tmp_path / "out")  # asked for by name


def test_of_a_pattern_too_results_of_an_earlier_run_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "1.png", "a/2.png", "out/1.png", "out/a/2.png", "outer/3.png")
    monkeypatch.chdir(tmp_path)
    images = [Path("1.png"), Path("a/2.png"), Path("outer/3.png")]
    assert find_images(["**/*.png"], leave_out="out") == images
    assert find_images(["*"], leave_out="out") == images  # a folder that the pattern finds
    assert find_images([str(tmp_path / "**/*.png")], leave_out="./out") == [tmp_path / image for image in images]
    assert find_images(["out/**/*.png"], leave_out="out") == [Path("out/1.png"), Path("out/a/2.png")]  # asked for
    with pytest.raises(DataError, match="no image in o"):
        find_images(["o*t/*.png"], leave_out="out")


@given(st.binary(min_size=1, max_size=20))
def test_every_file_name_can_be_written(name: bytes) -> None:
    path = name.decode("utf-8", "surrogateescape")  # as Python takes it from the system
    assert json.loads(json.dumps(as_text(path), ensure_ascii=False).encode("utf-8")) == as_text(path)
    assert as_field(path).encode("utf-8") and as_field(path).splitlines() == [as_field(path)]
    assert "\t" not in as_field(path)


def test_file_names_stay_what_they_are_where_they_can() -> None:
    assert as_field("Straße 日本/ x.png") == as_text("Straße 日本/ x.png") == "Straße 日本/ x.png"
    assert as_text(Path(b"a\xff\t.png".decode("utf-8", "surrogateescape"))) == "a\\xff\t.png"
    assert as_field(b"a\xff\t\n\x1b[1m.png".decode("utf-8", "surrogateescape")) == "a\\xff\\t\\n\\x1b[1m.png"


@pytest.mark.parametrize(
    ("source", "message"),
    [("missing.png", "does not exist"), ("empty", "no image in"), ("no*.png", "matches no file"), ("tex*", "no image")],
)
def test_what_holds_no_image_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "text.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        find_images([source])
    assert source in str(caught.value)


COLOUR = (200, 100, 50)


def write_mode(mode: str, path: Path) -> tuple[int, int, int]:
    """Write a plain image of a mode; returns the RGB that it should be read as."""
    rgb = Image.new("RGB", (6, 4), COLOUR)
    grey = (120, 120, 120)
    if mode in ("L", "LA", "1"):
        Image.new("L", (6, 4), 120).convert(mode, dither=Image.Dither.NONE).save(path)
        return grey if mode != "1" else (0, 0, 0)
    if mode == "I;16":
        Image.fromarray(np.full((4, 6), 120 * 257, np.uint16)).save(path)
        return grey
    if mode == "P":
        rgb.quantize(4).save(path)
    elif mode == "P transparent":
        rgb.quantize(4).save(path, transparency=bytes([10, 20, 30, 40]))
    elif mode == "RGBA":
        rgb.putalpha(7)
        rgb.save(path)
    elif mode == "CMYK":
        path = path.with_suffix(".tif")
        rgb.convert("CMYK").save(path)
    return COLOUR


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16", "P", "P transparent", "RGBA", "CMYK"])
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.png"
    expected = write_mode(mode, path)
    image = read_rgb(path if path.exists() else path.with_suffix(".tif"))
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=40))
def test_16_bits_are_scaled_and_not_cut_off(values: list[int]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.png"
        Image.fromarray(np.array([values], np.uint16)).save(path)
        found = np.asarray(read_rgb(path))[0, :, 0]
    assert np.abs(found.astype(float) - np.array(values) / 257).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_s_turn_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :4] = 255  # a white corner, upper left
    undo = {  # how a camera that was held so stores the upright picture (EXIF 2.3, 4.6.4, tag 274)
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a), 7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
        8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "x.png")), upright)


def noise(path: Path, side: int = 64) -> bytes:
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (side, side, 3), np.uint8)).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("ending", [".png", ".jpg", ".gif", ".bmp", ".tif", ".webp"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_a_damaged_image_is_named(tmp_path: Path, ending: str, share: float) -> None:
    path = tmp_path / f"broken{ending}"
    data = noise(path)
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=f"cannot read image .*broken{ending}"):
        read_rgb(path)


def test_what_is_no_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(DataError, match=r"text\.png: not an image"):
        read_rgb(tmp_path / "text.png")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif: it holds floating-point values"):
        read_rgb(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "long.tif")
    with pytest.raises(DataError, match=r"long\.tif: its values are beyond 16 bits"):
        read_rgb(tmp_path / "long.tif")
    noise(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"huge\.png: .*decompression bomb"):
        read_rgb(tmp_path / "huge.png")
    with pytest.raises(DataError, match=r"gone\.png"):
        read_rgb(tmp_path / "gone.png")


def test_an_image_that_does_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args: object) -> None:
        raise MemoryError

    noise(tmp_path / "big.png")
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", exhausted)
    with pytest.raises(DataError, match=r"big\.png: it does not fit into memory"):
        read_rgb(tmp_path / "big.png")


@given(st.lists(st.booleans(), max_size=20), st.integers(1, 7))
def test_every_image_comes_once_and_in_order(good: list[bool], batch_size: int) -> None:
    paths = [Path(f"{number}.png") for number in range(len(good))]

    def read(path: Path) -> str:
        if not good[int(path.stem)]:
            raise DataError(f"no {path}")
        return path.stem

    read_paths, failed_paths = [], []
    for batch, failed in read_ahead(paths, batch_size, read):
        assert len(batch) + len(failed) <= batch_size
        assert all(item == path.stem for path, item in batch)
        read_paths += [path for path, _ in batch]
        failed_paths += [failure.path for failure in failed]
    assert read_paths == [path for path in paths if good[int(path.stem)]]
    assert failed_paths == [path for path in paths if not good[int(path.stem)]]


def test_the_next_batch_is_read_meanwhile_and_no_more() -> None:
    seen: list[Path] = []
    second = threading.Event()

    def read(path: Path) -> int:
        seen.append(path)
        if path.stem == "3":
            second.set()
        return 0

    batches = read_ahead([Path(str(number)) for number in range(100)], 2, read)
    next(batches)
    assert second.wait(10)  # read while the caller holds the first batch
    batches.close()
    assert len(seen) <= 4


def test_an_error_of_the_program_is_not_taken_for_a_bad_image() -> None:
    def read(path: Path) -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(read_ahead([Path("x")], 1, read))
