"""Estimators of diagonals against dense matrices in float64: unbiased where sampled, equal where not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import classes, cut, dense, normal, seeded, surroundings
from safetensors.torch import save_file
from torch import Tensor, nn

from curvkit import BatchLoss, Objective
from curvkit.errors import CurvkitError, InvalidArgument, UnsupportedModel
from curvkit.estimators import EmpiricalFisher, Exact, ExampleHutchinson, Fisher, Hutchinson, SquaredGradient, interval
from curvkit.estimators.recordings.coverage import coverage
from curvkit.losses import token_cross_entropy
from curvkit.operators import GGN
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate

N, T, VOCABULARY = 6, 7, 11


class Convolutions(nn.Module):
    """Stride, padding, groups, BatchNorm in evaluation mode, GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6)
        self.b, self.gn, self.c = nn.Conv2d(6, 6, 3, groups=3, bias=False), nn.GroupNorm(2, 6), nn.Linear(24, 3)
        for statistic in (self.bn.running_mean, self.bn.running_var):
            nn.init.uniform_(statistic, 0.5, 2.0)  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.gn(self.b(F.silu(self.bn(self.a(x))))).flatten(1))


class Language(nn.Module):
    """Embeddings with padding, tied head, positions that are looked up once, norms, factors and offsets by hand."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, 6, padding_idx=2), nn.Embedding(T, 6)
        self.ln, self.rms, self.inner = nn.LayerNorm(6), nn.RMSNorm(6), nn.Linear(6, 6)
        self.scale, self.offset = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(1, T, 6))
        self.head = nn.Linear(6, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids) + self.places(torch.arange(ids.shape[1])) + self.offset
        h = h + torch.tanh(self.inner(self.ln(h))) * self.scale
        return self.head(self.rms(h))


class Arranged(nn.Module):
    """Positions before examples, or examples and positions in one dimension."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.a, self.ln, self.b = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.offset = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        arranged = x.reshape(-1, x.shape[-1]) if self.flat else x.transpose(0, 1)
        z = self.b(torch.tanh(self.ln(self.a(arranged) + self.offset)))
        return z.view(len(x), -1, 3).mean(1) if self.flat else z.mean(0)


class Attention(nn.Module):
    """nn.MultiheadAttention, whose projections are in no call of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x, x, x, need_weights=False)[0]).mean(1)


class Functional(nn.Module):
    """A matrix product written out, one layer used twice, a parameter that is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w, self.idle = nn.Linear(5, 5), nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(torch.tanh(self.a(x)))) @ self.w


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    loss: Any
    x: Tensor
    y: Tensor

    def objective(self, sizes: tuple[int, ...] = (N,)) -> Objective:
        with seeded(1):
            model = self.make().double().eval()
        return Objective(model, self.loss, cut(sizes, self.x, self.y))


LABELS, IDS, TOKENS = (
    classes(N, num=3, seed=2),
    classes(N, T, num=VOCABULARY, seed=3),
    classes(N, T, num=VOCABULARY, seed=4),
)
CASES: dict[str, Case] = {
    "mlp": Case(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), F.cross_entropy, normal(N, 5), LABELS
    ),
    "convolutions": Case(Convolutions, F.cross_entropy, normal(N, 4, 8, 8), LABELS),
    "convolutions in one dimension": Case(
        lambda: nn.Sequential(
            nn.Conv1d(4, 6, 3, padding="same", dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
        ),
        F.cross_entropy,
        normal(N, 4, 8),
        LABELS,
    ),
    "language": Case(lambda: Language(tied=False), token_cross_entropy, IDS, TOKENS),
    "tied": Case(lambda: Language(tied=True), token_cross_entropy, IDS, TOKENS.masked_fill(TOKENS < 3, -100)),
    "time first": Case(lambda: Arranged(flat=False), F.cross_entropy, normal(N, T, 4), LABELS),
    "flattened": Case(lambda: Arranged(flat=True), F.cross_entropy, normal(N, T, 4), LABELS),
    "functional": Case(Functional, F.cross_entropy, normal(N, 5), LABELS),
    "attention": Case(Attention, F.cross_entropy, normal(N, T, 4), LABELS),
    "squared error": Case(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), F.mse_loss, normal(N, 5), normal(N, 3)
    ),
    "coins": Case(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
        nn.BCEWithLogitsLoss(),
        normal(N, 5),
        classes(N, 3, num=2).double(),
    ),
}
UNRULED: dict[str, set[str]] = {}


