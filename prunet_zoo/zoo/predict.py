"""Classify images with a network of the zoo, or with a published weights file; needs torch and timm alone.

>>> classifier = load_classifier("digits_classifier")
>>> classifier.predict(["scan.png"], top=2)
[[ScoredClass(label=3, name='3', score=0.99), ScoredClass(label=8, name='8', score=0.0)]]
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from prunet_zoo.errors import CheckpointError, DataError, PrunetError, SpecError
from prunet_zoo.metadata import read_metadata
from prunet_zoo.models import PruNetClassifier, create_model, load_weights, read_weights_spec
from prunet_zoo.models.pruned import is_pruned
from prunet_zoo.spec import NetSpec, load_spec, parse
from prunet_zoo.zoo.images import as_text, read_rgb
from prunet_zoo.zoo.index import IMAGENET, SCHEME, ModelEntry, Preprocess, find_model, is_zoo


class PredictError(PrunetError, ValueError):
    """A model cannot be predicted with as it was asked for, or a device is not there."""


class ScoredClass(NamedTuple):
    """One class of an image: index, name, and score (softmax) from 0 to 1."""

    label: int
    name: str
    score: float


class Classifier:
    """A network with its preprocessing and the names of its classes.

    Args:
        net: the network.
        preprocess: from an image to the network's input.
        classes: names by index; as many as the network has classes.
        name: what to call it in results.
        device: where to compute; None takes a GPU when there is one.

    Raises:
        CheckpointError: the number of names is another than that of classes.
        PredictError: there is no such device.
    """

    task = "classification"

    def __init__(
        self,
        net: PruNetClassifier,
        preprocess: Preprocess,
        classes: Sequence[str],
        name: str,
        device: str | None = None,
    ) -> None:
        if len(classes) != net.num_classes:
            raise CheckpointError(f"{name} has {net.num_classes} classes, but {len(classes)} names of classes")
        self.device = choose_device(device)
        self.net, self.preprocess = net.eval().to(self.device), preprocess
        self.classes, self.name = tuple(classes), name

    @cached_property
    def transform(self) -> Any:
        """timm's evaluation transform: PIL image → tensor (3, H, W)."""
        from timm.data import create_transform

        return create_transform(is_training=False, **self.preprocess.model_dump())

    def read(self, image: str | Path | Image.Image) -> torch.Tensor:
        """The network's input (3, H, W) of a file or an RGB image.

        Raises:
            DataError: the file is no image, or the image is so long and thin that its resized form would be huge.
        """
        rgb = image if isinstance(image, Image.Image) else read_rgb(image)
        where = f"the image of {rgb.width}×{rgb.height} px"
        where = where if isinstance(image, Image.Image) else f"{as_text(image)}, {rgb.width}×{rgb.height} px,"
        width, height = resized(rgb.size, self.preprocess)
        if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
            raise DataError(
                f"{where} would be resized to {width}×{height} px before its centre is cut out, more than "
                f"{Image.MAX_IMAGE_PIXELS} pixels; give the part that matters, cut to a usual shape"
            )
        try:
            return self.transform(rgb)
        except MemoryError:
            raise DataError(f"{where} does not fit into memory when resized to {width}×{height} px") from None

    def classify(self, inputs: Sequence[torch.Tensor], top: int = 5) -> list[list[ScoredClass]]:
        """The ``top`` classes of each input (3, H, W), best first."""
        with torch.inference_mode():
            scores = self.net(torch.stack(list(inputs)).to(self.device)).float().softmax(1).cpu()
        best = scores.topk(min(top, scores.shape[1]), dim=1)
        return [
            [ScoredClass(label, self.classes[label], score) for label, score in zip(labels, values, strict=True)]
            for labels, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def predict(self, images: Sequence[str | Path | Image.Image], top: int = 5) -> list[list[ScoredClass]]:
        """Classify files or RGB images as one batch; raises `DataError` for a file that is no image."""
        return self.classify([self.read(image) for image in images], top) if images else []


def resized(size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """Width and height in px to which timm's transform brings an image before it cuts out the centre."""
    side = math.floor(preprocess.input_size / preprocess.crop_pct)
    if preprocess.crop_mode == "squash":
        return side, side
    width, height = size
    short = max(1, min(size))
    return side * width // short, side * height // short


def load_classifier(model: str | Path, weights: str | Path | None = None, device: str | None = None) -> Classifier:
    """Load a classifier with all that it takes to classify an image.

    Args:
        model: a name of the zoo, with or without ``prunet://`` before it, or a ``.safetensors`` file that tells its
            preprocessing and classes: one that ``tools/publish.py`` or ``tools/convert.py`` has written.
        weights: another file for a named model, instead of its own weights, which are downloaded when they are missing.
            What a ``.safetensors`` tells of its classes and preprocessing comes before what the zoo tells of the name.
        device: where to compute; None takes a GPU when there is one.

    Raises:
        UnknownNameError, CheckpointError, PredictError: with what to do. `DownloadError` where weights cannot be had.
    """
    if str(model).endswith(".safetensors"):
        if weights is not None:
            raise PredictError(f"{model} holds weights itself; leave out --weights, or give a name or a config")
        return _from_file(Path(model), device)
    entry = find_model(str(model))
    if entry.task != "classification":
        raise PredictError(f"{entry.name} is a detector, not a classifier; use prunet_zoo.mm.predict.load_detector")
    path = get_weights(SCHEME + entry.name if weights is None else weights)
    known = told(path) if path.suffix == ".safetensors" and weights is not None else Told(None, None, None, entry.name)
    net = create_model(_spec_of(entry, known.spec, path))
    load_weights(net, path)
    preprocess, classes = known.preprocess or entry.preprocess, class_names(known.classes or entry.classes)
    if preprocess is None:  # the index refuses such an entry
        raise PredictError(f"the zoo's index has no preprocessing of {entry.name}")
    if known.classes is None and len(classes) != net.num_classes:
        raise PredictError(
            f"{path} has {net.num_classes} classes and does not tell their names, and {entry.name} has {len(classes)}; "
            f"give its config: --model CONFIG --weights {path}, or let tools/publish.py make a file that tells them"
        )
    return Classifier(net, preprocess, classes, entry.name, device)


def _spec_of(entry: ModelEntry, own: NetSpec | None, path: Path) -> NetSpec:
    """The architecture of a named model with the weights of ``path``, which tell that they are of ``own``.

    Raises:
        CheckpointError: the two differ in more than name, number of classes and the usual input size.
    """
    named = load_spec(entry.arch) if entry.arch is not None else read_weights_spec(get_weights(SCHEME + entry.name))
    if own is None:
        return named
    if own.replace(name=named.name, num_classes=named.num_classes, input_size=named.input_size) != named:
        raise CheckpointError(
            f"weights file {path} is of the network {own.name!r} ({own.params():,} parameters), which does not fit "
            f"{entry.name} ({named.params():,} parameters); give --model {path} alone, or the name it was made for"
        )
    return own


def _from_file(path: Path, device: str | None) -> Classifier:
    if read_meta(path).get("task", "classification") != "classification":
        raise PredictError(f"{path} is a detector, not a classifier; use prunet_zoo.mm.predict.load_detector")
    net, (_, classes, preprocess, name) = create_model(path), told(path)
    if classes is None or preprocess is None:
        lacks = "its preprocessing" if preprocess is None else "the names of its classes"
        raise PredictError(
            f"{path} does not tell {lacks}; give its config: --model CONFIG --weights {path}, or let tools/publish.py "
            "make a file that does"
        )
    return Classifier(net, preprocess, class_names(classes), name, device)


class Told(NamedTuple):
    """What a weights file tells of its network; None: it does not."""

    spec: NetSpec | None
    classes: str | tuple[str, ...] | None
    preprocess: Preprocess | None
    name: str


def told(path: str | Path) -> Told:
    """What a ``.safetensors`` file tells of its network.

    Raises:
        CheckpointError: missing, damaged, or what it tells is malformed.
    """
    meta = read_meta(path)
    spec, preprocess, classes = meta.get("spec"), meta.get("preprocess"), meta.get("classes")
    try:
        return Told(
            None if spec is None or is_pruned(spec) else parse(NetSpec, spec, "spec"),
            tuple(classes) if isinstance(classes, list) else classes,
            None if preprocess is None else parse(Preprocess, preprocess, "preprocess"),
            str(meta.get("name", Path(path).stem)),
        )
    except SpecError as error:
        raise CheckpointError(f"weights file {path}: {error}") from None


def get_weights(weights: str | Path) -> Path:
    """The path of a weights file that exists; ``prunet://NAME`` is downloaded when it is missing.

    Raises:
        CheckpointError: the file does not exist. UnknownNameError, DownloadError: of a name.
    """
    if is_zoo(weights):
        from prunet_zoo.zoo.download import download

        return download(find_model(weights).name)
    if not Path(weights).is_file():
        raise CheckpointError(f"weights file {weights} does not exist")
    return Path(weights)


def read_meta(path: str | Path) -> dict[str, Any]:
    """What a ``.safetensors`` file of ours tells of itself, besides its tensors: each value is JSON.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return {key: json.loads(value) for key, value in read_metadata(path).items() if key != "format"}
    except ValueError as error:
        if isinstance(error, PrunetError):
            raise
        raise CheckpointError(f"weights file {path} was not written by this package: {error}") from None


@cache
def _imagenet_classes() -> tuple[str, ...]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(i, detailed=False) for i in range(info.num_classes()))


def class_names(classes: str | Sequence[str]) -> tuple[str, ...]:
    """Names by index; ``'imagenet-1k'``, or ImageNet's 1,000 synsets (folder names), give timm's short descriptions."""
    if classes == IMAGENET:
        return _imagenet_classes()
    if isinstance(classes, str):
        raise PredictError(f"classes must be {IMAGENET!r} or a list of names, got {classes!r}")
    names = tuple(str(name) for name in classes)
    if len(names) == 1000 and all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in names):
        from timm.data import ImageNetInfo

        if list(names) == list(ImageNetInfo().label_names()):
            return _imagenet_classes()
    return names


def choose_device(device: str | None) -> torch.device:
    """The torch device of that name; None: a GPU when there is one. Raises `PredictError` when it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise PredictError(
            f"device {device!r} cannot be used: {reason}; give cpu, or cuda where there is a GPU"
        ) from None
    return chosen
