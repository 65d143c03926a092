"""The second moment of an optimizer as a diagonal: against its recursion written out, and against what it is the mean of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import bits, normal, seeded
from torch import Tensor, nn

from curvkit import Objective
from curvkit.checkpoints import read, save
from curvkit.checkpoints.optimizer_state import OptimizerState as StoredState
from curvkit.checkpoints.optimizer_state import Unassigned, optimizer_state
from curvkit.errors import CurvkitError, InvalidArgument, UnsupportedModel
from curvkit.estimators import OptimizerState
from curvkit.estimators.optimizer_state_moments import decay_of, moment_of
from curvkit.measures.state_evidence import confirm

STEPS = 4


class Twins(nn.Module):
    """Two tensors of one shape, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def twins(dtype: torch.dtype = torch.float64) -> Objective:
    with seeded():
        model = Twins().to(dtype)
    x = normal(8, 3, dtype=dtype)
    return Objective(model, F.mse_loss, [(x, x.sum(1, keepdim=True))])


Make = Callable[[Any], torch.optim.Optimizer]


def trained(objective: Objective, make: Make) -> tuple[torch.optim.Optimizer, dict[str, list[Tensor]]]:
    """An optimizer after some steps with gradients that are drawn, and these gradients."""
    named = dict(objective.model.named_parameters())
    optimizer, drawn = make(named.values()), {name: list[Tensor]() for name in named}
    for step in range(STEPS):
        for index, (name, p) in enumerate(named.items()):
            p.grad = normal(*p.shape, seed=100 * step + index, dtype=p.dtype)
            drawn[name].append(p.grad.clone())
        optimizer.step()
    return optimizer, drawn


def running(beta: float) -> Callable[[list[Tensor]], Tensor]:
    """sum_i (1 - beta) beta^(t - i) g_i^2 / (1 - beta^t)."""

    def mean(drawn: list[Tensor]) -> Tensor:
        weights = [(1.0 - beta) * beta ** (len(drawn) - 1 - i) for i in range(len(drawn))]
        return sum(w * g.square() for w, g in zip(weights, drawn, strict=True)) / (1.0 - beta ** len(drawn))  # pyright: ignore

    return mean


def plain(drawn: list[Tensor]) -> Tensor:
    return torch.stack(drawn).square().mean(0)


