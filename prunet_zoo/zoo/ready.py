"""Converted weights in the weights folder: whether a file is whole, and of the architecture that its name says."""

from __future__ import annotations

import json
from pathlib import Path

from prunet_zoo.errors import CheckpointError, SpecError
from prunet_zoo.metadata import read_metadata
from prunet_zoo.spec import NetSpec, load_spec
from prunet_zoo.zoo.home import shared_folder, weights_home
from prunet_zoo.zoo.index import ModelEntry


class ForeignWeightsError(CheckpointError):
    """A whole file, but not the one that its name says."""


def ready_path(entry: ModelEntry) -> Path:
    """Where the weights that can be loaded lie, or will lie."""
    if entry.bundled:
        return shared_folder("checkpoints") / entry.weights.file
    return weights_home() / f"{entry.name}.safetensors"


def archive_path(entry: ModelEntry) -> Path:
    """Where the file that is downloaded lies, if it is kept or was put there by hand."""
    return weights_home() / entry.weights.file


def check_ready(path: Path, entry: ModelEntry) -> None:
    """Check the header of a safetensors file, which also tells its length; without torch.

    Raises:
        ForeignWeightsError: it has no spec, or another than the listed one.
        CheckpointError: it is missing, damaged or truncated.
    """
    meta = read_metadata(path)
    if "spec" not in meta:
        raise ForeignWeightsError(f"{path} carries no spec, so it was not made by this package")
    try:
        spec = NetSpec.from_dict(json.loads(meta["spec"]))
    except (SpecError, ValueError) as error:
        raise ForeignWeightsError(f"{path} carries a spec that cannot be read: {error}") from None
    if entry.arch is None:
        return
    listed = load_spec(entry.arch)
    if spec.hash != listed.hash:
        raise ForeignWeightsError(
            f"{path} holds another architecture ({spec.name!r}, {spec.num_classes} classes, hash {spec.hash}) than "
            f"{entry.arch!r} ({listed.num_classes} classes, hash {listed.hash})"
        )
