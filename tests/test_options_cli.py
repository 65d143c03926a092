"""Which value an option takes: what is typed, then the environment, then the configuration; and what may stand in each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from curvkit_cli.main import curvkit as commands
from curvkit_cli.main import run
from samples import TRAIN, Payload, environment, net

Typed = Callable[..., tuple[int, str, str]]
FAST = ("--no-data-doubt", "--no-preflight")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A project with a configuration, a user's train.py in another folder of it, and a checkpoint in a third."""
    project = tmp_path / "project"
    for name in (".git", "code", "runs"):
        (project / name).mkdir(parents=True)
    monkeypatch.chdir(project)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    Path("code/train.py").write_text(TRAIN)
    torch.save(net().state_dict(), "runs/ckpt.pt")
    config('objective = "code/train.py:objective"')
    modules = set(sys.modules)
    yield project
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def config(text: str, path: str = "curvkit.toml") -> None:
    Path(path).write_text(f"{text}\n")


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def record(typed: Typed) -> Callable[..., dict[str, Any]]:
    def call(*arguments: str, command: str = "sharpness") -> dict[str, Any]:
        code, out, err = typed(command, "runs/ckpt.pt", "--json", *arguments)
        assert code == 0, err
        return json.loads(out)["record"]

    return call


# ---- the configuration ----------------------------------------------------------------------------------------------


def test_the_objective_of_the_configuration(typed: Typed):
    code, out, err = typed("sharpness", "runs/ckpt.pt", *FAST, "--json", "--seed", "0")
    assert (code, err) == (0, "objective: code/train.py:objective (from curvkit.toml)\n")
    written = json.loads(out)["record"]
    assert written["config"]["path"] == "curvkit.toml"
    assert re.fullmatch(r"sha256-ends:[0-9a-f]{16}", written["config"]["digest"])
    assert re.fullmatch(r"[0-9a-f]{16}", written["objective"]["sha256"])
    assert "config" not in written["options"]


