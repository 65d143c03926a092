"""Arithmetic for measurements: kernels that can be differentiated twice and do not round more than their dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Self

import torch
from torch import nn

from curvkit.objectives.autocast import WithoutAutocast, switches_kept
from curvkit.objectives.rewriting import TwiceDifferentiable

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


class ExactArithmetic(contextlib.AbstractContextManager["ExactArithmetic"]):
    """While active, kernels can be differentiated twice and do not round more than their dtype.

    Attention by the MATH backend (the fused ones have no second derivative), no fused encoder path, `TwiceDifferentiable` modules, no
    autocast, neither around the model nor opened by it, gradients on, no TF32 or bfloat16 in place of float32, and no cuDNN for recurrent
    layers. All global flags are restored.
    It may be entered again after it was left: the model is looked through once, and beside a product of a small model each look counts.

    Args:
        model: Decides which switches matter.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._devices = ("cpu", "cuda") if any(p.device.type == "cuda" for p in model.parameters()) else ("cpu",)
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._rewriting = TwiceDifferentiable(model)
        self._autocast = WithoutAutocast()

    @property
    def silenced(self) -> bool:
        """Whether the model opened a region of autocast so far, which had no effect."""
        return self._autocast.silenced

    def __enter__(self) -> Self:
        """Set the switches that are otherwise."""
        on_cuda = "cuda" in self._devices
        with contextlib.ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            if not torch.is_grad_enabled():
                stack.enter_context(torch.enable_grad())
            stack.enter_context(_switched(ATTENTION_SWITCHES))
            stack.enter_context(_ieee_precision("cuda" if on_cuda else "mkldnn"))
            stack.enter_context(switches_kept(self._devices))
            for kind in self._devices:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(self._autocast)
            if on_cuda and self._recurrent:
                stack.enter_context(_without_cudnn())
            stack.enter_context(self._rewriting)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Set them back."""
        self._undo.close()


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
