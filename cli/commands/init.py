"""curvkit init: write the files that say which model, loss and data belong to a checkpoint, as far as it tells itself."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import scaffold
from ..scaffold import CONFIG, OBJECTIVE, Found
from ..target import EMA, KEY

if TYPE_CHECKING:
    from curvkit.checkpoints import Checkpoint

LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")
"""How the classes of transformers are called that are measured without any code."""


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@KEY
@EMA
def init(checkpoint: Path, key: str | None, ema: bool) -> int:
    """Write curvkit_objective.py and curvkit.toml for a CHECKPOINT.

    They go into the current directory, filled in with what the checkpoint says: names and shapes of its weights, hyper-parameters, its
    optimizer. You fill in the model and the data. A file that is already there is never touched.
    """
    here = Path.cwd()
    _refuse_existing(here)
    from curvkit.checkpoints import read

    content = read(checkpoint, key=key, ema=ema)
    typed = shlex.quote(str(checkpoint))
    ready = _ready(content, typed)
    if ready:
        click.echo(ready)
        return 0
    found = Found(
        typed,
        str(content),
        {name: tuple(tensor.shape) for name, tensor in content.weights.items()},
        _settings(content),
        _optimizer(content),
        content.removed,
    )
    _write(here, {OBJECTIVE: scaffold.objective_file(found), CONFIG: scaffold.config_file(found)})
    click.echo(
        f"wrote {OBJECTIVE} and {CONFIG} for {content}\n\nNext: fill in make_model() and make_data() in {OBJECTIVE}, then:"
    )
    click.echo(f"curvkit sharpness {typed}")
    return 0


def _ready(content: Checkpoint, typed: str) -> str:
    """What to type where no objective has to be written; empty where one has."""
    if content.recipe is not None:
        return f"Nothing to write: the checkpoint says itself how it is measured. Next:\ncurvkit sharpness {typed}"
    architectures = (content.config or {}).get("architectures")
    named = architectures if isinstance(architectures, list | tuple) else ()
    model = next((name for name in named if isinstance(name, str) and name.endswith(LANGUAGE_MODELS)), None)
    if model is None and content.kind == "nanoGPT checkpoint":
        model = "nanoGPT"
    if model is None:
        return ""
    return (
        f"Nothing to write: the model is a {scaffold.printable(model)}, which needs data alone: a text, .jsonl, nanoGPT .bin, or a folder "
        f"of datasets. Next:\ncurvkit sharpness {typed} --data val.txt"
    )


def _settings(content: Checkpoint) -> dict[str, Any]:
    """Hyper-parameters by name, those of a group of arguments as well."""
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
