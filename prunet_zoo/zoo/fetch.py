"""Fetch one file from the first of several addresses that gives it: retried, continued, checked, then installed.

The target is the right file or absent. Bytes arrive in ``<target>.part``, which stays after an interruption or a full
disk, so that the next call goes on from there; only what passed every check gets the target's name.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from prunet_zoo.errors import CheckpointError, PrunetError
from prunet_zoo.files import sha256_of
from prunet_zoo.zoo.partial import Part
from prunet_zoo.zoo.reporter import Reporter
from prunet_zoo.zoo.transfer import Failed, Meter, Refused, Stopped, Want, disk_message, receive, shown

_JITTER = random.SystemRandom()  # not the generator that a user seeds


class DownloadError(PrunetError, OSError):
    """A file could not be fetched; every address is named with its reason. Nothing was installed."""


class ChecksumError(DownloadError):
    """An address gave a file, but not the one whose sha256 is known."""


class DiskError(DownloadError):
    """The disk is full or the folder cannot be written; what arrived is kept."""


@dataclass(frozen=True)
class Retry:
    """How long one address is tried, in seconds where it is a time.

    A try counts only when less than ``progress`` bytes arrived since the one before. The wait doubles from ``base`` up
    to ``cap``, times a random factor from 0.5 to 1.5; Retry-After is obeyed up to ``longest``.
    """

    tries: int = 6
    base: float = 1.0
    cap: float = 30.0
    longest: float = 120.0
    progress: int = 1 << 20
    timeout: float = 30.0  # without a byte

    def wait(self, failures: int) -> float:
        """Seconds after the n-th failure in a row."""
        return float(min(self.cap, self.base * 2 ** (failures - 1)) * _JITTER.uniform(0.5, 1.5))


RETRY = Retry()


@dataclass(frozen=True)
class Fetched:
    """A file that was installed: its sha256, its length in bytes, and the address it came from."""

    path: Path
    sha256: str
    size: int
    url: str


class _WrongHash(Refused):
    pass


@dataclass(frozen=True)
class Verify:
    """What a complete part must be; see `fetch`."""

    want: Want
    check: Callable[[Path], None] | None
    same: Callable[[Path], bool] | None

    def __call__(self, part: Part, resumed: bool) -> str:
        """sha256 of the part. A wrong one is discarded; one that was continued may be a mixture: begin anew."""
        digest = sha256_of(part.path)
        reason = self._fault(part, digest)
        if reason is None:
            return digest
        part.discard()
        if resumed:
            raise Failed(f"{reason}; it had been continued, beginning anew")
        raise reason

    def _fault(self, part: Part, digest: str) -> Refused | None:
        try:
            if self.want.sha256 not in (None, digest) and not (self.same is not None and self.same(part.path)):
                return _WrongHash(f"gave a file with sha256 {digest}, expected {self.want.sha256}")
            if self.check is not None:
                self.check(part.path)
        except CheckpointError as error:
            return Refused(f"gave a file that is not these weights: {error}")
        return None


def fetch(
    urls: Sequence[str],
    target: str | Path,
    *,
    sha256: str | None = None,
    reserve: int = 0,
    check: Callable[[Path], None] | None = None,
    same: Callable[[Path], bool] | None = None,
    retry: Retry | None = None,
    reporter: Reporter | None = None,
) -> Fetched:
    """Fetch ``target`` from the first address that gives the right file; hold `exclusive` for it meanwhile.

    Args:
        urls: http, https and file addresses or paths, in order of preference.
        target: the file to make; what stands there is replaced at the end, at once.
        sha256: 64 hex digits that the file must have.
        reserve: bytes that the disk must hold besides.
        check: called with the complete file before it is installed; `CheckpointError` refuses it and the next address
            is asked.
        same: called with a complete file that has another ``sha256``; True: it holds the same all the same.
        retry: patience; `RETRY` by default.
        reporter: where progress goes; nowhere by default.

    Raises:
        ChecksumError: an address gave another file than ``sha256`` says, and none gave the right one.
        DiskError: the disk is full or cannot be written; the part is kept.
        DownloadError: no address gave it.
    """
    retry, reporter = retry or RETRY, reporter or Reporter(show=False)
    part, want = Part(Path(target)), Want(sha256, reserve)
    verify = Verify(want, check, same)
    refusals: list[tuple[str, Refused]] = []
    for number, url in enumerate(urls, 1):
        try:
            part.target.parent.mkdir(parents=True, exist_ok=True)
            with reporter.transfer(part.target.name) as meter:
                digest = _persist(url, part, verify, retry, meter, reporter)
            length = part.size
            part.install()
            return Fetched(part.target, digest, length, shown(url))
        except Refused as error:
            if number < len(urls):
                reporter.say(f"{shown(url)}: {error}; asking the next address")
            refusals.append((shown(url), error))
        except Stopped as error:
            raise DiskError(f"{part.target.name} was not downloaded: {error}") from error
        except PrunetError:
            raise
        except OSError as error:  # the folder or the part cannot be written
            raise DiskError(f"{part.target.name} was not downloaded: {disk_message(error, part)}") from error
    kind = ChecksumError if any(isinstance(error, _WrongHash) for _, error in refusals) else DownloadError
    tried = "".join(f"\n  {url}: {error}" for url, error in refusals)
    raise kind(f"{part.target.name} was not downloaded; tried:{tried}")


def _persist(url: str, part: Part, verify: Verify, retry: Retry, meter: Meter, reporter: Reporter) -> str:
    """Try one address until the part is the right file; returns its sha256."""
    failures, most = 0, part.size
    while True:
        try:
            start = receive(url, part, verify.want, retry.timeout, meter)
            return verify(part, resumed=start > 0)
        except Failed as error:
            if part.size >= most + retry.progress:
                failures, most = 0, part.size
            failures += 1
            if failures >= retry.tries:
                raise Refused(f"{error} ({failures} tries)") from None
            if error.wait is not None and error.wait > retry.longest:
                raise Refused(f"{error}; asks to come back in {error.wait:.0f} s") from None
            seconds = retry.wait(failures) if error.wait is None else error.wait
            reporter.say(f"{shown(url)}: {error}; trying again in {seconds:.0f} s")
            time.sleep(seconds)


@contextmanager
def exclusive(target: Path, reporter: Reporter) -> Iterator[None]:
    """Hold ``<target>.lock``: of several processes that want the same file one works, the others wait for it.

    The lock is the operating system's, so one that a killed process held is free.

    Raises:
        DiskError: the folder cannot be written, or its file system has no locks.
    """
    path = target.with_name(target.name + ".lock")
    lock = FileLock(str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            reporter.say(f"another process is bringing {target.name}; waiting until it has done so ({path})")
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DiskError(
            f"cannot write to {path.parent}: {reason}. Name another folder for weights by $PRUNET_HOME"
        ) from error
    try:
        yield
    finally:
        lock.release()
