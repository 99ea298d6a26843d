"""FILE.safetensors wherever MMEngine takes a checkpoint: as a model of the zoo where it is ours, else as it is."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import CheckpointLoader, load_checkpoint
from safetensors.torch import save_file

from prunet_zoo import save_weights
from prunet_zoo.errors import CheckpointError
from prunet_zoo.mm.backbone import PruNet
from prunet_zoo.mm.classifier import PruNetClassifier
from prunet_zoo.mm.cli import load_config
from prunet_zoo.mm.scheme import load_from_safetensors
from prunet_zoo.mm.training import load_strictly
from prunet_zoo.models import create_model, load_state
from prunet_zoo.spec import NetSpec
from prunet_zoo.zoo.home import shared_folder

DETECTOR = shared_folder("checkpoints") / "digits_detector.safetensors"
DIGITS = tuple(str(i) for i in range(10))
State = dict[str, torch.Tensor]
pytestmark = pytest.mark.usefixtures("zoo_home")


@pytest.fixture
def arch(tiny_config: Path) -> dict[str, Any]:
    found: dict[str, Any] = load_config(tiny_config).model.arch.to_dict()
    return found


@pytest.fixture
def weights(arch: dict[str, Any], tmp_path: Path, random_state: Callable[..., State]) -> tuple[Path, State]:
    torch.manual_seed(1)
    state, path = random_state(create_model(arch)), tmp_path / "my.safetensors"
    meta = {"classes": DIGITS, "licence": "Apache-2.0", "task": "classification"}
    save_weights(path, state, NetSpec.from_dict(arch), **meta)
    return path, state


def test_what_the_loader_gives(weights: tuple[Path, State], monkeypatch: pytest.MonkeyPatch) -> None:
    path, state = weights
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.chdir(path.parent)
    for source in (str(path), "my.safetensors", "~/my.safetensors"):
        loaded = CheckpointLoader.load_checkpoint(source, map_location="cpu")
        assert loaded["state_dict"].keys() == {f"backbone.{name}" for name in state}
        assert all(torch.equal(loaded["state_dict"][f"backbone.{name}"], tensor) for name, tensor in state.items())
        assert loaded["meta"]["dataset_meta"] == {"classes": DIGITS}
        about = loaded["meta"]["prunet_zoo"]
        assert about["licence"] == "Apache-2.0" and Path(about["file"]).resolve() == path.resolve()
    moved = CheckpointLoader.load_checkpoint(str(path), map_location="meta")["state_dict"]
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}


@pytest.mark.parametrize("address", ["https://host/x.safetensors", "s3://bucket/x.safetensors", "x.safetensors.pth"])
def test_other_addresses_keep_their_loaders(address: str) -> None:
    assert CheckpointLoader._get_checkpoint_loader(address) is not load_from_safetensors


def test_into_our_models(weights: tuple[Path, State], arch: dict[str, Any]) -> None:
    path, state = weights
    for model in (PruNetClassifier(arch), PruNetClassifier(arch, num_classes=7), PruNet(arch, out_indices=(0, 1))):
        load_checkpoint(model, str(path))
        net = getattr(model, "net", model)
        same = [name for name, tensor in net.state_dict().items() if tensor.shape == state[name].shape]
        assert all(torch.equal(net.state_dict()[name], state[name]) for name in same)
        assert len(same) >= len(net.state_dict()) - 2
    with pytest.raises(CheckpointError, match=r"my\.safetensors is of another architecture"):
        load_checkpoint(PruNetClassifier({**arch, "tail": {"out_channels": 48}}), str(path))
    with pytest.raises(CheckpointError, match=r"no tensor of .*my\.safetensors fits Linear"):
        load_checkpoint(torch.nn.Linear(2, 2), str(path))


def test_a_prefix_of_a_foreign_module(weights: tuple[Path, State]) -> None:
    from mmengine.runner.checkpoint import _load_checkpoint_with_prefix

    path, state = weights
    assert _load_checkpoint_with_prefix("backbone", str(path)).keys() == state.keys()
    with pytest.raises(CheckpointError, match=r"begins with the prefix 'neck\.'; they begin with backbone\."):
        _load_checkpoint_with_prefix("neck.", str(path))


def test_the_committed_detector_as_a_file() -> None:
    from mmdet.apis import DetInferencer, init_detector

    state = load_state(DETECTOR)
    config = str(shared_folder("configs") / "detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py")
    made = [DetInferencer(weights=str(DETECTOR), device="cpu", show_progress=False).model]
    made.append(init_detector(config, str(DETECTOR), device="cpu"))
    for model in made:
        assert model.dataset_meta["classes"] == DIGITS
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_files_of_others_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "linear.safetensors"
    save_file({"weight": torch.ones(2, 2), "other": torch.ones(1)}, path)
    assert CheckpointLoader.load_checkpoint(str(path))["state_dict"].keys() == {"weight", "other"}
    model = torch.nn.Linear(2, 2)
    load_checkpoint(model, str(path))
    assert torch.equal(model.weight, torch.ones(2, 2))
    from mmengine.runner.checkpoint import _load_checkpoint_with_prefix

    with pytest.raises(AssertionError):  # MMEngine's own
        _load_checkpoint_with_prefix("neck.", str(path))


def test_missing_and_damaged_files(weights: tuple[Path, State]) -> None:
    path, _ = weights
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"my\.safetensors is damaged or truncated"):
        CheckpointLoader.load_checkpoint(str(path))
    with pytest.raises(CheckpointError, match=r"none\.safetensors does not exist"):
        CheckpointLoader.load_checkpoint(str(path.with_name("none.safetensors")))


# ---- advice in messages


@pytest.mark.parametrize("make", [PruNet, PruNetClassifier])
def test_a_prefix_that_is_not_needed(make: Any, weights: tuple[Path, State], arch: dict[str, Any]) -> None:
    options = {"out_indices": (0, 1)} if make is PruNet else {}
    init = {"type": "Pretrained", "checkpoint": str(weights[0]), "prefix": "backbone."}
    with pytest.raises(CheckpointError, match=r"fits with prefix 'backbone\.'; .*; leave prefix out"):
        make(arch, init_cfg=init, **options).init_weights()
    init.pop("prefix")
    make(arch, init_cfg=init, **options).init_weights()


@pytest.mark.parametrize("before", ["", "module."])
def test_a_published_checkpoint_is_to_be_converted(before: str, arch: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "0.5ms-D.pth.tar"
    torch.save({"state_dict": {f"{before}network.head: 2.net.0.weight": torch.ones(1)}}, path)
    advice = r"published checkpoint's names: convert it by python tools/convert\.py"
    with pytest.raises(CheckpointError, match=advice):
        PruNet(arch, (0, 1), init_cfg={"type": "Pretrained", "checkpoint": str(path)}).init_weights()
    with pytest.raises(CheckpointError, match=advice):
        load_strictly(PruNetClassifier(arch), path)
    with pytest.raises(CheckpointError, match=advice):
        load_checkpoint(PruNetClassifier(arch), str(path))
    torch.save({"state_dict": {"layer1.weight": torch.ones(1)}}, path)
    with pytest.raises(CheckpointError) as caught:
        load_strictly(PruNetClassifier(arch), path)
    assert "convert" not in str(caught.value)


def test_a_published_file_that_torch_refuses_is_to_be_converted(tmp_path: Path) -> None:
    path = tmp_path / "0.5ms-D.pth.tar"
    torch.save({"state_dict": {"a": torch.ones(1)}, "args": argparse.Namespace(a=1)}, path)
    with pytest.raises(CheckpointError, match=r"refers to argparse\.Namespace; .* python tools/convert\.py"):
        load_state(path)
    with zipfile.ZipFile(tmp_path / "published.zip", "w") as file:
        file.write(path, path.name)
    with pytest.raises(CheckpointError, match=r"a published zip is converted by python tools/convert\.py"):
        load_state(tmp_path / "published.zip")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="damaged or truncated") as caught:
        load_state(path)
    assert "convert" not in str(caught.value)
