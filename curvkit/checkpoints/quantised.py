"""Weights that were quantised: numbers with a scale of their own, which have no curvature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from curvkit.checkpoints.printable import printable

ENDINGS = (".qweight", ".qzeros", ".SCB", ".absmax", "._packed_params", ".bitsandbytes__nf4", ".bitsandbytes__fp4")
"""How names of weights end that GPTQ, AWQ, bitsandbytes and torch's own quantisation write."""
BYTES = ("int8", "uint8")
ADVICE = "Quantised weights have no curvature of their own; pass the checkpoint before quantisation."


def quantised_name(names: Iterable[str]) -> str | None:
    """The first name that only a quantised model has.

    Args:
        names: Of weights.

    Returns:
        It, or None.

    Example:
        >>> quantised_name(["h.0.weight", "h.0.weight.absmax"])
        'h.0.weight.absmax'
    """
    return next((name for name in names if name.endswith(ENDINGS)), None)


def quantised_refusal(weights: Mapping[str, Any]) -> str | None:
    """Why weights are not measured, if they are quantised, whatever model they belong to.

    Args:
        weights: Tensors, or what headers say of them.

    Returns:
        A message, or None.

    Cost: linear in their number; no number is read.

    Example:
        >>> from curvkit.checkpoints.stored import dense
        >>> quantised_refusal({"head.bias": dense("0", (3,), "float32")}) is None
        True
        >>> quantised_refusal({"head.weight": dense("1", (3, 4), "int8")}).partition(".")[0]
        "the weight 'head"
    """
    name = quantised_name(weights) or next((name for name, stored in weights.items() if _quantised(name, stored)), None)
    return None if name is None else f"the weight {printable(name)!r} is {_dtype(weights[name])}: quantised. {ADVICE}"


def _quantised(name: str, stored: Any) -> bool:
    """A matrix of bytes, or floats of eight bits: no model that is trained has them."""
    dtype = _dtype(stored)
    matrix = dtype in BYTES and len(stored.shape) > 1 and name.rpartition(".")[2].startswith("weight")
    return matrix or dtype.startswith("float8")


def _dtype(stored: Any) -> str:
    return str(stored.dtype).removeprefix("torch.")
