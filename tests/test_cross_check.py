"""PyHessian beside our numbers: dense float64 Hessians say who is right, and why the other one is not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from curvkit_cli.main import run
from oracles import cut, dense, fill_gradients, normal, relative, seeded, surroundings
from samples import TRAIN, Net, examples, net
from torch import Tensor, nn

from curvkit import BatchLoss, Objective
from curvkit.errors import CurvkitError, InvalidArgument, MissingExtra, UnknownObjective, UnsupportedModel
from curvkit.measures import (
    CrossCheck,
    SharpnessSettings,
    check_against_pyhessian,
    refuse_uncheckable,
    sharpness,
    sharpness_steps,
    trace,
)
from curvkit.measures.cross_check_weighting import weighting

pytestmark = pytest.mark.extra
QUICK = SharpnessSettings(data_doubt=False)
SIZES = (4, 8, 12)


@pytest.fixture(autouse=True)
def _installed():
    pytest.importorskip("pyhessian")


def spectrum(model: nn.Module, loss: Callable[[Callable[..., Any]], Tensor]) -> Tensor:
    """Descending eigenvalues of the dense float64 Hessian."""
    return torch.linalg.eigvalsh(dense(model, loss).hessian).flip(0)


def convex(mean: float = 0.0) -> Objective:
    """Linear least squares, whose spectrum is positive; inputs with a mean put a pair of eigenvalues far above the others."""
    with seeded():
        return Objective(nn.Linear(6, 2).double().eval(), F.mse_loss, [(normal(40, 6) + mean, normal(40, 2, seed=1))])


def tanh(dtype: torch.dtype = torch.float64, batches: tuple[int, ...] = (24,)) -> Objective:
    model = net().to(dtype).eval()
    return Objective(model, F.cross_entropy, cut(batches, *examples(dtype)))


def padded() -> Objective:
    """Three batches in which different shares of the targets are ignored."""
    x, y = examples(torch.float64)
    y = y.clone()
    y[:3], y[4:11] = -100, -100  # 1 of 4, 1 of 8 and 12 of 12 terms are kept
    return Objective(net().double().eval(), F.cross_entropy, cut(SIZES, x, y))


def by_rows(it: Objective) -> Tensor:
    """Dense: the mean over batches by rows of the batches' own means, which is what PyHessian measures."""
    total = sum(len(x) for x, _ in it.batches)
    H = [dense(it.model, lambda call, x=x, y=y: F.cross_entropy(call(x), y)).hessian * len(x) for x, y in it.batches]
    return torch.stack(H).sum(0) / total


def checked(it: Objective, k: int = 1, which: Any = "largest") -> CrossCheck:
    result = sharpness(it, k, which=which, tolerance=1e-6, seed=0, settings=QUICK)
    return check_against_pyhessian(it, result)


# ---- who agrees, who differs, and why ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [(24,), (10, 14)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_matrix_gives_the_same_number(batches: tuple[int, ...], dtype: torch.dtype):
    """An MLP whose largest eigenvalue in magnitude is positive; PyHessian stops at changes of 1e-3, which leaves a few times that."""
    check = checked(tanh(dtype, batches))
    assert check.confirmed
    assert check.relative_difference < 1e-2
    assert check.verdict != "differ: unexpected"
    assert check.package == "PyHessian 0.1"
    assert check.products >= 2
    assert check.seconds > 0.0
    assert not any("by rows" in sentence for sentence in check.expected)


def test_a_clear_gap_is_found_within_our_interval():
    """One eigenvalue far above the others: power iteration converges at once, and a loose interval of ours holds its value."""
    it = convex(mean=3.0)
    (x, y), *_ = it.batches
    result = sharpness(it, 1, tolerance=0.05, seed=0, settings=QUICK)
    pairs = replace(result.eigenpairs, residuals=result.eigenpairs.residuals + 0.01 * result.value)
    check = check_against_pyhessian(it, replace(result, eigenpairs=pairs))
    truth = spectrum(it.model, lambda call: F.mse_loss(call(x), y))[0].item()
    assert check.theirs[0] == pytest.approx(truth, rel=1e-2)
    assert check.verdict == "agree within our interval"
    assert ": agree within our interval. " in str(check)


