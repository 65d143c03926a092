"""Which objective belongs to a checkpoint: what --objective and --set may name, and what is said of everything else."""

from __future__ import annotations

import functools
import hashlib
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
from curvkit import objective as mark
from curvkit.checkpoints import read
from curvkit.checkpoints.trust import Trust
from curvkit.errors import InvalidArgument, RefusedCheckpoint, UnknownObjective
from curvkit.models import MLP
from curvkit.resolving import FactoryFailed, Request, TextData, resolve
from curvkit.resolving.config import Config
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
    found = resolve(read(checkpoint), Request("train.py:objective"))
    assert found.source == "train.py:objective (--objective)"
    for name, tensor in found.objective.model.state_dict().items():
        assert torch.equal(tensor, net().state_dict()[name])


def test_a_function_may_import_what_lies_beside_it_when_it_is_called(checkpoint: Path):
    Path("beside.py").write_text("HIDDEN = 6\n")
    assert resolve(read(checkpoint), Request("train.py:lazy")).objective.parameters.n == 51


@pytest.mark.slow
def test_a_second_function_gets_the_modules_of_its_own_directory(checkpoint: Path):
    for folder, hidden in (("a", 6), ("b", 6)):
        Path(folder, "lib").mkdir(parents=True)
        Path(folder, "net.py").write_text(f"HIDDEN, NAME = {hidden}, {folder!r}\n")
        Path(folder, "lib", "inner.py").write_text(f"NAME = {folder!r}\n")  # a package without __init__.py
        own = "import net\nfrom lib import inner\n" + TRAIN
        Path(folder, "train.py").write_text(
            own
            + "\ndef named():\n    made = sized(net.HIDDEN)\n    made.model.said = net.NAME + inner.NAME\n    return made\n"
        )
    said = [resolve(read(checkpoint), Request(f"{folder}/train.py:named")).objective.model.said for folder in "aba"]
    assert said == ["aa", "bb", "aa"]


def test_a_forward_pass_may_import_what_lies_beside_it(checkpoint: Path):
    """Law: forgetting is for other directories alone; the user's own modules stay importable while the model is measured."""
    Path("late.py").write_text("SCALE = 1.0\n")
    Path("mine.py").write_text(
        "import late\n"
        + TRAIN
        + "\nclass Late(Net):\n    def forward(self, x):\n        import late\n        return late.SCALE * super().forward(x)\n"
        "\ndef named():\n    return curvkit.Objective(Late(), F.cross_entropy, data)\n"
    )
    objective = resolve(read(checkpoint), Request("mine.py:named")).objective
    assert objective.value() == pytest.approx(resolve(read(checkpoint), Request("mine.py:objective")).objective.value())
    assert "late" in sys.modules


def test_the_random_state_is_left_alone(checkpoint: Path):
    Path("seeding.py").write_text(
        "import random, numpy, torch, train\ntorch.manual_seed(3); random.seed(3); numpy.random.seed(3)\n"
        "def objective():\n    torch.manual_seed(4)\n    return train.objective()\n"
    )
    before = torch.get_rng_state()
    resolve(read(checkpoint), Request("seeding.py:objective"))
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
    found = resolve(read(path), Request("mine.py:objective" if with_reference else None))
    assert found.objective.loss.name == ("l1_loss" if with_reference else "mse_loss")


def test_settings_without_a_function(checkpoint: Path):
    text = "--set width=...: there is no function that it could go to. It belongs to --objective FILE.py:FUNCTION."
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        resolve(read(checkpoint), Request(settings={"width": "3"}))


def test_the_error_that_teaches(tmp_path: Path):
    path = tmp_path / "ckpt.pt"
    optimizer = torch.optim.AdamW(net().parameters(), lr=3e-4)
    torch.save({"model": net().state_dict(), "optimizer": optimizer.state_dict(), "step": 3}, path)
    with pytest.raises(UnknownObjective) as caught:
        resolve(read(path))
    assert str(caught.value).splitlines() == [
        f"{path} holds weights but does not say which model, loss or data to use.",
        "  found    training dict · 4 tensors, 51 numbers, float32 · step 3 · AdamW with lr 0.0003 · keys: model, optimizer, "
        "step",
        "  missing  an objective: a function returning curvkit.Objective(model, loss, data)",
        f"  do one   curvkit init {path}    writes a file with such a function, to fill in",
        f"           curvkit sharpness {path} --objective train.py:objective",
        "           curvkit.save(path, model=model, recipe=objective)    in the training script: no flag then",
        "           curvkit.save(path, model=model, recipe=Recipe(...))    for curvkit's own models (mlp, resnet, decoder, nanogpt)",
    ]


