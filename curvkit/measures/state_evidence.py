"""Does an optimizer's state belong to the parameters that its order says? Its second moments are compared with gradients on data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit.checkpoints.documents import brief
from curvkit.checkpoints.optimizer_state import OptimizerState
from curvkit.objectives import Objective
from curvkit.operators.independence import rows_are_independent

PARTS = 32
"""The data is cut into so many parts, at least, if it can be cut."""
PAIR, TENSOR = 1.0, 4.0
"""Least scores for which an order is believed: of each pair of tensors of one shape, and of each tensor against all others of its shape."""
OTHER = -4.0
"""From this score of a pair downwards another order fits better."""
PATTERN = {"second": 3.0, "first": 1.5}
"""Weight of a pattern beside that of a level, which is its expected score; squared first moments are means of fewer gradients."""
CORRELATED = 0.5
"""How far scores that share the gradients are taken to be correlated."""
LEAST_SPREAD, LARGEST = 0.15, 6.0
"""Of the noise of levels, in units of log: not less; and the largest score of a level, whose noise may have wide tails."""
FEW = 5
"""From so many tensors on the noise of levels is known."""


@dataclass(frozen=True)
class Evidence:
    """How clearly an order of parameters is the right one.

    Args:
        pair: The least score of a pair of tensors of one shape; infinite if there is none.
        names: Of that pair.
        tensor: The least score of a tensor against all others of its shape.
        name: Of that tensor.
    """

    pair: float
    names: tuple[str, str]
    tensor: float
    name: str

    @property
    def reason(self) -> str | None:
        """Why the order is not believed, as a sentence without a full stop; None if it is."""
        one, other = (brief(name) for name in self.names)
        if self.pair <= OTHER:
            return (
                f"the optimizer's state seems to be in another order than the model's parameters: the second moments at {one} and {other} "
                "fit the gradients better when they are exchanged"
            )
        if self.pair <= PAIR or self.tensor <= TENSOR:
            pair = f"{one} and {other}" if self.pair <= PAIR else f"{brief(self.name)} and others of its shape"
            return f"the optimizer's state has no names, and its second moments do not tell {pair} apart"
        return None


def confirm(state: OptimizerState, objective: Objective) -> str | None:
    """Test an assignment that rests on the order of parameters alone.

    An optimizer's second moment of a weight W of a layer is a mean of squared gradients, which have a pattern of rows and columns:
    the output gradients and the inputs of that layer. So have the squared gradients of parts of the data at the checkpoint. Let x_i
    be the logarithms of the row sums (and, apart from them, of the column sums) of the state that stands at parameter i, and y_i
    those of the sum of squared gradients of parameter i, both less their means. If the states of i and j were exchanged,

        r_ij = corr(x_i - x_j, y_i - y_j),    z_ij = atanh(r_ij) sqrt(n - 3),    n rows

    would change its sign, whatever both have in common with each other. A second score comes from the squared first moment, which has
    a shorter memory, a third from the levels: log mean of the state against that of the squared gradients, whose noise is their spread
    over all tensors. The scores are joined with weights in proportion to what can be expected of them. The assignment is believed if
    every pair has a score above 1 and every tensor, against all others of its shape together, one above 4.

    Args:
        state: Whose `certain` is False; else nothing is tested.
        objective: The model at the checkpoint, and data of the kind that it was trained on; the more parts it has, the clearer the scores.

    Returns:
        None if the assignment is confirmed; otherwise why not, as a sentence without a full stop that fits after "no stability limit: ".

    Raises:
        UnsupportedModel: As `Objective.gradient`.
        UnknownObjective: Likewise.

    Cost: the arithmetic of one gradient of the data, in at least 32 parts where its rows are examples of their own, which is checked first:
        about the time of six gradients for a small GPT on 32 windows. Products of all pairs of tensors of one shape.
    Accuracy: of 34 runs of Adam the true order was believed in 26, of 1753 other orders none; see docs/concepts/stability.md.

    Example:
        >>> from curvkit.measures.state_evidence import Evidence
        >>> print(Evidence(5.0, ("a", "b"), 7.0, "a").reason, Evidence(0.5, ("a", "b"), 7.0, "a").reason, sep="; ")
        None; the optimizer's state has no names, and its second moments do not tell 'a' and 'b' apart
    """
    if state.certain:
        return None
    moments = {name: _moments(held.tensors) for name, held in state.parameters.items()}
    if not all("second" in held for held in moments.values()):
        return "the optimizer's state has no names, and no second moments by which its order could be tested"
    entries = {entry.name: entry.shape for entry in objective.parameters.entries}
    shapes = {tuple(held["second"].shape) for held in moments.values()}
    left = next((name for name, shape in entries.items() if name not in moments and shape in shapes), None)
    if left is not None:
        return f"the optimizer's state has no names, and {brief(left)}, which it seems not to have trained, has the shape of others"
    squares = _squared_gradients(objective)
    missing = next((name for name in moments if name not in squares), None)
    if missing is not None:
        return f"the optimizer's state has no names, and {brief(missing)}, of which it is part, was left out of the measurement"
    if not all(bool(torch.isfinite(square).all()) for square in squares.values()):
        return "the optimizer's state has no names, and its order cannot be tested by gradients that are not finite"
    if not any(bool(square.any()) for square in squares.values()):
        return "the optimizer's state has no names, and its order cannot be tested by gradients that are zero"
    return evidence(moments, squares).reason


def evidence(moments: Mapping[str, Mapping[str, Tensor]], squares: Mapping[str, Tensor]) -> Evidence:
    """Score an assignment.

    Args:
        moments: Per parameter, "second" and perhaps "first": the second moment, and the square of the first.
        squares: Per parameter, a sum of squared gradients; it may have more parameters.

    Returns:
        The least scores.

    Cost: k^2 n for k tensors of n rows and columns.
    """
    noise = {kind: _noise(moments, squares, kind) for kind in ("second", "first")}
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name in moments:
        by_shape.setdefault(tuple(squares[name].shape), []).append(name)
    found = Evidence(math.inf, ("", ""), math.inf, "")
    for names in by_shape.values():
        if len(names) > 1:
            found = _least(
                found, names, _scores([moments[name] for name in names], [squares[name] for name in names], noise)
            )
    return found


def _least(before: Evidence, names: Sequence[str], scores: Tensor) -> Evidence:
    """The lesser of what was found and what the tensors of one shape show."""
    k = len(names)
    others = scores.masked_fill(torch.eye(k, dtype=torch.bool), 0.0)
    tensors = (
        others.sum(1) / (k - 1) / math.sqrt(0.5 + 0.5 / (k - 1))
    )  # pairs that share a tensor are correlated by a half
    pairs = scores.masked_fill(torch.eye(k, dtype=torch.bool), math.inf)
    i, j = divmod(int(pairs.argmin()), k)
    worst = int(tensors.argmin())
    pair = (float(pairs[i, j]), (names[min(i, j)], names[max(i, j)]))
    tensor = (float(tensors[worst]), names[worst])
    pair = pair if pair[0] < before.pair else (before.pair, before.names)
    tensor = tensor if tensor[0] < before.tensor else (before.tensor, before.name)
    return Evidence(*pair, *tensor)


def _scores(moments: Sequence[Mapping[str, Tensor]], squares: Sequence[Tensor], noise: Mapping[str, float]) -> Tensor:
    """[k, k], symmetric: how much better each pair fits as it is than exchanged, in standard deviations of no relation."""
    k = len(squares)
    total, weights, square_weights = (torch.zeros(k, k, dtype=torch.float64) for _ in range(3))
    gradients, level = _features(squares), _differences(_levels(squares))
    for kind in ("second", "first"):
        if not all(kind in held for held in moments):
            continue
        states = [held[kind] for held in moments]
        z = _patterns(_features(states), gradients)
        if z is not None:
            total, weights, square_weights = (
                total + PATTERN[kind] * z,
                weights + PATTERN[kind],
                square_weights + PATTERN[kind] ** 2,
            )
        expected = (level.abs() / (math.sqrt(2.0) * noise[kind])).clamp(max=LARGEST)
        z = (_differences(_levels(states)) * level.sign() / (math.sqrt(2.0) * noise[kind])).clamp(-LARGEST, LARGEST)
        total, weights, square_weights = total + expected * z, weights + expected, square_weights + expected**2
    variance = (1.0 - CORRELATED) * square_weights + CORRELATED * weights**2
    return torch.where(variance > 0.0, total / variance.clamp_min(1e-30).sqrt(), 0.0)


def _patterns(states: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor | None:
    """z_ij of rows and of columns, joined; None if there are too few of them."""
    found: list[Tensor] = []
    for x, y in zip(states, gradients, strict=True):  # [k, n] each
        n = x.shape[1]
        if n < 4:
            continue
        xy, xx, yy = x @ y.T, x @ x.T, y @ y.T
        sizes = _spread(xx, xx).clamp_min(0.0) * _spread(yy, yy).clamp_min(0.0)
        covariance = _spread(xy, xy.T)
        r = torch.where(sizes > 0.0, covariance / sizes.clamp_min(1e-300).sqrt(), 0.0)
        found.append(r.clamp(-0.999999, 0.999999).atanh() * math.sqrt(n - 3))
    return sum(found[1:], found[0]) / math.sqrt(len(found)) if found else None


def _spread(products: Tensor, transposed: Tensor) -> Tensor:
    """(x_i - x_j)(y_i - y_j) from the products x_i y_j."""
    own = products.diagonal()
    return own[:, None] + own[None] - products - transposed


def _features(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Logarithms of row sums and of column sums, less their means: [k, rows] and [k, columns]; of vectors the entries."""
    matrices = [t.flatten(1) if t.ndim > 1 else t.reshape(-1, 1) for t in tensors]
    sums = [
        torch.stack([m.sum(dim, dtype=torch.float64) for m in matrices])
        for dim in ((1, 0) if tensors[0].ndim > 1 else (1,))
    ]
    logs = [(s + s.amax(1, keepdim=True) * 1e-12 + 1e-300).log() for s in sums]
    return [log - log.mean(1, keepdim=True) for log in logs]