def test_its_stopping_rule_is_what_differs():
    """Five close eigenvalues of a convex function: its search ends early, and its product shows that ours are right."""
    check = checked(convex(), 5)
    assert check.theirs[0] < check.intervals[0][0]
    assert check.verdict.startswith("differ, as expected because it stops when two successive values differ by less")
    assert check.confirmed
    assert "confirms our eigenvectors: largest residual" in check.confirmation
    assert (len(check.theirs), list(check.theirs)) == (5, sorted(check.theirs, reverse=True))


@pytest.mark.parametrize("quantity", ["eigenvalue", "trace"])
def test_its_weighting_is_what_differs(quantity: str):
    """Dense matrices of both means: each library is right about its own."""
    it = padded()
    x, y = (torch.cat(parts) for parts in zip(*it.batches, strict=True))
    ours, theirs = dense(it.model, lambda call: F.cross_entropy(call(x), y)).hessian, by_rows(it)
    assert relative(theirs, ours) > 0.1
    if quantity == "trace":
        result = trace(it, seed=0)
        check = check_against_pyhessian(it, result)
        assert result.value == pytest.approx(ours.trace().item(), rel=1e-10)
        # 5 standard errors of its own probes
        assert abs(check.theirs[0] - theirs.trace().item()) < 5 * (check.stderr or 0.0)
        assert "Weighted as here, its" in check.confirmation
    else:
        check = checked(it)
        assert check.ours[0] == pytest.approx(torch.linalg.eigvalsh(ours)[-1].item(), rel=1e-6)
        assert check.theirs[0] == pytest.approx(torch.linalg.eigvalsh(theirs)[-1].item(), rel=1e-2)
    assert check.confirmed
    said = "it averages the means of the batches by rows, not over loss terms: batch 1 counts for 0.333 there and for 0.0714 here"
    assert said in check.expected
    assert check.verdict.startswith(f"differ, as expected because {said}")


def test_uneven_batches_alone_are_weighted_alike():
    """Release 0.1 weights by rows, which for a mean over rows is the mean over all terms."""
    it = tanh(batches=(1, 9, 14))
    assert not weighting(it).differs
    assert checked(it).theirs[0] == pytest.approx(checked(tanh()).theirs[0], rel=1e-6)  # the same draws


def indefinite() -> Objective:
    """A quadratic with eigenvalues 1 and -3."""

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.3, 0.2], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (0.5 * x * self.w.square()).sum(1)

    x = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    return Objective(Quadratic().eval(), lambda outputs, targets: outputs.mean(), [(x, torch.zeros(1))])


def test_an_indefinite_hessian():
    """diag(1, -3): the largest algebraic value is 1, the one of largest magnitude -3."""
    check = checked(indefinite())
    assert check.ours[0] == pytest.approx(1.0, abs=1e-6)
    assert check.theirs[0] == pytest.approx(-3.0, rel=1e-2)
    assert check.verdict == (
        "differ, as expected because it searches for the largest magnitude, not the largest algebraic value; on an indefinite Hessian "
        "compare with 'magnitude'"
    )
    same = checked(indefinite(), which="magnitude")
    assert same.relative_difference < 1e-2
    assert same.verdict != "differ: unexpected"
    assert not any("algebraic" in sentence for sentence in same.expected)


def test_a_number_of_ours_that_is_wrong_is_unexpected():
    """Its product does not confirm an eigenvector that is none, and its value above ours is no matter of stopping."""
    it = convex(mean=3.0)
    result = sharpness(it, 1, tolerance=1e-6, seed=0, settings=QUICK)
    pairs = result.eigenpairs
    assert pairs.vectors is not None
    other = check_against_pyhessian(it, replace(result, eigenpairs=replace(pairs, vectors=pairs.vectors.roll(1, 0))))
    assert not other.confirmed
    assert "does not confirm our eigenvectors" in other.confirmation
    three = sharpness(it, 3, tolerance=1e-6, seed=0, settings=QUICK).eigenpairs
    assert three.vectors is not None
    # as if the largest, a pair, had been missed
    missed = replace(pairs, values=three.values[2:], vectors=three.vectors[:, 2:], residuals=three.residuals[2:])
    check = check_against_pyhessian(it, replace(result, eigenpairs=missed))
    assert check.confirmed
    assert check.verdict == "differ: unexpected"
    wrong = trace(it, seed=0)
    estimate = replace(wrong.estimate, value=1000.0, low=1000.0, high=1000.0)
    check = check_against_pyhessian(it, replace(wrong, estimate=estimate))
    assert check.verdict == "differ: unexpected"
    assert check.confirmation == "By the spread of its probes the two numbers cannot be of one matrix"


