"""Exact diagonals against dense matrices in float64, by products and by structure, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import classes, cut, dense, fill_gradients, normal, seeded, surroundings
from test_estimators import CASES, LABELS, N, flat, hessian_diagonal
from test_ggn import dense_ggn
from torch import Tensor, nn

from curvkit import BatchLoss, Objective
from curvkit.errors import CurvkitError, InvalidArgument, UnsupportedModel
from curvkit.estimators import Exact, Fisher, unit_products
from curvkit.estimators.exact_ways import duration
from curvkit.estimators.expected import refuse_too_large
from curvkit.estimators.ggn_structure import GGNStructure, count_columns, predicted_gradients
from curvkit.measures import piecewise_linear
from curvkit.models import ResNet
from curvkit.operators import Hessian

EXACT = 1e-12
"""float64 rounding, 2.2e-16, of sums of some thousand terms."""


def error(found: Any, truth: Tensor) -> float:
    """Largest, relative to the largest entry."""
    return ((flat(found.values) - truth).abs().max() / truth.abs().max()).item()


def ggn_diagonal(name: str) -> Tensor:
    case = CASES[name]
    return dense_ggn(case.objective().model, case.loss, [(case.x, case.y)]).diagonal()


@pytest.mark.parametrize("name", CASES)
def test_ggn_is_that_of_the_dense_matrix(name: str):
    """Rung 2: J' H_out J of all the data at once, in two uneven batches here; ignored and padded targets among them."""
    objective, truth = CASES[name].objective((2, 4)), ggn_diagonal(name)
    fill_gradients(objective.model)
    before = surroundings(objective.model)
    for way in ("auto", "structure"):
        found = Exact("ggn", way=way).estimate(objective)  # pyright: ignore
        assert error(found, truth) <= EXACT
    assert surroundings(objective.model) == before
    assert (found.matrix, found.stderr, found.seed, found.samples, found.cost.products) == ("ggn", None, None, 0, 0)
    assert list(found.values) == list(objective.parameters.names)
    assert found.notes[0].startswith("by structure")
    assert found.cost.peak_bytes is not None


LARGE = ("convolutions", "convolutions in one dimension", "language", "tied")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in CASES]
)
def test_hessian_is_that_of_the_dense_matrix(name: str):
    """Rung 2."""
    objective = CASES[name].objective((2, 4))
    before = surroundings(objective.model)
    found = Exact("hessian").estimate(objective)
    assert error(found, hessian_diagonal(CASES[name])) <= EXACT
    assert surroundings(objective.model) == before
    n = objective.parameters.n
    assert (found.matrix, found.cost.products, found.notes[0]) == (
        "hessian",
        n,
        f"by products with the {n} unit vectors",
    )
    assert found.trace == pytest.approx(hessian_diagonal(CASES[name]).sum().item(), rel=EXACT)


def rectified() -> Objective:
    with seeded(3):
        model = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    return Objective(model, F.cross_entropy, cut((2, 4), normal(N, 5), LABELS))


def test_hessian_of_a_piecewise_linear_network_by_structure():
    """Rung 2, and the identity trace H = trace GGN."""
    objective = rectified()
    truth = dense(objective.model, lambda call: F.cross_entropy(call(normal(N, 5)), LABELS)).hessian.diagonal()
    found = Exact().estimate(objective)
    assert error(found, truth) <= EXACT
    assert "the network is piecewise linear, so that the diagonal of the Hessian is that of the GGN" in found.notes[0]
    assert (found.matrix, found.cost.products) == ("hessian", 0)
    assert found.trace == pytest.approx(Exact("ggn").estimate(objective).trace, rel=EXACT)
    assert error(Exact(way="products").estimate(objective), truth) <= EXACT


