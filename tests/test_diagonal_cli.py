"""`curvkit diagonal` and `curvkit estimators` as a user types them: numbers, files, words, and what is refused."""

from __future__ import annotations

import io
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from curvkit_cli import (
    advice,
    diagonal_result,
    diagonal_rows,
    estimating,
    foreseen,
    render_diagonal,
    render_estimators,
    waiting,
)
from curvkit_cli.documentation import documentation
from curvkit_cli.estimation import Chosen
from curvkit_cli.main import run
from curvkit_cli.output import Output
from curvkit_cli.progress import ProgressLine
from curvkit_cli.render_diagonal import _value  # pyright: ignore[reportPrivateUsage]
from oracles import seeded
from rich.console import Console
from samples import PROGRAM, TRAIN, environment, examples, net

from curvkit import Recipe, save
from curvkit.checkpoints import diagonal_files, digest
from curvkit.estimators import ExampleHutchinson, Fisher, registry
from curvkit.models import MLP
from curvkit.objectives import Objective
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate
from curvkit.results.trace_estimate import TraceParts

CHECKPOINT = "recipe.pt"
"""Of the network `model`, on `examples()` in batches of 10, 10 and 4."""
N = 51
"""Parameters of the network."""
OWN = """
import torch, torch.nn.functional as F
from torch import nn
import curvkit, train

def both(num_probes: int = 3):
    return train.sized(6)

def own():
    return curvkit.Objective(train.Net(), lambda z, y: (F.cross_entropy(z, y, reduction="sum"), len(y)), train.data)

def weighted():
    return curvkit.Objective(train.Net(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])), train.data)

def margin():
    return curvkit.Objective(train.Net(), nn.MultiMarginLoss(), train.data)

class Coupled(train.Net):
    def forward(self, x):
        z = super().forward(x)
        return z - z.mean(0, keepdim=True)

def coupled():
    return curvkit.Objective(Coupled(), F.cross_entropy, train.data)

class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3
    @staticmethod
    def backward(ctx, g):
        return g * 3 * ctx.saved_tensors[0].detach() ** 2

class Wrong(train.Net):
    def forward(self, x):
        return self.outer(Cube.apply(self.inner(x)))

def wrong():
    return curvkit.Objective(Wrong(), F.cross_entropy, train.data)
"""
Typed = Callable[..., tuple[int, str, str]]


def model() -> MLP:
    with seeded(0):
        return MLP([4, 6, 3], activation="tanh")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    Path("train.py").write_text(TRAIN)
    Path("own.py").write_text(OWN)
    torch.save(net().state_dict(), "ckpt.pt")
    x, y = examples()
    kwargs = {"sizes": [4, 6, 3], "activation": "tanh"}
    save(CHECKPOINT, model=model(), recipe=Recipe("mlp", kwargs, "cross_entropy", {"x": x, "y": y}, batch_size=10))
    return tmp_path


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    def call(*arguments: str) -> tuple[int, str, str]:
        with torch.random.fork_rng(devices=[]):  # the user's file seeds the global generator
            code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def diagonal(typed: Typed) -> Typed:
    return lambda *arguments: typed("diagonal", CHECKPOINT, "--seed", "0", "-q", *arguments)


@pytest.fixture
def objective() -> Objective:
    """The function of the recipe, built here."""
    x, y = examples()
    return Objective(model(), F.cross_entropy, [(x[:10], y[:10]), (x[10:20], y[10:20]), (x[20:], y[20:])])