def flat(values: Any) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values.values()])


def gradients_of_examples(objective: Objective) -> Iterator[Tensor]:
    """Rung 2: each example run alone through torch.autograd; gradients of its total."""
    for batch in objective.batches:
        for row in range(len(batch[-1])):
            one = objective.with_batches([tuple(tensor[row : row + 1] for tensor in batch)])
            with one.measuring():
                found = torch.autograd.grad(one.terms(0).total, one.tensors, allow_unused=True)
            yield torch.cat(
                [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(found, one.tensors, strict=True)]
            )


def hessian_diagonal(case: Case) -> Tensor:
    model = case.objective().model
    return dense(model, lambda call: case.loss(call(case.x), case.y)).hessian.diagonal()


def ggn_diagonal(objective: Objective) -> Tensor:
    """Through products, which are tested against dense matrices on their own."""
    G = GGN(objective)
    return G.matmat(torch.eye(G.n, dtype=G.dtype)).diagonal()


@pytest.mark.parametrize("name", CASES)
def test_rules_cover_what_they_say(name: str):
    found = coverage(CASES[name].objective())
    assert set(found.refused) == UNRULED.get(name, set())
    assert set(found.ruled) | set(found.refused) == set(CASES[name].objective().parameters.names)


@pytest.mark.parametrize("name", CASES)
def test_empirical_fisher_is_the_sum_of_squares_of_single_examples(name: str):
    """Rung 2, in two uneven batches."""
    objective = CASES[name].objective((2, 4))
    before = surroundings(objective.model)
    found = EmpiricalFisher().estimate(objective)
    assert surroundings(objective.model) == before
    weights = [
        objective.terms_of(objective.outputs(i)[0].detach(), batch[-1]).weight
        for i, batch in enumerate(objective.batches)
    ]
    truth = torch.stack([g.square() for g in gradients_of_examples(objective)]).sum(0) / sum(weights)
    assert (flat(found.values) - truth).abs().max() <= 1e-12 * truth.abs().max()
    assert (found.matrix, found.stderr, found.seed) == ("empirical_fisher", None, None)
    assert list(found.values) == list(objective.parameters.names)


def z_scores(found: DiagonalEstimate, truth: Tensor) -> Tensor:
    assert found.stderr is not None
    stderr = flat(found.stderr)
    known = stderr > 1e-12 * truth.abs().max()
    assert bool(((flat(found.values) - truth)[~known].abs() <= 1e-9 * truth.abs().max()).all())
    return ((flat(found.values) - truth) / stderr)[known]


def check_unbiased(found: DiagonalEstimate, truth: Tensor) -> None:
    """Rung 5: with 100 samples and more a z-score is standard normal, nearly.

    Entries are correlated, with six examples strongly, so that the mean of their squares may be that of a few independent ones; a bias, or
    signs that do not fit, made it 20 and more.
    """
    z = z_scores(found, truth)
    assert z.abs().max() < 5.5
    assert 0.1 < z.square().mean() < 2.5


@pytest.mark.parametrize("name", CASES)
def test_fisher_is_unbiased_for_the_ggn(name: str):
    objective = CASES[name].objective((2, 4))
    found = Fisher(num_samples=100).estimate(objective, seed=5)
    check_unbiased(found, ggn_diagonal(objective))
    assert (found.matrix, found.samples, found.seed) == ("fisher", 100, 5)


@pytest.mark.parametrize("name", CASES)
def test_signs_per_example_are_unbiased_for_the_hessian(name: str):
    objective = CASES[name].objective((2, 4))
    before = surroundings(objective.model)
    found = ExampleHutchinson(num_probes=100).estimate(objective, seed=6)
    assert surroundings(objective.model) == before
    check_unbiased(found, hessian_diagonal(CASES[name]))
    assert found.matrix == "hessian"
    assert {note.partition(" ")[0] for note in found.notes} == UNRULED.get(name, set())


