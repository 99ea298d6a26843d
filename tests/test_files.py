"""Files are whole or absent, whatever fails on the way."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prunet_zoo.errors import PrunetError
from prunet_zoo.files import WriteError, write_atomic, write_json

LIGHT = "import sys; sys.modules['mmengine'] = None  # spares a child process the import of torch\n"


def test_writes_text_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    write_atomic(path, "prüfung")
    assert path.read_text(encoding="utf-8") == "prüfung"
    write_atomic(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(path.parent) == ["a.txt"]


def test_write_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ms": 1.5, "name": "π"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"ms": 1.5, "name": "π"}
    assert "π" in text
    assert text.endswith("}\n")


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


class FullDisk(io.FileIO):
    """A file that takes half of what it is given, then says that the disk is full."""

    def write(self, data: Any) -> int:
        super().write(bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fault", ["write", "fsync", "chmod", "replace", "mkstemp"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_fault_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, exists: bool) -> None:
    path = tmp_path / "spec.json"
    if exists:
        path.write_text("old")

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fault == "write":
        monkeypatch.setattr(os, "fdopen", lambda handle, mode: FullDisk(handle, mode))
    elif fault == "mkstemp":
        monkeypatch.setattr("tempfile.mkstemp", fail)
    else:
        monkeypatch.setattr(os, fault, fail)
    with pytest.raises(WriteError) as caught:
        write_atomic(path, "new" * 1000)
    monkeypatch.undo()
    assert isinstance(caught.value, PrunetError)
    assert isinstance(caught.value, OSError)
    assert str(path) in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert "free some space" in str(caught.value)
    assert os.listdir(tmp_path) == (["spec.json"] if exists else [])
    if exists:
        assert path.read_text() == "old"


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(WriteError, match=r"cannot write .*a "):
        write_atomic(tmp_path / "a", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write"):
        write_atomic(tmp_path / "file" / "b", "x")
    assert sorted(os.listdir(tmp_path)) == ["a", "file"]


def test_a_write_that_the_system_cuts_short(tmp_path: Path) -> None:
    """A limit on the size of files fails where a full disk does: in the middle of a write."""
    code = (
        f"{LIGHT}import resource, signal, sys\n"
        "from prunet_zoo.files import WriteError, write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    write_atomic(sys.argv[1], b'x' * 100_000)\n"
        "except WriteError as error:\n"
        "    print(error)\n"
    )
    path = tmp_path / "a"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    """Kill the writer at random moments: what stands is one whole version."""
    path = tmp_path / "a.json"
    code = (
        f"{LIGHT}from prunet_zoo.files import write_atomic\n"
        "print('ready', flush=True)\n"
        "i = 0\n"
        "while True:\n"
        "    i += 1\n"
        "    write_atomic(sys.argv[1], str(i % 10) * 300_000)\n"
    )
    for delay in (0.0, 0.01, 0.05):
        with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
        if path.exists():
            text = path.read_text()
            assert len(text) == 300_000
            assert len(set(text)) == 1


def test_a_signal_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_fd: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
