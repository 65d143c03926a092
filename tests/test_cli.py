"""The command as a user types it: what it prints where, with which exit code, and what it says of everything that can go wrong."""

from __future__ import annotations

import fcntl
import importlib.machinery
import inspect
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from curvkit_cli import failures, interrupts, progress, render, values
from curvkit_cli.main import EXIT_CODES, main, run
from curvkit_cli.main import curvkit as curvkit_commands
from rich.console import Console
from samples import PROGRAM, TRAIN, Payload, curvkit, environment, examples, flipped, net, truth

from curvkit import Recipe, save
from curvkit.checkpoints.reading import WEIGHT_KEYS
from curvkit.checkpoints.recipes import LOSSES
from curvkit.errors import CurvkitError, MissingExtra, NotConverged
from curvkit.linalg.krylov import wanted
from curvkit.models import BUILDERS, MLP

OBJECTIVE = ("--objective", "train.py:objective")
FAST = (*OBJECTIVE, "--no-data-doubt", "--seed", "0")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty folder with a user's train.py and a checkpoint of its network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    Path("train.py").write_text(TRAIN)
    torch.save(net().state_dict(), "ckpt.pt")
    return tmp_path


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def sharpness(typed: Any) -> Callable[..., tuple[int, str, str]]:
    return lambda *arguments: typed("sharpness", *arguments)


Typed = Callable[..., tuple[int, str, str]]


def with_recipe(path: str = "recipe.pt") -> str:
    """A checkpoint that needs no flag."""
    model = MLP([4, 3])
    x, y = examples()
    save(path, model=model, recipe=Recipe("mlp", {"sizes": [4, 3]}, "cross_entropy", {"x": x, "y": y}, batch_size=10))
    return path


# ---- help, version, and what they cost ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--help"], ["sharpness", "--help"], ["demo", "-h"], ["--version"], [], ["shapness"]]
)
def test_torch_is_not_imported_for_words(arguments: list[str]):
    script = f"import sys; from curvkit_cli.main import run; run({arguments}); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0


def test_help_and_version(typed: Typed):
    code, out, err = typed("--help")
    assert (code, err) == (0, "")
    assert "curvkit sharpness demo-run/final.pt     how sharp is it?" in out
    assert "130 interrupted" in out
    code, out, _ = typed("--version")
    assert code == 0
    assert re.fullmatch(r"curvkit \d+\.\d+\.\d+\n", out)


def test_nothing_typed_shows_the_help_and_counts_as_a_mistake(typed: Typed):
    code, out, err = typed()
    assert (code, out) == (2, "")
    assert "Usage: curvkit [OPTIONS] COMMAND" in err


def test_main_exits_with_the_code_and_tells_threads_not_to_spin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert int(os.environ["GOMP_SPINCOUNT"]) < 30_000_000_000  # libgomp's own while waiting actively
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert "GOMP_SPINCOUNT" not in os.environ


# ---- typed wrong: exit 2 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "Missing argument 'CHECKPOINT'."),
        (["nothere.pt"], "Path 'nothere.pt' does not exist."),
        (["ckpt.pt", "other.pt"], "Got unexpected extra argument (other.pt)"),
        (["ckpt.pt", "--bogus"], "No such option '--bogus'."),
        (["ckpt.pt", "--mode", "fast"], "'fast' is not one of 'eval', 'train', 'asis'."),
        (["ckpt.pt", "--which", "all"], "'all' is not one of 'largest', 'smallest', 'both', 'magnitude'."),
        (["ckpt.pt", "--dtype", "float16"], "'float16' is not one of 'auto', 'float32', 'float64'."),
        (["ckpt.pt", "--residency", "disk"], "'disk' is not one of 'auto', 'retained', 'streamed'."),
        (["ckpt.pt", "--format", "xml"], "'xml' is not one of 'auto', 'table', 'plain', 'json'."),
        (["ckpt.pt", "--color", "red"], "'red' is not one of 'auto', 'always', 'never'."),
        (["ckpt.pt", "-k", "0"], "0 is not in the range x>=1."),
        (["ckpt.pt", "-k", "many"], "'many' is not a valid integer range."),
        (["ckpt.pt", "--block-size", "0"], "0 is not in the range x>=1."),
        (["ckpt.pt", "--batches", "0"], "0 is not in the range x>=1."),
        (["ckpt.pt", "--max-products", "1"], "1 is not in the range x>=2."),
        (["ckpt.pt", "--seed", "-1"], "-1 is not in the range x>=0."),
        (["ckpt.pt", "--tolerance", "small"], "'small' is not a valid float."),
        (["ckpt.pt", "--max-time", "1parsec"], "'1parsec' is not a time. Write for example 90s, 2m or 1h."),
        (["ckpt.pt", "--memory", "lots"], "'lots' is not a size. Write for example 4GiB or 500MB."),
        (["ckpt.pt", "--set", "hidden"], "'hidden' is not of the form KEY=VALUE, for example hidden=128."),
        (["ckpt.pt", "--set", "a b=1"], "'a b=1' is not of the form KEY=VALUE"),
        (["ckpt.pt", "--out", "ckpt.pt"], "Directory 'ckpt.pt' is a file."),
        (["ckpt.pt", *FAST, "--tolerance", "2"], "Error: --tolerance 2.0 must lie in (0, 1)."),
        (["ckpt.pt", *FAST, "--tol", "0"], "Error: --tolerance 0.0 must lie in (0, 1)."),
        (["ckpt.pt", *FAST, "--tolerance", "nan"], "Error: --tolerance nan must lie in (0, 1)."),
        (
            ["ckpt.pt", *FAST, "--tolerance", "1e-9"],
            "Error: --tolerance 1e-09 is below 9.5e-07, the rounding of products in torch.float32. Allow more, or compute with --dtype",
        ),
        (
            ["ckpt.pt", *FAST, "-k", "1000"],
            "Error: --num 1000 and --block-size 1 must not exceed the number of parameters, 51. Ask for fewer eigenvalues by --num.",
        ),
        (
            ["ckpt.pt", *FAST, "-k", "3", "--max-products", "3"],
            "Error: --max-products 3 is too few: one step takes 1 and the resid",
        ),
        (
            ["ckpt.pt", *FAST, "--seed", "9" * 30],
            f"Error: --seed {'9' * 30} must be an integer in [0, 2**63); without the flag one is drawn. Pass for example --seed 0.",
        ),
        (
            ["ckpt.pt", *FAST, "--memory", "1KB"],
            "one product alone holds 3 of 51 parameters, so that 1,224 bytes are the least",
        ),
        (["ckpt.pt", *FAST, "--memory", "2KB"], "vectors of length 51 fit the memory budget (--memory); 1 eigenvalue"),
        (["ckpt.pt", *FAST, "--memory", "2KB"], "Raise --memory, or ask for fewer eigenvalues by --num."),
        (
            ["ckpt.pt", *FAST, "--params", "conv*"],
            "the pattern 'conv*' matches no trainable parameter. The model has: inner",
        ),
        (["ckpt.pt", "--objective", "train.py"], "expected FILE.py:FUNCTION or MODULE:FUNCTION"),
        (["ckpt.pt", "--objective", "trian.py:objective"], "--objective 'trian.py': there is no such file."),
        (["ckpt.pt", "--objective", "trian:objective"], "--objective: no module 'trian' from"),
        (
            ["ckpt.pt", "--objective", "train.py:objectiv"],
            "train.py has no function 'objectiv'; marked with @curvkit.objec",
        ),
        (["ckpt.pt", *OBJECTIVE, "--set", "hiden=3"], "--set hiden=3: the function takes hidden. Correct the name."),
        (["ckpt.pt", *OBJECTIVE, "--set", "hidden=big"], "--set hidden=big: not a value of type int"),
        (["ckpt.pt", "--set", "hidden=3"], "--set hidden=...: there is no function that it could go to."),
        (
            ["ckpt.pt", *FAST, "--device", "warp"],
            "--device warp: torch knows no such device. Write cpu, cuda, cuda:1, or auto",
        ),
        (
            ["ckpt.pt", *FAST, "--device", "meta"],
            "--device meta: this machine cannot use it (it holds no numbers). Use",
        ),
    ],
)
def test_typed_wrong(sharpness: Typed, arguments: list[str], text: str):
    code, out, err = sharpness(*arguments)
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err
    assert 'File "' not in err
    assert re.search(r"(lanczos|Hessian|sharpness): ", err) is None  # who refused is no concern of who typed


