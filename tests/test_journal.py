"""What a run remembers: products under the bits of their vectors, in files of which a half-written one never counts."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optimizer_samples import state_of, warmed
from oracles import classes, normal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import environment, net
from torch import Tensor

from curvkit import Objective
from curvkit.errors import CurvkitError, InvalidArgument, RefusedCheckpoint
from curvkit.linalg import DenseMap, lanczos
from curvkit.linalg import trace as linalg_trace
from curvkit.linalg.recorded import Recorded, digest, recorded
from curvkit.measures import Companions, SharpnessSettings, TraceSettings, sharpness_steps, trace_steps
from curvkit.results import Journal, StateFolder
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate
from curvkit.results.files import replaced
from curvkit.results.journal import NOTHING_KEPT, Kept
from curvkit.results.manifest import differences

RUN = {"measurement": "test", "settings": {"tolerance": 1e-3}}


class Memory:
    """A journal in a dict, which can be told to stop the run at a certain result."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.kept: dict[str, Kept] = {}
        self.facts: dict[str, Any] = {}
        self.earlier: dict[str, Kept] = {}
        self.made, self.recalls, self.ahead, self.stop_at = 0, 0, 0.0, stop_at

    def again(self, stop_at: int | None = None) -> Memory:
        """What a later run finds."""
        later = Memory(stop_at)
        later.earlier, later.facts = {**self.earlier, **self.kept}, dict(self.facts)
        return later

    def recalled(self, key: str) -> Kept | None:
        found = self.earlier.get(key)
        if found is not None:
            self.recalls += 1
            self.ahead += found.seconds
        return found

    def keep(self, key: str, kept: Kept) -> None:
        if self.made == self.stop_at:
            raise KeyboardInterrupt
        self.kept[key] = kept
        self.made += 1

    def fact(self, name: str) -> Any:
        return self.facts.get(name)

    def decide(self, name: str, value: Any) -> None:
        self.facts[name] = json.loads(json.dumps(value))

    def clock(self) -> float:
        return self.ahead


