"""Options that are set elsewhere than on the command line, or that were typed and have no effect: what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from curvkit_cli.main import run
from samples import TRAIN, net

Typed = Callable[..., tuple[int, str, str]]
FAST = ("ckpt.pt", "--objective", "train.py:objective", "--no-preflight", "--seed", "0")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A user's train.py and a checkpoint; wide enough that no message is broken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    Path("train.py").write_text(TRAIN)
    Path("text.txt").write_text("To be, or not to be. " * 40)
    torch.save(net().state_dict(), "ckpt.pt")
    return tmp_path


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


# ---- variables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "name", "value", "said"),
    [
        (
            "sharpness",
            "CURVKIT_SHARPNESS_NUM",
            "x",
            "Error: Invalid value for the variable CURVKIT_SHARPNESS_NUM: 'x' is not a valid integer range.",
        ),
        ("trace", "CURVKIT_TRACE_METHOD", "magic", "for the variable CURVKIT_TRACE_METHOD: 'magic' is not one of"),
        ("trace", "CURVKIT_TRACE_MEMORY", "4 cups", "for the variable CURVKIT_TRACE_MEMORY: '4 cups' is not a size."),
        (
            "sharpness",
            "CURVKIT_SHARPNESS_TOLERANCE",
            "2",
            "default is 1e-3. --tolerance is set by the variable CURVKIT_SHARPNESS_TOLERANCE.",
        ),
        (
            "sharpness",
            "CURVKIT_SHARPNESS_SPLIT",
            "test",
            "pass --data too, or leave it out. --split is set by the variable CURVKIT_SHARPNESS_SPLIT.",
        ),
    ],
)
def test_a_bad_value_of_a_variable_is_said_with_its_name(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, command: str, name: str, value: str, said: str
):
    monkeypatch.setenv(name, value)
    code, out, err = typed(command, *FAST)
    assert (code, out) == (2, "")
    assert said in err
    assert "warning" not in err


def test_a_bad_value_that_is_typed_is_said_with_its_flag(typed: Typed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CURVKIT_SHARPNESS_NUM", "x")
    code, _, err = typed("sharpness", *FAST, "--num", "y")
    assert code == 2
    assert "Invalid value for '-k' / '--num': 'y' is not" in err
    assert "CURVKIT" not in err


def test_a_value_of_the_configuration_that_is_refused_is_said_with_the_file(typed: Typed):
    Path("curvkit.toml").write_text('objective = "train.py:objective"\n[defaults]\ntolerance = 2\n')
    code, _, err = typed("sharpness", "ckpt.pt")
    assert code == 2
    assert "Error: --tolerance 2.0 must lie in (0, 1)." in err
    assert f"--tolerance is set in {Path.cwd() / 'curvkit.toml'}." in err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("CURVKIT_SHARPNES_NUM", "; the nearest is CURVKIT_SHARPNESS_NUM"),
        ("CURVKIT_SHARPNESS_TOLERENCE", "; the nearest is CURVKIT_SHARPNESS_TOLERANCE"),
        ("CURVKIT_SHARPNESS_NO_PREFLIGHT", "; the nearest is CURVKIT_SHARPNESS_PREFLIGHT"),
        ("CURVKIT_OBJECTIV", "; the nearest is CURVKIT_OBJECTIVE"),
        ("CURVKIT_XYZ\x1b[31m", "CURVKIT_XYZ\\x1b[31m, which has no effect\n"),
    ],
)
def test_a_variable_that_sets_nothing_is_said_once(typed: Typed, monkeypatch: pytest.MonkeyPatch, name: str, said: str):
    monkeypatch.setenv(name, "secret")
    code, _, err = typed("trace", *FAST, "-q", "--plain")
    assert code == 0
    assert err.count("warning: no option is set by the variable CURVKIT_") == 1
    assert said in err
    assert "secret" not in err


@pytest.mark.parametrize("command", ["sharpness", "trace"])
def test_a_variable_that_sets_something_is_not_warned_of(typed: Typed, monkeypatch: pytest.MonkeyPatch, command: str):
    """Of any command, and those that open no door whatever their value."""
    known = ("CURVKIT_TRACE_SEED", "CURVKIT_SHARPNESS_SEED", "CURVKIT_DEMO_STEPS", "CURVKIT_INSPECT_KEY")
    for name in (*known, "CURVKIT_TRUST", "CURVKIT_SHARPNESS_ALLOW"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("CURVKIT_OBJECTIVE", "train.py:objective")
    code, _, err = typed(command, "ckpt.pt", "-q", "--plain", "--no-preflight")
    assert (code, err) == (0, "")


# ---- typed, and without effect --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--seq-len", "8"),
            "--seq-len says how a text is cut, but the objective train.py:objective brings its own data. Leave it out.",
        ),
        (("--seq-len", "8", "--tokens", "64"), "--seq-len and --tokens say how a text is cut, but the objective"),
        (("--split", "test"), "--split says how a text is cut, but the objective train.py:objective brings"),
    ],
)
def test_how_a_text_is_cut_does_not_go_with_a_function(typed: Typed, arguments: tuple[str, ...], said: str):
    code, out, err = typed("sharpness", *FAST, *arguments)
    assert (code, out) == (2, "")
    assert said in err


def test_a_configured_function_brings_its_own_data_too(typed: Typed):
    Path("curvkit.toml").write_text('objective = "train.py:objective"\n[defaults]\ndata = "text.txt"\n')
    code, _, err = typed("sharpness", "ckpt.pt", "--tokens", "64")
    assert code == 2
    assert "--tokens says how a text is cut, but the objective train.py:objective brings its own data." in err
    code, _, err = typed("sharpness", "ckpt.pt", "--tokens", "64", "--data", "text.txt")
    assert "--data: text is for language models" in err


def test_how_a_text_is_cut_needs_a_text(typed: Typed):
    code, _, err = typed("sharpness", "ckpt.pt", "--tokens", "64", "--seq-len", "8")
    assert code == 2
    assert "--seq-len and --tokens say how a text is cut, but no text is named. Pass --data PATH or --demo-data" in err


def test_what_a_configuration_says_of_texts_is_no_matter_of_one_command(typed: Typed):
    Path("curvkit.toml").write_text('objective = "train.py:objective"\n[defaults]\nseq-len = 8\nfresh = true\n')
    code, _, err = typed("trace", "ckpt.pt", "-q", "--plain", "--no-preflight")
    assert (code, err) == (0, "")


@pytest.mark.slow
def test_fresh_without_a_folder_is_noted(typed: Typed):
    note = "note: --fresh has no effect without -o DIR\n"
    assert note in typed("trace", *FAST, "--fresh", "--plain")[2]
    assert note not in typed("trace", *FAST, "--fresh", "--plain", "-q")[2]
    assert note not in typed("trace", *FAST, "--fresh", "--plain", "-o", "results")[2]


# ---- the command that was typed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sharpness", "trace"])
def test_what_to_type_next_names_the_command_that_was_typed(typed: Typed, command: str):
    code, _, err = typed(command, "ckpt.pt")
    assert code == 3
    assert f"curvkit {command} ckpt.pt --objective train.py:objective" in err
    assert ("curvkit sharpness" in err) is (command == "sharpness")


# ---- how derivatives are said ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sharpness", "trace"])
def test_differences_are_said_as_such(typed: Typed, command: str):
    cheap = ("--no-data-doubt", "--no-limit") if command == "sharpness" else ("--method", "hutchinson")
    arguments = (*FAST[:3], "--seed", "0", "-q", "--plain", "--max-products", "8", *cheap)
    _, out, _ = typed(command, *arguments, "--rule", "difference")
    assert "derivatives\tdifferences of gradients in float64, at two steps that must agree\n" in out
    assert "preflight" not in out
    assert "derivatives\tnot checked: --no-preflight\n" in typed(command, *arguments, "--no-preflight")[1]
    assert "derivatives\tsecond derivatives agree with differences" in typed(command, *arguments)[1]


def test_one_of_each_is_said_in_the_singular(typed: Typed):
    Path("one.py").write_text(
        "import curvkit, torch\n"
        "def objective():\n"
        "    one = torch.ones(1, 1)\n"
        "    return curvkit.Objective(torch.nn.Linear(1, 1, bias=False), torch.nn.functional.mse_loss, [(one, one)])\n"
    )
    torch.save({"weight": torch.ones(1, 1)}, "one.pt")
    _, out, _ = typed("trace", "one.pt", "--objective", "one.py:objective", "-q", "--plain", "--seed", "0")
    assert "mse_loss, mean over 1 term · 1 example in 1 batch · 1 parameter · eval mode · float32\n" in out
    assert "cost\t1 product" in out


def test_the_kernels_of_attention_are_said_where_there_is_attention(typed: Typed):
    Path("attending.py").write_text(
        "import curvkit, torch\n"
        "class Attending(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        y = super().forward(x)\n"
        "        return torch.nn.functional.scaled_dot_product_attention(y, y, y)\n"
        "def objective():\n"
        "    x = torch.arange(24.0).view(4, 3, 2).sin()\n"
        "    return curvkit.Objective(Attending(2, 2), torch.nn.functional.mse_loss, [(x, x)])\n"
    )
    torch.save({"weight": torch.eye(2), "bias": torch.ones(2)}, "attending.pt")
    arguments = ("attending.pt", "--objective", "attending.py:objective", "--seed", "0", "-q", "--json")
    definition = json.loads(typed("trace", *arguments)[1])["result"]["definition"]
    assert definition["attention"] == "math"
    assert definition["text"].endswith(" · math attention")
    definition = json.loads(typed("trace", *FAST, "-q", "--json")[1])["result"]["definition"]
    assert definition["attention"] is None
    assert definition["text"].endswith(" · float32")
