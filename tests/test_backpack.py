"""BackPACK's diagonals against dense truth in float64; what it would get wrong is refused by name; nothing is disturbed."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from oracles import classes, cut, dense, fill_gradients, normal, relative, seeded, surroundings
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

from curvkit import Objective
from curvkit.errors import CurvkitError, InvalidArgument, MissingExtra, UnknownObjective, UnsupportedModel
from curvkit.estimators import BackPACK, Fisher
from curvkit.estimators.through_backpack import passes as passes_module
from curvkit.estimators.through_backpack.agreement import (
    few_rows,
    refuse_other_gradient,
    refuse_other_hessian,
    refuse_other_squares,
)
from curvkit.estimators.through_backpack.library import SAVED, Extension, Library
from curvkit.losses import token_cross_entropy

pytestmark = pytest.mark.extra
EXTENSIONS = get_args(Extension)
N = 3
EXACT = 1e-12
"""Sums of a few hundred products in float64; 1e-16 to 5e-16 were seen."""


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest):
    if "absent" not in request.node.name:
        pytest.importorskip("backpack")


def after(body: list[nn.Module], *shape: int) -> nn.Sequential:
    """Layers, and a linear one to three classes that fits what they give."""
    first = nn.Sequential(*body, nn.Flatten())
    return nn.Sequential(*first, nn.Linear(first.eval()(torch.randn(2, *shape)).shape[1], 3))


def vectors(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), *layers, nn.Linear(4, 3))


def lines(*layers: nn.Module) -> nn.Sequential:
    return after([nn.Conv1d(2, 4, 3), nn.Tanh(), *layers], 2, 8)


def images(*layers: nn.Module) -> nn.Sequential:
    return after([nn.Conv2d(2, 4, 3), nn.Tanh(), *layers], 2, 6, 6)


def volumes(*layers: nn.Module) -> nn.Sequential:
    return after([nn.Conv3d(2, 2, 2), nn.ReLU(), *layers], 2, 4, 4, 4)


def custom(name: str, *arguments: Any, **options: Any) -> nn.Module:
    """A module of BackPACK's own."""
    import backpack.custom_module as modules
    from backpack.custom_module import branching, pad, permute, reduce_tuple, scale_module, slicing  # noqa: F401

    for place in vars(modules).values():
        if isinstance(place, types.ModuleType) and hasattr(place, name):
            return getattr(place, name)(*arguments, **options)
    raise AttributeError(name)


def recurrent(kind: Any, **options: Any) -> nn.Sequential:
    layers = [kind(4, 3, batch_first=True, **options), custom("ReduceTuple", 0), nn.Flatten()]
    width = nn.Sequential(*layers)(torch.randn(2, 5, 4)).shape[1]
    return nn.Sequential(*layers, nn.Linear(width, 3))


