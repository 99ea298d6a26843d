"""Predict with mmdet detectors, and with classifiers that a config describes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS, MODELS, DefaultScope
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from prunet_zoo.data.digits import CLASSES as DIGITS
from prunet_zoo.data.imagefolder import find_test_folder, list_classes
from prunet_zoo.data.transforms import evaluation
from prunet_zoo.errors import CheckpointError, DataError, PrunetError
from prunet_zoo.mm.backbone import plain
from prunet_zoo.mm.classifier import load_pretrained
from prunet_zoo.mm.cli import ConfigError, load_config
from prunet_zoo.mm.network import is_detection, register_mmdet, set_arch
from prunet_zoo.mm.publish_config import parse_config
from prunet_zoo.mm.training import load_strictly
from prunet_zoo.models import create_model, read_weights_spec
from prunet_zoo.models.backbone import resolve_arch
from prunet_zoo.models.weights import load_torch
from prunet_zoo.spec import parse
from prunet_zoo.zoo.images import as_text, read_rgb
from prunet_zoo.zoo.index import IMAGENET, SCHEME, Preprocess, find_model
from prunet_zoo.zoo.predict import (
    Classifier,
    PredictError,
    choose_device,
    class_names,
    get_weights,
    read_meta,
    told,
)


class Box(NamedTuple):
    """One object: class index and name, score from 0 to 1, box as x1, y1, x2, y2 in px of the image."""

    label: int
    name: str
    score: float
    box: tuple[float, float, float, float]


class DetectorInput(NamedTuple):
    """An image as read, and what the config's test pipeline made of it."""

    image: Image.Image
    inputs: torch.Tensor
    data_sample: Any


class Detector:
    """An mmdet detector with its test pipeline and the names of its classes.

    Args:
        cfg: has ``model`` and a ``test_dataloader`` whose data set has a pipeline that begins with loading the image.
        weights: a file with every tensor of the model.
        classes: names by index.
        name: what to call it in results.
        device: where to compute; None takes a GPU when there is one.

    Raises:
        CheckpointError: the weights do not fit, or have other classes than there are names.
        ConfigError: there is no test pipeline. PredictError: there is no such device.
    """

    task = "detection"

    def __init__(
        self, cfg: Config, weights: str | Path, classes: Sequence[str], name: str, device: str | None = None
    ) -> None:
        from mmcv.transforms import Compose
        from mmdet.utils import get_test_pipeline_cfg, register_all_modules

        self.device = choose_device(device)
        self.classes, self.name = tuple(classes), name
        cfg = cfg.copy()
        set_arch(cfg, None)  # the neck's channels follow
        register_all_modules(init_default_scope=False)
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
            try:
                steps = [dict(step) for step in get_test_pipeline_cfg(cfg)]
            except (RuntimeError, AttributeError, KeyError):
                raise ConfigError(f"{name} has no test_dataloader whose data set has a pipeline") from None
            # images are read here, so that the turn that a camera noted counts and any kind of image will do
            steps[0] = {"type": "mmdet.LoadImageFromNDArray", "to_float32": steps[0].get("to_float32", False)}
            self.pipeline = Compose([step for step in steps if "LoadAnnotations" not in str(step["type"])])
            self.model = MODELS.build(cfg.model)
        count = _num_classes(self.model)
        if count is not None and count != len(self.classes):
            raise CheckpointError(f"{name} has {count} classes, but {len(self.classes)} names of classes")
        load_strictly(self.model, weights)
        self.model.eval().to(self.device)
        self._lock = threading.Lock()

    def read(self, image: str | Path | Image.Image) -> DetectorInput:
        """The input of a file or an RGB image.

        Raises:
            DataError: the file is no image, or the test pipeline cannot prepare it (1×3000 px may become 0 px wide).
        """
        rgb = image if isinstance(image, Image.Image) else read_rgb(image)
        try:
            bgr: NDArray[np.uint8] = np.ascontiguousarray(np.asarray(rgb)[:, :, ::-1])
            with self._lock:  # a pipeline's steps may hold state
                packed = self.pipeline({"img": bgr, "img_id": 0})
            return DetectorInput(rgb, packed["inputs"], packed["data_samples"])
        except Exception as error:  # a pipeline is any code, and says in its own way what it cannot do
            which = "the image" if isinstance(image, Image.Image) else f"image {as_text(image)}"
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(
                f"cannot prepare {which} of {rgb.width}×{rgb.height} px as the test pipeline of {self.name} wants: "
                f"{reason}"
            ) from error

    def detect(self, inputs: Sequence[DetectorInput], score_thr: float = 0.3) -> list[list[Box]]:
        """The objects of each image whose score is at least ``score_thr``, best first.

        Images of another shape go through the network by themselves: padded to one size, as mmdet would, what is found
        in an image would depend on those beside it.
        """
        found: dict[int, list[Box]] = {}
        for shape in dict.fromkeys(item.inputs.shape for item in inputs):
            alike = [number for number, item in enumerate(inputs) if item.inputs.shape == shape]
            batch = {
                "inputs": [inputs[number].inputs for number in alike],
                "data_samples": [inputs[number].data_sample for number in alike],
            }
            with torch.inference_mode():
                results = self.model.test_step(batch)
            boxes = (self._boxes(result.pred_instances.cpu(), score_thr) for result in results)
            found.update(zip(alike, boxes, strict=True))
        return [found[number] for number in range(len(inputs))]

    def predict(self, images: Sequence[str | Path | Image.Image], score_thr: float = 0.3) -> list[list[Box]]:
        """Detect on files or RGB images as one batch; raises `DataError` for a file that is no image."""
        return self.detect([self.read(image) for image in images], score_thr) if images else []

    def _boxes(self, found: Any, score_thr: float) -> list[Box]:
        rows = zip(found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist(), strict=True)
        boxes = [Box(label, self.classes[label], score, tuple(box)) for label, score, box in rows if score >= score_thr]
        return sorted(boxes, key=lambda box: -box.score)