class Counted:
    """A dense map that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.inner = DenseMap(matrix)
        self.n, self.dtype, self.device = self.inner.n, self.inner.dtype, self.inner.device
        self.products = 0

    def matvec(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.inner.matvec(v)

    def matmat(self, V: Tensor) -> Tensor:
        self.products += V.shape[1]
        return self.inner.matmat(V)


def symmetric(n: int) -> Tensor:
    A = normal(n, n, seed=3).float()
    return A + A.T + torch.diag(torch.arange(float(n)))


def objective(hidden: int = 6, batches: int = 2, linear: bool = False) -> Objective:
    model = torch.nn.Sequential(torch.nn.Linear(4, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 3))
    model = model if linear else net(hidden)
    if linear:
        with torch.no_grad():
            for number, p in enumerate(model.parameters()):
                p.copy_(normal(*p.shape, seed=number).float() / 2)
    x, y = normal(24, 4, seed=1).float(), classes(24, num=3, seed=2)
    data = [(x, y)] if batches == 1 else [(x[:10], y[:10]), (x[10:], y[10:])]
    return Objective(model, F.cross_entropy, data)


def bits(result: Any) -> str:
    """Everything that a result says but its time, and the bits of its vectors and samples."""
    told = without_time(result.to_dict())
    tensors = [tensor for tensor in (vectors(result), samples(result)) if tensor is not None]
    told["tensors"] = [digest([tensor.contiguous()]) for tensor in tensors]
    told["plan"] = repr(replace(result.plan, reason="", budget_bytes=0, basis_rows=0))  # of the memory that is free
    return json.dumps(told, sort_keys=True)


def without_time(told: Any) -> Any:
    """Also within the parts."""
    if isinstance(told, dict):
        return {name: without_time(value) for name, value in told.items() if name != "seconds"}
    return told


def vectors(result: Any) -> Tensor | None:
    return result.eigenpairs.vectors if hasattr(result, "eigenpairs") else None


def samples(result: Any) -> Tensor | None:
    parts = result.estimate.parts if hasattr(result, "estimate") else None
    return None if parts is None else torch.cat([parts.known[None], parts.samples])


def last(steps: Iterator[Any]) -> Any:
    *_, result = steps
    return result


# ---- products under the bits of their vectors -----------------------------------------------------------------------


def test_a_recorded_map_multiplies_once_for_the_same_bits():
    A, journal = Counted(symmetric(5)), Memory()
    v = normal(5, seed=0).float()
    first = Recorded(A, journal, "a").matvec(v)
    assert torch.equal(first, symmetric(5) @ v)
    again = Recorded(A, journal.again(), "a")
    assert torch.equal(again.matvec(v.clone()), first)
    assert A.products == 1
    again.matvec(torch.nextafter(v, torch.full_like(v, 9.0)))
    Recorded(A, journal.again(), "b").matvec(v)
    again.matmat(v[:, None])
    assert A.products == 4


@pytest.mark.parametrize("turned", [False, True])
def test_the_layout_of_a_product_is_that_of_the_first_time(turned: bool):
    """A sum over a strided vector can round in another way."""

    class Turned(Counted):
        def matmat(self, V: Tensor) -> Tensor:
            Y = super().matmat(V)
            return Y.T.contiguous().T if turned else Y

    A, journal, V = Turned(symmetric(5)), Memory(), normal(5, 3, seed=0).float()
    first = Recorded(A, journal, "a").matmat(V)
    second = Recorded(A, journal.again(), "a").matmat(V)
    assert torch.equal(first, second)
    assert first.stride() == second.stride() == ((1, 5) if turned else (3, 1))
    assert A.products == 3


def test_what_is_recalled_cannot_be_changed_by_who_got_it():
    A, journal, v = Counted(symmetric(4)), Memory(), torch.ones(4)
    Recorded(A, journal, "a").matvec(v).zero_()
    later = journal.again()
    Recorded(A, later, "a").matvec(v).zero_()
    assert torch.equal(Recorded(A, later, "a").matvec(v), symmetric(4) @ v)


def test_a_recorded_map_says_what_its_map_says():
    class Erring(Counted):
        arithmetic = "by hand"

        @property
        def product_error(self) -> float:
            return 0.1 * self.products

    A, journal = Erring(symmetric(4)), Memory()
    recording = Recorded(A, journal, "a")
    recording.matvec(torch.ones(4))
    recording.matvec(torch.zeros(4))
    assert (recording.arithmetic, recording.product_error) == ("by hand", 0.2)
    again = Recorded(Erring(symmetric(4)), journal.again(), "a")
    assert again.product_error == 0.0
    again.matvec(torch.zeros(4))
    assert again.product_error == 0.2  # of the run in which it was made
    assert not hasattr(Recorded(Counted(symmetric(4)), journal, "a"), "product_error")


def test_nothing_is_recorded_without_a_journal():
    A = Counted(symmetric(3))
    assert recorded(A, NOTHING_KEPT, "a") is A
    NOTHING_KEPT.keep("a", Kept(torch.ones(1)))
    NOTHING_KEPT.decide("seed", 1)
    assert (NOTHING_KEPT.recalled("a"), NOTHING_KEPT.fact("seed")) == (None, None)


def test_a_probe_of_a_trace_costs_bytes_and_not_a_vector():
    A, journal = Counted(symmetric(200)), Memory()
    found = linalg_trace.estimate(
        Recorded(A, journal, "a"), seed=0, method="hutchinson", max_products=40, tolerance=1e-6
    )
    assert found.probes == 40
    sizes = sorted(kept.tensor.numel() for kept in journal.kept.values())
    assert sizes == [1] * 37 + [200] * 3  # the products of three probes are compared with one another


@pytest.mark.parametrize("method", ["exact", "hutchinson", "deflated", "hutch++", "xtrace", "auto"])
def test_a_trace_with_gaps_in_its_memory_is_the_same(method: Any):
    def run(journal: Journal) -> tuple[Any, int]:
        A = Counted(symmetric(70))
        map_ = recorded(A, journal, "a")
        settings = linalg_trace.Settings(method=method, tolerance=1e-6, rank=5, max_products=75)
        *_, found = linalg_trace.search(map_, settings, lengths=[30, 40], seed=1, start=torch.ones(70))
        return found, A.products

    whole, products = run(NOTHING_KEPT)
    journal = Memory()
    assert repr(run(journal)[0]) == repr(whole)
    again, none = run(journal.again())
    assert (repr(again), none) == (repr(whole), 0)
    gaps = journal.again()
    for key in sorted(gaps.earlier)[::2]:
        del gaps.earlier[key]
    patched, some = run(gaps)
    assert repr(patched) == repr(whole)
    assert 0 < some < products


def test_time_that_earlier_runs_took_counts():
    """Ten products of a minute each; a limit of five minutes is over after five of them, also when they are recalled."""
    journal = Memory()
    settings = lanczos.Settings(tolerance=1e-6, max_seconds=300.0)
    *_, whole = lanczos.search(
        Recorded(Counted(symmetric(60)), journal, "a"), replace(settings, max_seconds=None), seed=0
    )
    later = journal.again()
    later.earlier = {key: replace(kept, seconds=60.0) for key, kept in later.earlier.items()}
    *_, cut = lanczos.search(Recorded(Counted(symmetric(60)), later, "a"), settings, seed=0)
    assert (cut.products, whole.products > 20) == (7, True)  # five, the one that is late, and the certificate's


# ---- measurements, stopped at every result and gone on with ---------------------------------------------------------


def beside(journal: Any) -> Iterator[Any]:
    """Sharpness, and then adaptive sharpness and the limit of Adam."""
    it, settings = objective(), SharpnessSettings(lanczos.Settings(max_products=8), data_doubt=False, preflight=False)
    model = copy.deepcopy(it.model)
    wanted = Companions(state_of(model, warmed(torch.optim.Adam, model, 3)), adaptive=True)
    result: Any = None
    for result in sharpness_steps(it, settings, seed=5, journal=journal):
        yield result
    yield from wanted.steps(it, result, settings, journal=journal)


KINDS: dict[str, Any] = {
    "sharpness with what stands beside it": beside,
    "sharpness": lambda journal: sharpness_steps(
        objective(),
        SharpnessSettings(lanczos.Settings(num=2, max_products=12), preflight=False),
        seed=5,
        journal=journal,
    ),
    "sharpness on one batch, blocks": lambda journal: sharpness_steps(
        objective(batches=1),
        SharpnessSettings(
            lanczos.Settings(num=2, block_size=2, max_products=12), rounding="perturbation", preflight=False
        ),
        seed=5,
        journal=journal,
    ),
    "sharpness by differences": lambda journal: sharpness_steps(
        objective(),
        SharpnessSettings(lanczos.Settings(max_products=6), rule="difference", data_doubt=False),
        seed=5,
        journal=journal,
    ),
    "bfloat16": lambda journal: sharpness_steps(
        objective(),
        SharpnessSettings(
            lanczos.Settings(max_products=6, tolerance=0.1), arithmetic="bfloat16", data_doubt=False, preflight=False
        ),
        seed=5,
        journal=journal,
    ),
    "trace by structure": lambda journal: trace_steps(objective(40, linear=True), seed=5, journal=journal),
    "exact trace": lambda journal: trace_steps(objective(), seed=5, journal=journal),
    **{
        f"trace, {method}": lambda journal, method=method: trace_steps(
            objective(20),
            TraceSettings(
                linalg_trace.Settings(method, tolerance=1e-6, rank=4, max_products=45),
                residency="streamed",
                preflight=False,
            ),
            seed=5,
            journal=journal,
        )
        for method in ("auto", "hutchinson", "deflated", "hutch++", "xtrace")
    },
}


def stopped_at(steps: Any, stop: int) -> Memory:
    cut = Memory(stop_at=stop)
    with pytest.raises(KeyboardInterrupt):
        last(steps(cut))
    return cut.again()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_stops_and_goes_on_has_the_same_bits(kind: str):
    steps, journal = KINDS[kind], Memory()
    whole = last(steps(NOTHING_KEPT))
    assert bits(last(steps(journal))) == bits(whole)
    assert getattr(whole, "by_structure", False) is (kind == "trace by structure")
    total = journal.made
    assert total >= 1
    for stop in sorted({0, total // 2, total - 1}):
        later = stopped_at(steps, stop)
        assert bits(last(steps(later))) == bits(whole), stop
        assert (later.recalls, later.made) == (stop, total - stop)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_may_stop_at_every_single_result(kind: str):
    steps, journal = KINDS[kind], Memory()
    whole = bits(last(steps(journal)))
    for stop in range(journal.made):
        assert bits(last(steps(stopped_at(steps, stop)))) == whole, stop


def test_a_chain_of_runs_that_each_make_three_results():
    steps, journal, runs = KINDS["sharpness"], Memory(stop_at=3), 0
    whole = bits(last(steps(NOTHING_KEPT)))
    while True:
        try:
            found = last(steps(journal))
            break
        except KeyboardInterrupt:
            journal, runs = journal.again(stop_at=3), runs + 1
    assert bits(found) == whole
    assert runs > 5


def test_plans_and_sizes_are_those_of_the_first_run(monkeypatch: pytest.MonkeyPatch):
    """On a machine with less free memory products would be streamed, and the basis be restarted: other bits."""
    from curvkit.measures import vectors as fitting
    from curvkit.operators import plan

    steps = KINDS["sharpness"]
    journal = Memory()
    whole = bits(last(steps(journal)))
    assert {name for name in journal.facts if name.startswith("plan of")} == {
        f"plan of {name}" for name in ("hessian", "half 0", "half 1", "held out 0", "held out 1")
    }
    monkeypatch.setattr(plan, "free_memory", lambda device: 4_000)
    monkeypatch.setattr(fitting, "free_memory", lambda device: 13_100)
    assert bits(last(steps(Memory()))) != whole
    for later in (journal.again(), replace_earlier(journal, {})):
        assert bits(last(steps(later))) == whole


def replace_earlier(journal: Memory, earlier: dict[str, Kept]) -> Memory:
    later = journal.again()
    later.earlier = earlier
    return later


def test_a_drawn_seed_is_kept_and_another_one_refused():
    journal = Memory()
    drawn = last(trace_steps(objective(), journal=journal)).seed
    assert last(trace_steps(objective(), journal=journal.again())).seed == drawn
    text = f"seed={drawn + 1} is not that of the run that is resumed, {drawn}. Leave it out, or begin anew in another folder."
    with pytest.raises(InvalidArgument, match=text):
        last(trace_steps(objective(), seed=drawn + 1, journal=journal.again()))


def test_with_other_threads_products_are_made_again(monkeypatch: pytest.MonkeyPatch):
    """A plan is for a number of threads; the rest of it holds."""
    journal = Memory()
    first = last(KINDS["sharpness"](journal))
    for name, value in journal.facts.items():
        if name.startswith("plan of"):
            journal.facts[name] = {**value, "threads": 7}
    again = last(KINDS["sharpness"](journal.again()))
    assert again.plan.threads == torch.get_num_threads()
    assert torch.allclose(again.eigenpairs.values, first.eigenpairs.values, rtol=1e-4)


# ---- the folder -----------------------------------------------------------------------------------------------------


def filled(path: Path, *names: str) -> StateFolder:
    journal = StateFolder(path, run=RUN)
    for number, name in enumerate(names):
        journal.keep(name, Kept(torch.full((3,), float(number)), seconds=2.0))
        journal.save()
    return journal


def test_a_state_is_there_again(tmp_path: Path):
    with filled(tmp_path / "state", "a", "b") as journal:
        journal.decide("seed", 4)
        journal.keep("c", Kept(torch.ones(2, 3, dtype=torch.float64), seconds=0.5, error=0.25, turned=True))
    with StateFolder(tmp_path / "state", run=RUN) as again:
        assert (again.known, again.saved, again.seconds) == (3, 3, 4.5)
        assert again.fact("seed") == 4
        assert again.fact("plan") is None
        found = again.recalled("c")
        assert found is not None
        assert torch.equal(found.tensor, torch.ones(2, 3, dtype=torch.float64))
        assert (found.seconds, found.error, found.turned) == (0.5, 0.25, True)
        assert again.recalled("d") is None
        assert again.used == 1
        before = again.clock()
        assert again.recalled("a") is not None
        assert 2.0 <= again.clock() - before < 3.0


def test_a_state_in_which_nothing_was_kept_leaves_nothing(tmp_path: Path):
    with StateFolder(tmp_path / "state", run=RUN) as journal:
        journal.decide("seed", 1)
    assert os.listdir(tmp_path) == []
    with filled(tmp_path / "state", "a") as journal:
        journal.discard()
    assert os.listdir(tmp_path) == []


def test_a_fresh_state_forgets_the_earlier_one(tmp_path: Path):
    filled(tmp_path / "state", "a", "b").close()
    with StateFolder(tmp_path / "state", run={"another": "run"}, fresh=True) as journal:
        assert (journal.known, journal.recalled("a")) == (0, None)
        assert os.listdir(tmp_path / "state") == ["lock"]


def test_the_state_of_another_run_is_refused(tmp_path: Path):
    filled(tmp_path / "state", "a").close()
    text = r"is the state of another run: settings.tolerance was 0.001 and is 0.01; more was not there and is 1. Only the same run"
    with pytest.raises(InvalidArgument, match=text):
        StateFolder(tmp_path / "state", run={**RUN, "settings": {"tolerance": 1e-2}, "more": 1})
    assert StateFolder(tmp_path / "state", run=RUN).known == 1  # and stays as it was


def test_other_surroundings_are_told(tmp_path: Path):
    with StateFolder(tmp_path / "state", run=RUN, surroundings={"threads": 1, "torch": "2"}) as journal:
        journal.keep("a", Kept(torch.ones(1)))
    with StateFolder(tmp_path / "state", run=RUN, surroundings={"threads": 2, "torch": "2"}) as journal:
        assert journal.differences == ("threads was 1 and is 2",)


def test_one_process_at_a_time(tmp_path: Path):
    script = f"from curvkit.results import StateFolder; StateFolder(__import__('pathlib').Path({str(tmp_path / 'state')!r}), run={{}})"
    with StateFolder(tmp_path / "state", run=RUN):
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=60, check=False
        )
        with pytest.raises(CurvkitError, match=f"state is in use by another process .process {os.getpid()}.; one at a"):
            StateFolder(tmp_path / "state", run=RUN)
    assert done.returncode == 1
    assert f"in use by another process (process {os.getpid()})" in done.stderr
    StateFolder(tmp_path / "state", run=RUN).close()


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "empty"])
def test_a_damaged_segment_is_left_out(tmp_path: Path, damage: str):
    filled(tmp_path / "state", "a", "b", "c").close()
    path = tmp_path / "state" / "segment-000002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    {
        "flip": lambda: path.write_bytes(content),
        "cut": lambda: path.write_bytes(content[:-4]),
        "missing": path.unlink,
        "empty": lambda: path.write_bytes(b""),
    }[damage]()
    told: list[str] = []
    with StateFolder(tmp_path / "state", run=RUN, tell=told.append) as journal:
        assert [journal.recalled(name) is not None for name in "abc"] == [True, False, True]
        why = "missing" if damage == "missing" else "damaged"
        assert told == [f"{path}: left out, because it is {why}; its 1 results are made again."]
        journal.keep("b", Kept(torch.full((3,), 5.0)))
    with StateFolder(tmp_path / "state", run=RUN) as journal:
        assert [journal.recalled(name) is not None for name in "abc"] == [True, True, True]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "JSONDecodeError"),
        (b'{"schema": "curvkit.state/1"', "JSONDecodeError"),
        (b"[]", "TypeError|AttributeError"),
        (b'{"schema": "curvkit.state/1", "sha256": "0"}', "its contents do not give its checksum"),
        (b'{"schema": "curvkit.state/9", "sha256": "0"}', "its schema is 'curvkit.state/9'"),
        (b"\xff\xfe", "UnicodeDecodeError"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: bytes, reason: str):
    filled(tmp_path / "state", "a").close()
    (tmp_path / "state" / "manifest.json").write_bytes(content)
    with pytest.raises(
        RefusedCheckpoint, match=rf"is not a state that can be gone on from \(({reason}).*Begin anew with --fresh"
    ):
        StateFolder(tmp_path / "state", run=RUN)
    assert (tmp_path / "state" / "segment-000001.safetensors").exists()


def test_every_byte_of_a_manifest_counts(tmp_path: Path):
    filled(tmp_path / "state", "a").close()
    path = tmp_path / "state" / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace("0.001", "0.002"))
    with pytest.raises(RefusedCheckpoint, match="its contents do not give its checksum"):
        StateFolder(tmp_path / "state", run={**RUN, "settings": {"tolerance": 2e-3}})


def test_files_that_the_manifest_does_not_list_are_removed(tmp_path: Path):
    filled(tmp_path / "state", "a").close()
    for name in ("segment-000009.safetensors", ".segment-000002.safetensors.77.tmp", ".manifest.json.77.tmp"):
        (tmp_path / "state" / name).write_bytes(b"half of it")
    StateFolder(tmp_path / "state", run=RUN)
    assert sorted(os.listdir(tmp_path / "state")) == ["lock", "manifest.json", "segment-000001.safetensors"]


def test_saving_is_rare_where_it_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Products of 10 ms, saves of 200 ms: about one save in five seconds, and 4 % of the time."""
    import curvkit.results.state_folder as module

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    journal, saves, save = StateFolder(tmp_path / "state", run=RUN), [0], StateFolder.save

    def slow(self: StateFolder) -> None:
        now[0] += 0.1
        save(self)
        saves[0] += 1
        self._took, self._saved = 0.2, now[0] + 0.1
        now[0] += 0.1

    monkeypatch.setattr(StateFolder, "save", slow)
    for number in range(6000):
        now[0] += 0.01
        journal.keep(str(number), Kept(torch.ones(1)))
    journal.close()
    assert 10 <= saves[0] <= 14


