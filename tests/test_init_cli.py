"""curvkit init: files that run once they are filled in, whatever a stranger wrote into the checkpoint."""

from __future__ import annotations

import argparse
import ast
import datetime
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from curvkit_cli import scaffold
from curvkit_cli.guesses import Guess
from curvkit_cli.main import run
from curvkit_cli.scaffold import Found
from samples import environment, net, truth

from curvkit import Recipe, save
from curvkit.models import MLP

Typed = Callable[..., tuple[int, str, str]]
MODEL = '    raise NotImplementedError("curvkit_objective.py: make_model() does not return the model yet")\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_what_it_writes_runs_once_the_model_is_there(typed: Typed):
    content = {"model": net().state_dict(), "optimizer": torch.optim.SGD(net().parameters(), lr=0.1).state_dict()}
    torch.save({**content, "args": argparse.Namespace(hidden=6)}, "ckpt.pt")
    code, out, err = typed("init", "ckpt.pt")
    assert (code, err) == (0, "")
    assert out.startswith(
        "wrote curvkit_objective.py and curvkit.toml for training dict · 4 tensors, 51 numbers, float32"
    )
    assert out.endswith("then:\ncurvkit sharpness ckpt.pt\n")
    written = Path("curvkit_objective.py").read_text()
    assert "#     inner.weight  (6, 4)\n" in written
    code, out, err = typed("sharpness", "ckpt.pt")
    assert (code, out) == (3, "")
    assert "NotImplementedError: curvkit_objective.py: make_model() does not return the model yet" in err
    Path("curvkit_objective.py").write_text(written.replace(MODEL, "    from samples import Net\n    return Net()\n"))
    code, out, err = typed("sharpness", "ckpt.pt", "--plain", "--seed", "0", "--no-data-doubt")
    assert code == 0, err
    assert "curvkit_objective.py: make_data() still returns random numbers" in err
    assert "objective: curvkit_objective.py:objective (from curvkit.toml)" in err
    assert "\tconverged\n" in out


def test_with_ones_own_data_the_number_is_the_right_one(typed: Typed):
    """Closed form: the dense Hessian of the same model and data."""
    torch.save(net().state_dict(), "ckpt.pt")
    assert typed("init", "ckpt.pt")[0] == 0
    written = Path("curvkit_objective.py").read_text().replace(MODEL, "    from samples import Net\n    return Net()\n")
    head, _, tail = written.partition('    """The examples that are measured')
    tail = tail[tail.index("@curvkit.objective") :]
    Path("curvkit_objective.py").write_text(
        f"{head}    from samples import examples\n    return [examples()]\n\n\n{tail}"
    )
    code, out, err = typed("sharpness", "ckpt.pt", "--plain", "-q", "--seed", "0", "--no-data-doubt")
    assert code == 0, err
    value = float(out.splitlines()[1].split("\t")[1])
    assert value == pytest.approx(truth()[-1].item(), rel=1e-3)  # the tolerance of the search


@pytest.mark.parametrize("name", ["curvkit_objective.py", "curvkit.toml"])
def test_it_never_writes_over_a_file(typed: Typed, name: str):
    torch.save(net().state_dict(), "ckpt.pt")
    for make in (lambda: Path(name).write_text("mine"), lambda: Path(name).symlink_to("nowhere")):
        make()
        code, out, err = typed("init", "ckpt.pt")
        assert (code, out) == (2, "")
        assert f"{name} is already here and is not touched. Remove it, or go to another directory" in err
        assert sorted(path.name for path in Path().iterdir()) == sorted(["ckpt.pt", name])
        Path(name).unlink()


def test_a_folder_in_which_one_may_not_write(typed: Typed, folder: Path):
    torch.save(net().state_dict(), "ckpt.pt")
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    code, _, err = typed("init", "ckpt.pt")
    folder.chmod(0o755)
    assert code == 2
    assert (
        "curvkit_objective.py: permission denied. Nothing was written. Go to a directory in which you may write" in err
    )


