"""What the tests of foreign checkpoint files share: a state dict, zips of it, and what a refusal must be."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch

from prunet_zoo.errors import CheckpointError
from prunet_zoo.zoo.checkpoint import read_checkpoint

STATE = {"a": torch.arange(7.0), "b.weight": torch.randn(3, 5), "b.count": torch.tensor(4)}
MEMBER = "0.5ms-D.pth.tar"


def zipped(
    *entries: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_STORED, comment: bytes = b""
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in entries:
            file.writestr(name, data)
        file.comment = comment
    return buffer.getvalue()


def is_state(found: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(STATE) and all(torch.equal(found[k], v) for k, v in STATE.items())


def refused(path: Path, data: bytes, message: str, member: str | None = MEMBER) -> str:
    """Write ``data`` and check that it is refused with the path and ``message`` (a pattern); returns the whole text."""
    path.write_bytes(data)
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path, member)
    assert str(caught.value).startswith((str(path), f"checkpoint {path}"))
    assert "\n" not in str(caught.value)
    assert sorted(path.parent.rglob("*")) == before
    return str(caught.value)
