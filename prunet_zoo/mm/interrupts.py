"""Ctrl-C and SIGTERM: a run finishes its step, saves, says how to go on, and ends with status 130 or 143."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

COMMAND = "PRUNET_COMMAND"  # the scripts in tools/ that start several processes say here how they were called
_RANKS = {"slurm": "SLURM_PROCID", "mpi": "OMPI_COMM_WORLD_RANK"}  # where a launcher other than torchrun tells it
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
        if os.getpid() != self._pid:  # a dataloader's worker, forked with this handler
            # a signal to the whole group reaches it too, while the step that is to be finished still needs it; a
            # second SIGTERM is the end of the loader
            if number == signal.SIGTERM and self.requested is not None:
                os._exit(0)
            self.requested = number
            return
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number
        name = signal.Signals(number).name
        if is_first():
            text = f"\n{name}: finishing the current step, then saving; press Ctrl-C (again) to end at once."
            print(text, file=sys.stderr)


def calm_workers(loader: Any) -> None:
    """Let the workers of a ``DataLoader`` outlive a SIGTERM to the whole process group (Slurm, systemd, timeout).

    torch gives workers a handler of its own, which ends them, and the step that is to be finished with them. The one
    that they inherited from `StopSignals` is put back.
    """
    loader.worker_init_fn = functools.partial(_start_calmly, loader.worker_init_fn)


def _start_calmly(inner: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    if inner is not None:
        inner(worker)


class _PassOn(StopSignals):
    """Notes signals while a child runs and passes SIGTERM on to it; Ctrl-C reaches the whole group of a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.child: subprocess.Popen[str] | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        self.requested = number
        if number == signal.SIGTERM and self.child is not None:
            self.child.send_signal(number)


def run_child(
    command: Sequence[str], cwd: Path, capture: bool = False, env: Mapping[str, str] | None = None
) -> tuple[int, str, int | None]:
    """Run a program to its end; Ctrl-C and SIGTERM leave it the time to save.

    Args:
        command: the program and its arguments.
        cwd: where it runs.
        capture: return what it writes to stdout instead of showing it.
        env: its environment; None: this process's.

    Returns:
        Its exit status, the captured output, and the number of the signal that it, or this process, was stopped by;
        None without one.
    """
    signals = _PassOn()
    with signals:
        stdout = subprocess.PIPE if capture else None
        child = subprocess.Popen(command, cwd=cwd, stdout=stdout, text=True, env=env)
        signals.child = child
        if signals.requested == signal.SIGTERM:  # it came before there was a child to pass it on to
            child.send_signal(signal.SIGTERM)
        output = child.communicate()[0] or ""
    status = child.returncode
    own = {code: number for number in _SIGNALS for code in (-number, 128 + number)}.get(status)
    return status, output, signals.requested or own


def resume_command(argv: Sequence[str] | None = None, resumable: bool = True, drop: Sequence[str] = ()) -> str:
    """The shell command that continues the run of this process: the same one with ``--resume``.

    Args:
        argv: script and arguments; None: this process's.
        resumable: whether the tool has ``--resume``; without it the command is repeated as it was.
        drop: options (without value) that are left out, because they would begin anew.
    """
    words = [word for word in (own_command() if argv is None else [_python(), *argv]) if word not in drop]
    if resumable and "--resume" not in words:
        words.append("--resume")
    return shlex.join(words)


def own_command(python: str | None = None) -> list[str]:
    """The words of the command that started this run; of several processes, that of the script in tools/ or torchrun.

    Args:
        python: what to write for the interpreter; None: what the shell finds it under.
    """
    python = _python() if python is None else python
    if COMMAND in os.environ:
        return shlex.split(os.environ[COMMAND])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        count = os.environ.get("LOCAL_WORLD_SIZE", "1")
        return [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count, *sys.argv]
    return [python, *sys.argv]


def is_first() -> bool:
    """Whether this process speaks for its run: the first one, or the only one; also before they know each other."""
    return rank() == 0


def rank() -> int:
    """The number of this process among those that a launcher started; 0 where none did."""
    told = os.environ.get("RANK")
    if told is None:  # one that looks like it need not belong to a run: srun may start two that know nothing of it
        words = " ".join(sys.argv).replace("=", " ").split()
        launcher = words[words.index("--launcher") + 1 :][:1] if "--launcher" in words else []
        told = next((os.environ.get(_RANKS[name]) for name in launcher if name in _RANKS), None)
    return int(told) if told and told.isdecimal() else 0


def _python() -> str:
    """``python`` where the shell finds this environment's under that name, else this interpreter's path."""
    found = shutil.which("python")
    same = found is not None and Path(found).absolute().parent == Path(sys.executable).absolute().parent
    return "python" if same else sys.executable