optim = torch.optim
KNOWN: dict[str, tuple[Make, Callable[[list[Tensor]], Tensor]]] = {
    "Adam": (lambda ps: optim.Adam(ps, lr=1e-3), running(0.999)),
    "AdamW": (lambda ps: optim.AdamW(ps, betas=(0.9, 0.95), weight_decay=0.1), running(0.95)),
    "AdamW, amsgrad": (lambda ps: optim.AdamW(ps, amsgrad=True), running(0.999)),
    "AdamW, no memory": (lambda ps: optim.AdamW(ps, betas=(0.9, 0.0)), lambda drawn: drawn[-1].square()),
    "NAdam": (lambda ps: optim.NAdam(ps), running(0.999)),
    "RAdam": (lambda ps: optim.RAdam(ps), running(0.999)),
    "RMSprop": (lambda ps: optim.RMSprop(ps, alpha=0.9), running(0.9)),
    "RMSprop, centered": (lambda ps: optim.RMSprop(ps, centered=True, momentum=0.9), running(0.99)),
    "Adadelta": (lambda ps: optim.Adadelta(ps), running(0.9)),
    "Adagrad": (lambda ps: optim.Adagrad(ps), plain),
    "Adagrad, begun": (lambda ps: optim.Adagrad(ps, initial_accumulator_value=0.5), plain),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_mean_of_squares_is_that_of_the_recursion(name: str, tmp_path: Path):
    """Live and from a checkpoint, in float64: a few products, so 64 eps of the largest are generous."""
    make, mean = KNOWN[name]
    objective = twins()
    optimizer, drawn = trained(objective, make)
    live = OptimizerState().from_optimizer(optimizer, objective)
    saved = read(save(tmp_path / "ckpt.pt", model=objective.model, optimizer=optimizer))
    state = optimizer_state(saved, {n: p.shape for n, p in objective.model.named_parameters()})
    stored = OptimizerState().from_state(state, objective)
    for parameter, truth in ((key, mean(value)) for key, value in drawn.items()):
        assert (live.values[parameter] - truth).abs().max() <= 64 * torch.finfo(truth.dtype).eps * truth.abs().max()
        assert torch.equal(live.values[parameter], stored.values[parameter])
    assert (live.matrix, live.stderr, live.seed, live.cost.gradients) == ("second_moment", None, None, 0.0)
    assert live.notes[0].endswith(
        f"{name.partition(',')[0]}: a mean over the mini-batches of the run, not over this data"
    )
    assert live.notes == stored.notes


def test_it_is_the_mean_of_squared_gradients_of_mini_batches():
    """E g_B^2 = g^2 + Var_1 / B at fixed weights (lr = 0), in closed form for a linear model; within 5 standard errors."""
    B, T = 4, 1500
    with seeded():
        model = nn.Linear(3, 1, bias=False).double()
    x, y = normal(40, 3), normal(40, 1, seed=1)
    objective = Objective(model, F.mse_loss, [(x, y)])
    optimizer = optim.Adagrad(model.parameters(), lr=0.0)
    single = 2.0 * (x * (model(x) - y)).detach()  # gradients of single examples
    rows = torch.randint(40, (T, B), generator=torch.Generator().manual_seed(0))
    squares = []
    for row in rows:
        optimizer.zero_grad()
        F.mse_loss(model(x[row]), y[row]).backward()
        squares.append(next(model.parameters()).grad[0].square())  # pyright: ignore
        optimizer.step()
    found = OptimizerState().from_optimizer(optimizer, objective).values["weight"][0]
    truth = single.mean(0).square() + single.var(0, correction=0) / B
    error = torch.stack(squares).std(0) / T**0.5
    assert bool(((found - truth).abs() < 5 * error).all())
    assert bool((found - 5 * error > objective.gradient().square()).all())  # not the squared gradient of the data


def test_without_correction_it_is_as_the_optimizer_keeps_it():
    objective = twins()
    optimizer, _ = trained(objective, KNOWN["Adam"][0])
    found = OptimizerState(bias_correction=False).from_optimizer(optimizer, objective)
    for name, p in objective.model.named_parameters():
        assert torch.equal(found.values[name], optimizer.state[p]["exp_avg_sq"])
    assert found.estimator == "OptimizerState(bias_correction=False)"


def test_the_optimizer_is_left_as_it_is():
    objective = twins(torch.float32)
    optimizer, _ = trained(objective, KNOWN["AdamW"][0])
    before = copy.deepcopy(optimizer.state_dict())
    found = OptimizerState().from_optimizer(optimizer, objective)
    for value in found.values.values():
        value.zero_()
    for kept, was in zip(optimizer.state_dict()["state"].values(), before["state"].values(), strict=True):
        assert {key: bits(value) for key, value in kept.items()} == {key: bits(value) for key, value in was.items()}


def test_half_precision_is_given_in_float32():
    objective = twins(torch.bfloat16)
    optimizer, _ = trained(objective, KNOWN["AdamW"][0])
    values = OptimizerState().from_optimizer(optimizer, objective).values
    assert {value.dtype for value in values.values()} == {torch.float32}


def test_some_of_the_parameters():
    whole = twins()
    optimizer, _ = trained(whole, KNOWN["AdamW"][0])
    part = Objective(whole.model, F.mse_loss, whole.data, "b.*")  # pyright: ignore
    found, all_ = (OptimizerState(source=optimizer).estimate(it, seed=3) for it in (part, whole))
    assert tuple(found.values) == ("b.weight", "b.bias")
    assert torch.equal(found.values["b.bias"], all_.values["b.bias"])


def test_what_it_takes():
    objective = twins()
    optimizer, _ = trained(objective, KNOWN["AdamW"][0])
    estimator = OptimizerState().bound(optimizer)
    assert estimator == OptimizerState()
    assert repr(estimator) == "OptimizerState(bias_correction=True)"
    expected = estimator.expected(objective)
    assert (expected.gradients, estimator.estimate(objective).cost.peak_bytes) == (0.0, expected.peak_bytes(objective))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda ps: optim.AdamW(ps, amsgrad=True), "amsgrad: the optimizer divides by the running maximum of this"),
        (lambda ps: optim.Adam(ps, weight_decay=0.1), "the gradients that were squared have weight decay in them"),
        (lambda ps: optim.AdamW(ps, weight_decay=0.1), ""),
        (lambda ps: optim.NAdam(ps, weight_decay=0.1, decoupled_weight_decay=True), ""),
    ],
)
def test_notes(make: Make, said: str):
    objective = twins()
    found = OptimizerState().from_optimizer(trained(objective, make)[0], objective)
    assert (found.notes[1:] == ()) if not said else found.notes[1].startswith(said)


