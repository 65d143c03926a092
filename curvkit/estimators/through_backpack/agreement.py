"""Does BackPACK's diagonal hold on a few examples, against products and gradients of the user's own model?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import UnsupportedModel
from curvkit.estimators.through_backpack.library import Extension
from curvkit.estimators.through_backpack.losses import INSTEAD
from curvkit.losses import hessian_in_outputs
from curvkit.losses.batches import rows, take_rows
from curvkit.objectives import Objective

AGREES = 1e4
"""Two numbers may differ by so many eps of the largest entry of the parameter tensor; faults that were seen make 1e-2 and more."""
FAINT = 1e-3
"""Or of this share of the largest entry of all, where a whole tensor is smaller than that."""
CHOSEN = 4
"""Entries of each parameter tensor that are compared at random; the two largest by BackPACK, and by the gradient, are added."""


def few_rows(objective: Objective) -> list[Objective]:
    """First and last row of the first batch, and of the last.

    Args:
        objective: The function.

    Returns:
        One or two objectives of one batch each.
    """
    made: list[Objective] = []
    for index in sorted({0, len(objective.batches) - 1}):
        size = rows(objective.batches[index]) or 1
        chosen = torch.tensor(sorted({0, size - 1}))
        made.append(objective.with_batches([take_rows(objective.batches[index], chosen)]))
    return made


def refuse_other_gradient(extension: Extension, objective: Objective, found: Tensor, truth: Tensor) -> None:
    """Refuse a copy whose gradient is not that of the model.

    Args:
        extension: For the message.
        objective: Whose parameters are named.
        found: [n], by BackPACK's backward pass.
        truth: [n], of the user's model.

    Raises:
        UnsupportedModel: Naming the parameter that is furthest off.
    """
    pieces = objective.parameters.unflatten
    _refuse_difference(extension, "the gradient", pieces(found), {name: (g, None) for name, g in pieces(truth).items()})


def refuse_other_hessian(extension: Extension, few: Objective, found: Mapping[str, Tensor], *, seed: int) -> None:
    """Hold entries of the diagonal of the Hessian against second derivatives, example by example.

        H_jj = (1 / W) sum_n d/dtheta_j (d total_n / d theta_j)

    Args:
        extension: For the message.
        few: A batch of few examples, of the user's model.
        found: What BackPACK gives for them, of the mean or the sum that the loss is.
        seed: Of the choice of entries.

    Raises:
        UnsupportedModel: If one differs.

    Cost: for each example and parameter tensor 8 backward passes through the graph of its gradient.
    """
    parts, weights, names = one_by_one(few), list[float](), few.parameters.names
    truths: dict[str, tuple[Tensor, Tensor | None]] = {}
    with parts.measuring():
        for index in range(len(parts.batches)):
            terms = parts.terms(index)
            weights.append(terms.weight)
            pieces = torch.autograd.grad(terms.total, few.tensors, create_graph=True, materialize_grads=True)
            for number, (name, p, g) in enumerate(zip(names, few.tensors, pieces, strict=True)):
                truth, chosen = truths.get(name) or (torch.zeros(0), _chosen(found[name], g, seed, number))
                values = _second(g.reshape(-1), p, cast(Tensor, chosen))
                truths[name] = (values if index == 0 else truth + values, chosen)
    scale = few.denominator(weights)
    _refuse_difference(extension, "the diagonal", found, {name: (t / scale, j) for name, (t, j) in truths.items()})


def _chosen(found: Tensor, gradient: Tensor, seed: int, number: int) -> Tensor:
    """Entries at random, and the largest."""
    order = torch.randperm(found.numel(), generator=seeds.generator(seed, "BackPACK entries", number))[:CHOSEN]
    largest = [x.detach().reshape(-1).abs().topk(min(CHOSEN // 2, x.numel())).indices for x in (found, gradient)]
    return torch.cat([order.to(found.device), *largest]).unique()


def _second(g: Tensor, p: Tensor, chosen: Tensor) -> Tensor:
    """dg_j / dp_j for some j."""
    values = [torch.zeros((), dtype=p.dtype, device=p.device) for _ in chosen]
    for place, j in enumerate(chosen.tolist()):
        if g.requires_grad:
            (row,) = torch.autograd.grad(g[j], p, retain_graph=True, materialize_grads=True)
            values[place] = row.reshape(-1)[j]
    return torch.stack(values)


def refuse_other_squares(
    extension: Extension, few: Objective, found: Mapping[str, Tensor], *, drawn: Tensor | None = None
) -> None:
    """Hold the diagonal of the GGN against squares of gradients, example by example.

        G_jj = (1 / W) sum_n sum_c (J_n' s_nc)_j^2,    H_out,n = sum_c s_nc s_nc'

    Args:
        extension: For the message.
        few: A batch of few examples, of the user's model.
        found: What BackPACK gives for them.
        drawn: s of the examples where it was drawn, [N, ...]; None takes the factor of the loss.

    Raises:
        UnsupportedModel: If an entry differs.

    Cost: for each of the few examples a backward pass per output.
    """
    parts, weights = one_by_one(few), list[float]()
    squares = [torch.zeros_like(p) for p in few.tensors]
    with parts.measuring():
        for index in range(len(parts.batches)):
            outputs, targets = parts.outputs(index)
            weights.append(parts.terms_of(outputs.detach(), targets).weight)
            for s in _columns(parts, outputs, targets) if drawn is None else [drawn[index : index + 1]]:
                pieces = torch.autograd.grad(outputs, few.tensors, s, retain_graph=True, allow_unused=True)
                for square, g in zip(squares, pieces, strict=True):
                    if g is not None:  # pyright: ignore[reportUnnecessaryComparison]
                        square += g.square()
    scale = few.denominator(weights)
    truths = {name: (square / scale, None) for name, square in zip(few.parameters.names, squares, strict=True)}
    _refuse_difference(extension, "the diagonal", found, truths)


def one_by_one(few: Objective) -> Objective:
    """The same examples, each as a batch of its own.

    Args:
        few: Of one batch.

    Returns:
        An objective of as many batches as there are rows.
    """
    return few.with_batches(
        [take_rows(few.batches[0], torch.tensor([row])) for row in range(rows(few.batches[0]) or 1)]
    )


def _columns(objective: Objective, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
    return hessian_in_outputs(objective.loss, outputs.detach(), targets).factor_columns()


def _refuse_difference(
    extension: Extension,
    what: str,
    found: Mapping[str, Tensor],
    truths: Mapping[str, tuple[Tensor, Tensor | None]],
) -> None:
    """Compare entries, all or those at an index, by the largest of the tensor."""
    largest = max((truth.abs().max().item() for truth, _ in truths.values() if truth.numel()), default=0.0)
    worst: tuple[float, str] = (0.0, "")
    for name, (truth, index) in truths.items():
        got = found[name].detach().reshape(-1)
        got, truth = got if index is None else got[index], truth.reshape(-1)
        if not truth.numel():
            continue
        size = max(truth.abs().max().item(), FAINT * largest, torch.finfo(truth.dtype).tiny)
        difference = (got - truth).abs().max().item() / size
        if not difference <= worst[0]:
            worst = (difference, name)
    limit = AGREES * torch.finfo(next(iter(found.values())).dtype).eps
    if not worst[0] <= limit:
        where = "on all the data" if what == "the gradient" else "on a few examples"
        raise UnsupportedModel(
            f"BackPACK({extension!r}): {what} of {worst[1]} by BackPACK is not that of the model: {where} they differ by "
            f"{worst[0]:.1e} of the largest entry, where rounding leaves {limit:.0e}. BackPACK does not see all that the model does; or "
            "digits were lost, as in float32 where the loss is all but zero: then float64 helps. "
            f"Use {INSTEAD[extension]}."
        )
