"""Sample images: those that training never sees, the same on every call."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prunet_zoo.data.digits_split import split_indices
from prunet_zoo.data.samples import main, write_samples
from prunet_zoo.data.scenes import write_scenes
from prunet_zoo.errors import DataError


def test_scans_of_the_test_split_and_scenes_of_the_validation_part(tmp_path: Path) -> None:
    paths = write_samples(tmp_path / "a", digits=7, scenes=2)
    digits, scenes = paths[:7], paths[7:]
    assert [int(path.stem) for path in digits] == split_indices()[1][:7].tolist()
    write_scenes(tmp_path / "scenes", train=1, val=2)
    for number, path in enumerate(scenes):
        with Image.open(path) as image, Image.open(tmp_path / f"scenes/images/val/{number:05d}.jpg") as jpeg:
            assert np.abs(np.asarray(image).astype(int) - np.asarray(jpeg)).mean() < 6  # JPEG's loss
    again = write_samples(tmp_path / "b", digits=7, scenes=2)
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--digits", "2", "--scenes", "0"]) == 0
    assert len(list(tmp_path.rglob("*.png"))) == 2 and json.dumps(str(tmp_path))[1:-1] in capsys.readouterr().out
    assert main(["--out", str(tmp_path), "--digits", "360"]) == 2
    assert "0 to 359 digits" in capsys.readouterr().err
    with pytest.raises(DataError):
        write_samples(tmp_path, scenes=-1)
