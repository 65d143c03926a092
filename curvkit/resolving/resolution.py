"""Which model, loss and data a checkpoint is measured with: the first of several places that says so."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from curvkit.checkpoints import Checkpoint, Recipe, fit
from curvkit.checkpoints.command_lines import command_line
from curvkit.checkpoints.fitting import precision
from curvkit.checkpoints.named_recipes import NamedRecipe
from curvkit.checkpoints.quantised import quantised_refusal
from curvkit.checkpoints.recipes import LOSSES
from curvkit.errors import InvalidArgument, RefusedCheckpoint, UnknownObjective
from curvkit.losses.kinds import KnownLoss
from curvkit.models import BUILDERS, build
from curvkit.objectives import Objective
from curvkit.objectives.surroundings import random_state
from curvkit.resolving.config import VARIABLE
from curvkit.resolving.configurations import refuse_unbuildable
from curvkit.resolving.factories import call_factory, forget_namesakes, load_factory, neighbours
from curvkit.resolving.language_objectives import is_language_model, language_objective
from curvkit.resolving.named_code import admitted_file
from curvkit.resolving.request import Request


@dataclass(frozen=True, eq=False)
class Resolved:
    """An objective at the checkpoint's weights, and where it came from."""

    objective: Objective
    source: str
    """One line for people, for example "train.py:objective (--objective)"."""
    notes: tuple[str, ...] = ()
    """What a reader should know of model and data."""
    own_data: bool = True
    """False for bundled text: the number says nothing of the user's data, and no verdict follows from it."""
    tokens_digest: str | None = None
    """SHA-256 of the ids of a text."""


@dataclass(frozen=True)
class Reference:
    """A function that the user names."""

    reference: str
    settings: Mapping[str, str]
    base: Path | None
    said: str
    """Where: "--objective", the variable, or the configuration."""
    source: bytes | None = None
    """The file itself, where it was read and checked already."""


def resolve(checkpoint: Checkpoint, request: Request | None = None) -> Resolved:
    """Find the objective and put the checkpoint's weights into its model.

    The first of these wins: `--objective`; the variable CURVKIT_OBJECTIVE; the user's configuration; the recipe in the checkpoint; the
    architecture of a language model together with `--data` or `--demo-data`. A text that is named on the command line wins over all but
    `--objective`, since a function brings its own data. What the checkpoint names is imported only as `named_code` says.

    Args:
        checkpoint: As read.
        request: What the user says; None for nothing.

    Returns:
        The objective, its data drawn; its model has the weights, in the mode in which it was made.

    Raises:
        InvalidArgument: If a reference names nothing, or what is asked for does not go together.
        UnknownObjective: If nothing says what to measure, or the weights do not fit the model.
        RefusedCheckpoint: If the weights cannot be measured, or the checkpoint names code that may not be imported.
        MissingExtra: If an optional package is needed.
        FactoryFailed: If the user's own code raised.
    """
    request = request or Request()
    reference = _reference(request)
    if request.names_data and (reference is None or reference.said != "--objective"):
        return _on_text(checkpoint, request)
    if request.names_data:
        raise InvalidArgument(
            f"--data and --objective: {request.objective} brings its own data. Leave one of them out."
        )
    if reference is not None:
        return _finished(checkpoint, request, _from_reference(reference), _said(reference))
    if checkpoint.recipe is not None and "objective" in checkpoint.recipe:
        return _from_named_recipe(checkpoint, request)
    if request.settings:
        raise InvalidArgument(
            f"--set {next(iter(request.settings))}=...: there is no function that it could go to. It belongs to "
            "--objective FILE.py:FUNCTION."
        )
    if checkpoint.recipe is not None:
        recipe = checkpoint.recipe
        source = f"recipe in the checkpoint ({recipe.get('builder')}, {recipe.get('loss')})"
        objective, notes = _from_recipe(checkpoint)
        return _drawn(Resolved(objective, source + _taken(checkpoint), notes), request.num_batches)
    if is_language_model(checkpoint):
        return _on_text(checkpoint, request)
    quantised = quantised_refusal(checkpoint.weights)
    if quantised is not None:  # no function that the user could write would help
        raise RefusedCheckpoint(f"{checkpoint.path}: {quantised}")
    raise UnknownObjective(_teaching(checkpoint))


def _reference(request: Request) -> Reference | None:
    """What the user names: by flag, environment or configuration."""
    if request.objective is not None:
        return Reference(request.objective, request.settings, None, "--objective")
    named = os.environ.get(VARIABLE)
    if named:
        return Reference(named, request.settings, None, VARIABLE)
    config = request.config
    if config is None or config.objective is None:
        return None
    return Reference(config.objective, {**config.settings, **request.settings}, config.path.parent, str(config.path))


def _said(reference: Reference) -> str:
    where = f"from {Path(reference.said).name}" if reference.base is not None else reference.said
    return f"{reference.reference} ({where})"


def _from_reference(reference: Reference, given: Mapping[str, Any] | None = None) -> Objective:
    forget_namesakes(reference.reference, reference.base)
    with random_state(), neighbours(reference.reference, reference.base):
        factory = load_factory(reference.reference, reference.base, said=reference.said, source=reference.source)
        return call_factory(factory, reference.settings, given)


