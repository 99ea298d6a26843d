"""tools/test.py on a folder in ImageNet's layout: the network's own preprocessing, labels, and a known top-1."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from timm.data import ImageNetInfo, create_transform

from prunet_zoo import save_weights
from prunet_zoo.data.transforms import make_transform
from prunet_zoo.mm import training
from prunet_zoo.mm.cli import load_config, run_tool
from prunet_zoo.mm.testing import available_cores, fit_loader, own_transform
from prunet_zoo.mm.training import _fit_workers
from prunet_zoo.models import create_model
from prunet_zoo.spec import NetSpec
from prunet_zoo.zoo.fetch import DownloadError
from prunet_zoo.zoo.home import shared_folder
from prunet_zoo.zoo.index import ModelEntry, Preprocess, load_index

ROOT = Path(__file__).resolve().parents[2]
WNIDS = ImageNetInfo("imagenet-1k").label_names()
PUBLISHED = [entry for entry in load_index().values() if entry.classes == "imagenet-1k"]
CONFIG = ROOT / "configs/classification/prunet-p0_imagenet.py"
SMALL = NetSpec.from_dict(
    {
        "name": "small",
        "input_size": 40,
        "stages": [
            {"blocks": [{"type": "conv", "out_channels": 16, "stride": 2}]},
            {"blocks": [{"type": "irb", "out_channels": 24, "hidden": 48, "stride": 2}]},
        ],
        "tail": {"out_channels": 64},
    }
)
OWN = Preprocess(input_size=40, crop_pct=0.8, interpolation="bilinear", mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))


class Folder(NamedTuple):
    """Images for which top-1 and top-5 of a network are known, in percent."""

    root: Path
    top1: float
    top5: float
    count: int


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weights folder of its own, and no way to the network."""

    def offline(*args: Any, **kwargs: Any) -> None:
        raise DownloadError("no address could be reached")

    monkeypatch.setenv("PRUNET_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PRUNET_MIRROR", raising=False)
    monkeypatch.setattr("prunet_zoo.zoo.download.fetch", offline)
    monkeypatch.chdir(tmp_path)


def make_images(count: int, seed: int = 3) -> Iterator[Image.Image]:
    """Coarse noise, never square."""
    rng = np.random.RandomState(seed)
    for number in range(count):
        coarse = Image.fromarray(rng.randint(0, 256, (4, 5, 3), dtype=np.uint8))
        yield coarse.resize((90, 60) if number % 2 else (60, 75), Image.Resampling.BICUBIC)


def random_net(spec: Any, own: Preprocess = OWN) -> Any:
    """A network with random weights whose best class differs from image to image: the mean score is taken away."""
    torch.manual_seed(0)
    net = create_model(spec).train()
    transform = create_transform(is_training=False, **own.model_dump())
    batch = torch.stack([transform(image) for image in make_images(4, seed=9)])
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # statistics of this batch
        net(batch)
        torch.nn.init.normal_(net.classifier.weight)
        scores = net.eval()(batch)
        net.classifier.bias.copy_(-scores.mean(0))
    return net


def write_folder(root: Path, net: Any, own: Preprocess, count: int = 30, names: Any = WNIDS) -> Folder:
    """Generate images, classify them without our code, and put them into folders so that a third is right (top-1), a
    third is in the top 5 alone, and a third is not."""
    transform = create_transform(is_training=False, **own.model_dump())
    hits = [0, 0]
    for number, image in enumerate(make_images(count)):
        with torch.no_grad():
            scores, order = net(transform(image)[None])[0].sort(descending=True)
        place = (0, 2, 20)[number % 3]
        assert min(float(scores[i] - scores[i + 1]) for i in (0, 1, 2, 4)) > 1e-5  # no tie that rounding could turn
        hits[0] += place < 1
        hits[1] += place < 5
        folder = root / names[int(order[place])]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    return Folder(root, 100 * hits[0] / count, 100 * hits[1] / count, count)


