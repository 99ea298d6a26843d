"""Makes the helper of these tests (coco_files.py) importable by its name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.append(HERE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``own/labels.json`` and 20 images of different content in ``own/images``."""
    from coco_files import sound

    root = tmp_path / "own"
    (root / "images").mkdir(parents=True)
    for i in range(20):
        Image.new("RGB", (40, 30), (10 * i, 255 - 10 * i, 90)).save(root / "images" / f"{i}.png")
    (root / "labels.json").write_text(json.dumps(sound()))
    return root