BOTH, GGN, NONE = frozenset({"DiagHessian", "DiagGGNExact"}), frozenset({"DiagGGNExact"}), frozenset[str]()
V, L, M, S, Q = (5,), (2, 8), (2, 6, 6), (2, 4, 4, 4), (5, 4)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], frozenset[str]]] = {
    "ReLU": (lambda: vectors(nn.ReLU()), V, BOTH),
    "ReLU in place": (lambda: vectors(nn.ReLU(inplace=True)), V, BOTH),
    "Sigmoid": (lambda: vectors(nn.Sigmoid()), V, BOTH),
    "Tanh": (lambda: vectors(nn.Tanh()), V, BOTH),
    "LeakyReLU": (lambda: vectors(nn.LeakyReLU()), V, BOTH),
    "LogSigmoid": (lambda: vectors(nn.LogSigmoid()), V, BOTH),
    "ELU": (lambda: vectors(nn.ELU(2.0)), V, BOTH),
    "SELU": (lambda: vectors(nn.SELU()), V, BOTH),
    "several activations": (lambda: vectors(nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid()), V, BOTH),
    "no biases": (lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)), V, BOTH),
    "an activation last": (lambda: nn.Sequential(nn.Linear(5, 3), nn.Tanh()), V, BOTH),
    "an activation first": (lambda: nn.Sequential(nn.Tanh(), nn.Linear(5, 3)), V, BOTH),
    "an activation used twice": (lambda: vectors(*[nn.Tanh()] * 2), V, BOTH),
    "Dropout in evaluation": (lambda: vectors(nn.Dropout(0.5), nn.Tanh()), V, BOTH),
    "Linear at positions": (lambda: after([nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)], *Q), Q, BOTH),
    "Conv1d": (lambda: lines(nn.Conv1d(4, 4, 2, stride=2, dilation=2, groups=2)), L, BOTH),
    "Conv2d": (lambda: images(nn.Conv2d(4, 4, 3, padding=1)), M, BOTH),
    "Conv2d in groups": (lambda: images(nn.Conv2d(4, 4, 2, stride=2, dilation=2, groups=2)), M, BOTH),
    "Conv3d": (lambda: volumes(nn.Conv3d(2, 2, 2, stride=2)), S, BOTH),
    "Conv3d and Tanh": (lambda: volumes(nn.Tanh()), S, BOTH),
    "ConvTranspose1d": (lambda: lines(nn.ConvTranspose1d(4, 4, 3, groups=2)), L, BOTH),
    "ConvTranspose2d": (lambda: images(nn.ConvTranspose2d(4, 3, 2, stride=2, padding=1)), M, BOTH),
    "ConvTranspose3d": (lambda: volumes(nn.ConvTranspose3d(2, 2, 2)), S, BOTH),
    "MaxPool1d": (lambda: lines(nn.MaxPool1d(2)), L, BOTH),
    "MaxPool2d": (lambda: images(nn.MaxPool2d(3, 2, 1, ceil_mode=True)), M, BOTH),
    "MaxPool3d": (lambda: volumes(nn.MaxPool3d(2)), S, BOTH),
    "AvgPool1d": (lambda: lines(nn.AvgPool1d(2)), L, BOTH),
    "AvgPool2d": (lambda: images(nn.AvgPool2d(2, padding=1)), M, BOTH),
    "AvgPool3d": (lambda: volumes(nn.AvgPool3d(2)), S, BOTH),
    "AdaptiveAvgPool1d": (lambda: lines(nn.AdaptiveAvgPool1d(2)), L, BOTH),
    "AdaptiveAvgPool2d": (lambda: images(nn.AdaptiveAvgPool2d(2)), M, BOTH),
    "AdaptiveAvgPool3d": (lambda: volumes(nn.AdaptiveAvgPool3d(1)), S, BOTH),
    "ZeroPad2d": (lambda: images(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(4, 2, 3)), M, BOTH),
    "Pad": (lambda: images(custom("Pad", (1, 2, 0, 1), value=2.0), nn.Conv2d(4, 2, 3)), M, BOTH),
    "Slicing": (lambda: images(custom("Slicing", (slice(None), slice(1, 3))), nn.Conv2d(2, 2, 3)), M, BOTH),
    "Identity": (lambda: vectors(nn.Identity(), nn.Tanh()), V, GGN),
    "BatchNorm1d": (lambda: vectors(nn.BatchNorm1d(4), nn.Tanh()), V, GGN),
    "BatchNorm2d": (lambda: images(nn.BatchNorm2d(4)), M, GGN),
    "BatchNorm3d": (lambda: volumes(nn.BatchNorm3d(2)), S, GGN),
    "ScaleModule": (lambda: vectors(custom("ScaleModule", 2.0)), V, GGN),
    "SumModule": (lambda: vectors(custom("Parallel", nn.Linear(4, 4), nn.Identity())), V, GGN),
    "Permute": (lambda: after([nn.Linear(4, 3), custom("Permute", 0, 2, 1), nn.Linear(5, 2)], *Q), Q, GGN),
    "RNN": (lambda: recurrent(nn.RNN), Q, GGN),
    "RNN of two layers": (lambda: recurrent(nn.RNN, num_layers=2), Q, GGN),
    "LSTM": (lambda: recurrent(nn.LSTM), Q, GGN),
    "Embedding": (lambda: nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3)), (0,), GGN),
    "GELU": (lambda: vectors(nn.GELU()), V, NONE),
    "LayerNorm": (lambda: vectors(nn.LayerNorm(4)), V, NONE),
    "Conv2d, padding by name": (lambda: images(nn.Conv2d(4, 4, 3, padding="same")), M, NONE),
    "ConvTranspose1d, stride": (
        lambda: lines(nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1, output_padding=1)),
        L,
        NONE,
    ),
    "AvgPool2d, ceil_mode": (lambda: images(nn.AvgPool2d(3, ceil_mode=True)), M, NONE),
    "AvgPool2d, count_include_pad": (lambda: images(nn.AvgPool2d(2, padding=1, count_include_pad=False)), M, NONE),
    "AdaptiveAvgPool2d, uneven": (lambda: images(nn.AdaptiveAvgPool2d(3)), M, NONE),
    "Pad by reflection": (lambda: images(custom("Pad", (1, 1, 1, 1), mode="reflect")), M, NONE),
    "BatchNorm1d without factors": (lambda: vectors(nn.BatchNorm1d(4, affine=False)), V, NONE),
    "RNN, ReLU": (lambda: recurrent(nn.RNN, nonlinearity="relu"), Q, NONE),
    "RNN without biases": (lambda: recurrent(nn.RNN, bias=False), Q, NONE),
    "RNN in both directions": (lambda: recurrent(nn.RNN, bidirectional=True), Q, NONE),
    "Embedding with padding": (
        lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Flatten(), nn.Linear(20, 3)),
        (0,),
        NONE,
    ),
}
"""Model, shape of an example ((0,): five indices), and the extensions that are right; the others refuse."""
QUICK = (
    "Tanh",
    "an activation used twice",
    "Linear at positions",
    "Conv2d",
    "MaxPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "SumModule",
)
QUICK += ("RNN of two layers", "Embedding", "GELU", "Conv2d, padding by name", "RNN, ReLU")
WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "padding_mode": (
        lambda: images(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
        r"2 \(Conv2d\) has padding_mode='circular'; BackPACK does not look at that, and takes 'zeros'\. Use ",
    ),
    "divisor_override": (
        lambda: images(nn.AvgPool2d(2, divisor_override=3)),
        r"2 \(AvgPool2d\) has divisor_override=3; BackPACK does not look at that, and takes None\. Use ",
    ),
}
"""Layers that BackPACK computes wrongly, without a word."""


def of(make: Callable[[], nn.Module], shape: tuple[int, ...] = V, loss: Any = F.cross_entropy) -> Objective:
    """Three examples in batches of two and one."""
    with seeded(1):
        model = make().double().eval()
        for statistic in model.buffers():
            if statistic.is_floating_point():
                nn.init.uniform_(statistic, 0.5, 2.0)
    x = classes(N, 5, num=7) if shape == (0,) else normal(N, *shape)
    return Objective(model, loss, cut((2, 1), x, classes(N, num=3, seed=2)))


