"""Detectors to predict with: the committed demo, batches, hostile files, configs; classifiers' configs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from PIL import Image
from safetensors import safe_open

from prunet_zoo.data.samples import write_samples
from prunet_zoo.data.scenes import SceneParams, make_scene
from prunet_zoo.data.transforms import make_transform
from prunet_zoo.errors import CheckpointError, DataError, PrunetError, SpecError
from prunet_zoo.mm.cli import ConfigError, load_config
from prunet_zoo.mm.predict import Detector, classifier_meta, load_config_model, load_detector, preprocess_of
from prunet_zoo.mm.publish_config import parse_config, write_config
from prunet_zoo.models import load_state, read_weights_spec, save_weights
from prunet_zoo.zoo.home import shared_folder
from prunet_zoo.zoo.index import find_model
from prunet_zoo.zoo.predict import Classifier, PredictError, load_classifier, read_meta

ROOT = Path(__file__).resolve().parents[2]
DEMO = shared_folder("checkpoints") / "digits_detector.safetensors"
CONFIG = ROOT / "configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py"
DIGITS = ROOT / "configs/classification/prunet-cpu-small_digits.py"
CLASSIFIER = shared_folder("checkpoints") / "digits_classifier.safetensors"


@pytest.fixture(scope="module")
def detector() -> Detector:
    return load_detector("prunet://digits_detector", device="cpu")


def scene_images(count: int, size: int = 128) -> list[Image.Image]:
    return [Image.fromarray(make_scene("val", i, SceneParams(size=size)).image) for i in range(count)]


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def test_the_demo_is_small_and_tells_what_the_index_tells() -> None:
    assert DEMO.stat().st_size < 3_000_000
    meta, entry = read_meta(DEMO), find_model("digits_detector")
    assert (meta["name"], meta["task"], tuple(meta["classes"])) == (entry.name, entry.task, entry.classes)
    assert meta["config"] == f"configs/{entry.config}" and (ROOT / meta["config"]).is_file()
    assert [word.split()[1] for word in meta["command"]] == ["tools/train.py", "tools/train.py", "tools/publish.py"]
    assert all(word not in json.dumps(meta) for word in ("/home", "/root", "/tmp", "/work/"))
    assert meta["metrics"]["coco/bbox_mAP"] > 0.8 and meta["images"] == 400


def test_the_demo_finds_the_digits(detector: Detector) -> None:
    count = 24
    found = detector.predict(scene_images(count), score_thr=0.3)
    wanted = hit = false = 0
    for number, boxes in enumerate(found):
        scene = make_scene("val", number, SceneParams())
        truth = [(x, y, x + w, y + h) for x, y, w, h in scene.boxes.tolist()]
        labels = scene.labels.tolist()
        wanted += len(truth)
        hit += sum(
            any(box.label == label and overlap(box.box, real) >= 0.5 for box in boxes)
            for real, label in zip(truth, labels, strict=True)
        )
        false += sum(all(overlap(box.box, real) < 0.5 for real in truth) for box in boxes)
        assert [box.score for box in boxes] == sorted((box.score for box in boxes), reverse=True)
        assert all(box.name == str(box.label) and box.score >= 0.3 for box in boxes)
    assert hit >= 0.95 * wanted and false <= 0.05 * wanted


@pytest.mark.slow
def test_the_demo_has_the_map_that_it_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prunet_zoo.mm.testing import prepare_test
    from prunet_zoo.mm.training import test

    monkeypatch.chdir(tmp_path)
    cfg = load_config(CONFIG)
    cfg.work_dir = str(tmp_path / "run")
    prepare_test(cfg, str(DEMO))
    metrics = test(cfg, DEMO)["metrics"]
    for name, value in read_meta(DEMO)["metrics"].items():
        assert metrics[name] == pytest.approx(value, abs=0.003), name


def test_boxes_are_mmdet_s_own(detector: Detector, tmp_path: Path) -> None:
    from mmdet.apis import inference_detector, init_detector

    path = write_samples(tmp_path, digits=0, scenes=1)[0]
    state = tmp_path / "demo.pth"
    torch.save({"state_dict": load_state(DEMO), "meta": {"dataset_meta": {"classes": tuple("0123456789")}}}, state)
    expected = inference_detector(init_detector(str(CONFIG), str(state), device="cpu"), str(path)).pred_instances
    (boxes,) = detector.predict([path], score_thr=0.0)
    assert len(boxes) == len(expected) > 0
    order = expected.scores.argsort(descending=True)
    assert np.allclose([box.box for box in boxes], expected.bboxes[order], atol=1e-3)
    assert np.allclose([box.score for box in boxes], expected.scores[order], atol=1e-5)


def test_a_batch_of_several_sizes_gives_what_single_images_give(detector: Detector) -> None:
    wide = Image.new("RGB", (256, 128), (90, 90, 90))
    wide.paste(scene_images(1)[0], (128, 0))
    images = [scene_images(1)[0], wide, scene_images(2)[1].resize((300, 300))]
    for image, together in zip(images, detector.predict(images), strict=True):
        (alone,) = detector.predict([image])
        assert [box.label for box in alone] == [box.label for box in together] and alone
        assert np.allclose([box.box for box in alone], [box.box for box in together], atol=1e-3)
    assert detector.predict([]) == []


def test_boxes_are_in_pixels_of_the_upright_image(detector: Detector, tmp_path: Path) -> None:
    image = scene_images(1)[0].resize((320, 320))
    exif = Image.Exif()
    exif[274] = 6  # stored turned by 90° anticlockwise
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    (upright,), (turned,) = detector.predict([image]), detector.predict([tmp_path / "turned.png"])
    assert len(upright) == len(turned) > 0
    assert np.allclose([box.box for box in upright], [box.box for box in turned], atol=1e-3)
    (small,) = detector.predict([scene_images(1)[0]])
    assert overlap(small[0].box, [v / 2.5 for v in upright[0].box]) > 0.8


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
def test_what_the_pipeline_cannot_prepare_is_named(detector: Detector, tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "thin.png")
    with pytest.raises(DataError, match=rf"cannot prepare image .*thin\.png of {size[0]}×{size[1]} px as .*: .*error"):
        detector.read(tmp_path / "thin.png")
    with pytest.raises(DataError, match=r"cannot prepare the image of") as caught:
        detector.read(Image.new("RGB", size))
    assert "\n" not in str(caught.value)
    assert detector.read(Image.new("RGB", (30, 30))).inputs.shape == (3, 128, 128)  # and the pipeline goes on


# ---- files that are not what they should be


def with_meta(path: Path, **changes: Any) -> Path:
    meta = {k: v for k, v in read_meta(DEMO).items() if k != "spec"}
    meta.update(changes)
    save_weights(path, load_state(DEMO), read_weights_spec(DEMO), **{k: v for k, v in meta.items() if v is not None})
    return path


def text_with(old: str, new: str) -> str:
    text = read_meta(DEMO)["config_text"]
    assert old in text
    return text.replace(old, new, 1)


CALL = "__import__(\\'pathlib\\').Path(\\'gotcha\\').touch()"
HOSTILE = [
    ("'type': 'RetinaNet'", "'type': 'os.system', 'command': 'touch gotcha'"),
    ("'type': 'RetinaNet'", "'type': 'subprocess.getoutput', 'cmd': 'touch gotcha'"),
    ("'type': 'RetinaNet'", "'type': ('os.system',)"),
    ("'type': 'nms'", f"'type': '{CALL}'"),
    ("'type': 'nms', 'iou_threshold': 0.5", f"'iou_threshold': 0.5, 'class': '{CALL}'"),
    ("'type': 'nms'", f"'{CALL}': 1, 'type': 'nms'"),
    ("'type': 'LoadImageFromFile'", "'type': 'pathlib.Path'"),
    ("'type': 'RetinaNet'", "'type': __import__('os').system('touch gotcha')"),
    ("{'default_scope'", "__import__('os').system('touch gotcha') or {'default_scope'"),
    ("'default_scope': 'mmdet'", "'default_scope': 'os'"),
]


@pytest.mark.parametrize(("old", "new"), HOSTILE)
def test_a_file_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = with_meta(tmp_path / "hostile.safetensors", config_text=text_with(old, new))
    with pytest.raises(CheckpointError, match=r"hostile\.safetensors: (its config has|it carries a damaged config)"):
        load_detector(path)
    assert not (tmp_path / "gotcha").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", "{'model': 1}", "(" * 100_000, "1" * 10_000, None, 5, ["a"]])
def test_damaged_config_texts(text: Any) -> None:
    with pytest.raises(CheckpointError, match="damaged config"):
        parse_config(text)


def test_a_config_survives_being_text() -> None:
    cfg = load_config(CONFIG)
    again = parse_config(write_config(cfg))
    pipeline = again.test_dataloader.dataset.pipeline
    assert pipeline[1]["scale"] == (128, 128) and isinstance(pipeline[1]["scale"], tuple)
    assert again.model.bbox_head.to_dict() == cfg.model.bbox_head.to_dict()
    assert "init_cfg" not in write_config(Config({**cfg.to_dict(), "model": {**cfg.model.to_dict(), "init_cfg": 1}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": None}, "not a published detector"),
        ({"task": "classification"}, "not a published detector"),
        ({"config_text": None}, "not a published detector"),
        ({"classes": ["a"]}, "10 classes, but 1 names"),
    ],
)
def test_files_that_do_not_tell_enough(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PrunetError, match=message):
        load_detector(with_meta(tmp_path / "w.safetensors", **changes))


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(PredictError, match="is a classifier"):
        load_detector("digits_classifier")
    with pytest.raises(PredictError, match="leave out --weights"):
        load_detector(DEMO, weights=DEMO)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_detector("digits_detector", weights=tmp_path / "gone.safetensors")
    with pytest.raises(PredictError, match="not a published detector"):
        load_detector("digits_detector", weights=CLASSIFIER)
    with pytest.raises(PredictError, match="cannot be used"):
        load_detector(DEMO, device="cuda:99")
    part = tmp_path / "part.safetensors"
    with safe_open(str(DEMO), framework="pt") as file:
        meta = {k: v for k, v in (file.metadata() or {}).items() if k not in ("format", "spec")}
    state = load_state(DEMO)
    state.pop("bbox_head.retina_cls.weight")
    save_weights(part, state, read_weights_spec(DEMO), **{k: json.loads(v) for k, v in meta.items()})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors \(bbox_head.retina_cls.weight"):
        load_detector(part)


# ---- configs


def test_a_detector_s_config_with_a_run_s_checkpoint(detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "epoch_1.pth"
    torch.save({"state_dict": load_state(DEMO), "optimizer": {"step": 1}}, path)
    for weights in (path, DEMO):
        loaded = load_config_model(CONFIG, weights, device="cpu")
        assert isinstance(loaded, Detector) and loaded.classes == tuple("0123456789")
        assert loaded.predict(scene_images(1)) == detector.predict(scene_images(1))
    torch.save({"state_dict": load_state(DEMO), "meta": {"dataset_meta": {"CLASSES": tuple("abcdefghij")}}}, path)
    assert load_config_model(CONFIG, path).classes == tuple("abcdefghij")
    with pytest.raises(CheckpointError, match="does not fit the config's model"):
        load_config_model(CONFIG, CLASSIFIER)


def test_coco_s_names_where_the_config_has_none(tmp_path: Path) -> None:
    cfg = load_config(CONFIG)
    for holder in (cfg.test_dataloader.dataset, cfg):
        holder.pop("metainfo")
    path = tmp_path / "x.pth"
    torch.save({"state_dict": load_state(DEMO)}, path)
    with pytest.raises(CheckpointError, match="10 classes, but 80 names"):  # CocoDataset's own
        load_config_model(cfg, path)


def test_a_classifier_s_config(tmp_path: Path) -> None:
    image = make_scene("val", 3, SceneParams()).image
    reference = load_classifier("digits_classifier").predict([Image.fromarray(image)])
    path = tmp_path / "epoch_1.pth"
    torch.save({"state_dict": {f"net.{k}": v for k, v in load_state(CLASSIFIER).items()}}, path)
    for weights in (path, CLASSIFIER, "prunet://digits_classifier"):
        loaded = load_config_model(DIGITS, weights, device="cpu")
        assert isinstance(loaded, Classifier)
        assert loaded.predict([Image.fromarray(image)]) == reference


def test_names_of_classes_come_from_the_run_or_the_folders(tmp_path: Path) -> None:
    cfg = load_config(DIGITS)
    state = {f"net.{k}": v for k, v in load_state(CLASSIFIER).items()}
    path = tmp_path / "x.pth"
    torch.save({"state_dict": state}, path)
    names = list("klmnopqrst")
    folder = {"type": "ImageFolderDataset", "data_root": str(tmp_path / "data"), "split": "val"}
    cfg.test_dataloader.dataset = {**folder, "transform": {"type": "digits"}}
    with pytest.raises(PredictError, match="names of the 10 classes are not known"):
        load_config_model(cfg, path)
    for name in names:
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
    assert load_config_model(cfg, path).classes == tuple(names)
    torch.save({"state_dict": state, "meta": {"dataset_meta": {"classes": tuple("0123456789")}}}, path)
    assert load_config_model(cfg, path).classes == tuple("0123456789")


def test_configs_that_cannot_be_predicted_with(tmp_path: Path) -> None:
    with pytest.raises(PredictError, match="give --weights FILE"):
        load_config_model(DIGITS, None)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_config_model(DIGITS, tmp_path / "gone.pth")
    with pytest.raises(ConfigError, match="does not exist"):
        load_config_model(tmp_path / "gone.py", CLASSIFIER)
    with pytest.raises(ConfigError, match="has no model"):
        load_config_model(Config({}), CLASSIFIER)
    with pytest.raises(ConfigError, match="neither a detector nor a PruNet"):
        load_config_model(Config({"model": {"type": "ResNet"}}), CLASSIFIER)
    bare = Config({"model": {"type": "PruNetClassifier", "arch": "prunet_p0"}})
    assert load_config_model(bare, CLASSIFIER).classes == tuple("0123456789")  # the file tells all that is needed
    save_weights(tmp_path / "plain.safetensors", load_state(CLASSIFIER), read_weights_spec(CLASSIFIER))
    with pytest.raises(ConfigError, match="no test_dataloader"):
        load_config_model(bare, tmp_path / "plain.safetensors")
    for content in (b"no checkpoint", b"", b"\x80\x02"):
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(
            CheckpointError, match=r"bad\.pth is (damaged or truncated|not a plain tensor checkpoint): \w"
        ):
            load_config_model(DIGITS, tmp_path / "bad.pth")


def test_a_files_own_preprocessing_comes_before_the_configs(tmp_path: Path) -> None:
    own = find_model("digits_classifier").preprocess
    assert own is not None
    own = own.model_copy(update={"input_size": 40})
    state, spec = load_state(CLASSIFIER), read_weights_spec(CLASSIFIER)
    save_weights(tmp_path / "told.safetensors", state, spec, preprocess=own.to_dict())
    save_weights(tmp_path / "plain.safetensors", state, spec)
    sizes = [load_config_model(DIGITS, tmp_path / f"{name}.safetensors") for name in ("told", "plain")]
    assert [model.preprocess.input_size for model in sizes if isinstance(model, Classifier)] == [40, 32]


TRANSFORMS = st.one_of(
    st.fixed_dictionaries(
        {
            "type": st.just("imagenet"),
            "size": st.sampled_from([32, 64, 96]),
            "crop_pct": st.sampled_from([0.875, 0.95, 1.0]),
            "interpolation": st.sampled_from(["bicubic", "bilinear"]),
        }
    ),
    st.fixed_dictionaries({"type": st.sampled_from(["cifar", "digits"]), "size": st.sampled_from([28, 32, 48])}),
)


@settings(deadline=None, max_examples=40)
@given(TRANSFORMS, st.integers(20, 150), st.integers(20, 150), st.integers(0, 99))
def test_preprocessing_is_that_of_the_evaluation(transform: dict[str, Any], width: int, height: int, seed: int) -> None:
    image = Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8))
    cfg = Config({"test_dataloader": {"dataset": {"transform": transform}}})
    from timm.data import create_transform

    ours = create_transform(is_training=False, **preprocess_of(cfg).model_dump())
    assert torch.equal(ours(image), make_transform(transform, train=False)(image))


def test_transforms_that_are_not_known() -> None:
    def of(transform: Any) -> Config:
        return Config({"test_dataloader": {"dataset": {"transform": transform}}})

    with pytest.raises(PrunetError, match="unknown transform 'mine'"):
        preprocess_of(of({"type": "mine"}))
    with pytest.raises(DataError, match="sice"):
        preprocess_of(of({"type": "digits", "sice": 3}))
    with pytest.raises(ConfigError, match="no transform"):
        preprocess_of(of(None))
    unusual = of({"type": "imagenet", "interpolation": "lanczos"})  # timm can, but the index has no name for it
    with pytest.raises(SpecError, match=r"preprocess.*interpolation.*lanczos"):
        preprocess_of(unusual)
    assert classifier_meta(unusual, None) == {}  # a run goes on, its weights file tells less
