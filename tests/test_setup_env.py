"""tools/setup_env.sh: installs once, repairs what was interrupted, says what is wrong. pip is a stand-in here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="bash scripts")

# stands for the environment's Python: pip and the imports of the check are only written down
FAKE = """#!/usr/bin/env bash
if [ "$1" = -m ] && [ "$2" = pip ]; then
  echo "pip ${*:3}" >> "$CALLS"
  case "$*" in *"$FAIL_ON"*) [ -n "$FAIL_ON" ] && { echo "ERROR: broken pipe"; exit 1; } ;; esac
  exit 0
fi
case "$1 $2" in
  "-c import cv2") echo import cv2 >> "$CALLS"; [ -z "$NO_LIBGL" ]; exit ;;
  "-c import torch"*) echo check >> "$CALLS"; [ -z "$NO_IMPORT" ]; exit ;;
  "-c from importlib.metadata"*) echo 5.0; exit ;;
esac
exec "{python}" "$@"
"""


class Bench:
    """A copy of the repository's frame with an environment whose Python is `FAKE`."""

    def __init__(self, folder: Path) -> None:
        self.root, self.calls = folder / "repo", folder / "calls"
        for name in ("setup.py", "pyproject.toml", "constraints.txt", "prunet_zoo/version.py", "tools/setup_env.sh"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.venv = self.root / ".venv"
        (self.venv / "bin").mkdir(parents=True)
        (self.venv / "pyvenv.cfg").touch()
        python = self.venv / "bin" / "python"
        python.write_text(FAKE.replace("{python}", sys.executable))
        python.chmod(0o755)

    def run(self, **env: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PRUNET_")}
        base = {"CALLS": str(self.calls), "FAIL_ON": "", "NO_LIBGL": "", "NO_IMPORT": ""}
        command = ["bash", str(self.root / "tools" / "setup_env.sh")]
        return subprocess.run(command, capture_output=True, text=True, env={**clean, **base, **env})

    @property
    def log(self) -> list[str]:
        return self.calls.read_text().splitlines()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_installs_once(bench: Bench) -> None:
    first = bench.run()
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == str(bench.venv / "bin" / "python")
    install = [line for line in bench.log if line.startswith("pip install")]
    assert len(install) == 1
    assert f"--constraint {bench.root}/constraints.txt --editable {bench.root}[all]" in install[0]
    second = bench.run()
    assert (second.returncode, bench.log, second.stderr) == (0, [], "")
    assert second.stdout == first.stdout


@pytest.mark.parametrize("name", ["setup.py", "constraints.txt", "pyproject.toml", "prunet_zoo/version.py"])
def test_installs_again_when_what_it_depends_on_changes(bench: Bench, name: str) -> None:
    bench.run()
    with (bench.root / name).open("a") as file:
        file.write("\n# changed\n")
    assert bench.run().returncode == 0
    assert [line for line in bench.log if line.startswith("pip install")]
    bench.run()
    assert not bench.log


def test_other_constraints(bench: Bench) -> None:
    bench.run()
    other = bench.root / "other.txt"
    result = bench.run(PRUNET_CONSTRAINTS=str(other))
    assert result.returncode == 2
    assert f"error: no such constraints file: {other}" in result.stderr
    other.write_text("torch==2.10.0\n")
    assert bench.run(PRUNET_CONSTRAINTS=str(other)).returncode == 0
    assert f"--constraint {other}" in "\n".join(bench.log)


def test_a_failed_installation_says_so_and_is_repaired(bench: Bench) -> None:
    result = bench.run(FAIL_ON="--editable")
    assert result.returncode == 2
    assert "ERROR: broken pipe" in result.stderr
    assert "run the same command again. The whole output: " in result.stderr
    assert not (bench.venv / ".prunet_installed").exists()
    again = bench.run()
    assert again.returncode == 0
    assert "an earlier installation was interrupted" in again.stderr
    assert bench.run().stderr == ""


def test_an_environment_that_does_not_import_is_no_success(bench: Bench) -> None:
    result = bench.run(NO_IMPORT="1")
    assert result.returncode == 2
    assert "the environment does not import; the reason is at the end of" in result.stderr
    assert bench.run().returncode == 0
    assert "check" in bench.log


def test_an_interrupted_environment_of_its_own_is_made_anew(bench: Bench) -> None:
    bench.run()
    (bench.root / ".venv.unfinished").write_text("ours\n")
    (bench.venv / "half").touch()
    result = bench.run(PRUNET_PYTHON="/nonexistent")  # it needs a Python to start over with
    assert result.returncode == 2
    # a stand-in for the system's Python whose venv module writes the stand-in of the environment
    system = bench.root / "python-of-the-system"
    copy = bench.root / "fake"
    shutil.copy(bench.venv / "bin" / "python", copy)
    system.write_text(
        "#!/usr/bin/env bash\n"
        f'case "$1 $2" in "-m venv") rm -rf "{bench.venv}"; mkdir -p "{bench.venv}/bin"; '
        f'cp "{copy}" "{bench.venv}/bin/python"; exit;; esac\nexec "{sys.executable}" "$@"\n'
    )
    system.chmod(0o755)
    result = bench.run(PRUNET_PYTHON=str(system))
    assert result.returncode == 0, result.stderr
    assert not (bench.venv / "half").exists()
    assert not (bench.root / ".venv.unfinished").exists()


def test_someone_elses_environment_is_never_cleared(bench: Bench) -> None:
    (bench.venv / "precious").touch()
    assert bench.run(FAIL_ON="--editable").returncode == 2
    assert bench.run().returncode == 0
    assert (bench.venv / "precious").exists()


def test_a_folder_that_is_no_environment_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    other = tmp_path / "holiday"
    other.mkdir()
    (other / "photo.jpg").touch()
    result = bench.run(PRUNET_VENV=str(other))
    assert result.returncode == 2
    assert "is no Python environment; move it away" in result.stderr
    assert (other / "photo.jpg").exists()


def test_an_old_python_is_refused(bench: Bench, tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text('#!/usr/bin/env bash\n[ "$1" = --version ] && echo Python 3.8.20 && exit\nexit 1\n')
    old.chmod(0o755)
    result = bench.run(PRUNET_PYTHON=str(old), PRUNET_VENV=str(tmp_path / "new"))
    assert result.returncode == 2
    assert "error: Python 3.10 or newer is needed" in result.stderr
    assert "Python 3.8.20" in result.stderr
    assert "PRUNET_PYTHON=" in result.stderr


def test_opencv_without_libgl_gives_way_to_the_headless_one(bench: Bench) -> None:
    result = bench.run(NO_LIBGL="1")
    assert result.returncode == 0
    assert "pip uninstall --quiet --yes opencv-python" in bench.log
    assert any(line.endswith("--no-deps --force-reinstall opencv-python-headless==5.0") for line in bench.log)


@pytest.mark.parametrize("script", ["tools/setup_env.sh", "tools/run_tests.sh", "tools/quickstart.sh", ".ci/run"])
def test_scripts_are_bash_and_stop_at_errors(script: str) -> None:
    text = (ROOT / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "pipefail" in text
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
