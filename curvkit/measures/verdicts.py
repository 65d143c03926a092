"""Flatter or sharper? Said only at equal loss, and only where a measure that no rescaling of weights changes says so, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from curvkit.measures.compared import Difference, could_be_undone
from curvkit.measures.paired import Gap

Kind = Literal["flatter", "sharper", "same", "alike", "rescaled", "loss differs", "undecided"]

EQUAL = 0.01
"""Losses that differ by this share of the larger one at most count as equal."""
WITHIN_DOUBT = 0.05
"""And by this share at most, if the 95 % interval of their paired difference holds zero. A wide interval alone makes nothing equal: it
says that the data do not tell, while curvature falls with the loss, for cross-entropy about in proportion."""
TIGHT = 0.1
"""A rescaling of weights is offered as an explanation where the adaptive sharpness differs by this share of what raw curvature does at
most."""
RULE = (
    f"losses count as equal within {EQUAL:.0%} of the larger, or within {WITHIN_DOUBT:.0%} and the 95 % interval of their difference. "
    "Flatter: then lambda_max, trace and adaptive sharpness are all lower, by more than their intervals, than what a search can have "
    "missed (99 %), than the share by which the losses differ, and than the doubt from data; sharper likewise. Of this data, not of "
    "generalisation"
)
"""What `judge` does, for people."""
ROUGH = 0.3
"""A difference whose half-width is more than this share of it is said as a number, not as a ratio."""
NAMES = ("lambda_max", "trace", "adaptive sharpness")


@dataclass(frozen=True)
class Verdict:
    """What follows from a difference, and why."""

    kind: Kind
    text: str
    """One sentence, without the name of the point."""

    def __str__(self) -> str:
        """The sentence."""
        return self.text


def judge(it: Difference) -> Verdict:
    """Say whether a point is flatter or sharper than the reference, or what stands against saying so.

    Losses are equal if |dL| <= 0.01 max(L, L'), or if |dL| <= 0.05 max(L, L') and the 95 % interval of the paired difference holds zero.
    Then a measure counts as lower if the interval of its difference lies below zero, and it is lower by a larger share than the losses
    differ. For "flatter" that must hold of lambda_max, the trace and the adaptive sharpness, and the paired difference of v'Hv over the
    parts of the data must exclude zero where it is known; "sharper" likewise.

    Args:
        it: The difference.

    Returns:
        The verdict.
    """
    measures = {"lambda_max": it.lambda_max, "trace": it.trace, "adaptive sharpness": it.adaptive}
    known = {name: gap for name, gap in measures.items() if gap is not None and gap.low is not None}
    if len(known) < len(measures):
        missing = ", ".join(name for name in measures if name not in known)
        return Verdict("undecided", f"nothing is said: {missing} {'are' if ',' in missing else 'is'} not known")
    if it.distance == 0.0 and it.loss.value == 0.0 and not any(gap.value for gap in known.values()):
        return Verdict("same", "the same parameters and the same numbers")
    refused = _losses(it)
    if refused is not None:
        return refused
    if not (it.point.converged and it.reference.converged):
        return Verdict("undecided", "nothing is said: a search for eigenvalues has not converged")
    return _curvature(it, known)


def relative(gap: Gap, *values: float) -> float | None:
    """Size of a difference as a share of the larger value.

    Args:
        gap: The difference.
        *values: That it is of.

    Returns:
        |gap| / max |value|; 0 where both are zero, None where they are not of one sign, so that a share has no meaning.

    Example:
        >>> relative(Gap(-1.0), 4.0, 3.0), relative(Gap(0.0), 0.0, 0.0), relative(Gap(2.0), 1.0, -1.0)
        (0.25, 0.0, None)
    """
    if not any(values):
        return 0.0
    if min(values) < 0.0 < max(values):
        return None
    return abs(gap.value) / max(map(abs, values))


def _losses(it: Difference) -> Verdict | None:
    """What stands against a comparison of curvature; None if the losses are equal."""
    gap, here, there = it.loss, it.point.loss, it.reference.loss
    if gap.value == 0.0:
        return None
    share = relative(gap, here, there)
    word = "lower" if gap.value < 0.0 else "higher"
    doubt = "" if gap.stderr is None else f" ± {gap.stderr:.2g}"
    if share is None or min(here, there) < 0.0:
        text = f"the losses differ by {gap.value:+.3g}{doubt}, and where a loss is negative a share of it means nothing"
        text += ", so curvature is not compared"
        return Verdict("loss differs", text)
    if share <= EQUAL or (share <= WITHIN_DOUBT and gap.half_width is not None and gap.sign == 0):
        return None
    if gap.half_width is not None and gap.sign == 0:
        text = f"the losses differ by {share:.0%}, which these data cannot tell from nothing ({gap.value:+.3g}{doubt}), nor call equal"
        return Verdict("undecided", f"{text}; curvature is not compared")
    text = f"{word} loss, by {abs(gap.value):.3g}{doubt} ({share:.0%}), so curvature is not compared"
    return Verdict("loss differs", text)


def _curvature(it: Difference, known: Mapping[str, Gap]) -> Verdict:
    least = relative(it.loss, it.point.loss, it.reference.loss) or 0.0
    values = _values(it)
    undone = _undone(it)
    signs = {name: 0 if undone.get(name) else _sign(gap, values[name], least) for name, gap in known.items()}
    phrases = {name: _phrase(name, known[name], values[name], least, undone.get(name, False)) for name in known}
    said, total = ", ".join(phrases.values()), sum(signs.values())
    if abs(total) == len(signs):
        word: Kind = "flatter" if total < 0 else "sharper"
        data = it.data
        if data is not None and data.stderr is not None and data.sign != total // len(signs):
            text = f"v'Hv differs by {data.value:+.3g} ± {data.stderr:.2g} over the parts of the data, which is within its doubt"
            return Verdict("undecided", f"{said} on this data; but {text}: not called {word}")
        sample = (
            "" if data is not None and data.stderr is not None else "; how far that depends on the data is not known"
        )
        return Verdict(word, f"{word} on this data, at equal loss: {said}{sample}")
    adaptive = known["adaptive sharpness"]
    bound = _most(adaptive, values["adaptive sharpness"])
    raw = max((relative(known[name], *values[name]) or 1.0 for name in NAMES[:2] if signs[name]), default=0.0)
    if signs["adaptive sharpness"] == 0 and raw and bound is not None and bound <= TIGHT * raw:
        text = ", ".join(phrases[name] for name in NAMES[:2])
        return Verdict(
            "rescaled",
            f"{text}; the adaptive sharpness, which no rescaling changes, differs by at most {max(bound, 1e-4):.1g} of itself: a "
            "rescaling of the weights can explain this, so neither flatter nor sharper",
        )
    if not any(signs.values()):
        return Verdict("alike", f"at equal loss no difference in curvature that is sure: {said}")
    return Verdict("undecided", f"the measures do not all say so: {said}; neither flatter nor sharper")


def _undone(it: Difference) -> dict[str, bool]:
    """Of each search, whether the order of the two values rests on nothing having been missed."""
    found: dict[str, bool] = {}
    for name, pick in (("lambda_max", "eigenpairs"), ("adaptive sharpness", "adaptive")):
        here, there = (getattr(point, pick) for point in (it.point, it.reference))
        found[name] = could_be_undone(here, there)
    return found


def _values(it: Difference) -> dict[str, tuple[float, float]]:
    """Of each measure here and at the reference; all are known."""
    found: dict[str, tuple[float, float]] = {}
    for name, pick in (("lambda_max", "eigenpairs"), ("adaptive sharpness", "adaptive")):
        here, there = (getattr(point, pick).values[0].item() for point in (it.point, it.reference))
        found[name] = (here, there)
    here, there = it.point.trace, it.reference.trace
    if here is not None and there is not None:
        found["trace"] = (here.value, there.value)
    return found


def _sign(gap: Gap, values: tuple[float, float], least: float) -> int:
    """-1 for lower, 1 for higher, 0 where that is not sure or not more than the losses differ."""
    share = relative(gap, *values)
    return gap.sign if share is None or share > least else 0


def _most(gap: Gap, values: tuple[float, float]) -> float | None:
    """The largest share by which a measure can differ."""
    if gap.low is None or gap.high is None or not any(values):
        return None
    return max(abs(gap.low), abs(gap.high)) / max(map(abs, values))


def _phrase(name: str, gap: Gap, values: tuple[float, float], least: float, undone: bool) -> str:
    """`lambda_max 12% lower`, `trace 3.1 times as large`, and why that is not sure where it is not."""
    here, there = values
    share, lower = relative(gap, *values), gap.value < 0.0
    if gap.sign == 0:
        return f"{name} undecided ({gap.value:+.3g}, within its interval)"
    if min(values) <= 0.0 or (gap.half_width or 0.0) > ROUGH * abs(gap.value):
        said = f"{name} {'lower' if lower else 'higher'} by {abs(gap.value):.2g}"
    elif here > 2.0 * there:
        said = f"{name} {here / there:.3g} times as large"
    elif there > 2.0 * here:
        said = f"{name} {there / here:.3g} times smaller"
    else:
        said = f"{name} {100 * abs(here / there - 1.0):.2g}% {'lower' if lower else 'higher'}"
    if share is not None and share <= least:
        return f"{said} (no more than the losses differ)"
    return f"{said} (unless an eigenvalue was missed)" if undone else said
