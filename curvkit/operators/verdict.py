"""What a check of second derivatives found: the verdict with its evidence, and how far the evidence goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from curvkit.operators.support import LOW_PRECISION
from curvkit.operators.suspects import Suspect

Verdict = Literal["right", "wrong", "not checked"]


@dataclass(frozen=True)
class Limits:
    """What the probes do in a precision, and what they may show."""

    steps: tuple[float, ...]
    """Of the difference, times 1 + ||theta||, for a direction of unit length."""
    agrees: float
    """A difference quotient this close to H v shows that the product is right."""
    repeated: float
    """Largest difference of two products with the same vector, relative; on the CPU they have the same bits."""
    asymmetric: float
    """Largest |u'Hv - v'Hu| / ||H v|| of rounding."""


IN_DOUBLE = Limits((1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9), 1e-5, 1e-9, 1e-6)
"""Seen: right at most 1e-5 at some step, wrong at least 1e-2 at all. Symmetry, also with something inside in float32: right at most 1e-8,
wrong at least 3e-5."""
IN_SINGLE = Limits((3e-2, 1e-2, 3e-3, 1e-3), 1e-2, 1e-5, 1e-4)
"""Smaller steps drown in rounding, 1e-7 / h."""


@dataclass(frozen=True, eq=False)
class Preflight:
    """What three probes say about the second derivatives of an objective at its point."""

    verdict: Verdict
    repeatability: float
    """||H v - (H v again)|| / ||H v||."""
    asymmetry: float
    """|u'Hv - v'Hu| / max(||H u||, ||H v||) for random unit vectors u and v."""
    mismatches: Mapping[float, float]
    """Step -> || (g(theta + h v) - g(theta - h v)) / 2h - H v || / ||H v||, parameter by parameter, the largest; steps after the first that
    agrees are not tried."""
    dtype: str
    """Precision of the probes: float64 where the model runs in it."""
    suspects: tuple[Suspect, ...] = ()
    """What is known to go wrong, by module; empty where the verdict is "right"."""
    disagreeing: tuple[str, ...] = ()
    """Parameters whose part of H v is off, the worst first; empty where the verdict is "right"."""
    estimated: tuple[str, ...] = ()
    """Parameters whose gradient is not the derivative of the loss; looked for where the verdict is "wrong"."""
    reason: str = ""
    """Why there are no differences to compare with, if there are none."""
    fixed: tuple[tuple[str, int], ...] = ()
    """Rows of embeddings that have no gradient (padding_idx): the Hessian is that of a function in which they are constants."""
    lowered: bool = False
    """The model computes in half precision where it is measured, though not in float64, so that the probes looked at another function."""

    @property
    def mismatch(self) -> float:
        """The least mismatch; NaN if none was computed."""
        return min(self.mismatches.values(), default=math.nan)

    @property
    def limits(self) -> Limits:
        """What was allowed."""
        return IN_DOUBLE if self.dtype == "float64" else IN_SINGLE

    def to_dict(self) -> dict[str, Any]:
        """The evidence as plain values.

        Returns:
            Verdict, numbers, precision, and names: suspects, parameters, rows that count as fixed.
        """
        return {
            "verdict": self.verdict,
            "repeatability": self.repeatability,
            "asymmetry": self.asymmetry,
            "mismatch": self.mismatch,
            "dtype": self.dtype,
            "suspects": [f"{suspect.where}: {suspect.construct.name}" for suspect in self.suspects],
            "disagreeing": list(self.disagreeing),
            "estimated": list(self.estimated),
            "reason": self.reason or None,
            "fixed": [f"{name}[{row}]" for name, row in self.fixed],
        }

    def __str__(self) -> str:
        """One sentence for people."""
        if self.verdict == "right":
            return (
                f"second derivatives agree with differences of gradients to {max(self.mismatch, 0.0):.0e} on a few rows"
            )
        if self.verdict == "wrong":
            return f"second derivatives are wrong: {self._evidence()}{self._where()}{self._named()}"
        if self.reason:
            return f"second derivatives not checked: {self.reason}"
        return (
            f"second derivatives not checked: the difference of gradients is off by {self.mismatch:.0e} at the best step and by more at "
            "smaller ones, as with kinks (ReLU, max-pool) near the point or a cast to lower precision inside the model"
        )

    def _evidence(self) -> str:
        if self.lowered:
            return "the model computes in bfloat16 or float16, though its parameters do not, by autocast that cannot be switched off"
        if not self.repeatability <= self.limits.repeated:
            return f"two products with the same vector differ by {self.repeatability:.0e}"
        if not self.asymmetry <= self.limits.asymmetric:
            return f"they are not symmetric ({self.asymmetry:.0e})"
        return f"differences of gradients are off by {self.mismatch:.0e} or more at every step"

    def _where(self) -> str:
        return f", most for {_listed(self.disagreeing)}" if self.disagreeing and not self.lowered else ""

    def _named(self) -> str:
        found = self.suspects[:3]
        if self.lowered:
            places = ", ".join(s.where for s in found)
            return f"; {places}: switch it off there while measuring, or open it by `with torch.autocast(...)`, which curvkit switches off"
        if not self.estimated:
            if not found:
                return (
                    "; no known construct was found, so look for a custom autograd function that saves or returns detached tensors, or a "
                    "hook on a tensor that detaches its gradient"
                )
            return "; " + "; ".join(f"{s.where}: {s.construct.name}, {s.construct.remedy}" for s in found)
        known = "; ".join(
            f"{s.where}: {s.construct.name}, {s.construct.remedy}"
            if s.construct.name == LOW_PRECISION
            else f"{s.where} may be the cause"
            for s in found
        )
        return (
            f"; the gradient itself is not the derivative of the loss for {_listed(self.estimated)}, as behind detach(), no_grad, a "
            "rounding with a straight-through gradient, a hook that scales gradients or scale_grad_by_freq. A field that is no "
            "gradient has no Hessian, whatever the rule: remove that, or, where these parameters are meant as constants, leave them out by "
            f"patterns or requires_grad_(False){'; ' + known if known else ''}"
        )


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
