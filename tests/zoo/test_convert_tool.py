"""tools/convert.py as a command: what it prints, its exit status, and that a stopped one leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from synthetic import synthetic_state, write_zip

from prunet_zoo import create_model
from prunet_zoo.errors import CheckpointError
from prunet_zoo.files import sha256_of
from prunet_zoo.metadata import read_metadata

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "convert.py"
# without MMEngine; SLOW waits after unpacking, so that a signal can come
CODE = """
import runpy, sys
sys.modules["mmengine"] = None
if "--slow" in sys.argv:
    import time
    from prunet_zoo.zoo import checkpoint
    sys.argv.remove("--slow")
    unpack = checkpoint.unpack
    def slow(*args):
        unpack(*args)
        print("unpacked", flush=True)
        time.sleep(60)
    checkpoint.unpack = slow
sys.argv[0] = {tool!r}
runpy.run_path({tool!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("convert")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zip("gpunet_d1", synthetic_state("gpunet_d1"), tmp_path_factory.mktemp("zip") / "d1.zip")


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-c", CODE.format(tool=str(TOOL)), *map(str, args)]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "temporary").mkdir()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path / "temporary")}


def test_as_a_process_without_mmengine(source: Path, tmp_path: Path, env: dict[str, str]) -> None:
    out = tmp_path / "new" / "d1.safetensors"
    args = command(source, "--arch", "gpunet_d1", "--out", out)
    done = subprocess.run(args, capture_output=True, text=True, timeout=120, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == (
        f"{out}: gpunet_d1, 411 tensors, 10,589,859 parameters, {out.stat().st_size:,} bytes, sha256 {sha256_of(out)}"
    )
    assert create_model(out).spec.name == "gpunet_d1"
    assert read_metadata(out)["licence"] == "null"  # of d1.zip, which is not the published file's name

    again = subprocess.run(args, capture_output=True, text=True, timeout=120, env=env)
    assert again.returncode == 2
    assert again.stderr == f"error: {out} exists already; give another --out, or --force to overwrite it\n"
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_leaves_nothing(source: Path, tmp_path: Path, env: dict[str, str], number: int, status: int) -> None:
    args = command(source, "--arch", "gpunet_d1", "--out", tmp_path / "d1.safetensors", "--slow")
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "unpacked\n"
        assert len(list((tmp_path / "temporary").iterdir())) == 1
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors == "\nstopped; OUT was not written and nothing else was left behind\n"
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["temporary"]


def test_force_and_errors(tool: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "d1.safetensors"
    out.write_bytes(b"before")
    with pytest.raises(CheckpointError, match="exists already"):
        tool.main([str(source), "--arch", "gpunet_d1", "--out", str(out)])
    with pytest.raises(CheckpointError, match=r"do not fit gpunet_1: .* They fit gpunet_d1: give that as the arch"):
        tool.main([str(source), "--arch", "gpunet_1", "--out", str(out), "--force"])
    assert out.read_bytes() == b"before"
    told = ["--licence", "MIT", "--origin", "a run"]
    assert tool.main([str(source), "--arch", "gpunet_d1", "--out", str(out), "--force", *told]) == 0
    assert {key: read_metadata(out)[key] for key in ("licence", "origin")} == {"licence": '"MIT"', "origin": '"a run"'}
    assert "411 tensors, 10,589,859 parameters" in capsys.readouterr().out
    assert create_model(out).num_classes == 1000


def test_help_has_an_example(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tool.main(["--help"])
    assert caught.value.code == 0
    assert "--arch prunet_p0 --out prunet_p0.safetensors" in capsys.readouterr().out