def test_all_or_nothing_is_written(typed: Typed, monkeypatch: pytest.MonkeyPatch):
    """The second file appears between the look and the write."""
    torch.save(net().state_dict(), "ckpt.pt")
    described = scaffold.config_file

    def meanwhile(found: Found) -> str:
        Path("curvkit.toml").write_text("somebody else's")
        return described(found)

    monkeypatch.setattr(scaffold, "config_file", meanwhile)
    code, _, err = typed("init", "ckpt.pt")
    assert code == 2
    assert "curvkit.toml: file exists." in err
    assert not Path("curvkit_objective.py").exists()
    assert Path("curvkit.toml").read_text() == "somebody else's"


def test_a_checkpoint_with_a_recipe_needs_nothing(typed: Typed):
    x, y = torch.ones(4, 4), torch.tensor([0, 1, 2, 0])
    save("ckpt.pt", model=MLP([4, 3]), recipe=Recipe("mlp", {"sizes": [4, 3]}, "cross_entropy", {"x": x, "y": y}))
    code, out, _ = typed("init", "ckpt.pt")
    assert code == 0
    assert out == "Nothing to write: the checkpoint says itself how it is measured. Next:\ncurvkit sharpness ckpt.pt\n"
    assert not Path("curvkit_objective.py").exists()


def test_a_refused_checkpoint_writes_nothing(typed: Typed):
    torch.save(net(), "ckpt.pt")
    code, out, err = typed("init", "ckpt.pt")
    assert (code, out) == (4, "")
    assert "Traceback" not in err
    assert not Path("curvkit_objective.py").exists()


def test_a_pickled_model_is_opened_with_trust_alone(typed: Typed):
    torch.save(net(), "ckpt.pt")
    code, _, err = typed("init", "ckpt.pt")
    assert (code, err.endswith("If you trust whoever made it, add --trust.\n")) == (4, True)
    code, out, err = typed("init", "ckpt.pt", "--trust")
    assert (code, err, out.splitlines()[-1]) == (0, "", "curvkit sharpness ckpt.pt --trust")


def test_paths_among_the_settings_are_shown_as_text(typed: Typed):
    settings = argparse.Namespace(hidden=6, data=Path("/data/set"), when=datetime.date(2026, 1, 2))
    torch.save({"model": net().state_dict(), "args": settings}, "ckpt.pt")
    assert typed("init", "ckpt.pt")[0] == 0
    written = Path("curvkit_objective.py").read_text()
    assert "#     hidden = 6\n#     data = '/data/set'\n#     when = datetime.date(...)\n" in written
    assert "def objective(hidden: int = 6):" in written


def test_a_quantised_checkpoint_gets_no_files(typed: Typed):
    torch.save({name: tensor.to(torch.int8) for name, tensor in net().state_dict().items()}, "ckpt.pt")
    code, out, err = typed("init", "ckpt.pt")
    assert (code, out) == (4, "")
    assert "ckpt.pt: the weight 'inner.weight' is int8: quantised." in err
    assert not Path("curvkit_objective.py").exists()


def test_the_embedding_of_tokens_is_found_behind_those_of_positions():
    shapes = {
        "emb.position.weight": (512, 4),
        "emb.token_type.weight": (2, 4),
        "emb.word.weight": (64, 4),
        "c.weight": (3, 4),
    }
    assert Guess.of(shapes, "XForSequenceClassification").shape == (64, 4)
    assert Guess.of({"wpe.weight": (8, 4)}).shape == (8, 4)


# ---- a stranger's names and texts --------------------------------------------------------------------------------------

EVIL = [
    "a\nimport os; os.mkdir('owned')",
    '"""\nimport os; os.mkdir("owned")\n"""',
    "x\r\nraise SystemExit",
    "\x0cimport os",
    "\u2028import os; os.mkdir('owned')",
    "__import__('os').mkdir('owned')",
    "a = 3\x00",
    "{checkpoint}",
    "\ud800",
    "n" * 100_000,
    "torch",
    "lambda",
    "ﬁ",
    "\\",
    "",
]


