"""How a tool without MMEngine ends: 0; 2 and one line for what a user can mend; 130 or 143 on Ctrl-C or SIGTERM."""

from __future__ import annotations

import errno
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
    try:
        status = main(argv) or 0
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        print(f"\n{stopped}", file=sys.stderr)
        status = 128 + (signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT)
    except PrunetError as error:
        print(f"error: {error}", file=sys.stderr)
        status = USER_ERROR
    except OSError as error:
        if error.errno not in _FULL:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        print(f"error: the disk is full{where}; free some space or choose another folder.", file=sys.stderr)
        status = USER_ERROR
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)
    sys.exit(status)