def test_a_demo_with_more_checkpoints_than_steps(typed: Typed):
    code, out, err = typed("demo", "run", "--steps", "3", "--saves", "10")
    assert (code, out) == (2, "")
    assert err == "Error: --saves 10 must lie between 1 and --steps 3. Save fewer checkpoints.\n"


def test_a_seed_of_the_users_own_function_is_not_ours(sharpness: Typed):
    code, _, err = sharpness("ckpt.pt", *OBJECTIVE, "--set", "seed=3")
    assert code == 2
    assert err.startswith("Error: --set seed=3: the function takes hidden.")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trace: method='exact' takes 51 products, rank=3.", "--method exact takes 51 products, --rank 3."),
        ("GGN: residency='disk' is not one of", "--residency disk is not one of"),
        ("DoubleHessian: replace it, or leave it out by patterns.", "replace it, or leave it out by --params."),
        ("sharpness: A=B num = 3 batch_size=4", "A=B num = 3 batch_size=4"),
        ("Recipe: batch_size=0 and num=1 must be", "Recipe: batch_size=0 and num=1 must be"),
        ("demo: run/final.pt is already there", "run/final.pt is already there"),
    ],
)
def test_translation(text: str, said: str):
    assert failures.as_typed(CurvkitError(text)) == said


def test_what_is_translated_exists():
    """A flag that was renamed, or advice that is worded in another way, would silently show Python's names again."""
    known = {
        name for command in curvkit_commands.commands.values() for option in command.params for name in option.opts
    }
    assert set(failures.FLAGS.values()) <= known
    source = re.sub(r'"\s+f?"', "", "".join(path.read_text() for path in failures.PACKAGE.rglob("*.py")))
    for phrase in failures.PHRASES:
        assert phrase in source
    for name in failures.FLAGS:
        assert f"{name}={{" in source


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(sharpness: Typed):
    code, out, err = sharpness("ckpt.pt", *FAST, "--device", "cuda")
    assert (code, out) == (2, "")
    assert re.search(r"Error: --device cuda: this machine cannot use it \(.+\)\. Use --device cpu\.\n$", err)


def test_an_unknown_command(typed: Typed):
    code, _, err = typed("sharpnes", "ckpt.pt")
    assert code == 2
    assert "No such command 'sharpnes'. Did you mean 'sharpness'?" in err


# ---- model, loss or data unknown, or not fitting: exit 3 ------------------------------------------------------------


def test_no_objective_teaches(sharpness: Typed):
    code, out, err = sharpness("ckpt.pt")
    assert (code, out) == (3, "")
    assert err.splitlines() == [
        "Error: ckpt.pt holds weights but does not say which model, loss or data to use.",
        "  found    state dict · 4 tensors, 51 numbers, float32",
        "  missing  an objective: a function returning curvkit.Objective(model, loss, data)",
        "  do one   curvkit init ckpt.pt    writes a file with such a function, to fill in",
        "           curvkit sharpness ckpt.pt --objective train.py:objective",
        "           curvkit.save(path, model=model, recipe=objective)    in the training script: no flag then",
        "           curvkit.save(path, model=model, recipe=Recipe(...))    for curvkit's own models (mlp, resnet, decoder, nanogpt)",
    ]


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (
            "a_model",
            "Error: --objective: a_model() returned a Net. It must return curvkit.Objective(model, loss, data).",
        ),
        ("lone_batch", "Put it in a list: data=[batch]. Raised in train.py, line "),
        ("no_data", "Error: Objective: data gave no batches."),
        (
            "frozen",
            "the model has no trainable parameter: all 4 of its parameters are frozen. Call requires_grad_(True) on",
        ),
        (
            "on_meta",
            "batch 0 has a tensor on meta, the model is on cpu. Move the data with batch.to(device), or the model.",
        ),
        (
            "not_scalar",
            "returned a tensor of shape (24, 3), torch.float32; it must return a scalar, or a pair (sum, count).",
        ),
        (
            "exhausted",
            "Error: out of memory (DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000",
        ),
    ],
)
def test_an_objective_that_does_not_do(sharpness: Typed, function: str, text: str):
    code, out, err = sharpness("ckpt.pt", "--objective", f"train.py:{function}")
    assert (code, out) == (3, "")
    assert text in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (lambda w: w.update(extra=torch.ones(1)), ["  unexpected  extra"]),
        (lambda w: w.pop("outer.bias"), ["  missing     outer.bias"]),
        (lambda w: w.update({"outer.bias": torch.ones(4)}), ["  other shape outer.bias: file (4,), model (3,)"]),
    ],
)
def test_weights_of_another_architecture(sharpness: Typed, change: Any, texts: list[str]):
    weights = net().state_dict()
    change(weights)
    torch.save(weights, "ckpt.pt")
    code, out, err = sharpness("ckpt.pt", *OBJECTIVE)
    assert (code, out) == (3, "")
    assert err.startswith("Error: ckpt.pt: the weights do not fit the model")
    for text in texts:
        assert text in err


# ---- file refused, unsafe or damaged: exit 4 ------------------------------------------------------------------------


def truncated() -> None:
    Path("ckpt.pt").write_bytes(Path("ckpt.pt").read_bytes()[:-200])


def weights(**changes: torch.Tensor) -> Callable[[], None]:
    return lambda: torch.save({**net().state_dict(), **{k.replace("_", "."): v for k, v in changes.items()}}, "ckpt.pt")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: Path("ckpt.pt").write_bytes(b""),
            "ckpt.pt: the file is empty. Saving was interrupted; take an earlier",
        ),
        (truncated, "ckpt.pt: the archive is cut short or still being written. Wait until it is complete"),
        (lambda: flipped(Path("ckpt.pt"), "ckpt/data/2"), "the record 'ckpt/data/2' does not match its checksum"),
        (lambda: Path("ckpt.pt").write_text("notes"), "ckpt.pt: not a checkpoint: it begins with b'notes'"),
        (
            lambda: torch.save(net(), "ckpt.pt"),
            "ckpt.pt: refused, a whole pickled model: it refers to samples.Net, torch.nn",
        ),
        (lambda: torch.save({"epoch": 3}, "ckpt.pt"), "ckpt.pt: no state dict found. Its keys are: epoch."),
        (
            weights(inner_weight=torch.full((6, 4), float("nan"))),
            "the weight 'inner.weight' has 24 NaN or infinite entries",
        ),
        (
            weights(outer_bias=torch.ones(3, dtype=torch.int8)),
            "the weight 'outer.bias' is torch.int8, the model's is torch.fl",
        ),
    ],
)
def test_a_file_that_is_refused(sharpness: Typed, make: Callable[[], Any], text: str):
    make()
    code, out, err = sharpness("ckpt.pt", *OBJECTIVE)
    assert (code, out) == (4, "")
    assert err.startswith("Error: ckpt.pt: ")
    assert text in err
    assert "Traceback" not in err


