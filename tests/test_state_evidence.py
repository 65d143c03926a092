"""Does a state belong to the parameters that its order says? True orders are believed, exchanged ones never."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr
from sklearn.datasets import load_digits
from torch import Tensor, nn

from curvkit.checkpoints import read
from curvkit.checkpoints.learning_rates import Rate
from curvkit.checkpoints.optimizer_state import OptimizerState, ParameterState, optimizer_state
from curvkit.measures.state_evidence import PAIR, TENSOR, Evidence, confirm, evidence
from curvkit.models import CharacterVocabulary, Decoder, random_windows, spaced_windows, topics_text
from curvkit.objectives import Objective

Batch = tuple[Tensor, Tensor]


def digits() -> tuple[Tensor, Tensor]:
    found: Any = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.data, dtype=torch.float32)[order] / 16, torch.tensor(found.target)[order]


def perceptron() -> nn.Module:
    layers = [module for _ in range(4) for module in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(64, 10))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.optim.Optimizer, Objective]:
    """A perceptron with four layers of one shape, after 200 steps of Adam on digits, and a part of that data."""
    x, y = digits()
    draw = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = perceptron()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    for _ in range(200):
        rows = torch.randint(1400, (32,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), optimizer, Objective(model, F.cross_entropy, [(x[:256], y[:256])])


def stated(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerState:
    """As a checkpoint of positions says it."""
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path / "ckpt.pt")
    state = optimizer_state(read(path / "ckpt.pt"), {name: p.shape for name, p in model.named_parameters()})
    assert isinstance(state, OptimizerState)
    assert not state.certain
    return state


def moved(state: OptimizerState, order: Mapping[str, str]) -> OptimizerState:
    """What would be read had the optimizer been made with its parameters in another order."""
    return replace(state, parameters={name: state.parameters[order.get(name, name)] for name in state.parameters})


def test_the_order_of_a_real_run_is_believed(tmp_path: Path, trained: tuple[Any, Any, Objective]):
    model, optimizer, objective = trained
    before = [p.clone() for p in model.parameters()]
    assert confirm(stated(tmp_path, model, optimizer), objective) is None
    in_batches = objective.with_batches(
        [(x, y) for x, y in zip(*map(lambda t: t.split(64), objective.batches[0]), strict=True)]
    )
    assert confirm(stated(tmp_path, model, optimizer), in_batches) is None
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_no_exchange_of_two_tensors_is_believed(tmp_path: Path, trained: tuple[Any, Any, Objective]):
    model, optimizer, objective = trained
    state = stated(tmp_path, model, optimizer)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    pairs = [(a, b) for a, b in itertools.combinations(shapes, 2) if shapes[a] == shapes[b]]
    assert len(pairs) == 12
    for a, b in pairs:
        reason = confirm(moved(state, {a: b, b: a}), objective)
        assert reason is not None
        assert f"{a!r} and {b!r}" in reason
        assert "in another order than the model's parameters" in reason


@pytest.mark.parametrize("way", ["shifted", "reversed"])
def test_no_other_order_is_believed(tmp_path: Path, trained: tuple[Any, Any, Objective], way: str):
    model, optimizer, objective = trained
    names = [f"{index}.{part}" for part in ("weight", "bias") for index in (0, 2, 4, 6)]
    weights, biases = names[:4], names[4:]
    others = [list(reversed(part)) if way == "reversed" else [*part[1:], part[0]] for part in (weights, biases)]
    order = dict(zip(names, [*others[0], *others[1]], strict=True))
    assert "in another order" in str(confirm(moved(stated(tmp_path, model, optimizer), order), objective))


def test_an_optimizer_that_was_made_backwards(tmp_path: Path):
    x, y = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False))
    optimizer = torch.optim.RMSprop(list(model.parameters())[::-1], lr=1e-3)  # its shapes fit in this order, too
    for start in range(0, 1280, 32):
        optimizer.zero_grad()
        F.cross_entropy(model(x[start : start + 32]), y[start : start + 32]).backward()
        optimizer.step()
    objective = Objective(model, F.cross_entropy, [(x[:256], y[:256])])
    assert "in another order" in str(confirm(stated(tmp_path, model, optimizer), objective))


def alone(value: Tensor) -> dict[str, Tensor]:
    return {"second": value}


def lognormal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()


def test_the_score_of_two_vectors_is_that_of_their_correlation():
    v, s = [lognormal(40, seed=i) for i in range(2)], [lognormal(40, seed=2 + i) for i in range(2)]
    s = [one * other for one, other in zip(v, s, strict=True)]
    found = evidence({"a": alone(v[0]), "b": alone(v[1])}, {"a": s[0], "b": s[1]})
    r = pearsonr((v[0] / v[1]).log().numpy(), (s[0] / s[1]).log().numpy()).statistic
    expected = math.atanh(r) * math.sqrt(37)
    assert found.pair == pytest.approx(expected, rel=1e-9)  # float64 on both sides
    assert found.tensor == pytest.approx(expected, rel=1e-9)  # of two tensors each is compared with the other alone
    assert found.names == ("a", "b")
    swapped = evidence({"a": alone(v[1]), "b": alone(v[0])}, {"a": s[0], "b": s[1]})
    assert swapped.pair == pytest.approx(-expected, rel=1e-9)


def test_rows_and_columns_are_scored_apart():
    v, noise = [lognormal(30, 20, seed=i) for i in range(2)], [lognormal(30, 20, seed=2 + i) for i in range(2)]
    s = [one * other for one, other in zip(v, noise, strict=True)]
    found = evidence({"a": alone(v[0]), "b": alone(v[1])}, {"a": s[0], "b": s[1]})
    scores = []
    for dim, n in ((1, 30), (0, 20)):
        sums = [tensor.sum(dim).log().numpy() for tensor in (*v, *s)]
        scores.append(math.atanh(pearsonr(sums[0] - sums[1], sums[2] - sums[3]).statistic) * math.sqrt(n - 3))
    assert found.pair == pytest.approx(sum(scores) / math.sqrt(2), rel=1e-9)


def test_states_without_relation_have_scores_of_a_normal_distribution():
    scores = [
        evidence(
            {name: alone(lognormal(24, 16, seed=4 * i + j)) for j, name in enumerate("ab")},
            {name: lognormal(24, 16, seed=4 * i + 2 + j) for j, name in enumerate("ab")},
        ).pair
        for i in range(400)
    ]
    values = torch.tensor(scores)
    assert abs(float(values.mean())) < 5 / math.sqrt(400)  # five standard errors of a mean of 400 standard normals
    assert abs(float(values.std()) - 1) < 5 / math.sqrt(2 * 400)  # and of their standard deviation


def test_levels_tell_tensors_of_few_entries_apart_once_their_noise_is_known():
    levels = [1e-8, 1e-5, 1e-2, 1e1, 1e4]
    moments = {name: alone(torch.full((2,), level)) for name, level in zip("abcde", levels, strict=True)}
    squares = {name: torch.full((2,), 3 * level) for name, level in zip("abcde", levels, strict=True)}
    assert evidence(moments, squares).reason is None
    few = {name: moments[name] for name in "abcd"}
    assert evidence(few, squares).pair == 0.0
    assert evidence({**moments, "a": moments["b"], "b": moments["a"]}, squares).pair < 0.0


def test_what_is_said():
    assert Evidence(PAIR + 0.1, ("a", "b"), TENSOR + 0.1, "a").reason is None
    weak = "the optimizer's state has no names, and its second moments do not tell"
    assert Evidence(PAIR, ("a", "b"), 9.0, "a").reason == f"{weak} 'a' and 'b' apart"
    assert Evidence(2.0, ("a", "b"), TENSOR, "c").reason == f"{weak} 'c' and others of its shape apart"
    assert str(Evidence(-5.0, ("a", "b"), 1.0, "a").reason).startswith(
        "the optimizer's state seems to be in another order than the model's parameters: the second moments at 'a' and 'b' fit"
    )


def by_hand(**tensors: Mapping[str, Tensor]) -> OptimizerState:
    parameters = {name.replace("_", "."): ParameterState(0, held, {"step": 1.0}) for name, held in tensors.items()}
    return OptimizerState(
        "Adam", ({"lr": 0.1},), parameters, "order of the module", False, (Rate("current", (0.1,), ""),)
    )


def two_layers(**options: Any) -> Objective:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Tanh(), nn.Linear(5, 5, bias=False))
    x = torch.arange(40.0).reshape(8, 5).sin()
    return Objective(model, F.mse_loss, [(x, x.cos())], **options)


HELD = {"exp_avg_sq": torch.ones(5, 5)}


def test_states_that_cannot_be_tested():
    nothing = "the optimizer's state has no names, and no second moments by which its order could be tested"
    assert confirm(by_hand(**{"0_weight": {}, "2_weight": {}}), two_layers()) == nothing
    said = confirm(by_hand(**{"0_weight": HELD}), two_layers())
    assert (
        said
        == "the optimizer's state has no names, and '2.weight', which it seems not to have trained, has the shape of others"
    )
    said = confirm(by_hand(**{"0_weight": HELD, "2_weight": HELD}), two_layers(parameters="0.*"))
    assert (
        said
        == "the optimizer's state has no names, and '2.weight', of which it is part, was left out of the measurement"
    )
    said = confirm(by_hand(**{"0_weight": HELD, "2_weight": HELD}), two_layers())  # moments that are all the same
    assert (
        said == "the optimizer's state has no names, and its second moments do not tell '0.weight' and '2.weight' apart"
    )


@pytest.mark.parametrize(
    ("scale", "text"), [(0.0, "gradients that are zero"), (math.inf, "gradients that are not finite")]
)
def test_gradients_that_say_nothing(scale: float, text: str):
    objective = two_layers()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * scale).sum() if scale == 0.0 else (outputs - outputs.detach()).abs().sqrt().sum()

    objective = Objective(objective.model, loss, objective.data)
    assert str(confirm(by_hand(**{"0_weight": HELD, "2_weight": HELD}), objective)).endswith(text)


def test_a_certain_state_needs_no_evidence():
    state = replace(by_hand(**{"0_weight": HELD, "2_weight": HELD}), certain=True)
    assert confirm(state, two_layers()) is None


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.95, 0.999])
def test_a_language_model(tmp_path: Path, beta: float):
    text = topics_text()
    vocabulary = CharacterVocabulary.from_text(text)
    tokens, draw = vocabulary.encode(text), torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Decoder(vocabulary=len(vocabulary), width=64, depth=3, heads=4, context=48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, beta))
    for _ in range(500):
        x, y = random_windows(tokens, 48, 8, generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    x, y = spaced_windows(tokens, 48, 32)
    objective = Objective(model.eval(), cross_entropy, list(zip(x.split(1), y.split(1), strict=True)))
    state = stated(tmp_path, model, optimizer)
    assert confirm(state, objective) is None
    names = list(state.parameters)
    shapes = {name: tuple(held.tensors["exp_avg_sq"].shape) for name, held in state.parameters.items()}
    groups = [[name for name in names if shapes[name] == shape] for shape in set(shapes.values())]
    backwards = {a: b for group in groups for a, b in zip(group, reversed(group), strict=True)}
    assert "in another order" in str(confirm(moved(state, backwards), objective))
    q, k = "blocks.1.attention.query.weight", "blocks.1.attention.key.weight"
    assert confirm(moved(state, {q: k, k: q}), objective) is not None


def cross_entropy(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel()
