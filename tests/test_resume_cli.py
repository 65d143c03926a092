"""-o, --resume and --fresh as a user types them: a run that is killed at any moment and gone on with gives the bits of an unbroken one."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from curvkit_cli.main import run
from safetensors.torch import save_file
from samples import PROGRAM, TRAIN, environment, net

from curvkit.checkpoints import digest
from curvkit.results import StateFolder

MORE = """

def slow(hidden: int = 40, pause: float = 0.02):
    import time
    class Slow(Net):
        def forward(self, x):
            time.sleep(pause)
            return super().forward(x)
    torch.manual_seed(0)
    return curvkit.Objective(Slow(hidden), F.cross_entropy, data)
"""
FAST = ("ckpt.pt", "--objective", "train.py:objective", "--memory", "1GiB")
EAGER = """
import curvkit.results.state_folder as module
module.LEAST, module.SHARE, module.SLACK = 0.0, 0.0, 0.0
from curvkit_cli.main import main
main()
"""
"""The command with every result saved at once."""
Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    Path("train.py").write_text(TRAIN + MORE)
    torch.save(net().state_dict(), "ckpt.pt")
    torch.save(net(40).state_dict(), "wide.pt")
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run the command in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with torch.random.fork_rng(devices=[]):
            code = run([*arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def cut_short(monkeypatch: pytest.MonkeyPatch, typed: Typed, *arguments: str, after: int = 5) -> tuple[int, str, str]:
    """Ctrl-C at the result after so many."""
    kept, keep = [0], StateFolder.keep

    def counting(self: StateFolder, key: str, value: Any) -> None:
        if kept[0] == after:
            raise KeyboardInterrupt
        kept[0] += 1
        keep(self, key, value)

    with monkeypatch.context() as context:
        context.setattr(StateFolder, "keep", counting)
        return typed(*arguments)


def comparable(folder: str, name: str) -> tuple[Any, list[bytes]]:
    """All of a document but time and memory and what was typed, and the bytes of the files beside it."""
    document = json.loads((Path(folder) / f"{name}.json").read_text())
    record = document["record"]
    for told, key in ((document["result"], "seconds"), (record, "seconds"), (record, "peak_memory_bytes")):
        told.pop(key)
    record.pop("command")
    record.pop("options")
    return document, [path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors"))]


def files(folder: str) -> list[str]:
    return sorted(os.listdir(folder))


# ---- in one process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sharpness", "trace"])
def test_a_run_that_was_cut_short_goes_on(typed: Typed, monkeypatch: pytest.MonkeyPatch, command: str):
    arguments = (command, *FAST, "--seed", "3")
    code, _, err = typed(*arguments, "-o", "whole", "-q")
    assert (code, err) == (0, "")
    beside = {"sharpness": "sharpness.vectors.safetensors", "trace": "trace.samples.safetensors"}[command]
    assert files("whole") == [f"{command}.json", beside]
    code, out, err = cut_short(monkeypatch, typed, *arguments, "-o", "cut")
    assert code == 130
    assert (
        f"To go on: curvkit {command} ckpt.pt --objective train.py:objective --memory 1GiB --seed 3 -o cut --resume\n"
        in err
    )
    assert "PARTIAL" in out
    assert json.loads(Path(f"cut/{command}.json").read_text())["result"]["interrupted"] is True
    assert f"{command}.state" in files("cut")
    code, out, err = typed(*arguments, "-o", "cut", "--resume")
    assert code == 0
    assert re.search(r"resumed: 5 results of earlier runs, which took 0.0 s, are used\n", err)
    assert files("cut") == files("whole")
    assert comparable("cut", command) == comparable("whole", command)
    assert "PARTIAL" not in out


def test_a_state_is_neither_used_nor_removed_unless_asked(typed: Typed, monkeypatch: pytest.MonkeyPatch):
    cut_short(monkeypatch, typed, "sharpness", *FAST, "-o", "cut")
    before = files("cut/sharpness.state")
    code, out, err = typed("sharpness", *FAST, "-o", "cut")
    assert (code, out) == (2, "")
    assert (
        "cut/sharpness.state is the state of a run that was cut short. Pass --resume to go on with it, --fresh to begin"
        in err
    )
    assert files("cut/sharpness.state") == before
    code, _, err = typed("sharpness", *FAST, "-o", "cut", "--fresh")
    assert code == 0
    assert "resumed" not in err
    assert files("cut") == ["sharpness.json", "sharpness.vectors.safetensors"]


def test_resuming_where_nothing_is_begins(typed: Typed):
    code, _, err = typed("trace", *FAST, "-o", "new", "--resume")
    assert code == 0
    assert "resumed: no state in new/trace.state, so this begins at the beginning\n" in err


@pytest.mark.parametrize("command", ["sharpness", "trace"])
@pytest.mark.parametrize("format_", ["json", "plain", "table"])
def test_a_complete_result_is_shown_again_without_work(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, command: str, format_: str
):
    arguments = (command, *FAST, "-o", "done", "--format", format_)
    code, out, _ = typed(*arguments)
    assert code == 0
    with monkeypatch.context() as context:
        context.setattr("curvkit.operators.hessian.Hessian.__init__", None)  # no operator is made
        again, shown, err = typed(*arguments, "--resume")
    assert (again, shown) == (0, out)
    assert f"resumed: done/{command}.json is complete and is shown again\n" in err


def test_the_exit_code_of_a_complete_result_is_as_it_was(typed: Typed):
    arguments = ("sharpness", *FAST, "-o", "done", "--strict", "--max-products", "4", "-k", "3", "--tolerance", "1e-6")
    assert typed(*arguments)[0] == 5
    assert typed(*arguments, "--resume")[0] == 5


def test_a_state_that_outlived_its_result_is_removed(typed: Typed, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as context:
        context.setattr(StateFolder, "discard", StateFolder.save)  # killed between the two
        assert typed("trace", *FAST, "-o", "done")[0] == 0
    assert "trace.state" in files("done")
    code, _, err = typed("trace", *FAST, "-o", "done", "--resume")
    assert code == 0
    assert "is complete and is shown again" in err
    assert files("done") == ["trace.json", "trace.samples.safetensors"]


OTHERS = {
    "checkpoint": (("other.pt", *FAST[1:]), 'checkpoint.digest was "sha256-ends:'),
    "objective": (("ckpt.pt", "--objective", "train2.py:objective", "--memory", "1GiB"), "objective was "),
    "data": ((*FAST, "--batches", "1"), "data was "),
    "parameters": ((*FAST, "--params", "inner.*"), 'parameters was "all" and is ["inner.weight", "inner.bias"]'),
    "dtype": ((*FAST, "--dtype", "float64"), 'model.dtype was "torch.float32" and is "torch.float64"'),
    "tolerance": ((*FAST, "--tolerance", "0.01"), "settings.search.tolerance was 0.001 and is 0.01"),
    "seed": ((*FAST, "--seed", "4"), "seed"),
}


@pytest.mark.slow
@pytest.mark.parametrize("complete", [False, True])
def test_another_run_is_refused_by_what_differs(typed: Typed, monkeypatch: pytest.MonkeyPatch, complete: bool):
    torch.save(net(seed=1).state_dict(), "other.pt")
    Path("train2.py").write_text(TRAIN)
    first = ("sharpness", *FAST, "--seed", "3", "-o", "there")
    if complete:
        assert typed(*first)[0] == 0
    else:
        cut_short(monkeypatch, typed, *first)
    before = {name: os.stat(f"there/{name}").st_mtime_ns for name in files("there")}
    for other, (arguments, text) in OTHERS.items():
        code, out, err = typed("sharpness", *arguments, "-o", "there", "--resume")
        assert (other, code, out) == (other, 2, "")
        assert text in err
        assert ("--fresh" in err) or other == "seed"
        assert {name: os.stat(f"there/{name}").st_mtime_ns for name in files("there")} == before


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--resume",), "--resume goes on with a run in the folder of -o: pass -o DIR too."),
        (
            ("--resume", "--fresh", "-o", "x"),
            "--resume goes on with the run that is there, and --fresh removes it: pass one",
        ),
    ],
)
def test_flags_that_do_not_go_together(typed: Typed, flags: tuple[str, ...], text: str):
    code, out, err = typed("trace", *FAST, *flags)
    assert (code, out) == (2, "")
    assert text in err
    assert not Path("x").exists()


def test_damage_is_refused_with_what_to_do(typed: Typed, monkeypatch: pytest.MonkeyPatch):
    arguments = ("trace", *FAST, "-o", "cut")
    cut_short(monkeypatch, typed, *arguments)
    Path("cut/trace.json").write_text("{")
    code, _, err = typed(*arguments, "--resume")
    assert code == 4
    assert "cut/trace.json is not a result that --resume could go on from (JSONDecodeError" in err
    Path("cut/trace.json").unlink()
    Path("cut/trace.state/manifest.json").write_text("{")
    code, _, err = typed(*arguments, "--resume")
    assert code == 4
    assert "manifest.json is not a state that can be gone on from" in err
    assert "Begin anew with --fresh" in err
    assert typed(*arguments, "--fresh")[0] == 0


@pytest.mark.slow
def test_a_damaged_segment_is_made_again(typed: Typed, monkeypatch: pytest.MonkeyPatch):
    assert typed("sharpness", *FAST, "--seed", "3", "-o", "whole")[0] == 0
    arguments = ("sharpness", *FAST, "--seed", "3", "-o", "cut")
    cut_short(monkeypatch, typed, *arguments)
    path = Path("cut/sharpness.state/segment-000001.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    code, _, err = typed(*arguments, "--resume")
    assert code == 0
    assert f"warning: {path}: left out, because it is damaged; its 5 results are made again." in err
    assert comparable("cut", "sharpness") == comparable("whole", "sharpness")


def test_other_ground_is_noted(typed: Typed, monkeypatch: pytest.MonkeyPatch):
    from curvkit import results

    arguments, here = ("trace", *FAST, "-o", "cut"), results.environment()
    with monkeypatch.context() as context:
        context.setattr(results, "environment", lambda: {**here, "threads": 64})
        cut_short(context, typed, *arguments)
    code, out, err = typed(*arguments, "--resume", "--plain")
    said = f"threads was 64 and is {here['threads']}"
    assert code == 0
    assert f"note: {said}: what is computed from here on may round in another way" in err
    assert f"note\tresumed, but {said}: the bits may differ from those of an unbroken run" in out


@pytest.mark.parametrize("calls", [0, 3, 6])
def test_a_full_disk_leaves_the_result(typed: Typed, monkeypatch: pytest.MonkeyPatch, calls: int):
    import curvkit.results.files as module
    import curvkit.results.state_folder as saving

    left, fsync = [calls], os.fsync

    def full(handle: int) -> None:
        if left[0] <= 0:
            raise OSError(28, "No space left on device")
        left[0] -= 1
        fsync(handle)

    for name in ("LEAST", "SHARE", "SLACK"):
        monkeypatch.setattr(saving, name, 0.0)
    with monkeypatch.context() as context:
        context.setattr(module.os, "fsync", full)
        code, out, err = typed("trace", *FAST, "-o", "full", "--plain")
    assert code == 1
    assert "total\t" in out
    assert err.count("the state cannot be saved (no space left on device). The measurement goes on") == 1
    assert "Error: full/trace.json cannot be written (no space left on device), as a folder of -o must be: " in err
    assert "trace.json" not in files("full")


def test_structure_can_be_left_out(typed: Typed):
    Path("relu.py").write_text(TRAIN.replace("torch.tanh", "torch.relu"))
    arguments = ("trace", "wide.pt", "--objective", "relu.py:objective", "--set", "hidden=40", "--seed", "0", "--plain")
    code, out, _ = typed(*arguments)
    assert code == 0
    assert "\nmethod\texact (a piecewise linear network" in out
    code, out, _ = typed(*arguments, "--no-structure", "--tolerance", "0.3")
    assert code == 0
    assert "piecewise linear" not in out


# ---- what the identity of a run sees --------------------------------------------------------------------------------

BIG = """
import helper

