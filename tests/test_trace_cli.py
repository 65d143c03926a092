"""`curvkit trace` as a user types it: rows, interval, formats, exit codes, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from curvkit_cli import render_trace
from curvkit_cli.main import run
from samples import PROGRAM, TRAIN, curvkit, environment, net, truth

from curvkit import measures

OBJECTIVE = ("ckpt.pt", "--objective", "train.py:objective", "--seed", "0")
WIDE = ("ckpt.pt", "--objective", "train.py:wide", "--seed", "0")
MORE = """

def wide():
    torch.manual_seed(0)
    return sized(40)

def slow():
    import time
    class Slow(Net):
        def forward(self, x):
            time.sleep(0.05)
            return super().forward(x)
    torch.manual_seed(0)
    return curvkit.Objective(Slow(40), F.cross_entropy, data)
"""
Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder with a user's train.py and checkpoints of a network of 51 and of one of 323 parameters."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    Path("train.py").write_text(TRAIN + MORE)
    torch.save(net().state_dict(), "ckpt.pt")
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def wide() -> tuple[str, ...]:
    """A checkpoint above the order that is always done exactly."""
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(Path("train.py").read_text(), namespace)
        torch.save(namespace["wide"]().model.state_dict(), "wide.pt")
    return ("wide.pt", "--objective", "train.py:wide", "--seed", "0")


@pytest.fixture
def trace(capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run the command in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with torch.random.fork_rng(devices=[]):  # the user's file seeds the global generator
            code = run(["trace", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def lines(out: str) -> dict[str, list[str]]:
    return {line.split("\t")[0]: line.split("\t")[1:] for line in out.splitlines()}


def test_help_does_not_import_torch():
    script = "import sys; from curvkit_cli.main import run; run(['trace', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert b"Hessian trace of a CHECKPOINT, with its interval, by layer." in done.stdout


def test_plain_lines_of_an_exact_trace(trace: Typed):
    code, out, err = trace(*OBJECTIVE, "--plain")
    assert code == 0
    assert "objective:" in err
    found = lines(out)
    assert found["name"] == ["kind", "parameters", "trace", "stderr", "share", "per_parameter"]
    assert (found["inner"][:2], found["outer"][:2]) == (["Linear", "30"], ["Linear", "21"])
    # float32 products against the dense float64 spectrum
    assert float(found["total"][2]) == pytest.approx(truth().sum().item(), rel=1e-5)
    assert float(found["inner"][2]) + float(found["outer"][2]) == pytest.approx(float(found["total"][2]), rel=1e-12)
    assert float(found["low"][0]) <= truth().sum().item() <= float(found["high"][0])
    assert float(found["high"][0]) - float(found["low"][0]) < 1e-5
    assert found["interval"][0].startswith("every diagonal entry was computed; rounding puts the sum off by ± ")
    assert found["cost"][0].startswith("51 products + 6 that check symmetry and rounding · ")
    assert found["method"] == ["exact (51 products give every diagonal entry)"]
    assert found["unit"] == ["mean nats per term; the trace is in that per parameter squared"]


def test_rows_by_parameter(trace: Typed):
    _, out, _ = trace(*OBJECTIVE, "--plain", "--by", "param", "-q")
    found = lines(out)
    assert [found[name][0] for name in ("inner.weight", "inner.bias", "outer.weight", "outer.bias")] == [
        "6x4",
        "6",
        "3x6",
        "3",
    ]


def test_table_says_what_stands_beside_the_number(trace: Typed, wide: tuple[str, ...]):
    code, out, _ = trace(*wide, "--format", "table", "--tolerance", "0.2")
    assert code == 0
    for text in (
        "trace of wide.pt",
        "layer",
        "± s.e.",
        "trace/param",
        "inner (Linear)",
        "total",
        "holds the trace for this data with probability 95% over the probes",
        "Hessian of cross_entropy, mean over 24 terms",
        "probes",
        "seed 0",
    ):
        assert re.sub(r"\s+", " ", text) in re.sub(r"\s+", " ", out)


def test_a_narrow_terminal_gets_all_numbers(trace: Typed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "36")
    _, out, _ = trace(*OBJECTIVE, "--format", "table")
    assert max(map(len, out.splitlines())) <= 36
    assert "inner (Linear)" in out
    assert "per parameter" in re.sub(r"\s+", " ", out)


def test_json_and_the_written_document(trace: Typed, wide: tuple[str, ...]):
    code, out, _ = trace(*wide, "--json", "-o", "results", "-q", "--tolerance", "0.2")
    assert code == 0
    document = json.loads(out)
    assert document["schema"] == "curvkit.trace/1"
    assert document == json.loads(Path("results/trace.json").read_text())
    assert document["record"]["seed"] == 0
    assert document["record"]["products"] == document["result"]["products"]
    assert document["result"]["trace"]["converged"] is True
    assert document["result"]["interrupted"] is False
    code, _, err = trace(*wide, "-o", "results")
    assert code == 2
    assert "is already there and is not overwritten" in err


def test_not_converged_is_said_and_strict_exits_with_5(trace: Typed, wide: tuple[str, ...]):
    few = (*wide, "--max-products", "40", "--tolerance", "0.001", "--method", "hutchinson")
    code, out, err = trace(*few, "--plain")
    assert code == 0
    assert "Warning: not converged: the interval is wider than the tolerance." in err
    assert "40 probes" in out
    code, _, _ = trace(*few, "--strict")
    assert code == 5


def test_few_probes_are_called_few(trace: Typed, wide: tuple[str, ...]):
    _, out, _ = trace(*wide, "--max-products", "5", "--plain")
    assert "5 probes are few for that, 30 are the least that count" in out


def test_xtrace_says_that_it_has_no_shares(trace: Typed, wide: tuple[str, ...]):
    code, out, _ = trace(*wide, "--method", "xtrace", "--plain", "--tolerance", "0.5")
    assert code == 0
    assert "xtrace gives no shares of layers; --method deflated does" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--method", "magic"), "'magic' is not one of 'auto', 'exact'"),
        (("--by", "row"), "'row' is not one of 'layer', 'param'"),
        (("--tolerance", "2"), "--tolerance 2.0 must lie in (0, 1)"),
        (("--absolute-tolerance", "-1"), "--absolute-tolerance -1.0 must be positive"),
        (
            ("--method", "exact", "--max-products", "9"),
            "--method exact takes 51 products, --max-products 9 allows fewer",
        ),
        (("--method", "deflated", "--rank", "51"), "does not fit"),
        (("--rank", "0"), "--rank"),
    ],
)
def test_typed_wrong(trace: Typed, arguments: tuple[str, ...], text: str):
    code, out, err = trace(*OBJECTIVE, *arguments)
    assert (code, out) == (2, "")
    assert text in err


def test_same_seed_same_output(trace: Typed, wide: tuple[str, ...]):
    first, second = (json.loads(trace(*wide, "--json")[1])["result"] for _ in range(2))
    assert first["trace"] == second["trace"]
    assert first["layers"] == second["layers"]


def test_settings_from_the_environment(trace: Typed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CURVKIT_TRACE_METHOD", "hutchinson")
    _, out, _ = trace(*OBJECTIVE, "--plain", "--tolerance", "0.9")
    assert "hutchinson, 30 probes (as asked)" in out


def test_ctrl_c_prints_what_is_known(wide: tuple[str, ...], tmp_path: Path):
    arguments = ("wide.pt", "--objective", "train.py:slow", "--seed", "0", "--json", "--residency", "streamed")
    process = subprocess.Popen(
        [*PROGRAM, "trace", *arguments, "--tolerance", "0.05", "--method", "hutchinson", "--max-products", "200"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:  # progress off a terminal: said once a tenth of the work is done, after two seconds
        if line.startswith("trace "):
            break
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted." in err
    found = json.loads(out)["result"]
    assert found["interrupted"] is True
    assert found["stage"] == "sampling"
    assert found["trace"]["low"] < found["trace"]["value"] < found["trace"]["high"]


def test_partial_results_are_called_partial(wide: tuple[str, ...]):
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(Path("train.py").read_text(), namespace)
        objective = namespace["wide"]()
    first = next(measures.trace_steps(objective, seed=0))
    text = render_trace.plain(first, "x.pt", "layer")
    assert "PARTIAL\tinterrupted: the interval is that of the probes so far" in text
    assert "nothing is known yet: there are fewer than two probes" in text


def test_in_a_process_of_its_own(tmp_path: Path):
    done = curvkit("trace", *OBJECTIVE, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("name\tkind")


def test_rule(trace: Typed):
    """Rung 2: the dense spectrum; differences keep 1e-7, the weights are float32 numbers."""
    code, out, _ = trace(*OBJECTIVE, "--plain", "-q", "--rule", "difference")
    assert code == 0
    assert float(lines(out)["total"][2]) == pytest.approx(truth().sum().item(), rel=1e-6)
