"""Ctrl-C during long products: the first stops after the product at hand, the second at once."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Generator
from types import FrameType

from .failures import say

PATIENCE = 1.0
"""Seconds after which a first Ctrl-C that has not yet had an effect is acknowledged."""
INTERRUPTED = 130
FRESH_LINE, SHOW_CURSOR = "\r\x1b[2K", "\x1b[?25h"
"""What empties the line of a terminal, which may show ^C or a progress bar, and what ends the hiding of its cursor."""


class Interrupted(Exception):
    """Ctrl-C ended a command that has nothing to show for it."""


class Watch:
    """The handler of SIGINT while a command runs: the first raises KeyboardInterrupt, the second ends the process."""

    def __init__(self) -> None:
        self.noticed = False
        self._ending = threading.Lock()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """What Python calls between two instructions of the main thread."""
        if self.noticed:
            self.end()
            return
        self.noticed = True
        raise KeyboardInterrupt

    def end(self) -> None:
        """End the process, from whichever thread sees the second Ctrl-C first."""
        if self._ending.acquire(blocking=False):
            fresh = SHOW_CURSOR + FRESH_LINE if sys.stderr.isatty() else ""
            os.write(2, f"{fresh}Interrupted.\n".encode())
            os._exit(INTERRUPTED)


@contextlib.contextmanager
def watched() -> Generator[None]:
    """Let the first Ctrl-C raise KeyboardInterrupt, and the second end the process at once, whatever is being done.

    Python calls a handler only between two instructions of the main thread, and a product is one instruction that can take minutes;
    a second Ctrl-C would have to wait as well. The number of each signal is written to a pipe at once, whatever the main thread
    does, and a thread at its other end counts.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # ignored, or watched already
        return
    watch = Watch()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, watch)
    threading.Thread(target=_count, args=(reader, watch), daemon=True).start()
    try:
        yield
    finally:  # after a Ctrl-C only the exit code is left to be handed over, which no other one should change
        signal.signal(signal.SIGINT, signal.SIG_IGN if watch.noticed else signal.default_int_handler)
        signal.set_wakeup_fd(before)
        os.close(writer)


def conclude(text: str) -> None:
    """Say how it ended, on a line of its own."""
    say((FRESH_LINE if sys.stderr.isatty() else "") + text)


def _count(reader: int, watch: Watch) -> None:
    """Read until the pipe is closed: say that the first was seen, end the process at the second."""
    seen, said = 0, False
    while True:
        waiting = seen > 0 and not said
        if waiting and not select.select([reader], [], [], PATIENCE)[0]:
            if not watch.noticed:
                say("Stopping after the product at hand; Ctrl-C again stops at once.")
            said = True
        received = os.read(reader, 16)
        if not received:
            os.close(reader)
            return
        seen += received.count(signal.SIGINT)
        if seen > 1:
            watch.end()
