"""Weights through timm: `pretrained=True`, `checkpoint_path`, and what a caller's cfg brings; never a silent half."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import timm.models
import torch
from reference import Reference
from synthetic import checkpoint_of, random_state, saved, synthetic_state

import prunet_zoo
from prunet_zoo import load_spec, save_weights
from prunet_zoo.errors import CheckpointError
from prunet_zoo.zoo import find_model
from prunet_zoo.zoo.timm_models import CLASSIFIER, FIRST_CONV

NAMES = ["gpunet_0", "gpunet_1", "gpunet_2", "gpunet_d1", "gpunet_d2", "prunet_p0", "prunet_p1"]
ONE = "gpunet_d1"


class Weights(NamedTuple):
    name: str
    path: Path
    state: dict[str, torch.Tensor]


def make(name: str, folder: Path) -> Weights:
    shapes = {k: tuple(v.shape) for k, v in timm.create_model(name, device="meta").state_dict().items()}
    state = random_state(shapes)
    save_weights(folder / f"{name}.safetensors", state, load_spec(name))
    return Weights(name, folder / f"{name}.safetensors", state)


@pytest.fixture(scope="module", params=NAMES)
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weights]:
    """A converted file of each network, one after the other (they are up to 160 MB)."""
    made = make(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    made.path.unlink()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make(ONE, tmp_path_factory.mktemp("one"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[str]:
    """Names that were downloaded; the download is the file of ``weights`` or ``one``."""
    ready = request.getfixturevalue("weights" if "weights" in request.fixturenames else "one")
    seen: list[str] = []

    def download(name: str, **_: Any) -> Path:
        assert name == ready.name
        seen.append(name)
        return ready.path

    monkeypatch.setattr(importlib.import_module("prunet_zoo.zoo.download"), "download", download)
    return seen


def image(channels: int = 3) -> torch.Tensor:
    return torch.randn(1, channels, 64, 64, generator=torch.Generator().manual_seed(0))


def test_pretrained_is_the_zoos(weights: Weights, calls: list[str]) -> None:
    network = timm.create_model(weights.name, pretrained=True).eval()
    assert calls == [weights.name]
    ours = prunet_zoo.create_model(str(weights.path)).eval()
    with torch.no_grad():
        assert torch.equal(network(image()), ours(image()))
    assert all(torch.equal(value, weights.state[key]) for key, value in network.state_dict().items())


def test_round_trip_through_a_file(weights: Weights, tmp_path: Path) -> None:
    network = timm.create_model(weights.name, checkpoint_path=weights.path).eval()
    assert all(torch.equal(value, weights.state[key]) for key, value in network.state_dict().items())
    network.reset_classifier(3)
    save_weights(tmp_path / "w.safetensors", network.state_dict(), network.spec)
    again = timm.create_model(weights.name, num_classes=3, checkpoint_path=tmp_path / "w.safetensors").eval()
    ours = prunet_zoo.create_model(str(tmp_path / "w.safetensors")).eval()
    with torch.no_grad():
        assert torch.equal(again(image()), network(image()))
        assert torch.equal(ours(image()), network(image()))


def test_other_channels_and_classes(weights: Weights, calls: list[str]) -> None:
    network = timm.create_model(weights.name, pretrained=True, in_chans=1, num_classes=5).eval()
    assert network(image(1)).shape == (1, 5)
    for key, value in network.state_dict().items():
        if key == f"{FIRST_CONV}.weight":
            torch.testing.assert_close(value, weights.state[key].sum(1, keepdim=True))
        elif not key.startswith(CLASSIFIER):
            assert torch.equal(value, weights.state[key]), key


def test_pretrained_features(weights: Weights, calls: list[str]) -> None:
    options: dict[str, Any] = {"features_only": True, "out_indices": (1, 2, 3, 4), "in_chans": 1}
    network = timm.create_model(weights.name, pretrained=True, **options).eval()
    state = network.model.state_dict()
    assert all(torch.equal(v, weights.state[k]) for k, v in state.items() if not k.startswith(FIRST_CONV))
    gray = image(1)
    whole = prunet_zoo.create_model(str(weights.path)).eval()
    with torch.no_grad():  # the sum over a grey image's three equal channels
        wanted = whole.forward_intermediates(gray.expand(1, 3, 64, 64), (1, 2, 3, 4), intermediates_only=True)
        for a, b in zip(network(gray), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_no_classifier(one: Weights, calls: list[str]) -> None:
    for pool in ("avg", ""):
        network = timm.create_model(ONE, pretrained=True, num_classes=0, global_pool=pool)
        assert torch.equal(network.head.conv.weight, one.state["head.conv.weight"])


def test_the_name_with_its_tag_and_the_cfg_given_back(one: Weights, calls: list[str]) -> None:
    networks = [
        timm.create_model(f"{ONE}.nv_in1k", pretrained=True),
        timm.create_model(ONE, pretrained=True, pretrained_cfg="nv_in1k"),
        timm.create_model(ONE, pretrained=True, pretrained_cfg=timm.create_model(ONE).pretrained_cfg),
        timm.create_model(ONE, pretrained=True, pretrained_cfg=timm.get_pretrained_cfg(ONE)),
        timm.create_model(ONE, pretrained=True, pretrained_cfg_overlay={"crop_pct": 0.9}),
    ]
    assert calls == [ONE] * len(networks)
    for network in networks:
        assert torch.equal(network.classifier.weight, one.state["classifier.weight"])
    assert networks[-1].pretrained_cfg["crop_pct"] == 0.9


def test_nothing_is_downloaded_unless_wanted(one: Weights, calls: list[str]) -> None:
    timm.create_model(ONE)
    timm.create_model(ONE, features_only=True)
    timm.create_model(ONE, checkpoint_path=str(one.path))
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model(f"{ONE}.in21k", pretrained=True)
    assert calls == []


@pytest.mark.parametrize("source", ["file", "state_dict", "url", "local-dir"])
def test_a_callers_own_weights_come_first(
    source: str, calls: list[str], one: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    state = {key: value * 1.5 if key == "classifier.bias" else value for key, value in one.state.items()}
    path = tmp_path / "own.pth"
    path.write_bytes(saved(state))
    if source == "local-dir":
        network = timm.create_model(ONE)
        network.load_state_dict(state)
        timm.models.save_for_hf(network, tmp_path / "local", safe_serialization=True)
        network = timm.create_model(f"local-dir:{tmp_path / 'local'}", pretrained=True)
    else:
        own = {"file": str(path), "state_dict": state, "url": path.as_uri()}[source]
        network = timm.create_model(ONE, pretrained=True, pretrained_cfg_overlay={source: own})
    assert calls == []
    assert torch.equal(network.classifier.bias, state["classifier.bias"])


@pytest.mark.parametrize("key", ["state_dict_ema", "state_dict", "model"])
def test_a_callers_training_checkpoint(key: str, one: Weights) -> None:
    checkpoint = {key: one.state, "epoch": 3}
    network = timm.create_model(ONE, pretrained=True, pretrained_cfg_overlay={"state_dict": checkpoint})
    assert torch.equal(network.classifier.bias, one.state["classifier.bias"])
    broken = {**one.state, "epoch": 3}
    with pytest.raises(CheckpointError, match=r"the checkpoint is no state dict: .*'epoch' is a int"):
        timm.create_model(ONE, pretrained=True, pretrained_cfg_overlay={"state_dict": broken})


def test_own_weights_of_other_classes(one: Weights, tmp_path: Path) -> None:
    network = timm.create_model(ONE, num_classes=10)
    path = str(tmp_path / "own.pth")
    torch.save(network.state_dict(), path)
    again = timm.create_model(ONE, pretrained=True, pretrained_cfg_overlay={"file": path, "num_classes": 10})
    assert torch.equal(again.classifier.weight, network.classifier.weight)
    for options in ({"num_classes": 3}, {"features_only": True}):
        timm.create_model(ONE, pretrained=True, pretrained_cfg_overlay={"file": path}, **options)
    with pytest.raises(RuntimeError, match=r"size mismatch for classifier\.weight"):
        timm.create_model(ONE, pretrained=True, pretrained_cfg_overlay={"file": path})


@pytest.mark.parametrize("name", [ONE, "gpunet_0"])
def test_published_files(name: str, tmp_path: Path) -> None:
    state = synthetic_state(name)
    path = tmp_path / find_model(name).weights.file.replace(".zip", ".pth.tar")
    path.write_bytes(saved(checkpoint_of(name, state)))
    with torch.no_grad():
        logits, maps = Reference(name, state)(image())
        overlay = {"file": str(path)}
        for network in (
            timm.create_model(name, checkpoint_path=path).eval(),
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval(),
        ):
            torch.testing.assert_close(network(image()), logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
        features = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True).eval()
        for found, stride in zip(features(image()), features.feature_info.reduction(), strict=True):
            scale = float(maps[stride].abs().max())
            torch.testing.assert_close(found, maps[stride], rtol=1e-4, atol=1e-4 * scale)


def test_published_names_may_be_loaded_into_a_ready_network() -> None:
    network, state = timm.create_model(ONE), synthetic_state(ONE)
    network.load_state_dict({f"module.{key}": value for key, value in state.items()})
    assert torch.equal(network.classifier.bias, state["network.tail:.net.8.bias"])
    del state["network.tail:.net.8.bias"]
    with pytest.raises(CheckpointError, match=r"network\.tail:\.net\.8\.bias|classifier\.bias"):
        network.load_state_dict(state)
    holder = torch.nn.ModuleDict({"inner": network})  # inside another model, its own names hold
    holder.load_state_dict(holder.state_dict())


OPTIONS: list[dict[str, Any]] = [{}, {"num_classes": 5}, {"features_only": True}, {"in_chans": 1, "num_classes": 0}]


@pytest.mark.parametrize("options", OPTIONS, ids=["as it is", "other classes", "features", "no classes"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"does not fit 'gpunet_d1': tail\.norm\.bias is missing$"),
        ("left over", r"stages\.9\.conv\.weight does not belong to it$"),
        ("shape", r"tail\.norm\.bias has shape \[7\], not \[1152\]$"),
        ("nothing of it", "is missing; .* more$"),
    ],
)
def test_nothing_is_loaded_by_halves(
    fault: str, message: str, options: dict[str, Any], one: Weights, tmp_path: Path
) -> None:
    state = dict(one.state)
    if fault == "missing":
        del state["tail.norm.bias"]
    elif fault == "left over":
        state["stages.9.conv.weight"] = torch.zeros(1)
    elif fault == "shape":
        state["tail.norm.bias"] = torch.zeros(7)
    else:
        state = {f"backbone.{key}": value for key, value in list(state.items())[:3]}
    with pytest.raises(CheckpointError, match=message):
        timm.create_model(ONE, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **options)
    save_weights(tmp_path / "w.safetensors", state, load_spec(ONE))
    if not options:
        with pytest.raises(RuntimeError, match="Error"):
            timm.create_model(ONE, checkpoint_path=tmp_path / "w.safetensors")


def test_a_classifier_that_is_wanted_must_be_there(one: Weights) -> None:
    state = {key: value for key, value in one.state.items() if not key.startswith("classifier.")}
    overlay = {"state_dict": state}
    assert timm.create_model(ONE, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0).num_classes == 0
    with pytest.raises(RuntimeError, match=r"Missing key.*classifier\.weight"):
        timm.create_model(ONE, pretrained=True, pretrained_cfg_overlay=overlay)


def test_a_failed_download_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **_: Any) -> Path:
        raise ConnectionError(f"no way to {name}")

    monkeypatch.setattr(importlib.import_module("prunet_zoo.zoo.download"), "download", download)
    with pytest.raises(ConnectionError, match="no way to prunet_p0"):
        timm.create_model("prunet_p0", pretrained=True)


def test_cache_dir_is_refused_rather_than_ignored(one: Weights, calls: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cache_dir='.*' is not for the weights of 'gpunet_d1': .*PRUNET_HOME"):
        timm.create_model(ONE, pretrained=True, cache_dir=str(tmp_path))
    assert calls == []


def test_weights_in_the_zoos_folder_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: Weights) -> None:
    monkeypatch.setenv("PRUNET_HOME", str(one.path.parent))
    network = timm.create_model(ONE, pretrained=True)
    assert torch.equal(network.classifier.bias, one.state["classifier.bias"])
    assert network.pretrained_cfg["file"] == str(one.path)
