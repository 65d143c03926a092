"""A forward pass in which every example moves the parameters by random signs of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from curvkit import seeds
from curvkit.estimators.forms import Form, Lookup, Matrix, Signs
from curvkit.estimators.recording import Recording

PURPOSE = "per-example signs"


class Probing(Recording):
    """Adds eps V_n to the parameters of example n, V_n signs, where they are used, with eps = 0.

    Each output z of a recorded call becomes z + dz + eps * (change of z by the signs), with dz = 0, and each factor x is paired with a
    w = 0 by adding <x, w> to the loss. Then r = dL / d eps is sum_n <V_n, dL_n/dW>, and by the symmetry of second derivatives

        dr/d dz = d/d eps dL/dz,      dr/d w = d/d eps x,

    so that two backward passes give all that `Form.collected` needs.

    Args:
        parameters: Which are moved, by name.
        num_examples: N.
        seed: Of the signs.
        index: Of the probe.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], num_examples: int, *, seed: int, index: int) -> None:
        super().__init__(parameters, num_examples)
        kind = next(iter(parameters.values()))
        self.eps = torch.zeros((), dtype=kind.dtype, device=kind.device, requires_grad=True)
        self.shifts: list[Tensor] = []
        """dz of each use."""
        self.weights: list[tuple[Tensor, Tensor]] = []
        """(x, w) of each factor in the graph."""
        self.parts: list[tuple[Form, int, int | None]] = []
        """Each form, with the number of its use and of its factor."""
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._order = {name: number for number, name in enumerate(parameters)}
        self._seed, self._index, self._signs = seed, index, dict[str, Signs]()

    def recorded(self, forms: tuple[Form, ...], output: Tensor) -> Tensor:
        """Move the output; see the class."""
        shift = torch.zeros_like(output, requires_grad=True)
        super().recorded(forms, output)
        moved = output + shift
        for form in forms:
            factor = form.factor
            if factor is not None and factor.requires_grad:
                weight = torch.zeros_like(factor, requires_grad=True)
                self.weights.append((factor, weight))
            number = len(self.weights) - 1 if factor is not None and factor.requires_grad else None
            self.parts.append((form, len(self.shifts), number))
            moved = moved + self.eps * form.probe(self.signs(form))
        self.shifts.append(shift)
        return moved

    def signs(self, form: Form) -> Signs:
        """The signs of a parameter, drawn once.

        Args:
            form: One of its uses.

        Returns:
            Those of all N examples.
        """
        name = form.name
        if name not in self._signs:
            shape, N = self._shapes[name], self.num_examples
            if isinstance(form, Matrix | Lookup):
                sizes = (shape[0], math.prod(shape[1:]))
                self._signs[name] = Signs(*(self._drawn(name, part, (N, size)) for part, size in enumerate(sizes)))
            else:
                self._signs[name] = Signs(self._drawn(name, 0, (N, *shape)))
        return self._signs[name]

    def diagonal(self, total: Tensor, others: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Multiply the signs with the Hessian.

        Args:
            total: L of the batch as a sum over its examples, computed with this recording active.
            others: Parameters by name that were moved by eps times something else.

        Returns:
            sum_n V_n * (H V)_n for each recorded parameter, in its shape: one sample of the diagonal of the Hessian of `total`. For each of
            `others` H V.

        Cost: two backward passes.
        """
        paired = sum(((x * w).sum() for x, w in self.weights), start=total)
        first = torch.autograd.grad(paired, [self.eps, *self.shifts], create_graph=True)
        r, gradients = first[0], first[1:]
        wanted = [*self.shifts, *(w for _, w in self.weights)]
        rest = dict(others or {})
        dots = torch.autograd.grad(r, [*wanted, *rest.values()], materialize_grads=True)
        found = dict(zip(rest, dots[len(wanted) :], strict=True))
        for form, use, factor in self.parts:
            x_dot = None if factor is None else dots[len(self.shifts) + factor]
            part = form.collected(self.signs(form), gradients[use].detach(), dots[use], x_dot)
            found[form.name] = found[form.name] + part if form.name in found else part
        return found

    def _drawn(self, name: str, part: int, shape: tuple[int, ...]) -> Tensor:
        purpose = f"{PURPOSE} {self._order[name]}.{part}"
        flat = seeds.signs(
            math.prod(shape), self._seed, purpose, self._index, dtype=self.eps.dtype, device=self.eps.device
        )
        return flat.view(shape)
