"""Sums of squared gradients of single examples, watched while they are taken: whether rows are examples, rules hold, memory lasts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvkit.errors import CurvkitError, ran_out_of_memory
from curvkit.estimators.recordings.cotangents import pull
from curvkit.estimators.recordings.coverage import refuse_not_finite
from curvkit.estimators.recordings.recording import Recording
from curvkit.estimators.recordings.scrutiny import Scrutiny
from curvkit.estimators.recordings.uses import grouped, summed_squares
from curvkit.estimators.rules.forms import Form
from curvkit.estimators.rules.matrices import Matrix
from curvkit.estimators.rules.row_runs import Rows
from curvkit.estimators.rules.scales import Scale
from curvkit.estimators.squares.mapped import mapped_squares
from curvkit.losses.batches import Batch, map_tensors, rows
from curvkit.objectives import Objective
from curvkit.operators.memory import free_memory, megabytes, release


@dataclass(frozen=True)
class Run:
    """Consecutive rows of a batch that are run together."""

    index: int
    """Number of the batch."""
    begin: int
    end: int
    size: int
    """Of the whole batch."""

    def of(self, batch: Batch) -> Batch:
        """These rows of a batch, as views."""
        return batch if self.end - self.begin == self.size else map_tensors(lambda t: t[self.begin : self.end], batch)

    def halves(self) -> tuple[Run, Run]:
        """The same rows in two runs."""
        middle = (self.begin + self.end + 1) // 2
        return Run(self.index, self.begin, middle, self.size), Run(self.index, middle, self.end, self.size)


Cotangent = Callable[[Run, Tensor, Any], Tensor]
"""(the rows, outputs, targets) -> s, of the shape of the outputs."""


class WatchedSquares:
    """Q = sum_b sum_n (J_n' s_n)^2 over all examples n, entry by entry, one s given for each batch.

    Gradients of single examples are never written out for layers whose examples have one position; others are, in chunks. Parameters
    without a rule are treated example by example. What `Scrutiny` looks at it looks at the first time that a batch is run. Where memory
    runs out, a batch is run in halves, and so are those after it.

    Args:
        objective: The function, in the precision that is computed in.
        estimator: For messages.

    Raises:
        UnsupportedModel: If the examples cannot be told apart.
    """

    def __init__(self, objective: Objective, estimator: str) -> None:
        self.objective, self.estimator = objective, estimator
        self._scrutiny = Scrutiny(objective, estimator)
        self._looked: dict[Run, dict[str, str]] = {}
        """What has no rule in rows that were looked at."""
        self._most: int | None = None
        """Rows at a time, once memory ran out."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What went otherwise than planned, so far."""
        cut = f"out of memory: went on with at most {self._most} rows at a time"
        return (
            *(
                f"{n} has no rule ({reason}): its examples were treated one by one"
                for n, reason in self._scrutiny.refused.items()
            ),
            *((cut,) if self._most is not None else ()),
        )

    def batches(self, cotangent: Cotangent) -> Iterator[tuple[dict[str, Tensor], float]]:
        """Go through the data.

        Args:
            cotangent: s of each run of rows.

        Yields:
            Q and the weight of one batch after the other, or of its parts.

        Raises:
            UnsupportedModel: If the rows are no examples.
            CurvkitError: If a gradient is not finite, or memory does not suffice for one row.
            RuntimeError: Torch's, where it is no matter of memory.
            MemoryError: Never: it is one.

        Cost: about one gradient; the first time what `Scrutiny` costs.
        """
        for index, batch in enumerate(self.objective.batches):
            size = rows(batch) or 0
            runs = [Run(index, 0, size, size)]
            while runs:
                run = runs.pop(0)
                if self._most is not None and run.end - run.begin > self._most:
                    runs[:0] = run.halves()
                    continue
                try:
                    with self.objective.measuring():
                        found, weight = self._run(run, cotangent)
                except (RuntimeError, MemoryError) as error:
                    if not ran_out_of_memory(error):
                        raise
                    said = str(error).strip().partition("\n")[0][:200] or type(error).__name__
                else:
                    refuse_not_finite(self.estimator, found)
                    yield found, weight
                    continue
                self._relieve(
                    run, said
                )  # outside of the handler: the frames of the exception and the graphs in them are gone
                runs[:0] = [run]

    def mean(self, cotangent: Cotangent) -> dict[str, Tensor]:
        """Go through the data, and divide by the weight of all of it.

        Args:
            cotangent: s of each run of rows.

        Returns:
            (1 / W) Q, parameter-shaped.

        Raises:
            UnsupportedModel: As `batches`.
            CurvkitError: As `batches`.
        """
        total: dict[str, Tensor] = {}
        weights: list[float] = []
        for found, weight in self.batches(cotangent):
            weights.append(weight)
            total = {name: total[name].add_(value) for name, value in found.items()} if total else found
        scale = self.objective.denominator(weights)
        return {name: value.div_(scale) for name, value in total.items()}

    def _relieve(self, run: Run, said: str) -> None:
        release(self.objective.device)
        size = run.end - run.begin
        if size <= 1:
            raise CurvkitError(
                f"{self.estimator}: out of memory with one row at a time ({said}). "
                f"{megabytes(free_memory(self.objective.device))} are free on {self.objective.device}. Shorten the rows, leave parameters "
                "out by patterns, use float32, or a device with more memory."
            )
        self._most = (size + 1) // 2

    def _run(self, run: Run, cotangent: Cotangent) -> tuple[dict[str, Tensor], float]:
        batch, names = run.of(self.objective.batches[run.index]), self.objective.parameters.names
        objective = self.objective if run.end - run.begin == run.size else self.objective.with_batches([batch])
        parameters: Any = dict(zip(names, objective.tensors, strict=True))
        with Recording(parameters, run.end - run.begin) as recording:
            outputs, targets = objective.outputs(run.index if objective is self.objective else 0)
        z = outputs.detach()
        weight = objective.terms_of(z, targets).weight
        s = cotangent(run, outputs, targets)
        pulled = pull(outputs, recording, s, keep=False)
        del outputs
        refused = self._looked.get(run)
        if refused is None:
            refused = self._scrutiny.look(batch, recording, z, s, pulled)
            if bool(s.any()):
                self._looked[run] = refused
        found = mapped_squares(objective, batch, s, refused) | recorded_squares(recording, pulled, refused)
        return {n: found[n] if n in found else torch.zeros_like(p) for n, p in parameters.items()}, weight


def recorded_squares(
    recording: Recording, pulled: tuple[Tensor | None, ...], refused: Collection[str] = ()
) -> dict[str, Tensor]:
    """Add up squares of gradients of single examples from a recorded pass.

    Args:
        recording: Of the pass.
        pulled: dL/dz of its calls, of `pull`.
        refused: Parameters that are left out.

    Returns:
        sum_n (J_n' s_n)^2 by name, in float32 at least; names that the outputs do not depend on are missing.

    Cost: a product of matrices per call, as for the gradient.
    """
    return {
        name: summed_squares([raised(form, g) for form, g in uses])
        for name, uses in grouped(recording.uses, pulled).items()
        if name not in refused
    }


def recorded_mean(estimator: str, recording: Recording, outputs: Tensor, s: Tensor, scale: float) -> dict[str, Tensor]:
    """Squares of gradients of single examples of a batch in training, whose graph is kept.

    Args:
        estimator: For the message.
        recording: Of the forward pass; see `refuse_unfit`.
        outputs: In the graph.
        s: Cotangent of the outputs.
        scale: What is divided by.

    Returns:
        sum_n (J_n' s_n)^2 / scale, in shape and dtype of the parameters.

    Raises:
        CurvkitError: If a gradient is not finite.

    Cost: a backward pass.
    """
    found = recorded_squares(recording, pull(outputs, recording, s.to(outputs)))
    sample = {
        name: found[name].div_(scale).to(p.dtype) if name in found else torch.zeros_like(p)
        for name, p in recording.parameters.items()
    }
    refuse_not_finite(estimator, sample)
    return {name: value.detach() for name, value in sample.items()}


def raised(form: Form, g: Tensor) -> tuple[Form, Tensor]:
    """Bring half precision, as of autocast in training, to float32.

    Args:
        form: Of a recorded call.
        g: dL/dz.

    Returns:
        Both, in float32 at least.
    """
    if isinstance(form, Rows):
        form = replace(form, inner=raised(form.inner, g)[0])
    x = form.x if isinstance(form, Matrix | Scale) else None
    if x is not None and x.dtype.itemsize < 4:
        form = replace(form, x=x.float())
    return form, g.float() if g.dtype.itemsize < 4 else g