@pytest.mark.slow
def test_a_residual_network_by_structure():
    """Rung 2: shortcuts, strides and BatchNorm in evaluation mode."""
    with seeded(3):
        model = ResNet(depth=8, width=2, num_classes=3, in_channels=2).double().eval()
    x, y = normal(6, 2, 8, 8, seed=4), classes(6, num=3, seed=5)
    truth = dense(model, lambda call: F.cross_entropy(call(x), y)).hessian.diagonal()
    found = Exact(way="structure").estimate(Objective(model, F.cross_entropy, cut((2, 4), x, y)))
    assert error(found, truth) <= 1e-10  # normalised twice over, so that rounding is larger


def test_streamed_products_in_chunks(monkeypatch: pytest.MonkeyPatch):
    """Rung 2: 39 vectors, 16 at a time."""
    monkeypatch.setattr(unit_products, "MOST", 16)
    H = Hessian(CASES["mlp"].objective((2, 4)), residency="streamed")
    states = list(unit_products.steps(H))
    assert [state.done for state in states] == [16, 32, 39]
    truth = hessian_diagonal(CASES["mlp"])
    assert (states[-1].diagonal - truth).abs().max() <= EXACT * truth.abs().max()
    assert bool((states[0].diagonal[16:] == 0).all())


class Bounded(nn.Module):
    """A network that takes `most` rows at a time; with more, memory runs out."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        with seeded(0):
            self.a, self.b = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()
        self.most, self._act = 1 << 30, act

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return self.b(self._act(self.a(x)))


def test_chunks_are_halved_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch):
    """Rung 2; the operator cuts its batches, and what is multiplied at once is halved."""
    monkeypatch.setattr(unit_products, "MOST", 16)
    model, x = Bounded(torch.tanh), normal(N, 5)
    truth = dense(model, lambda call: F.cross_entropy(call(x), LABELS)).hessian.diagonal()
    H = Hessian(Objective(model, F.cross_entropy, [(x, LABELS)]), residency="streamed")
    model.most = 1
    states = list(unit_products.steps(H))
    assert [state.done for state in states] == [16, 24, 32, 39]
    assert (states[-1].diagonal - truth).abs().max() <= EXACT * truth.abs().max()
    assert H.plan.micro_batches == 6


def test_pieces_are_halved_where_memory_runs_out():
    model, x = Bounded(torch.relu), normal(N, 5)
    objective = Objective(model, F.cross_entropy, [(x, LABELS)])
    structure = GGNStructure.of(objective, "Exact")
    [piece] = structure.pieces(100)
    whole, weight = structure.sums(piece)
    model.most = 3
    parts, parts_weight = structure.sums(piece)
    assert (weight, parts_weight) == (6.0, 6.0)
    assert (flat(parts) - flat(whole)).abs().max() <= EXACT * flat(whole).abs().max()
    one = structure.pieces(1)[0]
    model.most = 0
    with pytest.raises(
        CurvkitError, match="Exact: out of memory with the graph of one example .OutOfMemoryError: CUDA"
    ):
        structure.sums(one)


class TimeFirst(nn.Module):
    """Layers on [T, N, C], whose rules cannot tell time from examples where N = T; of more than `most` rows memory runs out."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(0):
            self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()
        self.most = 1 << 30

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return self.b(torch.relu(self.a(x.transpose(0, 1)))).sum(0)


def time_first(number: int, steps: int) -> tuple[Objective, Tensor]:
    """An objective, and the diagonal of its GGN."""
    model, x, y = TimeFirst(), normal(number * steps, 3).view(number, steps, 3), classes(number, num=3, seed=2)
    return Objective(model, F.cross_entropy, [(x, y)]), dense_ggn(model, F.cross_entropy, [(x, y)]).diagonal()


