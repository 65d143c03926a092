"""The table of model names that a recipe may use, and the one way to build from it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from curvkit.errors import InvalidArgument
from curvkit.models.decoder import Decoder
from curvkit.models.mlp import MLP
from curvkit.models.nanogpt import GPT
from curvkit.models.resnet import ResNet

BUILDERS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {"mlp": MLP, "resnet": ResNet, "decoder": Decoder, "nanogpt": GPT}
)
"""Name in a recipe -> class. Nothing outside this table is ever built from a name."""


def build(name: str, kwargs: Mapping[str, object]) -> nn.Module:
    """Build the model that a recipe names.

    Names and keywords are checked here, values by the constructor. Nothing is imported and no default is
    guessed, so name and keywords may come from a file that is not trusted; sizes are not bounded, so such a
    file can still ask for a model larger than memory. Under `torch.device("meta")` that costs nothing; see
    `Decoder.restore_derived`.

    Args:
        name: A key of `BUILDERS`.
        kwargs: Keyword arguments of its class.

    Returns:
        The model in training mode, initialised from the global random state as torch's modules are.

    Raises:
        InvalidArgument: If the name is unknown, kwargs is no mapping, a keyword is unknown or missing, or the
            class refuses a value.

    Example:
        >>> build("mlp", {"sizes": [4, 2]})
        MLP(
          (linear0): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    if not isinstance(name, str) or name not in BUILDERS:
        raise InvalidArgument(
            f"build: no model is called {name!r}. The names are {_listed(BUILDERS)}. "
            f"{_nearest(name, BUILDERS)}For a model of your own write an objective factory in Python."
        )
    if not isinstance(kwargs, Mapping):
        raise InvalidArgument(
            f"build: kwargs={kwargs!r} must be a mapping from keyword to value. "
            "Write an empty one, {}, where all defaults are wanted."
        )
    parameters = inspect.signature(BUILDERS[name]).parameters
    unknown = [key for key in kwargs if key not in parameters]
    if unknown:
        raise InvalidArgument(
            f"build: {name!r} has no keyword argument {unknown[0]!r}. It takes {_listed(parameters)}. "
            f"{_nearest(unknown[0], parameters)}Remove or rename it in the recipe."
        )
    missing = [key for key, p in parameters.items() if p.default is inspect.Parameter.empty and key not in kwargs]
    if missing:
        raise InvalidArgument(
            f"build: {name!r} was given {_listed(kwargs) or 'nothing'} and lacks {_listed(missing)}. "
            f"It takes {_listed(parameters)}. Add what is missing to the recipe."
        )
    return BUILDERS[name](**kwargs)


def _listed(names: Mapping[str, object] | list[str]) -> str:
    return ", ".join(sorted(map(repr, names)))


def _nearest(name: object, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(str(name).lower(), known)
    return f"The nearest is {' or '.join(map(repr, near))}. " if near else ""
