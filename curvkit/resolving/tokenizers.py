"""The tokenizer that lies beside the weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvkit.checkpoints.trust import Trust
from curvkit.errors import UnknownObjective
from curvkit.resolving.transformers_library import library, quietly, reason_of

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""A directory without any of them has no tokenizer."""


@dataclass(frozen=True, eq=False)
class DirectoryTokenizer:
    """A tokenizer that lies beside the weights."""

    wrapped: Any

    @property
    def separator(self) -> int | None:
        """The id between documents."""
        return self.wrapped.eos_token_id if self.wrapped.eos_token_id is not None else self.wrapped.sep_token_id

    @property
    def mask(self) -> int | None:
        """The id of a masked position."""
        return self.wrapped.mask_token_id

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around it.

        Args:
            text: Of any length.

        Returns:
            The ids.
        """
        return list(self.wrapped(text, add_special_tokens=False, verbose=False)["input_ids"])


def tokenizer_place(places: Iterable[Path]) -> Path | None:
    """The first directory that has a tokenizer.

    Args:
        places: Directories.

    Returns:
        It, or None.
    """
    return next((place for place in places if any((place / name).is_file() for name in TOKENIZER_FILES)), None)


def load_tokenizer(places: Iterable[Path], *, vocabulary: int, trust: Trust) -> DirectoryTokenizer | None:
    """Load the tokenizer of the first directory that has one.

    Args:
        places: Directories.
        vocabulary: V of the model.
        trust: If everything is trusted, a tokenizer may bring code of its own.

    Returns:
        The tokenizer; None if there is none.

    Raises:
        UnknownObjective: If it cannot be loaded, or has ids that the model has not.
    """
    place = tokenizer_place(places)
    if place is None:
        return None
    transformers = library()
    with quietly():
        try:
            wrapped = transformers.AutoTokenizer.from_pretrained(
                str(place.resolve()), local_files_only=True, trust_remote_code=trust.everything
            )
        except Exception as error:  # whatever tokenizers and transformers raise for damaged files
            raise UnknownObjective(
                f"{place}: its tokenizer cannot be loaded ({reason_of(error)}). Save it again with tokenizer.save_pretrained, or pass ids "
                "of tokens as a .bin file."
            ) from error
    found = DirectoryTokenizer(wrapped)
    largest = max(found.encode("The quick brown fox, 1 2 3."), default=-1)
    if not 0 <= largest < vocabulary:
        what = "makes no tokens of a text" if largest < 0 else f"has the token {largest}"
        raise UnknownObjective(
            f"{place}: its tokenizer {what}, and the model's vocabulary is 0 to {vocabulary - 1}: they do not belong together. "
            "Copy the files of the tokenizer that the model was trained with, or pass ids of tokens as a .bin file."
        )
    return found