def test_a_directory_without_a_checkpoint_is_refused(sharpness: Typed):
    Path("run").mkdir()
    code, _, err = sharpness("run", *OBJECTIVE)
    assert code == 4
    assert err == "Error: run: the directory is empty. Pass the checkpoint itself.\n"


def test_a_payload_does_not_run(sharpness: Typed, folder: Path):
    torch.save({"model": net().state_dict(), "x": Payload(folder / "executed")}, "ckpt.pt")
    code, _, err = sharpness("ckpt.pt", *OBJECTIVE)
    assert code == 4
    assert f"it refers to {os.name}.system, and loading that could run code. Nothing was executed." in err
    assert not Path("executed").exists()


# ---- the user's own code raises: its traceback, and not ours --------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "code", "line", "last", "when"),
    [
        (
            "raises",
            3,
            'raise KeyError("my own mistake")',
            "KeyError: 'my own mistake'",
            "while raises() made the objective.",
        ),
        ("ends", 3, "raise SystemExit(0)", "SystemExit: 0", "while ends() made the objective."),
        (
            "bad_loss",
            1,
            'raise LookupError("no such column")',
            "LookupError: no such column",
            "by the model, the loss or the",
        ),
        (
            "bad_shapes",
            1,
            "torch.tanh(self.inner(x))",
            "RuntimeError: mat1 and mat2 shapes",
            "by the model, the loss or the",
        ),
        (
            "beyond_the_table",
            1,
            "multi_margin_loss",
            "RuntimeError: target out of range",
            "by the model, the loss or the",
        ),
    ],
)
def test_a_failure_in_the_users_code(sharpness: Typed, function: str, code: int, line: str, last: str, when: str):
    found, out, err = sharpness("ckpt.pt", "--objective", f"train.py:{function}")
    assert (found, out) == (code, "")
    assert "Traceback (most recent call last):" in err
    assert line in err
    assert re.search(rf"\nError: {re.escape(last)}", err)
    assert f"It was raised {when}" in err
    assert "report it" not in err
    home = Path(failures.__file__).resolve().parent
    for file in re.findall(r'File "([^"]+)"', err):
        assert not any(Path(file).resolve().is_relative_to(own) for own in (*failures.OWN, home))


def test_labels_that_are_no_classes_are_said_to_be(sharpness: Typed):
    code, out, err = sharpness("ckpt.pt", "--objective", "train.py:out_of_range", "--no-preflight")
    assert (code, out) == (3, "")
    assert (
        "Error: Objective: cross_entropy: 24 of 24 targets are no class: 5, 6, 7, where the classes are 0 to 2. Number"
        in err
    )
    assert "Traceback" not in err


def test_packages_that_lie_elsewhere_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Law: frames of click and torch are no frames of the user's, wherever they come from; what lies where the user works is."""
    place = tmp_path / "elsewhere"
    work = tmp_path / "work"
    for package in (place / "click", work / "torch"):
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    specs = {"click": place / "click" / "__init__.py", "torch": work / "torch" / "__init__.py"}
    monkeypatch.setattr(
        failures.importlib.util,
        "find_spec",
        lambda name: importlib.machinery.ModuleSpec(name, None, origin=str(specs[name])),
    )
    monkeypatch.chdir(work)
    homes = failures._installed.__wrapped__()
    assert homes[-2:] == (place.resolve(), (work / "torch").resolve())
    assert work.resolve() not in homes


def test_a_checkpoint_that_changes_while_it_is_measured(sharpness: Typed, monkeypatch: pytest.MonkeyPatch):
    """The digest is that of what was read."""
    before = json.loads(sharpness("ckpt.pt", *FAST, "--json")[1])["record"]["checkpoint"]
    Path("changing.py").write_text(
        "import torch\nfrom train import objective as made\n\n\n"
        "def objective():\n    torch.save({'w': torch.ones(3)}, 'ckpt.pt')\n    return made()\n"
    )
    monkeypatch.syspath_prepend(".")
    code, out, err = sharpness("ckpt.pt", "--objective", "changing.py:objective", *FAST[2:], "--json")
    said = "the checkpoint has changed since it was read; the digest in the record is that of what was read"
    assert code == 0
    assert f"warning: ckpt.pt: {said}\n" in err
    record = json.loads(out)["record"]
    assert record["checkpoint"] == before
    assert record["notes"][-1] == said


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("import nothing_of_that_name", ["Error: ModuleNotFoundError: No module named 'nothing_of_that_name'"]),
        ("def objective(:", ["    def objective(:", "Error: SyntaxError: invalid syntax"]),
        ("import sys\nsys.exit('usage')", ["Error: SystemExit: usage", "under: if __name__ == '__main__':"]),
    ],
)
def test_a_file_that_does_not_import(sharpness: Typed, source: str, texts: list[str]):
    Path("broken.py").write_text(source)
    code, out, err = sharpness("ckpt.pt", "--objective", "broken.py:objective")
    assert (code, out) == (3, "")
    for text in [*texts, "It was raised while broken.py was imported.", "broken.py"]:
        assert text in err
    assert str(failures.PACKAGE) not in err


def test_a_failure_in_an_installed_package_is_shown_from_there(sharpness: Typed):
    code, _, err = sharpness("ckpt.pt", "--objective", "json:loads", "--set", "s={")
    assert code == 3
    assert "json/decoder.py" in err
    assert "Error: json.decoder.JSONDecodeError:" in err
    assert str(failures.PACKAGE) not in err


def test_our_own_model_that_refuses_its_data_is_not_typed_wrong(sharpness: Typed):
    Path("mine.py").write_text(
        "import torch, curvkit\nfrom curvkit.models import MLP\ndef objective():\n    x = torch.ones(2, 5)\n"
        "    return curvkit.Objective(MLP([4, 3]), torch.nn.functional.mse_loss, [(x, x)])\n"
    )
    code, _, err = sharpness(with_recipe(), "--objective", "mine.py:objective")
    assert code == 3
    assert "Error: MLP: inputs of shape (2, 5)" in err


def raising(error: BaseException) -> Callable[..., None]:
    """A function that raises, in a file that counts as curvkit's."""
    source = "def fault(*arguments):\n    raise error\n"
    names: dict[str, Any] = {"error": error}
    exec(compile(source, str(failures.PACKAGE / "measures" / "made_up.py"), "exec"), names)
    return names["fault"]


def test_a_fault_of_ours_asks_for_a_report(sharpness: Typed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(render, "json_document", raising(ZeroDivisionError("impossible")))
    code, _, err = sharpness("ckpt.pt", *FAST)
    assert code == 1
    assert "Error: ZeroDivisionError: impossible" in err
    assert "in fault" in err
    assert "This is not an error that curvkit expects; please report it with the lines above." in err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "Error: out of memory (MemoryError)."),
        (
            RuntimeError("CUDA out of memory. Tried to allocate"),
            "Error: out of memory (CUDA out of memory. Tried to alloc",
        ),
        (OSError(28, "No space left on device"), "Error: output: no space left on device."),
        (OSError(13, "Permission denied", "a/b"), "Error: a/b: permission denied."),
    ],
)
def test_what_the_machine_refuses(sharpness: Typed, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str):
    monkeypatch.setattr(render, "json_document", raising(error))
    code, _, err = sharpness("ckpt.pt", *FAST)
    assert code == 1
    assert text in err
    assert 'File "' not in err


