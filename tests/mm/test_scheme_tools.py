"""prunet:// in tools/train.py and tools/test.py, and what it costs that they know it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import prunet_zoo
from prunet_zoo.mm.cli import load_config, run_tool
from prunet_zoo.mm.network import set_arch, set_weights

ROOT = Path(__file__).resolve().parents[2]
SCENES = ROOT / "configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py"
QUIET = ["--cfg-options", "visualizer=None", "log_level=WARNING"]
State = dict[str, torch.Tensor]
Call = Callable[[str, list[str]], tuple[int, str]]
pytestmark = pytest.mark.usefixtures("zoo_home")


@pytest.fixture
def call(load_tool: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a tool in this process; gives its exit status and what it wrote to standard error."""

    def run(name: str, argv: list[str]) -> tuple[int, str]:
        module = load_tool(name)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_tool(module.main, argv)
        return int(caught.value.code or 0), capsys.readouterr().err

    return run


def test_what_a_tool_says_offline(tiny_config: Path, tmp_path: Path, call: Call) -> None:
    argv = [str(tiny_config), "--work-dir", str(tmp_path), *QUIET]
    for name, more in (("train", ["--weights", "prunet://gpunet_0"]), ("test", ["prunet://gpunet_0"])):
        status, message = call(name, [*argv[:1], *more, *argv[1:]])
        assert status == 2 and message.startswith("error: no address could be reached\nWithout a way to ")
        assert "Traceback" not in message
    status, message = call("test", ["prunet_p2", *argv[1:]])
    assert status == 2 and message.startswith("error: unknown zoo model 'prunet_p2'; did you mean 'prunet_p1'")


FROZEN = ["optim_wrapper.optimizer.lr=0.0", "optim_wrapper.optimizer.weight_decay=0.0", "train_cfg.max_epochs=1"]


@pytest.mark.parametrize("classes", [10, 12])
@pytest.mark.parametrize("how", ["weights", "load_from"])
def test_training_starts_from_the_zoo(
    tiny: State, tiny_config: Path, tmp_path: Path, call: Call, how: str, classes: int
) -> None:
    """Without learning, the run ends with the zoo's weights; averaged ones too, and only a head for others is fresh."""
    options = [*FROZEN, *(["load_from=prunet://tiny"] if how == "load_from" else [])]
    weights = ["--weights", "prunet://tiny"] if how == "weights" else []
    if classes != 10:  # the digits have 10 classes; the head's shape is what matters
        options += [f"model.num_classes={classes}", "train_dataloader.dataset.type=TwelveDigits"]
        options += ["val_dataloader.dataset.type=TwelveDigits"]
    status, message = call("train", [str(tiny_config), *weights, "--work-dir", str(tmp_path), *QUIET, *options])
    assert status == 0, message
    checkpoint = torch.load(tmp_path / "epoch_1.pth", weights_only=True)
    learned = [name for name in tiny if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    for prefix, state in (("net.", checkpoint["state_dict"]), ("module.net.", checkpoint["ema_state_dict"])):
        for name in learned:
            same = state[prefix + name].shape == tiny[name].shape and torch.equal(state[prefix + name], tiny[name])
            assert same is (classes == 10 or not name.startswith("classifier.")), name


@pytest.fixture(autouse=True, scope="module")
def _twelve() -> Iterator[None]:
    from prunet_zoo.mm.datasets import DigitsDataset
    from prunet_zoo.registry import DATASETS

    class TwelveDigits(DigitsDataset):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.metainfo = {"classes": tuple(str(i) for i in range(12))}

    for registry in (DATASETS, DATASETS.parent):
        registry.register_module(module=TwelveDigits)
    yield
    for registry in (DATASETS, DATASETS.parent):
        registry.module_dict.pop("TwelveDigits")


def test_arch_and_weights_of_the_tools(tiny: State, tiny_config: Path) -> None:
    for config in (tiny_config, SCENES):
        cfg = load_config(config, {"model.backbone.out_indices": (0, 1)} if config == SCENES else None)
        set_arch(cfg, "prunet://tiny")
        set_weights(cfg, "prunet://tiny")
        holder = cfg.model.get("backbone") or cfg.model
        assert holder.arch.name == "tiny" and holder.init_cfg.checkpoint == "prunet://tiny"
    cfg = load_config(tiny_config)
    set_arch(cfg, "prunet://gpunet_d2")  # a listed architecture: nothing is downloaded
    assert prunet_zoo.NetSpec.from_dict(cfg.model.arch.to_dict()) == prunet_zoo.load_spec("gpunet_d2")


def test_test_tool_takes_the_address(tiny: State, tiny_config: Path, tmp_path: Path, call: Call) -> None:
    argv = [str(tiny_config), "prunet://tiny", "--work-dir", str(tmp_path), "--json", str(tmp_path / "t.json"), *QUIET]
    assert call("test", argv)[0] == 0
    record = json.loads((tmp_path / "t.json").read_text())
    assert record["checkpoint"] == "prunet://tiny" and record["images"] == 50 and "top1" in record["metrics"]


def test_registering_costs_little() -> None:
    """The scheme is there after ``import prunet_zoo``, which loads neither mmdet nor what downloads and converts."""
    code = (
        "import sys, prunet_zoo\nfrom mmengine.runner import CheckpointLoader\n"
        "heavy = ['mmdet', 'mmcv', 'prunet_zoo.zoo.download', 'prunet_zoo.zoo.convert', 'prunet_zoo.zoo.predict']\n"
        "print('prunet://' in CheckpointLoader._schemes, [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True []"