def big():
    torch.manual_seed(0)
    class Big(Net):
        def __init__(self):
            super().__init__(6)
            self.register_buffer("far", torch.zeros(1 << 20))
        def forward(self, x):
            return helper.SCALE * super().forward(x) + 0.0 * self.far[1 << 19]
    return curvkit.Objective(Big(), F.cross_entropy, data)
"""
BY_BIG = ("big.safetensors", "--objective", "train.py:big", "--memory", "1GiB", "--max-products", "4", "--seed", "1")


def save_big(middle: float) -> str:
    """Write weights of 4 MiB of which one number in the middle can differ; what a digest of the ends says of the file."""
    far = torch.zeros(1 << 20)
    far[1 << 19] = middle
    save_file({**net().state_dict(), "far": far}, "big.safetensors")
    return digest(Path("big.safetensors"))


@pytest.fixture
def big(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path.cwd()))
    Path("helper.py").write_text("SCALE = 1.0\n")
    Path("train.py").write_text(TRAIN + BIG)
    return save_big(0.0)


@pytest.mark.slow
def test_weights_that_differ_in_the_middle_are_another_checkpoint(typed: Typed, big: str):
    arguments = ("trace", *BY_BIG, "-o", "there")
    assert typed(*arguments)[0] == 0
    assert typed("verify", "there/trace.json", *BY_BIG[:3], "-q")[0] == 0
    assert save_big(1.0) == big
    code, out, err = typed(*arguments, "--resume")
    assert (code, out) == (2, "")
    assert 'of another run: checkpoint.parameters_and_buffers was "sha256:' in err
    assert "the loss at these weights was " not in err
    code, out, _ = typed("verify", "there/trace.json", *BY_BIG[:3], "-q", "--json")
    assert code == 1
    assert [check["what"] for check in json.loads(out)["result"]["checks"] if check["holds"] is False] == ["checkpoint"]


@pytest.mark.slow
@pytest.mark.usefixtures("big")
def test_an_edited_module_is_another_function(typed: Typed, monkeypatch: pytest.MonkeyPatch):
    arguments = ("trace", *BY_BIG, "-o", "there")
    cut_short(monkeypatch, typed, *arguments, after=2)
    Path("helper.py").write_text("SCALE = 1.5  # edited\n")
    sys.modules.pop("helper")
    code, out, err = typed(*arguments, "--resume")
    assert (code, out) == (2, "")
    assert re.search(r"of another run: the loss at these weights was 1\.\d+ and is 1\.\d+[;.] ", err)
    Path("helper.py").write_text("SCALE = 1.0\n# back again\n")
    sys.modules.pop("helper")
    assert typed(*arguments, "--resume")[0] == 0


def test_another_state_of_the_optimizer_is_said(typed: Typed, monkeypatch: pytest.MonkeyPatch):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for number in (1.0, 2.0):
        for p in model.parameters():
            optimizer.state[p] = {
                "step": torch.tensor(3.0),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.full_like(p, number),
            }
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "trained.pt")
        if number == 1.0:
            cut_short(monkeypatch, typed, "sharpness", "trained.pt", *FAST[1:], "-o", "cut")
    code, out, err = typed("sharpness", "trained.pt", *FAST[1:], "-o", "cut", "--resume")
    assert (code, out) == (2, "")
    assert '; optimizer was "sha256:' in err
    assert "parameters_and_buffers" not in err


@pytest.mark.slow
def test_a_folder_of_the_user_is_refused(typed: Typed):
    Path("out/trace.state").mkdir(parents=True)
    Path("out/trace.state/thesis.txt").write_text("three years")
    for flag in ((), ("--resume",), ("--fresh",)):
        code, out, err = typed("trace", *FAST, "-o", "out", *flag)
        assert (code, out) == (2, "")
        assert "Error: out/trace.state is not the state of a run: it has 'thesis.txt', and no manifest.json" in err
    assert files("out/trace.state") == ["thesis.txt"]


@pytest.mark.slow
def test_other_modules_are_said(typed: Typed):
    module = "\nclass Named(Net):\n    extra_repr = lambda self: WORD\n"
    module += "\ndef named(): return curvkit.Objective(Named(6), F.cross_entropy, data)\n"
    Path("helper.py").write_text("WORD = 'at 0x1234'\n")
    Path("train.py").write_text(TRAIN + "import sys; sys.path.insert(0, '.')\nfrom helper import WORD\n" + module)
    arguments = ("trace", "ckpt.pt", "--objective", "train.py:named", "--max-products", "4", "-o", "there", "--resume")
    try:
        assert typed(*arguments)[0] == 0
        for word, same in (("at 0x99", True), ("another", False)):
            Path("helper.py").write_text(f"WORD = '{word}'  # edited\n")
            del sys.modules["helper"]
            code, _, err = typed(*arguments)
            assert (code == 0) is same
            assert ('of another run: the modules of the model was "sha256:' in err) is not same
    finally:
        sys.path.remove(".")


# ---- in processes that are killed -----------------------------------------------------------------------------------


def started(*arguments: str, program: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*program, *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(*arguments: str, program: list[str]) -> tuple[int, str]:
    process = started(*arguments, program=program)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def killed_until_done(arguments: tuple[str, ...], folder: str, kills: int, longest: float, seed: int) -> int:
    """Kill the command at random moments of its work, going on each time; how many kills met it at work."""
    draw, program, met = random.Random(seed), [sys.executable, "-c", EAGER], 0
    for _ in range(kills):
        process = started(*arguments, "-o", folder, "--resume", program=program)
        state = Path(folder) / f"{arguments[0]}.state"
        begun = time.monotonic()
        while process.poll() is None and not (state / "lock").exists() and time.monotonic() - begun < 60:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, longest))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            met += 1
        process.communicate()
        if process.returncode == 0:
            break
    code, err = finished(*arguments, "-o", folder, "--resume", program=program)
    assert (code, "Error" in err) == (0, False), err
    return met


@pytest.mark.slow
def test_ctrl_c_in_a_process_keeps_the_state():
    arguments = ("trace", "wide.pt", "--objective", "train.py:slow", "--seed", "1", "--max-products", "60", "-o", "cut")
    process = started(*arguments, program=[sys.executable, "-c", EAGER])
    begun = time.monotonic()
    while not list(Path("cut/trace.state").glob("segment-00001*")) and time.monotonic() - begun < 60:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    typed = err.splitlines()[-1].partition("To go on: ")[2]
    assert shlex.split(typed) == ["curvkit", *arguments, "--resume"]
    code, err = finished(*shlex.split(typed)[1:], program=PROGRAM)
    assert code == 0
    assert re.search(r"resumed: 1\d results of earlier runs", err)


@pytest.mark.slow
def test_a_trace_that_is_killed_gives_the_same_bits():
    arguments = (
        *(
            "trace",
            "wide.pt",
            "--objective",
            "train.py:slow",
            "--set",
            "pause=0.005",
            "--memory",
            "1GiB",
            "--seed",
            "1",
            "-q",
        ),
        *("--method", "hutchinson", "--max-products", "80", "--tolerance", "1e-6"),
    )
    assert finished(*arguments, "-o", "whole", program=PROGRAM)[0] == 0
    assert killed_until_done(arguments, "cut", kills=4, longest=0.6, seed=0) >= 2
    assert comparable("cut", "trace") == comparable("whole", "trace")


LONG = {
    **{
        method: (
            *(
                "trace",
                "wide.pt",
                "--objective",
                "train.py:slow",
                "--memory",
                "1GiB",
                "--seed",
                "1",
                "-q",
                "--method",
                method,
            ),
            *("--max-products", "323" if method == "exact" else "150", "--tolerance", "1e-6", "--no-structure"),
        )
        for method in ("auto", "exact", "hutchinson", "deflated", "hutch++", "xtrace")
    },
    "sharpness": (
        *(
            "sharpness",
            "wide.pt",
            "--objective",
            "train.py:slow",
            "--memory",
            "1GiB",
            "--seed",
            "1",
            "-q",
            "-k",
            "3",
            "--tolerance",
            "1e-5",
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LONG)
def test_a_long_run_that_is_killed_twenty_times_gives_the_same_bits(kind: str):
    arguments = LONG[kind]
    assert finished(*arguments, "-o", "whole", program=PROGRAM)[0] == 0
    assert killed_until_done(arguments, "cut", kills=20, longest=0.8, seed=len(kind)) >= 4
    assert comparable("cut", arguments[0]) == comparable("whole", arguments[0])
    assert files("cut") == files("whole")