@pytest.mark.parametrize(("number", "steps", "size"), [(8, 4, 8), (8, 4, 4), (8, 4, 3), (11, 5, 6), (8, 4, 1)])
def test_rules_are_checked_on_pieces(number: int, steps: int, size: int, monkeypatch: pytest.MonkeyPatch):
    """Rung 2: of 8 rows pieces of 4, which is T; of 11 the last one of 5, which is T."""
    monkeypatch.setattr("curvkit.estimators.exact_diagonal.rows_of_a_piece", lambda objective: size)
    objective, truth = time_first(number, steps)
    assert error(Exact("ggn", way="structure").estimate(objective), truth) <= EXACT


@pytest.mark.parametrize("most", [7, 4])
def test_rules_are_checked_on_halves(most: int):
    """Rung 2: of 8 rows halves of 4, which is T; memory runs out in the checks already, which look at what is run."""
    objective, truth = time_first(8, 4)
    objective.model.most = most  # pyright: ignore
    assert error(Exact("ggn", way="structure").estimate(objective), truth) <= EXACT


def test_rules_are_checked_on_pieces_of_a_trace(monkeypatch: pytest.MonkeyPatch):
    """Rung 2: a first piece of 4 rows, which is T."""
    monkeypatch.setattr(piecewise_linear, "FIRST", 4)
    objective, truth = time_first(8, 4)
    *_, (share, sums) = piecewise_linear.ggn_diagonal_sums(objective)
    assert share == 1.0
    lengths = [entry.numel for entry in objective.parameters.entries]
    assert sums.tolist() == pytest.approx([part.sum().item() for part in truth.split(lengths)], rel=EXACT)