def table(out: str) -> dict[str, list[str]]:
    return {line.split("\t")[0]: line.split("\t")[1:] for line in out.splitlines()}


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_the_rows_are_sums_of_the_estimate(diagonal: Typed, objective: Objective):
    """Against the estimator in Python: by default eight probes, so that the errors are known."""
    code, out, err = diagonal("--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    found = ExampleHutchinson(num_probes=8).estimate(objective, seed=0)
    result = document["result"]
    assert (document["schema"], result["matrix"], result["samples"]) == ("curvkit.diagonal/1", "hessian", 8)
    assert result["estimator"] == "ExampleHutchinson(num_probes=8)"
    assert result["trace"]["value"] == pytest.approx(found.trace, rel=1e-6)
    assert found.sums is not None
    totals = found.sums.samples.sum(1)
    assert result["trace"]["stderr"] == pytest.approx(
        (totals.std() / 8**0.5).item()
    )  # of the whole, not of independent parts
    names = [row["name"] for row in result["layers"]]
    assert names == ["linear0", "linear1"]
    for row in result["layers"]:
        mine = [value for name, value in found.values.items() if name.startswith(row["name"])]
        entries = torch.cat([value.flatten() for value in mine]).double()
        assert row["kind"] == "Linear"
        assert row["parameters"] == len(entries)
        assert row["sum"] == pytest.approx(entries.sum().item(), rel=1e-6)
        assert row["mean"] == pytest.approx(entries.mean().item(), rel=1e-6)
        assert row["largest"] == pytest.approx(entries.abs().max().item())
        assert row["negative"] == pytest.approx((entries < 0).double().mean().item())
        assert row["share"] == pytest.approx(entries.sum().item() / found.trace, rel=1e-6)
    assert [row["name"] for row in result["parameters"]] == list(found.values)
    assert [row["kind"] for row in result["parameters"]] == ["6x4", "6", "3x6", "3"]
    errors = torch.cat([value.flatten() for value in (found.stderr or {}).values()]).double()
    assert result["entries"]["stderr"] == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-6)
    assert result["definition"]["terms"] == 24
    assert result["loss"] == pytest.approx(objective.value(), rel=1e-6)
    assert result["interrupted"] is False


def test_plain_lines_and_rows_by_parameter(diagonal: Typed):
    code, out, _ = diagonal("--by", "param", "-e", "empirical-fisher")
    assert code == 0
    told = table(out)
    assert told["name"] == ["kind", "parameters", "sum", "stderr", "share", "mean", "largest", "negative"]
    assert list(told)[1:6] == ["linear0.weight", "linear0.bias", "linear1.weight", "linear1.bias", "total"]
    assert told["total"][1] == str(N)
    assert told["total"][3:5] == ["0.0", "1.0"]
    assert told["errors"] == ["none: nothing was sampled"]
    assert "it is no estimate of the Fisher matrix" in told["what"][0]
    assert told["definition"][0].startswith("empirical Fisher matrix of cross_entropy, mean over 24 terms")
    assert "derivatives" not in told
    assert "seed" not in told


def test_class_weights_are_no_number_of_terms(diagonal: Typed, typed: Typed):
    code, out, _ = typed("diagonal", "ckpt.pt", "--objective", "own.py:weighted", "--seed", "0", "-q")
    assert code == 0
    assert "mean over 24 terms" in table(out)["definition"][0]


def test_one_sample_has_no_error(diagonal: Typed):
    code, out, _ = diagonal("--set", "num_probes=1")
    assert code == 0
    told = table(out)
    assert told["estimator"] == ["ExampleHutchinson(num_probes=1)"]
    assert told["total"][3] == "-"
    assert told["errors"] == ["unknown: one sample says nothing of its own error. Two and more do; --set says how many"]
    assert told["entries"][0].endswith("with errors that are unknown")
    code, out, _ = diagonal("--set", "num_probes=1", "--json")
    assert json.loads(out)["result"]["trace"]["stderr"] is None


def drawn(samples: torch.Tensor, values: torch.Tensor, stderr: torch.Tensor) -> diagonal_result.Diagonal:
    """An estimate of one layer from samples of its sum."""
    parts, cost = TraceParts((values.numel(),), torch.zeros(1).double(), samples.double()), Cost(1.0, 0.1)
    it = DiagonalEstimate({"weight": values}, {"weight": stderr}, "hessian", "Mine()", cost, len(samples), 0, parts)
    rows = diagonal_rows.rows(it, torch.nn.Linear(2, 1, bias=False))
    return diagonal_result.Diagonal(it, rows, None, None, None, None, False, ())


def test_noise_is_called_noise():
    """(0.08 / 0.1)^2 of the squares are noise: 8 * 0.64 / 0.36 / 0.1^2 = 1422 samples for errors of a tenth."""
    found = drawn(torch.tensor([[0.9], [1.1]] * 4), torch.tensor([[0.1, -0.1]]), torch.tensor([[0.08, 0.08]]))
    told = dict(render_diagonal.remarks(found))
    assert (
        told["entries"]
        == "root mean square 0.1, of their standard errors 0.08 (80%); 0% lie more than 2 errors from zero"
    )
    assert told["noise"].endswith(
        "four times as many halve the errors, and about 1,000 bring them to 10% of the entries"
    )
    beyond = drawn(torch.tensor([[0.9], [1.1]] * 4), torch.tensor([[0.1, -0.1]]), torch.tensor([[0.12, 0.12]]))
    assert dict(render_diagonal.remarks(beyond))["noise"].endswith("four times as many halve the errors")
    clear = drawn(torch.tensor([[0.9], [1.1]] * 4), torch.tensor([[0.1, -0.1]]), torch.tensor([[0.04, 0.04]]))
    assert "noise" not in dict(render_diagonal.remarks(clear))


