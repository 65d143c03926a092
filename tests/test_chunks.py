"""The cross-entropy in chunks against the plain one: values, gradients and Hessians, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import classes, normal, relative
from torch import Tensor, nn

from curvkit.errors import InvalidArgument, UnsupportedModel
from curvkit.losses import BatchLoss, chunked_token_cross_entropy, token_cross_entropy
from curvkit.models import Decoder
from curvkit.objectives import Objective
from curvkit.operators import Hessian
from curvkit.operators.preflight import preflight

# float64 rounding, 2.2e-16, of sums of a few hundred terms in another order
EXACT = 1e-13
V, D = 7, 3


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = classes(10, num=V).view(2, 5)
    y[0, 2] = -100
    return normal(10, D, seed=1).view(2, 5, D), normal(V, D, seed=2), normal(V, 1, seed=3).squeeze(1), y


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 4, 100, None])
def test_hessian_is_that_of_the_plain_loss(chunk: int | None, biased: bool):
    """Dense autograd of torch's own cross-entropy, through a square, so that the outer gradient is no constant."""
    h, W, b, y = inputs()
    arguments = (h, W, b) if biased else (h, W)

    def plain(*at: Tensor) -> Tensor:
        logits = F.linear(at[0], at[1], at[2] if biased else None)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").square()

    def ours(*at: Tensor) -> Tensor:
        total, count = chunked_token_cross_entropy(at[0], at[1], y, bias=at[2] if biased else None, chunk=chunk)
        assert count == 9
        return total.square()

    assert ours(*arguments).item() == pytest.approx(plain(*arguments).item(), rel=EXACT)
    for derivative in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        found, truth = (torch.utils._pytree.tree_leaves(derivative(f, arguments)) for f in (ours, plain))
        for one, other in zip(found, truth, strict=True):
            assert relative(one, other) <= EXACT


def test_torch_finds_the_derivatives_right():
    """Differences, by torch's own check, of the first and the second derivative."""
    h, W, b, y = (tensor.requires_grad_() if tensor.dtype.is_floating_point else tensor for tensor in inputs())

    def total(h: Tensor, W: Tensor, b: Tensor) -> Any:
        return chunked_token_cross_entropy(h, W, y, bias=b, chunk=4)[0]

    assert torch.autograd.gradcheck(total, (h, W, b))
    assert torch.autograd.gradgradcheck(total, (h, W, b))


def test_only_what_requires_a_gradient_has_one():
    h, W, _, y = inputs()
    direction = normal(V, D, seed=4)
    W.requires_grad_()
    total, _ = chunked_token_cross_entropy(h, W, y, chunk=2)
    (gradient,) = torch.autograd.grad(total, W, create_graph=True)
    (product,) = torch.autograd.grad(gradient, W, direction)
    plain = F.cross_entropy(F.linear(h, W).flatten(0, 1), y.flatten(), reduction="sum")
    (truth,) = torch.autograd.grad(plain, W, create_graph=True)
    assert relative(product, torch.autograd.grad(truth, W, direction)[0]) <= EXACT


def test_no_token_that_counts():
    h, W, _, y = inputs()
    total, count = chunked_token_cross_entropy(h, W, torch.full_like(y, -100))
    assert (total.item(), count) == (0.0, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda y: y.clamp(0) + V,
            "10 of 10 targets are no class: 7, .*, where the classes are 0 to 6. Number the classes",
        ),
        (lambda y: torch.where(y == -100, -1, y), "1 of 10 targets is no class: -1, where .*ignore_index, here -100"),
        (lambda y: y.int(), "targets of torch.int32 are no indices of classes. Pass int64, for example targets.long"),
    ],
)
def test_targets_that_are_no_class_are_refused(change: Any, said: str):
    h, W, _, y = inputs()
    with pytest.raises(InvalidArgument, match=f"^chunked_token_cross_entropy: {said}"):
        chunked_token_cross_entropy(h, W, change(y))


def test_another_ignore_index_does_not_let_the_usual_one_through():
    """Torch's loss, which the chunks call, would leave -100 out of the sum, though it is counted."""
    h, W, _, y = inputs()
    with pytest.raises(InvalidArgument, match="1 of 10 targets is no class: -100, where .*ignore_index, here 3"):
        chunked_token_cross_entropy(h, W, y, ignore_index=3)


def test_third_derivatives_are_refused():
    h, W, _, y = inputs()
    h.requires_grad_()
    (first,) = torch.autograd.grad(chunked_token_cross_entropy(h, W, y)[0], h, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), h, create_graph=True)
    with pytest.raises(
        UnsupportedModel, match="a third derivative was asked for; the loss in chunks has two. Use token_cross_entropy"
    ):
        second.sum().backward()


def test_products_with_a_tied_decoder():
    """Law: products of a language model are those with the plain loss, uneven batches and padding included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(vocabulary=11, width=8, depth=1, heads=2, context=6).double()
    x, y = classes(18, num=11, seed=1).view(3, 6), classes(18, num=11, seed=2).view(3, 6)
    y[1, 3:] = -100
    data = [(x[:2], y[:2]), (x[2:], y[2:])]

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        head, kept = model.get_submodule("head"), []
        handle = head.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))
        try:
            model(batch[0])
        finally:
            handle.remove()
        return chunked_token_cross_entropy(kept.pop(), head.weight, batch[1], chunk=4)

    plain, ours = Hessian(Objective(model, token_cross_entropy, data)), Hessian(Objective(model, BatchLoss(loss), data))
    v = normal(plain.n)
    assert ours.loss == pytest.approx(plain.loss, rel=EXACT)
    assert ours.terms == plain.terms
    assert relative(ours.gradient, plain.gradient) <= EXACT
    assert relative(ours.matvec(v), plain.matvec(v)) <= 10 * EXACT
    assert preflight(ours.objective).verdict == "right"


def test_what_does_not_fit_is_refused():
    h, W, b, y = inputs()
    with pytest.raises(
        InvalidArgument,
        match=r"hidden of shape \(2, 5, 3\), head_weight \(3, 7\) and targets \(2, 5\) do not fit. Pass hidden \[..., d\], head_weight",
    ):
        chunked_token_cross_entropy(h, W.T, y)
    with pytest.raises(
        InvalidArgument, match=r"bias of shape \(6,\) does not fit head_weight \(7, 3\). Pass \[7\], or None"
    ):
        chunked_token_cross_entropy(h, W, y, bias=b[:6])
    with pytest.raises(InvalidArgument, match="chunk=0 must be at least 1, or None for the default"):
        chunked_token_cross_entropy(h, W, y, chunk=0)
