"""download: weights by name, end to end, in a zoo of one tiny model and once with a real network's names and shapes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench
import numpy as np
import pytest
from bench import ARCHIVE, SHA, Zoo
from server import Quirk, serving

from prunet_zoo.errors import CheckpointError, UnknownNameError
from prunet_zoo.files import WriteError
from prunet_zoo.zoo import fetch as fetch_module
from prunet_zoo.zoo.download import download
from prunet_zoo.zoo.fetch import ChecksumError, DownloadError, Retry
from prunet_zoo.zoo.partial import Origin, Part
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


def test_force_does_not_take_a_finished_part(zoo: Zoo) -> None:
    """An unfinished one is gone on with: the server is asked whether it is the same file."""

    def full(*args: Any, **options: Any) -> Path:
        raise WriteError("disk full")

    with zoo.patch.context() as patched:
        patched.setattr(sys.modules["prunet_zoo.zoo.convert"], "convert_checkpoint", full)
        with pytest.raises(WriteError):
            download("tiny")
    assert Part(zoo.archive).complete
    zoo.change()
    download("tiny", force=True)
    assert zoo.ready.read_bytes() == bench.weights(1, bench.SPEC)
    zoo.record.unlink()
    for data, ranged in ((bench.archive(1), bench.archive(1)[70_000:]), (ARCHIVE, ARCHIVE)):  # the second: changed
        zoo.server.requests.clear()
        zoo.server.quirks = [Quirk(drop=70_000), Quirk(status=404)]
        with pytest.raises(DownloadError):
            download("tiny", force=True)
        assert not Part(zoo.archive).complete
        zoo.server.add(f"/up/{bench.FILE}", data)
        download("tiny", force=True)
        last = zoo.server.requests[-1]
        assert (last.range, last.sent) == ("bytes=70000-", len(ranged))
        zoo.record.unlink()
    download("tiny", force=True)
    assert zoo.ready.read_bytes() == bench.weights(0, bench.SPEC)


def test_ready_without_a_record_beside_what_it_was_made_from(zoo: Zoo) -> None:
    """Such as an older version left when it was killed: the record is made up for, without the network."""
    from safetensors.numpy import save

    numbers = {"numbers": np.zeros(3, np.int32)}
    mine = {
        made: save(numbers, {"spec": json.dumps(bench.SPEC), "source_sha256": json.dumps(made)}) for made in (SHA, "")
    }
    zoo.home.mkdir()
    part = Part(zoo.archive)
    for left in (zoo.archive, part.path):
        part.begin(Origin(url=zoo.url, total=len(ARCHIVE)))
        for made, content in mine.items():
            zoo.ready.write_bytes(content)
            left.write_bytes(ARCHIVE)
            assert download("tiny") == zoo.ready
            assert zoo.ready.read_bytes() == content and left.exists() == (left == zoo.archive or made != SHA)
            assert zoo.record.exists() == (made == SHA)  # another file is none of ours
            if made == SHA:
                assert hashlib.sha256(bench.weights(0, bench.SPEC)).hexdigest() in zoo.record.read_text()
                zoo.record.unlink()
                part.begin(Origin(url=zoo.url, total=len(ARCHIVE)))
        left.unlink()
        zoo.ready.unlink()
    assert zoo.server.requests == []


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


def test_no_space_for_the_converted_file(zoo: Zoo) -> None:
    def full(*args: Any, **options: Any) -> Path:
        raise WriteError("disk full")

    with zoo.patch.context() as patched:
        patched.setattr(sys.modules["prunet_zoo.zoo.convert"], "convert_checkpoint", full)
        with pytest.raises(WriteError):
            download("tiny")
    assert not zoo.ready.exists() and Part(zoo.archive).size == len(ARCHIVE)
    download("tiny")
    assert len(zoo.server.requests) == 1 and not Part(zoo.archive).path.exists()


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
