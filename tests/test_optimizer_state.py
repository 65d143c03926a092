"""The state of an optimizer under the names of a model: as the optimizer itself has it, or refused with its reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_samples import saved as distributed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from curvkit.checkpoints import Checkpoint, read, save
from curvkit.checkpoints.learning_rates import rates
from curvkit.checkpoints.optimizer_state import OptimizerState, Unassigned, optimizer_state
from curvkit.errors import InvalidArgument
from curvkit.models import GPT


class Tower(nn.Module):
    """Layers of one shape between others, with norms: what an order by position can get wrong."""

    def __init__(self, width: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(3, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(self.norm(x))


def tower(**sizes: int) -> Tower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tower(**sizes)


def distinct() -> nn.Module:
    """A model without two parameters of one shape."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        x = torch.arange(15.0).reshape(5, 3).sin()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return optimizer


def written(path: Path, model: nn.Module, optimizer: Any, **more: Any) -> Path:
    state = optimizer if isinstance(optimizer, Mapping) else optimizer.state_dict()
    torch.save({"model": model.state_dict(), "optimizer": state, **more}, path / "ckpt.pt")
    return path / "ckpt.pt"


def found(path: Path, model: nn.Module) -> OptimizerState:
    state = optimizer_state(read(path), shapes(model))
    assert isinstance(state, OptimizerState), state
    return state


def reason(path: Path, model: nn.Module) -> str:
    state = optimizer_state(read(path), shapes(model))
    assert isinstance(state, Unassigned)
    assert not state.reason.endswith(".")
    assert "\n" not in state.reason
    return state.reason


