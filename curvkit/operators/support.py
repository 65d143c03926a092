"""What torch can differentiate twice, and what curvkit does where it cannot: one table, read by the engine, the docs and the tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["right", "handled", "refused", "raises", "wrong", "random", "smooth only"]
"""right: it is right as it stands; handled: curvkit makes it right; refused: curvkit refuses it and says why; raises: torch raises;
wrong: a wrong number without an error; random: differs from run to run; smooth only: right unless a step crosses a kink, then refused."""


@dataclass(frozen=True)
class Construct:
    """Something that models are made of, and what becomes of its second derivatives."""

    name: str
    torch: Outcome
    """Reverse over reverse by torch alone, with the user's flags as they are."""
    curvkit: Outcome
    """By `curvkit.operators.Hessian` with its preflight."""
    difference: Outcome
    """By differences of gradients, where the model is smooth."""
    remedy: str
    """What curvkit does, or what the user can do, as the end of a sentence."""
    nodes: tuple[str, ...] = ()
    """Names of autograd nodes that give it away; a prefix."""


LOW_PRECISION = "cast to bfloat16 or float16 inside the model"
SUPPORT: Mapping[str, Construct] = {
    row.name: row
    for row in (
        Construct("layers of torch.nn", "right", "right", "right", "nothing to do"),
        Construct(
            "ReLU and max-pool",
            "right",
            "right",
            "smooth only",
            "kinks have measure zero; differences of gradients may step over them",
        ),
        Construct(
            "tied, frozen and unused parameters", "right", "right", "right", "each counts once; unused ones are named"
        ),
        Construct("mse_loss", "right", "right", "right", "right in reverse mode; forward mode raises on its mean"),
        Construct(
            "attention with fused kernels",
            "raises",
            "handled",
            "right",
            "the MATH kernels are used while measuring",
            nodes=("ScaledDotProduct",),
        ),
        Construct("MultiheadAttention", "raises", "handled", "right", "the MATH kernels are used while measuring"),
        Construct(
            "TransformerEncoderLayer, eval",
            "raises",
            "handled",
            "right",
            "the fused path of evaluation mode is off while measuring",
        ),
        Construct(
            "LSTM, GRU, RNN",
            "right",
            "right",
            "right",
            "reverse over reverse is right on CPU; cuDNN is off while measuring",
        ),
        Construct(
            "weight_norm",
            "wrong",
            "handled",
            "right",
            "g v / norm(v) is written out while measuring, because torch's own second derivative of it is wrong",
        ),
        Construct(
            "torch._weight_norm, called by hand",
            "wrong",
            "refused",
            "right",
            "torch's own second derivative of it is wrong: use torch.nn.utils.parametrizations.weight_norm, or write g v / norm(v)",
            nodes=("WeightNormInterfaceBackward",),
        ),
        Construct(
            "spectral_norm, train mode",
            "random",
            "refused",
            "refused",
            "its power iteration moves with every pass: call model.eval()",
        ),
        Construct("spectral_norm, eval mode", "right", "right", "right", "nothing to do"),
        Construct("dropout, train mode", "random", "refused", "refused", "call model.eval()"),
        Construct(
            "BatchNorm, train mode",
            "right",
            "refused",
            "refused",
            "it couples the examples of a batch: call model.eval()",
        ),
        Construct(
            "once_differentiable function",
            "wrong",
            "refused",
            "right",
            "its backward pass has no derivative: write it with differentiable operations, or measure by differences (rule='difference')",
        ),
        Construct(
            "function that saves detached tensors",
            "wrong",
            "refused",
            "right",
            "save the inputs themselves in forward (ctx.save_for_backward), or measure by differences (rule='difference')",
        ),
        Construct(
            "differentiable custom function",
            "right",
            "right",
            "right",
            "its backward pass is differentiated like any code",
        ),
        Construct(
            LOW_PRECISION,
            "wrong",
            "refused",
            "refused",
            "what is rounded has steps in place of a slope: remove the cast while measuring, or leave the parameters before it out by "
            "patterns; regions of autocast need no change, they are switched off",
        ),
        Construct("checkpoint, non-reentrant", "right", "right", "right", "nothing to do"),
        Construct(
            "checkpoint, reentrant",
            "raises",
            "refused",
            "raises",
            "call checkpoint(..., use_reentrant=False)",
            nodes=("CheckpointFunctionBackward",),
        ),
        Construct("torch.compile", "raises", "handled", "right", "compiled modules run eagerly while measuring"),
        Construct("TorchScript", "right", "right", "right", "nothing to do"),
        Construct(
            "Embedding(sparse=True)",
            "raises",
            "handled",
            "right",
            "its gradient is dense while measuring",
        ),
        Construct(
            "ctc_loss",
            "raises",
            "raises",
            "right",
            "torch has no second derivative of it: measure by differences (rule='difference')",
        ),
        Construct(
            "multi_margin_loss",
            "raises",
            "raises",
            "smooth only",
            "torch has no second derivative of it; measure by differences (rule='difference')",
        ),
        Construct(
            "quantised weights",
            "raises",
            "refused",
            "refused",
            "they have no derivatives: measure the model before quantising",
        ),
        Construct(
            "flex_attention", "raises", "raises", "raises", "no second derivative: use scaled_dot_product_attention"
        ),
    )
}


HEAD = """# What can be differentiated twice

What torch does by itself, by reverse over reverse with the flags as they are, what curvkit does, and whether differences of
gradients (`rule="difference"`, `--rule difference`) are an alternative. Every line is a test that fails when torch changes.

- *right*: as it stands. *handled*: torch raises or is wrong, curvkit makes it right. *refused*: an error that says why.
- *wrong*: a wrong number without an error, which is what the [preflight](preflight.md) is for.
- *raises*: torch's own error. *random*: another number each time. *smooth only*: right unless a step crosses a kink, then refused.

| construct | torch alone | curvkit | differences | what happens, or what to do |
|---|---|---|---|---|
"""


def page() -> str:
    """Write the table as a page of the documentation.

    Returns:
        Markdown.

    Example:
        >>> page().startswith("# What can be differentiated twice")
        True
    """
    return HEAD + "".join(
        f"| {row.name} | {row.torch} | {row.curvkit} | {row.difference} | {row.remedy} |\n" for row in SUPPORT.values()
    )
