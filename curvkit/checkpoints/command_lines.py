"""What a message tells the reader to type: words that a shell would take apart are quoted."""

from __future__ import annotations

import shlex
from pathlib import Path


def command_line(*words: str | Path) -> str:
    """A command of curvkit as it is typed.

    Args:
        words: Command, options and paths. A path that begins like an option gets "./" before it.

    Returns:
        One line for a POSIX shell.

    Cost: none.

    Example:
        >>> command_line("sharpness", Path("my run/last.pt"), "--data", "val.txt")
        "curvkit sharpness 'my run/last.pt' --data val.txt"
    """
    return " ".join(("curvkit", *map(quoted, words)))


def weight_options(key: str | None, ema: bool) -> tuple[str, ...]:
    """The options that say which weights of a file are meant.

    Args:
        key: As of `read`.
        ema: Likewise.

    Returns:
        As they are typed, not yet quoted.

    Cost: none.

    Example:
        >>> weight_options("generator", False)
        ('--key', 'generator')
    """
    return (*(("--key", key) if key is not None else ()), *(("--ema",) if ema else ()))


def quoted(word: str | Path) -> str:
    """One word of a command as it is typed.

    Args:
        word: A path, or a text that is taken as it is.

    Returns:
        The word, quoted where it must be.

    Cost: none.

    Example:
        >>> quoted(Path("-a.pt")), quoted(Path("b.pt"))
        ('./-a.pt', 'b.pt')
    """
    text = f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)
    return shlex.quote(text)
