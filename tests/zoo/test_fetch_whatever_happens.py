"""fetch on a full disk, interrupted, and with whatever a server may do; and what it tells meanwhile."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fetching import DATA, OTHER, assert_whole, get
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from server import Quirk, Server, serving

from prunet_zoo.errors import CheckpointError
from prunet_zoo.zoo import fetch as fetch_module
from prunet_zoo.zoo import reporter as reporter_module
from prunet_zoo.zoo.fetch import DiskError, DownloadError, Retry
from prunet_zoo.zoo.partial import Part
from prunet_zoo.zoo.reporter import Reporter


def test_no_space_is_told_in_advance(monkeypatch: pytest.MonkeyPatch, server: Server, target: Path) -> None:
    url = server.add("/x.zip", DATA)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=150_000))
    with pytest.raises(DiskError, match=r"0.2 MB are needed in .*, 0.1 MB are free"):
        get([url, url], target)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=250_000))
    with pytest.raises(DiskError, match="needed"):
        get(url, target, reserve=100_000)
    assert len(server.requests) == 2
    assert_whole(target, get(url, target))


class FullDisk(io.FileIO):
    """Takes half of the last write that fits, then none: as a disk that fills up."""

    room = 90_001

    def write(self, data: Any) -> int:
        room = FullDisk.room - self.tell()
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(bytes(data)[:room])


def test_full_disk(monkeypatch: pytest.MonkeyPatch, server: Server, target: Path) -> None:
    url = server.add("/x.zip", DATA)
    with monkeypatch.context() as patched:
        patched.setattr(Part, "open", lambda self: FullDisk(self.path, "ab"))
        with pytest.raises(DiskError, match=r"No space left on device; the 90,001 bytes .* goes on from them"):
            get([url, url], target)
    assert not target.exists() and Part(target).size == 90_001
    assert_whole(target, get(url, target))
    assert server.requests[1].range == "bytes=90001-"


class ShortWrites(io.FileIO):
    """Takes a thousand bytes at a time, as a system may."""

    def write(self, data: Any) -> int:
        return super().write(bytes(data)[:1000])


def test_short_writes(monkeypatch: pytest.MonkeyPatch, server: Server, target: Path) -> None:
    server.always = Quirk(chunked=True)  # so that no length tells what is missing
    monkeypatch.setattr(Part, "open", lambda self: ShortWrites(self.path, "ab"))
    assert_whole(target, get(server.add("/x.zip", DATA), target))


LIMITED = """
import resource, sys
sys.modules["mmengine"] = None
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
from prunet_zoo.zoo.fetch import fetch, DiskError
try:
    fetch([sys.argv[1]], sys.argv[2])