@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_hutchinson_is_unbiased_for_the_hessian(name: str):
    check_unbiased(
        Hutchinson(num_probes=200).estimate(CASES[name].objective((2, 4)), seed=7), hessian_diagonal(CASES[name])
    )


def test_the_gain_of_signs_per_example():
    """Equal products, 256 examples, a network that was trained a little: the error of the diagonal is a fifth of Hutchinson's, or less."""
    with seeded(0):
        model = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    x = 1.0 + 0.3 * normal(256, 8)
    y = x[:, :4].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    objective = Objective(model, F.cross_entropy, [(x, y)])
    truth = dense(model, lambda call: F.cross_entropy(call(x), y)).hessian.diagonal()

    def error(estimator: Any) -> float:
        runs = [flat(estimator.estimate(objective, seed=seed).values) - truth for seed in range(10)]
        return torch.stack([run.square().sum() for run in runs]).mean().sqrt().item()

    assert error(ExampleHutchinson()) < error(Hutchinson(num_probes=1)) / 5


@pytest.mark.parametrize(
    "estimator", [Fisher(num_samples=30), ExampleHutchinson(num_probes=30), Hutchinson(num_probes=30)]
)
def test_standard_errors_are_true(estimator: Any):
    """95 % intervals of entries from 30 samples, Student's t; 12 runs of 39 correlated entries leave some points of room."""
    case = CASES["mlp"]
    truth = ggn_diagonal(case.objective()) if isinstance(estimator, Fisher) else hessian_diagonal(case)
    hits = []
    for seed in range(12):
        z = z_scores(estimator.estimate(case.objective(), seed=seed), truth)
        hits.append((z.abs() < 2.045).double().mean())
    assert 0.90 <= torch.stack(hits).mean() <= 0.995


def test_squared_gradient_has_the_mean_of_the_fisher():
    """Rung 5: 2000 draws of one batch; relative variance 2, so that the mean is known to sqrt(2 / 2000) = 3 %."""
    objective = CASES["mlp"].objective()
    truth = ggn_diagonal(objective)
    drawn = torch.stack([flat(SquaredGradient().estimate(objective, seed=seed).values) for seed in range(600)])
    z = (drawn.mean(0) - truth) / (drawn.std(0) / math.sqrt(len(drawn)))
    assert z.abs().max() < 5.0
    ratio = drawn.std(0) / drawn.mean(0)
    assert 1.0 < ratio.median() < 1.8  # sqrt(2) for a normal gradient


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_squared_gradients_of_uneven_batches_have_the_mean_of_the_fisher(reduction: Any):
    """Rung 5: each batch counts by its terms; of a sum nothing is divided."""
    case = CASES["mlp"]
    with seeded(1):
        model = case.make().double()
    objective = Objective(model, nn.CrossEntropyLoss(reduction=reduction), cut((1, 5), case.x, case.y))
    truth = ggn_diagonal(objective)
    estimator = SquaredGradient(num_batches=2)
    drawn = torch.stack([flat(estimator.estimate(objective, seed=seed).values) for seed in range(600)])
    z = (drawn.mean(0) - truth) / (drawn.std(0) / math.sqrt(len(drawn)))
    assert z.abs().max() < 5.0
    assert abs(drawn.mean(0).sum() / truth.sum() - 1) < 0.15


def test_a_gradient_that_two_parameters_share():
    """Closed form: two offsets have one and the same gradient, which is squared for each and once."""

    class Offsets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.zeros(1, 2).double()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a + self.b + self.c.sum()

    objective = Objective(Offsets(), F.cross_entropy, [(torch.tensor([[0.3, -0.4]]).double(), torch.tensor([0]))])
    found = SquaredGradient().estimate(objective, seed=0)
    p = torch.tensor([0.3, -0.4]).double().softmax(0)
    possible = [(p - F.one_hot(torch.tensor(label), 2)).square() for label in range(2)]
    assert any(torch.allclose(found.values["a"][0], square) for square in possible)
    assert torch.equal(found.values["a"], found.values["b"])
    assert found.values["c"].abs().max() < 1e-12  # softmax: what is added to all classes changes nothing


