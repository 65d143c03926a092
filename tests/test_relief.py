"""Memory that runs out: the same numbers with less at a time, nothing left behind, and a refusal that says what to do."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import classes, cut, normal, relative
from torch import Tensor, nn

from curvkit.errors import CurvkitError, ran_out_of_memory
from curvkit.linalg import lanczos
from curvkit.measures import SharpnessSettings, sharpness, trace
from curvkit.objectives import Objective
from curvkit.operators import GGN, DifferenceHessian, DoubleHessian, Hessian
from curvkit.operators import plan as planning
from curvkit.operators.graph import GradientGraph
from curvkit.operators.memory import megabytes
from curvkit.operators.plan import choose
from curvkit.operators.relief import finer

# float64 rounding, 2.2e-16, of sums of a few dozen terms in another order
EXACT = 1e-12

ERRORS: dict[str, Callable[[], Exception]] = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "CPU": lambda: RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."
    ),
    "Windows": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
    "host": MemoryError,
}


class Bounded(nn.Module):
    """A network that takes `most` rows at a time; with more, memory runs out."""

    def __init__(self, error: str = "CUDA") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inner, self.outer = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
        self.error, self.most = error, 1 << 30

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise ERRORS[self.error]()
        return self.outer(torch.tanh(self.inner(x)))


def objective(model: nn.Module, sizes: list[int] | None = None) -> Objective:
    return Objective(model, F.cross_entropy, cut(sizes or [16, 9], normal(25, 4), classes(25, num=3)))


class Token:
    """Lives as long as what holds it."""


def passes(model: nn.Module) -> list[weakref.ref[Token]]:
    """Weak references that live as long as the graphs of the forward passes from now on."""
    seen: list[weakref.ref[Token]] = []

    def mark(_model: nn.Module, _inputs: Any, output: Tensor) -> None:
        if output.grad_fn is not None:
            output.grad_fn.metadata["token"] = token = Token()
            seen.append(weakref.ref(token))

    model.register_forward_hook(mark)
    return seen


@pytest.mark.parametrize("residency", ["retained", "streamed"])
@pytest.mark.parametrize("kind", [Hessian, GGN, DifferenceHessian])
@pytest.mark.parametrize("error", ERRORS)
def test_products_go_on_in_smaller_parts(kind: type[Any], residency: Any, error: str):
    """Law: loss, gradient, products and quotients of batches are those of the undisturbed operator."""
    if kind is DifferenceHessian:
        residency = "auto"
    model = Bounded(error)
    whole = kind(objective(model), residency=residency)
    # differences divide the rounding of gradients by a step of 1e-5 / ||v||: 2e-16 / 1e-5, times sums of some dozen terms
    tolerance = 1e-9 if kind is DifferenceHessian else EXACT
    v, V = normal(whole.n), normal(whole.n, 3)
    truth, truths, quotients = whole.matvec(v), whole.matmat(V), whole.batch_quotients(v)
    model.most = 3
    made = kind(objective(model), residency=residency)
    assert made.loss == pytest.approx(whole.loss, rel=EXACT)
    assert relative(made.gradient, whole.gradient) <= EXACT
    assert relative(made.matvec(v), truth) <= tolerance
    assert relative(made.matmat(V), truths) <= tolerance
    assert made.batch_quotients(v)[0] == pytest.approx(quotients[0], rel=100 * tolerance)
    assert made.batch_quotients(v)[1] == quotients[1]
    assert (made.terms, made.plan.residency) == (25, "streamed")
    assert made.plan.micro_batches >= 6  # 16 rows in parts of 3 at most
    assert made.plan.reason == made.notes[-1]
    assert made.products == 6


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_relief_comes_step_by_step_and_says_so(kind: type[Any]):
    model = Bounded()
    made = kind(objective(model), residency="streamed")
    v, parts = normal(made.n), made.plan.micro_batches
    truth = made.matvec(v)
    assert made.notes == ()
    while parts < 16:
        model.most = -(-16 // parts) - 1
        assert relative(made.matvec(v), truth) <= EXACT
        before = f"{parts} parts per batch" if parts > 1 else "one whole batch at a time"
        parts *= 2
        assert made.notes[-1] == f"out of memory with {before}: went on with {parts} parts per batch"
        assert str(made.plan).endswith(f"in {parts} parts per batch ({made.notes[-1]})")


def test_a_retained_product_goes_on_streamed():
    """Memory that runs out in a product, not in the building of graphs; here there is enough for one batch at a time."""
    made = Hessian(objective(Bounded()), residency="retained")
    v = normal(made.n)
    truth = made.matvec(v)

    class Short(GradientGraph):
        @classmethod
        def product(cls, graphs: Any, pieces: Any, *, keep: bool) -> Any:
            if len(graphs) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return super().product(graphs, pieces, keep=keep)

    made.kind = Short  # type: ignore[misc]
    graph = weakref.ref(made._retained[0])  # type: ignore[index]
    assert relative(made.matvec(v), truth) <= EXACT
    assert made.notes == ("out of memory with the graphs of all batches: went on with one whole batch at a time",)
    assert (made.plan.residency, made.plan.micro_batches) == ("streamed", 1)
    assert graph() is None


@pytest.mark.parametrize("residency", ["retained", "streamed"])
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_nothing_is_left_of_what_was_let_go(kind: type[Any], residency: Any):
    """Weak references: after relief no graph of before lives, nor does one of a product that has ended; no exception does."""
    model = Bounded()
    seen = passes(model)
    made = kind(objective(model), residency=residency)
    v = normal(made.n)
    made.matvec(v)
    assert sum(ref() is not None for ref in seen) == (2 if residency == "retained" else 0)
    model.most = 3

    class Short(kind.kind):
        @classmethod
        def product(cls, graphs: Any, pieces: Any, *, keep: bool) -> Any:
            made = super().product(graphs, pieces, keep=keep)
            if keep:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return made

    made.kind = Short
    made.matvec(v)
    assert made.plan.micro_batches >= 6
    assert [ref for ref in seen if ref() is not None] == []
    assert [found for found in gc.get_objects() if type(found) is torch.OutOfMemoryError] == []


@pytest.mark.slow
@pytest.mark.parametrize("residency", ["auto", "retained", "streamed"])
def test_sharpness_from_end_to_end(residency: Any):
    """Law: in float64 the eigenvalue is the same to 1e-12, and the result says what happened."""
    model = Bounded()
    settings = SharpnessSettings(lanczos.Settings(tolerance=1e-9), residency=residency)
    whole = sharpness(objective(model), settings=settings, seed=0)
    model.most = 4
    found = sharpness(objective(model), settings=settings, seed=0)
    assert found.value == pytest.approx(whole.value, rel=EXACT)
    assert found.eigenpairs.all_converged
    assert found.halves is not None
    assert whole.halves is not None
    assert found.halves.lower == pytest.approx(
        whole.halves.lower, rel=1e-6
    )  # a search to a residual of 3e-2, squared in the value
    assert found.spread is not None
    assert whole.spread is not None
    assert found.spread.quotients == pytest.approx(
        whole.spread.quotients, rel=1e-8
    )  # along the eigenvector, which is known to 1e-9
    parts = found.plan.micro_batches
    assert parts >= 4
    assert found.plan.reason == f"out of memory with {parts // 2} parts per batch: went on with {parts} parts per batch"
    assert found.plan.reason in found.notes
    assert not any("out of memory" in note for note in whole.notes)


def test_memory_that_runs_out_late_is_noted():
    """In the product for the doubt from data, when the eigenvalues are known already."""
    model = Bounded()
    it, settings = objective(model), SharpnessSettings(residency="streamed", preflight=False)
    whole = sharpness(it, settings=settings, seed=0)

    def exhaust(_model: nn.Module, _inputs: Any) -> None:
        model.most = 15 if len(calls) >= whole.products // 2 else 1 << 30

    calls: list[int] = []
    model.register_forward_pre_hook(exhaust)
    model.register_forward_pre_hook(lambda _model, _inputs: calls.append(1))
    found = sharpness(it, settings=settings, seed=0)
    assert found.value == pytest.approx(whole.value, rel=EXACT)
    assert found.plan.micro_batches >= 2


def test_the_trace_goes_on():
    """Law, as for sharpness: 43 parameters are done exactly."""
    model = Bounded()
    whole = trace(objective(model), seed=0)
    model.most = 4
    found = trace(objective(model), seed=0)
    assert found.value == pytest.approx(whole.value, rel=EXACT)
    assert any(note.startswith("out of memory with 2 parts per batch") for note in found.notes)


def test_residuals_in_float64_go_on():
    model = Bounded().float()
    x, y = normal(25, 4, dtype=torch.float32), classes(25, num=3)
    made = Hessian(Objective(model, F.cross_entropy, cut([16, 9], x, y)), residency="streamed")
    bounded: Any = made.objective.model
    v = normal(made.n)
    double = DoubleHessian(made)
    truth = double.matvec(v)
    bounded_copy: Any = double._double.model
    bounded_copy.most = 3
    assert relative(double.matvec(v), truth) <= EXACT
    bounded.most = 3
    fresh = DoubleHessian(made)
    assert relative(fresh.matvec(v), truth) <= EXACT


def test_single_rows_that_do_not_fit_are_refused():
    model = Bounded("CPU")
    made = Hessian(objective(model), residency="streamed")
    model.most = 0
    with pytest.raises(
        CurvkitError,
        match=r"Hessian: out of memory with [0-9]+ parts per batch, and a part is one row already \(\[enforce fail\] DefaultCPUAllocator: "
        r"can't allocate memory: you tried to allocate 99 bytes\.\)\. The graph of a part needs about [0-9.]+ MiB, [0-9,]+ MiB are free "
        r"on cpu\. To go on, shorten the rows, leave parameters out by patterns, use float32, or a device with more memory\.",
    ):
        made.matvec(normal(made.n))


def test_batches_that_must_not_be_cut_are_refused():
    """The terms of a loss of the user's own are not known by row."""
    model = Bounded()
    data = objective(model).batches

    def loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        return F.cross_entropy(outputs, targets, reduction="sum"), len(targets)

    made = GGN(Objective(model, loss, data), residency="streamed")
    model.most = 10
    with pytest.raises(
        CurvkitError,
        match="GGN: out of memory with one whole batch at a time, and batches cannot be cut: the loss is not known to be a sum over "
        "independent rows .CUDA out of memory. .* To go on, give the data in smaller batches, leave parameters out",
    ):
        made.matvec(normal(made.n))


