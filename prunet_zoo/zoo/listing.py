"""What is here of each model: converted, an archive, a part, or nothing (no torch)."""

from __future__ import annotations

from typing import Any

from prunet_zoo.errors import CheckpointError, PrunetError
from prunet_zoo.zoo.index import ModelEntry, load_index
from prunet_zoo.zoo.partial import Part
from prunet_zoo.zoo.ready import ForeignWeightsError, archive_path, check_ready, ready_path
from prunet_zoo.zoo.records import read_record


def list_weights() -> list[dict[str, Any]]:
    """One record a model, in the order of the index; see `describe_weights`."""
    return [describe_weights(entry) for entry in load_index().values()]


def describe_weights(entry: ModelEntry) -> dict[str, Any]:
    """Name, task, path and ``bytes`` of the weights; ``state``; the archive's sha256 and who says so; licence; address.

    ``state``: ``ready``, ``archive present`` (the next use converts it), ``partial`` (the next download goes on),
    ``not here``; ``damaged`` (made again at the next use) or ``another file`` (refused). For weights that come with the
    package ``bundled`` or ``missing``.
    """
    ready, archive = ready_path(entry), archive_path(entry)
    state, path = _state(entry)
    sha256, checksum = entry.weights.sha256, "listed" if entry.weights.sha256 else "none yet"
    if entry.bundled:
        checksum = "in git"
    elif sha256 is None:
        try:
            recorded = read_record(archive)
            sha256 = recorded.sha256 if recorded else None
        except PrunetError:
            checksum = "record damaged"
        else:
            checksum = "recorded" if sha256 else checksum
    return {
        "name": entry.name,
        "task": entry.task,
        "state": state,
        "path": str(ready),
        "bytes": path.stat().st_size if path is not None else 0,
        "archive": None if entry.bundled else entry.weights.file,
        "sha256": sha256,
        "checksum": checksum,
        "licence": entry.weights.licence,
        "url": entry.weights.url,
    }


def _state(entry: ModelEntry) -> tuple[str, Any]:
    """The state, and the file that it is about."""
    ready, archive = ready_path(entry), archive_path(entry)
    if ready.is_file():
        try:
            check_ready(ready, entry)
        except ForeignWeightsError:
            return "another file", ready
        except CheckpointError:
            return "damaged", ready
        return ("bundled" if entry.bundled else "ready"), ready
    if entry.bundled:
        return "missing", None
    if archive.is_file():
        return "archive present", archive
    part = Part(archive)
    return ("partial", part.path) if part.size else ("not here", None)
