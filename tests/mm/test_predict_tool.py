"""tools/predict.py as a user runs it."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from prunet_zoo.console import run_plain_tool
from prunet_zoo.data.samples import write_samples
from prunet_zoo.models import load_state
from prunet_zoo.zoo.home import shared_folder

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py"
DEMO = shared_folder("checkpoints") / "digits_detector.safetensors"


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("predict")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with samples below ``samples``."""
    monkeypatch.chdir(tmp_path)
    write_samples("samples", digits=5, scenes=3)
    return tmp_path


def call(tool: ModuleType, *argv: str | Path) -> int:
    """Run the tool as its file does; returns the exit status."""
    with pytest.raises(SystemExit) as caught:
        run_plain_tool(tool.main, [str(word) for word in argv])
    return int(caught.value.code or 0)


def test_a_classifier_prints_a_line_for_each_class(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("samples/digits", "--model", "digits_classifier", "--top", "2", "--batch-size", "2", "--json", "o/all.json")
    assert call(tool, *argv) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    record = json.loads(Path("o/all.json").read_text())
    assert len(lines) == 10 and len(record["images"]) == 5 and record["failed"] == []
    assert (record["model"], record["task"]) == ("digits_classifier", "classification")
    rows = [(i["path"], f"{p['score']:.4f}", p["class"]) for i in record["images"] for p in i["predictions"]]
    assert [tuple(line) for line in lines] == rows
    assert all(Path(i["path"]).parent.name == i["predictions"][0]["class"] for i in record["images"])


def test_a_detector_draws_and_prints_boxes(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("samples/scenes/*.png", "--model", "prunet://digits_detector", "--out", "pictures", "--json", "boxes.json")
    assert call(tool, *argv, "--score-thr", "0.5") == 0
    captured = capsys.readouterr()
    lines = [line.split("\t") for line in captured.out.splitlines()]
    record = json.loads(Path("boxes.json").read_text())
    assert len(lines) == sum(len(image["boxes"]) for image in record["images"]) > 3
    assert "3 picture(s) in pictures" in captured.err
    for image in record["images"]:
        assert (image["width"], image["height"]) == (128, 128)
        assert all(box["score"] >= 0.5 and len(box["box"]) == 4 for box in image["boxes"])
        with Image.open(image["picture"]) as picture:
            assert picture.size == (512, 512)
    assert sorted(os.listdir("pictures")) == ["00000.png", "00001.png", "00002.png"]  # no temporary file is left


def test_nothing_found_is_said(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (100, 60)).save("black.png")
    assert call(tool, "black.png", "--model", "digits_detector") == 0
    assert "black.png\t\tno object with a score of at least 0.3" in capsys.readouterr().out
    assert Path("work_dirs/predict/black.png").is_file()


def test_a_config_with_weights(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": load_state(DEMO)}, "epoch_1.pth")
    outs = []
    for model in (("digits_detector",), (CONFIG, "--weights", "epoch_1.pth"), (DEMO,)):
        assert call(tool, "samples/scenes", "--model", *model) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] == outs[2] != ""
    assert call(tool, "samples", "--model", CONFIG) == 2
    assert "has no weights of its own; give --weights FILE" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["digits_classifier", "digits_detector"])
def test_a_damaged_image_is_named_and_the_others_are_done(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    scene = Path("samples/scenes/00001.png")
    scene.write_bytes(scene.read_bytes()[:500])
    Path("samples/scenes/empty.jpg").touch()
    assert call(tool, "samples/scenes", "--model", model, "--json", "all.json") == 2
    captured = capsys.readouterr()
    assert "cannot read image samples/scenes/00001.png" in captured.err and "samples/scenes/empty.jpg" in captured.err
    assert "2 of 4 images could not be read" in captured.err
    record = json.loads(Path("all.json").read_text())
    assert [i["path"] for i in record["images"]] == ["samples/scenes/00000.png", "samples/scenes/00002.png"]
    assert [f["path"] for f in record["failed"]] == ["samples/scenes/00001.png", "samples/scenes/empty.jpg"]


@pytest.mark.parametrize("model", ["digits_detector", "gpunet_0"])
def test_a_long_thin_image_is_named_and_the_others_are_done(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    from prunet_zoo import create_model, save_weights

    argv = ["samples/scenes", "--model", model, "--json", "all.json"]
    if model == "gpunet_0":
        net = create_model(model)
        save_weights("own.safetensors", net.state_dict(), net.spec)
        argv += ["--weights", "own.safetensors"]
    Image.new("RGB", (1, 3000)).save("samples/scenes/00000_thin.png")
    assert call(tool, *argv) == 2
    captured = capsys.readouterr()
    assert "samples/scenes/00000_thin.png" in captured.err and "1×3000 px" in captured.err
    assert "1 of 4 images could not be read" in captured.err and "Traceback" not in captured.err
    record = json.loads(Path("all.json").read_text())
    assert len(record["images"]) == 3 and "1×3000 px" in record["failed"][0]["error"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such file names")
@pytest.mark.parametrize("model", ["digits_classifier", "digits_detector"])
def test_file_names_of_any_bytes(tool: ModuleType, capsys: pytest.CaptureFixture[str], model: str) -> None:
    Path("odd").mkdir()
    for name in (b"latin\xff.png", b"tab\tand\nline.png"):
        Path("samples/scenes/00000.png").rename(Path("odd") / os.fsdecode(name))
        write_samples("samples", digits=0, scenes=1)
    (Path("odd") / os.fsdecode(b"broken\xfe.png")).touch()
    assert call(tool, "odd", "--model", model, "--json", "all.json") == 2
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    names = {line.split("\t")[0] for line in lines}
    assert names == {"odd/latin\\xff.png", "odd/tab\\tand\\nline.png"}
    assert all(len(line.split("\t")) == 3 + (model == "digits_detector") for line in lines)
    record = json.loads(Path("all.json").read_text("utf-8"))
    assert [i["path"] for i in record["images"]] == ["odd/latin\\xff.png", "odd/tab\tand\nline.png"]
    assert record["failed"][0]["path"] == "odd/broken\\xfe.png" and "broken\\xfe.png" in captured.err


def test_a_name_that_the_terminal_s_encoding_lacks(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("samples/digits").rename("samples/日本")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert call(tool, "samples/日本", "--model", "digits_classifier") == 0
    stdout.seek(0)
    assert "samples/\\u65e5\\u672c/" in stdout.read()


def test_pictures_never_replace_images_and_are_not_read_again(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in Path("samples").rglob("*.png")}
    assert call(tool, "samples/scenes", "--model", "digits_detector", "--out", "samples/scenes") == 2
    assert "would overwrite the image itself" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("samples").rglob("*.png")} == before
    for _ in range(2):
        for images in (".", "**/*.png"):
            assert call(tool, images, "--model", "digits_detector") == 0
            assert "8 picture(s)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("nothing.png", "--model", "digits_classifier"), "nothing.png does not exist"),
        (("hollow", "--model", "digits_classifier"), "no image in hollow"),
        (("samples", "--model", "digit_classifier"), "did you mean 'digits_classifier'"),
        (("samples", "--model", "last.pth"), "takes a name of the zoo, a config or a .safetensors file"),
        (("samples", "--model", "gone.safetensors"), "gone.safetensors does not exist"),
        (("samples", "--model", "gone.py", "--weights", str(DEMO)), "gone.py does not exist"),
        (("samples", "--model", str(DEMO), "--weights", str(DEMO)), "leave out --weights"),
        (("samples", "--model", "digits_detector", "--top", "3"), "does not take --top"),
        (("samples", "--model", "digits_classifier", "--out", "x"), "does not take --out"),
        (("samples", "--model", "digits_classifier", "--score-thr", "0.1"), "does not take --score-thr"),
        (("samples", "--model", "digits_classifier", "--device", "gpu"), "device 'gpu' cannot be used"),
        (("samples", "--model", "digits_classifier", "--json", "samples"), "cannot write samples"),
    ],
)
def test_what_a_user_can_mend(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    Path("hollow").mkdir()
    assert call(tool, *argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    "argv", [("--top", "0"), ("--batch-size", "-1"), ("--score-thr", "1.5"), ("--score-thr", "nan")]
)
def test_numbers_out_of_range(tool: ModuleType, capsys: pytest.CaptureFixture[str], argv: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tool.main(["samples", "--model", "digits_classifier", *argv])
    assert caught.value.code == 2 and "takes a number" in capsys.readouterr().err


def test_on_a_terminal_there_are_tables(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    Path("samples/digits").rename("samples/[bold]digits")
    assert call(tool, "samples/[bold]digits", "--model", "digits_classifier", "--top", "1") == 0
    out = capsys.readouterr().out
    assert "samples/[bold]digits/" in out and "\t" not in out and "images/s" in out


def test_a_full_disk(tool: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert call(tool, "samples/scenes", "--model", "digits_detector") == 2
    assert "No space left" in capsys.readouterr().err
    assert not [path for path in Path("work_dirs").rglob("*") if path.is_file()]


def test_too_little_memory(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(tool.Classifier, "classify", exhausted)
    assert call(tool, "samples", "--model", "digits_classifier") == 2
    assert "give a smaller --batch-size" in capsys.readouterr().err


def test_a_reader_that_has_enough() -> None:
    command = f"{sys.executable} {ROOT}/tools/predict.py samples --model digits_classifier | head -n 0"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
