"""Which parts of a file are the weights: every layout that people save, several models in one file, averages, wrappers' names."""

from __future__ import annotations

import argparse
import collections
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import normal, seeded
from samples import net
from torch import Tensor, nn

from curvkit import save
from curvkit.checkpoints import fit, inspect, read
from curvkit.checkpoints.layouts import interpret
from curvkit.checkpoints.names import clean, fitted
from curvkit.checkpoints.trust import Trust
from curvkit.errors import CurvkitError, InvalidArgument, RefusedCheckpoint, UnknownObjective


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckpt.pt"


def weights(shift: float = 0.0, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: tensor + shift for name, tensor in net().state_dict().items()}


def shift_of(found: dict[str, Tensor]) -> float:
    """By how much all weights differ from those of the network: which of the sets was taken."""
    assert list(found) == list(weights())
    (shift,) = {round((found[name] - tensor).mean().item(), 3) for name, tensor in weights().items()}
    return shift


def named_state() -> dict[str, Any]:
    """As FSDP gives it: by names of parameters, so that it looks like weights."""
    return {"state": {"w": {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": ["w"], "lr": 0.1}]}


def state(lr: float = 0.1) -> dict[str, Any]:
    return torch.optim.SGD(net().parameters(), lr=lr, momentum=0.9).state_dict()


# ---- who wrote it ---------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[Any, str, int | None, float | None]] = {
    "nanogpt": (
        {
            "model": weights(prefix="_orig_mod."),
            "optimizer": state(),
            "model_args": {"n_layer": 2},
            "iter_num": 7,
            "config": {},
        },
        "nanoGPT checkpoint",
        7,
        0.1,
    ),
    "lightning": (
        {
            "epoch": 1,
            "global_step": 4,
            "pytorch-lightning_version": "2.5",
            "state_dict": weights(),
            "loops": {"fit": {"a": torch.ones(2)}},
            "callbacks": {"x": {"best": torch.ones(2)}},
            "optimizer_states": [state()],
            "lr_schedulers": [],
            "hyper_parameters": {"hidden": 6},
        },
        "Lightning checkpoint",
        4,
        0.1,
    ),
    "timm": (
        {
            "epoch": 3,
            "arch": "vit",
            "state_dict": weights(),
            "state_dict_ema": weights(1),
            "optimizer": state(),
            "version": 2,
            "args": argparse.Namespace(model="vit", classes=3),
        },
        "timm checkpoint",
        None,
        0.1,
    ),
    "torchvision": (
        {"model": weights(), "optimizer": state(), "lr_scheduler": {}, "epoch": 2, "args": argparse.Namespace(a=1)},
        "training dict",
        None,
        0.1,
    ),
    "a tuple of two": ((weights(), state()), "training dict", None, None),
    "nested": ({"state": {"model": weights(), "optimizer": state(), "step": 5}}, "training dict", 5, 0.1),
    "an unusual key": ({"encoder": weights(), "opt": state(), "iter": 6}, "training dict", 6, 0.1),
    "numbers of numpy and torch": (
        {"model": weights(), "iteration": np.int64(3), "best": np.float64(0.5)},
        "training dict",
        3,
        None,
    ),
    "a step that is a tensor": ({"model": weights(), "step": torch.tensor(12)}, "training dict", 12, None),
    "several optimizers": ({"model": weights(), "optimizers": [state(), state()]}, "training dict", None, None),
    "beside generators": (
        {"model": weights(), "rng_state": {"torch": torch.get_rng_state()}, "metrics": {"loss": torch.ones(3)}},
        "training dict",
        None,
        None,
    ),
    "SWA": (
        {**torch.optim.swa_utils.AveragedModel(net()).state_dict()},
        "state dict of an AveragedModel",
        None,
        None,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_gives_the_weights(path: Path, name: str):
    content, kind, step, lr = LAYOUTS[name]
    torch.save(content, path)
    found = read(path)
    assert shift_of(found.weights) == 0
    assert (found.kind, found.step, found.lr) == (kind, step, [] if lr is None else [lr])


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_outline_is_understood_as_the_live_content_is(path: Path, name: str):
    """Law: what inspect says of a file is what read finds in it."""
    torch.save(LAYOUTS[name][0], path)
    found, seen = read(path), inspect(path)
    assert (seen.kind, seen.step, seen.keys, seen.weight_keys) == (
        found.kind,
        found.step,
        found.keys,
        found.weight_keys,
    )
    assert (seen.removed_prefixes, seen.variants) == (found.removed, found.variants)
    assert (list(seen.optimizer.lr) if seen.optimizer else []) == found.lr
    assert seen.refusal is None


def test_what_the_file_says_of_the_model_is_kept(path: Path):
    expected = {
        "nanogpt": {"n_layer": 2},
        "lightning": {"hidden": 6},
        "timm": {"arch": "vit", "args": {"model": "vit", "classes": 3}},
    }
    for name, config in expected.items():
        torch.save(LAYOUTS[name][0], path)
        assert read(path).config == config
    torch.save({"model": weights(), "epoch": 1}, path)
    assert read(path).config is None


@pytest.mark.parametrize("key", ["args", "config", "hparams", "hyper_parameters", "cfg", "model_args"])
def test_the_settings_of_a_run_are_kept(path: Path, key: str):
    for settings in (argparse.Namespace(hidden=6, name="a"), {"hidden": 6, "name": "a"}):
        torch.save({"model": weights(), key: settings}, path)
        assert read(path).config == {"hidden": 6, "name": "a"}
    torch.save({"model": weights(), key: ["--hidden", "6"]}, path)
    assert read(path).config is None


def test_the_class_of_the_optimizer(path: Path):
    """Oracle: the optimizers themselves."""
    for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop):
        optimizer = kind([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        torch.save({"model": weights(), "optimizer": optimizer.state_dict()}, path)
        assert read(path).optimizer_class == kind.__name__
    torch.save({"model": weights(), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}, path)
    assert read(path).optimizer_class is None
    torch.save({"model": weights()}, path)
    assert read(path).optimizer_class is None
    model = torch.nn.Linear(2, 1)

    class Lion(torch.optim.SGD):
        pass

    save(path, model=model, optimizer=Lion(model.parameters(), lr=0.1))
    assert (read(path).optimizer_class, str(read(path)).endswith("· Lion with lr 0.1")) == ("Lion", True)


def test_tied_weights_count_once(path: Path):
    """Law: inspecting and reading count alike."""
    shared = torch.ones(5, 3)
    content = {"wte": shared, "b": torch.ones(2), "head": shared, "also": shared, "same": torch.ones(5, 3)}
    torch.save({"model": content}, path)
    found, seen = read(path), inspect(path)
    assert found.tied == seen.tied == (("wte", "head", "also"),)
    assert list(found.distinct) == ["wte", "b", "same"]
    assert (len(found.distinct), found.numel) == (seen.groups[0].tensors, seen.groups[0].numbers) == (3, 32)
    assert str(found) == "training dict · 3 tensors, 32 numbers, float32"


def test_of_several_optimizers_none_is_taken(path: Path):
    torch.save(LAYOUTS["several optimizers"][0], path)
    found = read(path)
    assert found.optimizer is None
    assert found.notes == ("optimizers holds the states of 2 optimizers; none was taken",)
    torch.save({"model": weights(), "optimizer": state(), "optimizer_1": state(0.2), "optimizer_x": 3}, path)
    found = read(path)
    assert found.optimizer is None
    assert found.notes == ("the states of 2 optimizers are there (optimizer, optimizer_1); none was taken",)
    torch.save({"model": weights(), "optimizer": state(), "optimizer_1": "none"}, path)
    assert read(path).lr == [0.1]


# ---- averages -------------------------------------------------------------------------------------------------------

AVERAGES: dict[str, dict[str, Any]] = {
    "timm": {"state_dict": weights(), "state_dict_ema": weights(1), "arch": "x"},
    "torchvision": {"model": weights(), "model_ema": {"n_averaged": torch.tensor(3), **weights(1, "module.")}},
    "nested": {"model": weights(), "ema": {"decay": 0.99, "shadow": weights(1)}},
    "basicsr": {"params": weights(), "params_ema": weights(1)},
    "swa": {"net": weights(), "swa_state_dict": weights(1)},
    "lightning's averaging": {
        "pytorch-lightning_version": "2.6",
        "state_dict": weights(1),
        "current_model_state": weights(),
        "averaging_state": {"n_averaged": torch.tensor(3)},
    },
}


@pytest.mark.parametrize("name", AVERAGES)
def test_raw_weights_are_taken_unless_averages_are_asked_for(path: Path, name: str):
    torch.save({**AVERAGES[name], "optimizer": state()}, path)
    raw, averaged = read(path), read(path, ema=True)
    assert shift_of(raw.weights) == 0
    assert shift_of(averaged.weights) == 1
    assert (raw.variants, averaged.variants) == (("ema",), ("raw",))
    assert "averaged weights; the optimizer's state belongs to the raw ones" in averaged.notes
    assert (raw.lr, averaged.optimizer) == ([0.1], None)
    assert not any("averaged" in note for note in raw.notes)


def test_a_file_with_averages_alone_gives_them(path: Path):
    torch.save({"ema": weights(1), "epoch": 2}, path)
    found = read(path)
    assert shift_of(found.weights) == 1
    assert found.notes == ("the weights are those under 'ema'",)
    torch.save(LAYOUTS["SWA"][0], path)
    assert shift_of(read(path, ema=True).weights) == 0


def test_no_averages(path: Path):
    torch.save({"model": weights(), "epoch": 1}, path)
    with pytest.raises(
        InvalidArgument, match=r"--ema: .* has no averaged weights. Its keys are: model, epoch. Leave --ema"
    ):
        read(path, ema=True)


def test_several_averages(path: Path):
    torch.save({"model": weights(), "ema": weights(1), "swa": weights(2)}, path)
    text = "holds several sets of averaged weights: ema, swa. Say which one is meant, for example --key ema"
    with pytest.raises(UnknownObjective, match=text):
        read(path, ema=True)
    assert shift_of(read(path, key="swa").weights) == 2


# ---- several models in one file -------------------------------------------------------------------------------------


def two_models() -> dict[str, Any]:
    return {
        "generator": weights(1),
        "discriminator": {"net": weights(2)},
        "optimizer": state(),
        "epoch": 1,
        "a.b": weights(3),
    }


def test_several_models_need_a_key(path: Path):
    torch.save(two_models(), path)
    with pytest.raises(UnknownObjective) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path}: holds several models, and none of them is under a usual key: generator, a.b, discriminator.net. "
        "Say which one is meant, for example --key generator"
    )
    assert inspect(path).refusal == str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("key", "shift", "taken"),
    [
        ("generator", 1, "generator"),
        ("discriminator.net", 2, "discriminator.net"),
        ("discriminator", 2, "discriminator.net"),
        ("a.b", 3, "a.b"),
    ],
)
def test_a_key_says_which(path: Path, key: str, shift: float, taken: str):
    torch.save(two_models(), path)
    found = read(path, key=key)
    assert shift_of(found.weights) == shift
    assert found.weight_keys[0] == taken
    assert found.optimizer is None
    assert f"the optimizer's state in the file was not taken: nothing says that it belongs to {key!r}" in found.notes
    assert inspect(path, key=key).weight_keys == found.weight_keys


def test_a_key_beside_its_own_optimizer(path: Path):
    both = {name: {"model": weights(i), "optimizer": state(0.1 * (i + 1)), "step": i} for i, name in enumerate("ab")}
    torch.save(both, path)
    found = read(path, key="b")
    assert (shift_of(found.weights), found.lr, found.step) == (1, [0.2], 1)


@pytest.mark.parametrize("key", ["state.generator", "state.critic", "state.critic.net", "state.ema"])
def test_an_optimizer_beside_several_models_belongs_to_none(path: Path, key: str):
    parts = {"generator": weights(0), "critic": {"net": weights(1)}, "ema": weights(2), "optimizer": state()}
    torch.save({"state": {**parts, "step": 4}}, path)
    found = read(path, key=key)
    if key.startswith("state.critic"):  # the only model in a dict of its own
        assert (found.optimizer, found.step) == (None, None)
        return
    assert (found.optimizer, found.step) == (None, 4)
    assert f"the optimizer's state in the file was not taken: nothing says that it belongs to {key!r}" in found.notes
    assert inspect(path, key=key).optimizer is None


def test_an_optimizer_beside_one_model_belongs_to_it(path: Path):
    torch.save({"a": {"net": weights(1), "optimizer": state()}, "b": {"net": weights(2)}}, path)
    assert read(path, key="a.net").lr == [0.1]
    assert read(path, key="b.net").optimizer is None


def test_a_key_can_be_the_first_part_of_names(path: Path):
    torch.save({"state_dict": {**weights(1, "student."), **weights(2, "teacher.module.")}}, path)
    assert shift_of(read(path, key="student").weights) == 1
    assert shift_of(read(path, key="teacher").weights) == 2


@pytest.mark.parametrize("key", ["critic", "generator.x", "epoch", "", ".", "optimizer.state"])
def test_a_key_that_is_not_there(path: Path, key: str):
    torch.save(two_models(), path)
    text = (
        f"--key {shlex.quote(key)}: {path} has no weights under that key. There are: generator, a.b, discriminator.net."
    )
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        read(path, key=key)


def test_a_key_into_names_that_are_not_there(path: Path):
    torch.save(weights(), path)
    text = f"--key middle: {path} is one state dict, with nothing under that name. Leave --key out, or take a part of it, by how its names"
    with pytest.raises(InvalidArgument, match=re.escape(f"{text} begin: inner, outer.")):
        read(path, key="middle")
    torch.save({"w": torch.ones(2)}, path)
    with pytest.raises(InvalidArgument, match=r"with nothing under that name. Leave --key out\.$"):
        read(path, key="model")


def test_the_default_key_may_be_named(path: Path):
    torch.save({"model": weights(), "optimizer": state()}, path)
    assert read(path, key="model").lr == [0.1]


# ---- what holds no weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"model": {"args": {"x": torch.ones(1)}}, "rng_state": {"a": torch.ones(2)}}, None),
        ({"w": torch.ones(2), "epoch": 3}, "no state dict found. Its keys are: w, epoch."),
        ({"a\x1b[2J": 1}, "Its keys are: a?[2J."),
        ({("a", 1): 1, None: 2}, "Its keys are: tuple, NoneType."),
        (argparse.Namespace(a=1), "holds a argparse.Namespace, not a state dict."),
        ({"optimizer": state()}, "no state dict found. Its keys are: optimizer."),
        (
            state(),
            "holds the state of an optimizer, and no weights. Pass the file that has the weights, or save both in one:",
        ),
        (named_state(), "holds the state of an optimizer, and no weights."),
        ({"model": collections.OrderedDict()}, "no state dict found. Its keys are: model."),
    ],
)
def test_what_holds_no_weights(path: Path, content: Any, text: str | None):
    torch.save(content, path)
    if text is None:
        assert list(read(path).weights) == ["x"]
        return
    with pytest.raises(RefusedCheckpoint, match=re.escape(text)):
        read(path)


