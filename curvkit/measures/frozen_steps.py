"""The step that an optimizer of torch takes while its state is frozen: linear in the gradient, one number per coordinate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from curvkit.checkpoints.optimizer_state import OptimizerState, ParameterState

Group = Mapping[str, Any]

NO_LINE: Mapping[str, str] = {
    "ASGD": "whose step size is not proportional to lr and changes with each step",
    "Adafactor": "which keeps no second moment per coordinate, and clips its steps",
    "LBFGS": "which divides by a dense matrix made of past gradients",
    "Muon": "which orthogonalises its steps, so that their length does not fall with the gradient",
    "Rprop": "whose steps depend on the signs of the gradient alone",
    "SparseAdam": "which moves only the rows that occur in a batch",
}
"""Optimizers of torch without a limit of stability of the kind that is computed here, and why."""


@dataclass(frozen=True, eq=False)
class FrozenStep:
    """One parameter's step at a fixed state, per unit of learning rate.

        y' = beta y + c (g + coupled x),    x' = (1 - lr decoupled) x - lr m (a (g + coupled x) + b y'),    gain = a + b c / (1 + beta)

    Each mode of a quadratic leaves the unit circle first at z = -1, where y' = c z / (z - beta) g makes a + b y' / g the gain.
    """

    multiplier: Tensor | float
    """m, parameter-shaped and in float64, or one number: 1 / P with the frozen preconditioner P, corrections of bias included."""
    gain: float
    """How much of a gradient that changes its sign at every step gets through the momentum; 1 without momentum."""
    coupled: float = 0.0
    """Weight decay that is added to the gradient."""
    decoupled: float = 0.0
    """Weight decay that shrinks the weights beside it, per unit of learning rate."""
    idle: Tensor | None = None
    """Parameter-shaped: where the root of the second moment is no more than eps, as where there never was a gradient."""


def refusal(state: OptimizerState) -> str | None:
    """Say why an optimizer has no limit of stability here, as far as its options tell.

    Args:
        state: Of the optimizer.

    Returns:
        A clause; None if it has one.
    """
    name = state.name
    if name in NO_LINE:
        return f"the optimizer is {name}, {NO_LINE[name]}"
    if name not in STEPS:
        return f"the optimizer is {name}, whose limit is not known"
    for number, group in enumerate(state.groups):
        of = f"of the optimizer's group {number}" if len(state.groups) > 1 else "of the optimizer"
        if group.get("maximize"):
            return "the optimizer climbs (maximize=True)"
        if "correct_bias" in group:
            return "the optimizer is the AdamW of transformers, whose correction of bias is another than torch's"
        if name == AMBIGUOUS and _number(group, "weight_decay") and "decoupled_weight_decay" not in group:
            return (
                f"the weight decay {of} is {_number(group, 'weight_decay'):g}, which Adam and AdamW treat in different ways, and the "
                "checkpoint does not say which of them it was"
            )
        momentum, dampening = _number(group, "momentum"), _number(group, "dampening")
        outside = [decay for decay in (momentum, *_betas(group)) if not 0.0 <= decay < 1.0]
        if outside:
            return f"a momentum or beta {of} is {outside[0]:g}, which is not within [0, 1)"
        if momentum and dampening > 1.0:
            return f"the dampening {of} is {dampening:g}, which turns its steps round"
    return None


def frozen_step(name: str, group: Group, parameter: ParameterState) -> FrozenStep | None:
    """The step of one parameter, if it has made one already.

    Args:
        name: Of the optimizer; `refusal` must have nothing against it.
        group: The options of the parameter's group.
        parameter: What the optimizer keeps of it.

    Returns:
        The step; None if the optimizer has not moved this parameter yet, so that there is no second moment to divide by.

    Raises:
        KeyError: If a count or moment is missing that the class always keeps beside the others.
    """
    return STEPS[name](group, parameter)


def _sgd(group: Group, parameter: ParameterState) -> FrozenStep:
    """Heavy ball: a = 0, b c = 1 - dampening. Nesterov: a = 1, b = beta, c = 1."""
    beta, coupled = _number(group, "momentum"), _number(group, "weight_decay")
    direct, through = (1.0, beta) if group.get("nesterov") or not beta else (0.0, 1.0 - _number(group, "dampening"))
    return FrozenStep(1.0, direct + through / (1.0 + beta), coupled)


def _adam(group: Group, parameter: ParameterState, *, decoupled: bool) -> FrozenStep | None:
    """P = (1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps), v the largest so far with amsgrad; a = 0, b c = 1 - beta1."""
    moment = parameter.tensors.get("max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
    if moment is None:
        return None
    (beta1, beta2), t = _betas(group), parameter.numbers["step"]
    root, eps = moment.double().div(1.0 - beta2**t).sqrt_(), _number(group, "eps")
    return _adaptive(group, root, eps, (1.0 - beta1**t), _heavy(beta1), decoupled=decoupled)


def _nadam(group: Group, parameter: ParameterState, *, decoupled: bool) -> FrozenStep | None:
    """Here a = (1 - mu_t) / (1 - mu_1 ... mu_t), b = mu_(t+1) / (1 - mu_1 ... mu_(t+1)), c = 1 - beta1; the mu stay those of step t."""
    moment = parameter.tensors.get("exp_avg_sq")
    if moment is None:
        return None
    (beta1, beta2), t, product = _betas(group), parameter.numbers["step"], parameter.numbers["mu_product"]
    mu, mu_next = (beta1 * (1.0 - 0.5 * 0.96 ** (k * _number(group, "momentum_decay"))) for k in (t, t + 1))
    a, b = (1.0 - mu) / (1.0 - product), mu_next / (1.0 - product * mu_next)
    root = moment.double().div(1.0 - beta2**t).sqrt_()
    return _adaptive(group, root, _number(group, "eps"), 1.0, a + b * _heavy(beta1), decoupled=decoupled)


def _radam(group: Group, parameter: ParameterState, *, decoupled: bool) -> FrozenStep | None:
    """P = (1 - beta1^t) (sqrt(v) + eps) / (r_t sqrt(1 - beta2^t)) with the rectification r_t; P = 1 - beta1^t while rho_t <= 5."""
    moment = parameter.tensors.get("exp_avg_sq")
    if moment is None:
        return None
    (beta1, beta2), t = _betas(group), parameter.numbers["step"]
    most = 2.0 / (1.0 - beta2) - 1.0
    rho = most - 2.0 * t * beta2**t / (1.0 - beta2**t)
    if rho <= 5.0:
        return _adaptive(group, None, 0.0, 1.0 - beta1**t, _heavy(beta1), decoupled=decoupled)
    r = ((rho - 4.0) * (rho - 2.0) * most / ((most - 4.0) * (most - 2.0) * rho)) ** 0.5
    correction = (1.0 - beta1**t) / (r * (1.0 - beta2**t) ** 0.5)
    root = moment.double().sqrt()
    return _adaptive(group, root, _number(group, "eps"), correction, _heavy(beta1), decoupled=decoupled)


def _adamax(group: Group, parameter: ParameterState) -> FrozenStep | None:
    """P = (1 - beta1^t) u, where torch has added eps to |g| before it takes the maximum."""
    moment = parameter.tensors.get("exp_inf")
    if moment is None:
        return None
    beta1, eps = _betas(group)[0], _number(group, "eps")
    root = (moment.double() - eps).clamp_(min=0.0)
    return _adaptive(group, root, eps, 1.0 - beta1 ** parameter.numbers["step"], _heavy(beta1))


def _rmsprop(group: Group, parameter: ParameterState) -> FrozenStep | None:
    """P = sqrt(v - centre^2) + eps; then a heavy ball of g / P."""
    moment = parameter.tensors.get("square_avg")
    if moment is None:
        return None
    variance = moment.double()
    if group.get("centered"):
        variance = (variance - parameter.tensors["grad_avg"].double().square()).clamp_(min=0.0)
    return _adaptive(group, variance.sqrt(), _number(group, "eps"), 1.0, 1.0 / (1.0 + _number(group, "momentum")))


def _adagrad(group: Group, parameter: ParameterState) -> FrozenStep | None:
    """P = (1 + (t - 1) lr_decay) (sqrt(sum) + eps)."""
    moment, t = parameter.tensors.get("sum"), parameter.numbers.get("step", 0.0)
    if moment is None or t < 1:  # the sum is there from the beginning
        return None
    correction = 1.0 + (t - 1.0) * _number(group, "lr_decay")
    return _adaptive(group, moment.double().sqrt(), _number(group, "eps"), correction, 1.0)


def _adadelta(group: Group, parameter: ParameterState) -> FrozenStep | None:
    """P = sqrt(v + eps) / sqrt(d + eps), d the mean square of its steps."""
    moment = parameter.tensors.get("square_avg")
    if moment is None:
        return None
    eps, steps = _number(group, "eps"), parameter.tensors["acc_delta"].double()
    multiplier = ((steps + eps) / (moment.double() + eps)).sqrt_()
    return FrozenStep(multiplier, 1.0, _number(group, "weight_decay"), idle=moment <= eps)


def _adaptive(
    group: Group, root: Tensor | None, eps: float, correction: float, gain: float, *, decoupled: bool = False
) -> FrozenStep:
    """P = correction (root + eps), or the correction alone."""
    decay = _number(group, "weight_decay")
    coupled, beside = (0.0, decay) if group.get("decoupled_weight_decay", decoupled) else (decay, 0.0)
    if root is None:
        return FrozenStep(1.0 / correction, gain, coupled, beside)
    idle = root <= eps
    return FrozenStep(root.add_(eps).mul_(correction).reciprocal_(), gain, coupled, beside, idle)


def _heavy(beta: float) -> float:
    """Gain of y' = beta y + (1 - beta) g."""
    return (1.0 - beta) / (1.0 + beta)


def _number(group: Group, key: str) -> float:
    """An option; 0 where an older version of torch had none."""
    return float(group.get(key) or 0.0)


def _betas(group: Group) -> tuple[float, ...]:
    return tuple(float(beta) for beta in group.get("betas") or ())


AMBIGUOUS = "Adam or AdamW"
"""What groups show of an optimizer of a torch that did not yet write which of the two it was."""

STEPS: Mapping[str, Callable[[Group, ParameterState], FrozenStep | None]] = {
    "SGD": _sgd,
    "Adam": partial(_adam, decoupled=False),
    "AdamW": partial(_adam, decoupled=True),
    AMBIGUOUS: partial(_adam, decoupled=False),
    "NAdam": partial(_nadam, decoupled=False),
    "RAdam": partial(_radam, decoupled=False),
    "Adamax": _adamax,
    "RMSprop": _rmsprop,
    "Adagrad": _adagrad,
    "Adadelta": _adadelta,
}
"""The optimizers of torch whose step is linear in the gradient while their state is frozen."""
