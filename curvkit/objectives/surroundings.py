"""Leave everything as it was found: random states, gradients, modes, buffers and global flags."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import nn

from curvkit.errors import UnsupportedModel
from curvkit.objectives.rewriting import twice_differentiable

PRECISION_SWITCHES = {
    backend: tuple((backend, operator) for operator in ("matmul", "conv", "rnn")) for backend in ("cuda", "mkldnn")
}
"""Where torch may replace float32 by TF32 or bfloat16."""
ATTENTION_SWITCHES = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, False),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp, False),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp, False),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp, True),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False),
)
"""Attention by the MATH kernels, which hold on the CPU, too, whatever the name says; no fused encoder layer."""


@contextlib.contextmanager
def random_state() -> Generator[None]:
    """Restore the random states of torch (CPU and, once used, CUDA), numpy and Python on leaving."""
    cpu, python = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpy = sys.modules.get("numpy")
    numpy_state: Any = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(python)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Generator[None]:
    """Restore a model's modes, `.grad`, `requires_grad` flags and buffers, also when something raises.

    Inside, every `.grad` is None. A forward pass that writes to a parameter is refused afterwards, because the function that was
    differentiated is then not the one that was asked for.

    Args:
        model: Any module.

    Raises:
        UnsupportedModel: If a parameter was written to.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(name, p, p.grad, p.requires_grad, p._version) for name, p in model.named_parameters()]
    holders = (vars(module).get("_buffers", {}) for module in model.modules())
    registered = [(held, dict(held)) for held in holders if isinstance(held, dict)]  # TorchScript keeps them elsewhere
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
    for _, p, *_ in parameters:
        p.grad = None
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for _, p, grad, requires_grad, _ in parameters:
            p.grad = grad
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
        for held, before in registered:
            if held.keys() != before.keys() or any(held[name] is not before[name] for name in before):
                held.clear()
                held.update(before)
        for buffer, version, copy in buffers:
            if buffer._version != version or not torch.equal(buffer, copy):  # batch_norm writes without a new version
                with torch.no_grad():
                    buffer.copy_(copy)
    written = [name for name, p, _, _, version in parameters if p._version != version]
    if written:
        raise UnsupportedModel(
            f"Objective: the forward pass writes to the parameter {written[0]!r}, so that the function changes while it is measured. "
            "Put the module that does so in evaluation mode, or compute the new value without writing it back."
        )


@contextlib.contextmanager
def exact_arithmetic(model: nn.Module) -> Generator[None]:
    """Kernels that can be differentiated twice and do not round more than their dtype.

    Attention by the MATH backend (the fused ones have no second derivative), no fused encoder path, `twice_differentiable` modules, no
    autocast, gradients on, no TF32 or bfloat16 in place of float32, and no cuDNN for recurrent layers. All global flags are restored.

    Args:
        model: Decides which switches matter.
    """
    on_cuda = any(p.device.type == "cuda" for p in model.parameters())
    with (
        contextlib.ExitStack() as stack
    ):  # beside a product of a small model each context counts: only those that change something
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        stack.enter_context(_switched(ATTENTION_SWITCHES))
        stack.enter_context(_ieee_precision("cuda" if on_cuda else "mkldnn"))
        for kind in ("cpu", "cuda") if on_cuda else ("cpu",):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if on_cuda and any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(_without_cudnn())
        stack.enter_context(twice_differentiable(model))
        yield


@contextlib.contextmanager
def _switched(switches: tuple[tuple[Callable[[], bool], Callable[[bool], None], bool], ...]) -> Generator[None]:
    """Set global flags and restore those that were otherwise: (read, write, wanted)."""
    changed = [(write, wanted) for read, write, wanted in switches if read() is not wanted]
    for write, wanted in changed:
        write(wanted)
    try:
        yield
    finally:
        for write, wanted in changed:
            write(not wanted)


@contextlib.contextmanager
def _ieee_precision(backend: str) -> Generator[None]:
    """Full float32 in matrix products, convolutions and recurrent layers of a backend, whatever the user chose for training.

    One switch per operator, read and written through the same interface: torch refuses to read what was written through another.
    """
    read, write = (getattr(vars(torch)["_C"], f"_{verb}_fp32_precision_{verb}ter", None) for verb in ("get", "set"))
    if read is None or write is None:  # before torch 2.9
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]
        return
    chosen = {switch: read(*switch) for switch in PRECISION_SWITCHES[backend]}
    changed = {switch: precision for switch, precision in chosen.items() if precision != "ieee"}
    for switch in changed:
        write(*switch, "ieee")
    try:
        yield
    finally:
        for switch, precision in changed.items():
            write(*switch, precision)


@contextlib.contextmanager
def _without_cudnn() -> Generator[None]:
    """Its recurrent layers have no second derivative."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
