"""A forward pass whose uses of parameters are recorded, call by call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from curvkit.errors import UnsupportedModel
from curvkit.estimators.forms import Form
from curvkit.estimators.layouts import WithoutExamples
from curvkit.estimators.rules import RULES


@dataclass(frozen=True, eq=False)
class Use:
    """A call, the parameters in it, and what came out."""

    forms: tuple[Form, ...]
    output: Tensor


class Recording(TorchFunctionMode):
    """While active, each call of `RULES` that has a parameter in it is recorded.

    Calls are seen where torch dispatches its functions, so that functional use, several uses of one parameter and modules of any
    class count. Where the input of such a call is the same for all examples, it is repeated for each, so that their gradients are apart.

    Args:
        parameters: Which are looked for, by name.
        num_examples: N, rows of dimension 0 of the batch.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], num_examples: int) -> None:
        super().__init__()
        self.num_examples = num_examples
        self.uses: list[Use] = []
        self.refused: dict[str, str] = {}
        """Parameters of which a use has no rule, with the reason."""
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._alive = list(parameters.values())  # an id means something as long as they live

    def name(self, tensor: Any) -> str | None:
        """Name of a parameter that is looked for; None for anything else."""
        return self._names.get(id(tensor)) if isinstance(tensor, nn.Parameter) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and record it."""
        kwargs, rule = kwargs or {}, RULES.get(func)
        found = {name for value in tree_leaves((args, kwargs)) if (name := self.name(value)) is not None}
        if rule is None or not found:
            return self._without_rule(func, func(*args, **kwargs), found)
        try:
            output = func(*args, **kwargs)
            try:
                forms = tuple(rule(self, output, *args, **kwargs))
            except WithoutExamples:
                args = tuple(self._repeated(value) for value in args)
                kwargs = {key: self._repeated(value) for key, value in kwargs.items()}
                output = func(*args, **kwargs)
                forms = tuple(rule(self, output, *args, **kwargs))
        except UnsupportedModel as error:
            self.refused |= dict.fromkeys(found, str(error))
            return func(*args, **kwargs)
        self._without_rule(func, output, found - {form.name for form in forms})
        return self.recorded(forms, output) if forms else output

    def _without_rule(self, func: Any, output: Any, found: set[str]) -> Any:
        """Refuse parameters that enter a call in a way that has no rule, if what comes out depends on them; return the output."""
        if found and any(
            isinstance(made, Tensor) and made.requires_grad and not self.name(made) for made in tree_leaves(output)
        ):
            called = getattr(func, "__name__", str(func))
            self.refused |= dict.fromkeys(found, f"it is used in {called}, which has no rule for it")
        return output

    def recorded(self, forms: tuple[Form, ...], output: Tensor) -> Tensor:
        """Keep a use.

        Args:
            forms: Of the parameters.
            output: Of the call.

        Returns:
            What the model gets.
        """
        self.uses.append(Use(forms, output))
        return output

    def _repeated(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or self.name(value) is not None or isinstance(value, nn.Parameter):
            return value
        if value.ndim > 0 and value.shape[0] == 1:
            return value.expand(self.num_examples, *value.shape[1:])
        return value.expand(self.num_examples, *value.shape)


def grouped(uses: Iterable[Use], gradients: Iterable[Tensor | None]) -> dict[str, list[tuple[Form, Tensor]]]:
    """Sort the uses by parameters.

    Args:
        uses: Of a recording.
        gradients: dL/dz of each; None where L does not depend on it.

    Returns:
        For each parameter its forms, with dL/dz.
    """
    found: dict[str, list[tuple[Form, Tensor]]] = {}
    for use, g in zip(uses, gradients, strict=True):
        if g is not None:
            for form in use.forms:
                found.setdefault(form.name, []).append((form, g))
    return found


def summed_squares(uses: list[tuple[Form, Tensor]]) -> Tensor:
    """Add up the squares of the gradients of single examples for one parameter, over all its uses.

    Args:
        uses: Its forms with dL/dz.

    Returns:
        sum_n (sum of dL/dW of example n over the uses)^2.
    """
    if len(uses) == 1:
        form, g = uses[0]
        return form.squares(g)
    total = sum(torch.stack([form.gradients(g, slice(None)) for form, g in uses]).unbind(0))
    return total.square().sum(0)  # type: ignore[union-attr]
