"""The zoo's index: for each published model its architecture, weights, preprocessing and classes (no torch).

An architecture, its weights and its results are three records: specs lie in ``archs/``, weights are described in
``zoo/index.json``, results in ``checkpoints/results.csv`` of the repository.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any, Literal, TypeGuard

from pydantic import Field, ValidationError, model_validator

from prunet_zoo.errors import describe_validation, unknown_name
from prunet_zoo.jsonfile import Frozen

IMAGENET = "imagenet-1k"
SCHEME = "prunet://"


class Preprocess(Frozen):
    """How an image becomes the network's input: resize the short side to ``input_size / crop_pct`` px, centre crop of
    ``input_size`` px, RGB scaled to 0…1, ``(x - mean) / std``. With the crop mode 'squash' both sides are
    resized, whatever the image's shape."""

    input_size: int = Field(ge=1, le=8192)
    crop_pct: float = Field(default=1.0, gt=0.0, le=1.0)
    crop_mode: Literal["center", "squash"] = "center"
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Weights(Frozen):
    """Where a model's weights come from.

    ``file`` is the name in the cache (and on a mirror). ``url`` is None for a file that comes with the repository.
    ``member`` is the checkpoint inside a zip. ``sha256`` is None where upstream publishes none.
    """

    file: str
    url: str | None = None
    member: str | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    licence: str
    origin: str


class Collection(Frozen):
    """A family of networks and its paper. ``code`` is where the authors published networks and weights."""

    name: str
    title: str
    arxiv: str = Field(pattern=r"^\d{4}\.\d{5}$")
    code: str

    @property
    def paper(self) -> str:
        """Address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}"


_CODE = "https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/Classification/GPUNet"
COLLECTIONS = {
    "PruNet": Collection(
        name="PruNet",
        title="Tiered Pruning for Efficient Differentiable Inference-Aware Neural Architecture Search",
        arxiv="2209.11785",
        code=_CODE,
    ),
    "GPUNet": Collection(
        name="GPUNet",
        title="GPUNet: Searching the Deployable Convolution Neural Networks for GPUs",
        arxiv="2205.00841",
        code=_CODE,
    ),
}


class ModelEntry(Frozen):
    """One model: ``arch`` is a listed spec, or None where the spec lies in the weights file. ``config`` is its config
    below ``configs/``. ``classes`` is ``'imagenet-1k'`` (names by timm) or the names by index. ``collection`` names one
    of `COLLECTIONS`."""

    name: str
    task: Literal["classification", "detection"] = "classification"
    collection: Literal["PruNet", "GPUNet"] = "PruNet"
    arch: str | None = None
    config: str
    classes: Literal["imagenet-1k"] | tuple[str, ...]
    preprocess: Preprocess | None = None
    weights: Weights

    @model_validator(mode="after")
    def _complete(self) -> ModelEntry:
        if self.task == "classification" and self.preprocess is None:
            raise ValueError("a classifier needs 'preprocess'")
        return self

    @property
    def bundled(self) -> bool:
        """Whether the weights come with the repository, so that nothing is downloaded."""
        return self.weights.url is None


@cache
def load_index() -> dict[str, ModelEntry]:
    """All models by name, in the order of the index."""
    data: list[dict[str, Any]] = json.loads((resources.files("prunet_zoo") / "zoo" / "index.json").read_text("utf-8"))
    try:
        entries = [ModelEntry.model_validate_json(json.dumps(entry), strict=True) for entry in data]
    except ValidationError as error:
        raise describe_validation(error, "zoo index") from None
    return {entry.name: entry for entry in entries}


def is_zoo(source: Any) -> TypeGuard[str]:
    """Whether ``source`` is the address of a model of the zoo, ``prunet://NAME``."""
    return isinstance(source, str) and source.startswith(SCHEME)


def find_model(name: str) -> ModelEntry:
    """The index entry of ``name``, with or without ``prunet://`` before it.

    Raises:
        UnknownNameError: no such model; the nearest are suggested.
    """
    index = load_index()
    bare = name.removeprefix(SCHEME)
    if bare not in index:
        raise unknown_name("zoo model", bare, index)
    return index[bare]
