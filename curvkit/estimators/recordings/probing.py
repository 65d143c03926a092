"""Products with the Hessian in which every example moves the parameters by random signs of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import UnsupportedModel
from curvkit.estimators.recordings.recording import Recording
from curvkit.estimators.recordings.uses import Use
from curvkit.estimators.rules.forms import Form, Signs

OUTPUTS = 9
"""Number of the signs at outputs, beside those of the factors of a matrix."""
TWO_KINDS = "it enters both as a matrix and entry by entry"
PURPOSE, SHARED = "per-example signs", "signs of parameters without a rule"


class Probing:
    """The gradients at all outputs z and inputs x of recorded calls, with their graph, ready for any number of probes.

    A probe moves the parameters of example n by eps V_n, V_n signs, so that z of its calls moves by eps (V_n x). Then

        r = dL / d eps = sum <dL/dz, V x>,    dr/dz = d/d eps dL/dz,    dr/dw = d/d eps x

    by the symmetry of second derivatives, where w = 0 is paired with x by adding <x, w> to L; and the two derivatives of r are all
    that `Form.collected` needs. L and its gradients are computed once, without signs.

    Where parameters are used once and each of their entries meets one entry of z in an example (dense layers on vectors), z itself is
    moved, by signs u_n: since the Hessian in W is that in z times x x', u_n * (d/d eps dL_n/dz) times x^2 has the mean wanted, and
    no noise of signs at the input.

    Args:
        recording: Of a forward pass.
        total: L of its batch as a sum over examples, differentiable.
        others: Parameters without a rule, by name; their signs are shared by all examples.

    Raises:
        UnsupportedModel: If a parameter enters both as a matrix and entry by entry.

    Cost: one backward pass without gradients of parameters, with its graph.
    """

    def __init__(self, recording: Recording, total: Tensor, others: Mapping[str, Tensor] | None = None) -> None:
        self._others = dict(others or {})
        self._num_examples = recording.num_examples
        self._parameters = recording.parameters
        self._order = {name: number for number, name in enumerate(recording.parameters)}
        for name in of_two_kinds(recording):
            raise UnsupportedModel(
                f"ExampleHutchinson: {name} cannot have signs of its own: {TWO_KINDS}. Use Hutchinson, or Fisher."
            )
        factors: dict[int, Tensor] = {}
        names = [form.name for use in recording.uses for form in use.forms]
        self._direct = {
            use
            for use in recording.uses
            if all(names.count(form.name) == 1 and form.has_one_position(use.shape) for form in use.forms)
        }
        """Whose z is moved itself."""
        for use in recording.uses:
            for form in use.forms if use not in self._direct else ():
                if form.factor is not None and form.factor.requires_grad:
                    factors.setdefault(id(form.factor), form.factor)
        self._places = {key: number for number, key in enumerate(factors)}
        self._weights = [x.detach().new_zeros(()).expand(x.shape).requires_grad_() for x in factors.values()]
        wanted: list[Any] = [*(use.output for use in recording.uses), *self._others.values()]
        found: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if total.requires_grad and wanted:
            found = torch.autograd.grad(
                [total, *factors.values()],
                wanted,
                [torch.ones_like(total), *self._weights],
                create_graph=True,
                allow_unused=True,
            )
        self._uses = [(use, g) for use, g in zip(recording.uses, found, strict=False) if g is not None]
        self._moved = dict(zip(self._others, found[len(recording.uses) :], strict=True))

    def sample(self, *, seed: int, index: int, last: bool = False) -> dict[str, Tensor]:
        """Multiply signs with the Hessian.

        Args:
            seed: Of the signs.
            index: Of the probe.
            last: Whether no other follows, so that the graph may go.

        Returns:
            sum_n V_n * (H_n V_n) for each recorded parameter, and V * (H V) for each of the others, in their shapes: one sample of the
            diagonal of the Hessian of L. Parameters that are not used are left out.

        Cost: a backward pass through the graph of one, and as much as the gradients of the parameters, twice.
        """
        drawn, moves = dict[str, Signs](), dict[Use, Tensor]()
        shared = {name: self._shared(name, p, seed, index) for name, p in self._others.items()}
        roots, cotangents = list[Tensor](), list[Tensor]()
        with torch.no_grad():
            for use, g in self._uses:
                if use in self._direct:
                    moves[use] = self._signs(use.forms[0].name, OUTPUTS, use.shape, seed, index)
                    roots.append(g)
                    cotangents.append(moves[use])
                    continue
                for form in use.forms:
                    if form.name not in drawn:
                        drawn[form.name] = self._drawn(form, seed, index)
                roots.append(g)
                cotangents.append(_total([form.probe(drawn[form.name]) for form in use.forms]))
                for form in use.forms:
                    x = form.factor
                    if x is not None and x.requires_grad and (back := form.pulled(drawn[form.name], g)) is not None:
                        roots.append(x)
                        cotangents.append(back)
        for name, v in shared.items():
            moved = self._moved[name]
            if moved is not None:
                roots.append(moved)
                cotangents.append(v)
        wanted: list[Any] = [*(use.output for use, _ in self._uses), *self._weights, *self._others.values()]
        dots: tuple[Tensor | None, ...] = (None,) * len(wanted)
        known = [place for place, root in enumerate(roots) if root.requires_grad]
        if wanted and known:
            dots = torch.autograd.grad(
                [roots[place] for place in known],
                wanted,
                [cotangents[place] for place in known],
                retain_graph=not last,
                allow_unused=True,
            )
        del roots, cotangents
        with torch.no_grad():
            found = self._collected(drawn, moves, dots)
        for (name, v), product in zip(shared.items(), dots[len(self._uses) + len(self._weights) :], strict=True):
            found[name] = torch.zeros_like(v) if product is None else v * product
        return found

    def _collected(
        self, drawn: Mapping[str, Signs], moves: Mapping[Use, Tensor], dots: tuple[Tensor | None, ...]
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for (use, g), g_dot in zip(self._uses, dots, strict=False):
            g_dot = use.kind.new_zeros(use.shape) if g_dot is None else g_dot
            if use in moves:
                found |= {form.name: form.weighed(moves[use] * g_dot) for form in use.forms}
                continue
            for form in use.forms:
                x_dot = None if form.factor is None else self._dot(form.factor, dots)
                part = form.collected(drawn[form.name], g, g_dot, x_dot)
                found[form.name] = found[form.name] + part if form.name in found else part
        return found

    def _dot(self, factor: Tensor, dots: tuple[Tensor | None, ...]) -> Tensor | None:
        place = self._places.get(id(factor))
        return None if place is None else dots[len(self._uses) + place]

    def _drawn(self, form: Form, seed: int, index: int) -> Signs:
        """The signs of a parameter for all N examples."""
        shape, N, name = tuple(self._parameters[form.name].shape), self._num_examples, form.name
        if form.factored:
            sizes = (shape[0], math.prod(shape[1:]))
            return Signs(*(self._signs(name, part, (N, size), seed, index) for part, size in enumerate(sizes)))
        return Signs(self._signs(name, 0, (N, *shape), seed, index))

    def _signs(self, name: str, part: int, shape: tuple[int, ...], seed: int, index: int) -> Tensor:
        purpose, like = f"{PURPOSE} {self._order[name]}.{part}", self._parameters[name]
        flat = seeds.signs(math.prod(shape), seed, purpose, index, dtype=like.dtype, device=like.device)
        return flat.view(shape)

    def _shared(self, name: str, parameter: Tensor, seed: int, index: int) -> Tensor:
        purpose = f"{SHARED} {name}"
        flat = seeds.signs(parameter.numel(), seed, purpose, index, dtype=parameter.dtype, device=parameter.device)
        return flat.view(parameter.shape)


def of_two_kinds(recording: Recording) -> tuple[str, ...]:
    """Find parameters whose uses want different signs: products of two vectors, and one for each entry.

    Args:
        recording: Of a forward pass.

    Returns:
        Their names.
    """
    kinds: dict[str, set[bool]] = {}
    for use in recording.uses:
        for form in use.forms:
            kinds.setdefault(form.name, set()).add(form.factored)
    return tuple(name for name, found in kinds.items() if len(found) > 1)


def _total(parts: list[Tensor]) -> Tensor:
    return sum(parts[1:], start=parts[0])


def moved_bytes(recording: Recording) -> int:
    """Count what a probe holds beside the graph: gradients, changes and derivatives at all outputs and inputs of calls.

    Args:
        recording: Of a forward pass.

    Returns:
        Bytes.
    """
    outputs = sum(math.prod(use.shape) * use.kind.element_size() for use in recording.uses)
    factors = {id(form.factor): form.factor for use in recording.uses for form in use.forms}
    inputs = sum(x.numel() * x.element_size() for x in factors.values() if x is not None and x.requires_grad)
    return 6 * outputs + 4 * inputs
