"""Passes of BackPACK over data: its numbers, added up over batches and divided by what the loss divides by."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvkit.errors import CurvkitError, UnsupportedModel, ran_out_of_memory
from curvkit.estimators.likelihoods import Draw, draw_cotangent
from curvkit.estimators.through_backpack.library import SAVED, Extension, Library
from curvkit.estimators.through_backpack.losses import INSTEAD, loss_module
from curvkit.estimators.through_backpack.network import Call, Network, refuse_failure
from curvkit.losses.batches import inputs_and_targets, rows
from curvkit.objectives import Objective
from curvkit.operators.memory import release

CHUNK_BYTES = 256 << 20
"""Batches are cut into runs of rows whose columns take no more."""
TEMPORARIES = 4.5
"""Tensors of the size of all columns at the widest place, at the same time: before and after a module, squares, factors of the loss."""
BESIDE = 8 << 20
"""Bytes beside the columns: what torch's allocator and oneDNN keep."""
BLOCK = 16
"""Channels of a convolution, which oneDNN lays out in blocks of so many."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
"""Their rules are convolutions of one channel."""


@dataclass(frozen=True)
class Passes:
    """An extension, the network that it walks through and the loss that it starts from."""

    extension: Extension
    library: Library
    loss: nn.Module
    network: Network

    @classmethod
    def of(cls, objective: Objective, extension: Extension, library: Library) -> Passes:
        """Prepare the passes; see `Network.of` and `loss_module` for what is refused.

        Args:
            objective: The function.
            extension: Of BackPACK.
            library: BackPACK.

        Returns:
            The passes.
        """
        loss = loss_module(objective, extension)
        return cls(extension, library, loss, Network.of(objective, loss, extension, library))

    @property
    def columns(self) -> int:
        """Vectors per example that BackPACK takes back through the network."""
        if self.extension == "DiagGGNMC":
            return 1
        outputs = math.prod(self.network.outputs)
        return outputs + 2 * self.network.bent if self.extension == "DiagHessian" else outputs

    @property
    def row_bytes(self) -> int:
        """Memory that the columns of one example take."""
        cells = max((_cells(call) for call in self.network.calls), default=1)
        return math.ceil(TEMPORARIES * self.columns * cells * self.network.objective.dtype.itemsize)

    @property
    def parts(self) -> int:
        """Into how many runs of rows batches are cut."""
        return max(1, math.ceil(self._largest * self.row_bytes / CHUNK_BYTES))

    @property
    def held_bytes(self) -> int:
        """Memory of the columns of one run of rows, and of the graph of its gradient."""
        size = math.ceil(self._largest / self.parts)
        activations = 2 * sum(call.output for call in self.network.calls) * self.network.objective.dtype.itemsize
        return size * (self.row_bytes + activations) + BESIDE

    def complete(self, sampling: tuple[int, int] | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Pass over all the data; where memory runs out, over shorter runs of rows.

        Args:
            sampling: Seed of the targets, and number of the first batch's draw; None draws nothing. Rows get the same targets in
                whatever runs they are.

        Returns:
            As of `over`.

        Raises:
            CurvkitError: If memory does not suffice for single rows.
            RuntimeError: What is no matter of memory.
            MemoryError: Never: it is one.
        """
        parts = self.parts
        while True:
            try:
                return self.over(*self._cut(parts, sampling))
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
            release(self.network.objective.device)
            if parts >= self._largest:
                raise CurvkitError(
                    f"BackPACK({self.extension!r}): out of memory with the {self.columns} columns of one example. "
                    f"Use {INSTEAD[self.extension]}."
                )
            parts = min(2 * parts, self._largest)

    def over(self, data: Objective, draws: Sequence[Draw] | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Pass over batches.

            d = (1 / W) sum_b d_b,    W = sum_b weight_b

        Args:
            data: Of the copy, with any batches.
            draws: Of the targets of each batch, where they are drawn.

        Returns:
            The diagonal, parameter-shaped, and the gradient [n] by the same passes.

        Raises:
            UnsupportedModel: If BackPACK fails, or passes over a parameter that the loss depends on.
            RuntimeError: If memory runs out.
        """
        names, tensors, weights = data.parameters.names, data.tensors, list[float]()
        sums = {name: torch.zeros_like(p) for name, p in zip(names, tensors, strict=True)}
        with data.measuring(), self.library.extended(self.network.module, self.loss), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for index in range(len(data.batches)):
                weights.append(self._one(data, index, None if draws is None else draws[index]))
                for name, p in zip(names, tensors, strict=True):
                    value = vars(p).pop(SAVED[self.extension], None)
                    if value is not None and value.shape == p.shape:
                        sums[name] += value
                    elif value is not None or p.grad is not None:
                        self._refuse_passed_over(name)
            gradient = data.parameters.join([torch.zeros_like(p) if p.grad is None else p.grad for p in tensors])
        scale = data.denominator(weights)
        return {name: value / scale for name, value in sums.items()}, gradient / scale

    def _one(self, data: Objective, index: int, draw: Draw | None) -> float:
        """One batch, whose numbers stay on the parameters; its weight."""
        inputs, _, targets = inputs_and_targets(data.batches[index])
        walked = self.network.module
        extension: Any = None
        try:
            outputs = walked(inputs[0])
            drawn = None
            if draw is not None:
                drawn = type(self.loss), draw_cotangent(data.loss, outputs, targets, draw)[None]
            extension = self.library.extension(self.extension, drawn=drawn)
            self.library.backward(self.loss(outputs, targets), extension)
        except Exception as error:
            if isinstance(error, CurvkitError) or ran_out_of_memory(error):
                raise
            refuse_failure(self.extension, getattr(extension, "at", None) or walked, walked, error)
        return data.terms_of(outputs.detach(), targets).weight

    @property
    def _largest(self) -> int:
        return max(rows(batch) or 1 for batch in self.network.objective.batches)

    def _cut(self, parts: int, sampling: tuple[int, int] | None) -> tuple[Objective, list[Draw] | None]:
        """All the data in runs of rows, with the draw of each."""
        whole = self.network.objective
        data, owners = whole.cut(parts)
        if sampling is None:
            return data, None
        draws, begin, before = list[Draw](), 0, -1
        for batch, owner in zip(data.batches, owners, strict=True):
            begin = begin if owner == before else 0
            draws.append(Draw(sampling[0], sampling[1] + owner, begin, rows(whole.batches[owner])))
            begin, before = begin + (rows(batch) or 0), owner
        return data, draws

    def _refuse_passed_over(self, name: str) -> None:
        raise UnsupportedModel(
            f"BackPACK({self.extension!r}): BackPACK gave nothing that fits for {name}, on which the loss depends: it is used outside of "
            f"the layers that BackPACK knows, or what they give is changed. Use {INSTEAD[self.extension]}, or leave the parameter out "
            "by patterns."
        )


def _cells(call: Call) -> int:
    """Numbers per column and example: its activations, and the gradient of weights that positions share."""
    module, weights = call.module, sum(p.numel() for p in call.module.parameters()) if call.positions > 1 else 0
    if isinstance(module, AVERAGES):
        return BLOCK * max(call.input, call.output)
    if isinstance(module, CONVOLUTIONS):
        blocked = _blocked(call.input, module.in_channels), _blocked(call.output, module.out_channels)
        return max(*blocked, weights)
    if isinstance(module, nn.Linear) and not torch.backends.opt_einsum.is_available():
        weights *= call.positions
    return max(call.input, call.output, weights)


def _blocked(entries: int, channels: int) -> int:
    return entries // channels * math.ceil(channels / BLOCK) * BLOCK
