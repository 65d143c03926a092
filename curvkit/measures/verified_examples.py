"""Is a stated trace true that was sampled example by example? Its exact part again, and some of its samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import UnsupportedModel
from curvkit.estimators.recordings.coverage import coverage
from curvkit.measures.example_trace import ExampleTrace
from curvkit.measures.example_way import Way
from curvkit.measures.restored import precision_of
from curvkit.measures.trace_result import Trace
from curvkit.measures.traces import Operator
from curvkit.measures.verification import CLOSE
from curvkit.measures.verified_parts import Check
from curvkit.operators.independence import rows_are_independent
from curvkit.results.journal import NOTHING_KEPT

PURPOSE = "verified probes"
ROUNDED = 100.0
"""A sample of what is left beside the exact part may be off by so many eps of that."""
ALONG = 10.0
"""A single sample may be off by so many times what rounding puts their mean off."""


def sampled_again(
    operator: Operator, stated: Trace, tensors: tuple[Tensor, Tensor], num_probes: int
) -> Iterator[Check]:
    """Draw some samples with the same signs, and compute the exact part.

    Args:
        operator: Of the Hessian, made anew; its objective is sampled in its precision.
        stated: The result.
        tensors: "samples" [m, p] and "known" [p].
        num_probes: How many samples.

    Yields:
        One check of the exact part, if there is a control, and one per sample.

    Raises:
        ValueError: If the plan cuts the data into no number of parts.
        UnsupportedModel: If the examples cannot be told apart, or batches were cut whose rows are not shown to be examples.
        CurvkitError: If a sample is not finite.

    Cost: as much as `num_probes` probes, and the exact part.
    """
    (samples, known), found, objective = tensors, stated.estimate, operator.objective
    parts = stated.plan.micro_batches
    if isinstance(parts, bool) or not isinstance(parts, int) or not 1 <= parts <= max(objective.examples or 1, 1):
        raise ValueError(f"micro_batches={parts!r} is no number of parts of {objective.examples} examples")
    control = 1.0 if found.method == "controlled" else 0.0
    if parts > 1 and not rows_are_independent(objective, objective.batches):
        raise UnsupportedModel(
            f"trace: the samples were taken with each batch in {parts:,} parts, and the rows of a batch are not shown to be examples of "
            "their own, so that they belong to another function. Measure again by products, or with more memory."
        )
    way = Way(found.method, coverage(objective.cut(parts)[0]), parts, objective.examples or 0, control)
    it = ExampleTrace(objective, stated.plan, way, stated.seed)
    slack = ALONG * (found.rounding or 0.0)
    if control:
        now = it.known(NOTHING_KEPT)
        allowed = CLOSE * known.abs().max().item() + slack
        yield Check("exact part", known.sum().item(), now.sum().item(), (now - known).abs().max().item() <= allowed)
    elif bool(known.any()):
        yield Check("exact part", known.sum().item(), 0.0, False)
    eps = torch.finfo(precision_of(stated.definition.dtype)).eps
    source, size = it.probes(keep=False), samples.abs().max().item() + ROUNDED * eps / CLOSE * known.abs().max().item()
    order = torch.randperm(len(samples), generator=seeds.generator(stated.seed, PURPOSE))[:num_probes]
    for index in sorted(order.tolist()):
        now = source.row(index)
        off = (now - samples[index]).abs().max().item()
        yield Check(f"probe {index + 1}", samples[index].sum().item(), now.sum().item(), off <= CLOSE * size + slack)
