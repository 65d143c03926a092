"""Truths that do not share curvkit's code path: dense derivatives, closed forms, known spectra, and what a model looked like."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Initialise modules under a seed, and leave the global random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def classes(*shape: int, num: int, seed: int = 0) -> Tensor:
    return torch.randint(num, shape, generator=torch.Generator().manual_seed(seed))


def cut(sizes: Sequence[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of some tensors in batches of the given sizes."""
    assert sum(sizes) == len(tensors[0])
    return list(zip(*(tensor.split(list(sizes)) for tensor in tensors), strict=True))


# ---- dense derivatives ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """Loss, gradient [n] and Hessian [n, n] with respect to the chosen parameters, in the order of `named_parameters`."""

    loss: float
    gradient: Tensor
    hessian: Tensor


def dense(
    model: nn.Module, loss: Callable[[Callable[..., Any]], Tensor], keep: Callable[[str], bool] = lambda name: True
) -> Dense:
    """Differentiate densely, the model called through `functional_call`.

    `loss(call)` computes the whole loss of all the data at once from `call(*inputs)`, the model at the parameters in question.
    """
    chosen = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and keep(name)}
    sizes, shapes = [p.numel() for p in chosen.values()], [p.shape for p in chosen.values()]

    def function(flat: Tensor) -> Tensor:
        pieces = [piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)]
        named = dict(zip(chosen, pieces, strict=True))
        return loss(lambda *inputs, **options: functional_call(model, named, inputs, options))

    theta = torch.cat([p.reshape(-1) for p in chosen.values()]).requires_grad_()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            value = function(theta)
            (gradient,) = torch.autograd.grad(value, theta)
            hessian = torch.autograd.functional.hessian(function, theta)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return Dense(value.item(), gradient, hessian)


def relative(got: Tensor, truth: Tensor) -> float:
    """||got - truth|| / ||truth||."""
    return (torch.linalg.vector_norm(got - truth) / torch.linalg.vector_norm(truth)).item()


# ---- closed forms ---------------------------------------------------------------------------------------------------


def linear_regression_hessian(inputs: Tensor, num_outputs: int) -> Tensor:
    """Of mean squared error of `nn.Linear(d, C)`, weights then biases: 2 / (N C) I (x) X'X, X with a column of ones."""
    ones = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
    gram = 2.0 / (len(inputs) * num_outputs) * ones.T @ ones
    return _weights_then_biases(torch.block_diag(*[gram] * num_outputs), inputs.shape[1], num_outputs)


def softmax_regression_hessian(inputs: Tensor, logits: Tensor) -> Tensor:
    """Of mean cross-entropy of `nn.Linear(d, C)`: 1/N sum (diag p - pp') (x) xx'; the labels do not enter."""
    ones = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
    p = logits.softmax(1)
    blocks = sum(
        torch.kron(torch.diag(pi) - torch.outer(pi, pi), torch.outer(xi, xi)) for pi, xi in zip(p, ones, strict=True)
    )
    return _weights_then_biases(blocks / len(inputs), inputs.shape[1], logits.shape[1])


def _weights_then_biases(matrix: Tensor, d: int, c: int) -> Tensor:
    """Rows of [W | b], one output after the other -> all of W, then b."""
    index = torch.arange(c * (d + 1)).view(c, d + 1)
    order = torch.cat([index[:, :d].reshape(-1), index[:, d]])
    return matrix[order][:, order]


# ---- spectra --------------------------------------------------------------------------------------------------------


def strakos(n: int, low: float = 0.1, high: float = 100.0, rho: float = 0.9) -> Tensor:
    """Strakos (1991): lambda_i = low + (i-1)/(n-1) (high - low) rho^(n-i), ascending. Lanczos without care gives ghosts."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return low + (i - 1) / (n - 1) * (high - low) * rho ** (n - i)


def wilkinson(m: int) -> Tensor:
    """Wilkinson's W_(2m+1)+: tridiagonal, diagonal |i - m|, off-diagonals 1; its top eigenvalues are pairs that all but agree."""
    diagonal = (torch.arange(2 * m + 1, dtype=torch.float64) - m).abs()
    ones = torch.ones(2 * m, dtype=torch.float64)
    return torch.diag(diagonal) + torch.diag(ones, 1) + torch.diag(ones, -1)


def rotated(spectrum: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with this spectrum and random eigenvectors, in its dtype."""
    n = len(spectrum)
    q, r = torch.linalg.qr(normal(n, n, seed=seed))
    q = q * torch.diagonal(r).sign()
    matrix = q @ torch.diag(spectrum.double()) @ q.T
    return ((matrix + matrix.T) / 2).to(spectrum.dtype)


# ---- what must not change -------------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def surroundings(model: nn.Module) -> dict[str, Any]:
    """Everything that a measurement could disturb, in a form that `==` compares bit for bit."""
    cuda = torch.backends.cuda
    seen: dict[str, Any] = {
        "torch": bits(torch.get_rng_state()),
        "numpy": [part.tobytes() if isinstance(part, numpy.ndarray) else part for part in numpy.random.get_state()],
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "attention": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "TF32": torch.backends.cudnn.allow_tf32,
        "hooks": [
            (name, kind, list(hooks))
            for name, module in model.named_modules()
            for kind, hooks in vars(module).items()
            if kind.endswith("_hooks") and hooks
        ],
        "modes": {name: module.training for name, module in model.named_modules()},
        "buffers": {name: (id(b), bits(b)) for name, b in model.named_buffers()},
    }
    for name, p in model.named_parameters():
        grad = None if p.grad is None else (id(p.grad), bits(p.grad))
        seen[name] = (id(p), p.data_ptr(), p._version, p.requires_grad, p._backward_hooks, bits(p), grad)
    return seen


def fill_gradients(model: nn.Module, seed: int = 5) -> None:
    """Give every other parameter a gradient of the user's own."""
    for index, p in enumerate(model.parameters()):
        if index % 2 == 0:
            p.grad = normal(*p.shape, seed=seed + index, dtype=p.dtype)