def load_detector(model: str | Path, weights: str | Path | None = None, device: str | None = None) -> Detector:
    """Load a detector of the zoo, or one that ``tools/publish.py`` has written.

    Args:
        model: a name of the zoo, or a ``.safetensors`` file with the config in it.
        weights: another such file for a named model.
        device: where to compute; None takes a GPU when there is one.

    Raises:
        UnknownNameError, CheckpointError, PredictError: with what to do. `DownloadError` where weights cannot be had.
    """
    name = Path(model).stem
    if not str(model).endswith(".safetensors"):
        entry = find_model(str(model))
        if entry.task != "detection":
            raise PredictError(f"{entry.name} is a classifier, not a detector; use load_classifier")
        name, source = entry.name, SCHEME + entry.name if weights is None else str(weights)
    elif weights is not None:
        raise PredictError(f"{model} holds weights itself; leave out --weights, or give a name or a config")
    else:
        source = str(model)
    path = get_weights(source)
    meta = read_meta(path)
    if meta.get("task") != "detection" or not {"config_text", "classes"} <= set(meta):
        raise PredictError(
            f"{path} is not a published detector; give its config: --model CONFIG --weights FILE, or let "
            "tools/publish.py make one"
        )
    try:
        cfg = parse_config(meta["config_text"])
    except CheckpointError as error:
        raise CheckpointError(f"weights file {path}: {error}") from None
    return Detector(cfg, path, class_names(meta["classes"]), name, device)


def load_config_model(
    config: str | Path | Config, weights: str | Path | None, device: str | None = None
) -> Classifier | Detector:
    """Load the classifier or detector that a config describes.

    Args:
        config: of a classifier or a detector.
        weights: a run's ``.pth``, a ``.safetensors`` file, or ``prunet://NAME``; needed.
        device: where to compute; None takes a GPU when there is one.

    Raises:
        ConfigError, CheckpointError, PredictError: with what to do.
    """
    cfg = load_config(config) if isinstance(config, str | Path) else config
    where = str(cfg.filename or "the config")
    if weights is None:
        raise PredictError(f"{where} has no weights of its own; give --weights FILE (.pth or .safetensors) as well")
    if "model" not in cfg:
        raise ConfigError(f"{where} has no model")
    path = get_weights(weights)
    meta = checkpoint_meta(path)
    if is_detection(cfg):
        if "spec" in meta and "arch" in cfg.model.backbone:
            cfg.model.backbone.arch = read_weights_spec(path).to_dict()
        return Detector(cfg, path, detector_classes(cfg, meta), Path(where).stem, device)
    if not str(cfg.model.get("type")).endswith("PruNetClassifier"):
        raise ConfigError(f"{where} has a model of type {cfg.model.get('type')!r}, neither a detector nor a PruNet")
    spec = resolve_arch(path if path.suffix == ".safetensors" else plain(cfg.model.arch))
    if path.suffix != ".safetensors" and cfg.model.get("num_classes") is not None:
        spec = spec.replace(num_classes=cfg.model.num_classes)
    net = create_model(spec)
    load_pretrained(net, path, strict_head=True)
    own = told(path).preprocess if path.suffix == ".safetensors" else None  # comes first, as in tools/test.py
    classes = classifier_classes(cfg, meta, net.num_classes)
    return Classifier(net, own or preprocess_of(cfg), classes, Path(where).stem, device)


