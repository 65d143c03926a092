"""Samples of the trace from products in which every example has random signs of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.estimators.recordings.coverage import Coverage, refuse_uncovered
from curvkit.estimators.recordings.recording import Recording
from curvkit.estimators.recordings.uses import Use
from curvkit.estimators.rules.forms import Form, Signs
from curvkit.estimators.rules.matrices import Matrix
from curvkit.linalg.hutchinson import refuse_not_finite
from curvkit.losses.batches import rows
from curvkit.objectives import Objective
from curvkit.operators.output_graph import refuse_other_ways

PURPOSE, SHARED = "trace: signs per example", "trace: signs of parameters without a rule"
ESTIMATOR = "trace"
PER_PROBE = (1.0, 2.0)
"""Gradients that a probe is counted as: where the graph is kept, and where it is built anew."""
Moves = list[tuple[Form, Signs | Tensor]]
"""Of one use: each form with its signs, or with the change of the output itself."""


@dataclass(frozen=True, eq=False)
class BatchProbes:
    """The gradients at all outputs z and inputs x of a batch's recorded calls, with their graph.

    A probe moves the parameters of example n by eps V_n. With r = dL / d eps and w = 0 paired with x by adding <x, w> to L,

        dr/dz = d/d eps dL/dz =: g',    dr/dw = d/d eps x =: x',    s_P = sum over uses of P of <V x, g'> + <V x', g>

    V_n is the rank-one a_n b_n' for a matrix, signs for other tensors, the same at each use. A matrix that is used once, where an example
    has one position, moves its output by |x_n| a_n instead: its input x_n does not depend on it, so that
    E (|x_n| a_n)' H_z (|x_n| a_n) = |x_n|^2 tr H_z is its trace, too, with less variance than signs at the input would add.
    """

    names: tuple[str, ...]
    """Of all parameters."""
    parameters: dict[str, Tensor]
    uses: tuple[Use, ...]
    others: tuple[str, ...]
    """Parameters without a rule; all examples share their signs."""
    num_examples: int
    once: frozenset[str]
    weight: float
    factors: list[Tensor]
    """The x that depend on parameters."""
    pairs: list[Tensor]
    """Their w."""
    gradients: tuple[Tensor | None, ...]
    """At the uses, then of `others`."""

    @classmethod
    def of(cls, objective: Objective, covered: Coverage, index: int, *, residual: bool) -> BatchProbes:
        """Run a batch and differentiate it once; call it inside `objective.measuring()`.

        Args:
            objective: The function, cut as the plan says.
            covered: Which parameters have rules, in batches cut so.
            index: Of the batch.
            residual: Of H - G: the loss is replaced by <dL/dz held fixed, z> with the outputs z.

        Returns:
            What gives samples.

        Raises:
            UnsupportedModel: If the batch uses a parameter in a way that the first of its shape does not.

        Cost: a forward pass, and a backward pass without the gradients of parameters.
        """
        names = objective.parameters.names
        own: Any = dict(zip(names, objective.tensors, strict=True))
        number = rows(objective.batches[index]) or 0
        with Recording({name: own[name] for name in covered.ruled}, number) as seen:
            outputs, targets = objective.outputs(index)
        refuse_uncovered(ESTIMATOR, seen.refused, covered.ruled)
        z = outputs.detach().requires_grad_() if residual else outputs
        terms = objective.terms_of(z, targets)
        total = terms.total
        if residual:
            refuse_other_ways(objective, terms)
            (u,) = torch.autograd.grad(terms.total, z, materialize_grads=True)
            total = (u.detach() * outputs).sum()
        forms = [(form, use) for use in seen.uses for form in use.forms]
        factors = {id(f.factor): f.factor for f, _ in forms if f.factor is not None and f.factor.requires_grad}
        pairs = [torch.zeros_like(x, requires_grad=True) for x in factors.values()]
        others = tuple(name for name in names if name not in covered.ruled)
        wanted: list[Any] = [*(use.output for use in seen.uses), *(own[name] for name in others)]
        found: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if wanted and total.requires_grad:
            found = torch.autograd.grad(
                [total, *factors.values()],
                wanted,
                [torch.ones_like(total), *pairs],
                create_graph=True,
                allow_unused=True,
            )
        named = [form.name for form, _ in forms]
        once = {form.name for form, use in forms if named.count(form.name) == 1 and _has_one_position(form, use)}
        return cls(
            names,
            own,
            tuple(seen.uses),
            others,
            number,
            frozenset(once),
            terms.weight,
            list(factors.values()),
            pairs,
            found,
        )

    def sums(self, *, seed: int, draw: int, last: bool) -> Tensor:
        """Draw signs, and multiply.

        Args:
            seed: Of the signs.
            draw: Number of the probe and the batch.
            last: Whether no other follows, so that the graph may go.

        Returns:
            [p] float64: s_P of each parameter tensor, not yet divided by the weight of all batches.

        Cost: a backward pass through the graph of one, without the gradients of parameters.
        """
        found, moves = dict.fromkeys(self.names, 0.0), self._moves(seed, draw)
        shared = {name: _signs(self.parameters[name], f"{SHARED} {name}", None, seed, draw) for name in self.others}
        given: list[Tensor | None] = list(self.gradients)
        own = zip(shared.values(), given[len(self.uses) :], strict=True)
        terms = [(v * g).sum() for v, g in own if g is not None]
        at = list(zip(self.uses, given, moves, strict=False))
        changes = {id(form): _change(form, signs) for _, _, each in at for form, signs in each}
        terms += [(changes[id(form)] * g).sum() for _, g, each in at if g is not None for form, _ in each]
        r = sum(terms, start=torch.zeros(()))
        if not r.requires_grad:
            return torch.zeros(len(self.names), dtype=torch.float64)
        wanted: list[Any] = [
            *(use.output for use in self.uses),
            *self.pairs,
            *(self.parameters[n] for n in self.others),
        ]
        dots: list[Tensor | None] = list(torch.autograd.grad(r, wanted, retain_graph=not last, allow_unused=True))
        places = {id(x): dots[len(self.uses) + i] for i, x in enumerate(self.factors)}
        with torch.no_grad():
            for (_, g, each), g_dot in zip(at, dots, strict=False):
                for form, signs in each:
                    if g_dot is not None:
                        found[form.name] += _dot(changes[id(form)], g_dot)
                    x_dot = places.get(id(form.factor))
                    if g is not None and x_dot is not None and isinstance(signs, Signs):
                        found[form.name] += _dot(_change(form.moved(x_dot), signs), g)
            for (name, v), product in zip(shared.items(), dots[len(self.uses) + len(self.pairs) :], strict=True):
                found[name] += 0.0 if product is None else _dot(v, product)
        return torch.tensor([found[name] for name in self.names], dtype=torch.float64)

    def _moves(self, seed: int, draw: int) -> list[Moves]:
        drawn: dict[str, Signs] = {}
        found = list[Moves]()
        for use in self.uses:
            found.append([])
            for form in use.forms:
                like, purpose = self.parameters[form.name], f"{PURPOSE} {form.name}"
                if form.name in self.once and isinstance(form, Matrix):
                    x = form.features(form.x.detach())  # [N, 1, C, k]
                    o = like.numel() // (x.shape[-1] * form.groups)
                    a = _signs(like, purpose, (self.num_examples, 1, form.groups, o), seed, draw)
                    found[-1].append((form, form.incoming(torch.linalg.vector_norm(x, dim=-1, keepdim=True) * a)))
                    continue
                if form.name not in drawn:
                    shapes = [tuple(like.shape)]
                    if form.factored:
                        shapes = [(like.shape[0],), (math.prod(like.shape[1:]),)]
                    parts = enumerate((self.num_examples, *shape) for shape in shapes)
                    drawn[form.name] = Signs(*(_signs(like, f"{purpose} {i}", shape, seed, draw) for i, shape in parts))
                found[-1].append((form, drawn[form.name]))
        return found


@dataclass(frozen=True, eq=False)
class ExampleProbes:
    """Samples whose mean is the trace of H, or of H - G with G the generalised Gauss-Newton matrix, by parameter tensors."""

    objective: Objective
    """In the precision that is computed in, cut as the plan says."""
    coverage: Coverage
    """Of this very objective: rules that hold for whole batches may fail for parts of them."""
    residual: bool
    seed: int
    keep: bool
    """Keep the graphs of all batches."""
    _kept: list[BatchProbes] = field(default_factory=list)

    def row(self, probe: int) -> Tensor:
        """Draw one sample.

        Args:
            probe: Its number; the sample depends on (seed, probe) and the cut of the data alone.

        Returns:
            [p] float64, s_P / W of each parameter tensor.

        Raises:
            CurvkitError: If it is not finite.
            UnsupportedModel: If a batch uses a parameter in a way that the first of its shape does not.

        Cost: `PER_PROBE` gradients.
        """
        count = len(self.objective.batches)
        total, weights = torch.zeros(len(self.objective.parameters.names), dtype=torch.float64), list[float]()
        for index in range(count):
            with self.objective.measuring():
                if index < len(self._kept):
                    batch = self._kept[index]
                else:
                    batch = BatchProbes.of(self.objective, self.coverage, index, residual=self.residual)
                    if self.keep:
                        self._kept.append(batch)
                total += batch.sums(seed=self.seed, draw=probe * count + index, last=not self.keep)
            weights.append(batch.weight)
        refuse_not_finite(total, f"with the signs of probe {probe + 1}")
        return total / self.objective.denominator(weights)


def without_rank_one(objective: Objective, covered: Coverage) -> frozenset[str]:
    """Which parameters are not moved by rank-one signs, whose sums over a matrix vary more than independent signs would let them.

    Args:
        objective: The function.
        covered: Which parameters have rules.

    Returns:
        Names of ruled parameters: no matrices, or matrices that are used once, at one position.

    Cost: a forward pass of the first batch.
    """
    own: Any = dict(zip(objective.parameters.names, objective.tensors, strict=True))
    with objective.measuring(), Recording({n: own[n] for n in covered.ruled}, rows(objective.batches[0]) or 0) as seen:
        objective.outputs(0)
    forms = [(form, use) for use in seen.uses for form in use.forms]
    named = [form.name for form, _ in forms]
    heavy = {
        form.name
        for form, use in forms
        if form.factored and (named.count(form.name) > 1 or not _has_one_position(form, use))
    }
    return frozenset(set(covered.ruled) - heavy)


def _signs(like: Tensor, purpose: str, shape: Sequence[int] | None, seed: int, draw: int) -> Tensor:
    shape = tuple(like.shape) if shape is None else tuple(shape)
    return seeds.signs(math.prod(shape), seed, purpose, draw, dtype=like.dtype, device=like.device).view(shape)


def _change(form: Form, signs: Signs | Tensor) -> Tensor:
    """V x, of the shape of z."""
    return signs if isinstance(signs, Tensor) else form.probe(signs)


def _dot(a: Tensor, b: Tensor) -> float:
    return (a * b).sum(dtype=torch.float64).item()


def _has_one_position(form: Form, use: Use) -> bool:
    return isinstance(form, Matrix) and form.outgoing(use.kind.new_zeros(use.shape)).shape[1] == 1
