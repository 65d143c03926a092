"""Work that does not say how far it is: its progress is guessed from the time that was expected."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator

from .output import Output
from .progress import ProgressLine, duration

TICK = 0.2
LONGEST = 0.95
"""The most that is said of a share that is only guessed."""


@contextlib.contextmanager
def expecting(title: str, work: str, seconds: float | None, output: Output) -> Generator[None]:
    """Draw a progress line while something is done that takes about so many seconds; None: nobody knows."""
    ended, began = threading.Event(), time.monotonic()

    def tick(progress: ProgressLine) -> None:
        while not ended.wait(TICK):
            _tell(progress, work, time.monotonic() - began, seconds)

    with ProgressLine(title, quiet=output.quiet, color=output.color) as progress:
        _tell(progress, work, 0.0, seconds)
        thread = threading.Thread(target=tick, args=(progress,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _tell(progress: ProgressLine, work: str, elapsed: float, seconds: float | None) -> None:
    """A share, and words; what takes longer than expected is said to."""
    if seconds is None:
        progress.update(0.0, work)
    elif elapsed >= seconds:
        progress.update(LONGEST, f"{work}, longer than the {duration(seconds)} expected", overdue=True)
    else:
        progress.update(min(elapsed / seconds, LONGEST), work)
