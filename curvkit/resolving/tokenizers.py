"""The tokenizer that lies beside the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvkit.checkpoints.confined import confined
from curvkit.checkpoints.documents import document
from curvkit.checkpoints.needs import tokenizer_place
from curvkit.checkpoints.printable import printable
from curvkit.checkpoints.trust import NeedsTrust, Trust
from curvkit.errors import RefusedCheckpoint, UnknownObjective
from curvkit.resolving.configurations import plain, refuse_unbuildable
from curvkit.resolving.transformers_library import library, quietly, reason_of

CONFIG, TEMPLATES = "tokenizer_config.json", "additional_chat_templates"
SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".bpe", ".vocab")
OF_TOKENIZERS = ("token", "vocab", "merges", "spiece", "sentencepiece", "tekken", "template", "config", "bpe", "codes")
"""Parts of the names of files that tokenizers of transformers open."""
NOT_OPENED = ("special_tokens_map_file", "tokenizer_config_file", "name_or_file")
"""Entries of old configurations that say where a file lay once; nothing opens it."""


@dataclass(frozen=True, eq=False)
class DirectoryTokenizer:
    """A tokenizer that lies beside the weights."""

    wrapped: Any
    place: Path
    """Its directory, for messages."""

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

        Raises:
            UnknownObjective: If it fails, as one with damaged files may at any text.
        """
        with _said(self.place, "cannot make tokens of a text"):
            return list(self.wrapped(text, add_special_tokens=False, verbose=False)["input_ids"])


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
        RefusedCheckpoint: If one of its files lies outside of the directory.
        NeedsTrust: If it is code, and is not trusted.
    """
    place = tokenizer_place(places)
    if place is None:
        return None
    transformers = library()
    _check_files(place)
    with quietly(), _said(place, "cannot be loaded"):
        known = {} if trust.everything else _configuration(transformers, place)
        wrapped = transformers.AutoTokenizer.from_pretrained(
            str(place.resolve()), local_files_only=True, trust_remote_code=trust.everything, **known
        )
    found = DirectoryTokenizer(wrapped, place)
    largest = max(found.encode("The quick brown fox, 1 2 3."), default=-1)
    if not 0 <= largest < vocabulary:
        what = "makes no tokens of a text" if largest < 0 else f"has the token {largest}"
        raise UnknownObjective(
            f"{place}: its tokenizer {what}, and the model's vocabulary is 0 to {vocabulary - 1}: they do not belong together. "
            "Copy the files of the tokenizer that the model was trained with, or pass ids of tokens as a .bin file."
        )
    return found


def _check_files(place: Path) -> None:
    """Every file that transformers may open lies in the directory, and so does every file that its configuration names."""
    inside = [entry.name for entry in place.iterdir() if entry.suffix in SUFFIXES and not entry.is_dir()]
    templates = place / TEMPLATES
    inside += [f"{TEMPLATES}/{entry.name}" for entry in templates.glob("*.jinja")] if templates.is_dir() else []
    for name in inside:
        if any(sign in name for sign in OF_TOKENIZERS):
            confined(place, name, source=str(place))
    if not (place / CONFIG).exists():
        return
    described = document(confined(place, CONFIG, source=str(place)))
    for key, value in described.items():
        named = value if isinstance(value, list) else [value]
        if (key.endswith("_file") and key not in NOT_OPENED) or key == "fast_tokenizer_files":
            for name in (name for name in named if isinstance(name, str) and name):
                confined(place, name, source=f"{place / CONFIG}: {key}")


def _configuration(transformers: Any, place: Path) -> dict[str, Any]:
    """The configuration of the model beside it, without what would run or fetch something; transformers would read it anew."""
    if not (place / "config.json").exists():
        return {}
    described = document(confined(place, "config.json", source=str(place)))
    refuse_unbuildable(f"{place}: config.json", {**described, "model_type": None}, {})
    kind = described.get("model_type")
    known = isinstance(kind, str) and kind in transformers.CONFIG_MAPPING
    config = transformers.CONFIG_MAPPING[kind].from_dict(plain(described)) if known else transformers.PreTrainedConfig()
    config.name_or_path = str(place)
    return {"config": config}


@contextlib.contextmanager
def _said(place: Path, what: str) -> Generator[None]:
    """Turn whatever tokenizers and transformers raise for damaged files into an error that says what to do."""
    try:
        yield
    except RefusedCheckpoint:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust, when it gives up
            raise
        if "trust_remote_code" in str(error):
            raise NeedsTrust(
                f"{place}: its tokenizer is Python code in the directory, which would be imported (auto_map in tokenizer_config.json). "
                "Nothing was executed. If you believe it, pass --trust; else pass ids of tokens as a .bin file."
            ) from error
        fault = f"an entry {error} is missing in its files" if isinstance(error, KeyError) else reason_of(error)
        raise UnknownObjective(
            f"{place}: its tokenizer {what} ({printable(fault)}). Save it again with tokenizer.save_pretrained, or pass ids of tokens "
            "as a .bin file."
        ) from error