def _levels(tensors: Sequence[Tensor]) -> Tensor:
    """[k] log of the mean."""
    return torch.stack([tensor.mean(dtype=torch.float64) for tensor in tensors]).clamp_min(1e-300).log()


def _differences(levels: Tensor) -> Tensor:
    return levels[:, None] - levels[None]


def _noise(moments: Mapping[str, Mapping[str, Tensor]], squares: Mapping[str, Tensor], kind: str) -> float:
    """Spread, over all tensors, of the level of the state against that of the gradients; infinite if there are too few."""
    names = [name for name, held in moments.items() if kind in held]
    if len(names) < FEW:
        return math.inf
    levels = _levels([moments[name][kind] for name in names]) - _levels([squares[name] for name in names])
    return max(LEAST_SPREAD, float(levels.std()))


def _moments(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The second moment as the optimizer has it, and the square of the first."""
    second = next((tensors[key] for key in ("exp_avg_sq", "square_avg", "sum") if key in tensors), None)
    if second is None and "exp_inf" in tensors:
        second = tensors["exp_inf"].double().square()
    first = next((tensors[key] for key in ("exp_avg", "momentum_buffer", "grad_avg") if key in tensors), None)
    found = {"second": second, "first": None if first is None else first.double().square()}
    return {key: value for key, value in found.items() if value is not None}


def _squared_gradients(objective: Objective) -> dict[str, Tensor]:
    """Sums over parts of the data of the squared gradient of each part's mean loss, on the CPU."""
    parts = objective.raised()
    if len(parts.batches) < PARTS and parts.divisible and rows_are_independent(parts, parts.batches):
        parts, _ = parts.cut(-(-PARTS // len(parts.batches)))
    with parts.measuring():
        total = [torch.zeros_like(tensor, dtype=torch.float32, device="cpu") for tensor in parts.tensors]
        for index in range(len(parts.batches)):
            terms = parts.terms(index)
            if not terms.weight > 0.0 or not terms.total.requires_grad:
                continue
            gradients = torch.autograd.grad(terms.total, parts.tensors, materialize_grads=True)
            for square, gradient in zip(total, gradients, strict=True):
                square += (gradient.detach() / terms.weight).square().mul_(terms.weight).to("cpu", torch.float32)
    return dict(zip(parts.parameters.names, total, strict=True))
