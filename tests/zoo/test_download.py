"""download: weights by name, end to end, in a zoo of one tiny model and once with a real network's names and shapes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench
import pytest
from bench import ARCHIVE, SHA, Zoo
from server import Quirk, serving

from prunet_zoo.errors import CheckpointError, UnknownNameError
from prunet_zoo.files import WriteError
from prunet_zoo.zoo import fetch as fetch_module
from prunet_zoo.zoo import home as home_module
from prunet_zoo.zoo.download import download
from prunet_zoo.zoo.fetch import ChecksumError, DiskError, DownloadError, Retry
from prunet_zoo.zoo.partial import Part
from prunet_zoo.zoo.ready import check_ready


def test_first_and_second_time(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    assert download("tiny") == zoo.ready
    assert zoo.ready.read_bytes() == bench.weights(0, bench.SPEC)
    assert zoo.record.read_text().splitlines()[0] == f"{SHA}  {bench.FILE}"
    assert not zoo.archive.exists()
    told = capsys.readouterr().err
    assert f"upstream publishes no checksum for {bench.FILE}; recorded on first use: sha256 {SHA}" in told
    assert str(zoo.record) in told and zoo.url in told
    assert download("prunet://tiny") == zoo.ready
    assert len(zoo.server.requests) == 1 and capsys.readouterr().err == ""


def test_the_record_is_that_of_sha256sum(zoo: Zoo) -> None:
    download("tiny", keep=True)
    assert zoo.archive.read_bytes() == ARCHIVE
    done = subprocess.run(["sha256sum", "--check", zoo.record.name], cwd=zoo.home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_quiet(zoo: Zoo, capfd: pytest.CaptureFixture[str]) -> None:
    download("tiny", progress=False)
    assert capfd.readouterr() == ("", "")


def test_force_brings_it_again(zoo: Zoo) -> None:
    download("tiny")
    zoo.ready.write_bytes(b"")
    download("tiny", force=True)
    assert len(zoo.server.requests) == 2 and zoo.ready.read_bytes() == bench.weights(0, bench.SPEC)


def test_keep_brings_the_archive_of_what_is_ready(zoo: Zoo) -> None:
    download("tiny")
    for _ in range(2):
        download("tiny", keep=True)
        assert zoo.archive.read_bytes() == ARCHIVE
    assert len(zoo.server.requests) == 2


def test_changed_upstream_after_the_first_use(zoo: Zoo) -> None:
    download("tiny")
    new = hashlib.sha256(zoo.change()).hexdigest()
    with pytest.raises(ChecksumError) as caught:
        download("tiny", force=True)
    for text in (new, SHA, f"delete {zoo.record}", "at the first download"):
        assert text in str(caught.value)
    assert zoo.ready.read_bytes() == bench.weights(0, bench.SPEC) and zoo.record.read_text().startswith(SHA)
    assert not zoo.archive.exists() and not Part(zoo.archive).path.exists()
    zoo.ready.unlink()
    with pytest.raises(ChecksumError):
        download("tiny")
    assert not zoo.ready.exists()
    zoo.record.unlink()
    download("tiny")
    assert zoo.ready.read_bytes() == bench.weights(1, bench.SPEC) and zoo.record.read_text().startswith(new)


def test_a_zip_that_is_packed_anew_for_each_request(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    """What counts is the checkpoint in it; an older record without that line holds the zip itself."""
    download("tiny")
    first = zoo.record.read_text()
    inner = hashlib.sha256(bench.weights(0, bench.SPEC)).hexdigest()
    assert first.splitlines() == [f"{SHA}  {bench.FILE}", f"# {inner}  the checkpoint in it, however it is packed"]
    anew = bench.archive(year=2023)
    assert anew != ARCHIVE
    zoo.server.add(f"/up/{bench.FILE}", anew)
    download("tiny", force=True)
    assert "was packed anew since it was recorded" in capsys.readouterr().err
    zoo.ready.unlink()
    zoo.archive.write_bytes(anew)  # by hand
    download("tiny")
    assert zoo.ready.read_bytes() == bench.weights(0, bench.SPEC) and zoo.record.read_text() == first
    zoo.archive.unlink()
    for worse in (bench.archive(1, year=2023), anew[:-300], b"<html>"):
        zoo.server.add(f"/up/{bench.FILE}", worse)
        with pytest.raises(DownloadError):
            download("tiny", force=True)
        assert zoo.ready.read_bytes() == bench.weights(0, bench.SPEC) and zoo.record.read_text() == first
    zoo.record.write_text(first.splitlines()[0] + "\n")
    zoo.server.add(f"/up/{bench.FILE}", anew)
    with pytest.raises(ChecksumError, match=f"at the first download: {SHA}"):
        download("tiny", force=True)


def test_listed_hash(zoo: Zoo) -> None:
    zoo.list(sha256="0" * 64)
    with pytest.raises(ChecksumError, match="the index says 0000") as caught:
        download("tiny")
    assert "delete" not in str(caught.value) and not zoo.ready.exists()
    zoo.list(sha256=SHA)
    download("tiny")
    assert not zoo.record.exists()


def test_damaged_record(zoo: Zoo) -> None:
    zoo.home.mkdir()
    zoo.record.write_text("oops")
    with pytest.raises(DownloadError, match="does not begin with a sha256"):
        download("tiny")
    assert not zoo.ready.exists() and zoo.server.requests == []


@pytest.mark.parametrize(
    ("quirk", "reason"),
    [
        (Quirk(body=b"<html>Please log in</html>", headers={"Content-Type": "text/html"}), "a web page"),
        (Quirk(body=b"<html>Please log in</html>"), "a web page"),
        (Quirk(body=b'{"error": "quota"}'), "not these weights"),
        (Quirk(length=len(ARCHIVE) - 500), "not these weights"),
        (Quirk(body=bench.archive(0, {**bench.SPEC, "num_classes": 7})), "7 classes"),
        (Quirk(status=403), "403"),
    ],
)
def test_what_is_not_the_archive_is_not_installed(zoo: Zoo, quirk: Quirk, reason: str) -> None:
    zoo.server.always = quirk
    with pytest.raises(DownloadError, match=reason):
        download("tiny")
    assert sorted(p.name for p in zoo.home.iterdir()) == [f"{bench.FILE}.lock"]
    zoo.server.always = Quirk()
    download("tiny")
    assert zoo.ready.exists()


def test_offline(zoo: Zoo) -> None:
    zoo.url = "http://weights.invalid/tiny.zip"
    zoo.list()
    with pytest.raises(DownloadError) as caught:
        download("tiny")
    for text in (zoo.url, str(zoo.archive), "$PRUNET_MIRROR", "$PRUNET_HOME", "host is not found"):
        assert text in str(caught.value)
    zoo.archive.write_bytes(ARCHIVE)  # as the message says
    download("tiny")
    assert zoo.ready.exists() and zoo.archive.exists() and zoo.record.read_text().startswith(SHA)


def test_put_there_by_hand(zoo: Zoo) -> None:
    zoo.home.mkdir()
    zoo.archive.write_bytes(ARCHIVE)
    download("tiny")
    assert zoo.server.requests == [] and zoo.archive.read_bytes() == ARCHIVE
    assert zoo.ready.read_bytes() == bench.weights(0, bench.SPEC)


def test_put_there_by_hand_but_bad(zoo: Zoo) -> None:
    zoo.home.mkdir()
    zoo.archive.write_bytes(ARCHIVE[:-300])
    with pytest.raises(CheckpointError, match=r"found there, is not the file of 'tiny'.*Replace it, or remove it"):
        download("tiny")
    assert zoo.archive.exists() and not zoo.ready.exists() and not zoo.record.exists()
    zoo.archive.unlink()
    download("tiny")
    zoo.ready.unlink()
    zoo.archive.write_bytes(bench.archive(1))
    with pytest.raises(ChecksumError, match=f"at the first download: {SHA}"):
        download("tiny")
    assert not zoo.ready.exists()
    zoo.archive.unlink()


def test_damaged_weights_are_made_again(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    download("tiny")
    for content in (b"", b"nonsense", bench.weights(0, bench.SPEC)[:-1], bench.weights(0, bench.SPEC) + b"x"):
        zoo.ready.write_bytes(content)
        download("tiny")
        assert zoo.ready.read_bytes() == bench.weights(0, bench.SPEC)
        assert "damaged or truncated" in capsys.readouterr().err


@pytest.mark.parametrize("spec", [None, {**bench.SPEC, "num_classes": 7}, {"stages": 3}])
def test_another_file_in_their_place(zoo: Zoo, spec: dict[str, Any] | None) -> None:
    zoo.home.mkdir()
    mine = bench.weights(5, spec)
    zoo.ready.write_bytes(mine)
    for keep in (False, True):
        with pytest.raises(CheckpointError, match=r"Move it away .* --force tiny"):
            download("tiny", keep=keep)
    assert zoo.ready.read_bytes() == mine
    download("tiny", force=True)
    assert zoo.ready.read_bytes() == bench.weights(0, bench.SPEC)


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


def test_no_space_for_the_converted_file(zoo: Zoo) -> None:
    def full(*args: Any) -> Path:
        raise WriteError("disk full")

    with zoo.patch.context() as patched:
        patched.setattr(sys.modules["prunet_zoo.zoo.convert"], "convert_checkpoint", full)
        with pytest.raises(WriteError):
            download("tiny")
    assert not zoo.ready.exists() and Part(zoo.archive).size == len(ARCHIVE)
    download("tiny")
    assert len(zoo.server.requests) == 1 and not Part(zoo.archive).path.exists()


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


def test_bundled(zoo: Zoo, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    zoo.patch.setattr("prunet_zoo.zoo.ready.shared_folder", lambda name: tmp_path / name)
    with pytest.raises(CheckpointError, match="that come with the package, is missing"):
        download("digits_classifier")
    (folder / "digits_classifier.safetensors").write_bytes(bench.weights(0, bench.SPEC))
    assert download("digits_classifier") == folder / "digits_classifier.safetensors"
    assert not zoo.home.exists()


def test_unknown_name(zoo: Zoo) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'tiny'"):
        download("tinny")


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


def test_a_real_network_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """prunet_p0's published names and shapes, over HTTP, dropped in the middle: equal tensors in the model."""
    import torch
    from synthetic import synthetic_state, write_zip

    from prunet_zoo import create_model
    from prunet_zoo.zoo.convert import to_own_names
    from prunet_zoo.zoo.index import find_model

    entry = find_model("prunet_p0")
    state = synthetic_state("prunet_p0")
    write_zip("prunet_p0", state, tmp_path / "any.zip")
    monkeypatch.setenv("PRUNET_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fetch_module, "RETRY", Retry(base=0.0))
    with serving() as server:
        server.add(f"/{entry.weights.file}", (tmp_path / "any.zip").read_bytes())
        server.quirks = [Quirk(drop=30_000_000)]
        monkeypatch.setenv("PRUNET_MIRROR", server.base)
        model = create_model("prunet_p0", num_classes=10, pretrained=True)
        assert [r.range for r in server.requests] == [None, "bytes=30000000-"]
    ready = tmp_path / "home" / "prunet_p0.safetensors"
    check_ready(ready, entry)
    own, loaded = to_own_names(state, "prunet_p0"), model.state_dict()
    assert set(own) == set(loaded)
    assert all(torch.equal(own[k], loaded[k]) for k in own if not k.startswith("classifier."))
    assert loaded["classifier.weight"].shape == (10, 1984)
