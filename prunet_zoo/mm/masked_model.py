"""MaskedClassifier: a trained network whose channels can be taken out, as an MMEngine model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prunet_zoo.errors import SpecError
from prunet_zoo.mm.backbone import plain, plain_value, read_state
from prunet_zoo.mm.classifier import load_pretrained
from prunet_zoo.mm.scheme import local_file
from prunet_zoo.mm.search_model import SearchModel
from prunet_zoo.models import create_model, read_weights_spec
from prunet_zoo.models.pruned import PrunedSpec, is_pruned, is_pruned_file, load_pruned_spec
from prunet_zoo.registry import MODELS, register
from prunet_zoo.space import Encoding, SearchSpace, load_space
from prunet_zoo.spec import NetSpec, load_spec
from prunet_zoo.supernet.masked import MaskedNet


@register(MODELS)
class MaskedClassifier(SearchModel):
    """Masked network with a cross-entropy loss: for `PruningAsSearch` and `Archtree`.

    One of ``space``, ``arch`` and ``timm`` says what is pruned.

    Args:
        space: listed name, JSON path, dict or `SearchSpace`: its widths are what may be kept.
        arch: listed name, spec, path of a spec or of weights (``.safetensors``), or ``prunet://NAME``: the space is
            this network with any narrower width, see `space_around`. The last two bring their weights.
        timm: name of a network of timm; its channels are grouped by torch-pruning (`TracedNet`).
        start: the network of ``space`` that is pruned: spec, listed name, path or encoding; None: its largest.
        weights: trained weights of the start network: a file, or ``prunet://NAME``; strict, but a head for another
            number of classes starts fresh.
        pretrained: start from timm's own weights (they are downloaded).
        num_classes: classes of the data; None takes the network's.
        step: grid of the widths that may be kept, for ``arch`` and ``timm``.
        input_size: side of the images in px, for ``timm``.
        in_channels: channels of the images, for ``timm``; None: 3.
        options: further arguments of `timm.create_model`, for ``timm``: numbers, texts, lists of them.
        label_smoothing, data_preprocessor: see `SearchModel`.

    Raises:
        SpecError: none or several of ``space``, ``arch`` and ``timm``, an option that does not go with them, or a
            network that was cut already.
        CheckpointError: weights that do not fit.
    """

    def __init__(
        self,
        space: str | Path | dict[str, Any] | SearchSpace | None = None,
        arch: str | Path | dict[str, Any] | NetSpec | None = None,
        timm: str | None = None,
        start: Any = None,
        weights: str | Path | None = None,
        pretrained: bool = False,
        num_classes: int | None = None,
        step: int = 8,
        input_size: int | None = None,
        in_channels: int | None = None,
        options: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
        data_preprocessor: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(label_smoothing, data_preprocessor)
        given = {"space": space, "arch": arch, "timm": timm}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise SpecError(f"MaskedClassifier takes one of space, arch and timm, got {' and '.join(named) or 'none'}")
        if start is not None and space is None:
            raise SpecError(f"MaskedClassifier: start is a network of space; with {named[0]} leave it out")
        if timm is None and (pretrained or options or input_size is not None or in_channels is not None):
            raise SpecError(
                "MaskedClassifier: pretrained, input_size, in_channels and options go with timm; give trained weights "
                "as weights"
            )
        if pretrained and weights is not None:
            raise SpecError("MaskedClassifier: weights and pretrained exclude each other; give one")
        for name, value in (("arch", arch), ("start", start), ("weights", weights)):
            _refuse_cut(name, value)
        from prunet_zoo.supernet.masked_spec import SpecNet

        self.masked: MaskedNet
        if timm is not None:
            if input_size is None or num_classes is None:
                raise SpecError("MaskedClassifier: timm needs input_size (px) and num_classes")
            from prunet_zoo.supernet.traced import TracedNet  # needs torch-pruning

            state = None if weights is None else read_state(local_file(weights))
            self.masked = TracedNet(
                timm, input_size, num_classes, in_channels or 3, step, state, pretrained, plain_value(options or {})
            )
        else:
            if arch is not None:
                own = plain(arch)
                if weights is None and isinstance(own, str | Path) and str(own).endswith(".safetensors"):
                    weights = own
                found, first = _around(own, num_classes, step)
            else:
                found, first = _of_space(space, start, num_classes)
            self.masked = SpecNet(found, first, None if weights is None else _start_state(found, first, weights))
        self.trained = pretrained or weights is not None

    @property
    def searched(self) -> MaskedNet:
        """The masked network."""
        return self.masked


def _refuse_cut(name: str, value: Any) -> None:
    """Raise `SpecError` where ``value`` is a network of timm with channels taken out, or its weights."""
    own = plain_value(value)
    is_file = isinstance(own, str | Path) and Path(own).suffix in (".json", ".safetensors")
    if (is_file and is_pruned_file(own)) or is_pruned(own) or isinstance(own, PrunedSpec):
        spec = load_pruned_spec(own)
        if spec.shapes:
            raise SpecError(
                f"model.{name} is of a cut network ({spec.timm or spec.name} with channels taken out), which cannot be "
                "pruned again; start from the whole one, or train the cut one on: tools/train.py CONFIG --arch SPEC "
                "--weights FILE"
            )


def _around(arch: Any, num_classes: int | None, step: int) -> tuple[SearchSpace, Encoding]:
    from prunet_zoo.space import space_around

    spec = read_weights_spec(arch) if str(arch).endswith(".safetensors") else load_spec(arch)
    space = space_around(spec if num_classes is None else spec.replace(num_classes=num_classes), step)
    return space, space.largest()


def _of_space(space: Any, start: Any, num_classes: int | None) -> tuple[SearchSpace, Encoding]:
    found = load_space(plain_value(space) if isinstance(space, Mapping) else space)
    if num_classes is not None:
        found = found.replace(num_classes=num_classes)
    if start is None:
        return found, found.largest()
    if isinstance(start, list | tuple):
        encoding: Encoding = tuple(None if c is None else (int(c[0]), int(c[1])) for c in start)
        found.decode(encoding)  # raises SpecError where the space does not have it
        return found, encoding
    return found, found.encode(load_spec(plain(start)))


def _start_state(space: SearchSpace, start: Encoding, weights: str | Path) -> dict[str, torch.Tensor]:
    """The start network's tensors: those of ``weights``, and a fresh head where it is for other classes."""
    net = create_model(space.decode(start))
    load_pretrained(net, local_file(weights))
    return net.state_dict()
