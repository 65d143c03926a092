"""What a Hessian refuses: changed points, numbers that are not finite, losses without curvature, and noise; each by its text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, ENGINES, X, Y
from oracles import classes, cut, dense, normal, relative, seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvkit.errors import CurvkitError, InvalidArgument, UnknownObjective, UnsupportedModel
from curvkit.losses import BatchLoss
from curvkit.models import MLP
from curvkit.objectives import Objective
from curvkit.operators import GGN, DifferenceHessian, Hessian, Preconditioned
from curvkit.operators.point import Point


def small(**options: Any) -> Hessian:
    return Hessian(CASES["mlp"]().objective(), **options)


def test_what_is_no_vector_is_refused_as_it_was_given():
    H = small()
    with pytest.raises(InvalidArgument, match="Hessian: a list was given; this operator takes"):
        H.matvec([0.0] * H.n)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="Hessian: a list was given; this operator takes"):
        H.matmat([[0.0]] * H.n)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=rf"a vector of shape \({H.n},\), torch.float32 on cpu was given"):
        H.matvec(torch.zeros(H.n))
    with pytest.raises(InvalidArgument, match="Preconditioned: diagonal=list is no tensor"):
        Preconditioned(H, [1.0] * H.n)  # type: ignore[arg-type]


def test_a_wrong_vector_is_refused():
    H = small()
    for wrong in (
        torch.zeros(H.n + 1).double(),
        torch.zeros(H.n),
        torch.zeros(H.n, 1).double(),
        torch.zeros(()).double(),
    ):
        with pytest.raises(
            InvalidArgument, match=rf"this operator takes \[{H.n}\], or \[{H.n}, k\] in matmat, torch.float64 on cpu"
        ):
            H.matvec(wrong)
    with pytest.raises(InvalidArgument, match=r"a vector of shape \(3, 2\), torch.float64 on meta was given"):
        H.matmat(torch.zeros(3, 2, dtype=torch.float64, device="meta"))
    with pytest.raises(InvalidArgument, match="was given; this operator takes"):
        H.batch_quotients(torch.zeros(H.n + 1).double())


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def through_data(model: nn.Module) -> None:
    model.linear1.weight.data.add_(1e-3)


def signs(model: nn.Module) -> None:
    model.linear1.weight.data.neg_()


def permuted(model: nn.Module) -> None:
    w = model.linear1.weight
    w.data = w.data[[1, 0, 2, 3, 4]]


def permuted_in_place(model: nn.Module) -> None:
    model.linear1.weight.data[[0, 1]] = model.linear1.weight.data[[1, 0]]


def storage(model: nn.Module) -> None:
    model.linear1.weight.data = torch.zeros_like(model.linear1.weight)


def replaced(model: nn.Module) -> None:
    model.linear1.weight = nn.Parameter(model.linear1.weight.detach() + 1)


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


@pytest.mark.parametrize("residency", ["retained", "streamed"])
@pytest.mark.parametrize("change", [step, through_data, signs, permuted, permuted_in_place, storage, replaced, loaded])
def test_changed_parameters_are_noticed(change: Callable[[nn.Module], None], residency: str):
    """Products of two points must not be mixed; a retained graph belongs to the point where it was built."""
    H = small(residency=residency)
    v = normal(H.n)
    H.matvec(v)
    change(H.objective.model)
    for use in (lambda: H.matvec(v), lambda: H.matmat(v[:, None]), lambda: H.batch_quotients(v)):
        with pytest.raises(
            InvalidArgument,
            match=r"the parameter 'linear\d.\w+' has changed since this operator was made.*Make a new Hessian",
        ):
            use()


@pytest.mark.parametrize("residency", ["retained", "streamed"])
def test_changed_parameters_outside_the_space_are_noticed(residency: str):
    """Frozen parameters and those that the patterns leave out belong to the point, too; so do buffers."""
    for change in ("excluded", "frozen", "buffer"):
        made = CASES["cnn, batch norm"]()
        made.model.head.bias.requires_grad_(False)
        H = Hessian(Objective(made.model, made.loss, made.data, "*.weight"), residency=residency)
        with torch.no_grad():
            {"excluded": made.model.last.bias, "frozen": made.model.head.bias, "buffer": made.model.norm.running_mean}[
                change
            ].add_(1.0)
        with pytest.raises(InvalidArgument, match="has changed since this operator was made"):
            H.matvec(normal(H.n))


@pytest.mark.parametrize("residency", ["retained", "streamed"])
def test_a_replaced_or_added_module_is_noticed(residency: str):
    """The old module's parameters stay as they were; the model does not use them any more."""
    for name, change in {
        "linear1": lambda model: setattr(model.linear1, "extra", nn.Linear(1, 1)),
        "": lambda model: setattr(model, "linear1", nn.Linear(3, 5)),
    }.items():
        H = small(residency=residency)
        change(H.objective.model)
        with pytest.raises(InvalidArgument, match=f"the module '{name}' has changed since"):
            H.matvec(normal(H.n))


