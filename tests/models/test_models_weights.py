"""Weights on disk: whole, with their spec, loaded strictly; damaged and hostile files are refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from prunet_zoo import create_model, load_spec, load_weights, save_weights
from prunet_zoo.errors import CheckpointError
from prunet_zoo.files import WriteError
from prunet_zoo.models import PruNetBackbone, PruNetClassifier, load_state, read_weights_spec

SMALL: dict[str, Any] = {
    "name": "small",
    "input_size": 32,
    "stages": [
        {"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]},
        {"blocks": [{"type": "irb", "out_channels": 16, "stride": 2, "hidden": 24, "se_ratio": 0.25}]},
    ],
    "tail": {"out_channels": 32},
    "num_classes": 5,
}


@pytest.fixture
def model() -> PruNetClassifier:
    torch.manual_seed(0)
    model = create_model(SMALL).train()
    model(torch.randn(4, 3, 32, 32))  # statistics that are not those of a fresh network
    return model.eval()


@pytest.fixture
def file(model: PruNetClassifier, tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_weights(path, model.state_dict(), model.spec, top1=98.7)
    return path


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items())


def test_round_trip(model: PruNetClassifier, file: Path) -> None:
    assert read_weights_spec(file) == model.spec
    again = create_model(file)
    assert same(model, again)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(x), model(x))
    assert set(load_state(file)) == set(model.state_dict())


def test_file_is_readable_by_safetensors_alone(model: PruNetClassifier, file: Path) -> None:
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:
        meta = opened.metadata()
    assert json.loads(meta["spec"]) == model.spec.to_dict()
    assert json.loads(meta["top1"]) == 98.7


def test_other_number_of_classes_gets_a_fresh_head(model: PruNetClassifier, file: Path) -> None:
    other = create_model(file, num_classes=3)
    state = model.state_dict()
    assert other.classifier.weight.shape == (3, 32)
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items() if not k.startswith("classifier."))
    headless = create_model(file, num_classes=0)
    assert all(torch.equal(v, state[k]) for k, v in headless.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "net.", "module.", "backbone.", "module.net."])
def test_prefix_is_found(model: PruNetClassifier, prefix: str) -> None:
    state = {prefix + k: v for k, v in model.state_dict().items()}
    fresh = create_model(SMALL)
    assert load_weights(fresh, state) == list(model.state_dict())
    assert same(model, fresh)
    backbone = PruNetBackbone(SMALL, out_indices=(0, 1))
    assert load_weights(backbone, state, prefix=prefix) == list(backbone.state_dict())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in backbone.state_dict().items())


def test_a_backbone_takes_a_classifiers_file(model: PruNetClassifier, file: Path) -> None:
    backbone = PruNetBackbone(file, out_indices=(1,))  # the spec inside is the arch
    load_weights(backbone, file)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in backbone.state_dict().items())


@pytest.mark.parametrize("key", [None, "state_dict", "model", "state_dict_ema"])
def test_torch_checkpoints(model: PruNetClassifier, tmp_path: Path, key: str | None) -> None:
    path, state = tmp_path / "epoch_1.pth", model.state_dict()
    torch.save({key: state, "meta": {"epoch": 1}} if key else state, path)
    fresh = create_model(SMALL)
    load_weights(fresh, path)
    assert same(model, fresh)


def test_averaged_weights_come_first(model: PruNetClassifier, tmp_path: Path) -> None:
    path, average = tmp_path / "a.pth", create_model(SMALL)
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}, path)
    fresh = create_model(SMALL)
    load_weights(fresh, path)
    assert same(average, fresh)


def test_every_tensor_must_be_there(model: PruNetClassifier) -> None:
    state, fresh = dict(model.state_dict()), create_model(SMALL)
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    del state["stages.1.0.se.reduce.bias"]
    with pytest.raises(CheckpointError, match=r"lacks 1 of \d+ tensors: stages\.1\.0\.se\.reduce\.bias"):
        load_weights(fresh, state)
    with pytest.raises(CheckpointError, match="no tensor in the given state dict fits with prefix"):
        load_weights(fresh, {"other." + k: v for k, v in model.state_dict().items()})
    with pytest.raises(CheckpointError, match=r"no tensor in .* fits with prefix 'encoder\.'"):
        load_weights(fresh, model.state_dict(), prefix="encoder.")
    with pytest.raises(CheckpointError, match="no tensor in"):
        load_weights(fresh, {})
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


def test_every_shape_must_fit(model: PruNetClassifier) -> None:
    fresh = create_model(SMALL, num_classes=7)
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"classifier\.weight: \[5, 32\], not \[7, 32\]"):
        load_weights(fresh, model.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())  # nothing half-loaded


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_truncated_files_are_refused(file: Path, tmp_path: Path, model: PruNetClassifier, share: float) -> None:
    torch.save(model.state_dict(), tmp_path / "w.pth")
    for source in (file, tmp_path / "w.pth"):
        raw = source.read_bytes()
        source.write_bytes(raw[: int(len(raw) * share)])
        with pytest.raises(CheckpointError, match=source.name):
            load_weights(create_model(SMALL), source)
    with pytest.raises(CheckpointError, match=file.name):
        create_model(file)


def test_damaged_spec_inside_is_refused(model: PruNetClassifier, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "w.safetensors"
    for text in ("{", "[]", '{"stages": 3}', "null"):
        save_file(model.state_dict(), path, {"spec": text})
        with pytest.raises(CheckpointError, match=r"w\.safetensors carries a damaged spec"):
            read_weights_spec(path)
    save_file(model.state_dict(), path)
    with pytest.raises(CheckpointError, match="carries no spec; give the spec's JSON as arch"):
        create_model(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for name in ("none.safetensors", "none.pth"):
        with pytest.raises(CheckpointError, match=rf"{name} does not exist"):
            load_weights(create_model(SMALL), tmp_path / name)
    with pytest.raises(CheckpointError, match="does not exist"):
        create_model(tmp_path / "none.safetensors")


class Hostile:
    """A pickle that would run a command when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickles_with_code_are_refused_and_not_run(tmp_path: Path, how: str) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    if how == "torch":
        torch.save({"state_dict": {"x": torch.zeros(1)}, "meta": Hostile(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        load_weights(create_model(SMALL), path)
    assert not marker.exists()


def test_a_header_of_absurd_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load_state(path)


def test_files_without_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    for content in ([1, 2], {"epoch": 3}, {"state_dict": {"x": 1}}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="holds no state dict"):
            load_state(path)


def test_full_disk_keeps_the_old_weights(model: PruNetClassifier, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def no_space(_fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(WriteError, match="No space left on device"):
        save_weights(file, create_model(SMALL).state_dict(), model.spec)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_equal_weights_are_equal_files(tmp_path):
    stages = load_spec("prunet_p0").model_dump()["stages"][:3]
    spec = load_spec("prunet_p0").replace(stages=stages, num_classes=3)
    model = create_model(spec)
    paths = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "c")]
    for path in paths:
        save_weights(path, model.state_dict(), spec, accuracy=0.5, seed=1, note="x")
    assert len({path.read_bytes() for path in paths}) == 1
    assert len(load_weights(create_model(spec), paths[0])) == len(model.state_dict())
