"""The contract of operators."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvkit import seeds
from curvkit.errors import InvalidArgument
from curvkit.linalg import LinearMap
from curvkit.linalg.basis import dot, norm
from curvkit.objectives import Objective
from curvkit.testing.contract import Contract, undisturbed

CONTRACT = Contract(
    "check_operator",
    "Mend the operator; the docstring of curvkit.testing.check_operator has each property as an equation.",
)
LIMIT = 64.0
"""Two ways to the same number may differ by LIMIT eps ||A||. Rounding in right operators: at most 4 eps ||A|| per product; the least
asymmetry that was seen in a wrong one (weight_norm, 269k parameters, float32): 250 eps."""


def check_operator(operator: LinearMap, *, objective: Objective | None = None, seed: int = 0) -> None:
    """Check that an operator keeps what curvkit relies on: linear, symmetric, repeatable, and without side effects.

    With random unit vectors u and v, and w = A u / ||A u||:

        ||A (u + c v) - A u - c A v|| <= (1 + c) l     |x'(A y) - y'(A x)| <= l     ||A [u v w] - [A u  A v  A w]|| <= l
        A u = A u bit for bit on the CPU, within l on other devices     A 0 = 0        l = 64 eps max(||A u||, ||A v||, ||A w||)

    for each column, and each pair x, y of the three; an operator whose attribute `product_error` is above 8 eps is allowed eight times
    that instead of 64 eps. Products keep shape, dtype and device, are finite, need no gradient, leave
    the vector that they are given and earlier products as they were, and refuse vectors of a wrong shape by `InvalidArgument`.

    Args:
        operator: Any `LinearMap` or `CurvatureOperator`.
        objective: What the operator belongs to. If given, model, data, random states and global flags must be the same before and after,
            also when a forward pass of the model raises in the middle of a product.
        seed: Of the vectors.

    Raises:
        InvalidArgument: Naming the first property that fails.

    Cost: 10 products, and two copies of the objective's tensors in hashes.

    Example:
        >>> from curvkit.linalg import DenseMap
        >>> check_operator(DenseMap(torch.diag(torch.tensor([2.0, 1.0]))))
    """
    _check_attributes(operator)
    with undisturbed(CONTRACT, objective, "a product"):
        probes = _Probes.draw(operator, seed)
        _check_linear(probes)
        _check_symmetric(probes)
        _check_repeatable(probes)
        _check_matmat(probes)
    with undisturbed(CONTRACT, objective, "a refused product"):
        _check_refusals(operator)
    if objective is not None:
        with undisturbed(CONTRACT, objective, "a product whose forward pass raised"):
            _interrupted(operator, objective, probes.vectors[0])


@dataclass(frozen=True, eq=False)
class _Probes:
    """Some unit vectors with their products."""

    operator: LinearMap
    vectors: list[Tensor]
    products: list[Tensor]

    @classmethod
    def draw(cls, operator: LinearMap, seed: int) -> _Probes:
        kind: Mapping[str, Any] = {"dtype": operator.dtype, "device": operator.device}
        u, v = (seeds.normal(operator.n, seed, "check operator", index, **kind) for index in range(2))
        u, v = u / norm(u), v / norm(v)
        Au = _multiplied(operator.matvec, u, "matvec")
        w = Au / norm(Au) if norm(Au) > 0.0 else v.clone()
        return cls(operator, [u, v, w], [Au, *(_multiplied(operator.matvec, x, "matvec") for x in (v, w))])

    @property
    def scale(self) -> float:
        """Estimate of ||A||."""
        return max(norm(product) for product in self.products)

    @property
    def limit(self) -> float:
        """What rounding may make of a difference."""
        known = getattr(self.operator, "product_error", 0.0)
        return max(LIMIT * torch.finfo(self.operator.dtype).eps, LIMIT / 8 * known) * self.scale


def _check_attributes(operator: LinearMap) -> None:
    missing = [name for name in ("n", "dtype", "device", "matvec", "matmat") if not hasattr(operator, name)]
    if missing:
        CONTRACT.refuse(
            "attributes", f"{type(operator).__name__} has no {', '.join(missing)}", "n, dtype, device, matvec, matmat"
        )
    if isinstance(operator.n, bool) or not isinstance(operator.n, int) or operator.n < 1:
        CONTRACT.refuse("attributes", f"n is {operator.n!r}", "an integer of at least 1")
    if not isinstance(operator.dtype, torch.dtype) or not operator.dtype.is_floating_point:
        CONTRACT.refuse("attributes", f"dtype is {operator.dtype!r}", "a real floating-point torch.dtype")
    if not isinstance(operator.device, torch.device):
        CONTRACT.refuse("attributes", f"device is {operator.device!r}", "a torch.device")


def _check_linear(probes: _Probes) -> None:
    u, v, _ = probes.vectors
    Au, Av, _ = probes.products
    c = 0.7
    A_sum = _multiplied(probes.operator.matvec, u + c * v, "matvec")
    CONTRACT.compare("linear", f"||A(u + {c} v) - Au - {c} Av||", norm(A_sum - Au - c * Av), (1 + c) * probes.limit)
    CONTRACT.compare("linear", "||A 0||", norm(_multiplied(probes.operator.matvec, torch.zeros_like(u), "matvec")), 0.0)


def _check_symmetric(probes: _Probes) -> None:
    for i, j in ((0, 1), (0, 2), (1, 2)):
        (x, y), (Ax, Ay) = (tuple(row[k] for k in (i, j)) for row in (probes.vectors, probes.products))
        names = f"|{'uvw'[i]}.A{'uvw'[j]} - {'uvw'[j]}.A{'uvw'[i]}|"
        CONTRACT.compare("symmetric", names, abs(dot(x, Ay) - dot(y, Ax)), probes.limit)


def _check_repeatable(probes: _Probes) -> None:
    before = probes.products[0].clone()
    again = _multiplied(probes.operator.matvec, probes.vectors[0], "matvec")
    allowed = 0.0 if probes.operator.device.type == "cpu" else probes.limit
    CONTRACT.compare("repeatable", "||Au - Au|| of two calls", norm(again - before), allowed)
    if not torch.equal(probes.products[0], before):
        CONTRACT.refuse(
            "results are kept",
            "a later product overwrote the tensor that an earlier one returned",
            "a tensor of its own",
        )


def _check_matmat(probes: _Probes) -> None:
    for size in (3, 1):
        V = torch.stack(probes.vectors[:size]).T  # [n, k], not contiguous
        AV = _multiplied(probes.operator.matmat, V, "matmat")
        for column, Av in zip(AV.unbind(1), probes.products, strict=False):
            CONTRACT.compare(
                "matmat is matvec column by column", f"||(AV)_i - Av_i||, k = {size},", norm(column - Av), probes.limit
            )


def _check_refusals(operator: LinearMap) -> None:
    n = operator.n
    for name, shapes in (("matvec", [(n + 1,), (n, 1), ()]), ("matmat", [(n,), (n + 1, 2)])):
        for shape in shapes:
            wrong = torch.zeros(shape, dtype=operator.dtype, device=operator.device)
            try:
                getattr(operator, name)(wrong)
            except InvalidArgument:
                continue
            except Exception as error:
                raise InvalidArgument(
                    CONTRACT.said(
                        "wrong shapes are refused", f"{name} of {list(shape)} raised {error!r}", "InvalidArgument"
                    )
                ) from error
            CONTRACT.refuse(
                "wrong shapes are refused", f"{name} took a tensor of shape {list(shape)}, n = {n}", "InvalidArgument"
            )


def _interrupted(operator: LinearMap, objective: Objective, v: Tensor) -> None:
    """Let the model's forward pass raise, where the operator makes one."""

    class Interruption(Exception):
        pass

    def interrupt(module: nn.Module, inputs: object) -> None:
        raise Interruption

    handle = objective.model.register_forward_pre_hook(interrupt)
    try:
        with contextlib.suppress(Interruption):
            operator.matvec(v)
    finally:
        handle.remove()


def _multiplied(multiply: Callable[[Tensor], Tensor], V: Tensor, name: str) -> Tensor:
    """A product, with the checks that hold for each."""
    before = V.clone()
    AV = multiply(V)
    if not isinstance(AV, Tensor):
        CONTRACT.refuse(f"{name} returns a tensor", f"it returned a {type(AV).__name__}", "a tensor")
    for what, got, allowed in (
        ("shape", list(AV.shape), list(V.shape)),
        ("dtype", AV.dtype, V.dtype),
        ("device", AV.device, V.device),
        ("requires_grad", AV.requires_grad, False),
    ):
        if got != allowed:
            CONTRACT.refuse(
                f"{name} keeps shape, dtype and device", f"the product has {what} {got}", f"{what} {allowed}"
            )
    if not bool(torch.isfinite(AV).all()):
        CONTRACT.refuse(
            f"{name} is finite", "the product of a unit vector has NaN or infinite entries", "finite numbers"
        )
    if not torch.equal(V, before):
        CONTRACT.refuse(f"{name} leaves its argument alone", "the vector was changed in place", "the vector as it was")
    return AV
