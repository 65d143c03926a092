"""Progress on stderr: a bar on a terminal, a line per tenth elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

import click
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PATIENCE = 2.0
"""Off a terminal nothing is said of work that takes less than this many seconds."""

LONGEST_BAR, LEAST_BAR = 20, 8
"""Columns of the bar."""


def styled(color: str, *, stderr: bool = False) -> Console:
    """A console for --color: "always" wins over NO_COLOR, "never" writes no styles at all."""
    if color == "never":
        return Console(stderr=stderr, color_system=None, highlight=False)
    if color == "always":
        return Console(stderr=stderr, force_terminal=True, no_color=False, highlight=False)
    return Console(stderr=stderr, highlight=False)


class ProgressLine:
    """One piece of work whose share done is known or estimated; used as a context."""

    def __init__(self, title: str, *, quiet: bool, color: str = "auto") -> None:
        self._title, self._quiet = title, quiet
        self._began, self._tenth, self._share = time.monotonic(), 0, 0.0
        self._detail, self._left = "starting", ""
        self._live: Live | None = None
        if not quiet and sys.stderr.isatty():
            console = styled(color, stderr=True)
            self._live = Live(self, console=console, transient=True, refresh_per_second=10)

    def __enter__(self) -> Self:
        """Start drawing."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing, whatever happened."""
        if self._live is not None:
            self._live.stop()

    def update(self, share: float, detail: str, *, overdue: bool = False) -> None:
        """Say that a share of the work, in [0, 1], is done; it never moves back. Of what is overdue nobody knows what is left."""
        self._share, self._detail = max(self._share, min(share, 1.0)), detail
        elapsed = time.monotonic() - self._began
        known = 0.02 < self._share < 1.0 and not overdue
        self._left = f" · about {duration(elapsed * (1 - self._share) / self._share)} left" if known else ""
        if self._live is None and not self._quiet and elapsed > PATIENCE and int(self._share * 10) > self._tenth:
            self._tenth = int(self._share * 10)
            click.echo(f"{self._title} {self._share:.0%} · {detail}{self._left}", err=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line, whatever the width: where room is missing the bar goes first, then the time left, then the detail."""
        room = options.max_width - 1  # the last column stays free: some terminals wrap when it is written
        spent = duration(time.monotonic() - self._began)  # as long as nothing can be said of what is left
        told, done = self._detail + (self._left or f" · {spent}"), f"{self._share:.0%}"
        for text, barred in ((told, True), (told, False), (self._detail, False), (done, True)):
            rest = room - len(self._title) - len(text) - 2
            if barred and rest >= LEAST_BAR:
                yield self._line(min(rest, LONGEST_BAR), text)
                return
            if not barred and rest >= len(done):
                yield Text(f"{self._title} {done} {text}", no_wrap=True)
                return
        yield Text(next((text for text in (f"{self._title} {done}", done) if len(text) <= room), ""), no_wrap=True)

    def _line(self, columns: int, text: str) -> Table:
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row(
            self._title, ProgressBar(total=1.0, completed=self._share, width=columns), Text(text, no_wrap=True)
        )
        return grid


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 product, 2 products."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float) -> str:
    """A time for people: 0.4 s, 12 s, 3 min, 2.1 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