def test_it_is_found_from_another_folder(typed: Typed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir("code")
    code, _, err = typed("sharpness", "../runs/ckpt.pt", *FAST, "--plain")
    assert (code, err) == (0, "objective: code/train.py:objective (from curvkit.toml)\n")


@pytest.mark.slow
def test_settings_and_defaults(record: Any):
    """Defaults of every command, and of one; what is typed wins, then the environment."""
    config(
        'objective = "code/train.py:typed"\n[set]\nhidden = 6\nscale = 0.5\nflag = true\nact = "relu"\n'
        '[defaults]\nseed = 5\ndata-doubt = false\npreflight = false\nmemory = "2GiB"\n[defaults.trace]\nseed = 6\nmethod = "exact"'
    )
    options = record()["options"]
    assert options["seed"] == {"value": "5", "source": "default_map"}
    assert options["memory"] == {"value": str(2 << 30), "source": "default_map"}
    assert options["preflight"] == {"value": "False", "source": "default_map"}
    del sys.modules["train"]
    assert record("--set", "scale=2")["options"]["set"]["source"] == "commandline"
    got = sys.modules["train"].objective.got
    assert (got["hidden"], got["scale"], got["flag"], got["act"]) == (6, 2.0, True, "relu")
    traced = record(command="trace")["options"]
    assert traced["seed"] == {"value": "6", "source": "default_map"}
    assert traced["method"] == {"value": "exact", "source": "default_map"}


def test_typed_before_environment_before_configuration(record: Any, monkeypatch: pytest.MonkeyPatch):
    config('objective = "code/train.py:objective"\n[defaults]\nseed = 5')
    assert record(*FAST)["seed"] == 5
    monkeypatch.setenv("CURVKIT_SHARPNESS_SEED", "7")
    assert record(*FAST)["options"]["seed"] == {"value": "7", "source": "environment"}
    assert record(*FAST, "--seed", "9")["options"]["seed"] == {"value": "9", "source": "commandline"}


def test_an_objective_in_the_environment(typed: Typed, record: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CURVKIT_OBJECTIVE", "code/train.py:prints")
    _, _, err = typed("sharpness", "runs/ckpt.pt", *FAST, "--plain")
    assert err.endswith("objective: code/train.py:prints (CURVKIT_OBJECTIVE)\n")
    assert record(*FAST)["options"]["objective"] == {"value": "code/train.py:prints", "source": "environment"}
    _, _, err = typed("trace", "runs/ckpt.pt", "--no-preflight", "--plain", "--objective", "code/train.py:objective")
    assert err == "objective: code/train.py:objective (--objective)\n"


def test_a_configuration_that_is_named_and_none(typed: Typed):
    config('objective = "code/train.py:prints"', "other.toml")
    _, _, err = typed("sharpness", "runs/ckpt.pt", *FAST, "--plain", "-c", "other.toml")
    assert "objective: code/train.py:prints (from other.toml)" in err
    code, _, err = typed("sharpness", "runs/ckpt.pt", "--no-config")
    assert code == 3
    assert "curvkit init runs/ckpt.pt" in err
    code, _, err = typed("sharpness", "runs/ckpt.pt", "--no-config", "-c", "other.toml")
    assert code == 2
    assert "--no-config and --config contradict each other: leave out one of them." in err


def test_paths_of_the_configuration_are_relative_to_it(typed: Typed, monkeypatch: pytest.MonkeyPatch, folder: Path):
    config('objective = "code/train.py:objective"\n[defaults]\nout = "results"\nseed = 0')
    monkeypatch.chdir("runs")
    assert typed("sharpness", "ckpt.pt", *FAST, "--plain", "-q")[0] == 0
    assert (folder / "results" / "sharpness.json").is_file()


@pytest.mark.slow
def test_format_and_lists_in_the_configuration(typed: Typed):
    config('objective = "code/train.py:objective"\n[defaults]\nformat = "json"\nparams = ["inner.*"]\nquiet = true')
    code, out, err = typed("sharpness", "runs/ckpt.pt", *FAST)
    assert (code, err) == (0, "")
    assert json.loads(out)["record"]["options"]["params"]["value"] == "('inner.*',)"
    code, out, _ = typed("sharpness", "runs/ckpt.pt", *FAST, "--plain")
    assert (code, out[:2]) == (0, "#\t")
    config('objective = "code/train.py:objective"\n[defaults]\nparams = "inner.*"')
    assert typed("sharpness", "runs/ckpt.pt", *FAST)[0] == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[defaults]\nseeed = 1",
            "[defaults] seeed: not known, nearest: 'seed'. `curvkit COMMAND --help` lists the options.",
        ),
        (
            "[defaults.sharpnes]\nseed = 1",
            "[defaults.sharpnes]: not known, nearest: 'sharpness'. `curvkit --help` lists the comm",
        ),
        ("[defaults.trace]\nblock-size = 2", "[defaults.trace] block_size: not known"),
        ("[defaults.sharpness]\nby = 'layer'", "[defaults.sharpness] by: not known"),
        (
            "[defaults]\nobjective = 'a:b'",
            "objective has no default: it stands at the top of the file: objective = ...",
        ),
        ("[defaults]\nset = 1", "set has no default: it has a table of its own: [set]."),
        ("[defaults]\ncheckpoint = 'a.pt'", "checkpoint has no default: the checkpoint is typed."),
        ("[defaults]\nconfig = 'a.toml'", "config has no default: the configuration is this file."),
        ("[defaults]\nseed = [1, 2]", "--seed takes one value, not a list."),
        ("[defaults]\nseed = 'x'", "Invalid value for '--seed': 'x' is not a valid integer range. It is set in"),
        ("[defaults]\nseed = 1.5", "'1.5' is not a valid integer range. It is set in"),
        ("[defaults]\nseed = true", "'true' is not a valid integer range. It is set in"),
        ("[defaults]\nmode = 'fast'", "'fast' is not one of 'eval', 'train', 'asis'. It is set in"),
        ("[defaults]\ntrust = true", "[defaults] sets 'trust', which opens a door for whatever file is measured."),
        ("[defaults.sharpness]\nallow = ['a.B']", "[defaults] sets 'allow', which opens a door"),
        ("trust = true", "unknown key 'trust'"),
        ("objective = ", "not valid TOML"),
    ],
)
def test_a_configuration_that_is_wrong(typed: Typed, text: str, said: str):
    config(text)
    code, out, err = typed("sharpness", "runs/ckpt.pt")
    assert (code, out) == (2, "")
    assert said in err
    assert "curvkit.toml" in err
    assert "Traceback" not in err


def test_every_option_that_may_have_a_default_can_be_set_by_its_name():
    """What the page says: the long name without its dashes; --trust and --allow are not among them."""
    from curvkit_cli.configured import _options

    names = set(_options(commands.commands["sharpness"]))
    assert {"seed", "num", "k", "max_products", "data", "seq_len", "ema", "key", "demo_data", "out", "color"} <= names
    assert not names & {
        "trust",
        "allow",
        "objective",
        "set",
        "config",
        "no_config",
        "checkpoint",
        "help",
        "json",
        "plain",
    }


