"""Run a tool in several processes: python tools/launch.py --processes N [--nnodes N --node-rank I --master-addr H
--master-port P] tools/train.py CONFIG ... (tools/dist_*.sh and pipelines call this).

Each process gets the variables that torchrun sets, and ``--launcher pytorch``. Torchrun itself is not used, because it
ends a run that is being stopped after 30 seconds and adds a traceback to every end. Here a signal is passed on, and the
processes take the time that they need to save; a second Ctrl-C ends them at once. When one fails, the others are ended,
and the status is that of the first that failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 5.0  # seconds that the others have to say what they lost, when one that is not the first has failed
KILL_AFTER = 30.0  # seconds from then to SIGKILL: a process that waits within NCCL does not see SIGTERM


class Group:
    """The processes of a run on this machine.

    Args:
        command: the program.
        envs: the environment of each process; the first of the run has RANK 0.
    """

    def __init__(self, command: Sequence[str], envs: Sequence[dict[str, str]]) -> None:
        self.signum: int | None = None  # the signal that was passed on
        self.children: list[subprocess.Popen[bytes]] = []
        self.has_first = envs[0]["RANK"] == "0"
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # else: nohup
                signal.signal(number, self._pass_on)
        for env in envs:  # in sessions of their own: a terminal's Ctrl-C reaches them once, through this process
            self.children.append(subprocess.Popen(command, env=env, start_new_session=True))
            if self.signum is not None:
                self._send(self.signum)  # it came while they were started

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.signum = number
        self._send(number)

    def _send(self, number: int) -> None:
        for child in self.children:
            child.send_signal(number)  # nothing, where it has ended

    def wait(self) -> int:
        """Wait for all; returns 0, or the status of the first that failed (of several at once, the lowest number)."""
        failed: tuple[int, int] | None = None  # number, return code
        since = 0.0
        terminated = False
        while any(child.poll() is None for child in self.children):
            time.sleep(0.05)
            failed = failed or self._failed()
            if failed is None:
                continue
            since = since or time.monotonic()
            passed = time.monotonic() - since
            patience = 0.0 if self.has_first and failed[0] == 0 else PATIENCE
            if passed > patience and not terminated and self.signum is None:
                terminated = True
                self._send(signal.SIGTERM)
            if passed > patience + KILL_AFTER:
                self._send(signal.SIGKILL)
        failed = failed or self._failed()
        if failed is None:
            return 0
        number, code = failed
        if code < 0 and self.signum is None:
            rank = number if self.has_first else f"{number} of this machine"
            hint = ": memory may have run out" if -code == signal.SIGKILL else ""
            text = f"error: process {rank} was ended by {signal.Signals(-code).name}{hint}"
            print(f"{text}; what was saved before is whole", file=sys.stderr)
        return 128 - code if code < 0 else code

    def _failed(self) -> tuple[int, int] | None:
        codes = ((number, child.poll()) for number, child in enumerate(self.children))
        return next(((number, code) for number, code in codes if code), None)


def environments(args: argparse.Namespace, argv: Sequence[str]) -> list[dict[str, str]]:
    """The variables of each process of this machine."""
    count, total = args.processes, args.processes * args.nnodes
    shared = {
        **os.environ,
        "WORLD_SIZE": str(total),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": args.master_addr,
        "MASTER_PORT": str(args.master_port or free_port()),
    }
    shared.setdefault("OMP_NUM_THREADS", "1")
    shared.setdefault("PRUNET_COMMAND", shlex.join(["python", sys.argv[0], *argv]))  # what the tools' messages repeat
    first = args.node_rank * count
    return [{**shared, "RANK": str(first + number), "LOCAL_RANK": str(number)} for number in range(count)]


def free_port() -> int:
    """A port of this machine that nobody listens on, so that two runs do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes and wait for them."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="on this machine; one for each GPU")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="machines")
    parser.add_argument("--node-rank", type=int, default=0, metavar="I", help="which of them this is, from 0")
    parser.add_argument("--master-addr", default="127.0.0.1", metavar="HOST", help="name or address of the first")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="default: a free one, on one machine")
    parser.add_argument("tool", metavar="TOOL", help="tools/train.py, tools/test.py or tools/search.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    args = parser.parse_args(argv)
    if args.processes < 1 or not 0 <= args.node_rank < args.nnodes:
        parser.error(
            "--processes and --nnodes are numbers from 1 on, --node-rank one from 0 to --nnodes - 1; "
            f"got {args.processes}, {args.nnodes}, {args.node_rank}"
        )
    if args.nnodes > 1 and args.master_port is None:
        parser.error("several machines need the same --master-port on each")
    command = [sys.executable, args.tool, *args.arguments, "--launcher", "pytorch"]
    return Group(command, environments(args, argv)).wait()


if __name__ == "__main__":
    sys.exit(main())
