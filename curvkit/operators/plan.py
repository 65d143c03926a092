"""How products will be computed, and why: decided before anything large is allocated."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvkit import seeds
from curvkit.errors import CurvkitError, InvalidArgument
from curvkit.linalg.basis import norm
from curvkit.losses.batches import Batch, map_tensors, rows, tensors
from curvkit.objectives import Objective
from curvkit.operators.folding import FoldBatchNorm
from curvkit.operators.graph import BatchGraph, GradientGraph

Residency = Literal["retained", "streamed"]

BUDGET_FRACTION = 0.5
"""Share of the free memory that graphs may take by default."""


PROBE_SHARE = 8
"""The memory of a graph is measured on one in so many rows of the first batch, where the batch can be cut."""


VALUE_ROUNDING = 64.0
"""A sum of losses in two parts may differ by so many eps, relatively."""
CURVATURE_ROUNDING = 1e4
"""The same for a product with a random vector, which may be much smaller than ||H||."""


@dataclass(frozen=True)
class Plan:
    """The choice of engine for an operator; kept in the record, since same seed and plan give the same bits."""

    residency: Residency
    reason: str
    micro_batches: int
    """Parts into which each batch is cut while streaming; 1 leaves it whole."""
    graph_bytes: int
    """Estimate of what the second-order graphs of all batches hold, scaled from the first rows."""
    batch_bytes: int
    """The same for the largest batch alone."""
    budget_bytes: int
    rule: str = "reverse over reverse"
    attention: str = "math"
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    basis_rows: int | None = None
    """Vectors that a search for eigenvalues may hold; None where there is none."""

    def __str__(self) -> str:
        """One line for people."""
        cut = f" in {self.micro_batches} parts per batch" if self.micro_batches > 1 else ""
        return f"{self.rule}, {self.residency}{cut} ({self.reason})"


def choose(
    objective: Objective,
    *,
    residency: Residency | Literal["auto"] = "auto",
    budget_bytes: int | None = None,
    kind: type[BatchGraph] = GradientGraph,
) -> Plan:
    """Choose between keeping the graphs and building them anew for each product, and how far to cut the batches.

    The bytes that the graph of loss and gradient saves are counted by running the first rows once under hooks that see every saved
    tensor. Retained if all graphs, with room for one product's temporaries, fit the budget. Streamed, a batch is cut until its graph
    needs no more than an ordinary forward pass over the whole batch saves, and fits the budget.

    Args:
        objective: What will be differentiated.
        residency: "retained", "streamed", or "auto" for this choice.
        budget_bytes: For the graphs; None takes half of the memory that is free.
        kind: Of the graphs that products will be taken from.

    Returns:
        The plan.

    Raises:
        InvalidArgument: If `residency` is unknown or the budget is not positive.

    Cost: about one gradient of the first batch, and if batches are cut one forward pass over the data; memory of less than the graph
        of the first batch, or of all of it if that cannot be cut.
    """
    if residency not in (*get_args(Residency), "auto"):
        raise InvalidArgument(
            f"{kind.matrix}: residency={residency!r} is not one of retained, streamed, auto. Use 'auto' if in doubt."
        )
    if budget_bytes is not None and budget_bytes <= 0:
        raise InvalidArgument(
            f"{kind.matrix}: budget_bytes={budget_bytes!r} must be positive. Pass the bytes that graphs may take."
        )
    budget = budget_bytes if budget_bytes is not None else int(BUDGET_FRACTION * free_memory(objective.device))
    divisible = rows_are_independent(objective, objective.batches[:1], kind=kind)
    probe = objective.cut(PROBE_SHARE)[0] if divisible else objective
    scale = 1 / _share(probe.batches[0], objective.batches[0])
    largest = max(_share(batch, objective.batches[0]) for batch in objective.batches) * scale
    second, first = saved_bytes(probe, gradient=True, kind=kind), saved_bytes(probe, gradient=False)
    held = int(second * scale * sum(_share(batch, objective.batches[0]) for batch in objective.batches))
    need = held + int(second * largest) + 3 * objective.parameters.n * objective.dtype.itemsize
    if residency != "auto":
        chosen, reason = residency, "as asked"
    elif need <= budget:
        chosen, reason = "retained", f"{_megabytes(need)} of graphs fit the budget of {_megabytes(budget)}"
    else:
        chosen, reason = "streamed", f"{_megabytes(need)} of graphs exceed the budget of {_megabytes(budget)}"
    parts = 1
    if chosen == "streamed" and divisible and second > 0:
        parts = max(math.ceil(second / max(first, 1)), math.ceil(2 * second * largest / budget), 1)
        parts = parts if parts == 1 or rows_are_independent(objective, objective.batches, kind=kind) else 1
    return Plan(
        chosen,
        reason,
        parts,
        held,
        int(second * largest),
        budget,
        rule=kind.rule,
        **_surroundings(objective),
    )


def fitting(plan: Plan, objective: Objective, *, kind: type[BatchGraph] = GradientGraph) -> Plan:
    """Check that a plan gives the same bits here.

    Args:
        plan: Made earlier, perhaps in another process.
        objective: What it shall be used for.
        kind: Of the graphs that products will be taken from.

    Returns:
        The plan itself.

    Raises:
        InvalidArgument: If it is for another dtype, device, number of threads or kind of product.
    """
    for name, here in {**_surroundings(objective), "rule": kind.rule}.items():
        if getattr(plan, name) != here:
            raise InvalidArgument(
                f"{kind.matrix}: the plan is for {name}={getattr(plan, name)!r}, here it is {here!r}, so that sums would round in another "
                "way. Restore that, or leave plan out for a new one."
            )
    return plan


def saved_bytes(objective: Objective, *, gradient: bool, kind: type[BatchGraph] = GradientGraph) -> int:
    """Count the bytes that differentiating the first batch keeps alive, parameters and data not counted.

    Args:
        objective: Evaluated on its first batch.
        gradient: True for the graph that products need; False for an ordinary forward pass with the kernels that training would use.
        kind: Of that graph.

    Returns:
        Bytes of distinct storages.
    """
    own = {t.untyped_storage().data_ptr() for t in objective.model.parameters()}
    own |= {t.untyped_storage().data_ptr() for t in tensors(objective.batches[0])}
    seen: dict[int, int] = {}
    alive: list[Tensor] = []  # the address of a freed storage would be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor.detach()  # the tensor itself would make a reference cycle

    with objective.measuring(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if not gradient:
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                objective.terms(0)
            return sum(seen.values())
        with FoldBatchNorm(objective.model):
            kind.build(objective, 0)
    return sum(seen.values())


def rows_are_independent(
    objective: Objective, batches: Sequence[Batch], *, kind: type[BatchGraph] = GradientGraph
) -> bool:
    """Whether the loss of each batch is the sum over its halves: what couples rows must not be cut.

    Rows may be steps of time, nodes of a graph, or normalised together. Coupling that does not show in the loss, because a gate is
    still zero, shows in the curvature: on a few rows that is compared, too. A model that cannot be run on half a batch couples rows.

    Args:
        objective: The function.
        batches: Batches of it.
        kind: Of the products that are compared.

    Returns:
        False also where it cannot be known, because the terms of the loss are not.
    """
    if not objective.divisible or rows(batches[0]) in (None, 0, 1):
        return False
    eps = torch.finfo(objective.dtype).eps
    try:
        for batch in batches:
            whole = objective.with_batches([batch])
            halves = whole.cut(2)[0]
            with whole.measuring(), torch.no_grad():
                total = whole.terms(0).total.item()
                parts = math.fsum(halves.terms(index).total.item() for index in range(len(halves.batches)))
            if not abs(total - parts) <= VALUE_ROUNDING * eps * max(abs(total), abs(parts)):
                return False
    except Exception:
        return False  # its own message, if it is no matter of rows, comes when the whole batch is run
    few = objective.with_batches([map_tensors(lambda tensor: tensor[:4], batches[0])])
    try:
        return _curvature_differs(few, few.cut(2)[0], kind) <= CURVATURE_ROUNDING * eps
    except (CurvkitError, RuntimeError):  # from the model on so few rows, or for lack of a second derivative
        return False


def _curvature_differs(one: Objective, other: Objective, kind: type[BatchGraph]) -> float:
    """Relative difference of two products with the same random vector, sums over the batches."""
    space, size = one.parameters, 0.0
    with one.measuring():
        v = list(space.split(seeds.normal(space.n, 0, "rows", dtype=one.dtype, device=one.device)))
        difference = torch.zeros(space.n, dtype=one.dtype, device=one.device)
        targets = list(space.split(difference))
        for objective, sign in ((one, 1.0), (other, -1.0)):
            for index in range(len(objective.batches)):
                pieces = kind.product([kind.build(objective, index)], v, keep=False)
                for target, piece in zip(targets, pieces, strict=True):
                    if piece is not None:
                        target.add_(piece, alpha=sign)
                del pieces
            size = size or norm(difference)
    return norm(difference) / max(size, 1e-300)


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


def _surroundings(objective: Objective) -> dict[str, Any]:
    """What rounding depends on beside the plan's own choices."""
    dtype, device = str(objective.dtype).removeprefix("torch."), str(objective.device)
    return {"threads": torch.get_num_threads(), "dtype": dtype, "device": device}


def _share(this: Batch, reference: Batch) -> float:
    """Size of a batch relative to another: by rows, or by elements where rows are not defined."""
    a, b = rows(reference), rows(this)
    if a and b:
        return b / a
    return sum(t.numel() for t in tensors(this)) / max(1, sum(t.numel() for t in tensors(reference)))


def _megabytes(number: int) -> str:
    return f"{number / 2**20:,.0f} MiB" if number >= 2**20 else f"{number / 2**20:.2f} MiB"
