"""From a PIL image to a normalised tensor: timm's for ImageNet, and others for the small images of CIFAR and digits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms as T

from prunet_zoo.errors import DataError, unknown_name

Transform = Callable[[Image.Image], torch.Tensor]
Triple = tuple[float, float, float]

CIFAR10_MEAN: Triple = (0.4914, 0.4822, 0.4465)
CIFAR10_STD: Triple = (0.2470, 0.2435, 0.2616)


def imagenet(
    train: bool,
    size: int = 224,
    crop_pct: float = 0.875,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
    auto_augment: str | None = "rand-m9-mstd0.5",
    re_prob: float = 0.2,
    mean: Triple = IMAGENET_DEFAULT_MEAN,
    std: Triple = IMAGENET_DEFAULT_STD,
) -> Transform:
    """timm's transforms. Training: random resized crop, flip, RandAugment (arXiv 1909.13719), random erasing by pixels.

    Evaluation: resize the short side to ``size / crop_pct`` px (both sides with the crop mode 'squash'), centre crop of
    ``size`` px.
    """
    if not train:
        options: dict[str, Any] = {"crop_pct": crop_pct, "crop_mode": crop_mode}
    else:
        options = {"auto_augment": auto_augment, "re_prob": re_prob, "re_mode": "pixel"}
    return create_transform(size, is_training=train, interpolation=interpolation, mean=mean, std=std, **options)


def cifar(
    train: bool, size: int = 32, pad: int = 4, mean: Triple = CIFAR10_MEAN, std: Triple = CIFAR10_STD
) -> Transform:
    """Training: random crop of ``size`` px after padding by ``pad`` px, random flip. Other sizes are resized first."""
    steps: list[Any] = [_ToSize(size)]
    if train:
        steps += [T.RandomCrop(size, padding=pad), T.RandomHorizontalFlip()]
    return T.Compose([*steps, T.ToTensor(), T.Normalize(mean, std)])


def digits(
    train: bool,
    size: int = 32,
    degrees: float = 12.0,
    translate: float = 0.08,
    scale: float = 0.12,
    shear: float = 8.0,
    mean: Triple = (0.5, 0.5, 0.5),
    std: Triple = (0.25, 0.25, 0.25),
) -> Transform:
    """Training: a small affine map and no flip, since a mirrored digit is another sign.

    The defaults of mean and std are those of the digit scenes' detector, so that the backbone meets there the range of
    values it was trained on.
    ``degrees`` and ``shear`` are in degrees, ``translate`` and ``scale`` are shares of the side.
    """
    steps: list[Any] = [_ToSize(size)]
    if train:
        affine = T.RandomAffine(
            degrees, (translate, translate), (1 - scale, 1 + scale), shear, interpolation=T.InterpolationMode.BILINEAR
        )
        steps.append(affine)
    return T.Compose([*steps, T.ToTensor(), T.Normalize(mean, std)])


class _ToSize:
    """Bicubic resize to a square, only where it is needed."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        same = image.size == (self.size, self.size)
        return image if same else image.resize((self.size, self.size), Image.Resampling.BICUBIC)


PRESETS: dict[str, Callable[..., Transform]] = {"imagenet": imagenet, "cifar": cifar, "digits": digits}


def evaluation(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a transform does to an image in a test, in the terms of timm's ``create_transform``.

    Returns:
        ``input_size``, ``crop_pct``, ``crop_mode``, ``interpolation``, ``mean``, ``std``.

    Raises:
        UnknownNameError, DataError: as `make_transform`.
    """
    options = dict(config)
    preset = PRESETS[_preset(options)]
    try:
        bound = inspect.signature(preset).bind(False, **options)
    except TypeError as error:
        raise DataError(f"transform {config.get('type')!r}: {error}") from None
    bound.apply_defaults()
    given = bound.arguments
    return {
        "input_size": given["size"],
        "crop_pct": given.get("crop_pct", 1.0),
        "crop_mode": given.get("crop_mode", "squash"),  # those for small images resize to a square
        "interpolation": given.get("interpolation", "bicubic"),
        "mean": tuple(given["mean"]),
        "std": tuple(given["std"]),
    }


def _preset(options: dict[str, Any]) -> str:
    """Take ``type`` out of a transform's config."""
    name = str(options.pop("type", ""))
    if name not in PRESETS:
        raise unknown_name("transform", name, PRESETS)
    return name


def make_transform(config: Mapping[str, Any], train: bool) -> Transform:
    """Build a transform from a config such as ``dict(type='imagenet', size=224)``.

    Args:
        config: ``type`` is a name of `PRESETS`; the rest are that function's arguments.
        train: with random augmentation.

    Raises:
        UnknownNameError, DataError: unknown type or argument.
    """
    options = dict(config)
    name = _preset(options)
    try:
        return PRESETS[name](train, **options)
    except TypeError as error:
        raise DataError(f"transform {name!r}: {error}") from None
