"""Where download looks and writes: mirrors, the weights folder, folders that cannot be used."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import bench
import pytest
from bench import ARCHIVE, Zoo

from prunet_zoo.errors import PrunetError
from prunet_zoo.zoo import home as home_module
from prunet_zoo.zoo.download import download
from prunet_zoo.zoo.fetch import DiskError, DownloadError
from prunet_zoo.zoo.home import FolderError
from prunet_zoo.zoo.listing import list_weights


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom permissions bind."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("variable", ["PRUNET_HOME", "PRUNET_MIRROR"])
def test_folders_that_cannot_be(zoo: Zoo, variable: str) -> None:
    for value, reason in (
        ("~nosuchuser/x", "home folder of that user is not known"),
        ("/tmp/" + "x" * 300, "too long"),
    ):
        zoo.patch.setenv(variable, value)
        zoo.url = str(zoo.spec.parent / "nowhere")
        zoo.list()
        with pytest.raises(PrunetError, match=reason) as caught:
            download("tiny")
        assert value in str(caught.value) and f"${variable}" in str(caught.value)
        if variable == "PRUNET_HOME":
            with pytest.raises(FolderError, match=r"\$PRUNET_HOME"):
                list_weights()
    zoo.patch.setenv(variable, str(zoo.spec))  # a file
    with pytest.raises(PrunetError, match=r"[Nn]ot a directory|no such file"):
        download("tiny")


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of another kind")
def test_home_in_a_folder_of_somebody_else(zoo: Zoo) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "home").mkdir()
        Path(folder).chmod(0o700)
        zoo.patch.setenv("PRUNET_HOME", f"{folder}/home")
        if os.geteuid() != 0:
            Path(folder).chmod(0)
        with unprivileged():
            for use in (lambda: download("tiny"), list_weights):
                with pytest.raises(FolderError, match=r"\$PRUNET_HOME is .*Permission denied; name another"):
                    use()
        Path(folder).chmod(0o700)


def test_mirrors(zoo: Zoo, tmp_path: Path) -> None:
    folder = tmp_path / "mirror"
    folder.mkdir()
    http = f"{zoo.server.base}/mirror/"
    zoo.patch.setenv("PRUNET_MIRROR", f" {http}, {folder.as_uri()}\n")
    download("tiny")
    assert [r.path for r in zoo.server.requests] == [f"/mirror/{bench.FILE}", f"/up/{bench.FILE}"]
    (folder / bench.FILE).write_bytes(ARCHIVE)
    for mirror in (str(folder), folder.as_uri(), f"{http},{folder}/"):
        zoo.server.requests.clear()
        zoo.patch.setenv("PRUNET_MIRROR", mirror)
        download("tiny", force=True)
        assert f"/up/{bench.FILE}" not in [r.path for r in zoo.server.requests]
    zoo.server.add(f"/mirror/{bench.FILE}", ARCHIVE)
    zoo.server.requests.clear()
    zoo.patch.setenv("PRUNET_MIRROR", http)
    download("tiny", force=True)
    assert [r.path for r in zoo.server.requests] == [f"/mirror/{bench.FILE}"]


def test_a_mirror_with_another_file(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / bench.FILE).write_bytes(b"PK rubbish")
    zoo.patch.setenv("PRUNET_MIRROR", str(tmp_path))
    download("tiny")
    assert zoo.ready.read_bytes() == bench.weights(0, bench.SPEC)


def test_a_mirror_that_is_none(zoo: Zoo) -> None:
    zoo.patch.setenv("PRUNET_MIRROR", "s3://bucket/zoo")
    with pytest.raises(DownloadError, match=r"\$PRUNET_MIRROR has s3://…; a mirror is"):
        download("tiny")


@pytest.mark.parametrize("mirror", ["localhost:9/m", "mirror.example.org:8080"])
def test_a_mirror_without_its_scheme(zoo: Zoo, mirror: str) -> None:
    zoo.patch.setenv("PRUNET_MIRROR", mirror)
    with pytest.raises(DownloadError, match=rf"\$PRUNET_MIRROR has '{mirror}'; is http:// before it missing"):
        download("tiny")


def test_ways_to_write_a_mirror(zoo: Zoo, tmp_path: Path) -> None:
    """Schemes in capitals, letters beyond ASCII, a folder with a blank in its name."""
    folder = tmp_path / "mäny files"
    folder.mkdir()
    (folder / bench.FILE).write_bytes(ARCHIVE)
    zoo.server.add(f"/m%C3%A4ny%20files/{bench.FILE}", ARCHIVE)
    http = zoo.server.base.replace("http", "HTTP")
    for mirror in (f"{http}/mäny%20files/", f"{http}/m%C3%A4ny%20files", folder.as_uri().replace("file:", "FILE:")):
        zoo.patch.setenv("PRUNET_MIRROR", mirror)
        download("tiny", force=True)
    assert [(r.path, r.status) for r in zoo.server.requests] == [(f"/m%C3%A4ny%20files/{bench.FILE}", 200)] * 2


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of another kind")
def test_read_only_folder(zoo: Zoo) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        zoo.spec = bench.write_spec(Path(folder))
        zoo.list()
        zoo.home = Path(folder) / "home"
        zoo.home.mkdir()
        zoo.patch.setenv("PRUNET_HOME", str(zoo.home))
        zoo.home.chmod(0o555)
        with unprivileged(), pytest.raises(DiskError, match=r"Permission denied.*\$PRUNET_HOME"):
            download("tiny")
        assert list(zoo.home.iterdir()) == []
        zoo.home.chmod(0o755)
        zoo.ready.write_bytes(bench.weights(0, bench.SPEC))
        zoo.ready.chmod(0o444)
        zoo.home.chmod(0o555)
        with unprivileged():
            assert download("tiny") == zoo.ready
        assert list(zoo.home.iterdir()) == [zoo.ready] and zoo.server.requests == []
        zoo.home.chmod(0o755)


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRUNET_HOME", "~/zoo")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home_module.weights_home() == tmp_path / "zoo"
    monkeypatch.setenv("PRUNET_HOME", "")
    assert home_module.weights_home() == bench.ROOT / "checkpoints"
    monkeypatch.setattr(home_module, "repository", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert home_module.weights_home() == tmp_path / "cache" / "prunet_zoo"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert home_module.weights_home() == tmp_path / ".cache" / "prunet_zoo"
