"""What a checkpoint still needs before it can be measured: nothing, a text, ids of tokens, or a function that makes its objective."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from curvkit.checkpoints.command_lines import command_line

Need = Literal["nothing", "text", "ids", "tokenizer", "merging", "objective"]
"""`tokenizer`: a masked model without one, whose mask nothing says. `merging`: an adapter on a base that is no language model."""

CAUSAL, MASKED = ("ForCausalLM", "LMHeadModel"), ("ForMaskedLM",)
LANGUAGE_MODELS = (*CAUSAL, *MASKED)
"""How the classes of transformers end that are measured on a text, without any code."""
NANOGPT_SIZES = ("n_layer", "n_head", "n_embd", "block_size")
"""What `model_args` of nanoGPT must say for its model to be built."""
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


def need(
    kind: str,
    config: Mapping[str, Any] | None,
    *,
    recipe: bool = False,
    base: Mapping[str, Any] | None = None,
    places: Iterable[Path] = (),
) -> Need:
    """What is missing, as far as headers and configurations say it.

    Args:
        kind: As of `Checkpoint.kind`.
        config: What the checkpoint says of its model.
        recipe: Whether it has a recipe.
        base: Of an adapter: the configuration of its base model.
        places: Directories that may have its tokenizer.

    Returns:
        What the user brings.

    Cost: a few look-ups in the file system; no package of models is imported.

    Example:
        >>> need("Hugging Face directory", {"architectures": ["GPT2LMHeadModel"]}), need("state dict", None)
        ('ids', 'objective')
    """
    if recipe:
        return "nothing"
    name = language_model(kind, config if base is None else base)
    if name is None:
        return "objective" if base is None else "merging"
    if tokenizer_place(places) is not None:
        return "text"
    return "tokenizer" if name.endswith(MASKED) else "ids"


def next_step(path: Path, found: Need, *chosen: str) -> str:
    """What to type for a checkpoint that needs that.

    Args:
        path: Of the checkpoint.
        found: As of `need`.
        chosen: Options that say which weights are meant.

    Returns:
        A command, or what to do before it.

    Example:
        >>> next_step(Path("ckpt.pt"), "ids", "--ema")
        'curvkit sharpness ckpt.pt --ema --data val.bin'
    """
    measure = command_line("sharpness", path, *chosen)
    if found == "objective":
        return command_line("init", path, *chosen)
    if found == "merging":
        return "merge the adapter into its base, model.merge_and_unload().save_pretrained(DIR), then: curvkit init DIR"
    if found == "nothing":
        return measure
    first = f"copy the model's tokenizer.json into {path}, then: " if found == "tokenizer" else ""
    return f"{first}{measure} --data {'val.bin' if found == 'ids' else 'val.txt'}"


def language_model(kind: str, config: Mapping[str, Any] | None) -> str | None:
    """The language model that a checkpoint says it is.

    Args:
        kind: As of `Checkpoint.kind`; for the base of an adapter that of the adapter.
        config: What it says of its model.

    Returns:
        The name of its class; None if it is none, or does not say.

    Example:
        >>> language_model("nanoGPT checkpoint", {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 4})
        'GPT of nanoGPT'
    """
    config = config or {}
    if kind == "nanoGPT checkpoint":
        return "GPT of nanoGPT" if all(key in config for key in NANOGPT_SIZES) else None
    named = config.get("architectures")
    name = named[0] if isinstance(named, list | tuple) and named else None
    built = "Hugging Face" in kind or "adapter" in kind
    return name if built and isinstance(name, str) and name.endswith(LANGUAGE_MODELS) else None


def tokenizer_place(places: Iterable[Path]) -> Path | None:
    """The first directory that has a tokenizer.

    Args:
        places: Directories.

    Returns:
        It, or None.
    """
    return next((place for place in places if any((place / name).is_file() for name in TOKENIZER_FILES)), None)
