from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from prunet_zoo.data.digits import DigitsData
from prunet_zoo.data.transforms import PRESETS, make_transform
from prunet_zoo.errors import DataError, UnknownNameError

PHOTO = Image.fromarray(np.random.RandomState(0).randint(0, 255, (300, 260, 3), np.uint8))


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("train", [True, False])
def test_shape_and_repeatability(name: str, train: bool) -> None:
    size = 64 if name == "imagenet" else 32
    transform = make_transform({"type": name, "size": size}, train)
    results = []
    for seed in (1, 1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        results.append(torch.stack([transform(PHOTO) for _ in range(4)]))
    assert results[0].shape == (4, 3, size, size) and results[0].dtype == torch.float32
    assert torch.equal(results[0], results[1])  # the same seed gives the same images
    assert torch.equal(results[0], results[2]) is not train  # only training is random


def test_imagenet_evaluation_crops_the_centre() -> None:
    image = Image.new("RGB", (256, 256), (255, 0, 0))
    image.paste((0, 255, 0), (16, 16, 240, 240))  # 224 of 256 px is what crop_pct 0.875 keeps
    out = make_transform({"type": "imagenet", "size": 224, "mean": (0, 0, 0), "std": (1, 1, 1)}, False)(image)
    assert out[1, 2:-2, 2:-2].min() > 0.99


def test_digits_are_never_mirrored() -> None:
    """The mean of many augmented sevens looks like the seven, not like its mirror image."""
    data = DigitsData("train")
    seven = data[data.labels.index(7)][0]
    torch.manual_seed(0)
    train = make_transform({"type": "digits"}, True)
    mean = torch.stack([train(seven) for _ in range(200)]).mean(0).flatten()
    plain = make_transform({"type": "digits"}, False)(seven)

    def similarity(other: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([mean, other.flatten()]))[0, 1])

    assert similarity(plain) > 0.9 > similarity(plain.flip(2))


def test_bad_configs() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'imagenet'"):
        make_transform({"type": "imagnet"}, True)
    with pytest.raises(DataError, match="sizes"):
        make_transform({"type": "cifar", "sizes": 32}, True)