except DiskError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_the_system_refuses_to_write_more(server: Server, target: Path) -> None:
    url = server.add("/x.zip", DATA)
    done = subprocess.run([sys.executable, "-c", LIMITED, url, str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "File too large; the 100,000 bytes that arrived stay there" in done.stdout
    assert not target.exists() and Part(target).path.read_bytes() == DATA[:100_000]
    assert_whole(target, get(url, target))


def test_a_small_disk(server: Server, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        url, target = server.add("/x.zip", DATA), disk / "x.zip"
        with pytest.raises(DiskError, match="are free"):
            get(url, target)
        server.always = Quirk(chunked=True)  # the length is not known in advance
        with pytest.raises(DiskError, match="No space left on device"):
            get(url, target)
        assert not target.exists() and DATA.startswith(Part(target).path.read_bytes())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    url = server.add("/x.zip", DATA)
    with pytest.raises(DiskError, match="PRUNET_HOME"):
        get(url, tmp_path / "file" / "x.zip")
    with (
        pytest.raises(DiskError, match=r"cannot write to .*PRUNET_HOME"),
        fetch_module.exclusive(tmp_path / "file" / "x.zip", Reporter(show=False)),
    ):
        pass


def test_interrupted(server: Server, target: Path) -> None:
    class Impatient(Reporter):
        def transfer(self, title: str) -> Any:
            def update(done: int, total: int | None) -> None:
                if done:
                    raise KeyboardInterrupt

            import contextlib

            return contextlib.nullcontext(update)

    url = server.add("/x.zip", DATA)
    with pytest.raises(KeyboardInterrupt):
        get(url, target, reporter=Impatient(show=False))
    there = Part(target).size
    assert not target.exists() and 0 < there <= len(DATA)
    assert_whole(target, get(url, target))
    assert there == len(DATA) or server.requests[1].range == f"bytes={there}-"


QUIRKS = st.builds(
    Quirk,
    status=st.sampled_from([None] * 8 + [500, 429, 416, 503]),
    drop=st.none() | st.integers(0, 3000),
    length=st.none() | st.integers(0, 4000),
    body=st.sampled_from([None] * 6 + [b"<html>log in</html>", b"x" * 3000]),
    ranges=st.booleans(),
    if_range=st.booleans(),
    content_range=st.sampled_from([None] * 4 + ["bytes 0-2999/3000", "bytes 1000-2999/3000", "nonsense"]),
    chunked=st.booleans(),
    headers=st.sampled_from([{}] * 6 + [{"ETag": '"b"'}, {"ETag": None}, {"Content-Encoding": "gzip"}]),
)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    with serving() as running:
        yield running


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    calls=st.lists(st.lists(st.tuples(QUIRKS, st.booleans()), max_size=5), min_size=1, max_size=3),
    known=st.sampled_from(["sha256", "check"]),
)
def test_right_or_absent_whatever_the_server_does(
    shared_server: Server, calls: list[list[tuple[Quirk, bool]]], known: str
) -> None:
    """Several calls in a row; each request meets a quirk, and the file may be another one then, or change for good."""
    server, new, old = shared_server, DATA[:3000], OTHER[:3000]
    url = server.add("/q.zip", old, etag='"a"')

    def is_new(path: Path) -> None:
        if path.read_bytes() != new:
            raise CheckpointError("another file")

    wanted: dict[str, Any] = {"sha256": hashlib.sha256(new).hexdigest()} if known == "sha256" else {"check": is_new}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "q.zip"
        for number, script in enumerate([*calls, []]):
            server.quirks = [quirk for quirk, _ in script]
            if number == len(calls) or any(change for _, change in script):
                server.add("/q.zip", new, etag='"b"')
            try:
                get(url, target, retry=Retry(base=0.0, tries=4), **wanted)
            except DownloadError:
                assert number < len(calls), "a good server must be enough"
            assert not target.exists() or target.read_bytes() == new
        assert target.read_bytes() == new and os.listdir(folder) == ["q.zip"]


HONEST = st.builds(
    Quirk,
    status=st.sampled_from([None] * 8 + [500, 429]),
    drop=st.none() | st.integers(0, 3000),
    ranges=st.booleans(),
    chunked=st.booleans(),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls=st.lists(st.lists(HONEST, max_size=4), min_size=1, max_size=4), changes=st.sets(st.integers(0, 3)))
def test_never_a_mixture_of_two_versions(shared_server: Server, calls: list[list[Quirk]], changes: set[int]) -> None:
    """Nothing is known of the file: the server's own word (ETag, lengths) is enough where it does not lie."""
    server = shared_server
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "q.zip"
        for number, script in enumerate([*calls, []]):
            version = sum(change <= number for change in changes)
            data = random.Random(version).randbytes(3000)
            url = server.add("/q.zip", data, etag=f'"{version}"')
            server.quirks = list(script)
            target.unlink(missing_ok=True)
            try:
                get(url, target, retry=Retry(base=0.0, tries=3))
            except DownloadError:
                assert script and not target.exists()
            else:
                assert target.read_bytes() == data


def test_lines_of_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 5.0, 10.0, 20.5, 21.0, 40.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Reporter().transfer("x.zip") as update:
        for done in (10_000_000, 12_000_000, 20_000_000, 31_000_000, 5_000_000, 24_000_000):
            update(done, 50_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "x.zip: 20.0 of 50.0 MB (40%), 1.0 MB/s, 30 s left",
        "x.zip: 31.0 of 50.0 MB (62%), 1.0 MB/s, 19 s left",
        "x.zip: 24.0 of 50.0 MB (48%), 1.0 MB/s, 26 s left",
    ]


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, server: Server, target: Path) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        reporter_module,
        "Console",
        lambda stderr: Console(file=screen, force_terminal=True, width=100, color_system=None),
    )
    server.quirks = [Quirk(drop=70_000)]
    server.always = Quirk(delay=0.02)
    get(server.add("/x.zip", DATA), target, reporter=Reporter())
    assert "trying again in 0 s" in screen.getvalue() and "/200.0 kB" in screen.getvalue()
    assert re.search(r"B/s \d:\d\d:\d\d", screen.getvalue())  # rate and time left


def test_quiet(server: Server, target: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server.quirks = [Quirk(status=500)]
    get(server.add("/x.zip", DATA), target)
    assert capfd.readouterr() == ("", "")
