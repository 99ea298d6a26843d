"""The benchmarks' own parts: what they measure is what they say."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

from prunet_zoo.latency.timing import time_together
from prunet_zoo.mm.cli import run_tool
from prunet_zoo.spec import load_spec

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
SPEC = ROOT / "configs/classification/prunet-cpu-small.json"
Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def cost(load_benchmark: Load) -> ModuleType:
    return load_benchmark("prunode_cost")


@pytest.fixture(scope="module")
def backbones(load_benchmark: Load) -> ModuleType:
    return load_benchmark("detection_backbones")


@pytest.fixture
def scenes(load_benchmark: Load) -> ModuleType:
    return load_benchmark("digit_scenes")


def test_memory_of_a_prunode_does_not_depend_on_the_number_of_widths(cost: ModuleType):
    x = torch.randn(2, cost.CHANNELS, 7, 7)

    def peak(method: str, count: int) -> float:
        widths = tuple(cost.D_MAX * i // count for i in range(1, count + 1))
        return cost.Step(cost.METHODS[method](widths), x).peak_mb()

    assert peak("prunode", 2) == peak("prunode", 16) > 0
    assert peak("paths", 8) > 2 * peak("paths", 2)
    assert peak("prunode", 8) < peak("masks", 8)


def test_a_step_can_be_timed(cost: ModuleType):
    step = cost.Step(cost.Prunode((256, 512)), torch.randn(1, cost.CHANNELS, 4, 4))
    (timing,) = time_together([step], seconds=0.02, min_rounds=2)
    assert timing.median_ms > 0 and timing.n >= 2


SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_says_how_it_is_called(name: str):
    text = (FOLDER / name).read_text()
    assert f"python benchmarks/{name}" in text and "--json" in text and "--quick" in text


# A training run that takes no time: logs as of a run that was stopped and went on, and the record. It fails where the
# file `fail` names it.
TRAIN = """
import json, pathlib, signal, sys, time
argv = sys.argv[1:]
work = pathlib.Path(argv[argv.index("--work-dir") + 1])
with open("calls.jsonl", "a") as log:
    log.write(json.dumps(argv) + "\\n")
if pathlib.Path("fail").is_file() and pathlib.Path("fail").read_text() in work.name:
    sys.exit("error: it broke")
if pathlib.Path("slow").is_file():
    def stop(number, frame):
        pathlib.Path("saved").touch()
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, stop)
    pathlib.Path("started").touch()
    time.sleep(60)
