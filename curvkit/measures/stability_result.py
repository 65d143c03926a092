"""What a measurement of stability says: an eigenvalue beside the limit of the optimizer, and how far that can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from curvkit.measures.limit_verdict import CAVEAT, Interval
from curvkit.measures.updates import Update
from curvkit.results import Definition, Eigenpairs, plain

Stage = Literal["searching", "complete"]


@dataclass(frozen=True)
class RateRatio:
    """A learning rate as a share of the largest stable one."""

    label: str
    """"current", "initial_lr", "peak", or "given"."""
    lr: float
    """The largest of the groups."""
    source: str
    """In words; behind it why there is no ratio."""
    ratio: float | None
    """lr / largest stable lr; None where its groups stand in other proportions or at another momentum than was measured, or it is 0."""
    interval: Interval | None = None


@dataclass(frozen=True, eq=False)
class Stability:
    """How far an optimizer is from the learning rate at which it would leave a minimum; a partial result while `stage` is not "complete".

    With the state of the optimizer frozen, and the loss its quadratic model at the weights,

        stable  <=>  lambda_max(F^1/2 (H + C) F^1/2 + W) < 2  <=>  ratio < 1,    ratio = lr / largest stable lr = lambda_max / 2,

    see `Update`. Where there is no limit, `reason` says why, and the numbers are None.
    """

    optimizer: str
    """Its name."""
    reason: str | None
    """Why there is no limit, or no verdict; None if there is one."""
    stage: Stage = "complete"
    update: Update | None = None
    """The folded update at the reference rate; None if there is no limit."""
    eigenpairs: Eigenpairs | None = None
    """Of K, the folded matrix, at the reference rate; its stable region is below 2."""
    rates: tuple[RateRatio, ...] = ()
    reference: str | None = None
    """Label of the rate that the figures are of."""
    idle_mass: float | None = None
    """Share of the eigenvector's square on coordinates whose second moment is next to nothing; None while there is no eigenvector."""
    verdict: str | None = None
    """"below", "at" or "above the full-batch limit"; None: `reason` says why."""
    definition: Definition | None = None
    seed: int | None = None
    seconds: float = 0.0
    products: int = 0
    """Products with the Hessian beyond those of a sharpness that was known."""
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """The comparison in one line."""
        if self.value is None or self.ratio is None:
            return f"Stability({self.optimizer}: {self.reason})"
        said = self.verdict or self.reason or self.stage
        return f"Stability({self.optimizer}: {self.quantity} = {self.value:.4g}, limit {self.limit_text} = {self.limit:.4g}; {said})"

    @property
    def folded(self) -> float | None:
        """Lambda_max of K, to be compared with 2."""
        return None if self.eigenpairs is None else self.eigenpairs.values[0].item()

    @property
    def folded_interval(self) -> Interval | None:
        """Holds an eigenvalue of K for certain."""
        if self.eigenpairs is None:
            return None
        low, high = self.eigenpairs.intervals[0].tolist()
        return low, high

    @property
    def converged(self) -> bool:
        """Whether the eigenvalue was recomputed to the tolerance."""
        return self.eigenpairs is not None and self.eigenpairs.all_converged

    @property
    def quantity(self) -> str | None:
        """What `value` is: "lambda_max(P^-1 H)"."""
        return None if self.update is None else f"lambda_max({self.update.matrix})"

    @property
    def legend(self) -> str | None:
        """What the letters in `quantity` are."""
        if self.update is None:
            return None
        times = "R times " if "R" in _letters(self.update.matrix) else ""
        times += "" if self.update.gain == 1.0 else f"{1.0 / self.update.gain:.3g} times "
        meanings = {
            "H": "Hessian",
            "P": "the optimizer's divisor of the gradient, as of its last step",
            "C": "coupled weight decay",
            "W": f"{times}decoupled weight decay",
            "F": "step of each coordinate, momentum included, per unit of the largest learning rate",
            "R": "learning rate of each group over the largest",
            "n": "1 where a coordinate is flat",
        }
        return "; ".join(
            f"{letter} = {text}" for letter, text in meanings.items() if letter in _letters(self.update.matrix)
        )

    @property
    def value(self) -> float | None:
        """The eigenvalue in words of the optimizer: of H for SGD, of P^-1 H for Adam."""
        return None if self.update is None or self.folded is None else self.update.value(self.folded)

    @property
    def interval(self) -> Interval | None:
        """Of `value`."""
        if self.update is None or self.folded_interval is None:
            return None
        low, high = map(self.update.value, self.folded_interval)
        return low, high

    @property
    def lr(self) -> float | None:
        """The reference rate, the largest of its groups."""
        return None if self.update is None else self.update.lr

    @property
    def number(self) -> float | None:
        """The limit times the learning rate: 2 for gradient descent, 38 for Adam with beta1 = 0.9."""
        return None if self.update is None else self.update.number

    @property
    def limit(self) -> float | None:
        """What `value` must stay below, at the reference rate; `value` / `limit` is `ratio`."""
        return None if self.update is None else self.update.number / self.update.lr

    @property
    def limit_text(self) -> str | None:
        """The limit as it is written: "38 / lr"."""
        return None if self.update is None else f"{self.update.number:.4g} / lr"

    @property
    def ratio(self) -> float | None:
        """The reference rate over the largest stable one: lambda_max(K) / 2; stable below 1."""
        return None if self.folded is None else self.folded / 2.0

    @property
    def ratio_interval(self) -> Interval | None:
        """Of `ratio`."""
        return None if self.folded_interval is None else (self.folded_interval[0] / 2.0, self.folded_interval[1] / 2.0)

    @property
    def largest_stable_lr(self) -> float | None:
        """The learning rate at which lambda_max(K) is 2; infinite where no curvature is positive."""
        return None if self.update is None or self.folded is None else largest_stable(self.update.lr, self.folded)

    @property
    def largest_stable_lr_interval(self) -> Interval | None:
        """Of `largest_stable_lr`."""
        if self.update is None or self.folded_interval is None:
            return None
        low, high = self.folded_interval
        return largest_stable(self.update.lr, high), largest_stable(self.update.lr, low)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, without vectors: what `--json` prints under "stability".

        Returns:
            Mappings, lists, numbers and strings.
        """
        pairs = self.eigenpairs
        return plain(
            {
                "optimizer": self.optimizer,
                "quantity": self.quantity,
                "legend": self.legend,
                "value": self.value,
                "interval": self.interval,
                "converged": self.converged,
                "limit_times_lr": self.number,
                "limit": self.limit,
                "lr": self.lr,
                "lr_label": self.reference,
                "ratio": self.ratio,
                "ratio_interval": self.ratio_interval,
                "largest_stable_lr": self.largest_stable_lr,
                "largest_stable_lr_interval": self.largest_stable_lr_interval,
                "folded": self.folded,
                "folded_interval": self.folded_interval,
                "folded_upper_bound": None if pairs is None else pairs.upper_bound,
                "rates": self.rates,
                "idle_mass": self.idle_mass,
                "verdict": self.verdict,
                "reason": self.reason,
                "caveat": CAVEAT,
                "definition": None if self.definition is None else str(self.definition),
                "stage": self.stage,
                "seed": self.seed,
                "products": self.products,
                "seconds": self.seconds,
                "notes": self.notes,
            }
        )


def largest_stable(lr: float, folded: float) -> float:
    """The learning rate at which the folded eigenvalue is 2: it is proportional to the learning rate.

    Args:
        lr: At which `folded` was taken.
        folded: lambda_max of K.

    Returns:
        lr 2 / folded; infinite for an eigenvalue that is not positive.

    Example:
        >>> largest_stable(0.1, 0.5)
        0.4
    """
    return lr * 2.0 / folded if folded > 0.0 else float("inf")


def _letters(matrix: str) -> set[str]:
    return set(matrix.replace("kappa", ""))
