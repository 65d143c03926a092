"""Gauss-Newton products against J' H_out J from dense float64 derivatives, closed forms, the Fisher matrix and curvlinops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, ENGINES, Case, X, Y, shake
from oracles import (
    classes,
    cut,
    dense,
    linear_regression_hessian,
    normal,
    relative,
    seeded,
    softmax_regression_hessian,
)
from test_preflight import DetachedSine, OnceSine
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvkit.errors import CurvkitError, InvalidArgument, UnknownObjective, UnsupportedModel
from curvkit.linalg import lanczos
from curvkit.losses import BatchLoss, as_loss, hessian_in_outputs, token_cross_entropy
from curvkit.models import MLP
from curvkit.objectives import Objective
from curvkit.operators import GGN, DoubleGGN, Hessian
from curvkit.operators.output_graph import OutputGraph
from curvkit.operators.plan import saved_bytes

partial = functools.partial

# float64 rounding, 2.2e-16, grown by a few dozen layers and by sums of up to a thousand terms in another order. Required is 1e-8.
EXACT = 1e-12


@pytest.fixture(autouse=True)
def _the_same_models_every_time() -> Iterator[None]:
    with seeded():
        yield


# ---- the oracle -----------------------------------------------------------------------------------------------------


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    if not isinstance(batch, Mapping):
        return tuple(batch[:-1]), {}, batch[-1]
    rest = dict(batch)
    targets = rest.pop("labels") if "labels" in rest else rest.pop("y")
    return ((rest["x"],), {}, targets) if set(rest) == {"x"} else ((), rest, targets)


def mean_of(loss: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def mean(z: Tensor, t: Tensor) -> Tensor:
        value = loss(z, t)
        return value[0] / value[1] if isinstance(value, tuple) else value

    return mean


def dense_ggn(
    model: nn.Module, loss: Callable[..., Any], data: list[Any], keep: Callable[[str], bool] = lambda name: True
) -> Tensor:
    """J' H_out J with J [all outputs, n] of all batches, and H_out of the user's own loss of all outputs at once."""
    chosen = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and keep(name)}
    sizes, shapes = [p.numel() for p in chosen.values()], [p.shape for p in chosen.values()]
    batches = [split_batch(batch) for batch in data]

    def outputs(flat: Tensor) -> Tensor:
        pieces = [piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)]
        named = dict(zip(chosen, pieces, strict=True))
        found = [functional_call(model, named, inputs, options) for inputs, options, _ in batches]
        return found[0] if len(found) == 1 else torch.cat(found)

    targets = batches[0][2] if len(batches) == 1 else torch.cat([t for *_, t in batches])
    theta = torch.cat([p.reshape(-1) for p in chosen.values()])
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            z = outputs(theta).detach()
            J = torch.autograd.functional.jacobian(outputs, theta).reshape(z.numel(), len(theta))
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    H = torch.func.hessian(lambda z: mean_of(loss)(z, targets))(z).reshape(z.numel(), z.numel())
    return J.T @ H @ J


def whole(operator: Any) -> Tensor:
    return operator.matmat(torch.eye(operator.n, dtype=operator.dtype))


def separable(make: Callable[[], Case]) -> bool:
    loss = make().loss
    return not isinstance(loss, BatchLoss) and getattr(loss, "func", None) is not F.l1_loss


SEPARABLE = [name for name, make in CASES.items() if separable(make)]


def test_the_table_of_models_is_there():
    wanted = {
        "mlp",
        "cnn, batch norm",
        "convolutions under a checkpoint",
        "decoder, tied, padded tokens",
        "encoder layer, eval",
        "lstm",
        "frozen",
        "patterns",
        "a used parameter in one batch only",
        "batch norm without statistics",
    }
    assert wanted <= set(SEPARABLE)


@pytest.mark.parametrize("name", SEPARABLE)
def test_products_are_those_of_the_dense_matrix(name: str):
    """Dense autograd, float64, the user's mean over all the data at once: matvec and matmat, for every engine."""
    made = CASES[name]()
    truth = dense_ggn(made.model, made.loss, made.data, made.keep)
    n, scale = len(truth), torch.linalg.matrix_norm(truth).item()
    V = normal(n, 3, seed=20)
    V /= torch.linalg.vector_norm(V, dim=0)
    for engine, options in ENGINES.items():
        G = GGN(made.objective(), **options)
        assert (G.n, G.dtype, G.unused) == (n, torch.float64, made.unused), engine
        errors = [torch.linalg.vector_norm(G.matvec(v) - truth @ v).item() for v in V.unbind(1)]
        errors.append(torch.linalg.vector_norm(G.matmat(V) - truth @ V).item())
        assert max(errors) <= EXACT * scale, engine