def tool(*argv: str | Path) -> int:
    spec = importlib.util.spec_from_file_location("tool_test_images", ROOT / "tools/test.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as caught:
        run_tool(module.main, [str(a) for a in argv])
    return int(caught.value.code or 0)


QUIET = ["--cfg-options", "log_level=ERROR", "visualizer=None"]


def ends(
    folder: Folder, capsys: pytest.CaptureFixture[str], *argv: str | Path, workers: int | None = 0
) -> dict[str, Any]:
    """Run the tool, see that it prints and records the known accuracy, and return the record."""
    capsys.readouterr()
    options = [] if workers is None else [f"test_dataloader.num_workers={workers}"]
    status = tool(*argv, "--json", "t.json", *QUIET, *options)
    shown = capsys.readouterr()
    assert status == 0, shown.err
    last = shown.out.strip().splitlines()[-1]
    assert last.startswith(f"top1 {folder.top1:g}, top5 {folder.top5:g}; {folder.count} images at "), last
    return json.loads(Path("t.json").read_text())


def fails(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    capsys.readouterr()
    status = tool(*argv, *QUIET)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and message.startswith("error: "), message
    return message


# ---- the seven configs


@pytest.mark.parametrize("entry", PUBLISHED, ids=[entry.name for entry in PUBLISHED])
def test_every_config_prepares_images_as_the_index_says(entry: ModelEntry) -> None:
    cfg = load_config(shared_folder("configs") / entry.config)
    assert entry.preprocess is not None and cfg.model.arch == entry.arch and cfg.model.num_classes == 1000
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (300, 410, 3), dtype=np.uint8))
    expected = create_transform(is_training=False, **entry.preprocess.model_dump())(image)
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert torch.equal(make_transform(loader.dataset.transform, train=False)(image), expected)
    assert torch.equal(make_transform(own_transform(entry.preprocess), train=False)(image), expected)
    side = entry.preprocess.input_size
    assert make_transform(cfg.train_dataloader.dataset.transform, train=True)(image).shape == (3, side, side)
    # 8 processes
    assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size


def test_the_seven_are_there() -> None:
    assert [entry.name for entry in PUBLISHED] == [
        "prunet_p0", "prunet_p1", "gpunet_0", "gpunet_1", "gpunet_2", "gpunet_d1", "gpunet_d2",
    ]  # fmt: skip


# ---- a name of the zoo


def test_a_name_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NAME --data-root, with the published size and 10 or more folders named by WordNet ids; then CONFIG CHECKPOINT."""
    entry = load_index()["prunet_p0"]
    assert entry.preprocess is not None
    net = random_net("prunet_p0", entry.preprocess)
    save_weights(tmp_path / "home/prunet_p0.safetensors", net.state_dict(), net.spec)
    folder = write_folder(tmp_path / "images/val", net, entry.preprocess, 12)
    assert len(list(folder.root.iterdir())) > 5 and 0 < folder.top1 < folder.top5 < 100
    record = ends(folder, capsys, "prunet_p0", "--data-root", tmp_path / "images", workers=None)
    assert record["images"] == 12 and record["labelled_by"] == "WordNet ids" and record["input_size"] == 224
    own = record["preprocess"]
    assert (own["input_size"], own["crop_pct"], own["interpolation"]) == (224, 0.875, "bicubic")
    assert own["mean"] == [0.485, 0.456, 0.406] and own["std"] == [0.229, 0.224, 0.225]
    assert record["checkpoint"] == "prunet://prunet_p0" and record["data_root"] == str(tmp_path / "images")
    assert record["arch"]["hash"] == net.spec.hash


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """``small`` of the index: 1000 classes, 40 px, with the config of prunet_p0, which is for 224 px."""
    weights = {"file": "s.zip", "url": "https://example.invalid/x", "licence": "Apache-2.0", "origin": "a test"}
    data = {"name": "small", "config": "classification/prunet-p0_imagenet.py", "classes": "imagenet-1k"}
    entry = ModelEntry.model_validate({**data, "preprocess": OWN.model_dump(), "weights": weights})
    monkeypatch.setitem(load_index(), "small", entry)
    net = random_net(SMALL)
    save_weights(tmp_path / "home/small.safetensors", net.state_dict(), net.spec)
    return net


@pytest.fixture
def images(tmp_path: Path, small: torch.nn.Module) -> Folder:
    return write_folder(tmp_path / "images", small, OWN)


def test_the_known_top1_needs_the_right_preprocessing(images: Folder, small: torch.nn.Module) -> None:
    """The test-bench itself: with the images prepared otherwise, other numbers come out."""
    for wrong in ({"crop_pct": 1.0}, {"crop_mode": "squash"}, {"mean": (0.5, 0.5, 0.5)}):
        transform = create_transform(is_training=False, **{**OWN.model_dump(), **wrong})
        right = 0
        for path in images.root.rglob("*.png"):
            with torch.no_grad():
                found = int(small(transform(Image.open(path))[None]).argmax())
            right += WNIDS[found] == path.parent.name
        assert 100 * right / images.count < images.top1


@pytest.mark.parametrize("layout", ["val", "test", "."])
def test_layouts(images: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str) -> None:
    """The folder with val or test alone, and the folder of classes itself."""
    root = tmp_path / "layout"
    root.mkdir()
    images.root.rename(root / layout if layout != "." else tmp_path / "layout" / ".." / "moved")
    root = root if layout != "." else tmp_path / "moved"
    assert ends(images, capsys, "small", "--data-root", root)["preprocess"]["input_size"] == 40


@pytest.mark.parametrize("checkpoint", ["prunet://small", "told", "run.pth"])
def test_config_and_checkpoint(
    images: Folder, small: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: str
) -> None:
    """What the checkpoint tells comes before the config; a run's .pth tells nothing, so its config has to."""
    config, weights = CONFIG, Path(f"{checkpoint}.safetensors")
    state = small.state_dict()
    if checkpoint == "told":  # as tools/convert.py and tools/publish.py do
        save_weights(weights, state, SMALL, preprocess=OWN.to_dict(), classes=list(WNIDS))
    elif checkpoint == "run.pth":
        weights = Path(checkpoint)
        torch.save({"state_dict": {f"net.{n}": t for n, t in state.items()}, "meta": {}}, weights)
        config = tmp_path / "own.py"
        (tmp_path / "small.json").write_text(SMALL.to_json())
        transform = own_transform(OWN)
        config.write_text(
            f"_base_ = ['{CONFIG}']\nmodel = dict(arch='{tmp_path}/small.json', num_classes=10)\n"
            f"test_dataloader = dict(dataset=dict(transform={transform!r}))\n"
        )
    record = ends(images, capsys, config, checkpoint if "://" in checkpoint else weights, "--data-root", images.root)
    assert record["params"] == SMALL.params()
    assert record["preprocess"]["mean"] == list(OWN.mean) and record["preprocess"]["input_size"] == 40


