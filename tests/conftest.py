"""Fixtures shared by all tests: CIFAR-10 as an image folder, and one thread for the same bits everywhere."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings
from PIL import Image

# a shell that starts the tests in the background makes them ignore Ctrl-C, and their child processes too
signal.signal(signal.SIGINT, signal.default_int_handler)

# the same examples on every run of a change's checks; new ones each time on a developer's machine
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = ROOT.parent / "shared" / "data" / "cifar10.tar.xz"
PER_CLASS = {"train": 400, "test": 100}


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """No test, and nothing that it runs, may leave a signal handler behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    left = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert left == before


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What measurements remember of this machine goes into a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def load_tool() -> Callable[[str], ModuleType]:
    """Executes ``tools/NAME.py`` as a module, each time anew."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def grey_images(tmp_path: Path) -> Path:
    """Two classes of five images a part, each of one grey: 100 times the class and 10 times the number."""
    for part in ("train", "test"):
        for k, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(5):
                Image.new("RGB", (32, 32), (100 * k + 10 * i,) * 3).save(folder / f"{i:04d}.jpg")
    return tmp_path / "images"


@pytest.fixture(scope="module")
def load_benchmark() -> Iterator[Callable[[str], ModuleType]]:
    """Executes ``benchmarks/NAME.py`` as a module, each time anew; as where it is run, it can import its neighbours."""
    folder = ROOT / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))

        def load(name: str) -> ModuleType:
            spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
            return module

        yield load


@pytest.fixture(scope="session")
def fake_stages() -> ModuleType:
    """The module tests/fake_stages.py: stand-ins for the tools that a pipeline calls."""
    spec = importlib.util.spec_from_file_location("fake_stages", ROOT / "tests" / "fake_stages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """A folder with 400 training and 100 test images of each CIFAR-10 class, unpacked once into a cache folder."""
    if not ARCHIVE.is_file():
        pytest.skip(f"CIFAR-10 is not at {ARCHIVE}")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prunet_zoo"
    folder = cache / f"cifar10_{PER_CLASS['train']}_{PER_CLASS['test']}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache))
        with tarfile.open(ARCHIVE) as archive:
            wanted = [member for member in archive if _is_wanted(member.name)]
            archive.extractall(temporary, members=wanted, filter="data")
        try:
            temporary.rename(folder)
        except OSError:  # another test run was faster
            shutil.rmtree(temporary)
    return folder


def _is_wanted(name: str) -> bool:
    parts = name.strip("/").split("/")
    if len(parts) < 3:
        return True
    return int(parts[-1].split(".")[0]) < PER_CLASS[parts[-3]]


SPEC = {
    "name": "tiny",
    "input_size": 32,
    "stages": [
        {"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]},
        {"blocks": [{"type": "irb", "out_channels": 16, "hidden": 32, "stride": 2}]},
        {"blocks": [{"type": "irb", "out_channels": 16, "hidden": 32}]},
    ],
    "tail": {"out_channels": 32},
    "num_classes": 10,
}
CONFIG = """
_base_ = ["{root}/configs/_base_/default_runtime.py", "{root}/configs/_base_/digits.py"]
model = dict(type="PruNetClassifier", arch={spec}, num_classes=10, drop_rate=0.1, drop_path_rate=0.1)
train_dataloader = dict(batch_size=16, dataset=dict(max_per_class=8))
val_dataloader = dict(dataset=dict(max_per_class=5))
test_dataloader = dict(dataset=dict(max_per_class=5))
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=4, val_interval=1)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=5e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", T_max=4, by_epoch=True),
]
custom_hooks = [dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.1, update_buffers=True)]
"""


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file: four epochs of five steps on 80 digits, with averaged weights and every kind of randomness."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG.format(root=ROOT, spec=SPEC))
    return path