@pytest.mark.parametrize("name", ["mlp", "cnn, batch norm", "decoder, tied, padded tokens", "lstm"])
def test_loss_and_gradient_are_those_of_the_hessian(name: str):
    """Law: the same function; its gradient is J'u with u the gradient in the outputs."""
    objective = CASES[name]().objective()
    G, H = GGN(objective), Hessian(objective)
    assert pytest.approx(H.loss, rel=EXACT) == G.loss
    assert relative(G.gradient, H.gradient) <= EXACT
    assert (G.terms, G.products, G.matrix) == (H.terms, 0, "GGN")


# ---- losses ---------------------------------------------------------------------------------------------------------

N, C, T = 10, 4, 3
LABELS = classes(N, num=C, seed=3)
MASKED = torch.where(torch.arange(N) % 3 == 1, -100, LABELS)
MASKED[8:] = -100
SOFT = normal(N, C, seed=4).softmax(1)
WEIGHT = torch.tensor([0.2, 1.0, 0.0, 2.5], dtype=torch.float64)
REAL = normal(N, C, seed=5)
BITS = (REAL > 0).double()
GRID = classes(N, T, num=C, seed=6)
GRID[::2, 1:] = -100
GRID[9] = -100
PIXELS = classes(N, T, 2, num=C, seed=7)
PIXELS[:, 1, 0] = -100
INPUTS, SERIES, IMAGES = normal(N, 5, seed=1), normal(N, T, 5, seed=2), normal(N, T, 2, 5, seed=8)
LAST = {3: (0, 2, 1), 4: (0, 3, 1, 2)}


def to_dimension_1(z: Tensor) -> Tensor:
    return z.permute(LAST[z.ndim])


def rows_apart(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """A loss of the user's own: log-cosh."""
    return (outputs - targets).cosh().log().sum(), outputs.numel()


# name -> (loss, inputs, targets, what turns the linear model's output [.., C] into what the loss takes)
LOSSES: dict[str, tuple[Any, Tensor, Tensor, Callable[[Tensor], Tensor] | None]] = {
    "cross_entropy": (F.cross_entropy, INPUTS, LABELS, None),
    "ignored": (nn.CrossEntropyLoss(), INPUTS, MASKED, None),
    "other ignore_index": (partial(F.cross_entropy, ignore_index=2), INPUTS, LABELS, None),
    "class weights, ignored": (nn.CrossEntropyLoss(weight=WEIGHT), INPUTS, MASKED, None),
    "smoothed": (partial(F.cross_entropy, label_smoothing=0.1), INPUTS, LABELS, None),
    "smoothed, weights, ignored": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.3), INPUTS, MASKED, None),
    "soft": (F.cross_entropy, INPUTS, SOFT, None),
    "soft, not normalised": (F.cross_entropy, INPUTS, 3.0 * SOFT, None),
    "soft, weights, smoothed": (
        partial(F.cross_entropy, weight=WEIGHT, label_smoothing=0.2),
        INPUTS,
        SOFT,
        None,
    ),
    "sequence, weights": (partial(F.cross_entropy, weight=WEIGHT), SERIES, GRID, to_dimension_1),
    "pixels": (F.cross_entropy, IMAGES, PIXELS, to_dimension_1),
    "pixels, soft, weights": (
        partial(F.cross_entropy, weight=WEIGHT),
        IMAGES,
        normal(N, C, T, 2, seed=9).softmax(1),
        to_dimension_1,
    ),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), INPUTS, MASKED, None),
    "tokens": (token_cross_entropy, SERIES, GRID, None),
    "tokens, other ignore_index": (partial(token_cross_entropy, ignore_index=1), SERIES, GRID.abs() % C, None),
    "mse": (nn.MSELoss(), INPUTS, REAL, torch.tanh),
    "mse, sum": (partial(F.mse_loss, reduction="sum"), INPUTS, REAL, torch.tanh),
    "bce": (nn.BCEWithLogitsLoss(), INPUTS, BITS, None),
    "bce, soft targets": (nn.BCEWithLogitsLoss(), INPUTS, REAL.sigmoid(), None),
    "bce, pos_weight": (partial(F.binary_cross_entropy_with_logits, pos_weight=WEIGHT), INPUTS, BITS, None),
    "bce, weight, pos_weight": (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT + 1), INPUTS, BITS, None),
    "bce of probabilities": (nn.BCELoss(), INPUTS, BITS, torch.sigmoid),
    "poisson": (nn.PoissonNLLLoss(), INPUTS, REAL.abs().round(), None),
    "log-cosh": (rows_apart, INPUTS, REAL, None),
}
CLOSED = [name for name in LOSSES if name not in ("bce of probabilities", "poisson", "log-cosh")]


