"""How the tools without MMEngine end: exit status and what is printed."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable

import pytest

from prunet_zoo.console import run_plain_tool
from prunet_zoo.errors import CheckpointError
from prunet_zoo.files import WriteError


def end(main: Callable[..., int | None], **options: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run_plain_tool(main, [], **options)
    return int(caught.value.code or 0)


def raising(error: BaseException) -> Callable[..., int]:
    def main(argv: object) -> int:
        raise error

    return main


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3)])
def test_status_of_the_tool(returned: int | None, status: int) -> None:
    assert end(lambda argv: returned) == status


@pytest.mark.parametrize("error", [CheckpointError("mend this"), WriteError("mend this")])
def test_a_users_error_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert end(raising(error)) == 2
    assert capsys.readouterr().err == "error: mend this\n"


def test_a_full_disk_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert end(raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/file"))) == 2
    assert capsys.readouterr().err.startswith("error: the disk is full while writing /some/file; free some space")


@pytest.mark.parametrize("error", [ValueError("bug"), OSError(errno.EIO, "bug"), FileNotFoundError(2, "bug")])
def test_errors_of_the_program_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error), match="bug"):
        run_plain_tool(raising(error), [])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number: int, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    before, cleaned = signal.getsignal(signal.SIGTERM), []

    def main(argv: object) -> None:
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(10)
        finally:
            cleaned.append(True)

    assert end(main) == status
    assert capsys.readouterr().err == "\nstopped; nothing was left behind\n"
    assert end(main, stopped="goes on later") == status
    assert capsys.readouterr().err == "\ngoes on later\n"
    assert cleaned == [True, True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_of_the_main_thread() -> None:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(end(lambda argv: 4)))
    thread.start()
    thread.join()
    assert statuses == [4]
