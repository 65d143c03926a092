"""Save a checkpoint that says what it is: readable with weights_only, complete or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from curvkit.checkpoints.named_recipes import NamedRecipe
from curvkit.checkpoints.recipes import Recipe, check_recipe
from curvkit.errors import InvalidArgument

FORMAT = 1


def save(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    step: int | None = None,
    recipe: Recipe | Mapping[str, Any] | Callable[..., Any] | None = None,
) -> Path:
    """Save a checkpoint that `curvkit sharpness` can measure without any flag.

    The file is a dict {"model", "optimizer", "step", "curvkit"} of tensors and plain values, written under another name and then
    renamed, so that a reader sees all of it or nothing. Beside the optimizer's state, which is keyed by position, go the
    names of its parameters.

    Args:
        path: Where to; an existing file is replaced.
        model: Its `state_dict()` is saved.
        optimizer: Its `state_dict()` is saved.
        step: Of training.
        recipe: How to rebuild the objective: without any code by a `Recipe` or its dict; or the function marked with
            `@curvkit.objective` that makes it (a `functools.partial` gives its arguments), of which name and hash of the file are kept. It
            is called again only inside the project where that file lies unchanged.

    Returns:
        The path.

    Raises:
        InvalidArgument: If something is not a tensor or a plain value, the recipe does not build this model, or the optimizer has
            parameters that the model has not.

    Cost: one copy of the state on disk.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "ckpt.pt"
        >>> save(target, model=nn.Linear(2, 2), step=10).name
        'ckpt.pt'
    """
    path = Path(path)
    content: dict[str, Any] = {"model": _plain(model.state_dict(), "model")}
    own: dict[str, Any] = {"format": FORMAT, "torch": str(torch.__version__)}
    if step is not None:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise InvalidArgument(f"curvkit.save: step={step!r} must be an integer >= 0, the training step.")
        content["step"] = step
    if optimizer is not None:
        content["optimizer"] = _plain(optimizer.state_dict(), "optimizer")
        own["optimizer"] = type(optimizer).__name__
        own["optimizer_names"] = _names(model, optimizer)
    if recipe is not None:
        own["recipe"] = _plain(_checked(recipe, model).to_dict(), "recipe")
    content["curvkit"] = own
    _write(path, content)
    return path


def _checked(recipe: Recipe | Mapping[str, Any] | Callable[..., Any], model: nn.Module) -> Recipe | NamedRecipe:
    if not isinstance(recipe, Recipe | Mapping):
        return NamedRecipe.of(recipe)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_dict(recipe)
    check_recipe(recipe, model)
    return recipe


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    names = []
    for index, group in enumerate(optimizer.param_groups):
        foreign = [p for p in group["params"] if id(p) not in known]
        if foreign:
            raise InvalidArgument(
                f"curvkit.save: group {index} of the optimizer has a parameter of shape {tuple(foreign[0].shape)} that is not the model's. "
                "Pass the model that this optimizer trains."
            )
        names.append([known[id(p)] for p in group["params"]])
    return names


def _plain(value: Any, where: str) -> Any:
    """A copy of tensors and plain values; anything else would not be readable with weights_only."""
    if isinstance(value, Tensor):
        value = value.detach().contiguous()  # an expanded tensor would be stored as one number that claims to be many
        return value.clone() if value.numel() * value.element_size() < value.untyped_storage().nbytes() else value
    for kind in (bool, int, float, str):  # a subclass (TorchVersion, numpy.float64) could not be read with weights_only
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {_key(key, where): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise InvalidArgument(
        f"curvkit.save: {where} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds tensors and plain "
        "values only, so that it can be read without running code. Convert it, for example with float(...) or str(...)."
    )


def _key(key: Any, where: str) -> Any:
    if type(key) in (bool, int, float, str):
        return key
    raise InvalidArgument(f"curvkit.save: {where} has the key {key!r}; keys must be strings or numbers.")