def test_only_the_first_batches(checkpoint: Path):
    found = resolve(read(checkpoint), Request("train.py:objective", num_batches=1))
    assert [len(y) for _, y in found.objective.batches] == [10]
    assert len(resolve(read(checkpoint), Request("train.py:objective")).objective.batches) == 2


def test_data_that_is_none(checkpoint: Path):
    with pytest.raises(UnknownObjective, match="Objective: data gave no batches"):
        resolve(read(checkpoint), Request("train.py:no_data"))


def test_weights_of_another_size(checkpoint: Path):
    with pytest.raises(UnknownObjective, match=re.escape(f"{checkpoint}: the weights do not fit the model")):
        resolve(read(checkpoint), Request("train.py:objective", {"hidden": "8"}))


def test_a_file_of_weights_out_of_a_directory_of_hugging_face(checkpoint: Path):
    Path("config.json").write_text("{}")
    with pytest.raises(UnknownObjective) as caught:
        resolve(read(checkpoint))
    assert str(caught.value).splitlines()[2] == (
        f"           config.json beside it: pass the directory instead, {checkpoint.parent}"
    )


# ---- the order: flag, environment, configuration, recipe ------------------------------------------------------------


def a_config(directory: Path, **changes: Any) -> Config:
    directory.mkdir(exist_ok=True)
    (directory / "configured.py").write_text(TRAIN.replace("hidden: int = 6", "hidden: int = 99"))
    values = {"objective": "configured.py:objective", "settings": {"hidden": "6"}, **changes}
    return Config(directory / "curvkit.toml", **values)