def test_each_class_of_error_has_its_code(sharpness: Typed, monkeypatch: pytest.MonkeyPatch):
    for kind, expected in ((NotConverged, 5), (MissingExtra, 1), (CurvkitError, 1)):
        monkeypatch.setattr(render, "json_document", raising(kind("what, got, allowed, next step")))
        code, _, err = sharpness("ckpt.pt", *FAST)
        assert (code, EXIT_CODES[kind]) == (expected, expected)
        assert err.endswith("Error: what, got, allowed, next step\n")


# ---- what is measured -----------------------------------------------------------------------------------------------


def result(out: str) -> dict[str, Any]:
    return json.loads(out)["result"]


def test_the_number_is_that_of_the_dense_hessian(sharpness: Typed):
    code, out, _ = sharpness("ckpt.pt", *FAST, "-k", "3", "--json", "--tolerance", "1e-5")
    assert code == 0
    found = result(out)["eigenvalues"]
    # in float32 the entries of H carry rounding of a few dozen eps: 1e-5 of the largest covers it
    slack = 1e-5 * truth()[-1].item()
    for entry, value in zip(found, truth().flip(0)[:3].tolist(), strict=True):
        assert entry["low"] - slack <= value <= entry["high"] + slack
        assert entry["converged"]


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "net", "weights", "params"])
def test_training_dicts(sharpness: Typed, key: str):
    torch.save({key: net().state_dict(), "epoch": 3}, "train.pt")
    code, out, _ = sharpness("train.pt", *FAST, "--json")
    assert code == 0
    assert result(out)["eigenvalues"] == result(sharpness("ckpt.pt", *FAST, "--json")[1])["eigenvalues"]


def test_a_checkpoint_with_a_recipe_needs_no_flag(sharpness: Typed):
    code, out, err = sharpness(with_recipe())
    assert code == 0
    assert err == "objective: recipe in the checkpoint (mlp, cross_entropy)\n"
    assert out.splitlines()[1].endswith("\tconverged")


@pytest.mark.slow
def test_settings_modules_and_modes(sharpness: Typed):
    torch.save(net(8).state_dict(), "wide.pt")
    assert sharpness("wide.pt", *FAST, "--set", "hidden=8")[0] == 0
    assert sharpness("ckpt.pt", *FAST, "--objective", "train:objective")[0] == 0
    code, out, _ = sharpness("ckpt.pt", *FAST, "--objective", "train.py:dropout", "--json")
    assert code == 0
    assert result(out)["definition"]["mode"] == "eval"
    for mode in ("train", "asis"):
        code, out, err = sharpness("ckpt.pt", *FAST, "--objective", "train.py:dropout", "--mode", mode)
        assert (code, out) == (1, "")
        assert "drop (Dropout) is active, so that the loss is random and has no Hessian." in err
        assert err.endswith("has no Hessian. Use --mode eval, the default, or set the probability to 0.\n")
    assert result(sharpness("ckpt.pt", *FAST, "--mode", "train", "--json")[1])["definition"]["mode"] == "train"


def test_options_reach_the_measurement(sharpness: Typed):
    code, out, _ = sharpness(
        *("ckpt.pt", *FAST, "--json", "--params", "outer.*", "--batches", "1", "--dtype", "float64", "--device", "cpu"),
        *(
            "--which",
            "both",
            "-k",
            "2",
            "--block-size",
            "2",
            "--residency",
            "streamed",
            "--tol",
            "1e-8",
            "--max-time",
            "1m",
        ),
    )
    assert code == 0
    document = json.loads(out)
    found, definition = document["result"], document["result"]["definition"]
    assert definition["parameters"] == 21
    assert (definition["batches"], definition["dtype"]) == (1, "float64")
    assert (found["tolerance"], found["quantity"]) == (1e-8, "both eigenvalues of the Hessian")
    assert document["record"]["plan"]["residency"] == "streamed"
    assert document["record"]["seed"] == 0


def test_same_seed_same_bits_in_another_process(folder: Path):
    outs = [json.loads(curvkit("sharpness", "ckpt.pt", *FAST, "--json", cwd=folder).stdout) for _ in range(2)]
    assert outs[0]["result"]["eigenvalues"] == outs[1]["result"]["eigenvalues"]
    assert outs[0]["record"]["data_fingerprint"] == outs[1]["record"]["data_fingerprint"]


@pytest.mark.slow
def test_a_budget_too_small_warns_and_is_strict_on_demand(sharpness: Typed):
    code, out, err = sharpness("ckpt.pt", *FAST, "--max-products", "3", "--json")
    assert code == 0
    assert not result(out)["eigenvalues"][0]["converged"]
    assert (
        "Warning: not converged: a residual is above the tolerance. The intervals hold; for narrower ones raise" in err
    )
    code, out, err = sharpness("ckpt.pt", *FAST, "--max-products", "3", "--strict", "--quiet")
    assert code == 5
    assert out.splitlines()[1].endswith("not converged")
    assert "Warning: not converged" in err
    assert sharpness("ckpt.pt", *FAST, "--strict")[0] == 0
    assert sharpness("ckpt.pt", *FAST, "--max-time", "0.000001s", "--strict")[0] == 5


def test_a_small_memory_restarts(sharpness: Typed):
    code, out, _ = sharpness("ckpt.pt", *FAST, "--json", "--memory", "10kB", "-k", "2")
    assert code == 0
    assert result(out)["eigenvalues"][0]["converged"]


def test_what_the_loss_does_not_depend_on_is_told(sharpness: Typed):
    torch.save({**net().state_dict(), "spare.weight": torch.ones(2, 2)}, "spare.pt")
    Path("spare.py").write_text(
        "import train\nfrom torch import nn\nclass Spare(train.Net):\n    def __init__(self):\n        super().__init__()\n"
        "        self.spare = nn.Linear(2, 2, bias=False)\n"
        "def objective():\n    return train.curvkit.Objective(Spare(), train.F.cross_entropy, train.data)\n"
    )
    code, out, _ = sharpness("spare.pt", *FAST, "--objective", "spare.py:objective")
    assert code == 0
    assert "note\tthe loss does not depend on spare.weight: zero curvature there" in out


def test_a_model_that_is_refused_in_eval_mode_too(sharpness: Typed):
    Path("coupled.py").write_text(
        "import train\nfrom torch import nn\ndef objective():\n    model = train.Net()\n"
        "    model.drop = nn.BatchNorm1d(6, affine=False, track_running_stats=False)\n"
        "    return train.curvkit.Objective(model, train.F.cross_entropy, train.data)\n"
    )
    code, out, err = sharpness("ckpt.pt", *FAST, "--objective", "coupled.py:objective")
    assert (code, out) == (1, "")
    assert "drop (BatchNorm1d) keeps no running statistics" in err
    assert "--mode" not in err