def test_weights_that_tell_nothing_take_the_configs(
    small: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_weights("plain.safetensors", small.state_dict(), SMALL)
    configs = Preprocess(input_size=224, crop_pct=0.875, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    folder = write_folder(tmp_path / "images", small, configs, 9)  # `small` was made for others; any will do
    assert (
        ends(folder, capsys, CONFIG, "plain.safetensors", "--data-root", folder.root)["preprocess"]["input_size"] == 224
    )


def test_own_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network of one's own: by the class names in its file, some of them; else by the folders of train."""
    names = [f"kind{i:02d}" for i in range(30)]
    net = random_net(SMALL.replace(num_classes=30))
    folder = write_folder(tmp_path / "data/val", net, OWN, 12, names)
    assert len(list(folder.root.iterdir())) < 30
    save_weights("named.safetensors", net.state_dict(), net.spec, preprocess=OWN.to_dict(), classes=names)
    record = ends(folder, capsys, CONFIG, "named.safetensors", "--data-root", tmp_path / "data")
    assert record["labelled_by"] == "class names"
    save_weights("plain.safetensors", net.state_dict(), net.spec, preprocess=OWN.to_dict())
    message = fails(capsys, CONFIG, "plain.safetensors", "--data-root", tmp_path / "data")
    assert "classes (kind" in message and "num_classes is 30" in message
    for name in names:
        (tmp_path / "data/train" / name).mkdir(parents=True)
    record = ends(folder, capsys, CONFIG, "plain.safetensors", "--data-root", tmp_path / "data")
    assert record["labelled_by"] == "order of the folders in train"


def test_the_demo_config_takes_folders_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config that reads no folder does so with --data-root, where the weights tell their preprocessing."""
    config = ROOT / "configs/classification/prunet-cpu-small_digits.py"
    net = random_net(SMALL.replace(num_classes=30))
    names = [f"kind{i:02d}" for i in range(30)]
    folder = write_folder(tmp_path / "data/val", net, OWN, 12, names)
    save_weights("named.safetensors", net.state_dict(), net.spec, preprocess=OWN.to_dict(), classes=names)
    ends(folder, capsys, config, "named.safetensors", "--data-root", tmp_path / "data")
    save_weights("plain.safetensors", net.state_dict(), net.spec)
    message = fails(capsys, config, "plain.safetensors", "--data-root", tmp_path / "data")
    assert "--data-root needs a config that tests on an image folder" in message


# ---- options and faults


def test_options_come_before_what_the_network_tells(images: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["log_level=ERROR", "visualizer=None", "test_dataloader.dataset.transform.size=56"]
    options += ["test_dataloader.num_workers=0", "test_dataloader.batch_size=7"]
    assert tool("small", "--data-root", images.root, "--json", "t.json", "--cfg-options", *options) == 0
    record = json.loads(Path("t.json").read_text())
    assert record["preprocess"]["input_size"] == record["input_size"] == 56 and record["images"] == images.count
    assert "30 images at 56 px (crop 0.8, bilinear)" in capsys.readouterr().out


def test_workers_suit_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunet_zoo.mm.testing.available_cores", lambda: 2)
    cfg = load_config(CONFIG)
    fit_loader(cfg.test_dataloader)
    assert cfg.test_dataloader.num_workers == 2 and not cfg.test_dataloader.persistent_workers
    assert cfg.test_dataloader.pin_memory is torch.cuda.is_available()
    few = Config({"loader": {"num_workers": 1}}).loader
    fit_loader(few)
    assert few.num_workers == 1
    assert available_cores() >= 1
    # torch refuses these of a dataloader without workers, of training too
    none = Config({"loader": {"num_workers": 0, "persistent_workers": True, "prefetch_factor": 4}}).loader
    _fit_workers(none)
    assert none == {"num_workers": 0, "persistent_workers": False}


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_named(images: Folder, capsys: pytest.CaptureFixture[str], workers: int) -> None:
    path = sorted(images.root.rglob("*.png"))[4]
    whole = path.read_bytes()
    argv = ["small", "--data-root", images.root, *QUIET]
    for content in (b"", b"no image", whole[: len(whole) // 2])[-1 if workers else 0 :]:
        path.write_bytes(content)
        assert tool(*argv, f"test_dataloader.num_workers={workers}") == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith(f"error: cannot read image {path}: "), message


def test_folders_that_are_no_classes(
    images: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sorted(images.root.iterdir())[0]
    first.rename(images.root / "n99999999")
    message = fails(capsys, "small", "--data-root", images.root)
    assert "1 are no class of the network: 'n99999999'; the network has the 1000 classes of ImageNet-1k" in message
    (images.root / "n99999999").rename(images.root / first.name)
    (images.root / "empty").mkdir()
    assert "'empty'" in fails(capsys, "small", "--data-root", images.root)
    with monkeypatch.context() as patch:
        patch.setattr(training, "build_runner", lambda *_, **__: pytest.fail("built before the folder was looked for"))
        assert "does not exist" in fails(capsys, "small", "--data-root", tmp_path / "nowhere")
    (tmp_path / "loose").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "loose/1.png")
    assert "has no 'val' nor 'test'" in fails(capsys, "small", "--data-root", tmp_path / "loose")
    (tmp_path / "flat/val").mkdir(parents=True)
    (tmp_path / "loose/1.png").rename(tmp_path / "flat/val/1.png")
    assert "holds 1 images, but no class folders" in fails(capsys, "small", "--data-root", tmp_path / "flat")


def test_what_else_is_refused(images: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "CHECKPOINT is missing" in fails(capsys, CONFIG)
    assert "unknown zoo model 'smal'; did you mean 'small'" in fails(capsys, "smal", "--data-root", images.root)
    assert "nowhere.py does not exist" in fails(capsys, "nowhere.py", "prunet://small")
    assert "none.pth does not exist" in fails(capsys, CONFIG, "none.pth")
    scenes = ROOT / "configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py"
    torch.save({"state_dict": {}}, "d.pth")
    assert "--data-root is for classifiers" in fails(capsys, scenes, "d.pth", "--data-root", images.root)
    net = random_net(SMALL)
    save_weights("bad.safetensors", net.state_dict(), SMALL, preprocess={"input_size": "big"})
    message = fails(capsys, CONFIG, "bad.safetensors", "--data-root", images.root)
    assert "bad.safetensors: preprocess is malformed: " in message and "input_size" in message


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
