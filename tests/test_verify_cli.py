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
import torch.nn.functional as F
from curvkit_cli.commands.verify import UNREADABLE
from curvkit_cli.main import run
from safetensors.torch import load_file, save_file
from samples import TRAIN, examples, net

from curvkit.errors import CurvkitError, InvalidArgument
from curvkit.measures import SharpnessSettings, TraceSettings
from curvkit.measures.restored import sharpness_of
from curvkit.measures.stability_result import RateRatio, Stability
from curvkit.measures.updates import Update
from curvkit.measures.verification import verify_sharpness
from curvkit.measures.verified_parts import Check
from curvkit.measures.verified_trace import verify_trace
from curvkit.objectives import Objective
from curvkit.results import Eigenpairs
from curvkit.results.files import sha256

FUNCTION = ("--objective", "train.py:objective", "--set", "hidden=12")
CKPT = ("ckpt.pt", *FUNCTION)
Typed = Callable[..., tuple[int, str, str]]
MEASURED = {
    "sharpness": ("sharpness", *CKPT, "-k", "2", "--tolerance", "1e-4", "--adaptive"),
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


def said(name: str, found: dict[str, Any] | None = None, probes: int = 2) -> list[Check]:
    """What is said of a document, without the command around it."""
    found = found or json.loads(document(name).read_text())
    x, y = examples()
    objective = Objective(net(12).eval(), F.cross_entropy, [(x[:10], y[:10]), (x[10:], y[10:])])
    held = document(name).with_suffix(f".{'vectors' if name == 'sharpness' else 'samples'}.safetensors")
    tensors = load_file(held) if held.exists() else None
    if name != "sharpness":
        return list(verify_trace(objective, found, tensors, TraceSettings(), probes))
    assert tensors is not None
    return list(verify_sharpness(objective, found, tensors["vectors"], SharpnessSettings()))


def changed(name: str, change: Callable[[Any, Any], None], value: Any) -> set[str]:
    """What is found to differ once a document is changed."""
    found = json.loads(document(name).read_text())
    if name == "sharpness":
        found["result"]["stability"] = STABILITY.to_dict()
    assert not [check.what for check in said(name, found) if check.holds is False]
    change(found, value)
    return {check.what for check in said(name, found) if check.holds is False}


def failing(out: str) -> set[str]:
    return {line.split("\t")[0] for line in out.splitlines() if line.endswith("\tDIFFERS")}


@pytest.mark.parametrize("name", MEASURED)
def test_a_true_result_holds(verify: Typed, name: str):
    code, out, err = verify(str(document(name)), *CKPT, "-q")
    assert (code, err, failing(out)) == (0, "", set())


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize(
    "how", [("--dtype", "float64"), ("--rule", "difference"), ("--residency", "streamed")], ids="-".join
)
def test_a_true_result_holds_by_any_arithmetic(verify: Typed, name: str, how: tuple[str, ...]):
    code, out, err = verify(str(document(name)), *CKPT, *how, "-q")
    assert (code, err, failing(out)) == (0, "", set())
    assert f"result\t{document(name)} of ckpt.pt" in out


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(("--rounding", "perturbation"), marks=pytest.mark.slow),
        ("--which", "both", "-k", "3"),
        pytest.param(("--which", "smallest"), marks=pytest.mark.slow),
        pytest.param(("--rule", "difference"), marks=pytest.mark.slow),
        pytest.param(("--arithmetic", "bfloat16", "--tolerance", "0.02"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_sharpness_that_was_measured_otherwise_holds(verify: Typed, how: tuple[str, ...]):
    assert run(["sharpness", *CKPT, "--seed", "0", "--no-data-doubt", "-o", "other", "-q", *how]) == 0
    code, out, _ = verify("other/sharpness.json", *CKPT)
    assert (code, failing(out)) == (0, set())


@pytest.mark.slow
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
    left = ["preflight", "halves", "scale invariance", "adaptive sharpness", "stability"]
    assert found["result"]["not_recomputed"] == left
    assert [check["what"] for check in found["result"]["checks"] if check["holds"] is None] == left
    _, out, err = verify("sharpness/sharpness.json", *CKPT, "--format", "table", "--color", "never")
    assert "eigenvalue 1" in out
    assert "holds" in out
    assert next(line for line in out.splitlines() if "upper bound" in line).endswith("not contradicted")
    assert err.endswith(f"What was recomputed holds. Not checked: {', '.join(left)}.\n")


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
STABILITY = Stability(
    "SGD",
    None,
    update=Update("SGD", 0.1, 0.1, matrix="H"),
    eigenpairs=Eigenpairs(
        values=torch.tensor([0.5], dtype=torch.float64),
        residuals=torch.tensor([0.01], dtype=torch.float64),
        converged=torch.tensor([True]),
        vectors=None,
        recomputed=True,
        which="largest",
        tolerance=0.05,
        scale=0.5,
        asymmetry=0.0,
        rounding=0.0,
        products=9,
        upper_bound=0.6,
    ),
    rates=(RateRatio("current", 0.1, "lr of the groups", 0.25, (0.245, 0.255)),),
    reference="current",
    idle_mass=0.0,
    verdict="below the full-batch limit",
)
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
    "quantity": (at("result", "quantity"), "smallest eigenvalues of the Hessian", "quantity"),
    "matrix": (at("result", "quantity"), "largest eigenvalues of the Fisher", "quantity"),
    "text": (at("result", "definition", "text"), "Hessian of another loss", "definition"),
    "confidence": (at("result", "bounds_confidence"), 0.999999, "bounds confidence"),
    "multiplicities": (at("result", "multiplicities_below"), 7, "multiplicities"),
    "weights": (at("result", "batch_spread", "weights"), lambda x: [2 * x[0], *x[1:]], "batch spread"),
    "no rounding": (at("result", "rounding"), 0.0, "rounding"),
    "stage": (at("result", "stage"), "halves", "stage"),
    "halves": (at("result", "halves", "lower"), lambda x: x * 1.01, "halves: lower"),
    "invariant": (at("result", "scale_invariance", "invariant"), ["inner.weight"], "scale invariance: parameters"),
    "no tensor": (at("result", "scale_invariance", "zero"), ["other"], "scale invariance: zero"),
    "adaptive": (at("result", "adaptive_sharpness", "value"), lambda x: x * 1.1, "adaptive sharpness: interval"),
    "adaptive residual": (at("result", "adaptive_sharpness", "residual"), 1.0, "adaptive sharpness: interval"),
    "adaptive bound": (at("result", "adaptive_sharpness", "upper_bound"), 0.0, "adaptive sharpness: upper bound"),
    "adaptive quantity": (at("result", "adaptive_sharpness", "quantity"), "trace", "adaptive sharpness: quantity"),
    "ratio": (at("result", "stability", "ratio"), 0.1, "stability: ratio"),
    "stable lr": (at("result", "stability", "largest_stable_lr"), 9.0, "stability: largest stable lr"),
    "lr": (at("result", "stability", "lr"), 0.5, "stability: lr"),
    "limit": (at("result", "stability", "limit_times_lr"), 38.0, "stability: value"),
    "folded": (at("result", "stability", "folded"), 0.3, "stability: folded interval"),
    "folded bound": (at("result", "stability", "folded_upper_bound"), 0.3, "stability: upper bound"),
    "verdict": (at("result", "stability", "verdict"), "above the full-batch limit", "stability: verdict"),
    "no verdict": (at("result", "stability", "idle_mass"), 0.5, "stability: verdict"),
    "a rate": (at("result", "stability", "rates", 0, "ratio"), 0.1, "stability: ratio of current"),
}


@pytest.mark.parametrize("field", SHARPNESS)
def test_a_changed_sharpness_is_found(field: str):
    change, value, what = SHARPNESS[field]
    assert what in changed("sharpness", change, value)


def test_a_limit_that_there_is_not_is_found():
    found = json.loads(document("sharpness").read_text())
    assert found["result"]["stability"]["reason"] is not None
    found["result"]["stability"] |= {"ratio": 0.5, "verdict": "below the full-batch limit"}
    different = {check.what for check in said("sharpness", found) if check.holds is False}
    assert different == {"stability: ratio", "stability: verdict"}


def test_a_document_without_younger_parts_holds():
    found = json.loads(document("sharpness").read_text())
    for name in ("scale_invariance", "adaptive_sharpness", "stability"):
        del found["result"][name]
    assert [check.what for check in said("sharpness", found) if check.holds is not True] == ["preflight", "halves"]
    result = sharpness_of(found)
    assert (result.scale, result.adaptive, result.stability) == (None, None, None)


def test_a_change_is_said(verify: Typed):
    path = document("sharpness")
    found = json.loads(path.read_text())
    at(*ROW, "value")(found, lambda x: x * 1.001)
    path.write_text(json.dumps(found))
    code, out, err = verify(str(path), *CKPT)
    assert (code, failing(out)) == (1, {"eigenvalue 1", "interval 1"})
    assert "Warning: not verified: eigenvalue 1, interval 1." in err


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
def test_changed_eigenvectors_are_found(kind: str):
    change, found = VECTORS[kind]
    with torch.random.fork_rng(devices=[]):
        vectors(change, honest=True)
    assert found <= {check.what for check in said("sharpness") if check.holds is False}


@pytest.mark.parametrize("honest", [True, False])
def test_the_hash_of_changed_eigenvectors_is_held_against_them(verify: Typed, honest: bool):
    vectors(VECTORS["longer"][0], honest=honest)
    code, out, _ = verify(str(document("sharpness")), *CKPT)
    assert (code, "unit length" in failing(out)) == (1, True)
    assert ("file of vectors" in failing(out)) is not honest


def exchanged(rows: list[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    """The same rows, with one field of the first two in each other's place."""
    first, second, *others = rows
    return [{**first, field: second[field]}, {**second, field: first[field]}, *others]


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
    "quantity": (at("result", "quantity"), "trace of the Fisher", {"quantity"}),
    "unit": (at("result", "unit"), "nats per token", {"unit"}),
    "confidence": (at("result", "trace", "confidence"), 0.999, {"confidence"}),
    "exact": (at("result", "trace", "exact"), True, {"exact", "interval"}),
    "mean": (at("result", "trace", "per_parameter"), lambda x: 2 * x, {"per parameter"}),
    "method": (at("record", "run", "settings", "search", "method"), "xtrace", {"method"}),
    "a name": (at("result", "parameters", 0, "name"), "outer.weight", {"shares of parameters"}),
    "names": (at("result", "parameters"), lambda rows: exchanged(rows, "name"), {"shares of parameters"}),
    "rows": (at("result", "parameters"), lambda rows: rows[::-1], {"shares of parameters"}),
    "an error": (at("result", "parameters", 0, "stderr"), lambda x: x / 2, {"shares of parameters"}),
    "a mean": (at("result", "parameters", 0, "per_parameter"), lambda x: x / 2, {"shares of parameters"}),
    "layers": (at("result", "layers"), lambda rows: exchanged(rows, "value"), {"shares of layers"}),
    "a part": (at("result", "layers", 0, "share"), lambda x: x / 2, {"shares of layers"}),
    "no layers": (at("result", "layers"), [], {"shares of layers"}),
}


@pytest.mark.parametrize("field", TRACE)
def test_a_changed_trace_is_found(field: str):
    change, value, what = TRACE[field]
    assert what <= changed("hutchinson", change, value)


@pytest.mark.parametrize("name", ["hutch++", "xtrace", "exact"])
def test_a_changed_value_is_found_by_running_it_again(name: str):
    found = json.loads(document(name).read_text())
    for key in ("value", "low", "high"):
        found["result"]["trace"][key] *= 1.01
    assert f"{name} again" in {check.what for check in said(name, found) if check.holds is False}


@pytest.mark.parametrize("name", ["hutchinson", "deflated"])
def test_samples_that_no_probe_gave_are_found(name: str):
    """Everything that follows from them is stated as it follows, and their hash, too: only products show it."""
    tensors = Path(name) / "trace.samples.safetensors"
    held = load_file(tensors)
    held["samples"] = held["samples"] * 1.01
    save_file(held, tensors)
    different = [check.what for check in said(name, probes=34) if check.holds is False]
    assert sum(what.startswith("probe ") for what in different) >= 20


def test_shares_of_an_exact_trace_are_computed_again():
    """Shares and tensors tell the same story, and its sum is right."""
    tensors = Path("exact/trace.samples.safetensors")
    held = load_file(tensors)
    held["known"] = held["known"].flip(0).contiguous()
    save_file(held, tensors)
    found = json.loads(document("exact").read_text())
    for row, value in zip(found["result"]["parameters"], held["known"].tolist(), strict=True):
        row["value"] = value
    different = {check.what for check in said("exact", found) if check.holds is False}
    assert "shares again" in different
    assert "exact again" not in different


def test_shares_without_their_samples_are_found():
    Path("hutchinson/trace.samples.safetensors").unlink()
    assert "samples" in {check.what for check in said("hutchinson") if check.holds is False}


@pytest.mark.slow
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
        ('{"schema": "curvkit.trace/1", "record": {"run": {}}, "result": []}', "AttributeError"),
        ('{"schema": "curvkit.trace/1", "record": {"run": {}}, "result": {}}', "KeyError: 'model'"),
        ('{"schema": "curvkit.trace/1", "record": {"run": []}, "result": {}}', "TypeError"),
        ('{"schema": [], "record": {}}', "TypeError"),
        (
            '{"schema": "curvkit.trace/1", "record": {"run": {"model": {"mode": "eval", "dtype": "torch.load"}}}, "result": {}}',
            "ValueError: 'torch.load' is none of the precisions float32, float64",
        ),
        (
            '{"schema": "curvkit.trace/1", "record": {"run": {"model": {"mode": 1, "dtype": "float32"}}}, "result": {}}',
            "its mode is 1",
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


IMPOSSIBLE: dict[str, tuple[str, Callable[[Any, Any], None], Any, str]] = {
    "rank": ("deflated", at("result", "rank"), 10**9, "ValueError: rank=1000000000 and probes="),
    "asked": ("hutch++", at("record", "run", "settings", "search", "rank"), 10**9, "does not fit: order 99"),
    "method": ("hutch++", at("record", "run", "settings", "search", "method"), "load", "method='load' is not one of"),
    "products": (
        "xtrace",
        at("result", "search_products"),
        10**9,
        "ValueError: search_products=1000000000, and at most",
    ),
    "seed": ("hutchinson", at("record", "seed"), -1, "ValueError: seed=-1 is none"),
    "precision": ("hutchinson", at("result", "definition", "dtype"), "load", "ValueError: 'load' is none of the"),
    "size": ("hutchinson", at("result", "loss"), 10**400, "OverflowError"),
    "result": ("hutchinson", at("result", "trace"), [], "TypeError"),
}


@pytest.mark.parametrize("field", IMPOSSIBLE)
def test_what_cannot_be_is_not_computed(field: str):
    name, change, value, reason = IMPOSSIBLE[field]
    found = json.loads(document(name).read_text())
    change(found, value)
    with pytest.raises(UNREADABLE) as told:
        said(name, found)
    assert not isinstance(told.value, CurvkitError)
    assert reason in f"{type(told.value).__name__}: {told.value}"


@pytest.mark.parametrize("field", ["rank", "size"])
def test_what_cannot_be_is_refused(verify: Typed, field: str):
    name, change, value, reason = IMPOSSIBLE[field]
    path = document(name)
    found = json.loads(path.read_text())
    change(found, value)
    path.write_text(json.dumps(found))
    code, _, err = verify(str(path), *CKPT)
    assert code == 4
    assert f"the result cannot be verified: {reason}" in err
    assert "Measure again with -o DIR." in err


def test_more_products_than_were_stated_are_not_made():
    """A budget without bound changes nothing: what is repeated ends where the result did."""
    found = json.loads(document("hutch++").read_text())
    found["record"]["run"]["settings"]["search"]["max_products"] = 10**9
    assert not [check.what for check in said("hutch++", found) if check.holds is False]


def test_a_subspace_without_room_is_refused():
    found = json.loads(document("deflated").read_text())
    x, y = examples()
    objective = Objective(net(12).eval(), F.cross_entropy, [(x[:10], y[:10]), (x[10:], y[10:])])
    tensors = load_file("deflated/trace.samples.safetensors")
    with pytest.raises(
        InvalidArgument, match="verify: 6 vectors of 99 parameters do not fit the memory budget"
    ) as told:
        list(verify_trace(objective, found, tensors, TraceSettings(memory_bytes=4000), 2))
    assert str(told.value).endswith("Raise the budget, or verify on a machine with more memory.")


def test_whole_numbers_are_refused(verify: Typed):
    tensors = Path("hutchinson/trace.samples.safetensors")
    save_file({name: held.long() for name, held in load_file(tensors).items()}, tensors)
    code, _, err = verify(str(document("hutchinson")), *CKPT)
    assert code == 4
    assert "ValueError: the file of samples has whole numbers" in err


def test_a_digest_that_is_not_stated_is_named(verify: Typed):
    path = document("hutchinson")
    found = json.loads(path.read_text())
    found["record"]["run"]["checkpoint"].pop("parameters_and_buffers", None)
    path.write_text(json.dumps(found))
    code, _, err = verify(str(path), *CKPT)
    assert code == 0
    assert "Not checked: parameters and buffers, preflight, rounding." in err