def test_shares_of_a_trace_that_is_not_known_are_not_shown():
    found = drawn(torch.tensor([[3.0], [-2.8]]), torch.tensor([[0.05, 0.05]]), torch.tensor([[0.01, 0.01]]))
    assert math.isnan(found.rows.layers[0].share)
    assert dict(render_diagonal.remarks(found))["share"] == (
        "of layers not known: the trace lies within 2 of its errors from zero"
    )
    assert found.to_dict()["layers"][0]["share"] is None
    assert "total\t\t2\t" in render_diagonal.plain(found, "title", "layer")
    clear = drawn(torch.tensor([[0.09], [0.11]]), torch.tensor([[0.05, 0.05]]), torch.tensor([[0.01, 0.01]]))
    assert clear.rows.layers[0].share == pytest.approx(1.0)


def test_estimators_inside_of_estimators(diagonal: Typed):
    code, out, _ = diagonal(
        "-e", "deflated", "--set", "inner=hutchinson", "--set", "inner.num_probes=3", "--set", "rank=2"
    )
    assert code == 0
    assert table(out)["estimator"] == ["Deflated(inner=Hutchinson(num_probes=3), rank=2)"]
    assert table(out)["errors"][0].startswith("one standard error each, from 3 samples, each known to some 50% itself")


def test_estimators_inside_draw_more_than_once_too(diagonal: Typed):
    for typed, drawn in ((), 8), (("--set", "inner.num_probes=2"), 2):
        code, out, _ = diagonal("-e", "controlled", "--set", "inner=example-hutchinson", *typed, "--plan")
        assert code == 0
        assert f"inner=ExampleHutchinson(num_probes={drawn})" in table(out)["estimator"][0]


def test_the_second_moment_of_the_checkpoint_s_optimizer(typed: Typed):
    model, (x, y) = MLP([4, 3]), examples()
    optimizer = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    recipe = Recipe("mlp", {"sizes": [4, 3]}, "cross_entropy", {"x": x, "y": y})
    save("adam.pt", model=model, optimizer=optimizer, recipe=recipe)
    code, out, _ = typed("diagonal", "adam.pt", "-e", "optimizer-state", "-q", "--json")
    assert code == 0
    result = json.loads(out)["result"]
    squares = math.fsum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None)
    assert result["trace"]["value"] == pytest.approx(
        squares, rel=1e-4
    )  # bias correction makes the first step's own square of it
    assert (result["quantity"], result["definition"], result["loss"]) == ("second moment", None, None)
    code, out, _ = typed("diagonal", "adam.pt", "-e", "optimizer-state", "-q")
    assert table(out)["what"][0].startswith("second moment: Adam's running mean of squared gradients")
    assert table(out)["errors"] == ["unknown: the optimizer keeps a running mean and nothing of its spread"]
    assert table(out)["total"][3] == "-"
    assert table(out)["definition"] == [
        "second moment of 15 parameters; the loss and the data given here have no part in it"
    ]
    code, _, err = typed("diagonal", CHECKPOINT, "-e", "optimizer-state", "-q")
    assert code == 3
    assert (
        "--estimator optimizer-state: no second moment can be read: the checkpoint has no state of an optimizer. Use"
        in err
    )


# ---- the file -------------------------------------------------------------------------------------------------------


