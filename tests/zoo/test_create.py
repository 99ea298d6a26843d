"""create_model with weights by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import prunet_zoo
from prunet_zoo import create_model, load_spec, save_weights
from prunet_zoo.errors import CheckpointError, SpecError, UnknownNameError
from prunet_zoo.models import PruNetClassifier
from prunet_zoo.spec import NetSpec

SPEC = {
    "name": "small",
    "input_size": 32,
    "stages": [{"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]}],
    "tail": {"out_channels": 16},
    "num_classes": 10,
}


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PruNetClassifier:
    """A network whose weights every name gives; `asked` lists the names."""
    torch.manual_seed(0)
    model = PruNetClassifier(NetSpec.from_dict(SPEC)).eval()
    path = tmp_path / "w.safetensors"
    save_weights(path, model.state_dict(), model.spec)
    model.asked = asked = []  # type: ignore[assignment]

    def download(name: str) -> Path:
        asked.append(name)
        return path

    monkeypatch.setattr("prunet_zoo.zoo.download.download", download)
    return model


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("prunet_p0", {"pretrained": True}),
        ("prunet://prunet_p0", {}),
        ("prunet://prunet_p0", {"pretrained": True}),
        ("digits_classifier", {"pretrained": True}),
        ("prunet://digits_classifier", {}),
    ],
)
def test_with_its_weights(stored: PruNetClassifier, arch: str, options: dict[str, bool]) -> None:
    model = create_model(arch, **options).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), stored(x))
    assert stored.asked == [arch.removeprefix("prunet://")]


def test_another_number_of_classes_begins_with_a_fresh_head(stored: PruNetClassifier) -> None:
    model = create_model("prunet_p0", num_classes=3, pretrained=True, drop_rate=0.1).eval()
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 3) and model.drop_rate == 0.1
    assert torch.equal(model.forward_features(x), stored.forward_features(x))


def test_options_are_passed_on(stored: PruNetClassifier) -> None:
    assert create_model("prunet_p0", 0, True, drop_rate=0.25).num_classes == 0
    assert create_model(SPEC, drop_path_rate=0.1).spec == NetSpec.from_dict(SPEC)


def test_without_weights_nothing_is_asked_for(stored: PruNetClassifier, tmp_path: Path) -> None:
    assert create_model(SPEC).num_classes == 10
    assert create_model(load_spec(SPEC), num_classes=4).num_classes == 4
    assert create_model("prunet_p0").num_features == 1984
    assert stored.asked == []


def test_a_weights_file_is_loaded_as_ever(stored: PruNetClassifier, tmp_path: Path) -> None:
    for pretrained in (False, True):
        model = create_model(tmp_path / "w.safetensors", pretrained=pretrained).eval()
        x = torch.randn(1, 3, 32, 32)
        assert torch.equal(model(x), stored(x))
    assert stored.asked == []


def test_a_spec_that_lies_in_its_weights(stored: PruNetClassifier) -> None:
    model = create_model("digits_classifier")
    assert model.spec.hash == stored.spec.hash
    assert not torch.equal(model.tail.conv.weight, stored.tail.conv.weight)


@pytest.mark.parametrize("arch", ["prunet_p9", SPEC, load_spec(SPEC), "work_dirs/spec.json"])
def test_no_published_weights(stored: PruNetClassifier, arch: object) -> None:
    with pytest.raises(
        CheckpointError, match=r"takes the name of a published classifier.*prunet_p0, prunet_p1, gpunet_0"
    ):
        create_model(arch, pretrained=True)  # type: ignore[arg-type]
    assert stored.asked == []


def test_a_detector_is_no_classifier(stored: PruNetClassifier) -> None:
    for arch, pretrained in (
        ("digits_detector", True),
        ("prunet://digits_detector", False),
        ("digits_detector", False),
    ):
        with pytest.raises(CheckpointError, match="is a detector; create_model builds classifiers"):
            create_model(arch, pretrained=pretrained)


def test_wrong_names_and_values() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'prunet_p0'"):
        create_model("prunet://prunet_p00")
    with pytest.raises(UnknownNameError, match="unknown arch 'prunet_p00'"):
        create_model("prunet_p00")
    with pytest.raises(SpecError, match=r"pretrained is True or False, got 'w.pth'"):
        create_model("prunet_p0", pretrained="w.pth")  # type: ignore[arg-type]


def test_exported() -> None:
    from prunet_zoo.zoo import create
    from prunet_zoo.zoo import download as download_module

    assert prunet_zoo.create_model is create.create_model
    assert prunet_zoo.download is download_module.download
