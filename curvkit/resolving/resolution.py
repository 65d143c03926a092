"""Which model, loss and data a checkpoint is measured with: what the user names, else the recipe in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from curvkit.checkpoints import Checkpoint, Recipe, fit
from curvkit.checkpoints.recipes import LOSSES
from curvkit.errors import InvalidArgument, UnknownObjective
from curvkit.losses.kinds import KnownLoss
from curvkit.models import BUILDERS, build
from curvkit.objectives import Objective
from curvkit.objectives.surroundings import random_state
from curvkit.resolving.factories import call_factory, load_factory, neighbours


@dataclass(frozen=True, eq=False)
class Resolved:
    """An objective at the checkpoint's weights, and where it came from."""

    objective: Objective
    source: str
    """One line for people, for example "train.py:objective (--objective)"."""


def resolve(
    checkpoint: Checkpoint,
    *,
    reference: str | None = None,
    settings: Mapping[str, str] | None = None,
    num_batches: int | None = None,
) -> Resolved:
    """Find the objective and put the checkpoint's weights into its model.

    Args:
        checkpoint: As read.
        reference: "file.py:function" or "module:function", named by the user; wins over the file.
        settings: Keyword arguments for that function, as text.
        num_batches: Take only the first batches of its data.

    Returns:
        The objective, its data drawn; its model has the weights, in the mode in which it was made.

    Raises:
        InvalidArgument: If the reference names nothing, or there are settings without a reference.
        UnknownObjective: If nothing says what to measure, or the weights do not fit the model.
        RefusedCheckpoint: If the weights are integer, NaN or infinite.
        FactoryFailed: If the user's own code raised.
    """
    if reference is None and settings:
        raise InvalidArgument(
            f"--set {next(iter(settings))}=...: there is no function that it could go to. It belongs to --objective FILE.py:FUNCTION."
        )
    if reference is not None:
        with random_state(), neighbours(reference):
            objective = call_factory(load_factory(reference), settings or {})
        source = f"{reference} (--objective)"
    elif checkpoint.recipe is not None:
        objective = _from_recipe(checkpoint)
        source = f"recipe in the checkpoint ({checkpoint.recipe.get('builder')}, {checkpoint.recipe.get('loss')})"
    else:
        raise UnknownObjective(_teaching(checkpoint))
    if len(checkpoint.weight_keys) > 1:
        taken, *others = checkpoint.weight_keys
        source += f", weights under {taken!r}, not {' or '.join(map(repr, others))}"
    fit(objective.model, checkpoint.weights, str(checkpoint.path))
    try:
        objective = replace(objective, num_batches=num_batches or objective.num_batches)
        objective.batches  # noqa: B018  drawn now, so that bad data is told from bad options
    except InvalidArgument as error:
        raise UnknownObjective(str(error)) from error
    return Resolved(objective, source)


def _from_recipe(checkpoint: Checkpoint) -> Objective:
    try:
        recipe = Recipe.from_dict(checkpoint.recipe or {})
        with random_state():
            model = build(recipe.builder, recipe.kwargs)
    except InvalidArgument as error:
        raise UnknownObjective(
            f"{checkpoint.path}: its recipe cannot be used. {error} Or name an objective with --objective FILE.py:FUNCTION."
        ) from error
    return Objective(model, KnownLoss(LOSSES[recipe.loss], recipe.loss_options), recipe.batches())


def _teaching(checkpoint: Checkpoint) -> str:
    path = checkpoint.path
    keys = f" · keys: {', '.join(checkpoint.keys[:6])}" if checkpoint.keys else ""
    return "\n".join(
        (
            f"{path} holds weights but does not say which model, loss or data to use.",
            f"  found    {checkpoint}{keys}",
            "  missing  an objective: a function returning curvkit.Objective(model, loss, data)",
            f"  do one   curvkit sharpness {path} --objective train.py:objective",
            f"           curvkit.save(path, model=model, recipe=...)    for curvkit's own models ({', '.join(BUILDERS)}): no flag then",
        )
    )