def whole(objective: Objective) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in objective.batches]), torch.cat([y for _, y in objective.batches])


def true_hessian(objective: Objective, loss: Any = F.cross_entropy) -> Tensor:
    x, y = whole(objective)
    return dense(objective.model, lambda call: loss(call(x), y)).hessian.diagonal()


def true_ggn(objective: Objective, loss: Any = F.cross_entropy) -> Tensor:
    """J'H_out J, dense."""
    (x, y), model = whole(objective), objective.model
    names, sizes = [name for name, _ in model.named_parameters()], [p.numel() for p in model.parameters()]
    shapes = [p.shape for p in model.parameters()]

    def outputs(flat: Tensor) -> Tensor:
        named = {name: piece.view(shape) for name, piece, shape in zip(names, flat.split(sizes), shapes, strict=True)}
        return functional_call(model, named, (x,))

    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    z = outputs(theta)
    J = torch.autograd.functional.jacobian(outputs, theta).reshape(z.numel(), -1)
    H: Any = torch.autograd.functional.hessian(lambda out: loss(out, y), z.detach())
    return torch.einsum("ij,ik,kj->j", J, H.reshape(z.numel(), -1), J)


def flat(objective: Objective, extension: Extension, **options: Any) -> Tensor:
    return objective.parameters.flatten(BackPACK(extension, **options).estimate(objective, seed=4).values)


def hold_a_layer_against_the_truth(name: str):
    make, shape, right = LAYERS[name]
    objective = of(make, shape)
    for extension, truth in (("DiagHessian", true_hessian), ("DiagGGNExact", true_ggn)):
        if extension in right:
            assert relative(flat(objective, extension), truth(objective)) <= EXACT
        else:
            with pytest.raises(UnsupportedModel, match=r"^BackPACK\('Diag.*Use (Exact\('ggn'\)|ExampleHutchinson)"):
                flat(objective, extension)
    if (
        "DiagGGNExact" in right and "RNN" not in name and name != "LSTM"
    ):  # Fisher itself, since it draws the same targets
        values = flat(objective, "DiagGGNMC", num_samples=2)
        assert relative(values, objective.parameters.flatten(Fisher(2).estimate(objective, seed=4).values)) <= EXACT


@pytest.mark.parametrize("name", QUICK)
def test_layers_are_right_or_refused(name: str):
    hold_a_layer_against_the_truth(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in QUICK])
def test_all_layers_are_right_or_refused(name: str):
    hold_a_layer_against_the_truth(name)


class Net(nn.Module):
    """A forward pass that is written out, over layers that are given by name."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Chain(nn.Sequential):
    """A Sequential whose forward pass does more, unseen."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.run = run

    def forward(self, input: Tensor) -> Tensor:
        return self.run(self, input)


def test_models_that_are_written_out_go_through_the_converter():
    """Skip connections have a rule in the GGN's extensions alone; an unused parameter has a zero diagonal."""
    plain = of(
        lambda: Net(
            lambda s, x: s.b(s.t(s.a(x))), a=nn.Linear(5, 4), t=nn.Tanh(), b=nn.Linear(4, 3), idle=nn.Linear(2, 2)
        )
    )
    found = BackPACK("DiagHessian").estimate(plain).values
    assert relative(plain.parameters.flatten(found), true_hessian(plain)) <= EXACT
    assert not found["idle.weight"].any()
    skip = of(lambda: Net(lambda s, x: s.b(s.t(s.a(x)) + 2.0 * x), a=nn.Linear(5, 5), t=nn.Tanh(), b=nn.Linear(5, 3)))
    assert relative(flat(skip, "DiagGGNExact"), true_ggn(skip)) <= EXACT
    with pytest.raises(
        UnsupportedModel, match=r"\((Sum|Scale)Module\) is a module without a rule; .* Use ExampleHutchinson"
    ):
        flat(skip, "DiagHessian")


def layer(**more: Any) -> dict[str, Any]:
    return {"a": nn.Linear(5, 5), "b": nn.Linear(5, 3), **more}


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    return model


def hooked(register: str, hook: Callable[..., Any]) -> nn.Module:
    model = vectors(nn.ReLU())
    getattr(model[1], register)(hook)
    return model


def normalised() -> nn.Module:
    model = vectors(nn.Tanh())
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def pruned() -> nn.Module:
    model = vectors(nn.Tanh())
    prune.l1_unstructured(model[0], "weight", amount=5)
    return model


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


def added_in_place(s: Any, x: Tensor) -> Tensor:
    h = s[1](s[0](x))
    g = s[2](h)
    g += h
    return s[3](g)


UNSEEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tied weights": (
        tied,
        "2.weight and 0.weight are one tensor; of tied weights BackPACK keeps one use and drops the other. Use ",
    ),
    "a layer used twice": (
        lambda: Net(lambda s, x: s.b(torch.tanh(s.a(s.a(x)))), **layer()),
        r"a \(Linear\) is used 2 times; of several uses BackPACK keeps the last\. Use ",
    ),
    "a function": (
        lambda: Net(lambda s, x: s.b(F.relu(s.a(x))), **layer()),
        "the forward pass of Net uses relu outside of modules; BackPACK sees modules, and sums, .* Use ",
    ),
    "a parameter": (
        lambda: Net(lambda s, x: s.b(s.a(x) + s.p), **layer(p=nn.Parameter(torch.ones(5)))),
        "the forward pass of Net uses p outside of modules; ",
    ),
    "the mean over the batch": (
        lambda: Net(lambda s, x: s.b(s.a(x - x.mean(0))), **layer()),
        "uses mean, sub outside of modules; ",
    ),
    "two paths": (
        lambda: Net(lambda s, x: s.b(s.a(x)) if x.sum() > 0 else s.b(x), **layer()),
        r"BackPACK's converter cannot follow the forward pass of Net \(TraceError: .*\); it takes modules, sums, .* Use ",
    ),
    "a product": (
        lambda: Net(lambda s, x: s.b(s.a(x) * x), **layer()),
        r"cannot follow the forward pass of Net \(RuntimeError: Expecting types",
    ),
    "part of a tensor": (
        lambda: Net(lambda s, x: s.b(s.a(x)[:, :4]), a=nn.Linear(5, 5), b=nn.Linear(4, 3)),
        r"(BackPACK fails on a \(Linear\): RuntimeError: The size of tensor|gave nothing that fits for a\.weight)",
    ),
    "something after the last module": (
        lambda: Chain(lambda s, x: 2.0 * s[1](s[0](x)), nn.Linear(5, 4), nn.Linear(4, 3)),
        r"what 1 \(Linear\) gives does not go straight into another module: something is done to it in between, .*, or use ",
    ),
    "a sum in place": (
        lambda: Chain(added_in_place, nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)),
        "BackPACK fails on Chain: RuntimeError: Output 0 of BackwardHookFunction is a view",
    ),
    "a hook that changes an output": (
        lambda: hooked("register_forward_hook", lambda module, inputs, output: 2.0 * output),
        r"the diagonal of 0\.\w+ by BackPACK is not that of the model: on a few examples they differ by [1-9].* Use ",
    ),
    "a hook that changes an input": (
        lambda: hooked("register_forward_pre_hook", lambda module, inputs: (2.0 * inputs[0],)),
        r"what 0 \(Linear\) gives does not go straight into another module",
    ),
    "weight normalisation": (normalised, r"0\.parametrizations\.weight\.0 \(_WeightNorm\) is a module without a rule"),
    "pruning": (
        pruned,
        r"BackPACK gave nothing that fits for 0\.weight_orig, on which the loss depends: .*, or leave the parameter out",
    ),
    "a subclass of a layer": (
        lambda: nn.Sequential(Doubled(5, 4), nn.Linear(4, 3)),
        r"uses 0\.weight, 0\.bias, linear outside of modules",
    ),
}
"""Models that are more than their modules, and what is said of them."""


def hold_a_refusal_against_its_text(name: str, extension: Extension):
    make, text = UNSEEN[name]
    with pytest.raises(UnsupportedModel, match=text) as caught:
        BackPACK(extension).estimate(of(make), seed=0)
    instead = {"DiagHessian": "ExampleHutchinson", "DiagGGNExact": "Exact('ggn')", "DiagGGNMC": "Fisher"}[extension]
    assert str(caught.value).startswith(f"BackPACK('{extension}'): ")
    assert instead in str(caught.value)


@pytest.mark.parametrize(("name", "extension"), [(name, EXTENSIONS[i % 3]) for i, name in enumerate(UNSEEN)])
def test_what_backpack_does_not_see_is_refused_by_name(name: str, extension: Extension):
    hold_a_refusal_against_its_text(name, extension)


@pytest.mark.slow
@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("name", UNSEEN)
def test_each_extension_refuses_what_backpack_does_not_see(name: str, extension: Extension):
    hold_a_refusal_against_its_text(name, extension)


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("name", WRONG)
def test_options_that_backpack_does_not_look_at_are_refused(name: str, extension: Extension):
    with pytest.raises(UnsupportedModel, match=WRONG[name][1]):
        BackPACK(extension).estimate(of(WRONG[name][0], M), seed=0)


def by_hand(model: nn.Module, loss: nn.Module, few: Objective, extension: Extension) -> dict[str, Tensor]:
    """What BackPACK gives a user who refuses nothing."""
    library, (x, y) = Library(), few.batches[0]
    with library.extended(model, loss):
        library.backward(loss(model(x.clone().requires_grad_()), y), library.extension(extension))
    return {name: getattr(p, SAVED[extension]) for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["tied weights", "ignored targets", "padding_mode", "divisor_override"])
def test_the_comparison_finds_what_backpack_gets_wrong(name: str):
    """Without knowing of it: BackPACK's numbers of these models are 7 % and more off, and it says nothing."""
    make, shape = (WRONG[name][0], M) if name in WRONG else (tied, V)
    if name == "ignored targets":
        make = lambda: vectors(nn.Tanh())  # noqa: E731
    objective = of(make, shape)
    if name == "ignored targets":
        (x, _), _ = objective.batches
        objective = objective.with_batches([(x, torch.tensor([1, -100]))])
    few = few_rows(objective)[0]
    for extension, refuse in (("DiagHessian", refuse_other_hessian), ("DiagGGNExact", refuse_other_squares)):
        found = by_hand(
            objective.converted(dtype=torch.float32).converted(dtype=torch.float64).model,
            nn.CrossEntropyLoss(),
            few,
            extension,
        )
        kept = {entry: found[entry] for entry in objective.parameters.names}
        options = {"seed": 0} if extension == "DiagHessian" else {}
        with pytest.raises(UnsupportedModel, match="by BackPACK is not that of the model"):
            refuse(extension, few, kept, **options)