def test_out_holds_the_estimate_and_its_record(diagonal: Typed, objective: Objective):
    code, out, _ = diagonal("-o", "new/diag.safetensors", "--json")
    assert code == 0
    kept, found = DiagonalEstimate.load("new/diag.safetensors"), ExampleHutchinson(8).estimate(objective, seed=0)
    for name, value in found.values.items():
        torch.testing.assert_close(kept.values[name], value)
        assert kept.stderr is not None
        torch.testing.assert_close(kept.stderr[name], (found.stderr or {})[name])
    from safetensors import safe_open

    with safe_open("new/diag.safetensors", "pt") as file:
        record = json.loads(file.metadata()["estimate"])["record"]
    shown = json.loads(out)["record"]
    assert record == {key: value for key, value in shown.items() if key != "files"}
    assert record["seed"] == 0
    assert record["checkpoint"] == {"name": CHECKPOINT, "digest": digest(Path(CHECKPOINT))}
    assert record["estimator"] == {
        "name": "example-hutchinson",
        "options": "ExampleHutchinson(num_probes=8)",
        "matrix": "hessian",
    }
    assert record["definition"]["matrix"] == "hessian"
    assert {"environment", "data_fingerprint", "objective", "command"} <= set(record)
    import hashlib

    written = Path("new/diag.safetensors").read_bytes()
    assert shown["files"]["diagonal"] == {"name": "diag.safetensors", "sha256": hashlib.sha256(written).hexdigest()}


def test_the_file_is_no_checkpoint(diagonal: Typed, typed: Typed):
    assert diagonal("-o", "diag.safetensors", "--set", "num_probes=2")[0] == 0
    said = "it holds a diagonal (hessian, by ExampleHutchinson(num_probes=2)) and no weights."
    said += " Read it in Python: DiagonalEstimate.load(path)"
    code, out, _ = typed("inspect", "diag.safetensors")
    told = table(out)
    assert (code, told["kind"]) == (0, ["diagonal of curvkit"])
    assert told["refused"] == [f"it is not read: {said}"]
    assert (told["values"][:2], told["errors and sums"][:2]) == (["4", str(N)], ["6", str(N + 4 + 2 * 4)])
    code, out, err = typed("trace", "diag.safetensors")
    assert (code, out) == (4, "")
    assert err == f"Error: diag.safetensors: {said}.\n"
    assert diagonal_files.diagonal_in({"format": "curvkit.diagonal/1", "estimate": "[" * 100_000}) is not None
    assert diagonal_files.diagonal_in({"format": "curvkit.diagonal/1"}) == said.removeprefix("it holds ").replace(
        " (hessian, by ExampleHutchinson(num_probes=2))", ""
    )


def test_nothing_is_overwritten(diagonal: Typed, typed: Typed):
    before = Path(CHECKPOINT).read_bytes()
    Path("diag.safetensors").write_text("mine")
    code, out, err = diagonal("-o", "diag.safetensors")
    assert (code, out) == (2, "")
    assert "diag.safetensors is already there and is not overwritten. Choose another name, or pass --fresh." in err
    assert Path("diag.safetensors").read_text() == "mine"
    code, _, err = diagonal("-o", CHECKPOINT, "--fresh")
    assert code == 2
    assert "--out recipe.pt is the checkpoint itself. Choose another name." in err
    assert Path(CHECKPOINT).read_bytes() == before
    assert "--plan estimates nothing that -o could write" in diagonal("-o", "other", "--plan")[2]
    code, _, err = typed(
        "diagonal", CHECKPOINT, "--seed", "0", "--set", "num_probes=1", "-o", "diag.safetensors", "--fresh"
    )
    assert (code, err.splitlines()[-1]) == (0, "wrote diag.safetensors")
    assert DiagonalEstimate.load("diag.safetensors").seed == 0


def test_a_folder_that_cannot_be_written(diagonal: Typed, monkeypatch: pytest.MonkeyPatch):
    code, _, err = diagonal("-o", "train.py/diag")
    assert code == 2
    assert "--out train.py/diag: its folder cannot be made (" in err
    monkeypatch.setattr("curvkit_cli.estimation.os", SimpleNamespace(access=lambda *_: False, W_OK=2, X_OK=1))
    assert "--out diag: nothing can be written in its folder. Choose another one." in diagonal("-o", "diag")[2]


def test_a_full_disk_is_said_after_the_result(diagonal: Typed, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiagonalEstimate, "save", full)
    code, out, err = diagonal("-o", "diag", "--set", "num_probes=1")
    assert code == 1
    assert "total" in table(out)
    assert "diag cannot be written (no space left on device). Keep what was shown, or estimate again elsewhere." in err


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [30, 60, 80, 120])
def test_tables_fit_the_terminal(diagonal: Typed, monkeypatch: pytest.MonkeyPatch, columns: int):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    code, out, _ = diagonal("--format", "table", "--set", "num_probes=2")
    assert code == 0
    assert max(map(len, out.splitlines())) <= columns
    assert "\x1b" not in out
    head = out.splitlines()[1]
    assert ("largest" in head) is (columns >= 60)
    assert ("below 0" in head) is (columns >= 80)
    assert "ExampleHutchinson(num_probes=2)" in "".join(out.split())


