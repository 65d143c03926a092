"""The contracts as checks that anyone can run on a class of their own.

A check returns nothing, or raises an `InvalidArgument` that names the property that fails, what was found and what is allowed.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy
import torch
from torch import Tensor, nn

from curvkit import seeds
from curvkit.errors import InvalidArgument
from curvkit.linalg import LinearMap
from curvkit.linalg.basis import dot, norm
from curvkit.objectives import Objective
from curvkit.objectives.data import fingerprint

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
    with _undisturbed(objective, "a product"):
        probes = _Probes.draw(operator, seed)
        _check_linear(probes)
        _check_symmetric(probes)
        _check_repeatable(probes)
        _check_matmat(probes)
    with _undisturbed(objective, "a refused product"):
        _check_refusals(operator)
    if objective is not None:
        with _undisturbed(objective, "a product whose forward pass raised"):
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
        _refuse(
            "attributes", f"{type(operator).__name__} has no {', '.join(missing)}", "n, dtype, device, matvec, matmat"
        )
    if isinstance(operator.n, bool) or not isinstance(operator.n, int) or operator.n < 1:
        _refuse("attributes", f"n is {operator.n!r}", "an integer of at least 1")
    if not isinstance(operator.dtype, torch.dtype) or not operator.dtype.is_floating_point:
        _refuse("attributes", f"dtype is {operator.dtype!r}", "a real floating-point torch.dtype")
    if not isinstance(operator.device, torch.device):
        _refuse("attributes", f"device is {operator.device!r}", "a torch.device")


def _check_linear(probes: _Probes) -> None:
    u, v, _ = probes.vectors
    Au, Av, _ = probes.products
    c = 0.7
    A_sum = _multiplied(probes.operator.matvec, u + c * v, "matvec")
    _compare("linear", f"||A(u + {c} v) - Au - {c} Av||", norm(A_sum - Au - c * Av), (1 + c) * probes.limit)
    _compare("linear", "||A 0||", norm(_multiplied(probes.operator.matvec, torch.zeros_like(u), "matvec")), 0.0)


def _check_symmetric(probes: _Probes) -> None:
    for i, j in ((0, 1), (0, 2), (1, 2)):
        (x, y), (Ax, Ay) = (tuple(row[k] for k in (i, j)) for row in (probes.vectors, probes.products))
        names = f"|{'uvw'[i]}.A{'uvw'[j]} - {'uvw'[j]}.A{'uvw'[i]}|"
        _compare("symmetric", names, abs(dot(x, Ay) - dot(y, Ax)), probes.limit)


def _check_repeatable(probes: _Probes) -> None:
    before = probes.products[0].clone()
    again = _multiplied(probes.operator.matvec, probes.vectors[0], "matvec")
    allowed = 0.0 if probes.operator.device.type == "cpu" else probes.limit
    _compare("repeatable", "||Au - Au|| of two calls", norm(again - before), allowed)
    if not torch.equal(probes.products[0], before):
        _refuse(
            "results are kept",
            "a later product overwrote the tensor that an earlier one returned",
            "a tensor of its own",
        )


def _check_matmat(probes: _Probes) -> None:
    for size in (3, 1):
        V = torch.stack(probes.vectors[:size]).T  # [n, k], not contiguous
        AV = _multiplied(probes.operator.matmat, V, "matmat")
        for column, Av in zip(AV.unbind(1), probes.products, strict=False):
            _compare(
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
                    _said("wrong shapes are refused", f"{name} of {list(shape)} raised {error!r}", "InvalidArgument")
                ) from error
            _refuse(
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
        _refuse(f"{name} returns a tensor", f"it returned a {type(AV).__name__}", "a tensor")
    for what, got, allowed in (
        ("shape", list(AV.shape), list(V.shape)),
        ("dtype", AV.dtype, V.dtype),
        ("device", AV.device, V.device),
        ("requires_grad", AV.requires_grad, False),
    ):
        if got != allowed:
            _refuse(f"{name} keeps shape, dtype and device", f"the product has {what} {got}", f"{what} {allowed}")
    if not bool(torch.isfinite(AV).all()):
        _refuse(f"{name} is finite", "the product of a unit vector has NaN or infinite entries", "finite numbers")
    if not torch.equal(V, before):
        _refuse(f"{name} leaves its argument alone", "the vector was changed in place", "the vector as it was")
    return AV


@contextlib.contextmanager
def _undisturbed(objective: Objective | None, during: str) -> Generator[None]:
    """Compare what must not change before and after."""
    before = None if objective is None else _state(objective)
    yield
    if objective is None or before is None:
        return
    after = _state(objective)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        _refuse("nothing is disturbed", f"{during} changed: {shown}", "everything as it was")


def _state(objective: Objective) -> dict[str, object]:
    """All that a measurement must leave as it was, by name, in a form that `==` compares bit for bit."""
    numpy_kind, keys, *rest = numpy.random.get_state()
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    state: dict[str, object] = {
        "the data": fingerprint(objective.batches),
        "torch's random state": fingerprint([torch.get_rng_state()]),
        "numpy's random state": (numpy_kind, numpy.asarray(keys).tobytes(), *rest),
        "Python's random state": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "autocast": torch.is_autocast_enabled("cpu"),
        "number of threads": torch.get_num_threads(),
        "float32 precision": _precision(),
        "cuDNN": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "fused encoder path": torch.backends.mha.get_fastpath_enabled(),
        "attention kernels": (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        ),
    }
    for name, p in objective.model.named_parameters():
        state[f"the parameter {name!r}"] = (id(p), p.data_ptr(), fingerprint([p]))
        state[f"requires_grad of {name!r}"] = p.requires_grad
        state[f".grad of {name!r}"] = None if p.grad is None else (id(p.grad), fingerprint([p.grad]))
        state[f"hooks of {name!r}"] = _hooks(p)
    for name, b in objective.model.named_buffers():
        state[f"the buffer {name!r}"] = (id(b), fingerprint([b]))
    for name, module in objective.model.named_modules():
        state[f"the mode of {name or 'the model'!r}"] = module.training
        state[f"hooks of {name or 'the model'!r}"] = _hooks(module)
    return state


def _precision() -> list[object]:
    """Where torch may replace float32, by the interface that can always be read; before torch 2.9 there is only the older one."""
    layers = (torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn)
    operators = [getattr(layer, name, None) for layer in layers for name in ("matmul", "conv", "rnn")]
    found: list[object] = [getattr(holder, "fp32_precision", None) for holder in (*layers, *operators)]
    return found if any(found) else [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]


def _hooks(holder: nn.Module | Tensor) -> list[tuple[str, int]]:
    """Which hooks are registered on a module or a tensor."""
    names = {
        *vars(holder),
        "_backward_hooks",
        "_post_accumulate_grad_hooks",
    }  # the two of a tensor are not in its __dict__
    found = {name: getattr(holder, name, None) or {} for name in names if name.endswith("_hooks")}
    return sorted((name, id(hook)) for name, hooks in found.items() for hook in hooks.values())


def _compare(contract: str, what: str, got: float, allowed: float) -> None:
    if not got <= allowed:
        _refuse(contract, f"{what} is {got:.3g}", f"at most {allowed:.3g}")


def _refuse(contract: str, got: str, allowed: str) -> NoReturn:
    raise InvalidArgument(_said(contract, got, allowed))


def _said(contract: str, got: str, allowed: str) -> str:
    return (
        f"check_operator: '{contract}' does not hold: {got}; allowed: {allowed}. "
        "Mend the operator; the docstring of curvkit.testing.check_operator has each property as an equation."
    )
