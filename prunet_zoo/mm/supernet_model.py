"""SuperNetClassifier: the super-network as an MMEngine model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunet_zoo.mm.search_model import SearchModel
from prunet_zoo.registry import MODELS, register
from prunet_zoo.space import SearchSpace, load_space
from prunet_zoo.supernet import SuperNet


@register(MODELS)
class SuperNetClassifier(SearchModel):
    """Super-network of a search space with a cross-entropy loss: for `TieredPruning` and `DDPNAS`.

    Args:
        space: listed name, JSON path, dict or `SearchSpace`.
        num_classes: classes of the data; None takes the space's.
        label_smoothing, data_preprocessor: see `SearchModel`.
    """

    def __init__(
        self,
        space: str | Path | dict[str, Any] | SearchSpace,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        data_preprocessor: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(label_smoothing, data_preprocessor)
        resolved = load_space(space)
        if num_classes is not None:
            resolved = resolved.replace(num_classes=num_classes)
        self.supernet = SuperNet(resolved)

    @property
    def searched(self) -> SuperNet:
        """The super-network."""
        return self.supernet