class Then(nn.Module):
    def __init__(self, then: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.linear, self.then = nn.Linear(5, C), then

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if self.then is None else self.then(y)


def linear_then(then: Callable[[Tensor], Tensor] | None) -> nn.Module:
    with seeded(7):
        return Then(then).double()


SPLITS = ([N], [6, 4], [5, 4, 1], [1, 4, 2, 3], [1] * N)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_and_every_split(name: str):
    """Dense autograd of the whole data: the mean is over the terms of all data, however they are cut into batches."""
    loss, x, y, then = LOSSES[name]
    model = linear_then(then)
    truth = dense_ggn(model, loss, [(x, y)])
    for sizes in SPLITS:
        for residency in ("retained", "streamed"):
            G = GGN(Objective(model, loss, cut(sizes, x, y)), residency=residency)
            assert relative(whole(G), truth) <= EXACT


def test_elementwise_weights():
    """Dense autograd, one batch: the weights belong to its elements."""
    model, w = linear_then(torch.tanh), normal(N, C, seed=11).abs()
    for loss in (
        partial(F.mse_loss, weight=w),
        nn.BCEWithLogitsLoss(weight=w),
        partial(F.binary_cross_entropy_with_logits, weight=w[:, :1]),
    ):
        G = GGN(Objective(model, loss, [(INPUTS, BITS)]))
        assert relative(whole(G), dense_ggn(model, loss, [(INPUTS, BITS)])) <= EXACT


def test_a_huber_loss():
    """Closed form: second derivative 1 where |z - t| < delta, else 0; torch has no forward derivative of it for the oracle."""
    model, loss = linear_then(None), nn.HuberLoss(delta=0.7)

    def same(z: Tensor, t: Tensor) -> Tensor:
        return torch.where((z - t).abs() < 0.7, 0.5 * (z - t).square(), 0.7 * (z - t).abs()).mean()

    G = GGN(Objective(model, loss, cut([6, 4], INPUTS, REAL)))
    assert relative(whole(G), dense_ggn(model, same, [(INPUTS, REAL)])) <= EXACT


def test_targets_that_would_be_broadcast_are_refused():
    model, x, y = linear_then(lambda z: z[:, :1]), INPUTS, normal(N, 3, seed=1)
    with pytest.raises(UnknownObjective, match="mse_loss compares element by element"):
        GGN(Objective(model, nn.MSELoss(reduction="sum"), [(x, y)]))


# ---- the output Hessian itself --------------------------------------------------------------------------------------


def at_outputs(name: str) -> tuple[Any, Tensor, Tensor]:
    loss, x, y, then = LOSSES[name]
    return loss, linear_then(then)(x).detach(), y


@pytest.mark.parametrize("name", LOSSES)
def test_output_hessian_is_the_dense_one(name: str):
    """Dense forward over reverse, float64, of torch's loss with reduction="sum"."""
    loss, z, y = at_outputs(name)
    known = as_loss(loss)
    truth = torch.func.hessian(lambda z: known.terms_of(z, y).total)(z).reshape(z.numel(), z.numel())
    H = hessian_in_outputs(known, z, y)
    V = normal(3, *z.shape)
    for v in V:
        assert relative(H.multiply(v).flatten(), truth @ v.flatten()) <= EXACT


@pytest.mark.parametrize("name", CLOSED)
def test_columns_and_root_factor_the_output_hessian(name: str):
    """Law: S S' = H_out, and row by row sum_c s_c s_c' is its block; other blocks are zero."""
    loss, z, y = at_outputs(name)
    H = hessian_in_outputs(as_loss(loss), z, y)
    units = torch.eye(z.numel(), dtype=z.dtype).view(-1, *z.shape)
    full = torch.stack([H.multiply(unit).flatten() for unit in units])
    S = torch.stack([H.root(unit).flatten() for unit in units], dim=1)
    assert relative(S @ S.T, full) <= EXACT
    columns = torch.stack([column.reshape(N, -1) for column in H.factor_columns()])  # [c, N, outputs of a row]
    blocks = torch.block_diag(*torch.einsum("cni,cnj->nij", columns, columns))
    assert relative(blocks, full) <= EXACT


def test_factors_of_outputs_without_rows():
    """Closed form: a single distribution [C], and a single number."""
    z = normal(C)
    H = hessian_in_outputs(as_loss(F.cross_entropy), z, torch.tensor(1))
    p, S = z.softmax(0), torch.stack(list(H.factor_columns()))
    assert relative(S.T @ S, torch.diag(p) - torch.outer(p, p)) <= EXACT
    (column,) = hessian_in_outputs(as_loss(F.mse_loss), z[0], z[1]).factor_columns()
    assert column.item() == pytest.approx(2.0**0.5)
    empty = hessian_in_outputs(as_loss(F.cross_entropy), z.new_zeros(0, C), LABELS[:0])
    assert list(empty.factor_columns()) == []


def test_a_nearly_certain_output_keeps_its_accuracy():
    """Closed form at p = (1 - q, q): curvature q (1 - q), 6e-7; float32 rounding of 1 - q alone would leave 6e-8 / 6e-7 = 10 %."""
    z = torch.tensor([[14.4, 0.0]])
    q = z.double().softmax(1)[0, 1].item()
    for v in ([1.0, 0.0], [0.0, 1.0], [0.3, -2.0]):
        H = hessian_in_outputs(as_loss(F.cross_entropy), z, torch.tensor([0]))
        slope = q * (1 - q) * (v[0] - v[1])
        # exp rounds its argument of 14.4 to 14.4 eps / 2, and the product a few times: below 32 eps = 4e-6
        assert H.multiply(torch.tensor([v])).flatten().tolist() == pytest.approx([slope, -slope], rel=4e-6)


def test_losses_without_a_known_factor_are_refused():
    H = hessian_in_outputs(as_loss(nn.HuberLoss()), REAL, BITS)
    for use in (lambda: H.root(REAL), lambda: next(H.factor_columns())):
        with pytest.raises(
            UnsupportedModel, match="no factor S of the output Hessian S S' of huber_loss is known.*Use"
        ):
            use()


def test_a_negative_weight_has_products_and_no_factor():
    for loss in (nn.CrossEntropyLoss(weight=-WEIGHT), partial(F.mse_loss, weight=-BITS)):
        H = hessian_in_outputs(as_loss(loss), REAL, LABELS if isinstance(loss, nn.Module) else BITS)
        assert H.multiply(REAL).isfinite().all()
        with pytest.raises(UnsupportedModel, match="a weight of the loss is negative.*Use weights of at least 0"):
            next(H.factor_columns())


# ---- closed forms and laws ------------------------------------------------------------------------------------------


def test_linear_regression_is_its_hessian():
    """Closed form: 2 / (N C) I (x) X'X; sums of nine float64 terms: 1e-14 = 45 eps."""
    model, y = shake(nn.Linear(4, 3)), normal(9, 3)
    objective = Objective(model, F.mse_loss, cut([5, 3, 1], X, y))
    assert relative(whole(GGN(objective)), linear_regression_hessian(X, 3)) <= 1e-14
    assert relative(whole(GGN(objective)), whole(Hessian(objective))) <= 1e-14


def test_softmax_regression_is_its_hessian():
    """Closed form: 1/N sum (diag p - pp') (x) xx', 1e-14 = 45 eps; the labels do not matter."""
    model = shake(nn.Linear(4, 3))
    truth = softmax_regression_hessian(X, model(X).detach())
    for y in (Y, Y.flip(0)):
        objective = Objective(model, F.cross_entropy, cut([5, 3, 1], X, y))
        assert relative(whole(GGN(objective)), truth) <= 1e-14
        assert relative(whole(GGN(objective)), whole(Hessian(objective))) <= 1e-14


def test_deep_linear_network():
    """Closed form for z = A B x with squared errors: 2 / (N C) sum J'J, J = [I (x) (B x)' | A (x) x'] for (A, B); here B comes first."""
    model, y = shake(nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False))), normal(9, 3)
    B, A = (p.detach() for p in model.parameters())
    J = [torch.cat([torch.kron(A, x[None]), torch.kron(torch.eye(3, dtype=x.dtype), (B @ x)[None])], dim=1) for x in X]
    truth = 2.0 / (9 * 3) * sum(j.T @ j for j in J)
    objective = Objective(model, F.mse_loss, cut([4, 4, 1], X, y))
    assert relative(whole(GGN(objective)), truth) <= 1e-14
    assert relative(whole(Hessian(objective)), truth) > 1e-2  # the residuals are not zero