def preprocess_of(cfg: Config) -> Preprocess:
    """What the transform of a classifier's test data does, as data.

    Raises:
        ConfigError: the config has no test data, or without a transform.
        UnknownNameError, DataError, SpecError: the transform is none of ours, or does what cannot be told.
    """
    transform = _test_dataset(cfg).get("transform")
    if not isinstance(transform, Mapping) or "type" not in transform:
        raise ConfigError(f"{cfg.filename or 'the config'} has no transform in test_dataloader.dataset")
    return parse(Preprocess, evaluation(transform), "preprocess")


def classifier_meta(cfg: Config, dataset: Any) -> dict[str, Any]:
    """Classes and preprocessing of a classifier for its weights file, as far as its data tell them.

    Args:
        cfg: the config of its training.
        dataset: what it is trained on.
    """
    meta: dict[str, Any] = {}
    classes = (getattr(dataset, "metainfo", None) or {}).get("classes")
    if classes:
        meta["classes"] = list(classes)
    try:
        meta["preprocess"] = preprocess_of(cfg).model_dump(mode="json")
    except PrunetError as error:  # it trains all the same; only the weights file tells less
        print_log(f"the weights file does not tell how images are prepared: {error}", "current", logging.WARNING)
    return meta


def checkpoint_meta(path: str | Path) -> dict[str, Any]:
    """What a file tells of itself: the metadata of a ``.safetensors``, ``meta.dataset_meta`` of a run's ``.pth``.

    Raises:
        CheckpointError: damaged, or a pickle with code.
    """
    if str(path).endswith(".safetensors"):
        return read_meta(path)
    data = load_torch(path)
    meta = data.get("meta") if isinstance(data, Mapping) else None
    found = meta.get("dataset_meta") if isinstance(meta, Mapping) else None
    return {str(key).lower(): value for key, value in found.items()} if isinstance(found, Mapping) else {}


def _test_dataset(cfg: Config) -> Mapping[str, Any]:
    for part in ("test_dataloader", "val_dataloader"):
        dataset = (cfg.get(part) or {}).get("dataset")
        if isinstance(dataset, Mapping):
            while "dataset" in dataset:
                dataset = dataset["dataset"]
            return dataset
    raise ConfigError(f"{cfg.filename or 'the config'} has no test_dataloader, so how images are prepared is not known")


def classifier_classes(cfg: Config, meta: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """Names from the weights file, else from the config's data, else ImageNet's for 1,000 classes."""
    if meta.get("classes"):
        return class_names(meta["classes"])
    dataset = _test_dataset(cfg)
    kind, root = str(dataset.get("type")).rpartition(".")[2], Path(str(dataset.get("data_root", "")))
    if kind == "DigitsDataset":
        return DIGITS
    if count == 1000:
        return class_names(IMAGENET)
    if kind == "ImageFolderDataset" and root.is_dir():
        named = root / "train"  # as the data set does
        return class_names(
            list_classes(named if named.is_dir() else find_test_folder(root, dataset.get("split", "val")))
        )
    raise PredictError(
        f"the names of the {count} classes are not known: the weights do not tell them, and the data of "
        f"{cfg.filename or 'the config'} is not at {root}; let tools/publish.py make a file that tells them"
    )


def detector_classes(cfg: Config, meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Names from the weights file, else from the config's data set, else those that the data set's class has."""
    dataset = _test_dataset(cfg)
    for known in (meta, dataset.get("metainfo") or {}, cfg.get("metainfo") or {}):
        classes = {str(key).lower(): value for key, value in known.items()}.get("classes")
        if classes:
            return (classes,) if isinstance(classes, str) and classes != IMAGENET else class_names(classes)
    register_mmdet()
    with DATASETS.switch_scope_and_registry(cfg.get("default_scope") or "mmdet") as registry:
        cls = registry.get(str(dataset.get("type")))
    classes = getattr(cls, "METAINFO", {}).get("classes")
    if classes:
        return tuple(classes)
    raise PredictError(f"{cfg.filename or 'the config'} does not name its classes; add metainfo=dict(classes=(…))")


def _num_classes(model: nn.Module) -> int | None:
    """Classes of a detector's head; None where it does not tell."""
    for holder in (model, getattr(model, "roi_head", None)):
        head = getattr(holder, "bbox_head", None)
        head = head[-1] if isinstance(head, nn.ModuleList) else head
        count = getattr(head, "num_classes", None)
        if isinstance(count, int):
            return count
    return None