def test_a_change_of_odd_bytes_is_noticed():
    """What is compared are words of eight bytes; buffers of booleans fill them in part, and windows do not start at them."""
    with seeded():
        model = nn.Linear(3, 1)
    for size in (1, 3, 8, 13, 40_000):
        model.register_buffer("flags", torch.zeros(size, dtype=torch.bool))
        for place in {0, size // 2 if size < 100 else 1, size - 1}:
            point = Point(model)
            assert point.changed() is None
            model.flags[place] = True
            assert point.changed() == "buffer 'flags'"


def test_a_window_belongs_to_its_tensor_in_every_layout():
    """Views, transposed and channels-last memory: the bytes between the first and the last element."""
    model = nn.Module()
    model.whole = nn.Parameter(torch.zeros(20, 30).T)
    model.part = nn.Parameter(torch.zeros(100)[10:40:3])
    model.image = nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    for name, parameter in model.named_parameters():
        for where in ((0,) * parameter.ndim, tuple(size - 1 for size in parameter.shape)):
            point = Point(model)
            assert point.changed() is None
            parameter.data[where] += 1.0
            assert point.changed() == f"parameter {name!r}"


def test_the_number_of_threads_is_no_change():
    """Sums over parameters round differently with another number of threads."""
    with seeded():
        model = nn.Linear(1000, 200)
    H = Hessian(
        Objective(model, F.mse_loss, [(normal(2, 1000, dtype=torch.float32), normal(2, 200, dtype=torch.float32))])
    )
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert H.matvec(torch.ones(H.n)).isfinite().all()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("residency", ["retained", "streamed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, residency: str):
    made = CASES["mlp"]()
    with torch.no_grad():
        made.model.linear1.weight[2, 1] = value
    with pytest.raises(
        CurvkitError, match="the parameter 'linear1.weight' has NaN or infinite entries.*Take an earlier one"
    ):
        Hessian(made.objective(), residency=residency)


def test_unused_weights_that_are_not_finite_are_named():
    made = CASES["a used parameter in one batch only"]()
    with torch.no_grad():
        made.model.experts[2].bias[0] = float("nan")
    with pytest.raises(CurvkitError, match="the parameter 'experts.2.bias' has NaN or infinite entries"):
        Hessian(made.objective())


def test_a_buffer_that_is_not_finite_is_named():
    made = CASES["cnn, batch norm"]()
    made.model.plain.running_var[1] = float("nan")
    with pytest.raises(CurvkitError, match="the buffer 'plain.running_var' has NaN or infinite entries"):
        Hessian(made.objective())


@pytest.mark.parametrize("residency", ["retained", "streamed"])
def test_a_batch_that_is_not_finite_is_named(residency: str):
    made = CASES["mlp"]()
    x = X.clone()
    x[5, 0] = float("nan")
    with pytest.raises(
        CurvkitError, match="the loss of batch 1 is nan though all parameters are finite. Check this batch"
    ):
        Hessian(Objective(made.model, made.loss, cut([4, 4, 1], x, Y)), residency=residency)


@pytest.mark.parametrize("loss", [lambda o, t: F.cross_entropy(o, t, reduction="none"), lambda o, t: o])
def test_a_loss_that_is_not_a_scalar_is_refused(loss: Any):
    made = CASES["mlp"]()
    with pytest.raises(UnknownObjective, match=r"it must return a scalar, or a pair \(sum, count\)"):
        Hessian(Objective(made.model, loss, [(X, Y)]))


def test_a_loss_of_another_model_is_refused():
    other = CASES["mlp"]().model
    loss = BatchLoss(lambda model, batch: F.cross_entropy(other(batch[0]), batch[1]))
    with pytest.raises(
        UnknownObjective, match="the loss does not depend on any of the parameters.*not one from an outer scope"
    ):
        Hessian(Objective(CASES["mlp"]().model, loss, [(X, Y)]))


def test_a_detached_loss_is_refused():
    loss = BatchLoss(lambda model, batch: F.cross_entropy(model(batch[0]).detach(), batch[1]))
    with pytest.raises(UnknownObjective, match="nothing in it detaches or disables gradients"):
        Hessian(Objective(CASES["mlp"]().model, loss, [(X, Y)]))


@pytest.mark.parametrize(
    ("layer", "loss", "operation"),
    [
        (lambda: nn.EmbeddingBag(9, 3), F.cross_entropy, "embedding_bag"),
        (
            lambda: nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(12, 3)),
            nn.MultiMarginLoss(),
            "multi_margin_loss",
        ),
    ],
)
def test_an_operation_without_second_derivative_is_named(layer: Callable[[], nn.Module], loss: Any, operation: str):
    objective = Objective(layer(), loss, [(classes(6, 4, num=9), classes(6, num=3))])
    said = f"has no second derivative of {operation}, which the model or the loss uses. Replace that operation"
    with pytest.raises(UnsupportedModel, match=said):
        Hessian(objective).matvec(torch.ones(objective.parameters.n))


def test_functional_dropout_is_found_by_its_effect():
    """There is no module to name; the same batch gives two losses."""

    class Careless(MLP):
        def forward(self, input: Tensor) -> Tensor:
            return F.dropout(super().forward(input), 0.5, training=True)

    for loss in (F.cross_entropy, lambda o, t: F.cross_entropy(o, t)):
        objective = Objective(Careless([4, 5, 3]).double().eval(), loss, [(X, Y)])
        with pytest.raises(
            UnsupportedModel, match=r"the loss of batch 0 differs from one evaluation to the next.*model.eval\(\)"
        ):
            Hessian(objective)


def test_little_noise_is_found_too():
    """On the CPU the same function gives the same bits, so that any difference is noise."""

    class Hazy(MLP):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input)
            return y + 1e-4 * torch.randn_like(y)

    with seeded():
        model = Hazy([4, 5, 3])
    with pytest.raises(UnsupportedModel, match="differs from one evaluation to the next"):
        Hessian(Objective(model, F.cross_entropy, cut([5, 4], X.float(), Y)))


def test_noise_in_a_later_batch_is_found_by_streaming():
    class Late(MLP):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input)
            return y + torch.randn_like(y) if len(input) == 4 else y

    with seeded():
        model = Late([4, 5, 3]).double()
    H = Hessian(Objective(model, F.cross_entropy, cut([5, 4], X, Y)), residency="streamed")
    with (
        seeded(1),
        pytest.raises(UnsupportedModel, match="the loss of batch 1 differs from one evaluation to the next"),
    ):
        H.matvec(normal(H.n))