def test_batch_norm_in_training_mode_points_to_the_flag(sharpness: Typed):
    Path("normed.py").write_text(
        "import train\nfrom torch import nn\ndef objective():\n    model = train.Net()\n"
        "    model.drop = nn.BatchNorm1d(6, affine=False)\n"
        "    return train.curvkit.Objective(model, train.F.cross_entropy, train.data)\n"
    )
    torch.save(
        {
            **net().state_dict(),
            **{f"drop.{k}": v for k, v in torch.nn.BatchNorm1d(6, affine=False).state_dict().items()},
        },
        "n.pt",
    )
    code, _, err = sharpness("n.pt", "--objective", "normed.py:objective", "--mode", "train")
    assert code == 1
    assert err.endswith("depend on how the data is cut into batches. Use --mode eval, the default.\n")
    assert "model.eval()" not in err


@pytest.mark.slow
def test_more_batches_than_there_are_is_noted(sharpness: Typed):
    code, _, err = sharpness("ckpt.pt", *FAST, "--batches", "99")
    assert code == 0
    assert "note: --batches 99, but the data has only 2: all of it is used\n" in err
    assert "note" not in sharpness("ckpt.pt", *FAST, "--batches", "2")[2]
    assert "note" not in sharpness("ckpt.pt", *FAST, "--batches", "99", "-q")[2]


@pytest.mark.slow
def test_which_of_several_weights_were_taken_is_said_and_recorded(sharpness: Typed):
    torch.save({"model_ema": net(seed=1).state_dict(), "model": net().state_dict(), "epoch": 3}, "two.pt")
    code, out, err = sharpness("two.pt", *FAST, "--json")
    assert code == 0
    note = "the weights of the last step; the averaged ones, which are there too, are taken with --ema"
    assert err == f"objective: train.py:objective (--objective)\nnote: {note}\n"
    assert json.loads(out)["record"]["notes"] == [note]
    averaged = sharpness("two.pt", *FAST, "--json", "--ema")[1]
    assert json.loads(averaged)["record"]["checkpoint"]["weights"] == "ema"
    torch.save(net(seed=1).state_dict(), "other.pt")
    assert result(averaged)["eigenvalues"] == result(sharpness("other.pt", *FAST, "--json")[1])["eigenvalues"]
    named = sharpness("two.pt", *FAST, "--json", "--key", "model_ema")[1]
    assert json.loads(named)["record"]["checkpoint"]["key"] == "model_ema"
    assert result(named)["eigenvalues"] == result(averaged)["eigenvalues"]
    assert result(out)["eigenvalues"] == result(sharpness("ckpt.pt", *FAST, "--json")[1])["eigenvalues"]


def test_ctrl_c_while_the_objective_is_made(sharpness: Typed):
    Path("patient.py").write_text("def objective():\n    raise KeyboardInterrupt\n")
    code, out, err = sharpness("ckpt.pt", "--objective", "patient.py:objective", "--json")
    assert (code, out) == (130, "")
    assert err == "Interrupted.\n"


# ---- formats --------------------------------------------------------------------------------------------------------


REMARKS = [
    "what",
    "definition",
    "at",
    "derivatives",
    "residuals",
    "missed",
    "data",
    "two halves",
    "limit",
    "cost",
    "engine",
    "note",
]


def test_plain_lines_are_the_default_off_a_terminal(sharpness: Typed):
    code, out, err = sharpness("ckpt.pt", *OBJECTIVE, "--seed", "0", "-k", "2")
    assert code == 0
    lines = [line.split("\t") for line in out.splitlines()]
    assert lines[0] == ["#", "eigenvalue", "low", "high", "residual", "state"]
    for number, line in zip("12", lines[1:3], strict=True):
        assert line[0] == number
        value, low, high, residual = map(float, line[1:5])
        assert low < value < high
        assert residual > 0
        assert line[5] == "converged"
    names = [line[0] for line in lines[3:]]
    assert names == ["checkpoint", *REMARKS]
    assert all(len(line) == 2 for line in lines[3:])
    assert lines[4][1] == "the 2 largest (algebraic) eigenvalues of the Hessian at this checkpoint"
    assert err == "objective: train.py:objective (--objective)\n"
    assert (
        sharpness("ckpt.pt", *OBJECTIVE, "--seed", "0", "-k", "2", "--plain")[1].splitlines()[:7]
        == out.splitlines()[:7]
    )


def test_json_is_one_document_whatever_the_users_code_prints(sharpness: Typed):
    code, out, err = sharpness("ckpt.pt", "--objective", "train.py:prints", "--json", "--seed", "0")
    assert code == 0
    document = json.loads(out)
    assert document["schema"] == "curvkit.sharpness/1"
    assert document["result"]["stage"] == "complete"
    assert document["result"]["interrupted"] is False
    assert "hello from train.py" in err


def test_a_very_narrow_table_keeps_words_and_indents(sharpness: Typed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "30")
    code, out, _ = sharpness("ckpt.pt", *OBJECTIVE, "--seed", "0", "-k", "2", "--format", "table")
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 30
    assert " definition" in [line.rstrip() for line in lines]
    starts = ("sharpness of", " 1  ", " 2  ", *(f" {name}" for name in REMARKS))
    assert all(line.startswith(("   ", *starts)) for line in lines)
    assert "multiplicities" in " ".join(lines).split()


@pytest.mark.parametrize("columns", [40, 80, 100, 200])
def test_the_table_shows_every_digit_at_any_width(sharpness: Typed, monkeypatch: pytest.MonkeyPatch, columns: int):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = sharpness("ckpt.pt", *OBJECTIVE, "--seed", "0", "-k", "2", "--format", "table")
    assert code == 0
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in out
    exact = [
        line.split("\t") for line in sharpness("ckpt.pt", *OBJECTIVE, "--seed", "0", "-k", "2")[1].splitlines()[1:3]
    ]
    for _, value, low, high, *_ in exact:
        for number in (value, low, high):
            assert render.digits(float(number), float(high) - float(low)) in out
    words = " ".join(out.split())
    assert "the 2 largest (algebraic) eigenvalues of the Hessian at this checkpoint" in words
    assert (
        "Hessian of cross_entropy, mean over 24 terms · 24 examples in 2 batches · 51 parameters · eval mode" in words
    )
    assert "with probability 99% over the random start, and rounding as usual, no eigenvalue lies above" in words
    assert "along the eigenvector v (row 1), v'Hv of each of 2 parts of the data lies in [" in words
    assert re.search(
        r"two halves \S+ on the half held out, \S+ in sample; for data that the weights have not seen the", words
    )
    assert "one start vector shows one copy of a repeated eigenvalue; multiplicities need --block-size" in words


@pytest.mark.slow
def test_what_is_not_known_is_not_claimed(sharpness: Typed):
    quick = (*FAST, "--no-preflight", "--no-limit")
    _, out, _ = sharpness("ckpt.pt", *OBJECTIVE, "--seed", "0", "--no-preflight", "--max-products", "3")
    assert "on the half held out; the value in sample has not converged and is no upper end" in out
    _, out, _ = sharpness("ckpt.pt", *quick)
    assert (
        "doubt from the sample not measured: it takes --data-doubt, and two batches or a loss whose terms are known"
        in out
    )
    _, out, _ = sharpness("ckpt.pt", *quick, "--block-size", "2")
    assert "no claim: the residual shows that there is an eigenvalue, not that none lies beyond it" in out
    assert "one start vector" not in out
    _, out, _ = sharpness("ckpt.pt", *quick, "-k", "51")
    assert "nothing: the whole space was spanned" in out
    _, out, _ = sharpness("ckpt.pt", *quick, "--which", "smallest")
    assert "no eigenvalue lies below -" in out
    assert "above" not in next(line for line in out.splitlines() if line.startswith("missed"))
    _, out, _ = sharpness("ckpt.pt", *quick, "--which", "both", "-k", "2")
    assert re.search(r"no eigenvalue lies above \S+ \(a gap of \S+\) or below -", out)