def test_names_are_made_safe(typed: Typed):
    Path("odd.py").write_text(
        "import torch, torch.nn.functional as F\nimport curvkit\n"
        "class Odd(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.register_parameter('a\\x1b[31m', torch.nn.Parameter(torch.ones(2)))\n"
        "    def forward(self, x):\n        return (x * self._parameters['a\\x1b[31m']).sum(1)\n"
        "def objective():\n    return curvkit.Objective(Odd(), F.mse_loss, [(torch.ones(3, 2), torch.zeros(3))])\n"
    )
    torch.save({"a\x1b[31m": torch.ones(2)}, "odd.pt")
    for format in ("plain", "table"):
        arguments = ("odd.pt", "--objective", "odd.py:objective", "-e", "hutchinson", "-q", "--by", "param")
        code, out, _ = typed("diagonal", *arguments, "--format", format, "--color", "never")
        assert code == 0
        assert "\x1b" not in out
        assert "a\\x1b[31m" in out


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (89.49, 20.3, "89"),
        (20.403, 5.1, "20.4"),
        (0.0048, 0.13, "0.00"),
        (-0.0004, 0.13, "0.00"),
        (-0.573, 0.52, "-0.57"),
        (12345.6, 1234.0, "12300"),
        (2.0, 0.0, "2.000"),
        (2.0, math.nan, "2.000"),
        (3.2e9, 1e8, "3.2e+09"),
        (3.2e-9, 1e-9, "3.2e-09"),
    ],
)
def test_values_have_the_digits_of_their_errors(value: float, stderr: float, text: str):
    assert _value(value, stderr) == text


def test_a_plan_says_what_the_estimator_says(diagonal: Typed, objective: Objective, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was estimated")

    expected = Fisher(num_samples=8).expected(objective)
    monkeypatch.setattr(Fisher, "estimate", refuse)
    code, out, _ = diagonal("-e", "fisher", "--plan", "--json")
    assert code == 0
    document = json.loads(out)
    result = document["result"]
    assert document["schema"] == "curvkit.plan/1"
    assert (result["gradients"], result["copies"]) == (expected.gradients, expected.copies)
    assert result["peak_bytes"] == expected.peak_bytes(objective)
    assert result["seconds"] == pytest.approx(expected.gradients * result["gradient_seconds"])
    code, out, _ = diagonal("-e", "fisher", "--plan")
    assert list(table(out)) == ["plan", "estimator", "matrix", "work", "peak", "time", "free"]
    assert table(out)["plan"] == ["plan of diagonal for recipe.pt"]
    assert "plan of diagonal" in diagonal("-e", "fisher", "--plan", "--format", "table")[1]


def test_a_plan_of_an_estimator_that_does_not_say(objective: Objective):
    silent: Any = SimpleNamespace(estimate=None)
    found = foreseen.Foreseen.of(Chosen("silent", silent, (), ""), objective)
    assert dict(found.lines())["work"] == "not known: the estimator has no method `expected`"
    assert (found.gradients, found.peak_bytes, found.seconds) == (None, None, None)


@pytest.mark.parametrize(
    ("elapsed", "seconds", "said"),
    [
        (1.0, 4.0, "diagonal 25% by x · about 15 s left"),
        (1.0, None, "diagonal 0% by x · 5.0 s"),
        (9.0, 4.0, "diagonal 95% by x, longer than the 4.0 s expected · 5.0 s"),
    ],
)
def test_progress_guesses_from_the_time_expected(
    monkeypatch: pytest.MonkeyPatch, elapsed: float, seconds: float | None, said: str
):
    clock = iter([0.0, 5.0, 5.0, 5.0])
    monkeypatch.setattr("curvkit_cli.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    line = ProgressLine("diagonal", quiet=True)
    waiting._tell(line, "by x", elapsed, seconds)  # pyright: ignore[reportPrivateUsage]
    console = Console(width=len(said) + 2, file=io.StringIO())
    assert "".join(segment.text for segment in console.render(line)).strip() == said


def test_work_goes_on_under_the_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("curvkit_cli.progress.PATIENCE", 0.0)
    monkeypatch.setattr(waiting, "TICK", 0.01)
    with waiting.expecting("diagonal", "by x, 3 gradients", 0.3, Output("auto", None, False, False, False, "auto")):
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("diagonal ") and "by x, 3 gradients" in line for line in lines)


def test_a_gradient_is_timed_and_scaled_to_all_the_data(objective: Objective, monkeypatch: pytest.MonkeyPatch):
    ticks = iter([1.0, 3.0])
    monkeypatch.setattr(foreseen, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert foreseen.gradient_seconds(objective) == pytest.approx(2.0 * 24 / 10)


# ---- typed wrong, and what an estimator refuses ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-e", "hutchinsn"], "--estimator hutchinsn: there is no estimator 'hutchinsn'. The nearest is 'hutchinson'"),
        (["--set", "num_probes=0"], "num_probes=0 must be an integer >= 1."),
        (["--set", "num_probes=many"], "estimator example-hutchinson: num_probes='many' must be an integer."),
        (["--set", "num_probes"], "'num_probes' is not of the form KEY=VALUE"),
        (["--set", "estimator.num_samples=2"], "estimator example-hutchinson: no option 'num_samples'"),
        (["--set", "inner.rank=2"], "estimator example-hutchinson: no option 'inner'"),
        (["-e", "exact", "--set", "matrix=fisher"], "matrix='fisher' must be 'hessian' or 'ggn'"),
        (["-e", "squared-gradient", "--set", "num_batches=9"], "num_batches=9, but the data has 3."),
        (["--seed", "-1"], "Invalid value for '--seed'"),
    ],
)
def test_typed_wrong(diagonal: Typed, arguments: list[str], text: str):
    code, out, err = diagonal(*arguments)
    assert (code, out) == (2, "")
    assert text in err