class Centred(nn.Module):
    """The mean of the batch is taken off; of more than `most` rows memory runs out."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(0):
            self.a = nn.Linear(5, 3).double()
        self.most = 1 << 30

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return self.a(x - x.mean(0))


def test_coupled_rows_are_not_cut(monkeypatch: pytest.MonkeyPatch):
    """Pieces of one row show no coupling."""
    model = Centred()
    objective = Objective(model, F.cross_entropy, [(normal(N, 5), LABELS)])
    structure = GGNStructure.of(objective, "Exact")
    with pytest.raises(
        UnsupportedModel,
        match=r"Exact: a batch of 6 rows is to be cut into pieces for lack of memory, and its rows are not shown to be examples of their "
        r"own: something couples them, .* Use products",
    ):
        structure.pieces(1)
    [piece] = structure.pieces(N)
    model.most = 5
    with pytest.raises(UnsupportedModel, match=r"a batch of 6 rows is to be cut .*CUDA out of memory"):
        structure.sums(piece)
    model.most = 1 << 30
    monkeypatch.setattr("curvkit.estimators.exact_diagonal.rows_of_a_piece", lambda objective: 1)
    found = Exact("ggn").estimate(objective)
    assert found.notes[0].startswith("by products")
    assert error(found, dense_ggn(model, F.cross_entropy, [(normal(N, 5), LABELS)]).diagonal()) <= EXACT


def test_how_far_it_is():
    states = list(Exact(way="products").steps(rectified()))
    assert [state.share for state in states] == sorted(state.share for state in states)
    assert (states[0].detail, states[-2].detail) == ("1 of 183 products", "183 of 183 products")
    assert [state.estimate is None for state in states] == [*[True] * 183, False]
    pieces = list(Exact("ggn").steps(rectified()))
    assert [(state.share, state.detail) for state in pieces] == [
        (2 / 6, "2 of 6 examples"),
        (1.0, "6 of 6 examples"),
        (1.0, "done"),
    ]


def test_the_cheaper_way_is_taken():
    """77 columns for the sequences of the language models; three for the others."""
    assert count_columns(CASES["language"].objective()) == 77
    assert count_columns(CASES["convolutions"].objective()) == 3
    objective = CASES["language"].objective()
    assert predicted_gradients(objective) > 1.2 * objective.parameters.n
    found = Exact("ggn").estimate(objective)
    assert found.notes[0] == f"by products with the {objective.parameters.n} unit vectors"
    assert error(found, ggn_diagonal("language")) <= EXACT


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
@pytest.mark.parametrize("way", ["products", "structure"])
def test_what_is_expected(matrix: Any, way: Any):
    objective = rectified()
    expected = Exact(matrix, way=way).expected(objective)
    found = Exact(matrix, way=way).estimate(objective)
    assert found.cost.gradients == expected.gradients
    assert found.cost.peak_bytes == expected.peak_bytes(objective)
    if way == "products":
        assert expected.gradients == pytest.approx((2.0 if matrix == "hessian" else 1.2) * 183, abs=4.0)
    else:
        proof = 6.0 + 4 * (2.0 + 2.0) * 4 / 6  # two products for each of four tensors, on four of six examples
        assert expected.gradients == pytest.approx(3.0 + 3 * 0.3 + (proof if matrix == "hessian" else 0.0))


def test_half_precision_is_raised():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).bfloat16()
    found = Exact("ggn").estimate(Objective(model, F.cross_entropy, [(normal(N, 5).bfloat16(), LABELS)]))
    assert {value.dtype for value in found.values.values()} == {torch.float32}


# ---- the generic way where there is no structure --------------------------------------------------------------------


def without_a_factor() -> tuple[Objective, str]:
    model, x, y = CASES["mlp"].objective().model, normal(N, 5), normal(N, 3)
    return Objective(model, F.huber_loss, [(x, y)]), "no factor S of the output Hessian S S' of huber_loss is known"


def with_weights_of_elements() -> tuple[Objective, str]:
    model, x, y = CASES["mlp"].objective().model, normal(N, 5), classes(N, 3, num=2).double()
    loss = nn.BCEWithLogitsLoss(weight=torch.arange(1.0, N + 1).double()[:, None])
    return Objective(model, loss, [(x, y)]), "is not known to be a sum over the rows"


def coupled() -> tuple[Objective, str]:
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with seeded(0):
                self.a = nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x - x.mean(0))

    return Objective(Coupled(), F.cross_entropy, [(normal(N, 5), LABELS)]), "rows are no examples: something couples"


def with_a_negative_weight() -> tuple[Objective, str]:
    loss = nn.CrossEntropyLoss(weight=torch.ones(3).double().index_fill(0, LABELS[:1], -0.2))
    return Objective(CASES["mlp"].objective().model, loss, [(normal(N, 5), LABELS)]), "a weight of the loss is negative"


@pytest.mark.parametrize("make", [without_a_factor, with_weights_of_elements, coupled, with_a_negative_weight])
def test_products_serve_where_there_is_no_structure(make: Callable[[], tuple[Objective, str]]):
    """Rung 2; the notes say why."""
    objective, reason = make()
    [(x, y)] = objective.batches
    loss = lambda z, y: objective.loss.terms_of(z, y).total / objective.loss.terms_of(z, y).weight  # noqa: E731
    found = Exact("ggn").estimate(objective)
    assert error(found, dense_ggn(objective.model, loss, [(x, y)]).diagonal()) <= EXACT
    assert found.notes[0].startswith("by products")
    assert reason in found.notes[1]
    with pytest.raises(UnsupportedModel, match=reason):
        Exact("ggn", way="structure").estimate(objective)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_large_model_is_refused_before_it_begins():
    model = nn.Sequential(nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 10))
    objective = Objective(model, F.cross_entropy, [(torch.randn(4, 100), torch.arange(4))])
    with pytest.raises(
        UnsupportedModel,
        match=r"Exact: the diagonal of the Hessian of 21,210 parameters takes about 42,42\d gradients of the data by products, more than "
        r"max_gradients=20,000: about .* for each. Use ExampleHutchinson for an estimate with standard errors, leave parameters out by "
        r"patterns, take less data, or raise max_gradients. There is no structure that serves: Exact: the network is not shown to be "
        r"piecewise linear",
    ):
        Exact().estimate(objective)
    with pytest.raises(
        UnsupportedModel, match="by structure, more than max_gradients=5: .* Use Fisher, whose mean is the GGN"
    ):
        Exact("ggn", max_gradients=5).estimate(objective)
    assert Exact("ggn").expected(objective).gradients == pytest.approx(6.0)


def test_memory_is_looked_at_beforehand(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("curvkit.estimators.expected.free_memory", lambda device: 1000)
    for way in ("products", "structure"):
        with pytest.raises(
            UnsupportedModel, match="Exact: needs about .* are free on cpu. Use Fisher, leave parameters"
        ):
            Exact("ggn", way=way).estimate(rectified())  # pyright: ignore
    with pytest.raises(UnsupportedModel, match="a: needs about .* b"):
        refuse_too_large("a", rectified(), Exact("ggn").expected(rectified()), instead="b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrix": "fisher"}, "Exact: matrix='fisher' is not one of hessian, ggn. The default is 'hessian'"),
        ({"way": "fast"}, "Exact: way='fast' is not one of auto, products, structure. The default is 'auto'"),
        ({"max_gradients": 0}, "Exact: max_gradients=0 must be a number > 0"),
        ({"max_gradients": True}, "Exact: max_gradients=True must be a number > 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str):
    with pytest.raises(InvalidArgument, match=message):
        Exact(**options)


def test_structure_of_a_smooth_network():
    with pytest.raises(
        UnsupportedModel, match="Exact: the network is not shown to be piecewise linear in each parameter"
    ):
        Exact(way="structure").estimate(CASES["mlp"].objective())


def test_a_loss_that_hides_its_outputs_has_no_ggn():
    hidden = BatchLoss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    objective = Objective(CASES["mlp"].objective().model, hidden, [(normal(N, 5), LABELS)])
    with pytest.raises(CurvkitError, match="the GGN needs the model's outputs apart from the loss"):
        Exact("ggn").estimate(objective)
    assert error(Exact().estimate(objective), hessian_diagonal(CASES["mlp"])) <= EXACT


def test_outputs_that_do_not_count_examples():
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with seeded(0):
                self.a = nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).reshape(-1)

    objective = Objective(Turned(), F.mse_loss, [(normal(N, 5), normal(3 * N))])
    found = Exact("ggn").estimate(objective)
    assert found.notes[0].startswith("by products")
    assert "the tensors of a batch differ in dimension 0, so that its examples are not known" in found.notes[1]


def test_a_model_that_takes_whole_batches_only():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with seeded(0):
                self.a = nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.view(N, 5))

    found = Exact("ggn").estimate(Objective(Whole(), F.cross_entropy, [(normal(N, 5), LABELS)]))
    assert found.notes[0].startswith("by products")
    assert "the model does not run on the first 4 rows of a batch alone .RuntimeError: shape" in found.notes[1].replace(
        "(", "."
    )


def test_what_is_not_finite_is_refused():
    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).mul(0.0).abs().sqrt()

    objective = Objective(Rooted().double(), F.cross_entropy, [(normal(N, 5), LABELS)])
    for matrix in ("hessian", "ggn"):
        with pytest.raises(CurvkitError, match="NaN or infinite"):
            Exact(matrix).estimate(objective)  # pyright: ignore


def test_duration():
    assert [duration(s) for s in (0.002, 119.0, 130.0, 8000.0, 3e6)] == [
        "0.002 s",
        "1.2e+02 s",
        "2 minutes",
        "2 hours",
        "35 days",
    ]


def test_the_fisher_has_the_mean_of_the_ggn():
    """Rung 5: 200 samples, entry by entry."""
    objective = CASES["coins"].objective((2, 4))
    found, truth = Fisher(num_samples=200).estimate(objective, seed=3), Exact("ggn").estimate(objective)
    assert found.stderr is not None
    z = (flat(found.values) - flat(truth.values)) / flat(found.stderr)
    assert z.abs().max() < 5.0
