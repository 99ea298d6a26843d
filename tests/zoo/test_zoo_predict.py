"""Classifiers of the zoo and of published files, with torch and timm alone; the committed demo classifier."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prunet_zoo import create_model, load_spec, save_weights
from prunet_zoo.data.samples import write_samples
from prunet_zoo.errors import CheckpointError, DataError, PrunetError, UnknownNameError
from prunet_zoo.models import load_state
from prunet_zoo.spec import NetSpec
from prunet_zoo.zoo.convert import convert_checkpoint
from prunet_zoo.zoo.home import shared_folder
from prunet_zoo.zoo.index import Preprocess, find_model
from prunet_zoo.zoo.predict import (
    Classifier,
    PredictError,
    choose_device,
    class_names,
    load_classifier,
    read_meta,
    resized,
)

ROOT = Path(__file__).resolve().parents[2]
DEMO = shared_folder("checkpoints") / "digits_classifier.safetensors"
TINY = {
    "name": "tiny",
    "input_size": 32,
    "stages": [{"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]}],
    "tail": {"out_channels": 16},
    "num_classes": 3,
}
PREPROCESS = {"input_size": 32, "crop_pct": 0.875, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


def tiny_file(path: Path, **meta: Any) -> Path:
    torch.manual_seed(0)
    model = create_model(TINY)
    save_weights(path, model.state_dict(), model.spec, **meta)
    return path


def test_the_demo_is_small_and_tells_what_the_index_tells() -> None:
    assert DEMO.stat().st_size < 3_000_000
    meta, entry = read_meta(DEMO), find_model("digits_classifier")
    assert (meta["name"], meta["task"], tuple(meta["classes"])) == (entry.name, entry.task, entry.classes)
    assert Preprocess.model_validate(meta["preprocess"]) == entry.preprocess
    assert meta["config"] == f"configs/{entry.config}" and (ROOT / meta["config"]).is_file()
    assert meta["licence"] == entry.weights.licence
    assert [word.split()[1] for word in meta["command"]] == ["tools/train.py", "tools/publish.py"]
    assert all(word not in json.dumps(meta) for word in ("/home", "/root", "/tmp", "/work/"))


def test_the_demo_has_the_accuracy_that_it_tells(tmp_path: Path) -> None:
    images = write_samples(tmp_path, digits=359, scenes=0)
    classifier = load_classifier("digits_classifier")
    right = sum(
        found[0].name == path.parent.name
        for start in range(0, len(images), 120)
        for path, found in zip(
            images[start : start + 120], classifier.predict(images[start : start + 120], top=1), strict=True
        )
    )
    assert 100 * right / 359 == pytest.approx(read_meta(DEMO)["metrics"]["top1"], abs=1e-9)
    assert right >= 355


def test_scores_are_those_of_the_network(tmp_path: Path) -> None:
    path = tiny_file(tmp_path / "w.safetensors", classes=["a", "b", "c"], preprocess=PREPROCESS)
    classifier = load_classifier(path)
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    (found,) = classifier.predict([image], top=9)
    assert [c.score for c in found] == sorted((c.score for c in found), reverse=True) and len(found) == 3
    assert sum(c.score for c in found) == pytest.approx(1.0, abs=1e-6)
    net = create_model(str(path)).eval()
    with torch.no_grad():
        scores = net(classifier.read(image)[None]).softmax(1)[0]
    assert found[0].label == int(scores.argmax()) and found[0].name == "abc"[found[0].label]
    assert found[0].score == pytest.approx(float(scores.max()), abs=1e-6)
    assert classifier.read(image).shape == (3, 32, 32)
    assert classifier.predict([]) == []


def test_a_batch_gives_what_single_images_give() -> None:
    classifier = load_classifier("prunet://digits_classifier")
    images = [Image.effect_noise((30 + 7 * i, 40), 60).convert("RGB") for i in range(5)]
    together = classifier.predict(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = classifier.predict([image])
        assert [c.label for c in alone] == [c.label for c in found]
        assert [c.score for c in alone] == pytest.approx([c.score for c in found], abs=1e-5)


def test_a_named_network_with_weights_of_one_s_own(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = create_model("gpunet_0").eval()
    path = tmp_path / "own.safetensors"
    save_weights(path, model.state_dict(), model.spec)
    classifier = load_classifier("gpunet_0", weights=path)
    image = Image.effect_noise((400, 500), 70).convert("RGB")
    (found,) = classifier.predict([image], top=3)
    with torch.no_grad():
        expected = model(classifier.read(image)[None]).softmax(1)[0].topk(3)
    assert [c.label for c in found] == expected.indices.tolist()
    assert found[0].name == class_names("imagenet-1k")[found[0].label]
    assert classifier.read(image).shape == (3, 320, 320)
    # a converted file tells all that the index knows
    converted = convert_checkpoint(path, "gpunet_0", tmp_path / "converted.safetensors")
    assert load_classifier(converted).predict([image], top=3) == [found]
    assert load_classifier(converted).name == "gpunet_0"


def test_a_name_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str, **options: Any) -> Path:
        asked.append(name)
        return DEMO

    monkeypatch.setattr("prunet_zoo.zoo.download.download", download)
    with pytest.raises(CheckpointError, match=r"lacks|does not fit|no tensor"):  # the demo's weights are not gpunet_1's
        load_classifier("prunet://gpunet_1")
    assert load_classifier("digits_classifier", weights="prunet://digits_classifier").name == "digits_classifier"
    assert set(asked) == {"gpunet_1", "digits_classifier"}


def test_what_a_file_tells_of_itself_comes_before_the_name(tmp_path: Path) -> None:
    """A fine-tuned network: other classes, other preprocessing, the same layers."""
    spec = load_spec("gpunet_0").replace(name="mine", num_classes=2, input_size=64)
    torch.manual_seed(2)
    model = create_model(spec).eval()
    path = tmp_path / "tuned.safetensors"
    save_weights(path, model.state_dict(), spec, classes=["cat", "dog"], preprocess=PREPROCESS)
    classifier = load_classifier("gpunet_0", weights=path)
    assert classifier.classes == ("cat", "dog") and classifier.preprocess == Preprocess.model_validate(PREPROCESS)
    image = Image.effect_noise((64, 64), 70).convert("RGB")
    assert classifier.predict([image]) == load_classifier(path).predict([image])
    save_weights(path, model.state_dict(), spec)
    with pytest.raises(PredictError, match=r"tuned\.safetensors has 2 classes and does not tell their names"):
        load_classifier("gpunet_0", weights=path)


@pytest.mark.parametrize("name", ["gpunet_0", "digits_classifier"])
def test_a_file_of_another_architecture_is_refused(tmp_path: Path, name: str) -> None:
    path = tiny_file(tmp_path / "w.safetensors", classes=["a", "b", "c"], preprocess=PREPROCESS)
    with pytest.raises(CheckpointError, match=rf"w\.safetensors is of the network 'tiny' .* does not fit {name} \("):
        load_classifier(name, weights=path)


def test_a_demo_s_weights_without_a_spec(tmp_path: Path) -> None:
    path = tmp_path / "plain.pth"
    torch.save({"state_dict": load_state(DEMO)}, path)
    image = Image.effect_noise((40, 40), 70).convert("RGB")
    own = load_classifier("digits_classifier", weights=path)
    assert own.predict([image]) == load_classifier("digits_classifier").predict([image])


@settings(deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 96),
    st.floats(0.5, 1.0),
    st.sampled_from(["center", "squash"]),
)
def test_the_size_that_an_image_is_resized_to_is_known_before(
    width: int, height: int, side: int, crop_pct: float, crop_mode: str
) -> None:
    changes = {"input_size": side, "crop_pct": crop_pct, "crop_mode": crop_mode}
    preprocess = Preprocess.model_validate({**PREPROCESS, **changes})
    from timm.data import create_transform

    step = create_transform(is_training=False, **preprocess.model_dump()).transforms[0]
    assert step(Image.new("RGB", (width, height))).size == resized((width, height), preprocess)


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000)])
def test_a_long_thin_image_is_refused_before_it_is_enlarged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    path = tiny_file(tmp_path / "w.safetensors", classes=["a", "b", "c"], preprocess={**PREPROCESS, "input_size": 224})
    Image.new("RGB", size).save(tmp_path / "thin.png")
    classifier = load_classifier(path)
    monkeypatch.setattr(Image.Image, "resize", lambda *args, **options: pytest.fail("the image was resized"))
    with pytest.raises(DataError, match=rf"thin\.png, {size[0]}×{size[1]} px, would be resized to \d+×\d+ px"):
        classifier.read(tmp_path / "thin.png")
    with pytest.raises(DataError, match=r"the image of .* would be resized"):
        classifier.read(Image.new("RGB", size))
    monkeypatch.undo()
    assert load_classifier("digits_classifier").read(tmp_path / "thin.png").shape == (3, 32, 32)  # squashed


def test_an_image_that_does_not_fit_into_memory_when_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args: Any, **options: Any) -> None:
        raise MemoryError

    Image.new("RGB", (50, 40)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "resize", exhausted)
    with pytest.raises(DataError, match=r"x\.png, 50×40 px, does not fit into memory when resized to 32×32 px"):
        load_classifier("digits_classifier").read(tmp_path / "x.png")


def test_imagenet_s_names_are_timm_s() -> None:
    names = class_names("imagenet-1k")
    assert len(names) == 1000 and names[0].startswith("tench") and "tabby" in names[281]
    from timm.data import ImageNetInfo

    assert class_names(ImageNetInfo().label_names()) == names
    assert class_names(["n01440764"]) == ("n01440764",)  # some folders only: their names stay
    with pytest.raises(PredictError, match="'imagenet-1k' or a list"):
        class_names("imagenet-22k")


@pytest.mark.parametrize(
    ("meta", "error", "message"),
    [
        ({}, PredictError, "does not tell its preprocessing"),
        ({"preprocess": PREPROCESS}, PredictError, "does not tell the names of its classes"),
        ({"classes": ["a", "b", "c"]}, PredictError, "--model CONFIG --weights"),
        ({"classes": ["a", "b"], "preprocess": PREPROCESS}, CheckpointError, "3 classes, but 2 names"),
        ({"classes": ["a", "b", "c"], "preprocess": {"input_size": 0}}, CheckpointError, "input_size"),
        ({"task": "detection"}, PredictError, "is a detector"),
    ],
)
def test_files_that_do_not_tell_enough(
    tmp_path: Path, meta: dict[str, Any], error: type[PrunetError], message: str
) -> None:
    path = tiny_file(tmp_path / "w.safetensors", **meta)
    with pytest.raises(error, match=message) as caught:
        load_classifier(path)
    assert "w.safetensors" in str(caught.value) or "names" in str(caught.value)


def test_bad_arguments(tmp_path: Path) -> None:
    path = tiny_file(tmp_path / "w.safetensors", classes=["a", "b", "c"], preprocess=PREPROCESS)
    with pytest.raises(PredictError, match="leave out --weights"):
        load_classifier(path, weights=path)
    with pytest.raises(CheckpointError, match=r"does not fit|lacks|no tensor"):
        load_classifier("gpunet_0", weights=path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_classifier("gpunet_0", weights=tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_classifier(tmp_path / "gone.safetensors")
    with pytest.raises(UnknownNameError, match="did you mean 'digits_classifier'"):
        load_classifier("digit_classifier")
    with pytest.raises(PredictError, match="is a detector"):
        load_classifier("digits_detector")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged"):
        load_classifier(damaged)
    with pytest.raises(DataError, match="cannot read image"):
        load_classifier(path).predict([tmp_path / "gone.png"])
    with pytest.raises(CheckpointError, match="3 classes, but 1 names"):
        Classifier(create_model(NetSpec.from_dict(TINY)), Preprocess.model_validate(PREPROCESS), ["a"], "x")


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    for name in ("gpu", "cuda:99"):
        with pytest.raises(PredictError, match=f"device '{name}' cannot be used"):
            choose_device(name)


def test_metadata_of_others_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, str(tmp_path / "other.safetensors"), metadata={"note": "no JSON"})
    with pytest.raises(CheckpointError, match="not written by this package"):
        read_meta(tmp_path / "other.safetensors")
    assert load_state(tmp_path / "other.safetensors")


def test_without_mmengine(tmp_path: Path) -> None:
    write_samples(tmp_path, digits=3, scenes=0)
    code = (
        "import sys\nfor name in ('mmengine', 'mmcv', 'mmdet', 'sklearn', 'cv2'): sys.modules[name] = None\n"
        "import runpy\n"
        f"sys.argv = ['predict.py', {str(tmp_path)!r}, '--model', MODEL, '--top', '1']\n"
        f"runpy.run_path({str(ROOT / 'tools' / 'predict.py')!r}, run_name='__main__')\n"
    )
    run = [sys.executable, "-c"]
    done = subprocess.run([*run, code.replace("MODEL", "'digits_classifier'")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == 3 and all(Path(path).parent.name == name for path, _, name in lines)
    done = subprocess.run([*run, code.replace("MODEL", "'digits_detector'")], capture_output=True, text=True)
    assert done.returncode == 2 and "needs mmengine, which is not installed: pip install" in done.stderr