def test_an_estimator_from_the_configuration(typed: Typed):
    Path("curvkit.toml").write_text('[defaults.diagonal]\nestimator = "fisher"\n')
    code, out, _ = typed("diagonal", CHECKPOINT, "--plan", "-q", "-c", "curvkit.toml")
    assert (code, table(out)["estimator"]) == (0, ["Fisher(num_samples=8)"])
    Path("curvkit.toml").write_text('[defaults.diagonal]\nestimator = "fischer"\n')
    code, _, err = typed("diagonal", CHECKPOINT, "--plan", "-q", "-c", "curvkit.toml")
    assert code == 2
    assert "The nearest is 'fisher'" in err
    assert "--estimator is set in curvkit.toml." in err


def test_a_name_that_nobody_has(diagonal: Typed, typed: Typed):
    """Without a function every name is the estimator's; beside one both say what they take."""
    code, _, err = diagonal("--set", "hidden=3")
    assert code == 2
    assert "estimator example-hutchinson: no option 'hidden'" in err
    code, _, err = typed("diagonal", "ckpt.pt", "--objective", "train.py:objective", "--set", "num_samples=2", "-q")
    assert code == 2
    assert (
        "--set num_samples=2: the function takes hidden. Correct the name. The estimator example-hutchinson takes num_probes"
        in err
    )


def test_a_name_that_both_have(typed: Typed):
    target = ("diagonal", "ckpt.pt", "--objective", "own.py:both", "-q", "--plan")
    code, _, err = typed(*target, "--set", "num_probes=2")
    assert code == 2
    assert (
        "--set num_probes=...: the estimator example-hutchinson has num_probes, and the function of the objective has it too. Write "
        "--set estimator.num_probes=... or --set objective.num_probes=..." in err
    )
    code, out, _ = typed(*target, "--set", "estimator.num_probes=2", "--set", "objective.num_probes=5")
    assert (code, table(out)["estimator"]) == (0, ["ExampleHutchinson(num_probes=2)"])


@pytest.mark.parametrize(
    ("function", "arguments", "code", "text"),
    [
        (
            "margin",
            ["-e", "fisher"],
            1,
            "Fisher: the loss MultiMarginLoss is not a likelihood that targets could be drawn from.",
        ),
        ("margin", [], 1, "measure the trace instead, by curvkit trace --rule difference"),
        ("weighted", ["-e", "fisher"], 1, "or use --estimator example-hutchinson, which is defined with them."),
        ("own", [], 1, "is not known to be a sum over the rows of a batch."),
        ("coupled", [], 1, "something couples them (normalisation over the batch, time in dimension 0)"),
        ("wrong", [], 1, "preflight: second derivatives are wrong"),
    ],
)
def test_refused(typed: Typed, function: str, arguments: list[str], code: int, text: str):
    found, out, err = typed("diagonal", "ckpt.pt", "--objective", f"own.py:{function}", "-q", *arguments)
    assert (found, out) == (code, "")
    assert text in err
    assert "Hutchinson." not in err  # what is advised can be typed


