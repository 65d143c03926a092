"""Whether the rows of batches are examples, and whether the rules give their gradients: numbers show it, beside the work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import UnsupportedModel, ran_out_of_memory
from curvkit.estimators.recordings.cotangents import pull
from curvkit.estimators.recordings.recording import Recording
from curvkit.estimators.recordings.uses import grouped
from curvkit.losses.batches import Batch, rows, take_rows, tensors
from curvkit.objectives import Objective
from curvkit.objectives.function import NEEDS_GRAPH

ROUNDING = 1e3
"""Outputs and gradients of rows together and apart may differ by so many eps of the largest of their kind."""
CANCELLED = 1e2
"""Gradients of a parameter that cancel, by so many eps of the largest of all parameters."""
MASKING = 1e4
"""Outputs from this size on say nothing of the size of others."""
ALL, PART = 64, 0.125
"""Batches of so many rows are run a second time as a whole; of larger ones this part, and at least so many rows."""
APART = 2
"""Rows whose gradients are compared one by one."""
TOGETHER = 8
"""Rows whose gradient is compared with the sum over them, if a parameter has no rule that holds."""
PURPOSE = "rows of a batch"


class Scrutiny:
    """Looks at the batches of an objective as they are run.

    Each batch: its rows are run again in another company, other rows and another order. If an output changes, rows are no examples.
    The first batch of each shape, and of each sequence of calls: the gradients of two rows, by the rules and with the whole batch run,
    are held against those of the rows run alone, by torch.autograd. A parameter whose rule fails is refused; so is one that enters a call
    without a rule. If there is one, the gradient of some rows together is held against the sum over them, too: coupling that does not show
    in the outputs, because a gate is still zero, shows in the gradient of the gate.

    Of batches of more than 64 rows an eighth is run again, drawn at random, the first and the last row among them: what normalises over
    the batch moves every row. A model that couples single rows alone, without any rule, in one of many batches, may go unseen.

    Args:
        objective: Its loss must be a sum over the rows of batches.
        estimator: For messages.

    Raises:
        UnsupportedModel: If the loss is not known to be that, or tensors of a batch differ in dimension 0.
    """

    def __init__(self, objective: Objective, estimator: str) -> None:
        self._objective, self._estimator = objective, estimator
        self._found: dict[Any, dict[str, str]] = {}
        """What is refused in batches of a kind."""
        self._paths: dict[Any, set[str]] = {}
        """Parameters with a rule in the first batch of a shape."""
        self._count = 0
        refuse_without_examples(objective, estimator)

    @property
    def refused(self) -> dict[str, str]:
        """Parameters without a rule that holds for all batches so far, with the reason."""
        return {name: reason for found in self._found.values() for name, reason in found.items()}

    def look(
        self,
        batch: Batch,
        recording: Recording,
        outputs: Tensor,
        s: Tensor,
        pulled: tuple[Tensor | None, ...] | None = None,
    ) -> dict[str, str]:
        """Look at a batch that was run; call it inside `measuring()`.

        Args:
            batch: Its data.
            recording: Of the forward pass, all parameters looked for.
            outputs: In the graph, [N, ...].
            s: Any cotangent of the outputs; where it is zero, rules are not looked at, and the next batch of the kind is.
            pulled: dL/dz of the recorded calls for s, if they are there already.

        Returns:
            Parameters without a rule that holds in this batch, with the reason.

        Raises:
            UnsupportedModel: If rows are coupled, or the batch takes another path.

        Cost: see `coverage`.
        """
        self._refuse_mixed_rows(batch, outputs)
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors(batch))
        calls = tuple((use.shape, type(form), form.name) for use in recording.uses for form in use.forms)
        refused = dict(recording.refused)
        for use in recording.uses:
            if use.overwritten:
                refused |= dict.fromkeys((form.name for form in use.forms), "what it is multiplied with is overwritten")
        key = (shapes, calls, frozenset(refused))
        if key not in self._found:
            if not bool(s.any()):
                return refused  # no gradient to see, and none to add
            if pulled is None:
                pulled = pull(outputs, recording, s)
            self._compare(batch, recording, pulled, s, refused)
            self._refuse_another_path(shapes, refused)
            self._found[key] = refused
        return self._found[key]

    def _refuse_another_path(self, shapes: Any, refused: dict[str, str]) -> None:
        ruled = {name for name in self._objective.parameters.names if name not in refused}
        for name in sorted(self._paths.setdefault(shapes, ruled) - ruled):
            raise UnsupportedModel(another_path(self._estimator, name, refused[name]))

    def _refuse_mixed_rows(self, batch: Batch, outputs: Tensor) -> None:
        """Run rows in another company."""
        N, z = rows(batch) or 0, outputs.detach()
        if z.ndim == 0 or len(z) != N:
            self._refuse_coupled(f"its outputs have the shape {tuple(z.shape)}, with {N} rows in the batch")
        self._count += 1
        if N < 2 or bool(z.isnan().any()):
            return
        limit = ROUNDING * torch.finfo(z.dtype).eps * _sizes(z)
        for part in _parts(N, self._count):
            try:
                again = self._outputs_again(take_rows(batch, part))
            except Exception as error:  # whatever the model does with other rows
                if ran_out_of_memory(error):
                    raise
                said = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
                self._refuse_coupled(f"it does not run on {len(part)} of its {N} rows: {said}")
            before = z[part.to(z.device)]
            if before.shape != again.shape:
                self._refuse_coupled(f"{len(part)} of its {N} rows have outputs of shape {tuple(again.shape)}")
            difference = torch.where(before == again, 0.0, before - again).abs()
            if not bool((difference <= limit[part.to(z.device)]).all()):
                self._refuse_coupled(
                    f"outputs of {len(part)} of its {N} rows, run apart, differ by {_largest(difference):.1e}"
                )

    def _outputs_again(self, batch: Batch) -> Tensor:
        one = self._objective.with_batches([batch])
        try:
            with torch.no_grad():
                return one.outputs(0)[0]
        except RuntimeError as error:
            if not NEEDS_GRAPH.search(str(error)):
                raise
        return one.outputs(0)[0].detach()

    def _refuse_coupled(self, shown: str) -> NoReturn:
        raise UnsupportedModel(
            f"{self._estimator}: the loss of a batch is not the sum of the losses of its rows, so that rows are no examples: something "
            f"couples them (normalisation over the batch, time in dimension 0); {shown}. Put examples into dimension 0, or use Hutchinson."
        )

    def _compare(
        self,
        batch: Batch,
        recording: Recording,
        pulled: tuple[Tensor | None, ...],
        s: Tensor,
        refused: dict[str, str],
    ) -> None:
        """Hold the rules against rows run alone, and add the parameters whose rules fail."""
        names, eps = self._objective.parameters.names, torch.finfo(self._objective.dtype).eps
        size = s.abs().flatten(1).sum(1) if s.ndim > 1 else s.abs()
        chosen = size.argsort(descending=True, stable=True)[:APART].tolist()  # those that say most
        uses = grouped(recording.uses, pulled)
        alone = [self._gradients(batch, [row], s) for row in chosen]
        scales = [[0.0 if g is None else _largest(g) for g in found] for found in alone]
        largest = max((scale for row in scales for scale in row), default=0.0)
        for row, found, scale in zip(chosen, alone, scales, strict=True):
            for name, truth, own in zip(names, found, scale, strict=True):
                if name in refused:
                    continue
                difference = _difference(
                    [form.gradients(g, slice(row, row + 1)) for form, g in uses.get(name, [])], truth
                )
                if not difference <= eps * (ROUNDING * own + CANCELLED * largest):
                    by = f"by {difference / largest:.1e} of the largest" if largest else f"by {difference:.1e}"
                    refused[name] = f"the rules give another gradient than torch.autograd ({by})"
        if refused and len(s) > 1:
            self._refuse_mixed_gradients(batch, s, eps)

    def _refuse_mixed_gradients(self, batch: Batch, s: Tensor, eps: float) -> None:
        """The gradient of some rows together against the sum over them."""
        some = list(range(min(TOGETHER, len(s))))
        together = self._gradients(batch, some, s)
        total: list[Tensor | None] = [None] * len(together)
        sizes = [0.0] * len(together)
        for row in some:
            for position, g in enumerate(self._gradients(batch, [row], s)):
                if g is not None:
                    before = total[position]
                    total[position] = g if before is None else before + g
                    sizes[position] += _largest(g)
        for name, whole, apart, size in zip(self._objective.parameters.names, together, total, sizes, strict=True):
            difference = _difference([] if apart is None else [apart], whole)
            largest = max(size, 0.0 if whole is None else _largest(whole))
            if difference > eps * (ROUNDING * largest + CANCELLED * max(sizes)):
                self._refuse_coupled(f"the gradient of {name} of {len(some)} rows is not the sum over the rows")

    def _gradients(self, batch: Batch, index: list[int], s: Tensor) -> tuple[Tensor | None, ...]:
        """Of some rows alone, by autograd."""
        one = self._objective.with_batches([take_rows(batch, torch.tensor(index))])
        outputs = one.outputs(0)[0]
        if not outputs.requires_grad:
            return (None,) * len(one.tensors)
        return torch.autograd.grad(outputs, one.tensors, s[index].to(outputs), allow_unused=True)


def refuse_without_examples(objective: Objective, estimator: str) -> None:
    """Refuse data whose rows cannot be examples; nothing is run.

    Args:
        objective: The function.
        estimator: For messages.

    Raises:
        UnsupportedModel: If the loss is not known to be a sum over rows, or tensors of a batch differ in dimension 0.
    """
    if not objective.divisible:
        raise UnsupportedModel(
            f"{estimator}: the loss {objective.loss.name} is not known to be a sum over the rows of a batch. Use one of torch's "
            "own losses, for example F.cross_entropy, or an estimator that needs no single examples: Hutchinson."
        )
    if any(rows(batch) is None for batch in objective.batches):
        raise UnsupportedModel(
            f"{estimator}: the tensors of a batch differ in dimension 0, so that its examples are not known. Put examples into "
            "dimension 0 of each tensor, or use Hutchinson."
        )


def another_path(estimator: str, name: str, reason: str) -> str:
    """Say that a batch uses a parameter in another way than those that were looked at.

    Args:
        estimator: That refuses it.
        name: Of the parameter.
        reason: Why it has no rule there.

    Returns:
        The message.
    """
    return (
        f"{estimator}: one batch uses {name} in another way than the first of its shape ({reason}): the model takes another path for "
        "some data. Leave the parameter out by patterns, or use Hutchinson."
    )


def _parts(N: int, index: int) -> Iterator[Tensor]:
    """Rows in random order: two halves of few; of many a part with the first and the last."""
    order = torch.randperm(N, generator=seeds.generator(0, PURPOSE, index))
    if N <= ALL:
        yield from order.tensor_split(2)
        return
    inner = order[(order > 0) & (order < N - 1)][: max(ALL, round(PART * N)) - 2]
    part = torch.cat([inner, torch.tensor([0, N - 1])])
    yield part[torch.randperm(len(part), generator=seeds.generator(1, PURPOSE, index))]


def _difference(found: list[Tensor], truth: Tensor | None) -> float:
    """Largest, of a sum of gradients, perhaps [1, *shape], from a gradient; None is zero."""
    terms = [g[0] if truth is not None and g.ndim > truth.ndim else g for g in found]
    total = sum(terms[1:], start=terms[0]) if terms else torch.zeros(1)
    return _largest(total if truth is None else total - truth if terms else truth)


def _sizes(z: Tensor) -> Tensor:
    """What rounding of outputs is measured by: the largest of all, but for those that mask a class by -1e9 and the like."""
    size = z.abs().nan_to_num(posinf=0.0)
    usual = size[size < MASKING]
    return size.clamp(min=_largest(usual)) if usual.numel() else size


def _largest(tensor: Tensor) -> float:
    """Absolute value; NaN if there is one."""
    if not tensor.numel():
        return 0.0
    low, high = (bound.item() for bound in tensor.aminmax())
    return max(-low, high)