def test_the_first_place_that_names_a_function_wins(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    config = a_config(checkpoint.parent / "elsewhere")
    assert resolve(read(checkpoint), Request(config=config)).source == "configured.py:objective (from curvkit.toml)"
    monkeypatch.setenv("CURVKIT_OBJECTIVE", "train.py:objective")
    assert resolve(read(checkpoint), Request(config=config)).source == "train.py:objective (CURVKIT_OBJECTIVE)"
    found = resolve(read(checkpoint), Request("train.py:prints", config=config))
    assert found.source == "train.py:prints (--objective)"
    assert (found.own_data, found.notes, found.tokens_digest) == (True, (), None)


@pytest.mark.slow
def test_a_configuration_names_what_lies_beside_it(checkpoint: Path):
    folder = checkpoint.parent / "elsewhere"
    for objective in ("configured.py:objective", "configured:objective"):
        assert (
            resolve(read(checkpoint), Request(config=a_config(folder, objective=objective))).objective.parameters.n
            == 51
        )
    with pytest.raises(UnknownObjective, match="the weights do not fit"):  # what is typed wins over what is configured
        resolve(read(checkpoint), Request(settings={"hidden": "7"}, config=a_config(folder)))
    with pytest.raises(
        InvalidArgument, match=re.escape(f"{folder / 'curvkit.toml'} 'absent.py': there is no such file. Paths")
    ):
        resolve(read(checkpoint), Request(config=a_config(folder, objective="absent.py:objective")))
    with pytest.raises(
        InvalidArgument, match=re.escape(f"{folder / 'curvkit.toml'}: no module 'absent' from {folder}.")
    ):
        resolve(read(checkpoint), Request(config=a_config(folder, objective="absent:objective")))
    with pytest.raises(UnknownObjective, match="does not say which model"):
        resolve(read(checkpoint), Request(config=Config(folder / "curvkit.toml")))


def test_a_text_for_what_is_no_language_model(checkpoint: Path):
    text = TextData(checkpoint.parent / "val.txt")
    with pytest.raises(InvalidArgument, match=f"--data: text is for language models .* {checkpoint} is a state dict"):
        resolve(read(checkpoint), Request(data=text))
    with pytest.raises(InvalidArgument, match="--demo-data: text is for language models"):
        resolve(read(checkpoint), Request(demo_data=True))
    with pytest.raises(InvalidArgument, match="--data and --objective: train.py:objective brings its own data"):
        resolve(read(checkpoint), Request("train.py:objective", data=text))


# ---- a recipe that names a function of the user's -------------------------------------------------------------------


def a_named_recipe(path: Path, **changes: Any) -> Path:
    """What `save` writes for train.py:objective, with the changes of a tampering hand."""
    recipe = {
        "format": 1,
        "objective": "train.py:objective",
        "kwargs": {"hidden": 6},
        "source_sha256": hashlib.sha256(Path("train.py").read_bytes()).hexdigest(),
    }
    kept = {key: value for key, value in {**recipe, **changes}.items() if value is not None}
    torch.save({"model": net().state_dict(), "curvkit": {"format": 1, "recipe": kept}}, path)
    return path


@pytest.mark.slow
def test_a_recipe_names_the_function_that_made_the_model(tmp_path: Path):
    train = load_factory("train.py:objective")
    path = save(tmp_path / "runs" / "ckpt.pt", model=net(), recipe=train)
    assert read(path).recipe == {
        "format": 1,
        "objective": "train.py:objective",
        "kwargs": {},
        "source_sha256": hashlib.sha256(TRAIN.encode()).hexdigest(),
    }
    assert resolve(read(path)).source == "train.py:objective (recipe in the checkpoint)"
    path = save(tmp_path / "ckpt.pt", model=net(7), recipe=functools.partial(train, hidden=7))
    assert resolve(read(path)).objective.parameters.n == 59
    with pytest.raises(UnknownObjective, match="the weights do not fit"):
        resolve(read(path), Request(settings={"hidden": "6"}))


def test_a_recipe_is_found_from_below_and_beside_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / ".git").mkdir()
    path = a_named_recipe(tmp_path / "ckpt.pt", objective="train:objective")
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "deeper")
    assert resolve(read(path)).objective.parameters.n == 51