def test_a_trace_differs_by_the_spread_of_its_probes():
    it = tanh()
    check = check_against_pyhessian(it, trace(it, seed=0))
    assert check.stderr is not None
    assert check.stderr > 0.0
    assert check.verdict.startswith(
        f"differ, as expected because its {check.products} probes leave a standard error of"
    )
    assert check.confirmed
    told = check.to_dict()
    assert told["verdict"] == check.verdict
    assert told["theirs"] == list(check.theirs)


def test_a_zero_beside_a_number():
    check = checked(convex())
    assert replace(check, ours=(0.0,)).relative_difference == float("inf")
    assert replace(check, ours=(0.0,), theirs=(0.0,)).relative_difference == 0.0


def test_frozen_parameters_pairs_and_modules_are_taken():
    """It leaves out what requires no gradient, and a loss (sum, count) is given to it as a mean."""
    model = net().double().eval()
    model.inner.requires_grad_(False)
    x, y = examples(torch.float64)

    def pair(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        return F.cross_entropy(outputs, targets, reduction="sum"), len(targets)

    it = Objective(model, pair, cut((10, 14), x, y))
    check = checked(it)
    assert check.confirmed
    truth = spectrum(model, lambda call: F.cross_entropy(call(x), y))[0].item()
    assert check.theirs[0] == pytest.approx(truth, rel=1e-2)


def test_each_product_is_told():
    it, seen = tanh(batches=(10, 14)), list[int]()
    result = sharpness(it, 2, seed=0, settings=QUICK)
    check = check_against_pyhessian(it, result, on_product=seen.append)
    assert seen == list(range(1, check.products + 1))


# ---- nothing is disturbed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [(24,), (10, 14)])
def test_nothing_is_disturbed(batches: tuple[int, ...]):
    class Attention(Net):
        """On PyHessian's own account fused attention would fail."""

        def forward(self, x: Tensor) -> Tensor:
            h = x[:, None]  # over each row by itself: attention over the batch would couple its rows
            return super().forward(F.scaled_dot_product_attention(h, h, h).squeeze(1))

    with seeded():
        model = Attention().eval()
    fill_gradients(model)
    data = [(x.requires_grad_(), y) for x, y in cut(batches, *(part.clone() for part in examples()))]
    it = Objective(model, nn.CrossEntropyLoss(), data)
    result, modules = sharpness(it, seed=0, settings=QUICK), set(sys.modules)
    before = surroundings(model)
    check = check_against_pyhessian(it, result)
    assert check.confirmed
    assert surroundings(model) == before
    assert all(x.grad is None for x, _ in data)
    with pytest.raises(KeyboardInterrupt):
        check_against_pyhessian(it, result, on_product=raising(KeyboardInterrupt()))
    assert surroundings(model) == before
    assert {name.partition(".")[0] for name in set(sys.modules) - modules} <= {"pyhessian"}


def raising(error: BaseException) -> Callable[[int], None]:
    def told(count: int) -> None:
        raise error

    return told


def test_the_seed_decides():
    it = tanh()
    result = sharpness(it, seed=0, settings=QUICK)
    first, second, other = (check_against_pyhessian(it, result, seed=seed) for seed in (1, 1, 2))
    assert first.theirs == second.theirs != other.theirs


# ---- refusals ---------------------------------------------------------------------------------------------------------


class Spare(Net):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


def of(model: nn.Module, loss: Any = F.cross_entropy, batches: tuple[int, ...] = (24,), **more: Any) -> Objective:
    return Objective(model, loss, cut(batches, *examples()), **more)


def dicts() -> Objective:
    x, y = examples()
    return Objective(net().eval(), F.cross_entropy, [{"x": x, "y": y}])


def triples() -> Objective:
    x, y = examples()
    return Objective(net().eval(), F.cross_entropy, [(x, x, y)])


def ignored() -> Objective:
    x, y = examples()
    return Objective(net().eval(), F.cross_entropy, [(x[:9], y[:9]), (x[9:], torch.full((15,), -100))])


def scoped() -> Objective:
    model = net().eval()

    def decayed(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + sum(p.square().sum() for p in model.parameters())

    return of(model, decayed)


def batch_loss() -> Objective:
    def whole(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return of(net().eval(), BatchLoss(whole))


REFUSED: dict[str, tuple[Callable[[], Objective], type[CurvkitError], str]] = {
    "batch loss": (
        batch_loss,
        UnknownObjective,
        r"calls loss\(model\(inputs\), targets\), but whole is a BatchLoss.*or leave out the cross-check\.$",
    ),
    "dicts": (
        dicts,
        UnknownObjective,
        r"batches \(inputs, targets\) of two tensors, but batch 0 is a dict\. Give such",
    ),
    "triples": (triples, UnknownObjective, r"of two tensors, but batch 0 is a tuple of 3\. Give such batches"),
    "patterns": (
        lambda: of(net().eval(), parameters="outer.*"),
        InvalidArgument,
        r"measures all parameters that require a gradient, but inner\.weight and 1 more were left out by patterns\. Freeze them",
    ),
    "mode": (
        lambda: of(net().train()),
        UnsupportedModel,
        r"switches the model to eval mode, but this one is measured in train mode\. Call model\.eval\(\)",
    ),
    "half": (
        lambda: of(net().eval().half()),
        UnsupportedModel,
        r"precision of the weights \(float16\), curvkit raises it to one of at least float32\. Convert first",
    ),
    "sum": (
        lambda: of(net().eval(), nn.CrossEntropyLoss(reduction="sum"), (10, 14)),
        UnsupportedModel,
        r"cross_entropy is a sum over 2 batches, of which PyHessian takes a mean\. Use reduction='mean'",
    ),
    "unused": (
        lambda: of(Spare().eval()),
        UnsupportedModel,
        r"the loss of batch 0 does not depend on spare\.weight and 1 more, and PyHessian stops with an error.*Freeze it",
    ),
    "ignored": (ignored, UnsupportedModel, r"batch 1 has no loss term.*its mean, which is NaN\. Leave that batch out"),
    "scope": (
        scoped,
        UnknownObjective,
        r"PyHessian runs on a copy of the model\..*uses the parameter .* of the model from an outer scope.*BatchLoss",
    ),
    "device": (
        lambda: Objective(net().eval().to("meta"), F.cross_entropy, [tuple(part.to("meta") for part in examples())]),
        UnsupportedModel,
        r"knows the devices cpu and cuda, the model is on meta\. Move the objective",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str):
    make, kind, text = REFUSED[name]
    with seeded():
        it = make()
    with pytest.raises(kind, match=f"(?s)^cross-check: .*{text}"):
        refuse_uncheckable(it)


@pytest.mark.parametrize("which", ["smallest", "both"])
def test_other_ends_are_refused(which: str):
    with pytest.raises(InvalidArgument, match=f"which='{which}' cannot be compared.*Use 'magnitude' or 'largest'"):
        refuse_uncheckable(tanh(), which)


def test_a_partial_result_is_refused():
    it = tanh()
    partial = next(sharpness_steps(it, seed=0))
    with pytest.raises(InvalidArgument, match=r"the result is partial \(stage='searching'\)\. Pass the last one"):
        check_against_pyhessian(it, partial)


def test_a_failure_of_pyhessian_is_its_own():
    """The gradient with respect to the last bias is constant, which PyHessian cannot differentiate."""
    it = Objective(net().eval(), lambda outputs, targets: outputs.mean(), [examples()])
    result = sharpness(it, seed=0, settings=QUICK)
    with pytest.raises(
        CurvkitError, match=r"PyHessian failed with RuntimeError: .*The result itself does not depend on"
    ):
        check_against_pyhessian(it, result)


def test_a_number_that_is_none(monkeypatch: pytest.MonkeyPatch):
    it = tanh()
    result = sharpness(it, seed=0, settings=QUICK)
    module = sys.modules["pyhessian.hessian"]
    monkeypatch.setattr(module.hessian, "eigenvalues", lambda *a, **b: ([float("nan")], []))
    with pytest.raises(CurvkitError, match="PyHessian gave a number that is not finite"):
        check_against_pyhessian(it, result)


def test_the_package_is_missing(monkeypatch: pytest.MonkeyPatch):
    for name in ("pyhessian", "pyhessian.hessian"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        MissingExtra, match=r"pyhessian is not installed. Install it with: pip install 'curvkit\[pyhessian\]'"
    ):
        refuse_uncheckable(tanh())


# ---- the command ------------------------------------------------------------------------------------------------------

CHECK = ("ckpt.pt", "--objective", "train.py:objective", "--seed", "0", "--cross-check", "pyhessian")
Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run the command in a folder with train.py and a checkpoint: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    Path("train.py").write_text(TRAIN)
    torch.save(net().state_dict(), "ckpt.pt")

    def call(*arguments: str) -> tuple[int, str, str]:
        sys.modules.pop("train", None)
        with seeded():
            code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.parametrize("command", ["sharpness", pytest.param("trace", marks=pytest.mark.slow)])
def test_the_command_shows_both(typed: Typed, command: str):
    code, out, err = typed(command, *CHECK, "--format", "table")
    assert code == 0
    assert "cross-check PyHessian 0.1 gives" in out
    assert "cross-check: PyHessian measures the same, on a copy of the model" in err
    code, out, err = typed(command, *CHECK, "--plain", "-q")
    assert (code, err) == (0, "")
    line = dict(line.split("\t", 1) for line in out.splitlines())["cross-check"]
    assert line.startswith("PyHessian 0.1 gives ")
    assert "unexpected" not in line
    code, out, _ = typed(command, *CHECK, "--json", "-o", "out", "-q")
    document = json.loads(out)
    check = document["result"]["cross_check"]
    assert check["confirmed"] is True
    assert document["record"]["cross_check"] == {
        "package": "PyHessian 0.1",
        "seed": 0,
        "products": check["products"],
    }
    assert json.loads(Path(f"out/{command}.json").read_text()) == document
    assert json.loads(typed(command, *CHECK[:-2], "--json", "-q")[1])["result"]["cross_check"] is None


@pytest.mark.parametrize("command", ["sharpness", "trace"])
def test_a_missing_package_is_said_before_the_work(typed: Typed, command: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("pyhessian", "pyhessian.hessian"):
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = typed(command, *CHECK)
    assert (code, out) == (1, "")
    assert err.endswith(
        "Error: the package pyhessian is not installed. Install it with: pip install 'curvkit[pyhessian]'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--which", "smallest"), 2, "Error: --which smallest cannot be compared"),
        (("--params", "outer.*"), 2, "were left out by --params. Freeze them"),
        (("--mode", "train"), 1, "measured in train mode. Use --mode eval, the default, or leave out --cross-check."),
        (("--objective", "half.py:objective"), 1, "Use --dtype float32, or leave out --cross-check."),
    ],
)
def test_the_command_refuses_in_its_own_words(typed: Typed, arguments: tuple[str, ...], code: int, text: str):
    Path("half.py").write_text(
        "import train\ndef objective():\n    it = train.objective()\n    it.model.half()\n    return it\n"
    )
    got, out, err = typed("sharpness", *CHECK, *arguments)
    assert (got, out) == (code, "")
    assert text in err


def test_ctrl_c_during_the_check_keeps_our_result(typed: Typed, monkeypatch: pytest.MonkeyPatch):
    from curvkit_cli import cross_checking, progress

    update = progress.ProgressLine.update

    def interrupting(self: Any, share: float, detail: str) -> None:
        if self._title == "PyHessian":
            raise KeyboardInterrupt
        update(self, share, detail)

    monkeypatch.setattr(progress.ProgressLine, "update", interrupting)
    code, out, err = typed("sharpness", *CHECK, "--json", "-o", "out")
    assert code == 130
    ended = "Interrupted. What was computed is kept. To go on: curvkit sharpness ckpt.pt "
    assert err.splitlines()[-1].startswith(ended)
    assert err.endswith(" -o out --resume\n")
    found = json.loads(out)["result"]
    assert (found["interrupted"], found["stage"], found["cross_check"]) == (True, "complete", None)
    assert found["eigenvalues"][0]["converged"]
    assert cross_checking.CUT in found["notes"]
    assert json.loads(Path("out/sharpness.json").read_text())["result"] == found


def test_a_failing_check_keeps_our_result(typed: Typed):
    Path("linear.py").write_text(
        "import train\ndef objective():\n    it = train.objective()\n"
        "    return train.curvkit.Objective(it.model, lambda out, y: out.mean(), it.batches[:1])\n"
    )
    code, out, err = typed("sharpness", *CHECK, "--objective", "linear.py:objective", "--plain")
    assert code == 1
    assert out.splitlines()[1].startswith("1\t")
    assert "Error: PyHessian failed with RuntimeError" in err
    assert err.endswith("leave out --cross-check.\n")