# ---- trust: from the command line alone ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables",
    [
        {"CURVKIT_SHARPNESS_TRUST": "1"},
        {"CURVKIT_TRUST": "1"},
        {"CURVKIT_TRUST": "true", "CURVKIT_SHARPNESS_TRUST": "yes", "CURVKIT__TRUST": "1"},
        {"CURVKIT_SHARPNESS_ALLOW": "samples.Net torch.nn.modules.linear.Linear"},
        {"CURVKIT_ALLOW": "posix.system"},
    ],
)
def test_the_environment_opens_no_door(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, folder: Path, variables: dict[str, str]
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    torch.save({"model": net().state_dict(), "extra": Payload(folder / "owned")}, "runs/ckpt.pt")
    code, out, err = typed("sharpness", "runs/ckpt.pt")
    assert (code, out) == (4, "")
    assert "posix.system" in err
    assert not (folder / "owned").exists()


def test_the_command_line_opens_it(typed: Typed, folder: Path):
    """The payload runs: that is what --trust means, and why nothing but a person may say it."""
    torch.save({"model": net().state_dict(), "extra": Payload(folder / "owned")}, "runs/ckpt.pt")
    code, _, err = typed("sharpness", "runs/ckpt.pt", *FAST, "--trust")
    assert code == 0, err
    assert (folder / "owned").exists()


def test_a_class_that_is_allowed(typed: Typed):
    torch.save(net(), "runs/ckpt.pt")
    code, _, err = typed("sharpness", "runs/ckpt.pt", *FAST, "--allow", "samples.Net")
    assert code == 4
    assert "torch.nn.modules.linear.Linear" in err
    allowed = ("--allow", "samples.Net", "--allow", "torch.nn.modules.linear.Linear")
    code, _, err = typed("sharpness", "runs/ckpt.pt", *FAST, *allowed)
    assert code == 0, err


@pytest.mark.parametrize("name", ["Config", "train.", "a b.C", "", "train:Config", "os.system()"])
def test_what_is_no_name_of_a_class(typed: Typed, name: str):
    code, _, err = typed("sharpness", "runs/ckpt.pt", "--allow", name)
    assert code == 2
    assert f"{name!r} is not the full name of a class. Write for example train.Config." in err


def test_a_configuration_beside_a_download_is_refused(typed: Typed, folder: Path):
    download = folder.parent / "download"
    download.mkdir()
    torch.save(net().state_dict(), download / "ckpt.pt")
    config('objective = "evil.py:objective"', str(download / "curvkit.toml"))
    (download / "evil.py").write_text(f"import pathlib; pathlib.Path({str(folder / 'owned')!r}).touch()\n" + TRAIN)
    Path("curvkit.toml").unlink()
    code, out, err = typed("sharpness", str(download / "ckpt.pt"))
    assert (code, out) == (4, "")
    assert f"If it is yours: -c {download / 'curvkit.toml'}; to measure without it: --no-config." in err
    assert not (folder / "owned").exists()
    code, _, err = typed("sharpness", str(download / "ckpt.pt"), "--no-config")
    assert code == 3
    assert not (folder / "owned").exists()
    code, _, err = typed("sharpness", str(download / "ckpt.pt"), *FAST, "-c", str(download / "curvkit.toml"))
    assert code == 0, err
    assert (folder / "owned").exists()


# ---- without torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["sharpness", "--help"],
        ["trace", "runs/ckpt.pt", "--help"],
        ["inspect", "runs/ckpt.pt"],
        ["inspect", "curvkit.toml"],
        ["completion", "bash"],
        ["sharpness", "runs/ckpt.pt", "-c", "broken.toml"],
        ["sharpness", "../download/ckpt.pt"],
        ["sharpness", "runs/ckpt.pt", "--split", "a"],
        ["sharpness", "runs/ckpt.pt", "--allow", "x"],
    ],
    ids=" ".join,
)
def test_torch_is_not_imported(folder: Path, arguments: list[str]):
    config("nonsense", "broken.toml")
    (folder.parent / "download").mkdir()
    (folder.parent / "download" / "ckpt.pt").write_bytes(b"")
    config("", str(folder.parent / "download" / "curvkit.toml"))
    Path("curvkit.toml").write_text("" if "inspect" in arguments else 'objective = "a:b"')
    if ".." in arguments[1]:
        Path("curvkit.toml").unlink()
    script = f"import sys; from curvkit_cli.main import run; run({arguments}); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nothing.txt"], "Path 'nothing.txt' does not exist."),
        (["--seq-len", "0"], "0 is not in the range x>=1."),
        (["--tokens", "many"], "'many' is not a valid integer range."),
        (
            ["--split", "a"],
            "--split says how a text is cut, but the objective code/train.py:objective brings its own data.",
        ),
        (["--data", "code/train.py", "--demo-data"], "--data and --demo-data: the one is your data, the other is not."),
        (["--demo-data", "--no-config"], "--demo-data: text is for language models"),
        (
            ["--data", "code/train.py", "--objective", "code/train.py:objective"],
            "brings its own data. Leave one of them out.",
        ),
    ],
)
def test_data_typed_wrong(typed: Typed, arguments: list[str], said: str):
    code, out, err = typed("sharpness", "runs/ckpt.pt", *arguments)
    assert (code, out) == (2, "")
    assert said in err


# ---- help ------------------------------------------------------------------------------------------------------------


def test_the_help_has_headings(typed: Typed):
    for command in ("sharpness", "trace"):
        code, out, _ = typed(command, "--help")
        assert code == 0
        headings = re.findall(r"^(\w[\w ]+):$", out, re.MULTILINE)
        own = ("Eigenvalues", "Beside") if command == "sharpness" else ()
        assert [name for name in headings if name in own] == list(own)
        assert [name for name in headings if name not in own] == [
            "Model",
            "Data",
            "Accuracy and cost",
            "Output",
            "Other",
        ]
        assert "-h, --help" in out.partition("Other:")[2]