def _from_named_recipe(checkpoint: Checkpoint, request: Request) -> Resolved:
    try:
        recipe = NamedRecipe.from_dict(checkpoint.recipe or {})
    except InvalidArgument as error:
        raise UnknownObjective(_unusable(checkpoint, error)) from error
    found = admitted_file(recipe, checkpoint, request.trust, Path.cwd())
    place = f"{found.file.name}:{found.name}"
    reference = Reference(place, request.settings, found.file.parent, "recipe in the checkpoint", found.source)
    objective = _from_reference(reference, recipe.kwargs)
    return _finished(checkpoint, request, objective, f"{recipe.objective} (recipe in the checkpoint)")


def _from_recipe(checkpoint: Checkpoint) -> tuple[Objective, tuple[str, ...]]:
    """The objective, and what is to be said of how the weights fit."""
    try:
        recipe = Recipe.from_dict(checkpoint.recipe or {})
        refuse_unbuildable(f"{checkpoint.path}: the recipe", recipe.kwargs, checkpoint.weights)
        with random_state(), torch.device("meta"):  # whatever sizes it asks for, no memory is taken
            model = build(recipe.builder, recipe.kwargs)
    except InvalidArgument as error:
        raise UnknownObjective(_unusable(checkpoint, error)) from error
    dtype = precision(checkpoint.weights)
    notes = fit(model.to(dtype), checkpoint.weights, str(checkpoint.path))
    restore = getattr(model, "restore_derived", None)
    if restore is not None:
        restore()
    floating = {name: value for name, value in recipe.batch.items() if value.is_floating_point()}
    recipe = replace(recipe, batch={**recipe.batch, **{name: value.to(dtype) for name, value in floating.items()}})
    others = sorted({_word(value.dtype) for value in floating.values()} - {_word(dtype)})
    notes += tuple(f"data in {other}, computed in {_word(dtype)}" for other in others)
    return Objective(model, KnownLoss(LOSSES[recipe.loss], recipe.loss_options), recipe.batches()), notes


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unusable(checkpoint: Checkpoint, error: InvalidArgument) -> str:
    return (
        f"{checkpoint.path}: its recipe cannot be used. {error} Or name an objective with --objective FILE.py:FUNCTION."
    )


def _on_text(checkpoint: Checkpoint, request: Request) -> Resolved:
    flag = "--data" if request.data is not None else "--demo-data"
    if not is_language_model(checkpoint):
        raise InvalidArgument(
            f"{flag}: text is for language models that say what they are (directories of Hugging Face, nanoGPT), and {checkpoint.path} "
            f"is a {checkpoint.kind}. Leave it out: the function of --objective brings the data. To have one written, to fill in: "
            f"{command_line('init', checkpoint.path, *checkpoint.options)}"
        )
    if request.settings:
        raise InvalidArgument(
            f"--set {next(iter(request.settings))}=...: there is no function that it could go to; the model is built from the checkpoint."
        )
    made = language_objective(checkpoint, request)
    notes, passed = made.notes, _reference(request)
    if passed is not None:
        notes += (f"{_said(passed)} was passed over, since {flag} names a text",)
    own = request.data is not None
    return _drawn(Resolved(made.objective, made.source, notes, own, made.tokens_digest), request.num_batches)


def _finished(checkpoint: Checkpoint, request: Request, objective: Objective, source: str) -> Resolved:
    """With the weights in the model, and the data drawn."""
    notes = fit(objective.model, checkpoint.weights, str(checkpoint.path))
    return _drawn(Resolved(objective, source + _taken(checkpoint), notes), request.num_batches)


def _taken(checkpoint: Checkpoint) -> str:
    if len(checkpoint.weight_keys) <= 1:
        return ""
    taken, *others = checkpoint.weight_keys
    return f", weights under {taken!r}, not {' or '.join(map(repr, others))}"


def _drawn(resolved: Resolved, num_batches: int | None) -> Resolved:
    objective = resolved.objective
    try:
        objective = replace(objective, num_batches=num_batches or objective.num_batches)
        objective.batches  # noqa: B018  drawn now, so that bad data is told from bad options
    except InvalidArgument as error:
        raise UnknownObjective(str(error)) from error
    return replace(resolved, objective=objective)


def _teaching(checkpoint: Checkpoint) -> str:
    path = checkpoint.path
    keys = f" · keys: {', '.join(checkpoint.keys[:6])}" if checkpoint.keys else ""
    lines = [
        f"{path} holds weights but does not say which model, loss or data to use.",
        f"  found    {checkpoint}{keys}",
        *_beside(path),
        "  missing  an objective: a function returning curvkit.Objective(model, loss, data)",
        f"  do one   {command_line('init', path, *checkpoint.options)}    writes a file with such a function, to fill in",
        f"           {command_line('sharpness', path, *checkpoint.options)} --objective train.py:objective",
        "           curvkit.save(path, model=model, recipe=objective)    in the training script: no flag then",
        f"           curvkit.save(path, model=model, recipe=Recipe(...))    for curvkit's own models ({', '.join(BUILDERS)})",
    ]
    return "\n".join(lines)


def _beside(path: Path) -> list[str]:
    """A single file of weights out of a directory of Hugging Face: the directory is what says more."""
    if path.is_dir() or not (path.parent / "config.json").is_file():
        return []
    return [f"           config.json beside it: pass the directory instead, {path.parent}"]
