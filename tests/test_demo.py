"""curvkit demo: a real checkpoint in any empty folder, never over another one's."""

from __future__ import annotations

import math
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from curvkit_cli.main import run
from samples import PROGRAM, environment

from curvkit.checkpoints import read
from curvkit.demos import CharacterDemo, DemoState
from curvkit.errors import InvalidArgument
from curvkit.resolving import resolve

SMALL = CharacterDemo(steps=3, saves=2, width=8, depth=1, heads=2, context=16, rows=2, calibration_rows=6)


def trained(directory: Path, demo: CharacterDemo = SMALL) -> list[Path]:
    return [state.saved for state in demo.train(directory) if state.saved is not None]


@pytest.mark.parametrize(("saves", "steps"), [(0, 5), (6, 5), (-1, 5), (1, 0)])
def test_counts(saves: int, steps: int):
    text = rf"CharacterDemo: saves={saves} must lie between 1 and steps={steps}. Save fewer checkpoints."
    with pytest.raises(InvalidArgument, match=text):
        CharacterDemo(steps=steps, saves=saves)


def test_the_learning_rate():
    """Rung 1: up linearly over a twelfth, then half a cosine down to a tenth."""
    demo = CharacterDemo(steps=120, peak_lr=2.0)
    rates = [demo.lr(step) for step in range(120)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:] == pytest.approx([0.2 + 0.9 * (1 + math.cos(math.pi * i / 110)) for i in range(110)])
    assert CharacterDemo(steps=1, saves=1).lr(0) == 3e-3


def test_the_files(tmp_path: Path):
    paths = CharacterDemo(steps=1200, saves=4).paths(tmp_path)
    assert [path.name for path in paths.values()] == ["step-000300.pt", "step-000600.pt", "step-000900.pt", "final.pt"]
    assert list(paths) == [300, 600, 900, 1200]


def test_checkpoints_are_complete_and_need_nothing(tmp_path: Path):
    first, final = trained(tmp_path / "run")
    assert [first.name, final.name] == ["step-000002.pt", "final.pt"]
    assert [read(path).step for path in (first, final)] == [2, 3]
    checkpoint = read(final)
    assert checkpoint.kind == "checkpoint of curvkit.save"
    assert checkpoint.lr == [pytest.approx(SMALL.lr(2))]
    objective = resolve(checkpoint).objective
    assert objective.loss.name == "token_cross_entropy"
    assert objective.examples == 6
    state = objective.model.state_dict()
    assert torch.equal(state["head.weight"], state["embedding.weight"])
    assert not torch.equal(read(first).weights["head.weight"], checkpoint.weights["head.weight"])


def test_the_same_seed_trains_the_same_bits_and_the_random_state_is_left_alone(tmp_path: Path):
    before = torch.get_rng_state()
    one, two = (read(trained(tmp_path / name)[-1]).weights for name in ("one", "two"))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = CharacterDemo(**{**vars(SMALL), "seed": 1})
    assert not torch.equal(read(trained(tmp_path / "three", other)[-1]).weights["head.weight"], one["head.weight"])


@pytest.mark.parametrize("present", ["final.pt", "step-000002.pt", "step-000777.pt"])
def test_a_run_that_is_there_is_not_touched(tmp_path: Path, present: str, capsys: pytest.CaptureFixture[str]):
    """A checkpoint of another length counts as well: two runs in one folder would look like one."""
    file = tmp_path / present
    file.write_bytes(b"mine")
    with pytest.raises(
        InvalidArgument, match=f"demo: .*{present} is already there and is not overwritten. Choose another"
    ):
        trained(tmp_path)
    assert run(["demo", str(tmp_path), "--steps", "2", "--saves", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"Error: {file} is already there and is not overwritten. Choose another folder, or remove it." in err
    assert file.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [file]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert run(["demo", "run", "--steps", "2", "--saves", "2", "--quiet"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[-1] for line in lines[:2]] == ["run/step-000001.pt", "run/final.pt"]
    assert lines[0].startswith("step      1  loss 4.")
    assert lines[2:] == ["", "Next: curvkit sharpness run/final.pt"]
    assert err == ""


def test_a_folder_that_cannot_be_made_is_said_before_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert run(["demo", str(tmp_path / "file" / "run"), "--saves", "1"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"Error: {tmp_path / 'file' / 'run'}: not a directory.\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--steps", "0"], "Invalid value for '--steps': 0 is not in the range x>=1."),
        (["--steps", "2", "--saves", "3"], "Error: --saves 3 must lie between 1 and --steps 2."),
    ],
)
def test_counts_on_the_command_line(
    tmp_path: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
):
    assert run(["demo", str(tmp_path / "run"), *arguments]) == 2
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_before_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(self: CharacterDemo, directory: Path) -> Iterator[DemoState]:
        yield DemoState(1, self.steps, 4.5, None)
        raise KeyboardInterrupt

    monkeypatch.setattr(CharacterDemo, "train", interrupted)
    assert run(["demo", str(tmp_path / "run"), "--quiet"]) == 130
    assert capsys.readouterr() == ("", "Interrupted before the first checkpoint: nothing was saved.\n")


def test_ctrl_c_keeps_and_lists_what_was_saved(tmp_path: Path):
    process = subprocess.Popen(
        [*PROGRAM, "demo", "run", "--steps", "5000", "--saves", "5000", "--quiet"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "step-000003.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "Interrupted.\n"
    saved = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert saved[:3] == ["step-000001.pt", "step-000002.pt", "step-000003.pt"]
    assert not any("tmp" in name for name in saved)
    assert f"Next: curvkit sharpness run/{saved[-1]}" in out
    assert read(tmp_path / "run" / saved[-1]).step == len(saved)
