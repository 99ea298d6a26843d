"""The metadata of a safetensors file, and files that have none to give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from prunet_zoo.errors import CheckpointError
from prunet_zoo.metadata import read_metadata

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(told=st.dictionaries(TEXT, TEXT, max_size=4))
def test_what_was_written_is_read(told: dict[str, str], tmp_path: Path) -> None:
    save_file({"x": np.zeros(3)}, tmp_path / "x.safetensors", metadata=told)
    assert read_metadata(tmp_path / "x.safetensors") == told


def test_a_file_without_metadata(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3)}, tmp_path / "x.safetensors")
    assert read_metadata(str(tmp_path / "x.safetensors")) == {}


def test_missing_damaged_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for missing in (path, tmp_path):
        with pytest.raises(CheckpointError, match=r"^weights file .* does not exist$"):
            read_metadata(missing)
    save_file({"x": np.zeros(30)}, path, metadata={"a": "b"})
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:9], b"", b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged or truncated"):
            read_metadata(path)


def test_torch_is_not_needed(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3)}, tmp_path / "x.safetensors", metadata={"a": "b"})
    code = (
        "import sys\nfor name in ('torch', 'mmengine'): sys.modules[name] = None\n"
        f"from prunet_zoo.metadata import read_metadata\nprint(read_metadata({str(tmp_path / 'x.safetensors')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'a': 'b'}"