def test_a_perfect_fit_has_the_hessian_of_its_ggn():
    """Law: the rest H - G is weighted by the residuals z - t; here they are zero."""
    model = shake(MLP([4, 6, 3], "tanh"))
    objective = Objective(model, F.mse_loss, [(X, model(X).detach())])
    assert relative(whole(GGN(objective)), whole(Hessian(objective))) <= EXACT


@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
def test_the_trace_of_a_relu_network_is_that_of_its_hessian(loss: Any):
    """Law: outputs that are linear in each weight, piece by piece, have no second derivative on the diagonal."""
    model = shake(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)))
    x, y = normal(7, 2, 6, 6), classes(7, num=3) if loss is F.cross_entropy else normal(7, 3)
    objective = Objective(model, loss, cut([4, 3], x, y))
    G, H = whole(GGN(objective)), whole(Hessian(objective))
    assert torch.trace(G).item() == pytest.approx(torch.trace(H).item(), rel=EXACT)
    assert relative(G, H) > 1e-2


def test_it_is_the_fisher_matrix_of_a_classifier():
    """Closed form: 1/N sum_n sum_c p_nc g_nc g_nc', g_nc the gradient of -log p_nc; all classes, nothing sampled."""
    model = shake(MLP([4, 6, 3], "tanh"))
    parameters = list(model.parameters())
    n = sum(p.numel() for p in parameters)
    fisher = torch.zeros(n, n, dtype=torch.float64)
    for x in X:
        log_p = model(x[None]).log_softmax(1)[0]
        for c in range(3):
            pieces = torch.autograd.grad(-log_p[c], parameters, retain_graph=True)
            g = torch.cat([piece.flatten() for piece in pieces])
            fisher += log_p[c].exp().detach() * torch.outer(g, g) / len(X)
    assert relative(whole(GGN(Objective(model, F.cross_entropy, cut([4, 4, 1], X, Y)))), fisher) <= EXACT


