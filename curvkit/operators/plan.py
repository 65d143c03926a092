"""How products will be computed, and why: decided before anything large is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvkit.errors import CurvkitError, InvalidArgument, ran_out_of_memory
from curvkit.losses.batches import Batch, rows, tensors
from curvkit.objectives import Objective
from curvkit.operators.attention import AttentionSeen
from curvkit.operators.folding import FoldBatchNorm
from curvkit.operators.graph import BatchGraph, GradientGraph
from curvkit.operators.independence import rows_are_independent
from curvkit.operators.memory import free_memory, megabytes, release

Residency = Literal["retained", "streamed"]

BUDGET_FRACTION = 0.5
"""Share of the free memory that graphs may take by default."""


VECTORS = 3
"""Of the length of the parameters, beside the graphs, for one product."""
PROBE_SHARE = 8
"""The memory of a graph is measured on one in so many rows of the first batch, where the batch can be cut."""


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
    attention: str | None = None
    """Kernels of attention: "math" where attention of torch's was seen in the first rows."""
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
        CurvkitError: If not even the vectors of one product fit the free memory, or nothing can be run for lack of it.

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
    free, vectors = free_memory(objective.device), vector_bytes(objective)
    if vectors > free:
        raise CurvkitError(
            f"{kind.matrix}: a product holds {VECTORS} vectors of {objective.parameters.n:,} parameters, {vectors:,} bytes, but only "
            f"{free:,} bytes are free on {objective.device}. Leave parameters out by patterns, use float32, or free memory."
        )
    budget = budget_bytes if budget_bytes is not None else int(BUDGET_FRACTION * free)
    divisible = rows_are_independent(objective, objective.batches[:1], kind=kind)
    with AttentionSeen() as seen:
        probe, second, first = first_rows(objective, divisible=divisible, kind=kind)
    scale = 1 / relative_size(probe.batches[0], objective.batches[0])
    largest = max(relative_size(batch, objective.batches[0]) for batch in objective.batches) * scale
    held = int(second * scale * sum(relative_size(batch, objective.batches[0]) for batch in objective.batches))
    need = held + int(second * largest) + vectors
    if residency != "auto":
        chosen, reason = residency, "as asked"
    elif need <= budget:
        chosen, reason = "retained", f"{megabytes(need)} of graphs fit the budget of {megabytes(budget)}"
    else:
        chosen, reason = "streamed", f"{megabytes(need)} of graphs exceed the budget of {megabytes(budget)}"
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
        attention="math" if seen.found else None,
        **_surroundings(objective),
    )


def vector_bytes(objective: Objective) -> int:
    """What the vectors of one product take: v, the product, and the gradient.

    Args:
        objective: What is differentiated.

    Returns:
        Bytes.
    """
    return VECTORS * objective.parameters.n * objective.dtype.itemsize


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

    Raises:
        RuntimeError: What the model raises.
    """
    own = {t.untyped_storage().data_ptr() for t in objective.model.parameters()}
    own |= {t.untyped_storage().data_ptr() for t in tensors(objective.batches[0])}
    seen: dict[int, int] = {}
    alive: list[Tensor] = []  # the address of a freed storage would be used again

    def pack(tensor: Tensor) -> Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own and storage.data_ptr() not in seen:
                seen[storage.data_ptr()] = storage.nbytes()
                alive.append(part.detach())
        return tensor.detach()  # the tensor itself would make a reference cycle

    def run() -> list[Tensor]:
        if gradient:
            with FoldBatchNorm(objective.model):
                return kind.build(objective, 0).roots()
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return [objective.terms(0).total]

    with objective.measuring():
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                run()
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            for tensor in _saved(run()):  # transforms of torch.func take no hooks
                pack(tensor)
    return sum(seen.values())


def _saved(roots: list[Tensor]) -> Iterator[Tensor]:
    """What the nodes of a graph say that they keep: less than hooks see, since a node written in C++ may not say all."""
    seen, stack = set[Any](), [root.grad_fn for root in roots]
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [before for before, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                kept = getattr(node, name)
                yield from (each for each in (kept if isinstance(kept, tuple) else (kept,)) if isinstance(each, Tensor))


def first_rows(
    objective: Objective, *, divisible: bool, kind: type[BatchGraph] = GradientGraph
) -> tuple[Objective, int, int]:
    """The part of the first batch on which memory is measured: one row in eight, fewer if memory runs out.

    Args:
        objective: What will be differentiated.
        divisible: Whether batches may be cut; if not, the first one is taken whole.
        kind: Of the graph.

    Returns:
        An objective that begins with these rows, and the bytes that the graph of their products saves, and their forward pass alone.

    Raises:
        CurvkitError: If memory does not suffice for one row, or for a batch that must not be cut.
        RuntimeError: What the model raises, where it is no matter of memory.
        MemoryError: Never: it is one.
    """
    share = PROBE_SHARE
    while True:
        probe = objective.cut(share)[0] if divisible else objective
        try:
            second, first = saved_bytes(probe, gradient=True, kind=kind), saved_bytes(probe, gradient=False)
            return probe, second, first
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
        release(objective.device)  # outside of the handler, whose frames hold the graph
        size = rows(probe.batches[0]) or 1
        if not divisible or size == 1:
            what = "one row" if divisible else "the first batch, which cannot be cut,"
            raise CurvkitError(
                f"{kind.matrix}: out of memory with the graph of {what} ({said}). Give the data in smaller batches or with shorter rows, "
                "leave parameters out by patterns, use float32, or a device with more memory."
            )
        share *= 2


def _surroundings(objective: Objective) -> dict[str, Any]:
    """What rounding depends on beside the plan's own choices."""
    dtype, device = str(objective.dtype).removeprefix("torch."), str(objective.device)
    return {"threads": torch.get_num_threads(), "dtype": dtype, "device": device}


def relative_size(this: Batch, reference: Batch) -> float:
    """Size of a batch relative to another: by rows, or by elements where rows are not defined.

    Args:
        this: A batch.
        reference: Another.

    Returns:
        1.0 for batches of the same size.
    """
    a, b = rows(reference), rows(this)
    if a and b:
        return b / a
    return sum(t.numel() for t in tensors(this)) / max(1, sum(t.numel() for t in tensors(reference)))