def test_rows_that_are_coupled_are_not_cut_for_lack_of_memory():
    """A mean over rows before the loss: what the whole batch shows no longer, halves that fit show."""

    class Centred(Bounded):
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            return z - z.mean(0)

    model = Centred()
    assert finer(1, objective(model), kind=GradientGraph) == 1
    model.most = 4
    assert finer(1, objective(model), kind=GradientGraph) == 1
    model = Bounded()
    model.most = 4
    assert finer(1, objective(model), kind=GradientGraph) == 2
    assert finer(2, objective(model), kind=GradientGraph) == 4
    assert finer(16, objective(model), kind=GradientGraph) == 16
    model.most = 2
    assert finer(1, objective(model), kind=GradientGraph) == 2
    model.most = 1  # not even two rows can be compared
    assert finer(1, objective(model), kind=GradientGraph) == 1


def test_a_plan_that_cannot_be_made_is_refused():
    model = Bounded()
    model.most = 0
    with pytest.raises(
        CurvkitError,
        match="Hessian: out of memory with the graph of the first batch, which cannot be cut, .OutOfMemoryError: CUDA",
    ):
        choose(objective(model))

    class Full(GradientGraph):
        @classmethod
        def build(cls, objective: Objective, index: int, *, number: int | None = None) -> Any:
            if armed:
                raise MemoryError
            return super().build(objective, index, number=number)

    armed: list[int] = []

    def arm(*_: Any, **__: Any) -> Any:
        armed.append(1)
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "rows_are_independent", arm)
        with pytest.raises(
            CurvkitError,
            match="out of memory with the graph of one row .MemoryError: .. Give the data in smaller batches",
        ):
            choose(objective(Bounded()), kind=Full)


