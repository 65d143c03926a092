"""Character-level text: a corpus that every CPython brings along, and its alphabet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument, MissingExtra


def topics_text() -> str:
    """Return Python's own language reference as `help()` shows it: half a million characters.

    It is English prose with Python programs and grammar in between.

    The topics are joined by newlines, in the sorted order of their keys. The text belongs to the running
    Python: from 3.10 to 3.13 it has 459 to 511 thousand characters, printable ASCII and nine typographic
    ones, and neither the text nor the alphabet is the same in all of them. A model trained on it needs its
    vocabulary and its calibration windows stored beside it.

    Returns:
        The text.

    Raises:
        MissingExtra: If this Python came without the module, or with one of another kind.

    Source: `pydoc_data.topics`, generated from the documentation of CPython (Python Software Foundation
    License).

    Example:
        >>> len(topics_text()) > 400_000
        True
    """
    try:
        from pydoc_data import topics  # here: some builds of Python leave it out, and it is half a megabyte

        entries: object = topics.topics
    except (ImportError, AttributeError) as error:
        entries = error
    if not isinstance(entries, dict) or not entries:
        raise MissingExtra(
            f"topics_text: pydoc_data.topics of this Python has no table of topics ({entries!r}). "
            "It is a part of CPython's standard library. "
            "Install the full standard library, or pass a text of your own to CharacterVocabulary.from_text."
        )
    table: dict[str, str] = entries
    return "\n".join(table[key] for key in sorted(table))


@dataclass(frozen=True)
class CharacterVocabulary:
    """A one-to-one map between characters and the numbers 0 to V - 1.

    Attributes:
        characters: The alphabet; character i has number i. Each occurs once, and is printable, a newline or a
            tab.

    Raises:
        InvalidArgument: If the alphabet is empty, repeats a character, or has one that does not print.

    Example:
        >>> vocabulary = CharacterVocabulary("abc")
        >>> vocabulary.decode(vocabulary.encode("cab"))
        'cab'
    """

    characters: str

    def __post_init__(self) -> None:
        """Check the alphabet.

        Raises:
            InvalidArgument: If it is empty, repeats a character, or has one that does not print.
        """
        unprintable = sorted(c for c in set(self.characters) if not (c.isprintable() or c in "\n\t"))
        if unprintable:
            raise InvalidArgument(
                f"CharacterVocabulary: {unprintable!r} do not print. Characters that print, newline and tab "
                "are allowed. Remove the others from the text, for example with str.translate."
            )
        if not self.characters or len(set(self.characters)) < len(self.characters):
            raise InvalidArgument(
                f"CharacterVocabulary: characters={self.characters!r} must hold at least one character, "
                "each once. For the alphabet of a text call CharacterVocabulary.from_text(text)."
            )

    @classmethod
    def from_text(cls, text: str) -> CharacterVocabulary:
        """Collect the characters of `text`, in the order of their code points.

        Args:
            text: Any text whose characters print; append an alphabet to it to have more than the text uses.

        Returns:
            The vocabulary.

        Raises:
            InvalidArgument: If the text is empty, or a character does not print.

        Example:
            >>> CharacterVocabulary.from_text("banana").characters
            'abn'
        """
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        """Return V, the number of characters."""
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """Number the characters of `text`.

        Args:
            text: A text over this alphabet.

        Returns:
            [len(text)] int64.

        Raises:
            InvalidArgument: If a character is not in the alphabet.

        Example:
            >>> CharacterVocabulary("abc").encode("cab")
            tensor([2, 0, 1])
        """
        numbers = {character: i for i, character in enumerate(self.characters)}
        unknown = sorted(set(text) - set(numbers))
        if unknown:
            raise InvalidArgument(
                f"CharacterVocabulary: {unknown!r} are not among the {len(self)} known characters; "
                f"the first is at position {min(map(text.index, unknown))}. "
                "Build the vocabulary from a text that has them, or replace them."
            )
        return torch.tensor([numbers[character] for character in text], dtype=torch.int64)

    def decode(self, tokens: Tensor | Iterable[int]) -> str:
        """Turn numbers back into a text.

        Args:
            tokens: Numbers in [0, V), in one dimension.

        Returns:
            The text.

        Raises:
            InvalidArgument: If a number lies outside [0, V).

        Example:
            >>> CharacterVocabulary("abc").decode([2, 0, 1])
            'cab'
        """
        numbers = [int(token) for token in tokens]
        outside = [number for number in numbers if not 0 <= number < len(self)]
        if outside:
            raise InvalidArgument(
                f"CharacterVocabulary: token {outside[0]} lies outside [0, {len(self)}). "
                "Tokens number the known characters. Decode with the vocabulary that encoded the text."
            )
        return "".join(self.characters[number] for number in numbers)
