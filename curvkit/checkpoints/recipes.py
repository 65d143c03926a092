"""A data recipe: how to rebuild an objective from plain values and tensors, without importing any code of the user's."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvkit.errors import CurvkitError, InvalidArgument
from curvkit.losses.known import DIVISORS
from curvkit.models import BUILDERS, build

FORMAT = 1
LOSSES: dict[str, Callable[..., Tensor]] = {function.__name__: function for function in DIVISORS}
"""Names that a recipe may use for its loss: those of torch.nn.functional, and token_cross_entropy."""


NOT_OPTIONS = {"input", "target", "outputs", "targets", "size_average", "reduce"}
"""Arguments of those functions that are data, or that torch keeps for old code."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """Model, loss and calibration data by name and by value.

    Args:
        builder: A name of `curvkit.models.BUILDERS`.
        kwargs: Of the builder.
        loss: A name of `LOSSES`.
        batch: {"x": inputs, "y": targets}: the examples that are measured.
        loss_options: Keyword arguments of the loss, for example ignore_index or weight.
        batch_size: Rows that go through the model at a time; None takes all at once. The result does not depend on it.

    Raises:
        InvalidArgument: If the loss or one of its options is unknown, or the batch has not the two tensors.

    Example:
        >>> batch = {"x": torch.ones(4, 2), "y": torch.tensor([0, 1, 2, 0])}
        >>> Recipe("mlp", {"sizes": [2, 3]}, "cross_entropy", batch).to_dict()["format"]
        1
    """

    builder: str
    kwargs: Mapping[str, Any]
    loss: str
    batch: Mapping[str, Tensor]
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check names and shapes; the model is not built yet."""
        if not isinstance(self.loss, str) or self.loss not in LOSSES:
            near = difflib.get_close_matches(str(self.loss), LOSSES, 2)
            raise InvalidArgument(
                f"Recipe: no loss is called {self.loss!r}{', nearest: ' + ' or '.join(near) if near else ''}. "
                f"The names are {', '.join(sorted(LOSSES))}."
            )
        self._check_options()
        if set(self.batch) != {"x", "y"} or not all(isinstance(value, Tensor) for value in self.batch.values()):
            raise InvalidArgument(
                f"Recipe: batch has {sorted(map(str, self.batch))}; it must be {{'x': inputs, 'y': targets}}, both tensors."
            )
        rows = {value.shape[0] if value.ndim else 0 for value in self.batch.values()}
        if len(rows) > 1 or 0 in rows:
            shapes = {key: tuple(value.shape) for key, value in self.batch.items()}
            raise InvalidArgument(
                f"Recipe: x and y must have the same number of rows, at least one; their shapes are {shapes}."
            )
        if self.batch_size is not None and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise InvalidArgument(
                f"Recipe: batch_size={self.batch_size!r} must be at least 1, or None for all rows at once."
            )

    def _check_options(self) -> None:
        allowed = set(inspect.signature(LOSSES[self.loss]).parameters) - NOT_OPTIONS
        unknown = [key for key in self.loss_options if key not in allowed]
        if unknown:
            raise InvalidArgument(
                f"Recipe: the loss {self.loss} has no option {unknown[0]!r}. It takes {', '.join(sorted(allowed))}."
            )
        reduction = self.loss_options.get("reduction", "mean")
        if reduction not in ("mean", "sum"):
            raise InvalidArgument(
                f"Recipe: loss_options has reduction={reduction!r}; curvature needs a scalar: use 'mean' or 'sum'."
            )

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Recipe:
        """Read the plain form.

        Args:
            plain: As of `to_dict`.

        Returns:
            The recipe.

        Raises:
            InvalidArgument: If a key is missing or unknown, or the format is newer than this version.
        """
        if plain.get("format", FORMAT) != FORMAT:
            raise InvalidArgument(
                f"Recipe: format {plain['format']!r} is not known to this version, which reads {FORMAT}. Update curvkit."
            )
        allowed = {"builder", "kwargs", "loss", "batch", "loss_options", "batch_size"}
        unknown, missing = set(plain) - allowed - {"format"}, {"builder", "kwargs", "loss", "batch"} - set(plain)
        if unknown or missing:
            raise InvalidArgument(
                f"Recipe: missing {sorted(missing)}, unknown {sorted(map(str, unknown))}. Its keys are {', '.join(sorted(allowed))}."
            )
        for key in ("kwargs", "batch", "loss_options"):
            if not isinstance(plain.get(key, {}), Mapping):
                raise InvalidArgument(
                    f"Recipe: {key} is a {type(plain[key]).__name__}; it must be a dict, for example kwargs={{'sizes': [784, 10]}}."
                )
        return cls(**{key: value for key, value in plain.items() if key in allowed})

    def to_dict(self) -> dict[str, Any]:
        """The plain form, which weights_only can load.

        Returns:
            A dict of primitives and tensors.
        """
        return {
            "format": FORMAT,
            "builder": self.builder,
            "kwargs": dict(self.kwargs),
            "loss": self.loss,
            "loss_options": dict(self.loss_options),
            "batch": dict(self.batch),
            "batch_size": self.batch_size,
        }

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The calibration data in batches.

        Returns:
            (x, y) pairs of `batch_size` rows, the last one perhaps shorter.
        """
        x, y = self.batch["x"], self.batch["y"]
        size = self.batch_size or len(x)
        return list(zip(x.split(size), y.split(size), strict=True))


def check_recipe(recipe: Recipe, model: nn.Module) -> None:
    """Refuse a recipe that does not build the model that is being saved, or whose model and loss do not take its batch.

    Args:
        recipe: Its model and loss are run on the meta device, which allocates nothing and sees shapes and dtypes only.
        model: The model in hand.

    Raises:
        InvalidArgument: If the builder fails, names or shapes of the weights differ, or the batch does not fit.
    """
    try:
        with torch.device("meta"):
            built = build(recipe.builder, recipe.kwargs)
    except CurvkitError as error:
        raise InvalidArgument(f"curvkit.save: the recipe cannot be built. {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if expected != found:
        name = next(key for key in [*expected, *found] if expected.get(key) != found.get(key))
        raise InvalidArgument(
            f"curvkit.save: the recipe builds another model than the one given: {name!r} is {expected.get(name, 'absent')} by the recipe "
            f"and {found.get(name, 'absent')} in the model. {_advice(recipe, model, type(built).__name__)}"
        )
    _check_batch(recipe, built.eval())


def _advice(recipe: Recipe, model: nn.Module, built: str) -> str:
    if isinstance(model, BUILDERS[recipe.builder]):
        return "Give the builder's kwargs that made this model."
    return (
        f"The builder {recipe.builder!r} means curvkit.models.{built}, and the model is a {type(model).__name__}: save a model of your own "
        "without a recipe, and measure it with --objective FILE.py:FUNCTION."
    )


def _check_batch(recipe: Recipe, model: nn.Module) -> None:
    """Run two rows through model and loss, all on the meta device."""
    x, y = (recipe.batch[key][:2].to("meta") for key in ("x", "y"))
    options = {
        key: value.to("meta") if isinstance(value, Tensor) else value for key, value in recipe.loss_options.items()
    }
    try:
        with torch.no_grad():
            LOSSES[recipe.loss](model(x), y, **options)
    except Exception as error:  # whatever torch raises for shapes and dtypes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidArgument(
            f"curvkit.save: the recipe's model {recipe.builder!r} and loss {recipe.loss} do not take its batch, "
            f"x {tuple(recipe.batch['x'].shape)} {recipe.batch['x'].dtype}, y {tuple(recipe.batch['y'].shape)} "
            f"{recipe.batch['y'].dtype}: {reason} Give the inputs and targets of one training step."
        ) from error