def test_a_key_to_what_is_no_state_dict():
    with pytest.raises(RefusedCheckpoint, match="a.pt: the file holds no tensor by name. Its keys are: n_averaged."):
        interpret(Path("a.pt"), {"n_averaged": torch.tensor(3)}, tensor=Tensor)


def test_sharing_without_end_is_not_followed(path: Path):
    part: Any = {"x": 1}
    for _ in range(60):
        part = {"a": part, "b": part}
    torch.save({"model": weights(), "part": part, "list": [part]}, path)
    assert shift_of(read(path).weights) == 0
    assert inspect(path).groups[0].numbers == 51


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "cleaned", "removed"),
    [
        (["module._orig_mod.0._orig_mod.w"], ["0.w"], ("module.", "_orig_mod.")),
        (["_orig_mod.module.w"], ["w"], ("_orig_mod.", "module.")),
        (["module.module.w", "module.module.b"], ["w", "b"], ("module.",)),
        (["module.w", "head.b"], ["module.w", "head.b"], ()),
        (["a.module.w"], ["a.module.w"], ()),
        (["_fsdp_wrapped_module.a._fsdp_wrapped_module._checkpoint_wrapped_module.w"], ["a.w"], None),
        (["a._orig_mod.w", "a.w"], ["a._orig_mod.w", "a.w"], ()),
        (["a._orig_mod"], ["a._orig_mod"], ()),
        (["module.", "module.a"], ["module.", "module.a"], ()),
        ([], [], ()),
    ],
)
def test_clean_names(names: list[str], cleaned: list[str], removed: tuple[str, ...] | None):
    mapping, prefixes = clean(names)
    assert list(mapping) == names
    assert list(mapping.values()) == cleaned
    assert removed is None or prefixes == removed
    assert clean(cleaned)[1] == ()  # a fixed point


