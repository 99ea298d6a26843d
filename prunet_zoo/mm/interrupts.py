"""Ctrl-C and SIGTERM: a run finishes its step, saves, says how to go on, and ends with status 130 or 143."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal after its state was saved.

    Args:
        signum: the signal; the exit status is 128 + signum.
        message: what was saved and how to continue, for the user.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum, self.message = signum, message

    @property
    def status(self) -> int:
        """Exit status of a shell for a process that this signal ended."""
        return 128 + self.signum


class StopSignals:
    """While entered, the first Ctrl-C or SIGTERM only sets `requested`; a second Ctrl-C ends the process at once.

    A loop looks at `requested` where its state is whole, saves, and raises `Interrupted`. Outside of the main thread,
    where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.requested: int | None = None  # number of the signal
        self._before: dict[int, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a dataloader's worker, forked with this handler: Ctrl-C reaches it too
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number
        name = signal.Signals(number).name
        print(
            f"\n{name}: finishing the current step, then saving; press Ctrl-C (again) to end at once.", file=sys.stderr
        )


def resume_command(argv: Sequence[str] | None = None) -> str:
    """The shell command that continues the run of this process: the same one with ``--resume``."""
    words = list(sys.argv if argv is None else argv)
    if "--resume" not in words:
        words.append("--resume")
    return shlex.join(["python", *words])