@pytest.mark.parametrize("name", ["mlp", "cnn, batch norm", "decoder, tied, padded tokens", "lstm"])
def test_it_is_positive_semidefinite(name: str):
    """Law: with a convex loss; the Hessian of these is not."""
    objective = CASES[name]().objective()
    values = torch.linalg.eigvalsh(whole(GGN(objective)))
    assert values[0] >= -EXACT * values[-1]
    assert torch.linalg.eigvalsh(whole(Hessian(objective)))[0] < -1e-3 * values[-1]


def test_eigenvalues_are_those_of_the_dense_matrix():
    made = CASES["mlp"]()
    truth = torch.linalg.eigvalsh(dense_ggn(made.model, made.loss, made.data)).flip(0)
    G = GGN(made.objective())
    pairs = lanczos.eigenpairs(G, 3, start=G.gradient, tolerance=1e-8, seed=0)
    assert pairs.all_converged
    assert torch.allclose(pairs.values, truth[:3], rtol=1e-8, atol=0.0)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", ["class weights, ignored", "tokens", "mse"])
def test_order_and_size_of_batches_do_not_matter(name: str, dtype: torch.dtype, allowed: float):
    """Law: sums in another order; 1e-6 = 8 eps of float32."""
    loss, x, y, then = LOSSES[name]
    model = linear_then(then)
    turned = torch.arange(N).roll(3).flip(0)
    reference: Tensor | None = None
    for sizes, rows in (([N], slice(None)), ([4, 5, 1], slice(None)), ([1, 3, 6], turned), ([1] * N, turned)):
        objective = Objective(model, loss, cut(sizes, x[rows], y[rows])).converted(dtype=dtype)
        got = whole(GGN(objective))
        reference = got if reference is None else reference
        assert relative(got, reference) <= allowed


