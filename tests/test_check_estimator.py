"""The contract of estimators: one that keeps it passes, and every property has a planted fault that breaks it alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from oracles import classes, cut, fill_gradients, normal, seeded, surroundings
from torch import Tensor

from curvkit import Objective, seeds
from curvkit.errors import InvalidArgument
from curvkit.estimators import EmpiricalFisher, Hutchinson
from curvkit.models import MLP
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate
from curvkit.testing import check_estimator

NOISE = 1e-3


def ggn_diagonal(objective: Objective) -> dict[str, Tensor]:
    """Of cross-entropy times s: (s / N) sum_n sum_c p_nc (J_nc - sum_k p_nk J_nk)^2, from all rows of the Jacobian."""
    total: list[Any] = [0.0] * len(objective.tensors)
    weights: list[float] = []
    with objective.measuring():
        for index in range(len(objective.batches)):
            z, y = objective.outputs(index)
            terms = objective.terms_of(z, y)
            (g,) = torch.autograd.grad(terms.total, z, retain_graph=True)
            s = (g / (z.detach().softmax(1) - F.one_hot(y, 3)))[0, 0]
            total = [t + s * d for t, d in zip(total, jacobian_diagonals(z, list(objective.tensors)), strict=True)]
            weights.append(terms.weight)
    scale = objective.denominator(weights)
    named = zip(objective.parameters.entries, total, strict=True)
    return {entry.name: value.view(entry.shape) / scale for entry, value in named}


def jacobian_diagonals(z: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """sum_n sum_c p_nc (J_nc - sum_k p_nk J_nk)^2 of each parameter, flat; the graph stays."""
    q = z.detach().softmax(1)[..., None]  # [N, C, 1]
    units = torch.eye(z.numel(), dtype=z.dtype).view(-1, *z.shape)
    found: list[Tensor] = []
    for J in torch.autograd.grad(z, parameters, units, retain_graph=True, is_grads_batched=True):
        J = J.view(*z.shape, -1)  # [N, C, n]
        found.append((q * (J - (q * J).sum(1, keepdim=True)).square()).sum((0, 1)))
    return found


@dataclass(frozen=True)
class Noisy:
    """The diagonal of the GGN with normal noise of a known size: sound in every respect."""

    size: float = NOISE
    matrix: ClassVar[str] = "ggn"

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        return self.noisy(ggn_diagonal(objective.raised()), seeds.settle(seed))

    def noisy(self, exact: dict[str, Tensor], seed: int) -> DiagonalEstimate:
        values = {
            name: value + self.size * normal_like(value, seed, name, index)
            for index, (name, value) in enumerate(exact.items())
        }
        stderr = {name: torch.full_like(value, self.size) for name, value in values.items()}
        return DiagonalEstimate(values, stderr, self.matrix, repr(self), Cost(4.0, 0.1), samples=9, seed=seed)


def normal_like(value: Tensor, seed: int, name: str, index: int) -> Tensor:
    return seeds.normal(value.numel(), seed, name, index, dtype=value.dtype).view_as(value)


def test_a_sound_estimator_passes():
    check_estimator(Noisy())
    check_estimator(EmpiricalFisher(), seed=3)


def test_nothing_is_disturbed_by_the_check_itself():
    with seeded():
        model = MLP([4, 6, 3], "tanh")
    fill_gradients(model)
    objective = Objective(model, F.cross_entropy, cut([4, 3, 1], normal(8, 4, dtype=torch.float32), classes(8, num=3)))
    before = surroundings(model)
    check_estimator(Noisy(), objective)
    assert surroundings(model) == before


# ---- one fault for each property ------------------------------------------------------------------------------------


def spoiled(spoil: Callable[[DiagonalEstimate, Objective, int | None], DiagonalEstimate], size: float = NOISE) -> Noisy:
    """The sound estimator, with something done to what it returns."""

    def estimate(self: Noisy, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        return spoil(Noisy.estimate(self, objective, seed=seed), objective, seed)

    return dataclass(frozen=True)(type("Spoiled", (Noisy,), {"estimate": estimate}))(size)


def scaled(found: DiagonalEstimate, factor: float) -> DiagonalEstimate:
    return replace(found, values={name: value * factor for name, value in found.values.items()})


def mapped(function: Callable[[Tensor], Tensor]) -> Noisy:
    return spoiled(lambda found, *_: replace(found, values={k: function(v) for k, v in found.values.items()}))


def said(**changes: Any) -> Noisy:
    return spoiled(lambda found, *_: replace(found, **changes))


KEPT: list[DiagonalEstimate] = []


def reused(found: DiagonalEstimate, objective: Objective, seed: int | None) -> DiagonalEstimate:
    """Write into the tensors of the first estimate."""
    if not KEPT:
        KEPT.append(found)
    for name, value in found.values.items():
        KEPT[0].values[name].copy_(value)
    return replace(found, values=KEPT[0].values)


def counting() -> Noisy:
    calls: list[int] = []

    def spoil(found: DiagonalEstimate, objective: Objective, seed: int | None) -> DiagonalEstimate:
        calls.append(1)
        return scaled(found, 1.0 + 1e-9 * len(calls))

    return spoiled(spoil)


def of_global_state(found: DiagonalEstimate, objective: Objective, seed: int | None) -> DiagonalEstimate:
    """Random numbers of the global state, which is put back."""
    with torch.random.fork_rng(devices=[]):
        return scaled(found, 1.0 + 1e-6 * torch.rand(()).item())


def fixed(found: DiagonalEstimate, objective: Objective, seed: int | None) -> DiagonalEstimate:
    return replace(found, values=Noisy().estimate(objective, seed=0).values)


def unseeded(found: DiagonalEstimate, objective: Objective, seed: int | None) -> DiagonalEstimate:
    return replace(found, seed=7) if seed is None else found


def first_batch(found: DiagonalEstimate, objective: Objective, seed: int | None) -> DiagonalEstimate:
    part = objective.with_batches(objective.batches[:1])
    return replace(found, values=Noisy().estimate(part, seed=found.seed).values)


def of_scaled_loss(found: DiagonalEstimate, objective: Objective, seed: int | None) -> DiagonalEstimate:
    return scaled(found, 3.0 if objective.loss.name != "cross_entropy" else 1.0)


def of_sum(found: DiagonalEstimate, objective: Objective, seed: int | None) -> DiagonalEstimate:
    return scaled(found, 2.0 if objective.loss.reduction == "sum" else 1.0)


def of_few(found: DiagonalEstimate, objective: Objective, seed: int | None) -> DiagonalEstimate:
    return scaled(found, 1.0 if "linear0.weight" in objective.parameters.names else 2.0)


def all_parameters(found: DiagonalEstimate, objective: Objective, seed: int | None) -> DiagonalEstimate:
    ones = {
        name: torch.ones_like(p.detach(), dtype=objective.raised().dtype)
        for name, p in objective.model.named_parameters()
    }
    return replace(found, values=ones, stderr=None, matrix="ggn")


def half_precision(found: DiagonalEstimate, objective: Objective, seed: int | None) -> DiagonalEstimate:
    return replace(found, values={k: v.to(objective.dtype) for k, v in found.values.items()})


def errors(factor: float) -> Noisy:
    return spoiled(lambda f, *_: replace(f, stderr={k: v * factor for k, v in (f.stderr or {}).items()}))


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "no estimate at all": (lambda: spoiled(lambda found, *_: found.values), "'an estimate' .*returned a dict"),  # pyright: ignore
    "a name is missing": (
        lambda: spoiled(lambda f, *_: replace(f, values=dict(list(f.values.items())[1:]))),
        "'values by name' does not hold: they are 'linear0.bias', 'linear1.weight', 'linear1.bias'; allowed: 'linear0.w",
    ),
    "another order": (
        lambda: spoiled(lambda f, *_: replace(f, values=dict(reversed(f.values.items())))),
        "'values by name' does not hold: they are 'linear1.bias', ",
    ),
    "another shape": (lambda: mapped(torch.flatten), "'linear0.weight' has shape .20.; allowed: shape .5, 4."),
    "another dtype": (lambda: mapped(Tensor.float), "'linear0.weight' has dtype torch.float32; allowed: dtype .*64"),
    "another device": (lambda: mapped(lambda v: v.to("meta")), "has device meta; allowed: device cpu"),
    "a graph": (lambda: mapped(lambda v: v.requires_grad_()), "has requires_grad True; allowed: requires_grad False"),
    "not finite": (lambda: mapped(lambda v: v / 0.0), "'finite' does not hold: the value of 'linear0.weight' has NaN"),
    "errors of another dtype": (
        lambda: spoiled(lambda f, *_: replace(f, stderr={k: v.float() for k, v in (f.stderr or {}).items()})),
        "'stderr have shape, dtype and device' does not hold",
    ),
    "negative errors": (lambda: errors(-1.0), "'standard errors' .*'linear0.weight' has negative or infinite entries"),
    "a sentence for a matrix": (
        lambda: said(matrix="The Hessian"),
        "matrix is 'The Hessian'; allowed: a word of small",
    ),
    "another matrix": (lambda: said(matrix="hessian"), "the estimate says 'hessian', its estimator 'ggn'"),
    "another estimator": (lambda: said(estimator="Noisy"), "estimator is 'Noisy'; allowed: 'Spoiled.size=0.001.'"),
    "no cost": (lambda: said(cost=Cost(0.0, 1.0)), "'the cost is positive' does not hold: it is Cost.gradients=0.0"),
    "no time": (lambda: said(cost=Cost(1.0, 0.0)), "'the cost is positive' .*; allowed: gradients and seconds above 0"),
    "no memory": (lambda: said(cost=Cost(1.0, 1.0, peak_bytes=0)), "peak_bytes is 0; allowed: above 0, or None"),
    "not repeatable": (counting, "'same seed, same bits' does not hold: two estimates with seed=0 differ"),
    "global random state": (lambda: spoiled(of_global_state), "'same seed, same bits' does not hold"),
    "results overwritten": (lambda: spoiled(reused), "'results are kept' does not hold: a later estimate overwrote"),
    "no seed": (lambda: said(seed=None), "'the seed is recorded' .* there are standard errors, and seed is None"),
    "another seed": (lambda: said(seed=4), "seed=0 was given, the estimate says 4; allowed: 0"),
    "always the same": (lambda: spoiled(fixed), "'new seed, new bits' does not hold: standard errors are given, but 8"),
    "drawn seed not said": (lambda: spoiled(unseeded), "'a drawn seed is recorded' .*: seed=None gave seed 7, which"),
    "the dtype of half precision": (
        lambda: spoiled(half_precision),
        "has dtype torch.bfloat16; allowed: dtype .*float32",
    ),
    "depends on the others": (
        lambda: spoiled(of_few),
        "'the others keep theirs' .* entry .* of '.*, with parameters left",
    ),
    "frozen parameters": (
        lambda: spoiled(all_parameters),
        "'values by name' .* they are 'linear0.weight', .*; allowed: 'l",
    ),
    "errors too small": (lambda: errors(0.4), "'standard errors are the spread over seeds' .*; allowed: a factor of 2"),
    "errors too large": (lambda: errors(2.5), "'standard errors are the spread over seeds' does not hold: the root of"),
    "batches": (lambda: spoiled(first_batch), "'uneven batches give the same' .* cut into parts "),
    "the scale of the loss": (
        lambda: spoiled(of_scaled_loss),
        "'c times the loss gives c times the diagonal' .*of 3 times",
    ),
    "the sum": (lambda: spoiled(of_sum), "'a sum over W terms is W times the mean' .*as a sum, divided by W, "),
    "the truth": (lambda: mapped(lambda v: v * 1.5), "'the mean is the truth' does not hold: .* computed densely "),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str):
    make, message = FAULTS[name]
    KEPT.clear()
    with pytest.raises(InvalidArgument, match=f"check_estimator: .*{message}"):
        check_estimator(make())


def test_a_bias_in_the_sum_alone_is_found():
    """Small against the noise of each coordinate, large against that of their sum."""
    biased = spoiled(lambda f, *_: replace(f, values={k: v + 0.45 * NOISE for k, v in f.values.items()}))
    with pytest.raises(InvalidArgument, match="the sum of all entries is "):
        check_estimator(biased)


@dataclass
class Thawed:
    """Not frozen."""

    size: float = NOISE
    estimate = Noisy.estimate


class Plain:
    """No dataclass."""


@dataclass(frozen=True)
class Idle:
    """No estimate."""


@dataclass(frozen=True)
class Unwritten(Noisy):
    """An option that repr does not show."""

    hidden: int = field(default=2, repr=False)


@dataclass(frozen=True)
class Wordy(Noisy):
    """A repr that is no Python."""

    def __repr__(self) -> str:
        return "<Wordy>"


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (Plain(), "'options are frozen' does not hold: Plain is no frozen dataclass; allowed: @dataclass.frozen=True."),
        (Thawed(), "'options are frozen' does not hold: Thawed is no frozen dataclass"),
        (Idle(), "'an estimator' does not hold: Idle has no method estimate"),
        (Unwritten(hidden=3), "'repr is Python' .* evaluating Unwritten.size=0.001. gives Unwritten"),
        (Wordy(), "'repr is Python' .*: evaluating <Wordy> raised SyntaxError"),
    ],
)
def test_options_that_are_no_options_are_found(estimator: Any, message: str):
    with pytest.raises(InvalidArgument, match=message):
        check_estimator(estimator)


def test_a_wrong_seed_of_the_check_is_refused():
    with pytest.raises(InvalidArgument, match="seed=-1 must be an integer"):
        check_estimator(Noisy(), seed=-1)


def write_grad(model: torch.nn.Module) -> None:
    first = next(model.parameters())
    first.grad = torch.zeros_like(first)


DISTURBANCES: dict[str, tuple[Callable[[torch.nn.Module], object], str]] = {
    ".grad": (write_grad, ".grad of 'linear0.weight'"),
    "mode": (lambda model: model.eval(), "the mode of 'the model'"),
    "buffer": (lambda model: model.count.add_(1), "the buffer 'count'"),
    "parameter": (lambda model: torch.nn.init.zeros_(model.linear0.bias), "the parameter 'linear0.bias'"),
    "hook": (lambda model: model.register_forward_hook(lambda *_: None), "hooks of 'the model'"),
    "requires_grad": (lambda model: model.linear1.bias.requires_grad_(False), "requires_grad of 'linear1.bias'"),
    "random state": (lambda model: torch.rand(1), "torch's random state"),
}


@pytest.mark.parametrize("name", DISTURBANCES)
def test_a_disturbance_is_found(name: str):
    what, message = DISTURBANCES[name]

    def spoil(found: DiagonalEstimate, objective: Objective, seed: int | None) -> DiagonalEstimate:
        what(objective.model)
        return found

    state = torch.get_rng_state()
    try:
        with pytest.raises(InvalidArgument, match=f"'nothing is disturbed' .*: an estimate changed: .*{message}"):
            check_estimator(spoiled(spoil))
    finally:
        torch.set_rng_state(state)


def test_a_mess_after_an_error_is_found():
    def estimate(self: Noisy, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        objective.model.train(not objective.model.training)
        found = Noisy.estimate(self, objective, seed=seed)
        objective.model.train(not objective.model.training)
        return found

    untidy = dataclass(frozen=True)(type("Untidy", (Noisy,), {"estimate": estimate}))()
    with pytest.raises(InvalidArgument, match="an estimate whose forward pass raised changed: the mode of 'the model'"):
        check_estimator(untidy)


# ---- on a step of training ------------------------------------------------------------------------------------------


class Watching:
    """A context around a forward pass, which may do something to it."""

    def __init__(self, model: torch.nn.Module, hook: Callable[..., Any] | None = None, *, tidy: bool = True) -> None:
        self.model, self.hook, self.tidy = model, hook, tidy

    def __enter__(self) -> None:
        self.handle = self.model.register_forward_hook(self.hook or (lambda *_: None))

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if self.tidy or kind is None:
            self.handle.remove()


@dataclass(frozen=True)
class Training(Noisy):
    """The sound estimator on a step of training."""

    def recording(self, model: torch.nn.Module, *, parameters: Any = None) -> Watching:
        return Watching(model)

    def from_recording(
        self, recording: Watching, outputs: Tensor, targets: Any = None, *, loss: Any = None, seed: int | None = None
    ) -> DiagonalEstimate:
        named = dict(recording.model.named_parameters())
        diagonals = jacobian_diagonals(outputs, list(named.values()))
        exact = {k: d.view_as(p) / len(outputs) for (k, p), d in zip(named.items(), diagonals, strict=True)}
        return self.noisy(exact, seeds.settle(seed))


def step(**methods: Any) -> Training:
    return dataclass(frozen=True)(type("Spoiled", (Training,), methods))()


def recorded(hook: Callable[..., Any] | None = None, *, tidy: bool = True) -> Training:
    return step(recording=lambda self, model, parameters=None: Watching(model, hook, tidy=tidy))


def after(spoil: Callable[[DiagonalEstimate, Watching, Tensor], DiagonalEstimate]) -> Training:
    def from_recording(self: Training, recording: Watching, outputs: Tensor, *rest: Any, **options: Any) -> Any:
        return spoil(Training.from_recording(self, recording, outputs, *rest, **options), recording, outputs)

    return step(from_recording=from_recording)


def consumed(found: DiagonalEstimate, recording: Watching, outputs: Tensor) -> DiagonalEstimate:
    torch.autograd.grad(outputs.sum(), next(recording.model.parameters()))
    return found


def grads(found: DiagonalEstimate, recording: Watching, outputs: Tensor) -> DiagonalEstimate:
    write_grad(recording.model)
    return found


def unrepeatable() -> Training:
    calls: list[int] = []

    def spoil(found: DiagonalEstimate, recording: Watching, outputs: Tensor) -> DiagonalEstimate:
        calls.append(1)
        return scaled(found, 1.0 + 1e-9 * len(calls))

    return after(spoil)


def steeper(module: Any, inputs: Any, z: Tensor) -> Tensor:
    return z.detach() + 2.0 * (z - z.detach())


TRAINING: dict[str, tuple[Callable[[], Training], str]] = {
    "another mean": (lambda: after(lambda f, *_: scaled(f, 1.5)), "'training gives the same' .*from a recorded step "),
    "a name is missing": (
        lambda: after(lambda f, *_: replace(f, values=dict(list(f.values.items())[1:]))),
        "'values by name' does not hold",
    ),
    "not repeatable": (unrepeatable, "two recorded steps with seed=0 differ"),
    "other outputs": (lambda: recorded(lambda m, i, z: 2.0 * z), "'training goes on' .* the outputs of the recorded"),
    "other gradients": (lambda: recorded(steeper), "the gradient of 'linear0.weight' after the estimate is another"),
    "no graph": (lambda: after(consumed), "the backward pass after the estimate raised RuntimeError"),
    ".grad": (lambda: after(grads), "a recorded step of training changed: .grad of 'linear0.weight'"),
    "a hook that stays": (
        lambda: recorded(tidy=False),
        "a recorded step whose forward pass raised changed: hooks of 'the",
    ),
}


def test_a_sound_estimator_passes_in_training_and_may_refuse_it():
    def refuse(self: Training, *rest: Any, **options: Any) -> Any:
        raise InvalidArgument("not with these options")

    check_estimator(Training())
    check_estimator(step(from_recording=refuse))


@pytest.mark.parametrize("name", TRAINING)
def test_a_fault_in_training_is_found(name: str):
    make, message = TRAINING[name]
    with pytest.raises(InvalidArgument, match=f"check_estimator: .*{message}"):
        check_estimator(make())


@pytest.mark.parametrize("stderr", [0.0, float("nan")])
def test_an_estimator_that_is_exact_here_may_ignore_its_seed(stderr: float):
    """Its standard errors are 0, or unknown where the truth decides."""

    def estimate(self: Noisy, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        found = self.noisy(ggn_diagonal(objective.raised()), seeds.settle(seed))
        errors = {name: torch.full_like(value, stderr) for name, value in found.values.items()}
        return replace(found, stderr=errors)

    check_estimator(dataclass(frozen=True)(type("Lucky", (Noisy,), {"estimate": estimate}))(size=0.0))


@dataclass(frozen=True)
class NoisyFactor:
    """Hutchinson's probes times a factor: small beside the errors of single entries."""

    factor: float = 1.0
    num_probes: int = 6

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        found = Hutchinson(self.num_probes).estimate(objective, seed=seed)
        assert found.stderr is not None
        values = {name: self.factor * value for name, value in found.values.items()}
        errors = {name: self.factor * value for name, value in found.stderr.items()}
        return replace(found, values=values, stderr=errors, sums=None, estimator=repr(self))


def test_a_factor_that_is_small_beside_the_errors_of_entries():
    check_estimator(NoisyFactor())
    with pytest.raises(InvalidArgument, match=r"'the mean is the truth' does not hold: .* times that"):
        check_estimator(NoisyFactor(1.2))
