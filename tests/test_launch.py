"""tools/launch.py: several processes, their numbers, their ends, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[1] / "tools" / "launch.py"
TOOL = """
import json, os, pathlib, signal, sys, time
rank, here = os.environ["RANK"], pathlib.Path(__file__).parent
def save(number, frame):
    with open(here / f"signal{{rank}}", "a") as file:
        file.write(f"{{number}} ")
{body}
"""
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
TELL = f"""
told = {{name: os.environ[name] for name in {(*NAMES, "PRUNET_COMMAND")}}}
(here / f"told{{rank}}").write_text(json.dumps([told, sys.argv[1:]]))
"""


def start(folder: Path, body: str, *options: str, count: int = 2) -> subprocess.Popen[str]:
    (folder / "tool.py").write_text(TOOL.format(body=body))
    env = {key: value for key, value in os.environ.items() if key not in ("PRUNET_COMMAND", *NAMES)}
    command = [sys.executable, str(LAUNCH), "--processes", str(count), *options, str(folder / "tool.py"), "a b", "--x"]
    return subprocess.Popen(command, env=env, text=True, stderr=subprocess.PIPE)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    error = process.communicate(timeout=60)[1]
    return process.returncode, error


def wait_for(*paths: Path) -> None:
    until = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_each_process_is_told_its_number(tmp_path: Path) -> None:
    assert end(start(tmp_path, TELL, count=3)) == (0, "")
    told = [json.loads((tmp_path / f"told{rank}").read_text()) for rank in range(3)]
    assert [env["LOCAL_RANK"] for env, _ in told] == ["0", "1", "2"] == [env["RANK"] for env, _ in told]
    assert {env["WORLD_SIZE"] for env, _ in told} == {"3"} and len({env["MASTER_PORT"] for env, _ in told}) == 1
    assert told[0][0]["OMP_NUM_THREADS"] == "1" and told[0][0]["MASTER_ADDR"] == "127.0.0.1"
    assert told[0][1] == ["a b", "--x", "--launcher", "pytorch"]
    assert told[0][0]["PRUNET_COMMAND"].endswith("--processes 3 " + str(tmp_path / "tool.py") + " 'a b' --x")


def test_second_machine(tmp_path: Path) -> None:
    where = ("--nnodes", "2", "--node-rank", "1", "--master-addr", "first", "--master-port", "1234")
    assert end(start(tmp_path, TELL, *where)) == (0, "")
    env = json.loads((tmp_path / "told3").read_text())[0]
    assert (env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("1", "4", "2")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("first", "1234")


@pytest.mark.parametrize("failing", ["0", "1"])
def test_status_of_the_first_that_fails_and_the_others_end(tmp_path: Path, failing: str) -> None:
    """The first process speaks for all, so the others end at once; those that lost another have time to say so."""
    body = f"sys.exit(3) if rank == '{failing}' else time.sleep(60)"
    begin = time.monotonic()
    assert end(start(tmp_path, body)) == (3, "")
    assert (time.monotonic() - begin < 4) == (failing == "0") and time.monotonic() - begin < 20


def test_a_killed_process_is_named(tmp_path: Path) -> None:
    status, error = end(start(tmp_path, "os.kill(os.getpid(), 9) if rank == '1' else (time.sleep(1), sys.exit(2))"))
    assert status == 137 and error.startswith("error: process 1 was ended by SIGKILL") and error.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_all_once_and_they_have_time(tmp_path: Path, number: int) -> None:
    """The first to end does not have the others ended: they may still write."""
    body = f"""
signal.signal({int(number)}, save)
(here / f"up{{rank}}").touch()
while not (here / f"signal{{rank}}").exists():
    time.sleep(0.02)
time.sleep(1 * (rank == "0"))
(here / f"saved{{rank}}").touch()
sys.exit(128 + {int(number)})
"""
    process = start(tmp_path, body)
    wait_for(tmp_path / "up0", tmp_path / "up1")
    process.send_signal(number)
    assert end(process) == (128 + number, "")
    for rank in "01":
        assert (tmp_path / f"signal{rank}").read_text() == f"{int(number)} " and (tmp_path / f"saved{rank}").exists()


def test_second_ctrl_c_is_passed_on(tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGINT, save)
(here / f"up{rank}").touch()
while not (here / f"signal{rank}").exists() or (here / f"signal{rank}").read_text() != "2 2 ":
    time.sleep(0.02)
sys.exit(130)
"""
    process = start(tmp_path, body)
    wait_for(tmp_path / "up0", tmp_path / "up1")
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path / "signal0", tmp_path / "signal1")
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "")


def test_one_that_hangs_is_killed(tmp_path: Path, load_tool: object) -> None:
    module = load_tool("launch")  # type: ignore[operator]
    before = {number: signal.getsignal(number) for number in module.SIGNALS}
    (tmp_path / "tool.py").write_text(
        "import os, signal, sys, time\nsignal.signal(15, signal.SIG_IGN)\n"
        "time.sleep(1)\nsys.exit(1) if os.environ['RANK'] == '0' else time.sleep(60)\n"
    )
    module.KILL_AFTER = 0.5
    envs = [{**os.environ, "RANK": str(rank)} for rank in range(2)]
    try:
        assert module.Group([sys.executable, str(tmp_path / "tool.py")], envs).wait() == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--processes", "0"), "numbers from 1 on"), (("--nnodes", "2"), "same --master-port"),
     (("--node-rank", "1"), "got 1, 1, 1")],
)  # fmt: skip
def test_bad_arguments(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    command = [sys.executable, str(LAUNCH), *(() if "--processes" in options else ("--processes", "1")), *options, "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr
