"""`curvkit compare` as a user types it: table at every width, plain, JSON and Markdown, notes, refusals, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from curvkit_cli import render_comparison
from curvkit_cli.main import run
from samples import PROGRAM, TRAIN, curvkit, environment, examples, net, truth

import curvkit as library
from curvkit import Objective, Recipe
from curvkit.measures import Comparison, ComparisonSettings
from curvkit.measures import compare as compare_objectives

OBJECTIVE = ("--objective", "train.py:objective", "--seed", "0")
MORE = """

def one_model():
    return curvkit.Objective(SHARED, F.cross_entropy, data)

def random_data():
    import time
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(time.time_ns() % 2**31))
    return curvkit.Objective(Net(), F.cross_entropy, [(x, y)])

def slow():
    import time
    class Slow(Net):
        def forward(self, x):
            time.sleep(0.02)
            return super().forward(x)
    return curvkit.Objective(Slow(), F.cross_entropy, data)

SHARED = Net()
"""
Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder with a user's train.py and three checkpoints of a network of 51 parameters."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    Path("train.py").write_text(TRAIN + MORE)
    for name, seed in (("a.pt", 0), ("b.pt", 1), ("c.pt", 2)):
        torch.save(net(seed=seed).state_dict(), name)
    return tmp_path


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run the command in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with torch.random.fork_rng(devices=[]):  # the user's file seeds the global generator
            code = run(["compare", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def recipe(path: str, seed: int, inputs: torch.Tensor | None = None) -> None:
    """A checkpoint that says how it is to be measured."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = library.models.MLP([4, 6, 3], activation="tanh")
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(1)) if inputs is None else inputs
    y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(2))
    kwargs: dict[str, Any] = {"sizes": [4, 6, 3], "activation": "tanh"}
    library.save(Path(path), model=model, recipe=Recipe("mlp", kwargs, "cross_entropy", {"x": x, "y": y}))


# ---- results -----------------------------------------------------------------------------------------------------------


def test_help_does_not_import_torch():
    script = (
        "import sys; from curvkit_cli.main import run; run(['compare', '--help']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert b"Several CHECKPOINTs on the same data, with differences." in done.stdout
    assert b"compare [OPTIONS] CHECKPOINT CHECKPOINT..." in done.stdout


def test_plain_lines_have_every_digit(compare: Typed):
    code, out, err = compare("a.pt", "b.pt", *OBJECTIVE, "--plain")
    assert code == 0
    assert err.startswith("a.pt:\nobjective: train.py:objective (--objective)\n")
    rows = [line.split("\t") for line in out.splitlines()]
    found = {tuple(row[:2]): row[2:] for row in rows}
    spectra = [truth(net(seed=seed)) for seed in (0, 1)]
    top = [spectrum[-1].item() for spectrum in spectra]
    # float32 weights against a dense float64 spectrum; the residual is 1e-3 of the eigenvalue, and its square is what errs
    assert float(found["a.pt", "lambda_max"][0]) == pytest.approx(top[0], rel=1e-5)
    assert float(found["b.pt", "lambda_max"][0]) == pytest.approx(top[1], rel=1e-5)
    low, high = map(float, found["b.pt", "lambda_max"][5:7])
    assert low <= top[1] - top[0] <= high
    assert float(found["b.pt", "trace"][4]) == pytest.approx(
        spectra[1].sum().item() - spectra[0].sum().item(), rel=1e-4
    )
    assert found["b.pt", "trace"][7] == "0.0"  # 51 products give every entry
    assert found["a.pt", "loss"][4:] == []
    assert len(found["b.pt", "loss"]) == 9
    assert float(found["b.pt", "distance"][0]) > 0
    assert float(found["b.pt", "overlap by chance"][0]) == 1 / 51
    assert found["b.pt", "verdict"][0] in ("loss differs", "undecided")
    assert ("comparison", "2 checkpoints compared; differences are to the first") in found


def test_json_is_one_document(compare: Typed):
    code, out, _ = compare("a.pt", "b.pt", *OBJECTIVE, "--json", "-q", "-o", "out")
    assert code == 0
    document = json.loads(out)
    assert document == json.loads(Path("out/compare.json").read_text())
    assert document["schema"] == "curvkit.compare/1"
    assert document["result"]["reference"] == "a.pt"
    assert document["result"]["interrupted"] is False
    assert [point["name"] for point in document["result"]["points"]] == ["a.pt", "b.pt"]
    record = document["record"]
    assert [it["checkpoint"]["name"] for it in record["checkpoints"]] == ["a.pt", "b.pt"]
    digests = {it["checkpoint"]["digest"] for it in record["checkpoints"]}
    assert len(digests) == 2
    assert {it["data_fingerprint"] for it in record["checkpoints"]} == {record["checkpoints"][0]["data_fingerprint"]}
    assert record["seed"] == 0
    assert record["products"] == sum(it["products"] for it in record["checkpoints"])
    assert sorted(record) == [
        "checkpoints",
        "command",
        "environment",
        "options",
        "peak_memory_bytes",
        "products",
        "seconds",
        "seed",
    ]
    code, _, err = compare("a.pt", "b.pt", *OBJECTIVE, "-q", "-o", "out")
    assert code == 2
    assert "out/compare.json is already there" in err


@pytest.fixture(scope="module")
def three() -> Comparison:
    """Three points, two eigenvalues each, and a trace that is sampled."""
    x, y = examples()
    its = {f"{name}.pt": Objective(net(seed=seed), F.cross_entropy, [(x, y)]) for seed, name in enumerate("abc")}
    return compare_objectives(its, 2, probes=30, seed=0, settings=ComparisonSettings(preflight=False))


@pytest.mark.parametrize("width", [20, 40, 60, 80, 140])
def test_the_table_fits_every_width(
    three: Comparison, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
):
    monkeypatch.setenv("COLUMNS", str(width))
    render_comparison.table(three, "", "never")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out
    joined = re.sub(r"\s+", " ", out)
    for text in ("lambda_max", "lambda_2", "adaptive sharpness", "distance to A", "verdict", "reference"):
        assert text in joined
    assert len(re.findall(r"^ *loss  ", out, re.MULTILINE)) == {20: 3, 40: 3, 60: 2, 80: 1, 140: 1}[width]


def test_the_table_shows_differences_beneath_their_numbers(compare: Typed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = compare("a.pt", "b.pt", *OBJECTIVE, "--format", "table", "-q", "--color", "never", "--probes", "40")
    lines = out.splitlines()
    assert lines[0] == "2 checkpoints compared; differences are to the first"
    assert [line.split() for line in lines[1:3]] == [["A", "a.pt"], ["B", "b.pt"]]
    at = next(i for i, line in enumerate(lines) if line.startswith(" trace"))
    assert re.fullmatch(r" trace ± s\.e\. +[\d.]+ ± [\d.]+ +[\d.]+ ± [\d.]+ *", lines[at])
    assert re.fullmatch(r"   - A ± s\.e\. +[+-][\d.]+ ± [\d.]+ *", lines[at + 1])
    joined = re.sub(r"\s+", " ", out)
    assert (
        "by 40 probes that all share, so that the difference has a standard error of its own; of independent probes it would be"
        in joined
    )
    assert "losses count as equal within 1% of the larger" in joined


def test_many_checkpoints_fold_with_letters_for_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "80")
    x = torch.ones(4, 1)
    its: dict[str, Objective] = {}
    for index in range(29):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(model.weight, 1.0 + index)
        its[f"step-{index}.pt"] = Objective(model, F.mse_loss, [(x, x)])
    found = compare_objectives(its, probes=2, seed=0, settings=ComparisonSettings(preflight=False))
    render_comparison.table(found, "", "never")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert re.search(r"^ AC +step-28.pt$", out, re.MULTILINE)
    shown = re.findall(r"^ {20,}([A-Z ]+)$", out, re.MULTILINE)
    assert " ".join(shown).split() == [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "AA", "AB", "AC"]


def test_markdown_renders(compare: Typed):
    markdown = pytest.importorskip("markdown", reason="comes with mkdocs")
    shutil.copy("b.pt", "b|`x`_y_.pt")
    code, out, _ = compare("a.pt", "b|`x`_y_.pt", *OBJECTIVE, "--md", "-q")
    assert code == 0
    page = markdown.markdown(out, extensions=["tables"])
    table = re.search(r"<table>.*</table>", page, re.DOTALL)
    assert table is not None
    rows = re.findall(r"<tr>(.*?)</tr>", table[0], re.DOTALL)
    cells = [
        [re.sub(r"<[^>]*>|&nbsp;", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in rows
    ]
    assert cells[0] == ["", "A", "B"]
    assert {len(row) for row in cells} == {3}
    assert [row[0] for row in cells[1:4]] == ["loss", "- A ± s.e.", "lambda_max"]
    assert cells[-1][0] == "verdict"
    assert "<code>b|`x`_y_.pt</code>" in page
    assert "<em>" not in page
    assert "<li>B: <strong>" in page
    assert "diag|w| H diag|w|" in page
    code, _, err = compare("a.pt", "b.pt", *OBJECTIVE, "--md", "--json")
    assert code == 2
    assert "--md and --format json contradict each other: leave out one of them." in err


def test_recipes_need_no_flag(compare: Typed):
    recipe("one.pt", 0)
    recipe("two.pt", 1)
    code, out, err = compare("one.pt", "two.pt", "--seed", "0", "--plain")
    assert code == 0
    assert err.count("objective: recipe in the checkpoint (mlp, cross_entropy)") == 2
    assert "two.pt\tlambda_max\t" in out


def test_a_configuration_names_the_objective(compare: Typed):
    Path("curvkit.toml").write_text(
        'objective = "train.py:objective"\n[defaults.compare]\nprobes = 7\n[set]\nhidden = 6\n'
    )
    code, out, _ = compare("a.pt", "b.pt", "--seed", "0", "--json", "-q")
    assert code == 0
    document = json.loads(out)
    assert document["record"]["config"]["path"] == "curvkit.toml"
    assert document["result"]["points"][1]["trace"]["probes"] == 7


@pytest.mark.slow
def test_the_same_file_twice_is_noted_and_differs_by_nothing(compare: Typed):
    Path("link.pt").symlink_to("a.pt")
    code, out, err = compare("a.pt", "a.pt", "link.pt", *OBJECTIVE, "--plain")
    assert code == 0
    assert "note: a.pt is the same file as a.pt\n" in err
    assert "note: link.pt is the same file as a.pt\n" in err
    rows = [line.split("\t") for line in out.splitlines()]
    found = {tuple(row[:2]): row[2:] for row in rows}
    for name in ("a.pt (2)", "link.pt"):
        assert found[name, "verdict"] == ["same", "the same parameters and the same numbers"]
        for quantity in ("loss", "lambda_max", "v'Hv", "trace", "adaptive sharpness"):
            assert float(found[name, quantity][4]) == 0.0
        assert found[name, "distance"] == ["0.0"]


def test_a_function_that_draws_other_data_is_measured_on_those_of_the_first(compare: Typed):
    code, out, err = compare("a.pt", "b.pt", "--objective", "train.py:random_data", "--seed", "0", "--json")
    assert code == 0
    assert "note: the function gave other data for it; the data of a.pt are used for all" in err
    document = json.loads(out)
    fingerprints = [it["data_fingerprint"] for it in document["record"]["checkpoints"]]
    assert fingerprints[0] == fingerprints[1]
    assert (
        "the function gave other data for it; the data of a.pt are used for all"
        in document["record"]["checkpoints"][1]["notes"]
    )


@pytest.mark.slow
def test_strict_and_not_converged(compare: Typed):
    code, out, err = compare("a.pt", "b.pt", *OBJECTIVE, "--max-products", "4", "--strict", "--format", "table")
    assert code == 5
    assert "Warning: not converged: a residual is above the tolerance." in err
    assert re.search(r"lambda_max +[\d.]+ \?", out)
    assert compare("a.pt", "b.pt", *OBJECTIVE, "--max-products", "4", "-q")[0] == 0


# ---- refusals ----------------------------------------------------------------------------------------------------------


def test_one_checkpoint_is_typed_wrong(compare: Typed):
    code, out, err = compare("a.pt", *OBJECTIVE)
    assert (code, out) == (2, "")
    assert "Only one checkpoint was given, a.pt: two or more are compared." in err
    assert "`curvkit sharpness`" in err


def test_missing_and_half_written_files(compare: Typed):
    code, _, err = compare("a.pt", "nothing.pt", *OBJECTIVE)
    assert code == 2
    assert "'nothing.pt' does not exist" in err
    whole = Path("b.pt").read_bytes()
    Path("half.pt").write_bytes(whole[: len(whole) // 2])
    code, _, err = compare("a.pt", "half.pt", *OBJECTIVE)
    assert code == 4
    assert "half.pt" in err


def test_other_architectures_are_named(compare: Typed):
    recipe("one.pt", 0)
    x = torch.randn(24, 4)
    model = library.models.MLP([4, 5, 3], activation="tanh")
    kwargs: dict[str, Any] = {"sizes": [4, 5, 3], "activation": "tanh"}
    batch = {"x": x, "y": torch.zeros(24, dtype=torch.long)}
    library.save(Path("two.pt"), model=model, recipe=Recipe("mlp", kwargs, "cross_entropy", batch))
    code, _, err = compare("one.pt", "two.pt")
    assert code == 3
    assert "compare: two.pt has other parameters than one.pt: other shapes: " in err
    assert "[6, 4] and [5, 4]" in err


def test_recipes_with_other_data_are_refused(compare: Typed):
    recipe("one.pt", 0)
    recipe("two.pt", 1, torch.ones(24, 4))
    code, _, err = compare("one.pt", "two.pt")
    assert code == 3
    assert (
        "compare: two.pt is measured on other data than one.pt: 24 examples in 1 batch, there 24 examples in 1 batch"
        in err
    )


def test_weights_that_are_not_finite_are_named(compare: Typed):
    state = net(seed=1).state_dict()
    state["inner.weight"][0, 0] = float("nan")
    torch.save(state, "nan.pt")
    code, out, err = compare("a.pt", "nan.pt", *OBJECTIVE)
    assert (code, out) == (4, "")
    assert "nan.pt: the weight 'inner.weight' has 1 NaN or infinite entry" in err


def test_a_function_with_one_model_for_all_is_refused(compare: Typed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(tmp_path))
    shutil.copy("train.py", "shared_training.py")  # a module stays, a file is run anew
    code, _, err = compare("a.pt", "b.pt", "--objective", "shared_training:one_model")
    assert code == 3
    assert "gave the same model for two checkpoints" in err
    assert "build it inside the function, not beside it" in err


# ---- Ctrl-C ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_interrupt_prints_what_is_known(tmp_path: Path):
    arguments = ("compare", "a.pt", "b.pt", "--objective", "train.py:slow", "--json", "--no-preflight")
    process = subprocess.Popen(
        [*PROGRAM, *arguments],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("compare "):  # the first tenth: at work on the eigenvalues of a.pt
            break
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted." in err
    result = json.loads(out)["result"]
    assert result["interrupted"] is True
    assert result["complete"] is False
    assert [point["loss"]["parts"] for point in result["points"]] == [24, 24]
    assert result["differences"][0]["loss"]["stderr"] > 0
    assert result["differences"][0]["verdict"]["kind"] == "undecided"


def test_a_pipe_that_is_closed(tmp_path: Path):
    done = curvkit("compare", "a.pt", "b.pt", *OBJECTIVE, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("checkpoint\tquantity\tvalue\t")
