"""The one train/test split of scikit-learn's digits: 1,797 scans of 8×8 px, grey 0 to 16, classes 0 to 9.

The classification data and the digit scenes both take their scans from here, so a detector whose backbone was trained
as a classifier never meets in its validation scenes a scan that the backbone has seen.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from prunet_zoo.errors import DataError


@cache
def load_scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return scikit-learn's digits as read-only arrays: scans (1797, 8, 8) from 0 to 16, labels (1797,) from 0 to 9.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the built-in digits need scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    scans, labels = digits.images.astype(np.uint8), digits.target.astype(np.int64)
    for array in (scans, labels):
        array.setflags(write=False)
    return scans, labels


def split_indices(fraction_test: float = 0.2, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the scans into train and test, each class by the same share.

    Args:
        fraction_test: share of every class that goes to test, rounded, at least one scan and not all.
        seed: another seed gives another split; the same one always gives the same, on every machine.

    Returns:
        Sorted, disjoint index arrays ``(train, test)`` that together hold every scan.

    Raises:
        DataError: ``fraction_test`` is not between 0 and 1.
    """
    if not 0.0 < fraction_test < 1.0:
        raise DataError(f"fraction_test must lie between 0 and 1 (both excluded), got {fraction_test}")
    _, labels = load_scans()
    # RandomState's stream is frozen by numpy (NEP 19), Generator's is not: the split must survive numpy's releases
    rng = np.random.RandomState(seed)
    train, test = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(fraction_test * len(members))), len(members) - 1)
        test.append(members[:count])
        train.append(members[count:])
    return np.sort(np.concatenate(train)).astype(np.int64), np.sort(np.concatenate(test)).astype(np.int64)
