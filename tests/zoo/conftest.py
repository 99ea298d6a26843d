"""Makes the helpers of these tests (reference.py, synthetic.py, …) importable by their names."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from bench import Zoo
    from server import Server

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.append(HERE)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A loopback server, and no proxy on the way to it."""
    from server import serving

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as running:
        yield running


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """The file to fetch; after each test it is right or absent."""
    from fetching import DATA

    path = tmp_path / "home" / "x.zip"
    yield path
    assert not path.exists() or path.read_bytes() == DATA


@pytest.fixture
def zoo(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Zoo]:
    """A zoo of one tiny model; after each test its weights are right or absent."""
    from bench import Zoo

    tiny = Zoo(server, tmp_path, monkeypatch)
    yield tiny
    tiny.check()


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder for temporary files: empty after each test, whatever was read in it."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []
