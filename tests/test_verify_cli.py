"""`curvkit verify` as a user types it: what is true holds by any arithmetic, and whatever was changed is found."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from curvkit_cli.main import run
from safetensors.torch import load_file, save_file
from samples import TRAIN, net

from curvkit.results.files import sha256

FUNCTION = ("--objective", "train.py:objective", "--set", "hidden=12")
CKPT = ("ckpt.pt", *FUNCTION)
Typed = Callable[..., tuple[int, str, str]]
MEASURED = {
    "sharpness": ("sharpness", *CKPT, "-k", "2", "--tolerance", "1e-4"),
    "hutchinson": ("trace", *CKPT, "--method", "hutchinson", "--max-products", "34"),
    "differences": ("trace", *CKPT, "--method", "hutchinson", "--max-products", "30", "--rule", "difference"),
    "deflated": ("trace", *CKPT, "--method", "deflated", "--rank", "6", "--max-products", "40"),
    "hutch++": ("trace", *CKPT, "--method", "hutch++", "--rank", "6", "--max-products", "46"),
    "xtrace": ("trace", *CKPT, "--method", "xtrace", "--max-products", "20"),
    "exact": ("trace", *CKPT, "--method", "exact"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its function, and one result of each kind."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("train.py").write_text(TRAIN)
        torch.save(net(12).state_dict(), "ckpt.pt")
        for name, arguments in MEASURED.items():
            with torch.random.fork_rng(devices=[]):
                assert run([*arguments, "--seed", "0", "-o", name, "-q"]) == 0
    return folder


@pytest.fixture(autouse=True)
def folder(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run the command in this process: exit code, stdout, stderr."""
    capsys.readouterr()

    def call(*arguments: str) -> tuple[int, str, str]:
        with torch.random.fork_rng(devices=[]):
            code = run(["verify", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def document(name: str) -> Path:
    return Path(name) / ("sharpness.json" if name == "sharpness" else "trace.json")


def failing(out: str) -> set[str]:
    return {line.split("\t")[0] for line in out.splitlines() if line.endswith("\tDIFFERS")}


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("how", [(), ("--dtype", "float64")], ids=["", "float64"])
def test_a_true_result_holds(verify: Typed, name: str, how: tuple[str, ...]):
    code, out, err = verify(str(document(name)), *CKPT, *how, "-q")
    assert (code, err, failing(out)) == (0, "", set())


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("how", [("--rule", "difference"), ("--residency", "streamed")], ids="-".join)
def test_a_true_result_holds_by_any_arithmetic(verify: Typed, name: str, how: tuple[str, ...]):
    code, out, err = verify(str(document(name)), *CKPT, *how, "-q")
    assert (code, err, failing(out)) == (0, "", set())
    assert f"result\t{document(name)} of ckpt.pt" in out


@pytest.mark.parametrize(
    "how",
    [
        ("--rounding", "perturbation"),
        ("--which", "both", "-k", "3"),
        ("--which", "smallest"),
        ("--rule", "difference"),
        ("--arithmetic", "bfloat16", "--tolerance", "0.02"),
    ],
    ids=" ".join,
)
def test_a_sharpness_that_was_measured_otherwise_holds(verify: Typed, how: tuple[str, ...]):
    assert run(["sharpness", *CKPT, "--seed", "0", "--no-data-doubt", "-o", "other", "-q", *how]) == 0
    code, out, _ = verify("other/sharpness.json", *CKPT)
    assert (code, failing(out)) == (0, set())


def test_an_exact_trace_by_structure_holds(verify: Typed):
    Path("relu.py").write_text(TRAIN.replace("torch.tanh", "torch.relu"))
    function = ("ckpt.pt", "--objective", "relu.py:objective", "--set", "hidden=12")
    assert run(["trace", *function, "--seed", "0", "-o", "relu", "-q"]) == 0
    assert json.loads(Path("relu/trace.json").read_text())["result"]["by_structure"] is True
    assert verify("relu/trace.json", *function)[0] == 0
    code, out, _ = verify("relu/trace.json", *function, "--residency", "streamed", "--plain")
    assert (code, failing(out)) == (0, set())


def test_formats(verify: Typed):
    code, out, _ = verify("sharpness/sharpness.json", *CKPT, "--json")
    found = json.loads(out)
    assert (code, found["schema"], found["result"]["verified"]) == (0, "curvkit.verify/1", True)
    assert found["result"]["of"] == "curvkit.sharpness/1"
    assert {"what": "halves", "holds": None}.items() <= found["result"]["checks"][-1].items()
    _, out, _ = verify("sharpness/sharpness.json", *CKPT, "--format", "table", "--color", "never")
    assert "eigenvalue 1" in out
    assert "holds" in out


def test_a_narrow_terminal_gets_a_block_per_check(verify: Typed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "50")
    _, out, _ = verify("sharpness/sharpness.json", *CKPT, "--format", "table", "--color", "never")
    assert max(map(len, out.splitlines())) <= 50
    assert "eigenvalue 1  holds" in out


def at(*path: Any) -> Callable[[Any, Any], None]:
    def change(found: Any, value: Any) -> None:
        for step in path[:-1]:
            found = found[step]
        found[path[-1]] = value(found[path[-1]]) if callable(value) else value

    return change


ROW = ("result", "eigenvalues", 0)
SHARPNESS = {
    "value": (at(*ROW, "value"), lambda x: x * 1.001, "eigenvalue 1"),
    "residual": (at(*ROW, "residual"), lambda x: x / 2, "residual 1"),
    "low": (at(*ROW, "low"), lambda x: x + 1e-6, "interval 1"),
    "high": (at(*ROW, "high"), lambda x: x + 1e-6, "interval 1"),
    "converged": (at(*ROW, "converged"), False, "converged 1"),
    "rounding": (at("result", "rounding"), 1e-2, "rounding"),
    "scale": (at("result", "scale"), lambda x: x * 100, "scale"),
    "tolerance": (at("result", "tolerance"), 0.5, "tolerance"),
    "upper bound": (at("result", "upper_bound"), 0.1, "upper bound"),
    "loss": (at("result", "loss"), lambda x: x * 1.001, "loss"),
    "gradient": (at("result", "gradient_norm"), lambda x: x * 1.01, "gradient norm"),
    "spread": (at("result", "batch_spread", "quotients"), lambda x: [x[0] * 1.01, *x[1:]], "batch spread"),
    "parameters": (at("result", "definition", "parameters"), 7, "parameters"),
    "mode": (at("result", "definition", "mode"), "train", "mode"),
    "terms": (at("result", "definition", "terms"), 7, "terms"),
}


@pytest.mark.parametrize("field", SHARPNESS)
def test_a_changed_sharpness_is_found(verify: Typed, field: str):
    change, value, what = SHARPNESS[field]
    path = document("sharpness")
    found = json.loads(path.read_text())
    change(found, value)
    path.write_text(json.dumps(found))
    code, out, err = verify(str(path), *CKPT)
    assert code == 1
    assert what in failing(out)
    assert f"Warning: not verified: {'' if len(failing(out)) > 1 else what}" in err


def test_an_interval_that_is_moved_with_its_value_is_found(verify: Typed):
    path = document("sharpness")
    found = json.loads(path.read_text())
    for name in ("value", "low", "high"):
        found["result"]["eigenvalues"][1][name] += 1e-3
    path.write_text(json.dumps(found))
    code, out, _ = verify(str(path), *CKPT)
    assert (code, failing(out) >= {"eigenvalue 2"}) == (1, True)


def vectors(change: Callable[[torch.Tensor], torch.Tensor], *, honest: bool) -> None:
    """Change the eigenvectors, with or without the hash that is stated of them."""
    path, stated = Path("sharpness/sharpness.vectors.safetensors"), document("sharpness")
    save_file({"vectors": change(load_file(path)["vectors"]).contiguous()}, path)
    if honest:
        found = json.loads(stated.read_text())
        found["record"]["files"]["vectors"]["sha256"] = sha256(path)
        stated.write_text(json.dumps(found))


VECTORS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], set[str]]] = {
    "longer": (lambda V: V * 1.01, {"unit length"}),
    "turned": (lambda V: torch.stack([V[0], (V[1] + 0.1 * V[0]) / 1.01**0.5]), {"orthogonality", "residual 2"}),
    "others": (lambda V: torch.linalg.qr(torch.randn(V.T.shape))[0].T, {"eigenvalue 1", "residual 1", "interval 1"}),
    "swapped": (lambda V: V.flip(0), {"eigenvalue 1", "eigenvalue 2"}),
    "fewer": (lambda V: V[:1], {"vectors"}),
}


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("honest", [True, False])
def test_changed_eigenvectors_are_found(verify: Typed, kind: str, honest: bool):
    change, found = VECTORS[kind]
    with torch.random.fork_rng(devices=[]):
        vectors(change, honest=honest)
    code, out, _ = verify(str(document("sharpness")), *CKPT)
    assert code == 1
    assert found <= failing(out)
    assert ("file of vectors" in failing(out)) is not honest


TRACE = {
    "value": (at("result", "trace", "value"), lambda x: x * 1.0001, {"trace"}),
    "stderr": (at("result", "trace", "stderr"), lambda x: x * 0.99, {"standard error"}),
    "low": (at("result", "trace", "low"), lambda x: x * 1.001, {"interval"}),
    "high": (at("result", "trace", "high"), lambda x: x * 0.999, {"interval"}),
    "converged": (at("result", "trace", "converged"), lambda x: not x, {"converged"}),
    "tolerance": (at("result", "tolerance"), 0.9, {"tolerance"}),
    "a share": (at("result", "parameters", 0, "value"), lambda x: x + 0.1, {"shares of parameters"}),
    "a layer": (at("result", "layers", 0, "value"), lambda x: x + 0.1, {"shares of layers"}),
    "loss": (at("result", "loss"), lambda x: x * 1.001, {"loss"}),
    "probes": (at("result", "probes"), 300, {"samples"}),
}


@pytest.mark.parametrize("field", TRACE)
@pytest.mark.parametrize("name", ["hutchinson"])
def test_a_changed_trace_is_found(verify: Typed, name: str, field: str):
    change, value, what = TRACE[field]
    path = document(name)
    found = json.loads(path.read_text())
    change(found, value)
    path.write_text(json.dumps(found))
    code, out, _ = verify(str(path), *CKPT)
    assert code == 1
    assert what <= failing(out)


@pytest.mark.parametrize("name", ["hutch++", "xtrace", "exact"])
def test_a_changed_value_is_found_by_running_it_again(verify: Typed, name: str):
    path = document(name)
    found = json.loads(path.read_text())
    for key in ("value", "low", "high"):
        found["result"]["trace"][key] *= 1.01
    path.write_text(json.dumps(found))
    code, out, _ = verify(str(path), *CKPT)
    assert code == 1
    assert f"{name} again" in failing(out)


@pytest.mark.parametrize("name", ["hutchinson", "deflated"])
def test_samples_that_no_probe_gave_are_found(verify: Typed, name: str):
    """Everything that follows from them is stated as it follows, and their hash, too: only products show it."""
    path, tensors = document(name), Path(name) / "trace.samples.safetensors"
    held = load_file(tensors)
    held["samples"] = held["samples"] * 1.01
    save_file(held, tensors)
    found = json.loads(path.read_text())
    found["record"]["files"]["samples"]["sha256"] = sha256(tensors)
    path.write_text(json.dumps(found))
    code, out, _ = verify(str(path), *CKPT, "--probes", "34")
    assert code == 1
    assert sum(what.startswith("probe ") for what in failing(out)) >= 20


def test_another_checkpoint_and_other_data_are_said(verify: Typed):
    torch.save(net(12, seed=1).state_dict(), "other.pt")
    code, out, _ = verify("sharpness/sharpness.json", "other.pt", *FUNCTION)
    assert (code, failing(out)) == (1, {"checkpoint"})
    assert "eigenvalue" not in out
    code, out, _ = verify("sharpness/sharpness.json", *CKPT, "--batches", "1")
    assert (code, failing(out)) == (1, {"data"})
    code, out, _ = verify("sharpness/sharpness.json", *CKPT, "--mode", "train")
    assert (code, failing(out)) == (1, {"model"})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"schema": "curvkit.plan/1", "record": {}}', "its schema is 'curvkit.plan/1'"),
        ('{"schema": "curvkit.trace/1", "record": {}}', "it was not written by -o"),
        (
            '{"schema": "curvkit.trace/1", "record": {"run": {}}, "result": {"interrupted": true}}',
            "its run was interrupted",
        ),
    ],
)
def test_what_is_no_result_is_refused(verify: Typed, content: str, reason: str):
    Path("other.json").write_text(content)
    code, out, err = verify("other.json", *CKPT)
    assert (code, out) == (4, "")
    assert f"other.json is not a result that can be verified ({reason}" in err
    assert "Measure with -o DIR first." in err


def test_missing_parts_are_refused(verify: Typed):
    path = document("sharpness")
    found = json.loads(path.read_text())
    del found["result"]["eigenvalues"][0]["residual"]
    path.write_text(json.dumps(found))
    code, _, err = verify(str(path), *CKPT)
    assert code == 4
    assert "the result cannot be verified: KeyError: 'residual'" in err
    Path("sharpness/sharpness.vectors.safetensors").unlink()
    code, _, err = verify(str(path), *CKPT)
    assert code == 4
    assert "sharpness.vectors.safetensors cannot be read (FileNotFoundError" in err