def is_the_optimizers(state: OptimizerState, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Every tensor is the one that the live optimizer keeps for the parameter of that name, and every group its group."""
    live = dict(model.named_parameters())
    groups = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    for name, held in state.parameters.items():
        own = optimizer.state[live[name]]
        tensors = {key for key, value in own.items() if isinstance(value, Tensor) and value.ndim}
        same = held.tensors.keys() == tensors and all(torch.equal(held.tensors[key], own[key]) for key in tensors)
        if not same or held.group != groups[id(live[name])]:
            return False
    return True


def changed(state: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    copy = {
        "state": {key: dict(entry) for key, entry in state["state"].items()},
        "param_groups": [dict(group) for group in state["param_groups"]],
    }
    change(copy)
    return copy


CLASSES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], set[str], set[str]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, {"momentum_buffer"}, set()),
    "Adam": (torch.optim.Adam, {}, {"exp_avg", "exp_avg_sq"}, {"step"}),
    "AdamW": (torch.optim.AdamW, {"amsgrad": True}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}, {"step"}),
    "NAdam": (torch.optim.NAdam, {}, {"exp_avg", "exp_avg_sq"}, {"step", "mu_product"}),
    "RAdam": (torch.optim.RAdam, {}, {"exp_avg", "exp_avg_sq"}, {"step"}),
    "Adamax": (torch.optim.Adamax, {}, {"exp_avg", "exp_inf"}, {"step"}),
    "RMSprop": (
        torch.optim.RMSprop,
        {"momentum": 0.9, "centered": True},
        {"square_avg", "momentum_buffer", "grad_avg"},
        {"step"},
    ),
    "Adagrad": (torch.optim.Adagrad, {}, {"sum"}, {"step"}),
    "Adadelta": (torch.optim.Adadelta, {}, {"square_avg", "acc_delta"}, {"step"}),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("how", ["curvkit.save", "param_names", "position"])
def test_every_class_that_is_treated(tmp_path: Path, name: str, how: str):
    kind, options, tensors, numbers = CLASSES[name]
    model = distinct()
    parameters: Any = model.named_parameters() if how == "param_names" else model.parameters()
    optimizer = stepped(model, kind(parameters, lr=0.01, **options))
    own = how == "curvkit.save"
    path = save(tmp_path / "a.pt", model=model, optimizer=optimizer) if own else written(tmp_path, model, optimizer)
    state = found(path, model)
    assert state.name == name
    assert state.certain  # by position, too, since no two shapes are the same
    assert list(state.parameters) == list(shapes(model))
    if not (how == "position" and name == "SGD"):  # one rule for all parameters: the buffers need not be known
        assert is_the_optimizers(state, model, optimizer)
        assert all(set(held.tensors) == tensors for held in state.parameters.values())
    assert all(set(held.numbers) == numbers for held in state.parameters.values())
    assert all(held.numbers.get("step", 2.0) == 2.0 for held in state.parameters.values())
    [group] = state.groups
    assert group["lr"] == 0.01
    assert "params" not in group
    assert "param_names" not in group
    assert [(rate.label, rate.values) for rate in state.rates] == [("current", (0.01,))]


def test_adam_and_adamw_are_told_apart_only_where_the_checkpoint_does(tmp_path: Path):
    model = distinct()
    old = ("decoupled_weight_decay", "foreach", "fused", "capturable", "differentiable", "maximize")

    def before(state: dict[str, Any]) -> None:  # as torch wrote it before 2.7
        for key in old:
            state["param_groups"][0].pop(key)

    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    state = changed(optimizer.state_dict(), before)
    assert found(written(tmp_path, model, state), model).name == "Adam or AdamW"
    said = {"format": 1, "optimizer": "AdamW", "optimizer_names": [list(shapes(model))]}
    assert found(written(tmp_path, model, state, curvkit=said), model).name == "AdamW"


def test_numbers_that_were_saved_as_tensors(tmp_path: Path):
    model = distinct()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25)))
    state = found(written(tmp_path, model, optimizer), model)
    assert state.groups[0]["lr"] == 0.25
    assert type(state.groups[0]["lr"]) is float
    assert state.groups[0]["betas"] == (0.9, 0.999)
    assert state.rates[0].values == (0.25,)


def test_names_with_what_wrappers_put_into_them(tmp_path: Path):
    model = tower()
    names = {name: f"module._orig_mod.{name}" for name in shapes(model)}
    optimizer = stepped(model, torch.optim.AdamW((names[name], p) for name, p in model.named_parameters()))
    state = found(written(tmp_path, model, optimizer), model)
    assert (state.source, state.certain) == ("param_names of the optimizer", True)
    assert is_the_optimizers(state, model, optimizer)


def test_names_of_a_training_module_around_the_model(tmp_path: Path):
    model = tower()
    optimizer = stepped(model, torch.optim.Adam((f"net.{name}", p) for name, p in model.named_parameters()))
    assert is_the_optimizers(found(written(tmp_path, model, optimizer), model), model, optimizer)


def test_a_tied_parameter_under_its_other_name(tmp_path: Path):
    model = GPT(n_layer=1, n_head=1, n_embd=4, block_size=3, vocab_size=5)
    first = "transformer.wte.weight"
    assert first in shapes(model)
    names = [(name if name != first else "lm_head.weight", p) for name, p in model.named_parameters()]
    optimizer = torch.optim.Adam(names)
    model(torch.zeros(1, 3, dtype=torch.int64)).square().sum().backward()
    optimizer.step()
    state = found(written(tmp_path, model, optimizer), model)
    assert is_the_optimizers(state, model, optimizer)
    assert first in state.parameters


def test_the_order_of_the_module_is_taken_but_not_believed(tmp_path: Path):
    model = tower()
    optimizer = stepped(model, torch.optim.Adam(model.parameters()))
    state = found(written(tmp_path, model, optimizer), model)
    assert (state.source, state.certain) == ("order of the module", False)
    assert is_the_optimizers(state, model, optimizer)


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("order", ["reversed", "weights before biases", "exchanged"])
def test_another_order_is_refused_or_not_certain(tmp_path: Path, order: str, depth: int):
    model = tower(depth=depth)
    parameters = list(model.parameters())
    if order == "reversed":
        parameters.reverse()
    elif order == "weights before biases":
        parameters.sort(key=lambda p: p.ndim, reverse=True)
    else:
        parameters[2], parameters[4] = parameters[4], parameters[2]
    path = written(tmp_path, model, stepped(model, torch.optim.Adam(parameters)))
    state = optimizer_state(read(path), shapes(model))
    if order == "exchanged":
        assert isinstance(state, OptimizerState)
        assert not state.certain
    else:
        assert isinstance(state, Unassigned)
        assert "in another order, and it has no names" in state.reason


def decay_groups(model: nn.Module, *, first: bool = True, ordered: Any = list) -> list[dict[str, Any]]:
    named = ordered(list(model.named_parameters()))
    decay = {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": 0.1}
    rest = {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0}
    return [decay, rest] if first else [rest, decay]


@pytest.mark.parametrize(
    ("first", "source"), [(True, "decay grouping by dimension, as in nanoGPT"), (False, "decay grouping of timm")]
)
def test_groups_by_decay(tmp_path: Path, first: bool, source: str):
    model = tower()
    optimizer = stepped(model, torch.optim.AdamW(decay_groups(model, first=first)))
    state = found(written(tmp_path, model, optimizer), model)
    assert (state.source, state.certain) == (source, False)
    assert is_the_optimizers(state, model, optimizer)
    assert [group["weight_decay"] for group in state.groups] == ([0.1, 0.0] if first else [0.0, 0.1])


def test_groups_by_decay_are_certain_where_no_two_shapes_are_the_same(tmp_path: Path):
    model = distinct()
    optimizer = stepped(model, torch.optim.AdamW(decay_groups(model)))
    assert found(written(tmp_path, model, optimizer), model).certain


def test_a_checkpoint_of_nanogpt(tmp_path: Path):
    arguments = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 6, "vocab_size": 11, "bias": True}
    model = GPT(**arguments)
    optimizer = torch.optim.AdamW(decay_groups(model), lr=3e-4)
    model(torch.arange(6)[None]).square().mean().backward()
    optimizer.step()
    config = {"learning_rate": 6e-4, "dataset": "openwebtext"}
    path = written(tmp_path, model, optimizer, model_args=arguments, iter_num=1, config=config)
    state = found(path, model)
    assert state.source == "decay grouping by dimension, as in nanoGPT"
    assert is_the_optimizers(state, model, optimizer)
    peak = state.rates[-1]
    assert (peak.label, peak.values, peak.source) == ("peak", (6e-4, 6e-4), "learning_rate of nanoGPT's config")


def test_sorted_names_of_mingpt(tmp_path: Path):
    arguments = {"n_layer": 12, "n_head": 1, "n_embd": 4, "block_size": 3, "vocab_size": 5, "bias": True}
    model = GPT(**arguments)
    optimizer = torch.optim.AdamW(decay_groups(model, ordered=sorted))
    model(torch.zeros(1, 3, dtype=torch.int64)).square().mean().backward()
    optimizer.step()
    state = found(written(tmp_path, model, optimizer), model)
    assert state.source == "decay grouping with sorted names, as in minGPT"
    assert is_the_optimizers(state, model, optimizer)


@pytest.mark.parametrize("flat", [False, True])
def test_groups_one_after_the_other(tmp_path: Path, flat: bool):
    model = tower()
    split = 3
    parameters = list(model.parameters())
    groups = [{"params": parameters[:split], "lr": 0.1}, {"params": parameters[split:], "lr": 0.2}]
    optimizer = stepped(model, torch.optim.AdamW(groups))
    state = found(written(tmp_path, model, optimizer), model)
    assert (state.source, state.certain) == ("order of the module", False)
    assert is_the_optimizers(state, model, optimizer)
    assert state.rates[0].values == (0.1, 0.2)


def test_frozen_parameters_that_the_optimizer_was_given_are_left_out(tmp_path: Path):
    model = tower()
    model.first.requires_grad_(False)
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    state = found(written(tmp_path, model, optimizer), model)
    assert set(state.parameters) == {name for name in shapes(model) if not name.startswith("first")}
    assert is_the_optimizers(state, model, optimizer)


def test_frozen_parameters_that_it_was_not_given(tmp_path: Path):
    model = distinct()
    trained = list(model.parameters())[1:]
    optimizer = stepped(model, torch.optim.AdamW(trained))
    state = found(written(tmp_path, model, optimizer), model)  # there is one way to leave a parameter out
    assert list(state.parameters) == ["0.bias", "2.weight", "2.bias"]
    assert state.certain
    assert is_the_optimizers(state, model, optimizer)
    model = tower()
    optimizer = stepped(model, torch.optim.AdamW(model.layers[1].parameters()))
    assert reason(written(tmp_path, model, optimizer), model) == (
        "the optimizer trains 2 of the model's 10 parameters, and which ones is not known: it has no names"
    )
    named = [(name, p) for name, p in model.named_parameters() if name.startswith("layers.1")]
    optimizer = stepped(model, torch.optim.AdamW(named))
    assert list(found(written(tmp_path, model, optimizer), model).parameters) == ["layers.1.weight", "layers.1.bias"]


def test_sgd_needs_no_names_where_one_rule_holds(tmp_path: Path):
    model = tower()
    for optimizer in (
        torch.optim.SGD(model.parameters(), lr=0.1),
        stepped(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)),
        stepped(model, torch.optim.SGD(list(model.parameters())[::-1], lr=0.1, momentum=0.9)),
    ):
        state = found(written(tmp_path, model, optimizer), model)
        assert state.certain
        assert state.source == "one rule for all parameters"
        assert list(state.parameters) == list(shapes(model))
        assert not any(held.tensors for held in state.parameters.values())


def test_sgd_with_groups(tmp_path: Path):
    model = tower()
    optimizer = stepped(model, torch.optim.SGD(decay_groups(model), lr=0.1, momentum=0.9))
    state = found(written(tmp_path, model, optimizer), model)
    assert state.certain  # which group is known by the shapes, and nothing else matters
    assert not any(held.tensors for held in state.parameters.values())
    assert state.parameters["norm.weight"].group == 1
    assert state.parameters["layers.0.weight"].group == 0
    parameters = list(model.parameters())
    groups = [{"params": parameters[::2], "lr": 0.1}, {"params": parameters[1::2], "lr": 0.2}]
    optimizer = stepped(model, torch.optim.SGD(groups, momentum=0.9))
    assert reason(written(tmp_path, model, optimizer), model) == (
        "how the optimizer's 2 groups divide the parameters is not known: it has no names"
    )
    groups = decay_groups(model)
    groups[1]["lr"] = 0.2  # by lengths alone, another division would be another limit
    assert "divide the parameters is not known" in reason(written(tmp_path, model, torch.optim.SGD(groups)), model)
    groups = [{"params": parameters[:4], "lr": 0.1}, {"params": parameters[4:], "lr": 0.2}]
    assert "divide the parameters is not known" in reason(written(tmp_path, model, torch.optim.SGD(groups)), model)


DIVIDED = "how the optimizer's 2 groups divide the parameters is not known: it has no names"


def twins() -> nn.Module:
    """Two layers of the same shapes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


def head_first(model: Any, **head: Any) -> list[dict[str, Any]]:
    return [{"params": list(model[2].parameters()), **head}, {"params": list(model[0].parameters())}]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_with_groups_that_are_alike_at_the_present_rate_alone(tmp_path: Path, momentum: float):
    """A schedule that ends at 0 makes all rates the same; the figures are of initial_lr, where they differ."""
    model = twins()
    optimizer = torch.optim.SGD(head_first(model, lr=1.0), lr=0.01, momentum=momentum)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    for _ in range(2):
        stepped(model, optimizer, 1)
        cosine.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert reason(written(tmp_path, model, optimizer), model) == DIVIDED
    state = found(save(tmp_path / "named.pt", model=model, optimizer=optimizer), model)
    assert state.certain
    assert {name: held.group for name, held in state.parameters.items()} == {
        **{"0.weight": 1, "0.bias": 1},
        **{"2.weight": 0, "2.bias": 0},
    }


@pytest.mark.parametrize("key", ["initial_lr", "max_lr", "base_momentum", "max_momentum"])
def test_sgd_with_groups_that_differ_in_what_a_schedule_writes(tmp_path: Path, key: str):
    model = twins()
    optimizer = torch.optim.SGD(head_first(model), lr=0.1)
    for group in optimizer.param_groups:
        group[key] = 0.5
    assert found(written(tmp_path, model, optimizer), model).certain
    optimizer.param_groups[0][key] = 0.7
    assert reason(written(tmp_path, model, optimizer), model) == DIVIDED


def test_sgd_with_groups_of_which_only_the_lengths_are_known(tmp_path: Path):
    """Two and two, the first with decay: weights and biases, or head and trunk."""
    for groups in (head_first, decay_groups):
        model = twins()
        for group, decay in zip(given := groups(model), (5.0, 0.0), strict=True):
            group["weight_decay"] = decay
        optimizer = stepped(model, torch.optim.SGD(given, lr=0.1))
        assert reason(written(tmp_path, model, optimizer), model) == DIVIDED
        assert found(save(tmp_path / "named.pt", model=model, optimizer=optimizer), model).certain


def test_sgd_with_groups_that_share_a_shape(tmp_path: Path):
    """The Trainer's groups by names, a matrix without decay in them: the other one of its shape could be meant."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relative_bias = nn.Parameter(torch.ones(3, 3))
            self.layer, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(x @ self.relative_bias))

    model = Biased()
    groups = [
        {"params": [model.layer.weight, model.last.weight], "weight_decay": 0.1},
        {"params": [model.relative_bias, model.layer.bias, model.last.bias]},
    ]
    optimizer = stepped(model, torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    assert reason(written(tmp_path, model, optimizer), model) == DIVIDED


def test_sgd_of_a_model_that_is_frozen_in_part(tmp_path: Path):
    model = tower()
    model.first.requires_grad_(False)
    optimizer = stepped(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    state = found(written(tmp_path, model, optimizer), model)
    assert not state.certain  # which parameters were trained is known by their order alone
    assert set(state.parameters) == {name for name in shapes(model) if not name.startswith("first")}


def test_torch_distributed_checkpoint_has_names(tmp_path: Path):
    model = tower()
    groups = decay_groups(model)
    groups[0]["params"].reverse()
    optimizer = stepped(model, torch.optim.AdamW(groups))
    weights, state = get_state_dict(model, optimizer)
    path = distributed({"model": weights, "optimizer": state}, tmp_path / "dcp")
    named = found(path, model)
    assert (named.source, named.certain) == ("names in the optimizer's state", True)
    assert is_the_optimizers(named, model, optimizer)
    path = distributed({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "positions")
    assert "it has no names" in reason(path, model)


def test_the_schedule_tells_of_other_rates(tmp_path: Path):
    model = distinct()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    stepped(model, optimizer, 1)
    cosine.step()
    told = found(written(tmp_path, model, optimizer), model).rates
    assert [rate.label for rate in told] == ["current", "initial_lr"]
    assert told[0].values == (optimizer.param_groups[0]["lr"],)
    assert told[1].values == (0.5,)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=10)
    told = found(written(tmp_path, model, optimizer), model).rates
    assert [(rate.label, rate.source) for rate in told][2] == ("peak", "max_lr of OneCycleLR")
    assert told[2].values == (2.0,)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = optimizer.state_dict()
    cyclic = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 0.7, cycle_momentum=False)
    told = found(written(tmp_path, model, before, scheduler=cyclic.state_dict()), model).rates
    assert {rate.label: (rate.values, rate.source) for rate in told[1:]} == {
        "initial_lr": ((0.1,), "base_lrs of the scheduler's state"),
        "peak": ((0.7,), "max_lrs of the scheduler's state"),
    }


def test_rates_that_are_multiplied_elsewhere_are_left_out():
    group = {"lr": 0.1, "lr_scale": 0.5, "initial_lr": 0.2}
    assert [rate.label for rate in rates([group], {"learning_rate": 0.3})] == ["current"]
    assert [rate.label for rate in rates([{"lr": 0.1, "initial_lr": "much"}], {"base_lrs": [1, 2]})] == ["current"]


def adamw(model: nn.Module, **options: Any) -> dict[str, Any]:
    return stepped(model, torch.optim.AdamW(model.parameters(), **options)).state_dict()


def put(key: str, value: Any, index: int = 0) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state["state"][index].__setitem__(key, value)


def group_with(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state["param_groups"][0].__setitem__(key, value)


def take(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: [entry.pop(key) for entry in state["state"].values()]


NAN = torch.full((4, 3), torch.nan)
WRONG: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda s: s["state"].clear(), "the optimizer's state is empty: AdamW had taken no step"),
    (put("exp_avg_sq", NAN), "exp_avg_sq of '0.weight' has NaN or infinite entries: the run had diverged"),
    (put("exp_avg", NAN / 0), "exp_avg of '0.weight' has NaN or infinite entries: the run had diverged"),
    (
        put("exp_avg_sq", -torch.ones(4, 3)),
        "exp_avg_sq of '0.weight' has negative entries, which a mean of squares cannot",
    ),
    (
        put("exp_avg_sq", torch.ones(4, 3, dtype=torch.int32)),
        "exp_avg_sq of '0.weight' is a tensor of torch.int32 in the",
    ),
    (put("exp_avg_sq", 3.0), "exp_avg_sq of '0.weight' is a float in the optimizer's state, not a tensor of floats"),
    (
        put("exp_avg_sq", torch.ones(3, 4)),
        "the optimizer's state is of another model: exp_avg_sq of '0.weight' has the shape",
    ),
    (put("step", 0), "step of '0.weight' is 0 in the optimizer's state: no step was taken"),
    (put("step", float("nan")), "step of '0.weight' is nan in the optimizer's state: no step was taken"),
    (take("step"), "the optimizer's state is not that of Adam or AdamW: 'step' is missing for some parameters"),
    (take("exp_avg"), "the optimizer is none of torch that is known: its groups have"),
    (put("more", 1.0), "the optimizer's state is not that of Adam or AdamW: it has 'more'"),
    (put("absmax1", torch.ones(2)), "the optimizer's state is quantised to 8 bits, as bitsandbytes does"),
    (put("exp_avg_sq_row", torch.ones(4)), "the optimizer is Adafactor, which keeps sums of rows and columns"),
    (group_with("lr", float("nan")), "lr of the optimizer's group 0 is nan, which is not possible"),
    (
        group_with("lr", torch.ones(3)),
        "lr of the optimizer's group 0 is a tensor of torch.float32, which is not possible",
    ),
    (group_with("betas", (NAN, 1.0)), "betas of the optimizer's group 0 is a tuple, which is not possible"),
    (lambda s: s["state"][0].__setitem__(7, 1.0), "the optimizer's state is not that of Adam or AdamW: it has '7'"),
    (group_with("lr", None), "lr of the optimizer's group 0 is null, which is not possible"),
    (group_with("betas", (0.9, 1.0)), "betas of the optimizer's group 0 is (0.9, 1.0), which is not possible"),
    (group_with("eps", -1.0), "eps of the optimizer's group 0 is -1.0, which is not possible"),
    (group_with("amsgrad", 1), "amsgrad of the optimizer's group 0 is 1, which is not possible"),
    (
        group_with("amsgrad", True),
        "max_exp_avg_sq of '0.weight' is missing in the optimizer's state, though amsgrad=True",
    ),
    (group_with("maximize", True), "the optimizer climbs (maximize=True)"),
    (group_with("rank", 4), "the optimizer is none of torch that is known: its groups have"),
    (group_with("ns_steps", 5), "the optimizer is Muon, whose limit is not known"),
    (group_with("params", [0, 0, 1, 2]), "a parameter stands twice in the optimizer's groups"),
    (group_with("params", [0, 1, 2]), "the optimizer has states of parameters that none of its groups has"),
    (group_with("params", None), "the optimizer's groups do not say which parameters they have"),
    (
        group_with("params", [0, 1, 2, 3, 4]),
        "the optimizer's state is of another model: it trains 5 parameters, the model has 4",
    ),
    (group_with("param_names", ["a"]), "the param_names of the optimizer are not as many as its parameters"),
    (
        group_with("param_names", ["0.weight", "0.bias", "2.weight", "head"]),
        "the optimizer trains 'head', which the model",
    ),
    (
        group_with("param_names", ["0.weight", "0.bias", "0.weight", "2.bias"]),
        "'0.weight' stands twice in the optimizer's",
    ),
    (lambda s: s.__setitem__("param_groups", []), "the optimizer's state has no groups of parameters"),
    (lambda s: s.__setitem__("state", [1]), "the optimizer's state is not one of torch"),
    (
        lambda s: s.__setitem__("zero_stage", 1),
        "the optimizer's state is that of one process among several (DeepSpeed)",
    ),
]


@pytest.mark.parametrize(("change", "text"), WRONG, ids=[text[:60] for _, text in WRONG])
def test_a_state_that_cannot_be_used(tmp_path: Path, change: Callable[[dict[str, Any]], Any], text: str):
    model = distinct()
    assert text in reason(written(tmp_path, model, changed(adamw(model), change)), model)


def test_numbers_too_large_for_a_float(tmp_path: Path):  # no file that is read has them, but one that is trusted may
    model = distinct()
    state = changed(adamw(model), group_with("lr", 10**400))
    made = Checkpoint(tmp_path, "training dict", {}, state, None, None)
    assert optimizer_state(made, shapes(model)) == Unassigned(
        "lr of the optimizer's group 0 is a number of many digits, which is not possible"
    )


def test_a_parameter_that_never_had_a_gradient(tmp_path: Path):
    model = distinct()
    first = model.get_parameter("0.bias")
    first.requires_grad_(False)
    options = {"initial_accumulator_value": 0.1}
    optimizer = stepped(model, torch.optim.Adagrad(model.parameters(), lr=0.01, **options))
    assert optimizer.state[first]["step"] == 0.0  # it is there from the beginning
    state = found(written(tmp_path, model, optimizer), model)
    assert list(state.parameters) == ["0.weight", "2.weight", "2.bias"]
    assert is_the_optimizers(state, model, optimizer)
    fresh = torch.optim.Adagrad(model.parameters(), **options)
    assert reason(written(tmp_path, model, fresh), model) == "the optimizer's state is empty: Adagrad had taken no step"
    optimizer.state[first]["sum"].fill_(0.2)
    assert "step of '0.bias' is 0.0 in the optimizer's state: no step was taken" in reason(
        written(tmp_path, model, optimizer), model
    )

    def untouched(state: dict[str, Any]) -> None:
        state["state"][1] = {"step": 0, "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}

    for change in (untouched, lambda _: None):  # torch makes no entry
        path = written(tmp_path, model, changed(adamw(model), change))
        assert list(found(path, model).parameters) == ["0.weight", "2.weight", "2.bias"]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (torch.optim.LBFGS, "the optimizer is LBFGS, which has no fixed step size"),
        (torch.optim.Rprop, "the optimizer is Rprop, which uses the signs of gradients only"),
        (torch.optim.ASGD, "the optimizer is ASGD, whose limit is not known"),
        (torch.optim.Adafactor, "the optimizer is Adafactor"),
    ],
)
def test_optimizers_that_are_not_treated(tmp_path: Path, kind: Any, text: str):
    model = distinct()
    assert text in reason(written(tmp_path, model, stepped(model, kind(model.parameters(), lr=0.01))), model)


def test_a_class_of_ones_own(tmp_path: Path):
    class Mine(torch.optim.AdamW): ...

    model = distinct()
    path = save(tmp_path / "ckpt.pt", model=model, optimizer=stepped(model, Mine(model.parameters())))
    assert reason(path, model) == "the optimizer is 'Mine', whose limit is not known"


def test_groups_of_two_kinds(tmp_path: Path):
    model = distinct()
    parameters = list(model.parameters())
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "decoupled_weight_decay": True}]
    path = written(tmp_path, model, stepped(model, torch.optim.Adam(groups)))
    assert reason(path, model) == (
        "weights decay as in Adam in some groups of the optimizer, and as in AdamW in others"
    )


def test_states_of_another_model(tmp_path: Path):
    model, other = tower(), tower(width=5)
    path = written(tmp_path, model, stepped(other, torch.optim.AdamW(other.parameters())))
    assert reason(path, model) == (
        "the optimizer's state is of another model: of the shape (5, 3) it has 1, the model none"
    )
    path = written(tmp_path, model, stepped(other, torch.optim.SGD(other.parameters(), momentum=0.9)))
    assert "the optimizer's state is of another model: of the shape" in reason(path, model)


def test_flat_states(tmp_path: Path):
    model = tower()
    flat = nn.Parameter(torch.ones(50))
    flat.grad = torch.ones(50)
    optimizer = torch.optim.AdamW([flat])
    optimizer.step()
    assert "flat, as of parameters that are spread over processes" in reason(written(tmp_path, model, optimizer), model)
    state = {
        "state": {"_flat_param": optimizer.state[flat]},
        "param_groups": [dict(optimizer.state_dict()["param_groups"][0])],
    }
    state["param_groups"][0]["params"] = ["_flat_param"]
    assert "flat and that of one process among several (FSDP)" in reason(written(tmp_path, model, state), model)


def test_no_state_or_several(tmp_path: Path):
    model = distinct()
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    assert reason(tmp_path / "plain.pt", model) == "the checkpoint has no state of an optimizer"
    path = tmp_path / "several.pt"
    torch.save({"model": model.state_dict(), "optimizers": [adamw(model), adamw(model)]}, path)
    assert "states of 2 optimizers" in reason(path, model)
    torch.save({"model": model.state_dict(), "ema": model.state_dict(), "optimizer": adamw(model)}, path)
    averaged = optimizer_state(read(path, ema=True), shapes(model))
    assert averaged == Unassigned("averaged weights; the optimizer's state belongs to the raw ones")


def test_more_than_one_order_fits(tmp_path: Path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_bias = nn.Parameter(torch.ones(3, 3))  # a matrix that the Trainer would not decay, by its name
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight_bias * self.scale

    model = Odd()
    model.scale.requires_grad_(False)
    model.weight_bias.requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": [model.scale], "weight_decay": 0.1}, {"params": [model.weight_bias]}])
    assert "more than one order of parameters fits" in reason(written(tmp_path, model, optimizer), model)


def test_shapes_are_needed(tmp_path: Path):
    model = distinct()
    path = written(tmp_path, model, torch.optim.SGD(model.parameters()))
    with pytest.raises(
        InvalidArgument, match="shapes is empty, but the model's parameters are needed. Pass {name: p.shape"
    ):
        optimizer_state(read(path), {})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_the_trainer_of_hugging_face(tmp_path: Path, family: str):
    transformers = pytest.importorskip("transformers")
    common: dict[str, Any] = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    makers: dict[str, Callable[[], nn.Module]] = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, **common)),
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **common
            )
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(  # its relative_attention_bias is a matrix without decay
            transformers.T5Config(
                d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, decoder_start_token_id=0, **common
            )
        ),
    }

    class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"input_ids": torch.arange(6) + index, "labels": torch.arange(6) + index}

    options: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, save_steps=3, weight_decay=0.1, learning_rate=1e-3, warmup_steps=1, **options
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        model = makers[family]()
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows())
        trainer.train()
    state = found(tmp_path, model)
    assert (state.name, state.source) == ("AdamW", "decay grouping of Hugging Face's Trainer")
    assert not state.certain
    assert is_the_optimizers(state, model, trainer.optimizer.optimizer)
    assert list(state.parameters) == list(shapes(model))
    assert {rate.label: rate.values for rate in state.rates} == {
        "current": (0.0, 0.0),  # of the step after the last
        "initial_lr": (1e-3, 1e-3),
        "peak": (1e-3, 1e-3),
    }
