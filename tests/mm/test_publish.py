"""tools/publish.py: what is in a published file, that it works alone, and what is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mmengine.config import Config

from prunet_zoo.data.samples import write_samples
from prunet_zoo.data.scenes import write_scenes
from prunet_zoo.errors import CheckpointError
from prunet_zoo.files import WriteError
from prunet_zoo.mm import publish as publish_module
from prunet_zoo.mm.cli import ConfigError, load_config, run_tool
from prunet_zoo.mm.predict import load_detector
from prunet_zoo.mm.publish import PublishError, publish
from prunet_zoo.mm.publish_config import write_config
from prunet_zoo.mm.testing import prepare_test
from prunet_zoo.mm.training import test as evaluate
from prunet_zoo.mm.training import train
from prunet_zoo.models import load_state
from prunet_zoo.zoo.home import shared_folder
from prunet_zoo.zoo.predict import load_classifier, read_meta

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py"
DIGITS = ROOT / "configs/classification/prunet-cpu-small_digits.py"
DEMO = {task: shared_folder("checkpoints") / f"digits_{task}.safetensors" for task in ("classifier", "detector")}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work directory of a classifier that was trained for one epoch, with averaged weights."""
    work_dir = tmp_path_factory.mktemp("run")
    cfg = load_config(tiny_config, {"train_cfg.max_epochs": 1, "visualizer": None, "log_level": "WARNING"})
    cfg.work_dir = str(work_dir)
    train(cfg)
    return work_dir


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tool_publish", ROOT / "tools" / "publish.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(*argv: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        run_tool(tool().main, [str(word) for word in argv])
    return int(caught.value.code or 0)


def demo_run(task: str, path: Path, **changes: torch.Tensor) -> Path:
    """A checkpoint as MMEngine writes it, of the demo's weights."""
    prefix = "net." if task == "classifier" else ""
    state = {prefix + name: tensor for name, tensor in {**load_state(DEMO[task]), **changes}.items()}
    torch.save({"state_dict": state, "optimizer": {"big": torch.zeros(10_000)}, "meta": {"epoch": 1}}, path)
    return path


def test_of_a_run_the_averaged_weights_are_published(
    run: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = (tiny_config, run / "epoch_1.pth", "--out", "o/own.safetensors", "--licence", "CC0-1.0", "--name", "mine")
    assert call(*argv) == 0
    printed, out = capsys.readouterr().out, Path("o/own.safetensors")
    state, averaged = load_state(out), load_state(run / "last.safetensors")  # SaveSafetensors takes the average too
    assert set(state) == set(averaged) and all(torch.equal(state[name], averaged[name]) for name in state)
    assert f"sha256 {hashlib.sha256(out.read_bytes()).hexdigest()}" in printed
    meta = read_meta(out)
    assert (meta["name"], meta["task"], meta["licence"]) == ("mine", "classification", "CC0-1.0")
    assert meta["classes"] == list("0123456789") and meta["images"] == 50
    trained, published = meta["command"]
    assert trained == json.loads((run / "metrics.json").read_text())["command"]
    assert published.startswith("python tools/publish.py tiny.py ") and "--licence CC0-1.0" in published
    assert sorted(p.name for p in out.parent.iterdir()) == ["own.safetensors"]
    # measured now, on what is in the file
    cfg = load_config(tiny_config)
    cfg.work_dir = cfg.experiment_name = "again"
    prepare_test(cfg, str(out))
    assert evaluate(cfg, out)["metrics"] == pytest.approx(meta["metrics"])
    # and it works alone
    images = write_samples("samples", digits=4, scenes=0)
    assert all(len(found) == 5 for found in load_classifier(out).predict(images))


def test_a_detector_works_alone(capsys: pytest.CaptureFixture[str]) -> None:
    write_scenes("data/digit_scenes", train=1, val=6)
    checkpoint = demo_run("detector", Path("epoch_1.pth"))
    made = ("--command", "python tools/train.py a", "--command", "python tools/train.py b")
    assert call(CONFIG, checkpoint, "--out", "own.safetensors", "--licence", "Apache-2.0", *made) == 0
    meta = read_meta("own.safetensors")
    assert meta["command"][:2] == list(made[1::2]) and len(meta["command"]) == 3
    assert meta["images"] == 6 and meta["metrics"]["coco/bbox_mAP"] > 0.7 and -1 not in meta["metrics"].values()
    shutil.rmtree("data")
    images = write_samples("samples", digits=0, scenes=3)
    assert load_detector("own.safetensors").predict(images) == load_detector("digits_detector").predict(images)
    assert Path("own.safetensors").stat().st_size < 3_000_000  # no optimizer


def test_the_metrics_are_not_copied() -> None:
    """Weights that know nothing are published with the accuracy of chance, whatever the run's metrics say."""
    zero = torch.zeros_like(load_state(DEMO["classifier"])["classifier.weight"])
    checkpoint = demo_run("classifier", Path("epoch_1.pth"), **{"classifier.weight": zero})
    Path("metrics.json").write_text(json.dumps({"command": "python x", "metrics": {"top1": 99.0}}))
    record = publish(load_config(DIGITS), checkpoint, "o.safetensors", "Apache-2.0")
    assert record["metrics"]["top1"] < 20 and record["command"][0] == "python x"


def test_an_existing_file_is_replaced_by_force_alone(run: Path, tiny_config: Path) -> None:
    out = Path("o.safetensors")
    out.write_bytes(b"mine")
    with pytest.raises(PublishError, match="exists; give another --out, or --force"):
        publish(load_config(tiny_config), run / "epoch_1.pth", out, "Apache-2.0")
    assert out.read_bytes() == b"mine"
    publish(load_config(tiny_config), run / "epoch_1.pth", out, "Apache-2.0", force=True)
    assert read_meta(out)["name"] == "o"


def test_a_full_disk_leaves_the_old_file(run: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path("o.safetensors")
    out.write_bytes(b"mine")

    def full(path: Path, data: bytes) -> None:
        raise WriteError(f"cannot write {path}")

    monkeypatch.setattr(publish_module, "write_atomic", full)
    with pytest.raises(WriteError):
        publish(load_config(tiny_config), run / "epoch_1.pth", out, "Apache-2.0", force=True)
    assert out.read_bytes() == b"mine" and [p.name for p in Path().iterdir()] == ["o.safetensors"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classifier.bias": torch.full((10,), torch.nan)}, "not finite, in classifier.bias"),
        ({"classifier.bias": torch.zeros(7)}, r"classifier.bias: \[7\], not \[10\]"),
        ({"extra.weight": torch.zeros(1)}, "1 tensors that the config's model does not have: net.extra.weight"),
    ],
)
def test_checkpoints_that_do_not_fit(changes: dict[str, torch.Tensor], message: str) -> None:
    checkpoint = demo_run("classifier", Path("epoch_1.pth"), **changes)
    with pytest.raises(CheckpointError, match=message):
        publish(load_config(DIGITS), checkpoint, "o.safetensors", "Apache-2.0", commands=["python x"])
    assert not Path("o.safetensors").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--out", "o.pth"), "must end in .safetensors"),
        (("--out", "o.safetensors"), "no metrics.json of tools/train.py beside"),
        (("--out", "o.safetensors", "--data-root", "gone", "--command", "c"), "--data-root needs a config"),
        (("--out", "o.safetensors", "--arch", "prunet_p0", "--command", "c"), "does not fit|lacks|no tensor"),
    ],
)
def test_what_a_user_can_mend(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    assert call(DIGITS, demo_run("classifier", Path("x.pth")), "--licence", "Apache-2.0", *argv) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(Path().glob("o.*"))


def test_files_that_are_not_there() -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        publish(load_config(DIGITS), "gone.pth", "o.safetensors", "Apache-2.0")
    assert call("gone.py", "gone.pth", "--out", "o.safetensors", "--licence", "x") == 2
    with pytest.raises(SystemExit):  # nobody's licence is assumed
        tool().main([str(DIGITS), "x.pth", "--out", "o.safetensors"])


def test_configs_that_cannot_come_along() -> None:
    cfg = load_config(CONFIG)
    cfg.custom_imports = {"imports": ["prunet_zoo", "my_models"]}
    with pytest.raises(ConfigError, match="imports my_models"):
        write_config(cfg)
    for change in ({"model.neck.type": "my.models.Neck"}, {"model.test_cfg.nms.type": "print()"}):
        with pytest.raises(ConfigError, match="not a plain name"):
            write_config(load_config(CONFIG, change))
    cfg = load_config(CONFIG)
    cfg.pop("test_dataloader")
    with pytest.raises(ConfigError, match="no test_dataloader"):
        write_config(cfg)
    cfg = load_config(CONFIG, {"model.neck.start_level": float("inf")})
    with pytest.raises(ConfigError, match="cannot be published"):
        write_config(cfg)


def test_no_path_of_this_machine_goes_into_a_file(run: Path, tiny_config: Path) -> None:
    record: dict[str, Any] = publish(
        load_config(tiny_config),
        run / "epoch_1.pth",
        "o.safetensors",
        "Apache-2.0",
        commands=["python tools/train.py c"],
    )
    assert record["config"] == "tiny.py"
    text = json.dumps({key: value for key, value in read_meta("o.safetensors").items() if key != "command"})
    assert str(Path.cwd()) not in text and str(run) not in text and str(ROOT) not in text


def test_wrapped_data_sets_have_a_pipeline_too() -> None:
    cfg = load_config(CONFIG)
    inner = cfg.test_dataloader.dataset.to_dict()
    plain = write_config(cfg)
    for wrapped in ({"type": "RepeatDataset", "times": 1, "dataset": inner}, {"type": "Concat", "datasets": [inner]}):
        other = Config({**cfg.to_dict(), "test_dataloader": {"dataset": wrapped}})
        assert write_config(other) == plain
