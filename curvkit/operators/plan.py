"""How products will be computed, and why: decided before anything large is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.losses.batches import rows, tensors
from curvkit.objectives import Objective
from curvkit.operators.folding import FoldBatchNorm

Residency = Literal["retained", "streamed"]

BUDGET_FRACTION = 0.5
"""Share of the free memory that graphs may take by default."""


@dataclass(frozen=True)
class Plan:
    """The choice of engine for an operator; kept in the record, since same seed and plan give the same bits."""

    residency: Residency
    reason: str
    graph_bytes: int
    """Estimate of what the second-order graphs of all batches hold, scaled from the first batch."""
    budget_bytes: int
    rule: str = "reverse over reverse"
    attention: str = "math"
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.rule}, {self.residency} ({self.reason})"


def choose(
    objective: Objective, *, residency: Residency | Literal["auto"] = "auto", budget_bytes: int | None = None
) -> Plan:
    """Choose between keeping the graphs and building them anew for each product.

    The bytes that the first batch's graph of loss and gradient saves are counted by running it once under hooks that see every saved
    tensor; the other batches are taken in proportion to their rows. Retained if that, with room for one product's temporaries,
    fits the budget.

    Args:
        objective: What will be differentiated.
        residency: "retained", "streamed", or "auto" for this choice.
        budget_bytes: For the graphs; None takes half of the memory that is free.

    Returns:
        The plan.

    Raises:
        InvalidArgument: If `residency` is unknown or the budget is not positive.

    Cost: about 1.5 gradients of the first batch.
    """
    if residency not in (*get_args(Residency), "auto"):
        raise InvalidArgument(
            f"Hessian: residency={residency!r} is not one of retained, streamed, auto. Use 'auto' if in doubt."
        )
    if budget_bytes is not None and budget_bytes <= 0:
        raise InvalidArgument(
            f"Hessian: budget_bytes={budget_bytes!r} must be positive. Pass the bytes that graphs may take."
        )
    budget = budget_bytes if budget_bytes is not None else int(BUDGET_FRACTION * free_memory(objective.device))
    first = graph_bytes(objective, 0)
    held = sum(int(first * _share(objective, index)) for index in range(len(objective.batches)))
    need = held + first + 3 * objective.parameters.n * objective.dtype.itemsize
    if residency != "auto":
        chosen, reason = residency, "as asked"
    elif need <= budget:
        chosen, reason = "retained", f"{_megabytes(need)} of graphs fit the budget of {_megabytes(budget)}"
    else:
        chosen, reason = "streamed", f"{_megabytes(need)} of graphs exceed the budget of {_megabytes(budget)}"
    return Plan(
        chosen,
        reason,
        held,
        budget,
        threads=torch.get_num_threads(),
        dtype=str(objective.dtype).removeprefix("torch."),
        device=str(objective.device),
    )


def graph_bytes(objective: Objective, index: int) -> int:
    """Count the bytes that the graph of loss and gradient of one batch keeps alive, parameters and data not counted.

    Args:
        objective: Evaluated on one batch.
        index: Which one.

    Returns:
        Bytes of distinct storages.
    """
    own = {t.untyped_storage().data_ptr() for t in objective.model.parameters()}
    own |= {t.untyped_storage().data_ptr() for t in tensors(objective.batches[index])}
    seen: dict[int, int] = {}
    alive: list[Tensor] = []  # the address of a freed storage would be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor.detach()  # the tensor itself would make a reference cycle

    with objective.measuring(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with FoldBatchNorm():
            total = objective.terms(index).total
        if total.requires_grad:
            torch.autograd.grad(total, objective.tensors, create_graph=True, allow_unused=True)
    return sum(seen.values())


def free_memory(device: torch.device) -> int:
    """Memory that could still be taken on a device.

    Args:
        device: CPU or CUDA.

    Returns:
        Bytes; on Linux MemAvailable, lowered by a control group's limit; elsewhere the free physical pages, or 4 GiB.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = 4 << 30
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as now,
        ):
            free = min(free, int(limit.read()) - int(now.read()))
    except (OSError, ValueError):
        pass  # no control group, or "max"
    return max(free, 1)


def _share(objective: Objective, index: int) -> float:
    """Size of a batch relative to the first: by rows, or by elements where rows are not defined."""
    first, this = objective.batches[0], objective.batches[index]
    a, b = rows(first), rows(this)
    if a and b:
        return b / a
    return sum(t.numel() for t in tensors(this)) / max(1, sum(t.numel() for t in tensors(first)))


def _megabytes(number: int) -> str:
    return f"{number / 2**20:,.0f} MiB" if number >= 2**20 else f"{number / 2**20:.2f} MiB"