def test_vectors_that_do_not_fit_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "free_memory", lambda device: 1000)
    with pytest.raises(
        CurvkitError,
        match="Hessian: a product holds 3 vectors of 43 parameters, 1,032 bytes, but only 1,000 bytes are free on cpu. Leave parameters",
    ):
        Hessian(objective(Bounded()))


def test_other_errors_pass():
    """Also those that speak of memory but are curvkit's own."""
    model = Bounded()
    made = Hessian(objective(model), residency="streamed")
    ERRORS["else"] = lambda: RuntimeError("shapes do not fit")
    model.error, model.most = "else", 3
    try:
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            made.matvec(normal(made.n))
    finally:
        del ERRORS["else"]
    assert made.notes == ()
    assert not ran_out_of_memory(CurvkitError("out of memory"))
    assert not ran_out_of_memory(KeyError("out of memory"))
    assert [megabytes(10), megabytes(5 << 20)] == ["0.00 MiB", "5 MiB"]


# ---- memory that is really full -------------------------------------------------------------------------------------

LIMITED = """
import resource, torch, torch.nn.functional as F
from curvkit.objectives import Objective
from curvkit.operators import GGN, Hessian
from curvkit.models import MLP

torch.manual_seed(0)
model = MLP([32, 256, 256, 10], "tanh").double()
it = Objective(model, F.cross_entropy, [(torch.randn(16384, 32).double(), torch.randint(10, (16384,)))])
v = torch.randn(sum(p.numel() for p in model.parameters())).double()
few = it.with_batches([tuple(t[:64] for t in it.batches[0])])
for kind in (Hessian, GGN):
    kind(few).matvec(v)  # libraries are loaded and threads are started
truths = [kind(it, residency="retained").matvec(v) for kind in (Hessian, GGN)]
with open("/proc/self/statm") as pages:
    used = int(pages.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), resource.RLIM_INFINITY))
for kind, truth in zip((Hessian, GGN), truths):
    made = kind(it, residency="retained", budget_bytes=1 << 40)
    found = made.matvec(v)
    print(made.plan.residency, made.plan.micro_batches, ((found - truth).norm() / truth.norm()).item(), made.notes[-1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the address space can be limited on Linux")
def test_an_address_space_that_is_full():
    """Law, with the allocator's own refusal: 16384 rows of a retained graph take about 400 MiB, 150 are there."""
    environment = {
        **os.environ,
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        residency, parts, error, notes = line.split(maxsplit=3)
        assert (residency, "out of memory with" in notes) == ("streamed", True), line
        assert int(parts) >= 2, line
        assert float(error) <= EXACT
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_a_device_whose_memory_is_full(kind: type[Any]):
    """Law, with CUDA's own refusal: other tensors hold the device's memory but for 256 MiB."""
    device = torch.device("cuda")
    x, y = normal(65536, 32).to(device), classes(65536, num=10).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (
            nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))
            .double()
            .to(device)
        )
    it = Objective(model, F.cross_entropy, [(x, y)])
    whole = kind(it, residency="retained")
    v = normal(whole.n).to(device)
    truth = whole.matvec(v)
    del whole
    gc.collect()
    torch.cuda.empty_cache()
    ballast = torch.empty(torch.cuda.mem_get_info()[0] - (256 << 20), dtype=torch.uint8, device=device)
    try:
        made = kind(it, residency="retained")
        assert relative(made.matvec(v), truth) <= EXACT
        assert made.plan.residency == "streamed"
        assert made.plan.micro_batches >= 2
        assert made.notes
    finally:
        del ballast
        torch.cuda.empty_cache()