def test_float32_is_right_to_its_rounding():
    """Dense autograd in float64; products in float32 are taken to err by at most 8 eps ||G||, as those of a Hessian."""
    eps = torch.finfo(torch.float32).eps
    for name in ("mlp", "cnn, batch norm", "decoder, tied, padded tokens", "encoder layer, eval", "lstm"):
        made = CASES[name]()
        wide, narrow = GGN(made.objective()), GGN(made.objective().converted(dtype=torch.float32))
        norm = torch.linalg.matrix_norm(whole(wide), 2).item()
        for seed in range(3):
            v = normal(wide.n, seed=seed)
            v /= torch.linalg.vector_norm(v)
            error = torch.linalg.vector_norm(narrow.matvec(v.float()).double() - wide.matvec(v)).item()
            assert error <= 8 * eps * norm, name


@pytest.mark.parametrize("name", ["mlp", "cnn, batch norm", "decoder, tied, padded tokens", "lstm"])
@pytest.mark.parametrize("budget", [None, 200])
def test_float64_products_of_float32_weights(name: str, budget: int | None):
    """Law: the products of the converted objective, whole or in parts; float64 rounding is all that is left."""
    objective = CASES[name]().objective().converted(dtype=torch.float32)
    G = GGN(objective, residency="retained" if budget is None else "streamed", budget_bytes=budget)
    D, V = DoubleGGN(G), normal(G.n, 2)
    truth = GGN(objective.converted(dtype=torch.float64)).matmat(V)
    assert relative(D.matmat(V), truth) <= EXACT
    assert relative(G.matmat(V.float()).double(), truth) > 1e-9
    with pytest.raises(InvalidArgument, match="DoubleGGN: vectors of shape"):
        D.matvec(V[:, 0].float())