def test_half_precision_is_foreseen_as_it_is_computed():
    with seeded(1):
        model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)).bfloat16()
    objective = Objective(model, F.cross_entropy, [(normal(N, 40).bfloat16(), LABELS)])
    for estimator in (Fisher(), EmpiricalFisher(), SquaredGradient(), Hutchinson(), ExampleHutchinson()):
        foreseen = estimator.expected(objective).peak_bytes(objective)
        assert foreseen == estimator.estimate(objective, seed=0).cost.peak_bytes


def test_autocast_that_was_switched_off_is_said():
    class Casting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    with seeded(1):
        objective = Objective(Casting(5, 3), F.cross_entropy, [(normal(N, 5).float(), LABELS)])
    for estimator in (Fisher(), EmpiricalFisher(), SquaredGradient(), Hutchinson(), ExampleHutchinson(), Exact("ggn")):
        notes = estimator.estimate(objective, seed=0).notes
        assert sum("autocast by itself, which was switched off" in note for note in notes) == 1


def test_three_matrices_are_three():
    """At random labels the empirical Fisher is another matrix than the Fisher, and the Fisher is the GGN but not the Hessian."""
    case = CASES["mlp"]
    objective = case.objective()
    fisher, empirical = ggn_diagonal(objective), flat(EmpiricalFisher().estimate(objective).values)
    assert ((fisher - empirical).norm() / fisher.norm()).item() > 0.1
    assert ((fisher - hessian_diagonal(case)).norm() / fisher.norm()).item() > 0.1


def test_label_smoothing_is_left_out_and_said():
    case = CASES["mlp"]
    smoothed = Objective(case.objective().model, nn.CrossEntropyLoss(label_smoothing=0.2), [(case.x, case.y)])
    a, b = (Fisher().estimate(objective, seed=1) for objective in (smoothed, case.objective()))
    assert bool((flat(a.values) == flat(b.values)).all())
    assert a.notes == ("label smoothing 0.2 is left out: targets are drawn from the model as it is",)


