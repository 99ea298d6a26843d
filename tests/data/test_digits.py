from __future__ import annotations

import numpy as np
import pytest

from prunet_zoo.data.digits import DigitsData, enlarged
from prunet_zoo.data.digits_split import load_scans, split_indices
from prunet_zoo.errors import DataError


def test_train_and_test_hold_all_scans_once() -> None:
    train, test = DigitsData("train"), DigitsData("test")
    assert sorted([*train.scans, *test.scans]) == list(range(1797))
    assert np.array_equal(test.scans, split_indices()[1])
    assert 350 <= len(test) <= 365
    assert np.array_equal(DigitsData("val").scans, test.scans)
    counts = np.bincount(test.labels)
    assert counts.min() >= 33 and counts.max() <= 38


def test_image_shows_its_scan() -> None:
    data = DigitsData("train", size=32)
    image, label = data[5]
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert label == load_scans()[1][data.scans[5]]
    small = np.asarray(image.convert("L").crop((2, 2, 30, 30)).resize((8, 8), 4), float) / 255 * 16
    assert np.corrcoef(small.ravel(), load_scans()[0][data.scans[5]].ravel())[0, 1] > 0.95


def test_parts_of_train() -> None:
    weights, arch = DigitsData(part="weights"), DigitsData(part="arch")
    assert not set(weights.scans) & set(arch.scans)
    assert sorted([*weights.scans, *arch.scans]) == sorted(DigitsData().scans)
    assert len(DigitsData(max_per_class=7)) == 70


def test_cached_images_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        enlarged(32)[0] = 0


@pytest.mark.parametrize("options", [{"split": "validation"}, {"size": 4}, {"part": "half"}])
def test_bad_arguments(options: dict) -> None:
    with pytest.raises(DataError):
        DigitsData(**options)