def test_half_precision_is_measured_as_a_float32_copy():
    """Law: the same bits as of the converted model."""
    with seeded():
        model = MLP([4, 5, 3], "tanh").bfloat16()
    data = cut([5, 4], X.bfloat16(), Y)
    G = GGN(Objective(model, F.cross_entropy, data))
    direct = GGN(Objective(model, F.cross_entropy, data).converted(dtype=torch.float32))
    v = normal(G.n, dtype=torch.float32)
    assert G.dtype is torch.float32
    assert torch.equal(G.matvec(v), direct.matvec(v))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_batch_quotients():
    """Dense autograd of each batch alone; their weighted mean is v'Gv."""
    made = CASES["decoder, tied, padded tokens"]()
    G = GGN(made.objective(), residency="streamed")
    v = normal(G.n)
    v /= torch.linalg.vector_norm(v)
    quotients, weights = G.batch_quotients(v)
    kept = [(x, y) for x, y in made.data if (y != -100).any()]
    for quotient, (x, y) in zip(quotients, kept, strict=True):
        alone = dense_ggn(made.model, token_cross_entropy, [(x, y)])
        assert quotient == pytest.approx((v @ alone @ v).item(), rel=1e-11)
    mean = sum(q * w for q, w in zip(quotients, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx((v @ G.matvec(v)).item(), rel=1e-11)


def test_a_thousand_batches_are_added_up_in_float64():
    """Law: the same float32 sums in one batch; as the Hessian's, 1e-6 = 8 eps."""
    x, y = normal(1003, 4, dtype=torch.float32), classes(1003, num=3)
    with seeded():
        model = nn.Linear(4, 3)
    one = GGN(Objective(model, F.cross_entropy, [(x, y)]))
    many = GGN(Objective(model, F.cross_entropy, cut([1] * 1003, x, y)), residency="streamed")
    v = normal(15, dtype=torch.float32)
    assert relative(many.matvec(v), one.matvec(v)) <= 1e-6


# ---- plans ----------------------------------------------------------------------------------------------------------


def test_the_plan_is_of_these_graphs():
    objective = CASES["mlp"]().objective()
    G = GGN(objective)
    assert str(G.plan).startswith("double reverse, then reverse, retained (")
    assert GGN(objective, budget_bytes=1).plan.residency == "streamed"
    again = GGN(objective, plan=G.plan)
    assert torch.equal(again.matvec(normal(G.n)), G.matvec(normal(G.n)))
    assert saved_bytes(objective, gradient=True, kind=OutputGraph) > 0


def test_a_plan_of_another_matrix_is_refused():
    objective = CASES["mlp"]().objective()
    with pytest.raises(InvalidArgument, match="GGN: the plan is for rule='reverse over reverse', here it is 'double"):
        GGN(objective, plan=Hessian(objective).plan)


# ---- refusals -------------------------------------------------------------------------------------------------------


def classifier(loss: Any, **options: Any) -> GGN:
    return GGN(Objective(shake(MLP([4, 5, 3], "tanh")), loss, [(X, Y)]), **options)


def test_a_batch_loss_is_refused():
    loss = BatchLoss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    with pytest.raises(
        UnknownObjective,
        match=r"<lambda> is a BatchLoss, which calls the model itself. Pass a loss \(outputs, targets\)",
    ):
        classifier(loss)


@pytest.mark.parametrize("loss", [F.nll_loss, nn.KLDivLoss(reduction="batchmean"), nn.L1Loss()])
def test_a_loss_that_is_linear_in_the_outputs_is_refused(loss: Any):
    y = {nn.KLDivLoss: SOFT[:9, :3], nn.L1Loss: normal(9, 3)}.get(type(loss), Y)
    model = nn.Sequential(shake(MLP([4, 5, 3], "tanh")), nn.LogSoftmax(1))
    said = "is linear in the model's outputs, at least in pieces, so that this GGN would be zero.*return logits and use"
    with pytest.raises(UnsupportedModel, match=said):
        GGN(Objective(model, loss, [(X, y)]))


def test_a_linear_loss_of_the_user_s_is_refused():
    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean()

    with pytest.raises(UnsupportedModel, match="the loss own is linear in the model's outputs"):
        classifier(own)


def test_a_loss_that_reaches_the_weights_is_refused():
    model = shake(MLP([4, 5, 3], "tanh"))

    def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + 0.1 * model.linear1.weight.square().sum()

    with pytest.raises(
        UnknownObjective, match="penalised depends on the parameter 'linear1.weight' not only through.*Leave penalties"
    ):
        GGN(Objective(model, penalised, [(X, Y)]))


def test_outputs_that_are_not_a_tensor_are_refused():
    class Several(MLP):
        def forward(self, input: Tensor) -> Any:
            return {"logits": super().forward(input)}

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs["logits"], targets)

    with seeded():
        model = Several([4, 5, 3]).double()
    with pytest.raises(UnknownObjective, match="one tensor of floating-point numbers; the model gave a dict. Wrap the"):
        GGN(Objective(model, loss, [(X, Y)]))
    counts = Objective(nn.Sequential(model, Argmax()), lambda z, t: F.mse_loss(z.double(), t.double()), [(X, Y)])
    with pytest.raises(UnknownObjective, match="the model gave a tensor of torch.int64"):
        GGN(counts)


class Argmax(nn.Module):
    def forward(self, outputs: dict[str, Tensor]) -> Tensor:
        return outputs["logits"].argmax(1)


def test_a_detached_loss_is_refused():
    with pytest.raises(UnknownObjective, match="GGN: the loss does not depend on any of the parameters"):
        classifier(lambda outputs, targets: F.cross_entropy(outputs.detach(), targets))


def test_what_it_shares_with_the_hessian_is_refused_in_its_name():
    G = classifier(F.cross_entropy)
    with pytest.raises(InvalidArgument, match=rf"GGN: a vector of shape \(2,\).*this operator takes \[{G.n}\]"):
        G.matvec(torch.zeros(2))
    with pytest.raises(InvalidArgument, match="GGN: residency='keep' is not one of"):
        classifier(F.cross_entropy, residency="keep")
    with pytest.raises(InvalidArgument, match="GGN: budget_bytes=0 must be positive"):
        classifier(F.cross_entropy, budget_bytes=0)
    with torch.no_grad():
        G.objective.model.linear0.weight.add_(1.0)
    with pytest.raises(InvalidArgument, match=r"GGN: the parameter 'linear0.weight' has changed.*Make a new GGN\("):
        G.matvec(torch.zeros(G.n).double())
    with torch.no_grad():
        G.objective.model.linear0.weight[0, 0] = float("nan")
    with pytest.raises(CurvkitError, match="GGN: the parameter 'linear0.weight' has NaN or infinite entries"):
        GGN(G.objective)
    x = X.clone()
    x[5, 0] = float("nan")
    with pytest.raises(CurvkitError, match="GGN: the loss of batch 1 is nan though all parameters are finite"):
        GGN(Objective(shake(MLP([4, 5, 3])), F.cross_entropy, cut([5, 4], x, Y)))


def test_a_random_loss_is_refused():
    class Careless(MLP):
        def forward(self, input: Tensor) -> Tensor:
            return F.dropout(super().forward(input), 0.5, training=True)

    with pytest.raises(UnsupportedModel, match="GGN: the loss of batch 0 differs from one evaluation to the next"):
        GGN(Objective(Careless([4, 5, 3]).double().eval(), F.cross_entropy, [(X, Y)]))


def test_noise_in_a_later_batch_is_found_by_streaming():
    class Late(MLP):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input)
            return y + torch.randn_like(y) if len(input) == 4 else y

    with seeded():
        model = Late([4, 5, 3]).double()
    G = GGN(Objective(model, F.cross_entropy, cut([5, 4], X, Y)), residency="streamed")
    with seeded(1), pytest.raises(UnsupportedModel, match="GGN: the loss of batch 1 differs"):
        G.matvec(normal(G.n))


