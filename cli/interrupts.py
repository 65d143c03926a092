"""Ctrl-C during long products: the first stops after the product at hand, the second at once."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Generator

from .failures import say

PATIENCE = 1.0
"""Seconds after which a first Ctrl-C that has not yet had an effect is acknowledged."""
INTERRUPTED = 130


@contextlib.contextmanager
def watched() -> Generator[None]:
    """Watch for Ctrl-C from a thread of its own.

    Python raises KeyboardInterrupt only between two instructions of the main thread, and a product is one instruction that can take
    minutes; a second Ctrl-C would have to wait as well. The number of each signal is written to a pipe at once, whatever the main
    thread does, and the thread at its other end counts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_count, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def _count(reader: int) -> None:
    """Read until the pipe is closed: say that the first was seen, end the process at the second."""
    seen, said = 0, False
    while True:
        waiting = seen > 0 and not said
        if waiting and not select.select([reader], [], [], PATIENCE)[0]:
            say("Stopping after the product at hand; Ctrl-C again stops at once.")
            said = True
        received = os.read(reader, 16)
        if not received:
            os.close(reader)
            return
        seen += received.count(signal.SIGINT)
        if seen > 1:
            show_cursor = b"\x1b[?25h" if sys.stderr.isatty() else b""
            os.write(2, show_cursor + b"\nInterrupted.\n")
            os._exit(INTERRUPTED)
