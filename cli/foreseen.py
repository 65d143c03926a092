"""What an estimate would take, as far as the estimator says it: --plan."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.text import Text

from . import measuring, render
from .estimation import Chosen, Saving
from .progress import duration, styled
from .render_inspection import size

if TYPE_CHECKING:
    from curvkit.estimators.expected import Expected
    from curvkit.objectives import Objective

SHARE = 8
"""Parts of the first batch, of which one is run before a gradient is timed."""


def expected(chosen: Chosen, objective: Objective) -> Expected | None:
    """What the estimator says that it takes; None where it does not say."""
    from curvkit.estimators.expected import Foreseeing

    return chosen.estimator.expected(objective) if isinstance(chosen.estimator, Foreseeing) else None


def gradient_seconds(objective: Objective) -> float:
    """Seconds of one gradient of all the data, scaled from the first batch."""
    from curvkit.operators.plan import relative_size

    it = objective.raised()
    parts, whole = it.cut(SHARE)[0], it.with_batches(it.batches[:1])
    parts.with_batches(parts.batches[:1]).gradient().sum().item()  # prepares the libraries
    began = time.perf_counter()
    whole.gradient().sum().item()  # a number on the host: a device has finished then
    return (time.perf_counter() - began) * sum(relative_size(batch, it.batches[0]) for batch in it.batches)


@dataclass(frozen=True)
class Foreseen:
    """What an estimate would take."""

    estimator: str
    matrix: str | None
    gradients: float | None
    """None: the estimator does not say what it takes."""
    copies: float | None
    held_bytes: int | None
    peak_bytes: int | None
    free_bytes: int
    gradient_seconds: float
    seconds: float | None
    device: str

    @classmethod
    def of(cls, chosen: Chosen, objective: Objective) -> Foreseen:
        """Ask the estimator, and time a gradient."""
        from curvkit.operators.memory import free_memory

        it = objective.raised()
        foresaid, one = expected(chosen, it), gradient_seconds(it)
        said: dict[str, Any] = {
            "gradients": None,
            "copies": None,
            "held_bytes": None,
            "peak_bytes": None,
            "seconds": None,
        }
        if foresaid is not None:
            said = {**asdict(foresaid), "peak_bytes": foresaid.peak_bytes(it), "seconds": foresaid.gradients * one}
        return cls(
            estimator=repr(chosen.estimator),
            matrix=getattr(chosen.estimator, "matrix", None),
            free_bytes=free_memory(it.device),
            gradient_seconds=one,
            device=str(it.device),
            **said,
        )

    def lines(self) -> list[tuple[str, str]]:
        """What is said, name by name."""
        made = [("estimator", self.estimator), *([("matrix", self.matrix)] if self.matrix else [])]
        if self.gradients is None or self.copies is None or self.peak_bytes is None or self.seconds is None:
            made.append(("work", "not known: the estimator has no method `expected`"))
        else:
            held = f" and {size(self.held_bytes)} for a pass" if self.held_bytes else ""
            made += [
                ("work", f"{self.gradients:.3g} gradients, by counting"),
                (
                    "peak",
                    f"about {size(self.peak_bytes)} beside model and data: {self.copies:.3g} copies of the parameters{held}",
                ),
                (
                    "time",
                    f"about {duration(self.seconds)}: {self.gradient_seconds:.2g} s a gradient, as one of the first batch took",
                ),
            ]
        return [*made, ("free", f"{size(self.free_bytes)} on {self.device}")]


def show(found: Foreseen, title: str, record: dict[str, Any], output: Saving) -> None:
    """Print what it would take."""
    from curvkit.results import plain

    document = render.json_document("plan", {**plain(found), "estimated": True}, record)
    measuring.show(
        found,
        document,
        output.shown,
        plain=lambda plan: render.tab_separated([("plan", title), *plan.lines()]),
        table=partial(_table, title=title, color=output.color),
    )


def _table(found: Foreseen, title: str, color: str) -> None:
    console = styled(color)
    console.print(Text(title, style="bold", overflow="fold"))
    render.print_remarks(console, found.lines())