def test_a_recipe_beside_the_checkpoint_counts_in_a_repository_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path / "src")
    Path("train.py").write_text(TRAIN)
    path = a_named_recipe(tmp_path / "src" / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").unlink()
    with pytest.raises(RefusedCheckpoint, match="has no file train.py"):
        resolve(read(path))
    (tmp_path / ".git").mkdir()
    assert resolve(read(path)).objective.parameters.n == 51


def test_a_home_directory_is_no_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = a_named_recipe(tmp_path / "ckpt.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        RefusedCheckpoint, match="is no project: downloads lie below it, too. Change to the directory of"
    ):
        resolve(read(path))
    assert "train" not in sys.modules


MARKED = "import curvkit\nopen('imported', 'w').close()\n@curvkit.objective\ndef objective(): pass\n"


@pytest.mark.parametrize(
    ("changes", "source", "text"),
    [
        ({"objective": "../train.py:objective"}, None, "which is no FILE.py:FUNCTION inside a project"),
        ({"objective": "/etc/train.py:objective"}, None, "which is no FILE.py:FUNCTION inside a project"),
        ({"objective": "..\\train.py:objective"}, None, "which is no FILE.py:FUNCTION inside a project"),
        ({"objective": "train.py:a b"}, None, "which is no FILE.py:FUNCTION inside a project"),
        ({"objective": "os:system"}, None, "has no file os.py. Code that a checkpoint names is imported only inside"),
        ({"objective": "absent.py:objective"}, None, "has no file absent.py"),
        ({"source_sha256": "0" * 64}, None, "is not the file that it was when the checkpoint was written"),
        ({"objective": "train.py:prints"}, None, "has no function prints at its top level with @curvkit.objective"),
        ({"objective": "train.py:absent"}, None, "has no function absent at its top level"),
        ({}, MARKED.replace("@curvkit.objective\n", ""), "has no function objective at its top level with @curvkit"),
        (
            {},
            MARKED.replace("@curvkit.objective", "@other"),
            "has no function objective at its top level with @curvkit",
        ),
        (
            {},
            MARKED.replace("def objective(): pass", "class C:\n    def objective(): pass"),
            "has no function objective",
        ),
        ({}, MARKED + "def objective(): pass\n", "has no function objective at its top level with @curvkit"),
        ({}, MARKED + "def (:\n", "is no Python that can be read"),
    ],
)
def test_code_that_a_checkpoint_names_is_refused(
    tmp_path: Path, changes: dict[str, Any], source: str | None, text: str
):
    if source is not None:
        Path("train.py").write_text(source)
    path = a_named_recipe(tmp_path / "ckpt.pt", **changes)
    with pytest.raises(RefusedCheckpoint, match=re.escape(text)) as caught:
        resolve(read(path))
    assert "Nothing was imported." in str(caught.value)
    assert not Path("imported").exists()
    assert "train" not in sys.modules


def test_code_outside_of_the_project_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    outside, project = tmp_path / "download", tmp_path / "project"
    outside.mkdir()
    project.mkdir()
    monkeypatch.chdir(outside)
    Path("train.py").write_text(TRAIN + "open('imported', 'w').close()\n")
    path = a_named_recipe(outside / "ckpt.pt")
    monkeypatch.chdir(project)
    monkeypatch.setenv("CURVKIT_SHARPNESS_TRUST", "1")
    monkeypatch.setenv("CURVKIT_TRUST", "1")
    with pytest.raises(RefusedCheckpoint, match="has no file train.py. Code that a checkpoint names is imported only"):
        resolve(read(path))
    Path("train.py").symlink_to(outside / "train.py")
    with pytest.raises(RefusedCheckpoint, match="train.py is a link out of the current project"):
        resolve(read(path))
    Path("train.py").unlink()
    Path("train.py").write_text(TRAIN)
    with monkeypatch.context() as patched:
        patched.setattr("curvkit.resolving.named_code.MOST_BYTES", 10)
        with pytest.raises(RefusedCheckpoint, match="train.py is larger than any source file. Nothing was imported."):
            resolve(read(path))
    Path("train.py").unlink()
    assert not Path("imported").exists()
    found = resolve(read(path), Request(trust=Trust(everything=True)))
    assert Path("imported").exists()
    assert found.objective.parameters.n == 51


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": 9}, "Recipe: format 9 is not known to this version, which reads 1. Update curvkit."),
        (
            {"source_sha256": None},
            "Recipe: a named recipe has the texts objective and source_sha256, and the dict kwargs.",
        ),
        ({"objective": 3}, "Recipe: a named recipe has the texts"),
        ({"kwargs": [6]}, "Recipe: a named recipe has the texts"),
        ({"kwargs": {3: 6}}, "Recipe: a named recipe has the texts"),
        ({"builder": "mlp"}, "and the dict kwargs, but not 'builder'."),
        ({"kwargs": {"hiden": 6}}, "The recipe in the checkpoint gives hiden=6, but the function takes hidden."),
    ],
)
def test_a_named_recipe_of_another_form(tmp_path: Path, changes: dict[str, Any], text: str):
    path = a_named_recipe(tmp_path / "ckpt.pt", **changes)
    with pytest.raises(UnknownObjective, match=re.escape(text)):
        resolve(read(path))


def test_a_function_that_could_not_be_found_again(tmp_path: Path):
    @mark
    def inner() -> None: ...

    train = load_factory("train.py:objective")
    for recipe, text in [
        (functools.partial(train, 6), "recipe is a partial with positional arguments (6,). Give them by keyword."),
        (load_factory("train.py:prints"), "recipe=prints is not marked. Write @curvkit.objective above the function"),
        (inner, "is no function at the top level of a file, so that it could not be found again"),
    ]:
        with pytest.raises(InvalidArgument, match=re.escape(text)):
            save(tmp_path / "ckpt.pt", model=net(), recipe=recipe)
    with pytest.raises(InvalidArgument, match="a checkpoint holds tensors and plain values only"):
        save(tmp_path / "ckpt.pt", model=net(), recipe=functools.partial(train, hidden=object()))
