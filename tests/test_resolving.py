"""Which objective belongs to a checkpoint: what --objective and --set may name, and what is said of everything else."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
import torch
from oracles import seeded
from samples import TRAIN, net

from curvkit import Objective, Recipe, save
from curvkit.checkpoints import read
from curvkit.errors import InvalidArgument, UnknownObjective
from curvkit.models import MLP
from curvkit.resolving import FactoryFailed, resolve
from curvkit.resolving.factories import call_factory, load_factory


@pytest.fixture(autouse=True)
def _the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty folder with train.py; modules that are loaded from it are forgotten afterwards, and sys.path is as before."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(TRAIN)
    modules, path = set(sys.modules), list(sys.path)
    yield
    assert sys.path == path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "ckpt.pt"
    torch.save(net().state_dict(), path)
    return path


# ---- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference", ["train.py", "train.py:", ":objective", "train.py:a b", "a..b:f", ".a:f", "a b:f"]
)
def test_a_reference_of_another_form(reference: str):
    text = f"--objective {reference!r}: expected FILE.py:FUNCTION or MODULE:FUNCTION, for example train.py:objective."
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        load_factory(reference)


def test_a_missing_file(tmp_path: Path):
    text = (
        f"--objective 'trian.py': there is no such file. Paths are taken from the current directory, {tmp_path.name}."
    )
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        load_factory("trian.py:objective")


@pytest.mark.parametrize("module", ["trian", "trian.deeper", "os.trian"])
def test_a_missing_module(tmp_path: Path, module: str):
    text = f"--objective: no module {module!r} from {tmp_path.name}. Name the file instead, for example path/to/train.py:obj"
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        load_factory(f"{module}:objective")


@pytest.mark.parametrize("name", ["objectiv", "value"])
def test_a_missing_function(name: str):
    text = f"--objective 'train.py:{name}': train.py has no function {name!r}; marked with @curvkit.objective: objective. Write one"
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        load_factory(f"train.py:{name}")


def test_a_file_that_python_cannot_import(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "spec_from_file_location", lambda *arguments: None)
    with pytest.raises(InvalidArgument, match=r"--objective 'train.py': Python cannot import it. Pass a .py file."):
        load_factory("train.py:objective")


def test_a_file_elsewhere_and_a_module_of_the_current_directory():
    Path("sub/deeper").mkdir(parents=True)
    Path("sub/deeper/task.py").write_text("import beside\ndef make():\n    return beside.VALUE\n")
    Path("sub/deeper/beside.py").write_text("VALUE = 5\n")
    assert load_factory("sub/deeper/task.py:make")() == 5
    Path("sub/deeper/__init__.py").write_text("")
    Path("sub/__init__.py").write_text("")
    Path("sub/deeper/other.py").write_text("from sub.deeper.beside import VALUE\ndef make():\n    return VALUE\n")
    assert load_factory("sub.deeper.other:make")() == 5


def test_a_file_named_like_a_loaded_module_does_not_replace_it():
    import json

    Path("json.py").write_text("def make():\n    return 1\n")
    assert load_factory("json.py:make")() == 1
    assert sys.modules["json"] is json


def test_the_module_can_be_looked_up():
    """Dataclasses with string annotations, and pickle, find their module by name."""
    Path("with_dataclass.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int = 3\ndef make():\n    return A().x\n"
    )
    assert load_factory("with_dataclass.py:make")() == 3
    assert "with_dataclass" in sys.modules


IMPORTS = {
    "raises": ("raise KeyError('broken')", KeyError),
    "imports what is not there": ("import nothing_of_that_name", ModuleNotFoundError),
    "is no Python": ("def objective(:", SyntaxError),
    "ends": ("raise SystemExit(2)", SystemExit),
}


@pytest.mark.parametrize("how", IMPORTS)
@pytest.mark.parametrize("form", ["broken.py", "broken"])
def test_a_file_whose_import_fails(how: str, form: str):
    source, kind = IMPORTS[how]
    Path("broken.py").write_text(source)
    with pytest.raises(FactoryFailed, match=rf"^{re.escape(form)} was imported$") as caught:
        load_factory(f"{form}:objective")
    assert type(caught.value.__cause__) is kind
    assert "broken" not in sys.modules


# ---- the function and --set -----------------------------------------------------------------------------------------


def an_objective(**changes: Any) -> Objective:
    x = torch.ones(4, 2)
    return Objective(torch.nn.Linear(2, 2), torch.nn.functional.mse_loss, [(x, x)])


class Recorder:
    """Makes a factory with a signature, and keeps what it was called with."""

    def __init__(self) -> None:
        self.got: dict[str, Any] = {}

    def factory(self, kind: Any) -> Any:
        def make(value: Any = None) -> Objective:
            self.got["value"] = value
            return an_objective()

        make.__annotations__ = {"value": kind}
        return make


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "128", 128),
        (int, "-3", -3),
        (float, "1e-3", 1e-3),
        (float, "3", 3.0),
        (str, "3", "3"),
        (str, "a=b", "a=b"),
        (bool, "true", True),
        (bool, "No", False),
        (bool, "0", False),
        (int | None, "5", 5),
        (int | None, "None", None),
        (Optional[float], "none", None),  # noqa: UP045  the old spelling
        (int | float, "2", 2),
        (int | float, "2.5", 2.5),
        (Literal["relu", "tanh"], "tanh", "tanh"),
        (Literal[16, 32], "32", 32),
        (Literal["a"] | None, "none", None),
    ],
)
def test_values_are_converted_by_the_annotations(kind: Any, text: str, value: Any):
    recorder = Recorder()
    call_factory(recorder.factory(kind), {"value": text})
    assert recorder.got["value"] == value
    assert type(recorder.got["value"]) is type(value)


@pytest.mark.parametrize(
    ("kind", "text", "shown"),
    [
        (int, "abc", "int"),
        (int, "2.5", "int"),
        (float, "fast", "float"),
        (bool, "maybe", "bool"),
        (int | None, "x", "int or None"),
        (Literal["relu", "tanh"], "gelu", "Literal['relu', 'tanh']"),
        (list[int], "3", "list[int]"),
        (torch.device, "cpu", "device"),
    ],
)
def test_values_that_do_not_convert(kind: Any, text: str, shown: str):
    expected = (
        f"--set value={text}: not a value of type {shown}, which the function asks for. Only bool, int, float, str,"
    )
    with pytest.raises(InvalidArgument, match=re.escape(expected)):
        call_factory(Recorder().factory(kind), {"value": text})


def test_without_annotations_the_defaults_decide():
    got: dict[str, Any] = {}

    def make(count=3, rate=0.5, flag=True, name="a", nothing=None, **rest):
        got.update(count=count, rate=rate, flag=flag, name=name, nothing=nothing, **rest)
        return an_objective()

    settings = {"count": "4", "rate": "2", "flag": "no", "name": "7", "nothing": "1", "more": "8"}
    call_factory(make, settings)
    assert got == {"count": 4, "rate": 2.0, "flag": False, "name": "7", "nothing": "1", "more": "8"}


def test_annotations_that_do_not_resolve_fall_back_to_the_defaults():
    def make(count: Nowhere = 3):  # noqa: F821
        assert count == 4
        return an_objective()

    call_factory(make, {"count": "4"})


def test_an_unknown_keyword():
    with pytest.raises(InvalidArgument, match=r"--set hiden=3: the function takes hidden. Correct the name."):
        call_factory(load_factory("train.py:objective"), {"hiden": "3"})
    with pytest.raises(InvalidArgument, match=r"--set a=3: the function takes no arguments. Correct the name."):
        call_factory(lambda: an_objective(), {"a": "3"})


def test_a_missing_argument():
    with pytest.raises(InvalidArgument, match=r"--objective: the function needs width, depth. Add --set width=VALUE."):
        call_factory(load_factory("train.py:needs"), {})
    with pytest.raises(InvalidArgument, match=r"the function needs depth. Add --set depth=VALUE."):
        call_factory(load_factory("train.py:needs"), {"width": "6"})


def test_what_it_returns():
    with pytest.raises(
        UnknownObjective, match=r"--objective: a_model\(\) returned a Net. It must return curvkit.Objective"
    ):
        call_factory(load_factory("train.py:a_model"), {})
    with pytest.raises(UnknownObjective, match=r"--objective: dict\(\) returned a dict."):  # it has no signature
        call_factory(load_factory("builtins:dict"), {})


@pytest.mark.parametrize(
    ("name", "kind"), [("raises", KeyError), ("ends", SystemExit), ("lone_batch", InvalidArgument)]
)
def test_a_function_that_raises(name: str, kind: type[BaseException]):
    with pytest.raises(FactoryFailed, match=rf"^{name}\(\) made the objective$") as caught:
        call_factory(load_factory(f"train.py:{name}"), {})
    assert type(caught.value.__cause__) is kind


def test_ctrl_c_in_the_function_is_no_failure_of_it():
    def make() -> Objective:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_factory(make, {})


# ---- the order: what the user names, then the recipe, then the error that teaches -----------------------------------


def test_the_weights_go_into_the_model_that_the_function_made(checkpoint: Path):
    found = resolve(read(checkpoint), reference="train.py:objective")
    assert found.source == "train.py:objective (--objective)"
    for name, tensor in found.objective.model.state_dict().items():
        assert torch.equal(tensor, net().state_dict()[name])


def test_a_function_may_import_what_lies_beside_it_when_it_is_called(checkpoint: Path):
    Path("beside.py").write_text("HIDDEN = 6\n")
    assert resolve(read(checkpoint), reference="train.py:lazy").objective.parameters.n == 51


def test_the_random_state_is_left_alone(checkpoint: Path):
    Path("seeding.py").write_text(
        "import random, numpy, torch, train\ntorch.manual_seed(3); random.seed(3); numpy.random.seed(3)\n"
        "def objective():\n    torch.manual_seed(4)\n    return train.objective()\n"
    )
    before = torch.get_rng_state()
    resolve(read(checkpoint), reference="seeding.py:objective")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("with_reference", [True, False])
def test_what_the_user_names_wins_over_the_recipe(tmp_path: Path, with_reference: bool):
    with seeded():
        model = MLP([4, 3])
    recipe = Recipe("mlp", {"sizes": [4, 3]}, "mse_loss", {"x": torch.ones(2, 4), "y": torch.ones(2, 3)})
    path = save(tmp_path / "ckpt.pt", model=model, recipe=recipe)
    Path("mine.py").write_text(
        "import torch, curvkit\nfrom curvkit.models import MLP\ndef objective():\n"
        "    return curvkit.Objective(MLP([4, 3]), torch.nn.functional.l1_loss, [(torch.ones(2, 4), torch.ones(2, 3))])\n"
    )
    found = resolve(read(path), reference="mine.py:objective" if with_reference else None)
    assert found.objective.loss.name == ("l1_loss" if with_reference else "mse_loss")


def test_settings_without_a_function(checkpoint: Path):
    text = "--set width=...: there is no function that it could go to. It belongs to --objective FILE.py:FUNCTION."
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        resolve(read(checkpoint), settings={"width": "3"})


def test_the_error_that_teaches(tmp_path: Path):
    path = tmp_path / "ckpt.pt"
    optimizer = torch.optim.AdamW(net().parameters(), lr=3e-4)
    torch.save({"model": net().state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, path)
    with pytest.raises(UnknownObjective) as caught:
        resolve(read(path))
    assert str(caught.value).splitlines() == [
        f"{path} holds weights but does not say which model, loss or data to use.",
        "  found    training dict · 4 tensors, 51 numbers, float32 · step 3 · optimizer with lr 0.0003 · keys: model, optimizer, "
        "epoch",
        "  missing  an objective: a function returning curvkit.Objective(model, loss, data)",
        f"  do one   curvkit sharpness {path} --objective train.py:objective",
        "           curvkit.save(path, model=model, recipe=...)    for curvkit's own models (mlp, resnet, decoder): no flag then",
    ]


def test_only_the_first_batches(checkpoint: Path):
    found = resolve(read(checkpoint), reference="train.py:objective", num_batches=1)
    assert [len(y) for _, y in found.objective.batches] == [10]
    assert len(resolve(read(checkpoint), reference="train.py:objective").objective.batches) == 2


def test_data_that_is_none(checkpoint: Path):
    with pytest.raises(UnknownObjective, match="Objective: data gave no batches"):
        resolve(read(checkpoint), reference="train.py:no_data")


def test_weights_of_another_size(checkpoint: Path):
    with pytest.raises(UnknownObjective, match=re.escape(f"{checkpoint}: the weights do not fit the model")):
        resolve(read(checkpoint), reference="train.py:objective", settings={"hidden": "8"})