def test_what_costs_less_to_make_than_to_save_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import curvkit.results.state_folder as module

    monkeypatch.setattr(module, "MOST_WAITING", 1000)
    with StateFolder(tmp_path / "state", run=RUN) as journal:
        for number in range(10):
            journal.keep(str(number), Kept(torch.ones(100)))
        journal.save()
        assert journal.saved == 2


# ---- the disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_full_disk_is_told_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, calls: int
):
    import curvkit.results.files as files
    import curvkit.results.state_folder as module

    filled(tmp_path / "state", "a", "b").close()
    told: list[str] = []
    left = [calls]

    def failing(real: Any) -> Any:
        def called(*arguments: Any, **named: Any) -> Any:
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= 1
            return real(*arguments, **named)

        return called

    with StateFolder(tmp_path / "state", run=RUN, tell=told.append) as journal:
        if at == "write":
            monkeypatch.setattr(module, "save_file", failing(module.save_file))
        else:
            monkeypatch.setattr(files.os, at, failing(getattr(os, at)))
        for name in "cdefgh":
            journal.keep(name, Kept(torch.ones(3)))
            journal.save()
    monkeypatch.undo()
    assert len(told) == 1
    assert (
        "the state cannot be saved (no space left on device). The measurement goes on; if it is cut short, it can be"
        in told[0]
    )
    with StateFolder(tmp_path / "state", run=RUN, tell=told.append) as journal:
        assert len(told) == 1  # nothing is damaged
        assert journal.known == 2 + {"write": calls, "fsync": (calls + 1) // 4, "replace": calls // 2}[at]
        assert [name for name in os.listdir(tmp_path / "state") if name.endswith(".tmp")] == []


def test_a_limit_of_file_sizes_is_a_full_disk(tmp_path: Path):
    """The real thing: the system refuses to write beyond 8 KiB."""
    script = f"""
import resource, signal, torch
from pathlib import Path
from curvkit.results import StateFolder
from curvkit.results.journal import Kept
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = StateFolder(Path({str(tmp_path / "state")!r}), run={{}}, tell=print)
journal.keep("small", Kept(torch.ones(10)))
journal.save()
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
journal.keep("large", Kept(torch.ones(10000)))
journal.save()
journal.keep("later", Kept(torch.ones(10)))
journal.save()
journal.close()
print(StateFolder(Path({str(tmp_path / "state")!r}), run={{}}, tell=print).known)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert "the state cannot be saved" in first
    assert second == "1"


def test_a_file_is_replaced_as_a_whole(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("earlier")

    def half(part: Path) -> None:
        part.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replaced(path, half)
    assert (path.read_text(), os.listdir(tmp_path)) == ("earlier", ["a.json"])
    replaced(path, lambda part: part.write_text("later"))
    assert path.read_text() == "later"


def test_a_diagonal_is_replaced_as_a_whole_and_refused_where_its_cost_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "d.safetensors"
    found = DiagonalEstimate({"w": torch.ones(2)}, None, "hessian", "Exact", Cost(1.0, 0.1))
    found.save(path)
    before = path.read_bytes()
    with monkeypatch.context() as context:
        context.setattr("curvkit.results.files.os.fsync", lambda handle: os.close(-1))  # EBADF
        with pytest.raises(OSError, match="Bad file descriptor"):
            found.save(path)
    assert (path.read_bytes(), os.listdir(tmp_path)) == (before, [path.name])
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    for cost in ({"gradients": 1.0}, {"joules": 1.0}, 3):
        said = json.dumps({**json.loads(metadata["estimate"]), "cost": cost})
        save_file({"value:w": torch.ones(2)}, path, {**metadata, "estimate": said})
        with pytest.raises(InvalidArgument, match="cannot be read as a diagonal .*Write it anew"):
            DiagonalEstimate.load(path)


def test_segments_are_plain_tensors_and_their_hash_is_in_the_manifest(tmp_path: Path):
    filled(tmp_path / "state", "a").close()
    path = tmp_path / "state" / "segment-000001.safetensors"
    assert load_file(path)["a"].tolist() == [0.0, 0.0, 0.0]
    [segment] = json.loads((tmp_path / "state" / "manifest.json").read_text())["segments"]
    assert segment == {
        "name": path.name,
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "entries": 1,
    }


def test_differences_are_said_entry_by_entry():
    assert list(differences({"a": {"b": [1]}, "c": 1}, {"a": {"b": [2]}, "d": None})) == [
        "a.b was [1] and is [2]",
        "c was 1 and is not there",
    ]


# ---- what others put there ------------------------------------------------------------------------------------------


def test_files_that_are_no_states_are_left(tmp_path: Path):
    """A folder of the user's is refused before anything is written; a note in a state outlives it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("three years")
    (tmp_path / "mine" / "segment-000001.safetensors").write_text("by chance")
    for fresh in (False, True):
        text = r"mine is not the state of a run: it has 'thesis.txt', and no manifest.json of curvkit. A state must have a folder"
        with pytest.raises(InvalidArgument, match=text):
            StateFolder(tmp_path / "mine", run=RUN, fresh=fresh)
    (tmp_path / "mine" / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(InvalidArgument, match="is not the state of a run"):
        StateFolder(tmp_path / "mine", run=RUN, fresh=True)
    assert sorted(os.listdir(tmp_path / "mine")) == ["manifest.json", "segment-000001.safetensors", "thesis.txt"]
    filled(tmp_path / "state", "a").close()
    for name in ("note.txt", "segment-1.safetensors", "mysegment-000001.safetensors", ".note.txt.7.tmp"):
        (tmp_path / "state" / name).write_text("mine")
    before = set(os.listdir(tmp_path / "state"))
    with StateFolder(tmp_path / "state", run=RUN) as journal:
        assert set(os.listdir(tmp_path / "state")) == before
        journal.discard()
    assert before - set(os.listdir(tmp_path / "state")) == {"lock", "manifest.json", "segment-000001.safetensors"}


def test_what_a_first_write_left_is_no_stranger(tmp_path: Path):
    for name in ("lock", "segment-000001.safetensors", ".segment-000001.safetensors.77.tmp", ".manifest.json.77.tmp"):
        (tmp_path / name).write_bytes(b"half of it")
    with StateFolder(tmp_path, run=RUN):
        assert os.listdir(tmp_path) == ["lock"]


@pytest.mark.parametrize(
    ("link", "kind", "text"),
    [
        ("state", InvalidArgument, "state is a link, and the state of a run must be a folder of its own"),
        ("state/lock", InvalidArgument, "lock is a link, and must be a file of its own in the folder of the state"),
        (
            "state/manifest.json",
            RefusedCheckpoint,
            r"is not a state that can be gone on from .ValueError: it is a link",
        ),
    ],
)
def test_links_are_not_followed(tmp_path: Path, link: str, kind: type[CurvkitError], text: str):
    filled(tmp_path / "state", "a").close()
    (tmp_path / link).rename(tmp_path / "elsewhere")
    (tmp_path / link).symlink_to(tmp_path / "elsewhere")
    before = [(path, path.read_bytes()) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    with pytest.raises(kind, match=text):
        StateFolder(tmp_path / "state", run=RUN)
    after = [(path, path.read_bytes()) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert [pair for pair in after if pair[0].name != "lock"] == [pair for pair in before if pair[0].name != "lock"]
    if link == "state/lock":
        assert after == before


def crafted(path: Path, **changes: Any) -> None:
    """Change a manifest, and give it the checksum that it needs."""
    content = json.loads((path / "manifest.json").read_text())
    content.pop("sha256")
    content |= changes
    stated = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**content, "sha256": stated}))


SEGMENT = {"name": "segment-000001.safetensors", "size": 1, "sha256": "0", "entries": 1}
CRAFTED: list[tuple[dict[str, Any], str]] = [
    ({"run": None}, "its run are no mapping of names to values"),
    ({"surroundings": []}, "its surroundings are no mapping"),
    ({"facts": 3}, "its facts are no mapping"),
    ({"segments": None}, "TypeError"),
    ({"segments": [{}]}, "TypeError"),
    ({"segments": [3]}, "TypeError"),
    ({"segments": [{**SEGMENT, "name": 5}]}, "5 is no name of a segment"),
    ({"segments": [{**SEGMENT, "name": "segment.safetensors"}]}, "'segment.safetensors' is no name"),
    ({"segments": [{**SEGMENT, "name": "../other.safetensors"}]}, "'../other.safetensors' is no name"),
    ({"segments": [{**SEGMENT, "size": "1"}]}, "size, entries or sha256 of segment-000001.safetensors are of"),
    ({"segments": [{**SEGMENT, "entries": None}]}, "size, entries or sha256 of segment-000001.safetensors are of"),
    ({"segments": [SEGMENT, SEGMENT]}, "it lists a segment twice"),
    ({"more": 1}, "TypeError"),
]


@pytest.mark.parametrize(("changes", "reason"), CRAFTED, ids=[str(number) for number in range(len(CRAFTED))])
def test_a_crafted_manifest_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str):
    filled(tmp_path / "state", "a").close()
    (tmp_path / "other.safetensors").write_bytes((tmp_path / "state" / "segment-000001.safetensors").read_bytes())
    crafted(tmp_path / "state", **changes)
    with pytest.raises(RefusedCheckpoint, match=rf"is not a state that can be gone on from \(.*{reason}"):
        StateFolder(tmp_path / "state", run=RUN)
    assert (tmp_path / "state" / "segment-000001.safetensors").exists()