@pytest.mark.parametrize(
    ("value", "width", "text"),
    [
        (39.3515293, 0.0283, "39.352"),
        (0.8568628, 1.9e-7, "0.85686280"),
        (0.0, 1.0, "0"),
        (float("nan"), 1.0, "nan"),
        (120.0, 0.0, "120.0"),
        (1.0, 10.0, "1.000"),
        (1234567.0, 10.0, "1234567"),
        (-3.2e-9, 1e-12, "-3.2000e-09"),
        (0.856861874191, 3e-13, "0.85686187419100"),
    ],
)
def test_digits(value: float, width: float, text: str):
    assert render.digits(value, width) == text


def test_lists_are_cut():
    assert render.listed(["a", "b"]) == "a, b"
    assert render.listed(list("abcdef")) == "a, b, c, d and 2 more"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.9, "9.9 s"), (12.3, "12 s"), (119, "119 s"), (180, "3 min"), (7560, "2.1 h")],
)
def test_durations(seconds: float, text: str):
    assert progress.duration(seconds) == text


@pytest.mark.parametrize(
    ("color", "variables", "styled", "coloured"),
    [
        ("auto", {}, False, False),
        ("auto", {"FORCE_COLOR": "1"}, True, True),
        ("auto", {"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
        ("always", {}, True, True),
        ("always", {"NO_COLOR": "1"}, True, True),
        ("never", {"FORCE_COLOR": "1"}, False, False),
    ],
)
def test_colours(
    sharpness: Typed,
    monkeypatch: pytest.MonkeyPatch,
    color: str,
    variables: dict[str, str],
    styled: bool,
    coloured: bool,
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TERM", "xterm-256color")
    _, out, _ = sharpness("ckpt.pt", *FAST, "--format", "table", "--color", color)
    assert ("\x1b[1m" in out) == styled
    assert ("\x1b[32m" in out) == coloured
    assert ("\x1b" in out) == styled


def test_quiet_has_no_progress_and_no_notes(sharpness: Typed):
    assert sharpness("ckpt.pt", *OBJECTIVE, "--quiet")[2] == ""


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (120, "sharpness [bar 20] 12 products, largest residual 1.2e+01 · about 12 s left"),
        (80, "sharpness [bar 13] 12 products, largest residual 1.2e+01 · about 12 s left"),
        (70, "sharpness 25% 12 products, largest residual 1.2e+01 · about 12 s left"),
        (60, "sharpness 25% 12 products, largest residual 1.2e+01"),
        (50, "sharpness [bar 20] 25%"),
        (30, "sharpness [bar 15] 25%"),
        (20, "sharpness 25%"),
        (10, "25%"),
        (2, ""),
    ],
)
def test_the_progress_line_fits_every_width(monkeypatch: pytest.MonkeyPatch, columns: int, shown: str):
    clock = iter((0.0, 4.0, 4.0))
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    line = progress.ProgressLine("sharpness", quiet=True)
    line.update(0.25, "12 products, largest residual 1.2e+01")
    file = io.StringIO()
    Console(file=file, width=columns, force_terminal=True, color_system=None).print(line)
    [drawn] = file.getvalue().splitlines() or [""]
    assert len(drawn) < columns
    assert re.sub("[━╸╺]+ *(?= )", lambda found: f"[bar {len(found[0])}]", drawn).rstrip() == shown


def test_the_progress_line_says_the_time_spent_as_long_as_that_is_all_it_knows(monkeypatch: pytest.MonkeyPatch):
    clock = iter((0.0, 4.0))
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    file = io.StringIO()
    Console(file=file, width=80).print(progress.ProgressLine("sharpness", quiet=True))
    assert file.getvalue().rstrip().endswith("starting · 4.0 s")


@pytest.mark.slow
def test_progress_speaks_of_the_doubt_from_data_only_where_it_is_measured(
    sharpness: Typed, monkeypatch: pytest.MonkeyPatch
):
    details: list[str] = []
    monkeypatch.setattr(progress.ProgressLine, "update", lambda self, share, detail: details.append(detail))
    sharpness("ckpt.pt", *FAST)
    assert re.fullmatch(r"1 product, largest residual \S+", details[0])
    assert re.fullmatch(r"2 products, largest residual \S+", details[1])
    assert re.fullmatch(r"\d+ products", details[-1])
    assert not any("data" in detail or "adaptive" in detail or "limit" in detail for detail in details)
    details.clear()
    sharpness("ckpt.pt", *FAST, "--adaptive")
    assert any(re.fullmatch(r"adaptive sharpness, \d+ products", detail) for detail in details)
    assert not any("data" in detail for detail in details)
    details.clear()
    sharpness("ckpt.pt", *OBJECTIVE, "--seed", "0")
    assert any(re.fullmatch(r"doubt from data, \d+ products", detail) for detail in details)


def test_progress_off_a_terminal_is_a_line_per_tenth(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: float(next(clock))))
    with progress.ProgressLine("work", quiet=False) as line:
        for step in range(1, 41):
            line.update(step / 40, f"step {step}")
        line.update(0.5, "never back")
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 10
    assert shown[0] == "work 10% · step 4 · about 108 s left"
    assert shown[-1] == "work 100% · step 40"


# ---- units ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("500MB", 500_000_000), ("1e9", 10**9), ("2 kb", 2000), ("1.5KiB", 1536), ("10mb", 10**7)],
)
def test_sizes(text: str, size: int):
    assert values.Bytes().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "0", "1e999", "1.2.3", "1TBB", "GB"])
def test_sizes_that_are_none(text: str):
    with pytest.raises(click.BadParameter, match="is not a size. Write for example 4GiB or 500MB."):
        values.Bytes().convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("2m", 120), ("1.5h", 5400), (".5s", 0.5), ("1 M", 60)]
)
def test_times(text: str, seconds: float):
    assert values.Seconds().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1s", "1d", "soon", "1.", "1e3"])
def test_times_that_are_none(text: str):
    with pytest.raises(click.BadParameter, match="is not a time. Write for example 90s, 2m or 1h."):
        values.Seconds().convert(text, None, None)


# ---- -o, the record, and the environment ----------------------------------------------------------------------------


def test_out_writes_once_and_is_replaced_on_demand(sharpness: Typed, typed: Typed):
    code, out, err = sharpness("ckpt.pt", *FAST, "--out", "a/b", "--json")
    assert code == 0
    assert err.endswith("wrote a/b/sharpness.json\n")
    file = Path("a/b/sharpness.json")
    assert json.loads(file.read_text()) == json.loads(out)
    assert sorted(os.listdir("a/b")) == ["sharpness.json", "sharpness.vectors.safetensors"]
    before = file.read_bytes()
    code, out, err = sharpness("ckpt.pt", *FAST, "-o", "a/b")
    assert (code, out) == (2, "")
    assert "a/b/sharpness.json is already there and is not overwritten. Choose another folder, or pass --fresh." in err
    assert file.read_bytes() == before
    assert sharpness("ckpt.pt", *FAST, "-o", "a/b", "--fresh", "-k", "2", "--quiet")[0] == 0
    assert len(json.loads(file.read_text())["result"]["eigenvalues"]) == 2