def test_an_operation_without_second_derivative_is_named():
    """J v needs the derivative of a backward pass, in the gradient that it is given."""
    objective = Objective(nn.EmbeddingBag(9, 3), F.cross_entropy, [(classes(6, 4, num=9), classes(6, num=3))])
    with pytest.raises(UnsupportedModel, match="GGN: torch .* has no second derivative of embedding_bag"):
        GGN(objective).matvec(torch.ones(objective.parameters.n))


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class Cubes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cubed.apply(x)


# ---- another library ------------------------------------------------------------------------------------------------


def library_cases() -> Iterator[tuple[nn.Module, nn.Module, Tensor, Tensor]]:
    yield shake(MLP([4, 6, 3], "tanh")), nn.CrossEntropyLoss(), X, Y
    yield shake(MLP([4, 6, 3])), nn.MSELoss(), X, normal(9, 3)
    yield shake(MLP([4, 6, 3], "gelu")), nn.BCEWithLogitsLoss(), X, (normal(9, 3) > 0).double()


@pytest.mark.extra
def test_products_are_those_of_curvlinops():
    """Another library, whole batches of equal size, where its weighting is right."""
    curvlinops = pytest.importorskip("curvlinops")
    for model, loss, x, y in library_cases():
        data = cut([3, 3, 3], x, y)
        theirs = curvlinops.GGNLinearOperator(model, loss, list(model.parameters()), data)
        G = GGN(Objective(model, loss, data))
        assert relative(whole(G), theirs @ torch.eye(G.n, dtype=torch.float64)) <= EXACT


def test_the_hessian_of_these_models_is_another_matrix():
    """So that an operator that returned Hessian products would fail above."""
    made = CASES["mlp"]()
    assert relative(whole(GGN(made.objective())), dense(made.model, made.whole).hessian) > 1e-2


def test_wrong_tangents_are_refused():
    """A once_differentiable function: J v goes through the derivative of its backward pass, which torch leaves out without a word; a
    detached save is harmless here, because the backward pass is linear in what it is given."""

    class Applied(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.linear, self.function = nn.Linear(4, 3), function

        def forward(self, x: Tensor) -> Tensor:
            return self.function.apply(self.linear(x))

    x, y = normal(8, 4), classes(8, num=3)
    with seeded():
        wrong, right = Applied(OnceSine).double(), Applied(DetachedSine).double()
    for residency in ("retained", "streamed"):
        with pytest.raises(
            UnsupportedModel, match=r"w'\(J v\) and v'\(J'w\) differ by .*once_differentiable. Write its backward pass"
        ):
            GGN(Objective(wrong, F.cross_entropy, [(x, y)]), residency=residency)
    assert GGN(Objective(right, F.cross_entropy, [(x, y)])).n == 15