@pytest.mark.parametrize(
    "beside", [None, {}, {"b": "[1.0, 0.0, false]"}, {"a": "3"}, {"a": "[-1.0, 0.0, false]"}, {"a": "[1.0, 0.0, 1]"}]
)
def test_a_crafted_segment_is_left_out(tmp_path: Path, beside: dict[str, str] | None):
    filled(tmp_path / "state", "a").close()
    path, told = tmp_path / "state" / "segment-000001.safetensors", list[str]()
    save_file({"a": torch.ones(3)}, path, beside)
    content = path.read_bytes()
    crafted(
        tmp_path / "state",
        segments=[{**SEGMENT, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}],
    )
    with StateFolder(tmp_path / "state", run=RUN, tell=told.append) as journal:
        assert (journal.known, journal.recalled("a")) == (0, None)
    assert told == [f"{path}: left out, because it is damaged; its 1 results are made again."]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", "3"),
        ("seed", -1),
        ("basis rows", "many"),
        ("plan of hessian", 3),
        ("plan of hessian", {"residency": "streamed"}),
        ("plan of hessian", {"residency": "nowhere"}),
        ("plan of hessian", {"micro_batches": "2"}),
    ],
)
def test_a_decision_that_is_none_is_refused(name: str, value: Any):
    journal, kind = Memory(stop_at=1), "sharpness by differences"
    with pytest.raises(KeyboardInterrupt):
        last(KINDS[kind](journal))
    whole = (isinstance(value, dict) and "micro_batches" in value) or value == {"residency": "nowhere"}
    journal.facts[name] = {**journal.facts[name], **value} if whole else value
    with pytest.raises(
        RefusedCheckpoint, match=f"resumed is damaged: its {name} is .*; it must be as curvkit wrote it"
    ):
        last(KINDS[kind](journal.again()))