@pytest.mark.parametrize("estimator", [Fisher(2), ExampleHutchinson(2), Hutchinson(2), SquaredGradient()])
def test_same_seed_same_bits(estimator: Any):
    a, b, c = (estimator.estimate(CASES["mlp"].objective((2, 4)), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(flat(a.values), flat(b.values))
    assert not torch.equal(flat(a.values), flat(c.values))


def test_one_sample_has_an_unknown_error():
    found = Fisher().estimate(CASES["mlp"].objective(), seed=0)
    assert found.stderr is not None
    assert bool(flat(found.stderr).isnan().all())
    assert all(math.isnan(layer.stderr) for layer in found.layers)


def test_layers_and_their_shares():
    found = ExampleHutchinson(num_probes=40).estimate(CASES["mlp"].objective(), seed=0)
    assert sum(layer.share for layer in found.layers) == pytest.approx(1.0)
    assert sum(layer.sum for layer in found.layers) == pytest.approx(found.trace)
    first = found.layers[0]
    values = found.values[first.name]
    assert (first.numel, first.largest) == (20, values.abs().max().item())
    assert first.mean == pytest.approx(values.mean().item())
    assert first.negative_fraction == pytest.approx((values < 0).double().mean().item())
    assert 0.0 < first.stderr < abs(first.sum) + 1.0


class Choices(nn.Module):
    """A slope and a token that the first rows do not need, and a query that is the input of a layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(4, 6), nn.Linear(6, 3)
        self.slope, self.token = nn.PReLU(6, init=0.3), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "slope":
            return self.b(self.slope(self.a(x)))
        if self.kind == "token":
            x = torch.where(x[:, :1] > 0.9, self.token, x)
        if self.kind == "query":
            return self.b(torch.tanh(self.a(x) + self.a(self.token)))
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize(("kind", "name"), [("slope", "slope.weight"), ("token", "token"), ("query", "token")])
def test_a_call_without_a_rule_is_seen_where_its_gradient_is_zero(kind: str, name: str):
    """Rows 0 and 1 need neither the slope nor the token; vmap gives both, and probes share their signs."""
    x = normal(N, 4, seed=8).abs() + 5.0 if kind == "slope" else normal(N, 4, seed=8).clamp(max=0.5)
    if kind == "slope":
        x[2:] = -x[2:]
    elif kind == "token":
        x[3, 0] = 2.0
    case = Case(lambda: Choices(kind), F.cross_entropy, x, LABELS)
    objective = case.objective()
    assert name in coverage(objective).refused
    found = EmpiricalFisher().estimate(objective)
    truth = torch.stack([g.square() for g in gradients_of_examples(objective)]).sum(0) / N
    assert (flat(found.values) - truth).abs().max() <= 1e-12 * truth.abs().max()
    check_unbiased(ExampleHutchinson(num_probes=100).estimate(objective, seed=1), hessian_diagonal(case))


def test_a_layout_is_told_for_batches_of_every_size():
    """Time first with T = 7: in a batch of 7 rows both dimensions could count the examples."""
    case = Case(lambda: Arranged(flat=False), F.cross_entropy, normal(12, T, 4), classes(12, num=3))
    objective = case.objective((5, 7))
    found = EmpiricalFisher().estimate(objective)
    truth = torch.stack([g.square() for g in gradients_of_examples(objective)]).sum(0) / 12
    assert (flat(found.values) - truth).abs().max() <= 1e-12 * truth.abs().max()
    assert found.notes


def test_another_path_for_some_data_is_refused():
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else x @ self.a.weight.t() + self.a.bias

    x = torch.cat([normal(3, 4).abs(), -normal(3, 4).abs()])
    objective = Objective(Choosing().double(), F.cross_entropy, cut((3, 3), x, LABELS))
    for estimator in (Fisher(), EmpiricalFisher(), ExampleHutchinson()):
        with pytest.raises(
            UnsupportedModel, match="one batch uses a.weight in another way than the first of its shape"
        ):
            estimator.estimate(objective, seed=0)


def test_batches_without_common_rows_are_refused():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return self.a(x + shift.sum(0))

    objective = Objective(Pair().double(), F.cross_entropy, [(normal(N, 4), normal(2, 4), LABELS)])
    with pytest.raises(UnsupportedModel, match="the tensors of a batch differ in dimension 0"):
        EmpiricalFisher().estimate(objective)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [Fisher(), EmpiricalFisher(), ExampleHutchinson()])
def test_examples_must_be_known(estimator: Any):
    model, x, y = nn.Linear(5, 3).double(), normal(N, 5), LABELS
    unknown = Objective(model, BatchLoss(lambda model, batch: model(batch[0]).square().mean()), [(x, y)])
    pattern = "not known to be a sum over the rows|is not a likelihood"
    with pytest.raises(UnsupportedModel, match=pattern):
        estimator.estimate(unknown)

    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = model

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x - x.mean(0))

    with pytest.raises(UnsupportedModel, match="rows are no examples: something couples them"):
        estimator.estimate(Objective(Coupled(), F.cross_entropy, [(x, y)]))


@pytest.mark.parametrize("estimator", [Fisher(), SquaredGradient()])
def test_there_must_be_a_likelihood(estimator: Any):
    model, x = nn.Linear(5, 3).double(), normal(N, 5)
    name = type(estimator).__name__
    with pytest.raises(
        UnsupportedModel, match=f"{name}: the loss smooth_l1_loss is not a likelihood that targets could be drawn from"
    ):
        estimator.estimate(Objective(model, F.smooth_l1_loss, [(x, normal(N, 3))]))
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3).double())
    with pytest.raises(
        UnsupportedModel, match=f"{name}: the loss cross_entropy.* has weight, so that it is no likelihood"
    ):
        estimator.estimate(Objective(model, weighted, [(x, LABELS)]))


@pytest.mark.parametrize("estimator", [Fisher(), EmpiricalFisher(), ExampleHutchinson(), SquaredGradient()])
def test_what_is_not_finite_is_refused(estimator: Any):
    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).mul(0.0).abs().sqrt()

    with pytest.raises(CurvkitError, match="the gradient of a.weight has NaN or infinite entries"):
        estimator.estimate(Objective(Rooted().double(), F.cross_entropy, [(normal(N, 5), LABELS)]), seed=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fisher(num_samples=0), "Fisher: num_samples=0 must be an integer >= 1"),
        (lambda: SquaredGradient(num_batches=True), "SquaredGradient: num_batches=True must be an integer >= 1"),
        (lambda: ExampleHutchinson(num_probes=1.5), "ExampleHutchinson: num_probes=1.5 must be an integer >= 1"),
        (lambda: Hutchinson(num_probes=-1), "Hutchinson: num_probes=-1 must be an integer >= 1"),
    ],
)
def test_options_are_checked(make: Callable[[], Any], message: str):
    with pytest.raises(InvalidArgument, match=message):
        make()


def test_more_batches_than_there_are():
    with pytest.raises(InvalidArgument, match="SquaredGradient: num_batches=3, but the data has 1"):
        SquaredGradient(num_batches=3).estimate(CASES["mlp"].objective(), seed=0)


def test_saved_and_loaded(tmp_path: Path):
    found = Fisher(num_samples=3).estimate(CASES["tied"].objective(), seed=4)
    again = DiagonalEstimate.load(found.save(tmp_path / "d.safetensors", record={"seed": 4}))
    assert all(torch.equal(again.values[name], value) for name, value in found.values.items())
    assert again.stderr is not None
    assert found.stderr is not None
    assert all(torch.equal(again.stderr[name], value) for name, value in found.stderr.items())
    assert (again.matrix, again.estimator, again.cost, again.samples, again.seed) == (
        "fisher",
        "Fisher(num_samples=3)",
        found.cost,
        3,
        4,
    )
    assert [layer.stderr for layer in again.layers] == [layer.stderr for layer in found.layers]
    assert list(again.values) == list(found.values)
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]
    assert (found.record, again.record) == (None, {"seed": 4})
    assert DiagonalEstimate.load(again.save(tmp_path / "d.safetensors")).record == {"seed": 4}


def test_intervals_of_entries():
    objective = CASES["mlp"].objective()
    found = Fisher(num_samples=30).estimate(objective, seed=0)
    low, high = interval(found)
    assert found.stderr is not None
    for name, value in found.values.items():
        assert torch.allclose(
            high[name] - value, 2.0452 * found.stderr[name], rtol=1e-4
        )  # t with 29 degrees of freedom
        assert torch.allclose(low[name] + high[name], 2 * value)
    truth = ggn_diagonal(objective)
    inside = (flat(low) <= truth) & (truth <= flat(high))
    assert inside.double().mean() > 0.8
    exact = EmpiricalFisher().estimate(objective)
    assert all(torch.equal(bound[name], value) for bound in interval(exact) for name, value in exact.values.items())


def test_an_interval_of_one_sample_is_refused():
    one = Fisher().estimate(CASES["mlp"].objective(), seed=0)
    with pytest.raises(
        InvalidArgument,
        match=r"interval: Fisher\(num_samples=1\) took 1 sample, from which no error is known. Take at least",
    ):
        interval(one)


def test_another_file_is_no_diagonal(tmp_path: Path):
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(InvalidArgument, match="cannot be read as a diagonal .it is no curvkit.diagonal/1 file"):
        DiagonalEstimate.load(tmp_path / "w.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(InvalidArgument, match="cannot be read as a diagonal"):
        DiagonalEstimate.load(tmp_path / "b.safetensors")
    with pytest.raises(InvalidArgument, match="cannot be read as a diagonal"):
        DiagonalEstimate.load(tmp_path / "none.safetensors")


def test_nothing_sampled_is_said():
    found = DiagonalEstimate({"w": torch.tensor([1.0, -3.0])}, None, "hessian", "Exact", Cost(2.0, 0.1))
    assert found.trace == -2.0
    assert (found.layers[0].stderr, found.layers[0].largest, found.layers[0].negative_fraction) == (0.0, 3.0, 0.5)
    assert repr(found) == "DiagonalEstimate(hessian, 2 entries by Exact, 2 gradients)"