def test_another_gradient_is_found():
    objective = of(lambda: vectors(nn.Tanh()))
    truth, other = objective.gradient(), objective.gradient()
    refuse_other_gradient("DiagGGNMC", objective, truth, truth)
    other[0] += 1e-3 * other.abs().max()
    with pytest.raises(
        UnsupportedModel,
        match=r"the gradient of 0\.weight by BackPACK is not that of the model: on all the data they .* Use Fisher",
    ):
        refuse_other_gradient("DiagGGNMC", objective, other, truth)


def convolved() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Conv1d(4, 3, 1))


LOSSES: dict[str, tuple[Callable[[], nn.Module], Any, Tensor, Tensor]] = {
    "squared error": (lambda: vectors(nn.Tanh()), F.mse_loss, normal(N, 5), normal(N, 3, seed=1)),
    "a sum": (lambda: vectors(nn.Tanh()), nn.CrossEntropyLoss(reduction="sum"), normal(N, 5), classes(N, num=3)),
    "label smoothing": (
        lambda: vectors(nn.Tanh()),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        normal(N, 5),
        classes(N, num=3),
    ),
    "coins": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)),
        F.binary_cross_entropy_with_logits,
        normal(N, 5),
        classes(N, 1, num=2).double(),
    ),
    "classes at positions": (convolved, F.cross_entropy, normal(N, 2, 5), classes(N, 3, num=3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_uneven_batches(name: str):
    """Batches of two and one weigh by their terms."""
    make, loss, x, y = LOSSES[name]
    with seeded(1):
        model = make().double()
    objective = Objective(model, loss, cut((2, 1), x, y))
    assert relative(flat(objective, "DiagHessian"), true_hessian(objective, loss)) <= EXACT
    assert relative(flat(objective, "DiagGGNExact"), true_ggn(objective, loss)) <= EXACT
    assert (
        relative(
            flat(objective, "DiagGGNMC"), objective.parameters.flatten(Fisher().estimate(objective, seed=4).values)
        )
        <= EXACT
    )


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "ignored targets": (
        F.cross_entropy,
        (normal(N, 5), torch.tensor([0, -100, 2])),
        r"1 of 3 targets of batch 0 are ignored \(-100\), and BackPACK would count them .*\. Use ",
    ),
    "ignored by another value": (
        nn.CrossEntropyLoss(ignore_index=1),
        (normal(N, 5), torch.tensor([0, 1, 1])),
        r"2 of 3 targets of batch 0 are ignored \(1\)",
    ),
    "class weights": (
        nn.CrossEntropyLoss(weight=torch.ones(3).double()),
        (normal(N, 5), classes(N, num=3)),
        r"the loss cross_entropy\(weight=\.\.\.\) has weight, for which BackPACK has no second derivative\. Use .*, or take",
    ),
    "probabilities": (
        F.cross_entropy,
        (normal(N, 5), normal(N, 3).softmax(1)),
        "the targets of batch 0 are probabilities, and BackPACK takes them to add up to one without looking. Use ",
    ),
    "another loss": (
        F.huber_loss,
        (normal(N, 5), normal(N, 3)),
        "BackPACK has no second derivative of the loss huber_loss. It knows cross_entropy, mse_loss and .* Use ",
    ),
    "a loss of the user's": (
        lambda z, y: F.cross_entropy(z, y),
        (normal(N, 5), classes(N, num=3)),
        "no second derivative of the loss <lambda>",
    ),
    "several coins": (
        F.binary_cross_entropy_with_logits,
        (normal(N, 5), classes(N, 3, num=2).double()),
        r"the model gave \(1, 3\), and BackPACK's BCEWithLogitsLoss takes \[N, 1\]\. Use ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_losses_and_targets_that_backpack_gets_wrong_are_refused_by_name(name: str):
    loss, batch, text = REFUSED[name]
    with seeded(1):
        objective = Objective(vectors(nn.Tanh()).double(), loss, [batch])
    for extension in EXTENSIONS:
        with pytest.raises(UnsupportedModel, match=text):
            BackPACK(extension).estimate(objective)
        with pytest.raises(UnsupportedModel, match=text):
            BackPACK(extension).expected(objective)


def test_shapes_and_inputs_that_backpack_does_not_take_are_refused_by_name():
    with seeded(1):
        line, both = nn.Conv1d(2, 3, 1).double(), nn.Bilinear(5, 5, 3).double()
        words, one = nn.Embedding(4, 3).double(), nn.Linear(5, 3).double()
    with pytest.raises(
        UnsupportedModel,
        match=r"the model gave \(1, 3, 4\), and BackPACK's MSELoss takes \[N, D\]\. Use Exact\('ggn'\)",
    ):
        BackPACK("DiagGGNExact").estimate(Objective(line, F.mse_loss, [(normal(N, 2, 4), normal(N, 3, 4))]))
    data = [(normal(N, 5), normal(N, 5, seed=1), classes(N, num=3))]
    with pytest.raises(
        UnsupportedModel, match=r"batch 0 gives the model several inputs \(a tensor, a tensor\); .* Use Fisher, or wrap"
    ):
        BackPACK("DiagGGNMC").estimate(Objective(both, F.cross_entropy, data), seed=0)
    with pytest.raises(UnsupportedModel, match="BackPACK has no second derivative of the loss token_cross_entropy"):
        BackPACK().estimate(Objective(words, token_cross_entropy, [(classes(N, 2, num=4), classes(N, 2, num=3))]))
    with pytest.raises(
        UnsupportedModel,
        match=r"the tensors of batch 0 differ in dimension 0, in which BackPACK takes the examples to lie",
    ):
        BackPACK().estimate(
            Objective(nn.Sequential(nn.Flatten(0), one), F.cross_entropy, [(normal(1, 5), torch.tensor(1))])
        )


def test_modules_in_training_are_refused():
    for active, text in (
        (nn.Dropout(0.5), r"1 \(Dropout\) is active"),
        (nn.BatchNorm1d(4), r"1 \(BatchNorm1d\) is in training mode"),
    ):
        objective = Objective(vectors(active).double().train(), F.cross_entropy, [(normal(N, 5), classes(N, num=3))])
        with pytest.raises(UnsupportedModel, match=text):
            BackPACK("DiagGGNExact").estimate(objective)


def test_some_parameters():
    """By patterns, and frozen ones."""
    with seeded(1):
        model = vectors(nn.Tanh(), nn.Linear(4, 4), nn.Tanh()).double()
    model[0].requires_grad_(False)
    x, y = normal(N, 5), classes(N, num=3)
    found = BackPACK("DiagHessian").estimate(Objective(model, F.cross_entropy, [(x, y)], "2.*"))
    truth = dense(model, lambda call: F.cross_entropy(call(x), y), keep=lambda name: name.startswith("2."))
    assert list(found.values) == ["2.weight", "2.bias"]
    assert relative(torch.cat([v.reshape(-1) for v in found.values.values()]), truth.hessian.diagonal()) <= EXACT
    assert model[4].weight.requires_grad


def test_precision_of_the_model():
    """Float32 to its rounding; bfloat16 is raised to float32 on a copy."""
    objective = of(lambda: images(nn.MaxPool2d(2)), M)
    truth = objective.parameters.unflatten(true_hessian(objective))
    single = BackPACK().estimate(objective.converted(dtype=torch.float32))
    for name, value in single.values.items():
        assert value.dtype == torch.float32
        assert (value - truth[name]).abs().max() <= 1e-5 * truth[name].abs().max()  # 100 eps
    half = BackPACK("DiagGGNExact").estimate(objective.converted(dtype=torch.bfloat16))
    assert {value.dtype for value in half.values.values()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_device_gives_the_same_numbers(extension: Extension):
    objective = of(lambda: images(nn.AvgPool2d(2)), M)
    found = BackPACK(extension).estimate(objective.converted(device="cuda"), seed=4).values
    assert {value.device.type for value in found.values()} == {"cuda"}
    on_cpu = torch.cat([value.cpu().reshape(-1) for value in found.values()])
    assert relative(on_cpu, flat(objective, extension)) <= EXACT


def test_draws_are_owned_and_doubted():
    """Same seed, same bits, whatever the runs of rows; the standard errors fit the spread about the exact diagonal."""
    objective = of(lambda: vectors(nn.Tanh()))
    before = torch.get_rng_state()
    found = BackPACK("DiagGGNMC", num_samples=30).estimate(objective, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    again, other = (BackPACK("DiagGGNMC", num_samples=30).estimate(objective, seed=seed) for seed in (3, 4))
    truth, stderr = objective.parameters.unflatten(true_ggn(objective)), found.stderr
    assert stderr is not None
    for name, value in found.values.items():
        assert torch.equal(value, again.values[name])
        assert not torch.equal(value, other.values[name])
        assert bool(((value - truth[name]).abs() <= 5 * stderr[name]).all())
    assert (found.matrix, found.samples, found.seed, found.sums is not None) == ("ggn", 30, 3, True)
    one = BackPACK("DiagGGNMC").estimate(objective, seed=3)
    assert one.stderr is not None
    assert all(bool(value.isnan().all()) for value in one.stderr.values())


def test_what_is_said_of_an_estimate():
    objective = of(lambda: vectors(nn.Tanh()), loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    for extension, matrix in (("DiagHessian", "hessian"), ("DiagGGNExact", "ggn"), ("DiagGGNMC", "ggn")):
        estimator = BackPACK(extension)
        found = estimator.estimate(objective, seed=0)
        assert found.matrix == estimator.matrix == matrix
        assert found.estimator == repr(estimator)
        assert found.cost.gradients == estimator.expected(objective).gradients
        assert found.cost.peak_bytes == estimator.expected(objective).peak_bytes(objective)
        assert (found.stderr is None) == (found.seed is None) == (extension != "DiagGGNMC")
        said = ("label smoothing 0.1 is left out: targets are drawn from the model as it is",)
        assert found.notes == (said if extension == "DiagGGNMC" else ())


def test_cost_is_counted_and_refused_above_a_limit():
    """One column for each output; two for each entry of an activation with a second derivative."""
    wide = of(lambda: nn.Sequential(nn.Linear(5, 60), nn.Tanh(), nn.Linear(60, 3)))
    bent = of(lambda: nn.Sequential(nn.Linear(5, 60), nn.ReLU(), nn.Linear(60, 3)))
    counted = [BackPACK(extension).expected(wide).gradients for extension in EXTENSIONS]
    assert counted == [3 + 3 + 120, 3 + 3, 3 + 1]
    assert BackPACK().expected(bent).gradients == 3 + 3
    assert BackPACK("DiagGGNMC", num_samples=5).expected(wide).gradients == 2 + 5 * 2
    [note] = BackPACK().estimate(wide).notes
    assert (
        note == "counted as the work of 126 gradients; cheaper: ExampleHutchinson, or Exact() where the model is small"
    )
    with pytest.raises(
        UnsupportedModel,
        match=r"the work of about 126 gradients of the data, one for each of 123 columns per example \(2 for each of 60 "
        r"entries of activations .*\), and max_gradients=100. Use ExampleHutchinson, .*, or set max_gradients higher",
    ):
        BackPACK(max_gradients=100).estimate(wide)


def test_what_does_not_fit_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("curvkit.estimators.expected.free_memory", lambda device: 1 << 20)
    with pytest.raises(
        UnsupportedModel,
        match=r"^BackPACK\('DiagHessian'\): needs about 8 MiB .*, and 1 MiB are free .* Use ExampleHutch",
    ):
        BackPACK().estimate(of(lambda: vectors(nn.Tanh())))


def test_batches_are_cut_where_columns_would_take_too_much(monkeypatch: pytest.MonkeyPatch):
    with seeded(1):
        model = vectors(nn.Tanh()).double()
    objective = Objective(model, F.cross_entropy, cut((5, 3), normal(8, 5), classes(8, num=3)))
    before = {extension: flat(objective, extension) for extension in EXTENSIONS}
    held = BackPACK().expected(objective).held_bytes - passes_module.BESIDE
    monkeypatch.setattr(passes_module, "CHUNK_BYTES", 4000)  # two rows of 11 columns of 5 float64, 4.5 times
    assert BackPACK().expected(objective).held_bytes - passes_module.BESIDE == held / 5 * 2
    for extension, value in before.items():
        assert relative(flat(objective, extension), value) <= EXACT


def test_less_is_taken_at_a_time_where_memory_runs_out():
    """A hook that stands for an allocator: the copy that BackPACK walks through gets two rows and no more, or nothing after some calls."""
    rows, most, calls = list[int](), 2, 100

    def allocate(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module._backward_hooks:
            rows.append(len(output))
            if len(output) > most or len(rows) > calls:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.")

    with seeded(1):
        model = vectors(nn.Tanh()).double()
    data = [(normal(4, 5), classes(4, num=3))]
    before = flat(Objective(model, F.cross_entropy, data), "DiagGGNMC")
    model[0].register_forward_hook(allocate)
    assert relative(flat(Objective(model, F.cross_entropy, data), "DiagGGNMC"), before) <= EXACT
    assert rows == [2, 4, 2, 2]
    most, calls = 4, len(rows) + 2  # those that are compared, and no more
    with pytest.raises(
        CurvkitError, match=r"BackPACK\('DiagGGNMC'\): out of memory with the 1 columns of one example\. Use Fisher\."
    ):
        flat(Objective(model, F.cross_entropy, data).cut(2)[0], "DiagGGNMC")


MEASURED = """
import threading, torch
import torch.nn.functional as F
from torch import nn
from curvkit import Objective
from curvkit.estimators import BackPACK
def resident():
    with open("/proc/self/statm") as told:
        return int(told.read().split()[1]) * 4096
torch.set_num_threads(1)
few = Objective(nn.Linear(2, 2), F.cross_entropy, [(torch.rand(3, 2), torch.tensor([0, 1, 0]))])
image = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.AvgPool2d(12), nn.Flatten(), nn.Linear(64, 10))
bent = nn.Sequential(nn.Linear(100, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
for model, x in ((image, torch.rand(64, 3, 16, 16)), (bent, torch.rand(512, 100))):
    objective = Objective(model, F.cross_entropy, [(x, torch.randint(10, (len(x),)))])
    estimator, peak, done = BackPACK("DiagHessian"), 0, threading.Event()
    estimator.estimate(few), objective.gradient()
    stated, before = estimator.expected(objective).peak_bytes(objective), resident()
    def watch():
        global peak
        while not done.wait(0.002):
            peak = max(peak, resident())
    watching = threading.Thread(target=watch)
    watching.start()
    estimator.estimate(objective)
    done.set(), watching.join()
    print(stated, peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_below_what_was_stated():
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, timeout=300, check=True)
    for line in done.stdout.splitlines():
        stated, seen = map(int, line.split())
        assert stated / 20 <= seen <= stated, line  # the count is an upper bound, and no idle one
    assert len(done.stdout.splitlines()) == 2


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ArithmeticError("in the backward pass")


def library_state() -> tuple[Any, ...]:
    import backpack

    context = backpack.CTX
    held = context.active_exts, context.debug, context.extension_hook, context.retain_graph, backpack.disable.store_io
    return (*held, context.hook_handles, list(context.hook_handles), torch.get_default_dtype())


def everything(model: nn.Module) -> dict[str, Any]:
    """What could have changed, with attributes of modules and parameters."""
    attributes = {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}
    marks = {name: sorted(vars(p)) for name, p in model.named_parameters()}
    return {**surroundings(model), "attributes": attributes, "marks": marks, "library": library_state()}


def raising_in(place: str) -> tuple[nn.Module, Any, type[Exception], str]:
    model, loss = vectors(nn.Tanh(), nn.ReLU(inplace=False)), F.cross_entropy
    calls = list[int]()

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Any:
        calls.append(len(output))
        late = len(calls) > int(place[-1]) if place[-1].isdigit() else True
        if late and place.startswith("forward"):
            raise ArithmeticError("in the forward pass")
        return Failing.apply(output) if late and place.startswith("backward") else None

    if place.startswith(("forward", "backward")):
        model[1].register_forward_hook(hook)
    return model, loss, (CurvkitError, ArithmeticError), "in the (forward|backward) pass"  # pyright: ignore


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize(
    "place", ["nowhere", "forward", "forward 3", "forward 6", "backward", "backward 3", "loss", "BackPACK"]
)
def test_nothing_is_disturbed_also_when_it_raises(place: str, extension: Extension):
    """The model's own errors come as they are; those on the copy name it."""
    with seeded(1):
        model, loss, kinds, text = raising_in(place)
        if place == "BackPACK":
            model, text = (
                Chain(lambda s, x: 2.0 * s[1](s[0](x)), nn.Linear(5, 4), nn.Linear(4, 3)),
                "does not go straight into",
            )
    model.double()
    fill_gradients(model)
    y = classes(4, num=3) + (10 if place == "loss" else 0)
    objective = Objective(model, loss, cut((3, 1), normal(4, 5), y))
    before = everything(model)
    if place == "nowhere":
        BackPACK(extension).estimate(objective, seed=0)
    elif place == "loss":
        with pytest.raises(UnknownObjective, match="no class"):
            BackPACK(extension).estimate(objective, seed=0)
    else:
        with pytest.raises(kinds, match=text):
            BackPACK(extension).estimate(objective, seed=0)
    assert everything(model) == before


def test_a_session_with_backpack_of_the_users_own_goes_on():
    """Its hooks and active extensions stay; a model that carries its hooks is refused, and one that merely did so once is not."""
    import backpack

    with seeded(1):
        own, model = nn.Sequential(nn.Linear(5, 3)), vectors(nn.Tanh())
    lossy, x, y = backpack.extend(nn.CrossEntropyLoss()), normal(N, 5, dtype=torch.float32), classes(N, num=3)
    backpack.extend(own)
    backpack.extend(model)
    try:
        with pytest.raises(UnsupportedModel, match="has a backward hook, which would change the derivatives"):
            BackPACK().estimate(Objective(model, F.cross_entropy, [(x, y)]))
        for module in model:
            module._backward_hooks.clear()
            module._forward_hooks.clear()
        with backpack.backpack(backpack.extensions.BatchGrad()), backpack.disable():
            before = everything(model)
            found = BackPACK().estimate(Objective(model, F.cross_entropy, [(x, y)]))
            assert everything(model) == before
        assert all(bool(value.any()) for value in found.values.values())
        with backpack.backpack(backpack.extensions.BatchGrad()):
            lossy(own(x.requires_grad_()), y).backward()
        assert own[0].weight.grad_batch.shape == (N, 3, 5)
    finally:
        backpack.CTX.remove_hooks()


def test_a_model_that_cannot_be_copied_is_refused():
    class Held(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(5, 3))
            self.held = [nn.Linear(1, 1), (value for value in range(3))]

    with pytest.raises(
        UnsupportedModel, match=r"Held cannot be copied: 'held' \(list\): cannot pickle 'generator' object"
    ):
        BackPACK().estimate(
            Objective(Held(), F.cross_entropy, [(normal(N, 5, dtype=torch.float32), classes(N, num=3))])
        )


def test_numbers_that_are_not_finite_are_refused():
    model = vectors(nn.Tanh()).double()
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    with pytest.raises(
        CurvkitError, match=r"BackPACK\('DiagHessian'\): the gradient of 0.weight has NaN or infinite entries"
    ):
        BackPACK().estimate(Objective(model, F.cross_entropy, [(normal(N, 5), classes(N, num=3))]))


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_the_package_is_absent(extension: Extension, monkeypatch: pytest.MonkeyPatch):
    objective = Objective(nn.Linear(5, 3).double(), F.cross_entropy, [(normal(N, 5), classes(N, num=3))])
    monkeypatch.setitem(sys.modules, "backpack", None)
    text = r"the package backpack-for-pytorch is not installed, or cannot be imported .* Install it with: pip install 'curvkit\[backpack\]'"
    for ask in (BackPACK(extension).estimate, BackPACK(extension).expected):
        with pytest.raises(MissingExtra, match=text):
            ask(objective)
    monkeypatch.setitem(sys.modules, "backpack", types.ModuleType("backpack"))
    with pytest.raises(
        MissingExtra,
        match=r"the package backpack that is installed is another one\. Install it with: pip install 'curvkit",
    ):
        BackPACK(extension).estimate(objective)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"extension": "KFAC"},
            r"extension='KFAC' is not one of DiagHessian, DiagGGNExact, DiagGGNMC\. The default is DiagHessian",
        ),
        ({"extension": "DiagGGNMC", "num_samples": 0}, "num_samples=0 must be an integer >= 1. The default is 1"),
        ({"num_samples": 2}, "num_samples=2, but DiagHessian draws nothing. Leave it out, or use DiagGGNMC"),
        ({"max_gradients": 0}, r"max_gradients=0 must be a number > 0\. It is the most that the diagonal may cost"),
        ({"max_gradients": float("nan")}, "max_gradients=nan must be a number > 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], text: str):
    with pytest.raises(InvalidArgument, match=f"^BackPACK: {text}"):
        BackPACK(**options)
