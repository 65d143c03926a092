"""--cross-check: the same number from another library, after ours, and without losing ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

from .failures import say
from .output import Output
from .progress import ProgressLine, counted

if TYPE_CHECKING:
    from curvkit.measures import Sharpness, Trace
    from curvkit.measures.cross_check_result import CrossCheck
    from curvkit.objectives import Objective

LONGEST = 0.98
"""The most that is said of a share whose end is not known."""
CUT = "the cross-check with PyHessian was interrupted"
Measured = TypeVar("Measured", bound="Sharpness | Trace")


@dataclass(frozen=True)
class Outcome(Generic[Measured]):
    """What is shown, whether Ctrl-C cut it short, and an error to raise once it is shown."""

    latest: Measured | None
    interrupted: bool
    failure: Exception | None = None


def refuse(asked: str | None, objective: Objective, which: str = "magnitude") -> None:
    """Refuse before anything long what could not be checked after it."""
    if asked is None:
        return
    from curvkit.measures import refuse_uncheckable

    refuse_uncheckable(objective, which)


def compared(
    asked: str | None, objective: Objective, followed: tuple[Measured | None, bool], most: int, output: Output
) -> Outcome[Measured]:
    """Let PyHessian measure the same, in `most` products at most; whatever becomes of that, our result stays."""
    latest, interrupted = followed
    if asked is None or latest is None or interrupted or latest.stage != "complete":
        return Outcome(latest, interrupted)
    from curvkit.errors import CurvkitError
    from curvkit.measures import check_against_pyhessian

    if not output.quiet:
        say("cross-check: PyHessian measures the same, on a copy of the model")
    try:
        with ProgressLine("PyHessian", quiet=output.quiet, color=output.color) as progress:
            check = check_against_pyhessian(
                objective,
                latest,
                on_product=lambda done: progress.update(min(done / most, LONGEST), counted(done, "product")),
            )
    except KeyboardInterrupt:
        return Outcome(replace(latest, notes=(*latest.notes, CUT)), True)
    except CurvkitError as error:
        return Outcome(replace(latest, notes=(*latest.notes, str(error))), False, error)
    return Outcome(replace(latest, cross_check=check), False)


def remarks(check: CrossCheck | None) -> list[tuple[str, str]]:
    """What stands below the numbers: the other number with the verdict, and where it should differ."""
    if check is None:
        return []
    cost = f"{counted(check.products, 'product')}, {check.seconds:.1f} s"
    unsaid = [sentence for sentence in check.expected if sentence not in check.verdict]
    differing = [("expected", f"of {check.package}: {'; '.join(unsaid)}")] if unsaid else []
    return [("cross-check", f"{check} It took {cost}."), *differing]
