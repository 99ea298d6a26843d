"""What a safetensors file tells of itself, read without torch."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from prunet_zoo.errors import CheckpointError


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, whose length is checked too; ours are JSON texts.

    Raises:
        CheckpointError: it is missing, damaged or truncated.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"weights file {path} does not exist")
    try:
        with safe_open(str(path), framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"weights file {path} is damaged or truncated: {error}") from None
