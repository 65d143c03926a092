"""Progress on stderr: a bar on a terminal, a line per tenth elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

PATIENCE = 2.0
"""Off a terminal nothing is said of work that takes less than this many seconds."""


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
        self._bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            console = styled(color, stderr=True)
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(title, total=1.0, detail="")

    def __enter__(self) -> Self:
        """Start drawing."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing, whatever happened."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, share: float, detail: str) -> None:
        """Say that a share of the work, in [0, 1], is done; it never moves back."""
        self._share = max(self._share, min(share, 1.0))
        elapsed = time.monotonic() - self._began
        left = elapsed * (1 - self._share) / self._share if self._share > 0.02 else None
        detail = f"{detail} · about {duration(left)} left" if left is not None and self._share < 1.0 else detail
        if self._bar is not None:
            self._bar.update(self._task, completed=self._share, detail=detail)
        elif not self._quiet and elapsed > PATIENCE and int(self._share * 10) > self._tenth:
            self._tenth = int(self._share * 10)
            click.echo(f"{self._title} {self._share:.0%} · {detail}", err=True)


def duration(seconds: float) -> str:
    """A time for people: 0.4 s, 12 s, 3 min, 2.1 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
