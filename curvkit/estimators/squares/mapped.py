"""Squared gradients of single examples for parameters without a rule: by vmap, or one by one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap

from curvkit.errors import UnsupportedModel, ran_out_of_memory
from curvkit.estimators.rules.forms import CHUNK_BYTES
from curvkit.losses.batches import Batch, map_tensors, tensors
from curvkit.objectives import Objective


def mapped_squares(
    objective: Objective, batch: Batch, s: Tensor, refused: Mapping[str, str], *, refuse_as: str | None = None
) -> dict[str, Tensor]:
    """Add up squares of gradients of single examples for some parameters.

    Args:
        objective: The function; its loss takes outputs and targets.
        batch: Rows are examples.
        s: Cotangent of the outputs, [N, ...].
        refused: The parameters, with the reason why they have no rule.
        refuse_as: Estimator in whose name what vmap cannot treat is refused; None: each example is run alone then.

    Returns:
        sum_n (J_n' s_n)^2 by name.

    Raises:
        UnsupportedModel: If vmap cannot treat the model; naming the first parameter.
        RuntimeError: What the model raises on one example, and for lack of memory.

    Cost: about a gradient of the data, and memory of the gradients of some examples, 64 MiB at a time. Where vmap cannot treat the model
        (control flow that depends on numbers, as in masks), each example is run alone: many times that in models that are fast on batches.
    """
    if not refused:
        return {}
    model: Any = objective.model
    theta = {name: p.detach() for name, p in model.named_parameters()}
    kept = {name: theta[name] for name in refused}

    def squares(parts: tuple[Tensor, ...], s: Tensor) -> dict[str, Tensor]:
        given = iter(parts)
        one = map_tensors(lambda _: next(given)[None], batch)

        def outputs(chosen: dict[str, Tensor]) -> Tensor:
            def called(*inputs: Any, **named: Any) -> Any:
                return functional_call(model, {**theta, **chosen}, inputs, named)

            found: Any = objective.loss
            return found.outputs(called, one)[0][0]

        made: Any = vjp(outputs, kept)
        return {name: g.square() for name, g in made[1](s)[0].items()}

    size = sum(value.numel() * value.element_size() for value in kept.values())
    step, total = max(1, CHUNK_BYTES // max(size, 1)), {name: torch.zeros_like(value) for name, value in kept.items()}
    leaves = tuple(tensors(batch))
    for begin in range(0, len(s), step):
        piece = slice(begin, begin + step)
        try:
            part: Any = vmap(squares)(tuple(x[piece] for x in leaves), s[piece])
        except Exception as error:  # whatever the model does under vmap
            if ran_out_of_memory(error):
                raise
            if refuse_as is None:
                return _one_by_one(objective, batch, s, refused)
            name, reason = next(iter(refused)), str(error).strip().partition("\n")[0][:200]
            raise UnsupportedModel(
                f"{refuse_as}: the parameter {name} has no rule ({refused[name]}), and torch.func.vmap cannot treat the "
                f"model one example at a time ({type(error).__name__}: {reason}). Leave the parameter out by patterns, or use Hutchinson."
            ) from error
        for name, value in part.items():
            total[name] += value.sum(0)
    return total


def _one_by_one(objective: Objective, batch: Batch, s: Tensor, refused: Mapping[str, str]) -> dict[str, Tensor]:
    """Each example run alone."""
    own: Any = dict(zip(objective.parameters.names, objective.tensors, strict=True))
    chosen = {name: own[name] for name in refused}
    total = {name: torch.zeros_like(p) for name, p in chosen.items()}
    for row in range(len(s)):
        one = objective.with_batches([map_tensors(partial(_row, row), batch)])
        outputs = one.outputs(0)[0]
        if outputs.requires_grad:
            found: Any = torch.autograd.grad(outputs, list(chosen.values()), s[row : row + 1], allow_unused=True)
            for (name, value), g in zip(total.items(), found, strict=True):
                if g is not None:
                    total[name] = value.addcmul_(g, g)
    return total


def _row(row: int, tensor: Tensor) -> Tensor:
    return tensor[row : row + 1]
