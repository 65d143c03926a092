"""What the user asks for, besides the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from curvkit.checkpoints.trust import NOTHING, Trust
from curvkit.errors import InvalidArgument
from curvkit.resolving.config import Config


@dataclass(frozen=True)
class TextData:
    """Text, or ids of tokens, on which a language model is measured.

    Args:
        path: A .txt or .jsonl file, a .bin file of nanoGPT (uint16), or a directory of `datasets.save_to_disk`.
        seq_len: T, tokens in one window; None takes 128, or the model's context if that is shorter.
        tokens: How many tokens are predicted at most; None takes 8 windows.
        split: Of a directory with several.

    Raises:
        InvalidArgument: If a number is not positive.

    Example:
        >>> TextData(Path("val.txt"), seq_len=64).seq_len
        64
    """

    path: Path
    seq_len: int | None = None
    tokens: int | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        """Check the numbers; nothing is opened yet."""
        if self.seq_len is not None and self.seq_len < 1:
            raise InvalidArgument(f"--seq-len {self.seq_len}: must be at least 1; it is the tokens in one window.")
        if self.tokens is not None and self.tokens < 1:
            raise InvalidArgument(f"--tokens {self.tokens}: must be at least 1; it is how many tokens are predicted.")


@dataclass(frozen=True)
class Request:
    """What the command line, or a program, says about the objective.

    Args:
        objective: "file.py:function" or "module:function".
        settings: Keyword arguments of that function, as text.
        num_batches: Take only the first batches of the data.
        data: For language models.
        config: The user's configuration, if there is one.
        trust: What the checkpoint may do; from the command line alone.
        demo_data: Measure on text that comes with Python instead of the user's data.
        seq_len: As of `TextData`, for `demo_data`.
        tokens: Likewise.

    Raises:
        InvalidArgument: If both `data` and `demo_data` are given.

    Example:
        >>> Request(objective="train.py:objective").trust.anything
        False
    """

    objective: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    num_batches: int | None = None
    data: TextData | None = None
    config: Config | None = None
    trust: Trust = NOTHING
    demo_data: bool = False
    seq_len: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        """Check that one thing is asked for."""
        if self.data is not None and self.demo_data:
            raise InvalidArgument("--data and --demo-data: the one is your data, the other is not. Pass one of them.")

    @property
    def names_data(self) -> bool:
        """Whether the user says what a language model is measured on."""
        return self.data is not None or self.demo_data