def test_a_folder_that_cannot_be_made_is_said_before_the_work(sharpness: Typed):
    code, out, err = sharpness("ckpt.pt", *FAST, "-o", "ckpt.pt/sub")
    assert (code, out) == (2, "")
    assert "--out ckpt.pt/sub: the folder cannot be made (not a directory). Choose another one." in err
    assert "objective:" not in err


def test_the_record_makes_the_number_again_and_tells_no_secrets(folder: Path):
    secret = {"SECRET_TOKEN": "hunter2", "CURVKIT_SHARPNESS_TOLERANCE": "0.01"}
    checkpoint, reference = folder / "ckpt.pt", f"{folder / 'train.py'}:objective"
    arguments = (str(checkpoint), f"--objective={reference}", "--seed", "3", "--json", f"-o{folder / 'out'}")
    done = curvkit("sharpness", *arguments, cwd=folder.parent, **secret)
    assert done.returncode == 0
    record = json.loads(done.stdout)["record"]
    assert "hunter2" not in done.stdout
    assert str(folder.parent) not in done.stdout  # no folder above the one that it was started in
    assert str(Path.home()) + "/" not in done.stdout
    name = folder.name
    assert record["command"] == [
        *("curvkit", "sharpness", f"{name}/ckpt.pt", f"--objective={name}/train.py:objective"),
        *("--seed", "3", "--json", f"-o{name}/out"),
    ]
    assert record["options"]["tolerance"] == {"value": "0.01", "source": "environment"}
    assert record["options"]["seed"] == {"value": "3", "source": "commandline"}
    assert set(record["options"]) == {"checkpoint", "objective", "tolerance", "seed", "format", "out"}
    assert record["checkpoint"]["name"] == "ckpt.pt"
    assert re.fullmatch(r"sha256-ends:[0-9a-f]{16}", record["checkpoint"]["digest"])
    assert re.fullmatch(r"[0-9a-f]{16}", record["objective"]["sha256"])
    assert record["objective"]["repository"] is None
    assert re.fullmatch(r"[0-9a-f]{16}", record["data_fingerprint"])
    assert (record["seed"], record["plan"]["threads"], record["plan"]["device"]) == (3, 1, "cpu")
    assert {"environment", "seconds", "products", "peak_memory_bytes"} <= set(record)


def test_a_module_has_its_source_hashed_too(sharpness: Typed):
    by_file = json.loads(sharpness("ckpt.pt", *FAST, "--json")[1])["record"]["objective"]
    by_module = json.loads(sharpness("ckpt.pt", *FAST, "--objective", "train:objective", "--json")[1])["record"][
        "objective"
    ]
    assert by_module["sha256"] == by_file["sha256"]


def test_options_from_the_environment(sharpness: Typed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CURVKIT_SHARPNESS_TOLERANCE", "0.25")
    assert result(sharpness("ckpt.pt", *FAST, "--json")[1])["tolerance"] == 0.25
    assert result(sharpness("ckpt.pt", *FAST, "--json", "--tolerance", "0.1")[1])["tolerance"] == 0.1
    monkeypatch.setenv("CURVKIT_SHARPNESS_TOLERANCE", "abc")
    code, _, err = sharpness("ckpt.pt", *FAST)
    assert code == 2
    assert "'abc' is not a valid float." in err


# ---- pipes, terminals, Ctrl-C: real processes -----------------------------------------------------------------------


def test_a_closed_pipe_is_no_error(folder: Path):
    words = " ".join(("sharpness", "ckpt.pt", *FAST, "--quiet", "--json"))
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c 'from curvkit_cli.main import main; main()' {words} | head -1; "
         'echo "${PIPESTATUS[0]}"'],
        env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout in ("{\n0\n",)
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
def test_a_full_disk_is_said(folder: Path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*PROGRAM, "sharpness", "ckpt.pt", *FAST, "--quiet"],
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: output: no space left on device.")
    assert "Traceback" not in done.stderr


SLOW = """
import hashlib, time
from pathlib import Path
import torch, torch.nn.functional as F
import curvkit, train

class Slow(train.Net):
    seconds = 0.0
    def forward(self, x):
        Path("called").touch()
        if Path("hang").exists():
            Path("hangs").touch()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 60_000_000)  # half a minute in C, where no signal is noticed
        time.sleep(self.seconds)
        return super().forward(x)

def objective(seconds: float = 0.1):
    model = Slow()
    model.seconds = seconds
    return curvkit.Objective(model, F.cross_entropy, train.data)
"""
"""A network that takes its time: streamed, each product calls it at least twice."""

OBSERVED = """
from curvkit_cli.main import main
from curvkit_cli.progress import ProgressLine
update = ProgressLine.update
def observed(self, share, detail):
    update(self, share, detail)
    with open("seen", "a") as file:
        file.write(detail + "\\n")
ProgressLine.update = observed
main()
"""
"""The command, which also writes down each result that it has seen, so that a test can interrupt it between two of them."""


