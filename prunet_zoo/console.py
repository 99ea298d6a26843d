"""How a tool without MMEngine ends: 0; 2 and one line for what a user can mend; 130 or 143 on Ctrl-C or SIGTERM.

A reader of its output who goes away (``| head``) ends it quietly, with 0.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from prunet_zoo.errors import PrunetError

USER_ERROR = 2
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, so that temporary files are removed on the way out."""


def run_plain_tool(
    main: Callable[[Sequence[str] | None], int | None],
    argv: Sequence[str] | None = None,
    stopped: str = "stopped; nothing was left behind",
) -> NoReturn:
    """Run a tool's ``main(argv)`` and exit with its status.

    Errors of the program itself keep their traceback.

    Args:
        main: the tool.
        argv: its arguments; None: this process's.
        stopped: what is printed when a signal ended it: what is on the disk now, how to go on.
    """

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
        raise _Terminated

    is_main = threading.current_thread() is threading.main_thread()  # handlers can be set nowhere else
    before = signal.signal(signal.SIGTERM, terminate) if is_main else None
    status = 0
    try:
        status = main(argv) or 0
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        print(f"\n{stopped}", file=sys.stderr)
        status = 128 + (signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT)
    except PrunetError as error:
        print(f"error: {error}", file=sys.stderr)
        status = USER_ERROR
    except BrokenPipeError:  # `| head`: the reader has seen what it wanted; nothing can be flushed at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        message = full_disk(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        status = USER_ERROR
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)
    sys.exit(status)


def full_disk(error: BaseException) -> str | None:
    """What to tell the user where the disk is full; None: the error is another."""
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return None
    where = f" while writing {error.filename}" if error.filename else ""
    return f"the disk is full{where}; free some space or choose another folder."