def test_sizes_of_a_trace_that_are_none_are_refused():
    for value in (3, {"max_rows": 1}, {"max_rows": 1, "block_size": 1.5}):
        journal = Memory()
        journal.facts["search"] = value
        with pytest.raises(RefusedCheckpoint, match="resumed is damaged: its search is"):
            last(trace_steps(objective(), seed=5, journal=journal))


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(1),
        torch.ones(5, 1),
        torch.ones(5, dtype=torch.float64),
        torch.tensor([1.0, 2.0, 3.0, 4.0, torch.nan]),
    ],
    ids=["shorter", "column", "float64", "nan"],
)
def test_what_does_not_fit_is_made_again(other: Tensor):
    A, journal, v = Counted(symmetric(5)), Memory(), normal(5, seed=0).float()
    first = Recorded(A, journal, "a").matvec(v)
    later = journal.again()
    later.earlier = {key: Kept(other) for key in later.earlier}
    again = Recorded(A, later, "a").matvec(v)
    assert torch.equal(again, first)
    assert (again.dtype, A.products) == (torch.float32, 2)


def test_small_results_that_do_not_fit_are_made_again():
    def run(journal: Journal) -> str:
        A = recorded(Counted(symmetric(70)), journal, "a")
        settings = linalg_trace.Settings(method="exact", max_products=75)
        return repr(last(linalg_trace.search(A, settings, lengths=[30, 40], seed=1, start=torch.ones(70))))

    journal = Memory()
    whole, later = run(journal), journal.again()
    later.earlier = {key: Kept(torch.ones(1, dtype=torch.float64)) for key in later.earlier}
    assert run(later) == whole


def test_floats_may_differ_by_rounding_where_the_surroundings_differ(tmp_path: Path):
    with StateFolder(tmp_path / "state", run={"loss": 1.0}, surroundings={"threads": 1}) as journal:
        journal.keep("a", Kept(torch.ones(1)))
    for loss, threads, known in ((1.0, 1, True), (1.00001, 1, False), (1.00001, 2, True), (1.01, 2, False)):
        if known:
            StateFolder(tmp_path / "state", run={"loss": loss}, surroundings={"threads": threads}).close()
        else:
            with pytest.raises(InvalidArgument, match=f"loss was 1.0 and is {loss}"):
                StateFolder(tmp_path / "state", run={"loss": loss}, surroundings={"threads": threads})
