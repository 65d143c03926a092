"""curvkit init: write the files that say which model, loss and data belong to a checkpoint, as far as it tells itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from curvkit.errors import RefusedCheckpoint

from .. import scaffold
from ..failures import harmless
from ..guesses import printable
from ..paths import Existing
from ..scaffold import CONFIG, OBJECTIVE, Found
from ..target import ALLOW, EMA, KEY, TRUST

if TYPE_CHECKING:
    from curvkit.checkpoints import Checkpoint


@click.command()
@click.argument("checkpoint", type=Existing())
@KEY
@EMA
@ALLOW
@TRUST
def init(checkpoint: Path, key: str | None, ema: bool, allow: tuple[str, ...], trust: bool) -> int:
    """Write curvkit_objective.py and curvkit.toml for a CHECKPOINT.

    They go into the current directory, filled in with what the checkpoint says: names and shapes of its weights, hyper-parameters, its
    optimizer. You fill in the model and the data. A file that is already there is never touched.
    """
    here = Path.cwd()
    _refuse_existing(here)
    from curvkit.checkpoints import read
    from curvkit.checkpoints.command_lines import command_line, quoted
    from curvkit.checkpoints.quantised import quantised_refusal
    from curvkit.checkpoints.trust import Trust

    content = read(checkpoint, key=key, ema=ema, trust=Trust(trust, allow))
    quantised = quantised_refusal(content.weights)
    if quantised is not None:
        raise RefusedCheckpoint(f"{checkpoint}: {quantised}")
    ready = _ready(content, checkpoint)
    if ready:
        click.echo(harmless(ready))
        return 0
    found = Found(
        quoted(checkpoint),
        str(content),
        {name: tuple(tensor.shape) for name, tensor in content.weights.items()},
        _settings(content),
        _optimizer(content),
        content.removed,
        _architecture(content),
        str(content.path),
    )
    _write(here, {OBJECTIVE: scaffold.objective_file(found), CONFIG: scaffold.config_file(found)})
    click.echo(f"wrote {OBJECTIVE} and {CONFIG} for {harmless(str(content))}\n")
    click.echo(f"Next: fill in make_model() and make_data() in {OBJECTIVE}, then:")
    click.echo(harmless(command_line("sharpness", checkpoint, *content.options)))
    return 0


def _ready(content: Checkpoint, checkpoint: Path) -> str:
    """What to do where no objective has to be written; empty where one has."""
    from curvkit.checkpoints.documents import document
    from curvkit.checkpoints.needs import language_model, need, next_step

    base = None if content.base is None else document(content.base / "config.json")
    directory = content.path if content.path.is_dir() else content.path.parent
    places = (directory, *((content.base,) if content.base is not None else ()))
    needed = need(content.kind, content.config, recipe=content.recipe is not None, base=base, places=places)
    step = next_step(checkpoint, needed, *content.options)
    if needed == "objective":
        return ""
    if needed == "nothing":
        return f"Nothing to write: the checkpoint says itself how it is measured. Next:\n{step}"
    if needed == "merging":
        return f"Nothing to write: an adapter is measured on a language model, and its base is none. Next:\n{step}"
    model = language_model(content.kind, content.config if base is None else base)
    data = {
        "text": "a text, .jsonl, nanoGPT .bin, or a folder of datasets",
        "ids": "ids of tokens as a nanoGPT .bin, or a text with the tokenizer.json of the model beside the checkpoint",
        "tokenizer": "a text, and the tokenizer.json of the model beside the checkpoint",
    }[needed]
    return f"Nothing to write: the model is a {printable(model)}, which needs data alone: {data}. Next:\n{step}"


def _architecture(content: Checkpoint) -> str:
    """The class of transformers that a directory names; empty if there is none."""
    named = (content.config or {}).get("architectures") if "Hugging Face" in content.kind else None
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def _settings(content: Checkpoint) -> dict[str, Any]:
    """Hyper-parameters by name, those of a group of arguments as well; transformers reads its own from config.json."""
    if _architecture(content):
        return {}
    found: dict[str, Any] = {}
    for name, value in (content.config or {}).items():
        found |= {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {str(name): value}
    return found


def _optimizer(content: Checkpoint) -> str:
    rates = ", ".join(f"{lr:.4g}" for lr in content.lr)
    return f"lr {rates}" if rates else ""


def _refuse_existing(here: Path) -> None:
    for name in (OBJECTIVE, CONFIG):
        if os.path.lexists(here / name):
            raise click.UsageError(
                f"{name} is already here and is not touched. Remove it, or go to another directory and run init there."
            )


def _write(here: Path, files: dict[str, str]) -> None:
    """Create the files, all of them or none; what appeared meanwhile is not touched either."""
    written: list[Path] = []
    try:
        for name, text in files.items():
            with (here / name).open("x", encoding="utf-8") as file:
                written.append(here / name)
                file.write(text)
    except OSError as error:
        for path in written:
            path.unlink()
        reason = (error.strerror or str(error)).lower()
        name = Path(str(error.filename or here)).name
        raise click.UsageError(
            f"{name}: {reason}. Nothing was written. Go to a directory in which you may write, and run init there."
        ) from error