def test_a_model_that_keeps_state_is_found():
    class Counter(MLP):
        calls = 0.0

        def forward(self, input: Tensor) -> Tensor:
            self.calls += 0.1
            return super().forward(input) * (1 + self.calls)

    with pytest.raises(UnsupportedModel, match="the model or the loss is random, or keeps state"):
        Hessian(Objective(Counter([4, 5, 3]).double(), F.cross_entropy, [(X, Y)]))


@pytest.mark.parametrize("make", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_caller_s_modes_do_not_matter(make: Callable[[], Any], engine: str):
    """Law: the same bits under no_grad, inference mode and autocast as without."""
    objective = CASES["mlp"]().objective()
    outside = Hessian(objective, **ENGINES[engine])
    v = normal(outside.n)
    expected = outside.matvec(v)
    with make():
        inside = Hessian(objective, **ENGINES[engine])
        got, mixed = inside.matvec(v), outside.matvec(v)
    assert torch.equal(got, expected)
    assert torch.equal(mixed, expected)
    assert torch.equal(inside.gradient, outside.gradient)


# ---- rows that are coupled ------------------------------------------------------------------------------------------


class Normalised(nn.Module):
    """BatchNorm that no module shows."""

    def __init__(self, by_hand: bool, gate: float = 1.0) -> None:
        super().__init__()
        self.first, self.last, self.gate = nn.Linear(4, 5), nn.Linear(5, 3), nn.Parameter(torch.tensor(gate))
        self.by_hand = by_hand

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        by_hand = (h - h.mean(0)) / (h.var(0) + 1e-5).sqrt()
        normalised = by_hand if self.by_hand else F.batch_norm(h, None, None, training=True)
        return self.last(torch.tanh(h + self.gate * normalised))


@pytest.mark.parametrize("make", [Hessian, GGN, DifferenceHessian])
@pytest.mark.parametrize("gate", [1.0, 0.0])
@pytest.mark.parametrize("by_hand", [True, False])
def test_rows_coupled_in_several_batches_are_refused(by_hand: bool, gate: float, make: Any):
    """Also behind a gate that is zero, where the loss itself does not show it. One batch is measured, and said to be one."""
    with seeded():
        model = Normalised(by_hand, gate).double().eval()
    for loss in (F.cross_entropy, lambda o, t: (F.cross_entropy(o, t, reduction="sum"), len(t))):
        with pytest.raises(
            UnsupportedModel, match="rows of a batch are coupled.*cut into 2 batches.*pass all data as one batch"
        ):
            make(Objective(model, loss, cut([5, 4], X, Y)))
        one = make(Objective(model, loss, [(X, Y)]))
        assert any("belongs to this very batch" in note for note in one.notes)


def test_coupled_rows_of_one_batch_are_measured():
    """Oracle: dense autograd in float64."""
    with seeded():
        model = Normalised(True).double().eval()
    H = Hessian(Objective(model, F.cross_entropy, [(X, Y)]))
    truth = dense(model, lambda call: F.cross_entropy(call(X), Y)).hessian
    assert relative(H.matmat(torch.eye(H.n).double()), truth) <= 1e-12


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    one, other = (F.normalize(model(view), dim=1) for view in batch)
    return F.cross_entropy(one @ other.T, torch.arange(len(one)))


def test_a_loss_that_couples_rows_is_noted():
    made = CASES["mlp"]()
    H = Hessian(Objective(made.model, BatchLoss(contrastive), [(X, X + 0.1)]))
    assert any("a loss that compares rows" in note for note in H.notes)
    mean = Hessian(Objective(made.model, lambda o, t: F.cross_entropy(o, t), [(X, Y)]))
    assert not mean.notes


def test_rows_that_are_parts_of_an_example_are_no_coupled_examples():
    """Steps of time in dimension 0: each batch is a sequence, and may be one of several; a note says that they belong together."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.over, self.head = nn.GRU(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.over(x)[0])

    with seeded():
        model = Steps().double().eval()
    (note,) = Hessian(Objective(model, F.cross_entropy, cut([5, 4], X, Y))).notes
    assert note.startswith(
        "the rows of a batch belong together and in their order, as steps of time or nodes of a graph do"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_coupled_weakly_are_noted(dtype: torch.dtype):
    """A penalty on each batch of 3e-3 of its loss: the numbers differ from those of one batch, by as much as is said."""
    made = CASES["mlp"]()
    net, x = made.model.to(dtype), X.to(dtype)

    def penalised(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum") + 3e-3 * penalty, len(batch[1])

    (note,) = Hessian(Objective(net, BatchLoss(penalised), cut([5, 4], x, Y))).notes
    assert re.match(
        r"rows together have another gradient than the same rows apart, by 0.00\d of it: a small penalty on each", note
    )


@pytest.mark.parametrize("sizes", [[1] * 9, [2, 2, 5], [9]])
def test_independent_rows_are_left_alone(sizes: list[int]):
    made = CASES["mlp"]()
    assert not Hessian(Objective(made.model, F.cross_entropy, cut(sizes, X, Y))).notes


# ---- what torch says itself -----------------------------------------------------------------------------------------


def test_outputs_in_bfloat16_are_called_by_their_name():
    class Casting(MLP):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).bfloat16()

    with seeded():
        model = Casting([4, 5, 3])
    with pytest.raises(UnsupportedModel, match="the model returns bfloat16 though its parameters are float32") as error:
        Hessian(Objective(model, F.cross_entropy, [(normal(61, 4).float(), classes(61, num=3))]))
    assert "averages it in another way" not in str(error.value)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("make", [Hessian, DifferenceHessian])
def test_reentrant_checkpointing_is_explained_by_either_rule(make: Any):
    class Again(MLP):
        def forward(self, input: Tensor) -> Tensor:
            x = input + 0.0 * next(self.parameters()).sum()
            return checkpoint(super().forward, x, use_reentrant=True)  # type: ignore[no-any-return]

    with seeded():
        model = Again([4, 5, 3])
    with pytest.raises(UnsupportedModel, match="use_reentrant=True.*neither for products nor for differences"):
        make(Objective(model, F.cross_entropy, [(X.float(), Y)]))


def test_a_cast_to_a_fixed_dtype_in_a_model_of_two_precisions_is_explained():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3).half()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).half()).float()

    with pytest.raises(UnsupportedModel, match="does not run as a copy in torch.float32.*casts to a fixed dtype"):
        Hessian(Objective(Mixed(), F.cross_entropy, [(X.float(), Y)]))


def test_a_model_built_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = nn.Linear(4, 3)
    with pytest.raises(UnsupportedModel, match=r"built inside torch.inference_mode\(\)"):
        Objective(model, F.cross_entropy, [(X.float(), Y)])
