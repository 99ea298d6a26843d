"""tools/download.py, in this process, in one that is stopped, and in several at once."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import bench
import pytest
from bench import ARCHIVE, SHA, Zoo
from server import Quirk

from prunet_zoo.errors import UnknownNameError
from prunet_zoo.zoo.download import download
from prunet_zoo.zoo.fetch import DownloadError
from prunet_zoo.zoo.partial import Part


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_two_processes_at_once(zoo: Zoo) -> None:
    zoo.server.always = Quirk(delay=0.1)
    first = zoo.start("tiny")
    wait_for(lambda: bool(zoo.server.sent))
    others = [zoo.start("tiny") for _ in range(2)]
    told = [process.communicate(timeout=100) for process in (first, *others)]
    assert [process.returncode for process in (first, *others)] == [0, 0, 0], told
    assert [out.strip() for out, _ in told] == [str(zoo.ready)] * 3
    assert len(zoo.server.requests) == 1 and zoo.server.sent == len(ARCHIVE)
    assert zoo.ready.exists()
    for _, err in told[1:]:
        assert f"another process is bringing {bench.FILE}; waiting" in err or err == ""


def test_the_waiting_one_goes_on_when_the_first_is_killed(zoo: Zoo) -> None:
    zoo.server.quirks = [Quirk(delay=2.0)]
    first = zoo.start("tiny")
    wait_for(lambda: bool(zoo.server.sent))
    second = zoo.start("tiny")
    assert second.stderr is not None
    assert "another process is bringing" in second.stderr.readline()
    time.sleep(0.1)
    first.kill()
    first.communicate()
    there = Part(zoo.archive).size
    assert 0 < there < len(ARCHIVE)
    second.communicate(timeout=100)
    assert second.returncode == 0 and zoo.ready.exists()
    assert zoo.server.requests[1].range == f"bytes={there}-"


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_stopped_in_the_middle(zoo: Zoo, number: int, status: int) -> None:
    zoo.server.quirks = [Quirk(delay=2.0)]
    process = zoo.start("tiny")
    wait_for(lambda: Part(zoo.archive).size > 0)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == status, err
    assert "Traceback" not in err
    if number != signal.SIGKILL:
        assert "what has arrived is kept, the same command goes on from there" in err
    there = Part(zoo.archive).size
    assert not zoo.ready.exists() and not zoo.archive.exists() and 0 < there < len(ARCHIVE)
    download("tiny")
    assert zoo.server.requests[1].range == f"bytes={there}-" and zoo.server.requests[1].sent == len(ARCHIVE) - there


@pytest.mark.parametrize(("step", "force"), [*((step, False) for step in bench.STEPS), ("installed", True)])
def test_killed_between_the_steps(zoo: Zoo, step: str, force: bool) -> None:
    """The sha256 of the first use is never lost, nothing is fetched twice, and nothing is left behind."""
    process = zoo.start("tiny", *["--force"] * force, BENCH_DIES=step)
    _, err = process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL, err
    assert zoo.record.exists() or not zoo.ready.exists()
    assert zoo.ready.exists() == (step == "ready")
    assert download("tiny") == zoo.ready
    assert zoo.record.read_text().startswith(SHA) and len(zoo.server.requests) == 1
    assert {p.name for p in zoo.home.glob(".*")} == set() and not Part(zoo.archive).path.exists()


def test_a_reader_who_goes_away(zoo: Zoo) -> None:
    for args in (("--list",), ("--list", "--json"), ("tiny",)):
        process = zoo.start(*args, PYTHONUNBUFFERED="1")
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read().count("Traceback") == 0
        assert process.wait(timeout=100) == 0, args
        process.stderr.close()
    assert zoo.ready.exists()


def test_tool_with_several(zoo: Zoo, tmp_path: Path) -> None:
    missing = tmp_path / "elsewhere"
    zoo.patch.setattr("prunet_zoo.zoo.ready.shared_folder", lambda name: missing)
    done, out, err = tool("--all", "--json")
    records = {record["name"]: record for record in json.loads(out)}
    assert done == 2 and set(records) == {"tiny", "digits_classifier", "digits_detector"}
    assert records["tiny"] == {"name": "tiny", "path": str(zoo.ready), "error": None} and zoo.ready.exists()
    assert "is missing" in records["digits_detector"]["error"]
    assert "2 of 3 failed: digits_classifier, digits_detector" in err
    assert tool("tiny", "tiny")[:2] == (0, f"{zoo.ready}\n")
    with pytest.raises(UnknownNameError):
        tool("tiny", "tinny")


def test_tool_list(zoo: Zoo) -> None:
    def state() -> tuple[str, str]:
        (record,) = (r for r in json.loads(tool("--list", "--json")[1]) if r["name"] == "tiny")
        return record["state"], record["checksum"]

    assert state() == ("not here", "none yet")
    zoo.server.quirks = [Quirk(drop=1000), *[Quirk(status=404)]]
    with pytest.raises(DownloadError):
        download("tiny")
    assert state() == ("partial", "none yet")
    download("tiny", keep=True)
    assert state() == ("ready", "recorded")
    _, out, _ = tool("--list")
    (line,) = (line for line in out.splitlines() if line.startswith("tiny"))
    assert re.search(
        rf"classification +ready +{bench.FILE} +0.2 +{SHA[:12]}… \(recorded\) +Apache-2.0 +{zoo.url}", line
    )
    assert str(zoo.home) in out
    zoo.ready.write_bytes(b"")
    assert state() == ("damaged", "recorded")
    zoo.ready.write_bytes(bench.weights(0))
    assert state() == ("another file", "recorded")
    zoo.ready.unlink()
    assert state() == ("archive present", "recorded")
    zoo.record.write_text("?")
    assert state() == ("archive present", "record damaged")
    zoo.list(sha256=SHA)
    assert state() == ("archive present", "listed")
    zoo.record.unlink()


def test_tool_usage(zoo: Zoo) -> None:
    for args in ((), ("--all", "tiny"), ("--all", "--list")):
        with pytest.raises(SystemExit) as caught:
            tool(*args)
        assert caught.value.code == 2


def tool(*args: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of tools/download.py in this process."""
    import io
    import runpy

    namespace = runpy.run_path(str(bench.ROOT / "tools" / "download.py"))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status: int = namespace["main"](list(args))
    return status, out.getvalue(), err.getvalue()


def test_the_tool_in_a_process(zoo: Zoo) -> None:
    process = zoo.start("tiny", PRUNET_MIRROR="ftp://x")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2 and out == "" and err.startswith("error: $PRUNET_MIRROR has ftp://")
