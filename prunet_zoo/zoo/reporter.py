"""What a download tells its user, on standard error: messages, and progress with rate and time left."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

EVERY = 10.0  # seconds between lines where there is no terminal
_LOG = logging.getLogger(__name__)


class Reporter:
    """Prints to standard error; with ``show=False`` messages go to the log (level INFO) and there is no progress."""

    def __init__(self, show: bool = True) -> None:
        self.show = show
        self._console = Console(stderr=True)

    def say(self, text: str) -> None:
        """One message, on a line of its own whatever its length."""
        if self.show:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            _LOG.info(text)

    @contextmanager
    def transfer(self, title: str) -> Iterator[Callable[[int, int | None], None]]:
        """Show a transfer; yields what takes the bytes that are there and all bytes (None: not known)."""
        if not self.show:
            yield lambda done, total: None
        elif self._console.is_terminal:
            with self._bar(title) as update:
                yield update
        else:
            lines = _Lines(title, self.say)
            yield lines.update

    @contextmanager
    def _bar(self, title: str) -> Iterator[Callable[[int, int | None], None]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(title, total=None)
            shown = -1

            def update(done: int, total: int | None) -> None:
                nonlocal shown
                if shown < 0 or done < shown:  # a new try: what was there before does not count for the rate
                    progress.reset(task, total=total, completed=done)
                progress.update(task, completed=done, total=total)
                shown = done

            yield update


class _Lines:
    """Progress as a line every ten seconds."""

    def __init__(self, title: str, say: Callable[[str], None]) -> None:
        self.title, self.say = title, say
        self.first: tuple[float, int] | None = None  # time and bytes at the beginning of this try
        self.last_line = self.last = 0.0

    def update(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if self.first is None or done < self.last:
            self.first, self.last_line = (now, done), now
        self.last = done
        if now - self.last_line >= EVERY:
            self.last_line = now
            self.say(self.describe(done, total, now))

    def describe(self, done: int, total: int | None, now: float) -> str:
        """For example "x.zip: 45.2 of 90.4 MB (50%), 4.5 MB/s, 10 s left"."""
        began, before = self.first or (now, done)
        rate = (done - before) / max(now - began, 1e-9)
        if total is None:
            return f"{self.title}: {done / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s"
        left = f"{(total - done) / rate:.0f} s left" if rate > 0 else "stalled"
        share = f"({done / max(total, 1):.0%})"
        return f"{self.title}: {done / 1e6:.1f} of {total / 1e6:.1f} MB {share}, {rate / 1e6:.1f} MB/s, {left}"