def test_dropout_in_training_mode_points_to_the_flag(typed: Typed):
    code, _, err = typed("diagonal", "ckpt.pt", "--objective", "train.py:dropout", "--mode", "train", "-q")
    assert code == 1
    assert "Use --mode eval, the default" in err


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (3.0, "the estimator fisher returned a float; it must return a DiagonalEstimate, parameter-shaped."),
        (
            DiagonalEstimate({"w": torch.ones(2)}, None, "mine", "Mine()", Cost(0.0, 0.0)),
            "the estimator fisher returned other names or shapes than those of the parameters;",
        ),
    ],
)
def test_what_an_estimator_returns_is_looked_at(
    diagonal: Typed, monkeypatch: pytest.MonkeyPatch, returned: Any, text: str
):
    monkeypatch.setattr(Fisher, "estimate", lambda *_, **__: returned)
    code, out, err = diagonal("-e", "fisher")
    assert (code, out) == (1, "")
    assert text in err
    assert "Its authors find what is wrong with curvkit.testing.check_estimator." in err


def test_no_preflight_is_said(diagonal: Typed):
    code, out, _ = diagonal("--no-preflight", "--set", "num_probes=2")
    assert (code, table(out)["derivatives"]) == (0, ["not checked: --no-preflight"])
    for chosen in (["--set", "num_probes=2"], ["--estimator", "lanczos", "--set", "rank=1"]):
        assert table(diagonal(*chosen)[1])["derivatives"][0].startswith("second derivatives agree with")


def test_exact_on_too_many_parameters_says_its_cost_and_the_alternative(diagonal: Typed):
    code, _, err = diagonal("-e", "exact", "--set", "way=products", "--set", "max_gradients=10")
    assert code == 1
    assert "more than max_gradients=10" in err
    assert "Use --estimator example-hutchinson" in err
    assert "raise max_gradients by --set" in err


def test_advice_in_the_words_of_the_command():
    said = advice.in_words(
        "Exact: too large. Use ExampleHutchinson, or Hutchinson(3), or use way='products' for Exact."
    )
    assert (
        said
        == "Exact: too large. Use --estimator example-hutchinson, or Hutchinson(3), or use --set way=products for Exact."
    )
    assert (
        advice.in_words("leave them out by patterns, compute in float64")
        == "leave them out by --params, compute with --dtype float64"
    )
    assert advice.in_words("or measure by differences (rule='difference').").endswith(f"or {advice.ELSEWHERE}.")


@pytest.mark.parametrize("format", ["plain", "json"])
def test_ctrl_c_keeps_nothing_and_says_so(diagonal: Typed, monkeypatch: pytest.MonkeyPatch, format: str):
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ExampleHutchinson, "estimate", interrupted)
    code, out, err = diagonal("-o", "diag.safetensors", "--format", format)
    assert code == 130
    assert err == "Interrupted: an estimate is known at its end alone, so that nothing is kept.\n"
    assert out == "" if format == "plain" else json.loads(out)["result"] == {"interrupted": True}
    assert not list(Path().glob("*diag*"))


