"""Deterministic, stratified parts of labelled data: small subsets, and the 80/20 split of an architecture search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prunet_zoo.errors import DataError

Part = Literal["weights", "arch"]


def select_part(
    labels: Sequence[int] | NDArray[np.int64],
    part: Part | None = None,
    arch_fraction: float = 0.2,
    seed: int = 0,
    max_per_class: int | None = None,
) -> NDArray[np.int64]:
    """Return the sorted indices of one part of a data set; the same arguments always give the same indices.

    Args:
        labels: class of every sample.
        part: ``'weights'`` and ``'arch'`` are disjoint and together everything; in a search the network's weights learn
            on the first and the architecture's logits on the second. None is everything.
        arch_fraction: share of every class that goes to ``'arch'``.
        seed: of the permutation within each class.
        max_per_class: keep at most so many samples of each class (before the parts are made).

    Raises:
        DataError: unknown part, a fraction outside (0, 1), or a class with too few samples to be in both parts.
    """
    if part not in (None, "weights", "arch"):
        raise DataError(f"part must be None, 'weights' or 'arch', got {part!r}")
    if not 0.0 < arch_fraction < 1.0:
        raise DataError(f"arch_fraction must lie between 0 and 1 (both excluded), got {arch_fraction}")
    if max_per_class is not None and max_per_class < 1:
        raise DataError(f"max_per_class must be at least 1, got {max_per_class}")
    labels = np.asarray(labels)
    # RandomState's stream is frozen by numpy (NEP 19): a search must find the same parts after an upgrade
    rng = np.random.RandomState(seed)
    chosen = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))[:max_per_class]
        if part is not None:
            if len(members) < 2:
                raise DataError(f"class {label} has {len(members)} image; a search needs at least 2 of each class")
            count = min(max(1, round(arch_fraction * len(members))), len(members) - 1)
            members = members[:count] if part == "arch" else members[count:]
        chosen.append(members)
    return np.sort(np.concatenate(chosen)).astype(np.int64) if chosen else np.zeros(0, np.int64)