def test_names_of_the_wrappers_themselves():
    """Oracle: the wrappers of torch, and the model without them."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    wrapped = nn.Sequential(checkpoint_wrapper(plain[0]), plain[1])
    outer = nn.DataParallel(wrapped)
    wrapped[0] = checkpoint_wrapper(plain[0])
    named = [f"module.{name}" for name in wrapped.state_dict()]
    assert [name for name in outer.state_dict()] == named
    assert list(clean(outer.state_dict())[0].values()) == list(plain.state_dict())


def test_names_of_the_optimizer_are_cleaned_as_those_of_the_weights(path: Path):
    model = nn.DataParallel(net())
    save(path, model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1))
    found = read(path)
    assert found.removed == ("module.",)
    assert found.optimizer_names == [["inner.weight", "inner.bias", "outer.weight", "outer.bias"]]
    assert set(found.optimizer_names[0]) == set(found.weights)


@pytest.mark.parametrize(
    ("theirs", "own", "prefix", "left_out"),
    [
        (["a", "b"], ["a", "b"], "", ()),
        (["model.a", "model.b"], ["a", "b"], "model.", ()),
        (["model.net.a", "model.net.b"], ["a", "b"], "model.net.", ()),
        (["net.a", "net.b", "loss.w"], ["a", "b"], "net.", ("loss.w",)),
        (["a"], ["_orig_mod.a"], "", ()),
        (["model.a.x", "model.b"], ["module.a.x", "module.b"], "model.", ()),
        (["net.a"], ["a", "b"], None, ()),  # not full: nothing is taken away
        (["student.a", "teacher.a"], ["a"], None, ()),  # two fit
        (["model.a", "model.b"], ["model.a", "model.b"], "", ()),
        (["module.a"], ["module.a"], "", ()),
    ],
)
def test_a_prefix_goes_where_that_makes_the_names_fit(
    theirs: list[str], own: list[str], prefix: str | None, left_out: tuple[str, ...]
):
    found = fitted(theirs, own)
    if prefix is None:
        assert found.names == {name: name for name in theirs}
        return
    assert (found.prefix, found.left_out) == (prefix, left_out)
    assert sorted(found.names.values()) == sorted(own)


# ---- into the model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net.", "model.net."])
def test_prefixed_weights_fit(prefix: str):
    model = net(seed=1)
    notes = fit(model, {prefix + name: tensor for name, tensor in weights().items()}, "ckpt.pt")
    assert shift_of(dict(model.state_dict())) == 0
    assert notes == (f"the prefix {prefix!r} was taken from the names",)


def test_weights_of_a_loss_beside_the_model_are_left_out_and_named():
    model = net(seed=1)
    notes = fit(model, {**weights(prefix="net."), "loss.weight": torch.ones(3), "metric.sum": torch.ones(1)}, "ckpt.pt")
    assert notes[1] == "left out, as the model has no place for them: loss.weight, metric.sum"
    with pytest.raises(UnknownObjective, match="unexpected  loss.weight"):
        fit(model, {**weights(), "loss.weight": torch.ones(3)}, "ckpt.pt")


def test_a_wrapped_model_takes_plain_weights():
    model = nn.DataParallel(net(seed=1))
    assert fit(model, weights(), "ckpt.pt") == ()
    assert shift_of(dict(model.module.state_dict())) == 0


def test_two_prefixes_that_fit_need_a_key():
    found = {**weights(1, "student."), **weights(2, "teacher.")}
    with pytest.raises(UnknownObjective) as caught:
        fit(net(), found, "ckpt.pt")
    assert str(caught.value).endswith(
        "The names fit under each of the prefixes student., teacher.: say which one, with --key student"
    )


def test_a_prefix_that_fits_only_in_part_is_named():
    found = {("a.b." if name.startswith("inner") else "") + name: tensor for name, tensor in weights().items()}
    with pytest.raises(UnknownObjective) as caught:
        fit(net(), found, "ckpt.pt")
    assert str(caught.value).endswith(
        "The names fit without the prefix 'a.b.': save the state dict of the module that was wrapped."
    )


def test_a_model_with_a_prefix_more():
    model = nn.ModuleDict({"backbone": net()})
    with pytest.raises(
        UnknownObjective, match=r"The names of the model have the prefix 'backbone.' more: build the module"
    ):
        fit(model, weights(), "ckpt.pt")


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(x)))


@pytest.mark.parametrize("keep", [("embedding.weight",), ("head.weight",), ("embedding.weight", "head.weight")])
@pytest.mark.parametrize("meta", [False, True])
def test_tied_weights_stay_one(keep: tuple[str, ...], meta: bool):
    with seeded(1):
        source = Tied()
    with torch.device("meta" if meta else "cpu"):
        model = Tied()
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("g.weight") or k in keep}
    state = {k: v for k, v in state.items() if k != "head.weight" or k in keep}
    fit(model, state, "ckpt.pt")
    assert model.head.weight is model.embedding.weight
    x = torch.tensor([1, 2, 4])
    assert torch.equal(model.eval()(x), source.eval()(x))
    assert sum(p.numel() for p in model.parameters()) == 21


def test_a_model_on_the_meta_device_gets_the_tensors_themselves():
    with torch.device("meta"):
        model = net()
    model.inner.weight.requires_grad_(False)
    given = weights()
    fit(model, given, "ckpt.pt")
    assert model.inner.weight.data_ptr() == given["inner.weight"].data_ptr()
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert torch.equal(model(normal(2, 4).float()), net()(normal(2, 4).float()))


def test_weights_that_the_file_ties_and_the_model_does_not():
    with torch.device("meta"):
        model = Tied(tie=False)
    fit(model, Tied().state_dict(), "ckpt.pt")
    with torch.no_grad():
        model.head.weight.zero_()
    assert model.embedding.weight.abs().sum() > 0


def test_another_dtype_on_the_meta_device():
    with torch.device("meta"):
        model = net().double()
    fit(model, weights(), "ckpt.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float64}


class Renaming(nn.Linear):
    """Its state dict has another name than its parameter."""

    def __init__(self) -> None:
        super().__init__(2, 2, bias=False)
        self.register_state_dict_post_hook(lambda m, state, prefix, _: state.update(w=state.pop(f"{prefix}weight")))
        self.register_load_state_dict_pre_hook(
            lambda m, state, prefix, *_: state.update(weight=state.pop(f"{prefix}w"))
        )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_with_names_of_its_own(device: str):
    with torch.device(device):
        model = Renaming()
    fit(model, {"w": torch.ones(2, 2)}, "ckpt.pt")
    assert torch.equal(model.weight, torch.ones(2, 2))


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 1}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError


def test_extra_state_of_a_model_is_left_alone(path: Path):
    model = Extra(2, 2)
    torch.save(model.state_dict(), path)
    empty = Extra(2, 2)
    assert fit(empty, read(path).weights, "ckpt.pt") == ()
    assert torch.equal(empty.weight, model.weight)


@pytest.mark.parametrize(
    ("dtype", "change", "text"),
    [
        (
            None,
            lambda w: w.to(torch.complex64),
            "is torch.complex64, the model's is torch.float32, which cannot hold it. Build",
        ),
        (
            None,
            lambda w: w.to(torch.float8_e4m3fn),
            "is torch.float8_e4m3fn: quantised, with scales of their own that are not",
        ),
        (
            torch.float16,
            lambda w: w * 1e6,
            "has entries that are too large for torch.float16, the model's dtype. Build the",
        ),
        (
            None,
            lambda w: w.to(torch.bfloat16) * float("nan"),
            "has 24 NaN or infinite entries of 24: the run had diverged",
        ),
    ],
)
def test_numbers_that_the_model_cannot_hold(dtype: torch.dtype | None, change: Any, text: str):
    model = net(seed=1) if dtype is None else net(seed=1).to(dtype)
    found = weights()
    found["inner.weight"] = change(found["inner.weight"])
    with pytest.raises(RefusedCheckpoint, match=re.escape(f"ckpt.pt: the weight 'inner.weight' {text}")):
        fit(model, found, "ckpt.pt")


def test_fractions_do_not_go_into_whole_numbers():
    model = nn.BatchNorm1d(3)
    with pytest.raises(
        RefusedCheckpoint, match="'num_batches_tracked' is torch.float32, the model's is torch.int64, which"
    ):
        fit(model, {**model.state_dict(), "num_batches_tracked": torch.tensor(7.5)}, "ckpt.pt")


def test_a_lazy_model():
    with pytest.raises(
        UnknownObjective, match="the model's parameter 'weight' has no shape yet. Run one batch through"
    ):
        fit(nn.LazyLinear(3), {"weight": torch.ones(3, 2), "bias": torch.ones(3)}, "ckpt.pt")


def test_many_names_do_not_take_long():
    """Four thousand names of each side, none alike."""
    big = nn.ModuleDict({f"layer{i}": nn.Linear(1, 1) for i in range(2000)})
    with pytest.raises(UnknownObjective, match="and 3995 more"):
        fit(big, {f"other.{i}.w": torch.ones(1) for i in range(4000)}, "ckpt.pt")


def test_trust_is_no_reason_to_skip_the_layout(path: Path):
    torch.save(two_models(), path)
    with pytest.raises(CurvkitError, match="holds several models"):
        read(path, trust=Trust(everything=True))


def test_an_epoch_is_no_step(path: Path):
    torch.save({"model": weights(), "epoch": 3}, path)
    assert (read(path).step, inspect(path).step) == (None, None)