class Run:
    """A run of `curvkit sharpness` on the slow network, to be interrupted when something has happened."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        (folder / "slow.py").write_text(SLOW)
        self._folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", OBSERVED, *("sharpness", "ckpt.pt", "--objective", "slow.py:objective"), *arguments],
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self, file: str, text: str = "") -> None:
        deadline, path = time.monotonic() + 60, self._folder / file
        while time.monotonic() < deadline:
            if path.exists() and text in path.read_text():
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        raise AssertionError(f"it ended too early: {self.process.communicate(timeout=10)}")

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self, timeout: float = 60) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err


@pytest.mark.parametrize("format", ["plain", "json"])
def test_ctrl_c_during_the_search_shows_what_is_known(folder: Path, format: str):
    started = Run(folder, "--format", format, "--tol", "1e-6", "-o", "out", "--residency", "streamed")
    started.wait("seen", "2 products, largest residual")
    started.interrupt()
    code, out, err = started.end()
    assert code == 130
    wrote, ended = err.splitlines()[-2:]
    assert wrote == "wrote out/sharpness.json"
    assert ended.startswith(
        "Interrupted. What was computed is kept. To go on: curvkit sharpness ckpt.pt --objective slow"
    )
    assert ended.endswith("-o out --residency streamed --resume")
    assert "Traceback" not in err
    kept = json.loads((folder / "out" / "sharpness.json").read_text())["result"]
    found = result(out) if format == "json" else kept
    assert found == kept
    assert found["interrupted"] is True
    assert found["stage"] == "searching"
    assert found["residuals_recomputed"] is False
    assert not found["eigenvalues"][0]["converged"]
    assert found["products"] >= 2
    if format == "plain":
        assert out.splitlines()[1].endswith("\tresidual estimated")
        assert "PARTIAL\tinterrupted while searching: residuals are estimates, and the values can still move" in out
        assert "data\tnot measured yet" in out


@pytest.mark.parametrize("format", ["plain", "json"])
def test_ctrl_c_before_the_first_product(folder: Path, format: str):
    started = Run(folder, "--format", format)
    started.wait("called")
    started.interrupt()
    code, out, err = started.end()
    assert code == 130
    assert err.splitlines()[1:] == ["Interrupted before the first product: nothing is known yet."]
    if format == "json":
        assert json.loads(out)["result"] == {"interrupted": True}
    else:
        assert out == ""


def test_ctrl_c_during_the_doubt_from_data_keeps_the_eigenvalues(folder: Path):
    started = Run(folder, "--json", "--max-products", "3")
    started.wait("seen", "doubt from data")
    started.interrupt()
    code, out, err = started.end()
    assert code == 130
    found = result(out)
    assert found["stage"] in ("spread", "halves")
    assert found["residuals_recomputed"] is True
    assert found["batch_spread"] is not None
    assert found["halves"] is None
    assert "Warning" not in err


def test_a_second_ctrl_c_ends_at_once(folder: Path):
    """The first is noticed only when the product at hand is done; here that takes half a minute."""
    started = Run(folder, "--residency", "streamed", "--tol", "1e-6")
    started.wait("seen", "1 product,")
    (folder / "hang").touch()
    started.wait("hangs")
    time.sleep(0.5)  # the file is written just before the half minute begins
    started.interrupt()
    time.sleep(interrupts.PATIENCE + 0.5)
    began = time.monotonic()
    started.interrupt()
    code, out, err = started.end()
    assert time.monotonic() - began < 5.0
    assert (code, out) == (130, "")
    assert "Stopping after the product at hand; Ctrl-C again stops at once.\n" in err
    assert err.endswith("\nInterrupted.\n")


@pytest.mark.parametrize(
    "after", [0.0, *(pytest.param(after, marks=pytest.mark.slow) for after in (0.002, 0.01, 0.05, 0.2))]
)
def test_two_quick_ctrl_c_end_with_the_code_too(folder: Path, after: float):
    """Wherever the second comes: in the product, while the result is shown, while Python ends."""
    started = Run(folder, "--residency", "streamed", "--tol", "1e-6", "--json")
    started.wait("seen", "2 products")
    started.interrupt()
    time.sleep(after)
    started.interrupt()
    code, out, err = started.end()
    assert code == 130
    assert "Traceback" not in err
    assert err.splitlines()[1:] == ["Interrupted."]
    assert out == "" or result(out)["interrupted"] is True


def test_the_second_ctrl_c_counts_also_when_the_first_was_noticed(folder: Path):
    script = (
        "import signal, time\nfrom curvkit_cli.interrupts import watched\nwith watched():\n    try:\n"
        "        signal.raise_signal(signal.SIGINT)\n        time.sleep(9)\n    except KeyboardInterrupt:\n"
        "        signal.raise_signal(signal.SIGINT)\n        time.sleep(9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, "Interrupted.\n")


def test_after_a_ctrl_c_nothing_changes_the_exit_code_any_more(folder: Path):
    script = (
        "import signal, sys\nfrom curvkit_cli.interrupts import watched\nwith watched():\n    try:\n"
        "        signal.raise_signal(signal.SIGINT)\n    except KeyboardInterrupt:\n        pass\n"
        "signal.raise_signal(signal.SIGINT)\nsys.exit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (7, "")


def test_a_program_that_ignores_ctrl_c_goes_on_ignoring_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.watched():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_watching_leaves_the_signals_as_they_were():
    threads = threading.active_count()
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with interrupts.watched():
        assert threading.active_count() == threads + 1
        with interrupts.watched():  # watched already
            assert threading.active_count() == threads + 1
    after = signal.set_wakeup_fd(before)
    assert after == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_in_another_thread_there_is_nothing_to_watch():
    entered = []

    def work() -> None:
        with interrupts.watched():
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [True]


def on_a_terminal(folder: Path, columns: int, *arguments: str, interrupt: bool = False) -> tuple[int, str]:
    """Run it on a pseudo terminal; what is shown, and the exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", OBSERVED, "sharpness", "ckpt.pt", "--objective", "slow.py:objective", *arguments],
        cwd=folder,
        env=environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if interrupt and (folder / "seen").exists():
            process.send_signal(signal.SIGINT)
            interrupt = False
        if not select.select([ours], [], [], 0.05)[0]:
            continue
        try:
            received = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not received:
            break
        shown += received
    os.close(ours)
    return process.wait(timeout=60), shown.decode()


@pytest.mark.parametrize("columns", [40, 100])
def test_a_terminal_shows_a_bar_and_a_table(folder: Path, columns: int):
    (folder / "slow.py").write_text(SLOW)
    code, shown = on_a_terminal(folder, columns, "--set", "seconds=0.02", "--max-products", "5")
    assert code == 0
    assert "━" in shown
    assert "\x1b[1msharpness of ckpt.pt" in shown
    assert "eigenvalue\t" not in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")  # the cursor is back
    table = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown[shown.rindex("sharpness of ckpt.pt") :]).splitlines()
    end = next(i for i, line in enumerate(table) if line.startswith("Warning"))
    assert max(map(len, table[:end])) <= columns
    assert any("not converged" in line for line in table)
    assert any(line.startswith(" definition  Hessian of") for line in table)


def test_ctrl_c_on_a_terminal_leaves_the_cursor_and_the_table(folder: Path):
    (folder / "slow.py").write_text(SLOW)
    code, shown = on_a_terminal(folder, 80, "--residency", "streamed", "--tol", "1e-6", interrupt=True)
    assert code == 130
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")
    assert "PARTIAL" in shown
    assert shown.endswith(f"{interrupts.FRESH_LINE}Interrupted.\r\n")
    assert "\r\n\r\n" not in shown


# ---- what the pages list --------------------------------------------------------------------------------------------

PAGES = Path(__file__).resolve().parents[1]


def test_the_page_lists_what_a_recipe_may_name():
    page = (PAGES / "docs" / "cli.md").read_text().partition("## What a recipe may name")[2]
    for name, kind in BUILDERS.items():
        arguments = (
            f"`{key}`" if p.default is p.empty else f"`{key}={p.default!r}`"
            for key, p in inspect.signature(kind).parameters.items()
        )
        assert f"\n| `{name}` | `curvkit.models.{kind.__name__}` | {', '.join(arguments)} |\n" in page
    assert len(re.findall(r"^\| `", page, re.MULTILINE)) == len(BUILDERS)
    assert re.findall(r"`(\w+)`", page.rpartition("`[N, T, V]`:")[2]) == sorted(LOSSES)


@pytest.mark.parametrize("page", ["docs/checkpoints.md", "docs/quickstart.md"])
def test_the_pages_list_the_keys_of_the_code(page: str):
    *most, last = (f"`{key}`" for key in WEIGHT_KEYS)
    assert f"{', '.join(most)} or {last}" in " ".join((PAGES / page).read_text().split())


def test_the_page_lists_every_option_and_splits_both_ends_as_the_code_does():
    page = (PAGES / "docs" / "cli.md").read_text()
    for option in curvkit_commands.commands["sharpness"].params:
        if isinstance(option, click.Option):
            assert any(f"`{name}" in page for name in (*option.opts, *option.secondary_opts)), option.name
    assert "with `-k 3` the two largest and the smallest" in page
    assert wanted(torch.arange(9.0), 3, "both").tolist() == [8, 7, 0]


# ---- the whole way --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_an_empty_folder_to_a_number(folder: Path):
    done = curvkit("demo", "demo-run", "--steps", "20", "--saves", "2", cwd=folder)
    assert done.returncode == 0
    *_, command = done.stdout.splitlines()
    assert command == "Next: curvkit sharpness demo-run/final.pt"
    done = curvkit("sharpness", "demo-run/final.pt", "--batches", "2", "--json", cwd=folder)
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert document["record"]["objective"] == {"source": "recipe in the checkpoint (decoder, token_cross_entropy)"}
    assert document["result"]["definition"]["loss"] == "token_cross_entropy"
    assert document["result"]["eigenvalues"][0]["converged"]
    assert document["result"]["halves"] is not None
    assert document["result"]["notes"] == ["the first 2 of 8 batches", "tied: head.weight = embedding.weight"]