def found(text: str) -> Found:
    settings: dict[Any, Any] = {
        text: 3,
        "name": text,
        "_class_path": f"a.{text}",
        "arch": text,
        "deep": {text: [text] * 9},
    }
    settings |= {"big": 10**5000, "nan": float("nan"), "inf": float("inf"), "none": None, "list": [1, 2], "flag": True}
    shapes = {f"{text}.wte.weight": (5, 4), f"{text}.bias": (3,), "empty": (0, 3)}
    return Found(text, text, shapes, settings, text, (text,))


@pytest.mark.parametrize("text", EVIL, ids=range(len(EVIL)))
def test_nothing_of_a_checkpoint_becomes_code(text: str, folder: Path):
    """The statements are those of a harmless checkpoint, and so is the configuration."""
    source = scaffold.objective_file(found(text))
    tree, harmless = (ast.parse(code) for code in (source, scaffold.objective_file(found("a"))))
    assert [type(node) for node in tree.body] == [type(node) for node in harmless.body]
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert calls == {ast.unparse(node.func) for node in ast.walk(harmless) if isinstance(node, ast.Call)}
    assert max(map(len, source.splitlines())) < 400 + 60 * scaffold.MOST_SETTINGS
    table = tomllib.loads(scaffold.config_file(found(text)))
    assert table == {"objective": "curvkit_objective.py:objective", "set": {}, "defaults": {}}
    Path("made.py").write_text(source, encoding="utf-8")
    exec(compile(source, "made.py", "exec"), {"__name__": "made"})
    assert sorted(path.name for path in folder.iterdir()) == ["made.py"]


def test_only_plain_hyper_parameters_become_arguments():
    source = scaffold.objective_file(found("width"))
    assert (
        "def make_model(width: int = 3, name: str = 'width', arch: str = 'width', flag: bool = True) -> nn.Module:"
        in source
    )
    text = scaffold.config_file(Found("c", "", {}, {"a": 'q"\\', "b": True, "c": 1e-3}))
    assert '# a = "q\\"\\\\"\n# b = true\n# c = 0.001\n' in text


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"a.weight": (6, 4), "b.weight": (3, 6)}, ((32, 4), torch.float32, (32,), torch.int64)),
        ({"a.weight": (6, 4), "b.weight": (1, 6)}, ((32, 4), torch.float32, (32, 1), torch.float32)),
        ({"c.weight": (6, 3, 5, 5), "b.weight": (10, 6)}, ((32, 3, 32, 32), torch.float32, (32,), torch.int64)),
        ({"c.weight": (6, 3, 5), "b.weight": (10, 6)}, ((32, 3, 64), torch.float32, (32,), torch.int64)),
        ({"wte.weight": (50, 6), "b.weight": (10, 6)}, ((32, 16), torch.int64, (32, 16), torch.int64)),
        ({"scale": (6,)}, ((32, 1), torch.float32, (32, 1), torch.float32)),
        ({}, ((32, 1), torch.float32, (32, 1), torch.float32)),
    ],
)
def test_the_data_have_the_shapes_that_the_weights_suggest(shapes: dict[str, tuple[int, ...]], expected: Any):
    space: dict[str, Any] = {"__name__": "made"}
    exec(compile(scaffold.objective_file(Found("c", "", shapes)), "made.py", "exec"), space)
    batches = space["make_data"]()
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert (tuple(inputs.shape), inputs.dtype, tuple(targets.shape), targets.dtype) == expected


def test_torch_is_not_imported_for_a_refusal():
    Path("curvkit.toml").write_text("")
    Path("ckpt.pt").write_bytes(b"")
    script = "import sys; from curvkit_cli.main import run; run(['init', 'ckpt.pt']); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0