# ---- what is refused ------------------------------------------------------------------------------------------------


class Mine(optim.AdamW):
    """A subclass may mean another thing by the same names."""


REFUSED: dict[str, tuple[Make, str]] = {
    "SGD": (
        lambda ps: optim.SGD(ps, lr=0.1, momentum=0.9),
        "the optimizer is 'SGD': it keeps no second moment. Known are",
    ),
    "ASGD": (lambda ps: optim.ASGD(ps), "it keeps no second moment"),
    "Adamax": (lambda ps: optim.Adamax(ps), "a decayed maximum of .g., which is no mean of squares"),
    "Adafactor": (lambda ps: optim.Adafactor(ps), "means over rows and columns, not of each parameter"),
    "LBFGS": (lambda ps: optim.LBFGS(ps), "it keeps no second moment"),
    "Rprop": (lambda ps: optim.Rprop(ps), "it uses the signs of gradients only"),
    "SparseAdam": (lambda ps: optim.SparseAdam(ps), "its moments are of the rows that were used"),
    "a subclass": (
        lambda ps: Mine(ps),
        "Mine.*: it is no class of torch.optim whose state is known. Known are Adam, AdamW, ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_without_one_is_refused_by_name(name: str):
    make, said = REFUSED[name]
    objective = twins()
    with pytest.raises(UnsupportedModel, match=f"{said}.*Use Fisher or SquaredGradient"):
        OptimizerState().from_optimizer(make(list(objective.model.parameters())), objective)


def test_a_stored_state_without_one_is_refused(tmp_path: Path):
    objective = twins()
    optimizer, _ = trained(objective, REFUSED["SGD"][0])
    saved = read(save(tmp_path / "ckpt.pt", model=objective.model, optimizer=optimizer))
    state = optimizer_state(saved, {n: p.shape for n, p in objective.model.named_parameters()})
    with pytest.raises(UnsupportedModel, match="the optimizer is 'SGD': it keeps no second moment"):
        OptimizerState().from_state(state, objective)
    with pytest.raises(
        InvalidArgument, match="no second moment can be read: it was lost. Use Fisher or SquaredGradient"
    ):
        OptimizerState().from_state(Unassigned("it was lost"), objective)


def test_an_optimizer_of_another_model_is_refused():
    objective, other = twins(), twins()
    optimizer, _ = trained(other, KNOWN["AdamW"][0])
    with pytest.raises(
        InvalidArgument, match="none of the objective's parameters: it is of another model, or of another copy"
    ):
        OptimizerState().from_optimizer(optimizer, objective)


def test_parameters_that_are_not_trained_are_refused():
    objective = twins()
    optimizer = optim.AdamW(objective.model.a.parameters())  # pyright: ignore
    with pytest.raises(InvalidArgument, match="nothing of 'b.weight' and 2 more, which .* Leave it out by patterns"):
        OptimizerState().from_optimizer(optimizer, objective)
    only = Objective(objective.model, F.mse_loss, objective.data, "a.*")  # pyright: ignore
    with pytest.raises(
        UnsupportedModel, match="'a.weight' has no exp_avg_sq: the optimizer took no step with it. Take a"
    ):
        OptimizerState().from_optimizer(optimizer, only)


def test_parameters_that_a_checkpoint_has_not_are_refused(tmp_path: Path):
    objective = twins()
    optimizer = optim.AdamW(objective.model.parameters())
    objective.model.a(torch.ones(1, 3, dtype=torch.float64)).sum().backward()  # pyright: ignore
    optimizer.step()
    saved = read(save(tmp_path / "ckpt.pt", model=objective.model, optimizer=optimizer))
    state = optimizer_state(saved, {n: p.shape for n, p in objective.model.named_parameters()})
    with pytest.raises(InvalidArgument, match="nothing of 'b.weight' and 2 more"):
        OptimizerState().from_state(state, objective)


def test_names_that_rest_on_an_order_alone_are_refused_until_they_are_tested(tmp_path: Path):
    """Two tensors of one shape could be exchanged; the test on data is curvkit.measures.state_evidence."""
    objective = twins()
    optimizer, drawn = trained(objective, KNOWN["AdamW"][0])
    torch.save({"model": objective.model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    state = optimizer_state(read(tmp_path / "ckpt.pt"), {n: p.shape for n, p in objective.model.named_parameters()})
    assert isinstance(state, StoredState)
    assert not state.certain
    said = "rest on the order of the parameters alone .*confirm.state, objective. returns None, pass confirmed=True"
    for call in (OptimizerState().from_state, lambda state, of: OptimizerState(source=state).estimate(of)):
        with pytest.raises(InvalidArgument, match=said):
            call(state, objective)
    assert confirm(state, objective) is not None  # these gradients were drawn, and are none of this data
    found = OptimizerState().from_state(state, objective, confirmed=True)
    assert torch.allclose(found.values["b.weight"], KNOWN["AdamW"][1](drawn["b.weight"]), rtol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_entries_that_no_run_leaves_are_refused(value: float):
    objective = twins()
    optimizer, _ = trained(objective, KNOWN["AdamW"][0])
    optimizer.state[objective.tensors[2]]["exp_avg_sq"][0, 0] = value
    with pytest.raises(
        CurvkitError, match="exp_avg_sq of 'b.weight' has entries that are NaN, infinite or negative: .*Use an"
    ):
        OptimizerState().from_optimizer(optimizer, objective)


def test_a_part_of_a_state_is_refused():
    """Flat, as FSDP has it; and a DTensor, as its successor has it."""
    objective = twins()
    optimizer, _ = trained(objective, KNOWN["AdamW"][0])
    kept = optimizer.state[objective.tensors[0]]
    whole = kept["exp_avg_sq"]
    kept["exp_avg_sq"] = whole.flatten()
    said = (
        r"exp_avg_sq of 'a.weight', whose shape is \(3, 3\), has {}, as where several processes share it \(FSDP, ZeRO\)"
    )
    with pytest.raises(UnsupportedModel, match=said.format(r"the shape \(9,\)")):
        OptimizerState().from_optimizer(optimizer, objective)
    kept["exp_avg_sq"] = "lost"
    with pytest.raises(UnsupportedModel, match=said.format("the type str")):
        OptimizerState().from_optimizer(optimizer, objective)


def test_a_distributed_tensor_is_refused():
    from torch.distributed.tensor import DTensor, init_device_mesh

    objective = twins()
    optimizer, _ = trained(objective, KNOWN["AdamW"][0])
    kept = optimizer.state[objective.tensors[0]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        kept["exp_avg_sq"] = DTensor.from_local(kept["exp_avg_sq"], init_device_mesh("cpu", (1,)))
        with pytest.raises(
            UnsupportedModel, match="has a part of it: the state is sharded, as where several processes"
        ):
            OptimizerState().from_optimizer(optimizer, objective)
    finally:
        torch.distributed.destroy_process_group()


def test_a_mean_that_keeps_its_beginning_is_refused():
    objective = twins()
    optimizer, _ = trained(objective, lambda ps: optim.RMSprop(ps, alpha=1.0))
    with pytest.raises(
        UnsupportedModel, match="alpha=1 of 'a.weight' keeps the beginning for ever.*bias_correction=False"
    ):
        OptimizerState().from_optimizer(optimizer, objective)


def test_a_sum_as_it_is_kept_is_refused():
    objective = twins()
    optimizer, _ = trained(objective, KNOWN["Adagrad"][0])
    with pytest.raises(
        InvalidArgument, match="bias_correction=False, but Adagrad keeps a sum over all steps, which is no mean"
    ):
        OptimizerState(bias_correction=False).from_optimizer(optimizer, objective)


def test_a_decay_that_is_none_is_refused():
    with pytest.raises(
        InvalidArgument, match="a group of the optimizer has betas='0.9'; it must be a number, or two. Mend"
    ):
        decay_of({"betas": "0.9"}, moment_of("Adam"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: OptimizerState(bias_correction=1), "bias_correction=1 must be True or False. The default is True."),  # pyright: ignore
        (lambda: OptimizerState(source="ckpt.pt"), "source is a str; it must be an optimizer of torch, a state that"),  # pyright: ignore
        (
            lambda: OptimizerState().estimate(twins()),
            "estimate has no state to read. Call from_optimizer.optimizer, obj",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(make: Callable[[], Any], said: str):
    with pytest.raises(InvalidArgument, match=f"OptimizerState: {said}"):
        make()
