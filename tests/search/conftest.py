"""Makes the bench of these tests (tree_bench.py) importable by its name."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.append(HERE)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tree of Archtree that was not interrupted."""
    from tree_bench import grow

    return grow(tmp_path_factory.mktemp("whole"))
