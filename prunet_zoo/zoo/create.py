"""create_model with weights by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunet_zoo.errors import CheckpointError, SpecError
from prunet_zoo.spec import NetSpec
from prunet_zoo.zoo.index import find_model, is_zoo, load_index

if TYPE_CHECKING:
    from prunet_zoo.models import PruNetClassifier


def create_model(
    arch: str | Path | dict[str, Any] | NetSpec,
    num_classes: int | None = None,
    pretrained: bool = False,
    **options: Any,
) -> PruNetClassifier:
    """Build a classifier, with published weights if wanted.

    Args:
        arch: a listed name; ``prunet://NAME`` (with its weights); a spec, its dict or the path of its ``.json``; or a
            weights file (``.safetensors``, spec inside), which is loaded.
        num_classes: classes of the head; None takes the spec's. With weights for another number the head starts fresh.
        pretrained: load the weights of the zoo's model ``arch``; they are downloaded where they are not there yet.
        options: of `PruNetClassifier`: ``drop_rate``, ``drop_path_rate``, ``in_chans``, …

    Raises:
        UnknownNameError, SpecError: the architecture is not known or malformed, or an option is out of range.
        CheckpointError: there are no published classifier weights of ``arch``, or a file does not fit.
        DownloadError: the weights could not be brought; the message says how to bring them by hand.
    """
    from prunet_zoo import models

    if not isinstance(pretrained, bool):
        raise SpecError(
            f"pretrained is True or False, got {pretrained!r}; give a weights file (.safetensors) as arch, or use "
            "load_weights(model, file)"
        )
    name = arch if isinstance(arch, str) else None
    if is_zoo(arch):
        name, pretrained = find_model(arch).name, True
    source: str | Path | dict[str, Any] | NetSpec = arch
    if pretrained and not str(arch).endswith(".safetensors"):
        source = _weights_of(name, arch)
    elif name in load_index() and load_index()[name].arch is None:  # its spec lies in its weights
        source = models.read_weights_spec(_weights_of(name, arch))
    model = models.create_model(source, num_classes, **options)
    entry = load_index().get(name or "")
    if entry is not None and entry.preprocess is not None:  # for timm.data.resolve_model_data_config(model)
        side = entry.preprocess.input_size
        model.pretrained_cfg.update(entry.preprocess.model_dump(), input_size=(model.in_chans, side, side))
    return model


def _weights_of(name: str | None, arch: object) -> Path:
    """The weights file of a classifier of the zoo."""
    from prunet_zoo.zoo.download import download

    index = load_index()
    classifiers = [entry.name for entry in index.values() if entry.task == "classification"]
    if name not in index:
        given = repr(name) if name is not None else f"a {type(arch).__name__}"
        raise CheckpointError(
            f"pretrained=True takes the name of a published classifier, got {given}; there are weights for "
            f"{', '.join(classifiers)}"
        )
    if name not in classifiers:
        raise CheckpointError(
            f"{name!r} is a detector; create_model builds classifiers ({', '.join(classifiers)}). Use it by "
            f"python tools/predict.py IMAGE --model {name}"
        )
    return download(name)