@pytest.mark.slow
def test_ctrl_c_in_a_process(folder: Path):
    slow = (
        OWN
        + "import time\nclass Slow(train.Net):\n    def forward(self, x):\n        open('called', 'w').close(); time.sleep(0.05)\n"
    )
    slow += "        return super().forward(x)\ndef slow():\n    return curvkit.Objective(Slow(), F.cross_entropy, train.data)\n"
    Path("own.py").write_text(slow)
    arguments = (
        "diagonal",
        "ckpt.pt",
        "--objective",
        "own.py:slow",
        "-o",
        "diag.safetensors",
        "--set",
        "num_probes=4000",
        "-q",
    )
    process = subprocess.Popen([*PROGRAM, *arguments], env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not Path("called").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (
        130,
        "Interrupted: an estimate is known at its end alone, so that nothing is kept.\n",
    )
    assert not list(folder.glob("*diag*"))


# ---- curvkit estimators ---------------------------------------------------------------------------------------------


def test_all_estimators_are_listed(typed: Typed):
    code, out, _ = typed("estimators")
    assert code == 0
    told = table(out)
    assert list(told)[1:] == [found.name for found in registry.described()]
    assert told["example-hutchinson"] == [
        "hessian",
        "The diagonal of the exact Hessian, from one product with signs that are independent for each example.",
        "num_probes=1",
        "curvkit",
        "-",
    ]
    code, out, _ = typed("estimators", "--json")
    document = json.loads(out)
    assert document["schema"] == "curvkit.estimators/1"
    entry = next(entry for entry in document["result"] if entry["name"] == "exact")
    assert {"name": "matrix", "allowed": "'hessian' or 'ggn'", "default": "'hessian'"} in entry["options"]


@pytest.mark.parametrize("columns", [40, 100])
def test_the_list_of_estimators_on_a_terminal(typed: Typed, monkeypatch: pytest.MonkeyPatch, columns: int):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = typed("estimators", "--format", "table", "--color", "never")
    assert code == 0
    assert max(map(len, out.splitlines())) <= columns
    assert all(name in out for name in registry.names())


def test_one_estimator(typed: Typed):
    code, out, _ = typed("estimators", "fisher")
    assert code == 0
    told = table(out)
    assert told["option"] == [
        "num_samples (an integer, default 1): Draws of all targets; the standard error is known from two on."
    ]
    assert "F_jj = (1 / W) sum_n" in told["text"][0]
    assert told["cost"][0].startswith("per sample a forward pass")
    assert told["example"] == ["curvkit diagonal CHECKPOINT --estimator fisher --set num_samples=4"]
    code, out, _ = typed("estimators", "fisher", "--format", "table", "--color", "never")
    assert "     F_jj = (1 / W) sum_n E_(y'" in out  # an equation stays indented, on its own line
    entry = json.loads(typed("estimators", "fisher", "--json")[1])["result"]
    assert entry["options"][0]["meaning"].startswith("Draws of all targets")
    assert entry["source"].startswith("Martens (2020)")


def test_an_estimator_that_there_is_not(typed: Typed):
    code, out, err = typed("estimators", "fischer")
    assert (code, out) == (2, "")
    assert "there is no estimator 'fischer'. The nearest is 'fisher'" in err


def test_what_is_not_imported_or_cannot_be_used_is_said(capsys: pytest.CaptureFixture[str]):
    found = (
        registry.Description("theirs", None, "", (), "their-package 1.0", None),
        registry.Description("broken", None, "", (), "other 2.0", "it cannot be imported"),
    )
    assert table(render_estimators.plain(found))["theirs"] == [
        "-",
        "not imported yet: `curvkit estimators theirs` shows it",
        "-",
        "their-package 1.0",
        "-",
    ]
    render_estimators.table(found, "never")
    out = " ".join(capsys.readouterr().out.split())
    assert "from their-package 1.0" in out
    assert "cannot be used: it cannot be imported" in out
    assert "example" not in dict(render_estimators.remarks(found[1], documentation(object)))
    assert dict(render_estimators.remarks(found[0], documentation(object)))["matrix"] == "the class does not say it"


def test_documentation_in_parts():
    class Documented:
        """One line.

            d = x

        More, over
        two lines.

        Args:
            first: Of two,
                on two lines.
            second: The other.

        Cost: 3 gradients,
            about.

        Example:
            >>> 1
            1
        """

    class Bare:
        pass

    found = documentation(Documented)
    assert found.summary == "One line."
    assert found.body == "    d = x\n\nMore, over\ntwo lines."
    assert found.arguments == {"first": "Of two, on two lines.", "second": "The other."}
    assert found.sections == {"Cost": "3 gradients, about."}
    assert documentation(Bare).summary == ""


@pytest.mark.parametrize("arguments", [["diagonal", "--help"], ["estimators", "--help"]])
def test_torch_is_not_imported_for_help(arguments: list[str]):
    script = f"import sys; from curvkit_cli.main import run; run({arguments}); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0


def test_every_matrix_of_an_estimator_has_words():
    for found in registry.described():
        for name in (found.matrix or "").split(" or "):
            assert not name or name in diagonal_result.MATRICES
    assert set(estimating.SECOND_DERIVATIVES) <= set(diagonal_result.MATRICES)