best = 0.95 if "--weights" in argv else 0.85
for number, epochs in enumerate(((1,), (1, 2))):  # stopped after the first epoch, whose log has a torn line
    log = work / str(number) / "vis_data" / "scalars.json"
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"coco/bbox_mAP": best * e / 3, "coco/bbox_mAP_50": best * e / 2, "step": e}) for e in epochs]
    log.write_text("\\n".join([json.dumps({"loss": 1.0, "step": 5}), *lines]) + ("" if number else "\\n{\\"coco/bb"))
names = {"epoch": 2, "coco/bbox_mAP": best * 2 / 3, "coco/bbox_mAP_50": best, "coco/bbox_mAP_75": 0.5}
record = {"metrics": names, "seconds": 3.0, "params": 9, "backbone_params": 5, "device": "x", "threads": 1,
          "date": "2026-01-01", "versions": {}}
(work / "metrics.json").write_text(json.dumps(record))
"""


@pytest.fixture
def fake(scenes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose tools/train.py is `TRAIN`."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "train.py").write_text(TRAIN)
    (tmp_path / "spec.json").write_text(SPEC.read_text())
    (tmp_path / "last.safetensors").touch()
    monkeypatch.setattr(scenes, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


NETWORK = ["--spec", "spec.json", "--weights", "last.safetensors"]


def test_digit_scenes_compares_both_starts(scenes: ModuleType, fake: Path, capsys: pytest.CaptureFixture[str]):
    assert scenes.main([*NETWORK, "--json", "out.json", "--seeds", "0", "1", "--jobs", "2"]) == 0
    calls = [json.loads(line) for line in (fake / "calls.jsonl").read_text().splitlines()]
    assert len(calls) == 3 * 2 * 2  # detectors, starts, seeds
    assert sum("--weights" in call for call in calls) == 6 and all("--resume" in call for call in calls)
    by_start = {
        "--weights" in call: [word for word in call if "last.safetensors" not in word and word != "--weights"]
        for call in calls
        if "retinanet_" in call[0] and call[call.index("--seed") + 1] == "0"
    }
    for call in by_start.values():
        call.remove(call[call.index("--work-dir") + 1])
    assert by_start[True] == by_start[False]  # nothing else differs
    result = json.loads((fake / "out.json").read_text())
    assert [point["epoch"] for point in result["rows"][0]["curve"]] == [1, 2]
    assert {row["epochs_to_0.90"] for row in result["rows"] if row["init"] == "classifier"} == {2}
    assert {row["epochs_to_0.90"] for row in result["rows"] if row["init"] == "random"} == {None}
    assert result["spec_hash"] == load_spec(SPEC).hash
    assert str(fake) not in (fake / "out.json").read_text()
    assert (fake / "out.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "+0.100" in shown and "never" in shown and "Faster R-CNN" in shown


def test_digit_scenes_says_which_run_failed(scenes: ModuleType, fake: Path, capsys: pytest.CaptureFixture[str]):
    (fake / "fail").write_text("rtmdet_random")
    with pytest.raises(SystemExit) as stop:
        run_tool(scenes.main, [*NETWORK, "--json", "out.json"])
    assert stop.value.code == 2 and not (fake / "out.json").exists()
    error = capsys.readouterr().err
    assert "rtmdet_random_seed0 failed: error: it broke" in error and "rtmdet_random_seed0.log" in error


@pytest.mark.parametrize("damage", ["metrics", "epoch"])
def test_digit_scenes_reports_no_half_run(scenes: ModuleType, fake: Path, damage: str):
    job = scenes.detector_job(Path("w"), "rtmdet", "random", 0, Path("spec.json"), Path("last.safetensors"))
    scenes.run_jobs([job], 1, Console(file=io.StringIO()))
    assert scenes.read_row(job, "rtmdet", "random", 0)["map50"] == 0.85
    if damage == "metrics":
        (fake / "w/rtmdet_random_seed0/metrics.json").write_text("{")
    else:
        (fake / "w/rtmdet_random_seed0/1/vis_data/scalars.json").unlink()
    with pytest.raises(scenes.RunError, match="remove the folder"):
        scenes.read_row(job, "rtmdet", "random", 0)


def test_digit_scenes_passes_a_signal_on(fake: Path):
    """A run that is stopped saves, nothing is reported, and the same command goes on."""
    (fake / "benchmarks").mkdir()
    shutil.copy(FOLDER / "digit_scenes.py", fake / "benchmarks")
    (fake / "slow").touch()
    command = [sys.executable, "-W", "ignore", "benchmarks/digit_scenes.py", *NETWORK, "--json", "out.json"]
    process = subprocess.Popen(command, cwd=fake, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while not (fake / "started").is_file() and time.monotonic() < until:
        time.sleep(0.05)
    process.terminate()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "Go on with:" in error and "--json out.json" in error
    assert (fake / "saved").is_file() and not (fake / "out.json").exists()
    assert len((fake / "calls.jsonl").read_text().splitlines()) == 1  # the others were not started


def test_digit_scenes_arguments(scenes: ModuleType, fake: Path):
    with pytest.raises(SystemExit):
        scenes.main(["--spec", "spec.json"])
    with pytest.raises(scenes.CheckpointError, match=r"none\.safetensors does not exist"):
        scenes.main(["--spec", "spec.json", "--weights", "none.safetensors"])


def test_detection_backbones_table(backbones: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.json"
    size = ["--size", "64", "96", "--rounds", "2", "--json", str(out)]
    threads = torch.get_num_threads()
    try:
        assert backbones.main(["--backbones", "prunet-p0", "r50", "--detector", "rtmdet", *size]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(out.read_text())
    ours, r50 = result["rows"]
    assert (ours["top1"], ours["px"], r50["top1"]) == (80.3, 224, 76.13) and ours["source"].startswith("https://")
    # the last levels of the detector are the network's: all but its tail and classifier
    assert 12e6 < ours["backbone_params"] < load_spec("prunet_p0").params() and r50["backbone_params"] == 23_508_032
    assert r50["backbone_gmacs"] == pytest.approx(4.087 * 64 * 96 / 224**2, rel=0.02)
    for row in result["rows"]:
        parts = [row[f"{part}_ms"] for part in ("preprocess", "backbone", "neck_head", "post")]
        assert min(parts) > 0 and sum(parts) == pytest.approx(row["total_ms"], rel=0.2) and row["n"] == 2
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert result["threads"] == 1 and result["input_size"] == [64, 96] and "torch" in result["versions"]
    assert "prunet-p0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "100", "160"], "multiples of 32, as mmdet pads its images, got 100 160"),
        (["--size", "0", "160"], "must be at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--backbones", "r50", "prunet-p0", "r50"], "--backbones must differ from each other, got r50 prunet-p0 r50"),
    ],
)
def test_detection_backbones_arguments(
    backbones: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        backbones.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_detection_backbones_knows_its_configs(backbones: ModuleType, tmp_path: Path):
    for detector in backbones.SIZES:
        for name in backbones.BACKBONES:
            config = backbones.find_config(detector, name)
            if detector == "rtmdet":
                backbone = backbones.load_config(config).model.backbone
                assert backbones.accuracy_of(backbone)["top1"] > 70, name
    with pytest.raises(backbones.BenchmarkError, match=r"rtmdet_vgg_\*_coco\.py is expected.*found: none"):
        backbones.find_config("rtmdet", "vgg")
    for end in ("1x", "2x"):
        (tmp_path / f"rtmdet_vgg_{end}_coco.py").touch()
    with pytest.raises(backbones.BenchmarkError, match=r"1x.*2x"):
        backbones.find_config("rtmdet", "vgg", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digit_scenes", "detection_backbones"])
def test_quick(name: str, tmp_path: Path):
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(FOLDER / f"{name}.py"),
        "--quick",
        "--json",
        str(tmp_path / "o.json"),
    ]
    command += ["--work-dir", str(tmp_path / "work")] if name == "digit_scenes" else []
    subprocess.run(command, check=True, cwd=ROOT)
    assert len(json.loads((tmp_path / "o.json").read_text())["rows"]) == {"digit_scenes": 6}.get(name, 9)


@pytest.mark.slow
def test_latency_published_quick(tmp_path: Path):
    """Fewer forms of the model, the same predictor."""
    command = [sys.executable, str(FOLDER / "latency_published.py"), "--quick", "--json", str(tmp_path / "o.json")]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    quick = json.loads((tmp_path / "o.json").read_text())["published"]
    whole = json.loads((FOLDER / "results" / "latency_published.json").read_text())["published"]
    assert list(quick) == list(whole)
    for name, column in quick.items():
        assert "any" not in column and column["mean_abs"] == pytest.approx(whole[name]["mean_abs"], abs=1e-3)
    assert quick["v100_tensorrt8_fp16_b1"]["methods_baseline"] == {"mean_abs": 0.11}
