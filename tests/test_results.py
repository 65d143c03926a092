"""Results as text and JSON, and the record beside them: versions and seeds, no environment, no folders of this machine."""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from curvkit.results import (
    Definition,
    Eigenpairs,
    environment,
    peak_memory,
    plain,
    repository,
    to_json,
    without_folders,
)


@dataclass(frozen=True)
class Point:
    x: float
    inner: Any = None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.5, 1.5),
        (float("nan"), None),
        (-math.inf, None),
        (True, True),
        (None, None),
        ("ä", "ä"),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor(2.5), 2.5),
        (torch.tensor([[1.0, math.nan]]), [[1.0, None]]),
        ((1, [2, {3}]), [1, [2, [3]]]),
        ({1: Point(0.5)}, {"1": {"x": 0.5, "inner": None}}),
        (Point(math.inf, Point(1.0)), {"x": None, "inner": {"x": 1.0, "inner": None}}),
        (torch.float32, "torch.float32"),
        (Path("a/b"), "a/b"),
        (Point, str(Point)),
    ],
)
def test_plain_values(value: Any, expected: Any):
    assert plain(value) == expected


def test_json_is_strict_readable_and_keeps_every_digit():
    document = {"value": 0.1 + 0.2, "bad": math.nan, "name": "ü · μ", "points": [Point(1e-300)]}
    text = to_json(document)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    again = json.loads(text, parse_constant=refuse)
    assert again == {"value": 0.1 + 0.2, "bad": None, "name": "ü · μ", "points": [{"x": 1e-300, "inner": None}]}
    assert not text.endswith("\n")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("/home/me/secret/train.py:objective", "train.py:objective"),
        ("--objective=/home/me/secret/train.py:objective", "--objective=train.py:objective"),
        ("-o/home/me/secret/out", "-oout"),
        ("/home/me/secret/ckpt.pt", "ckpt.pt"),
        ("runs/a/ckpt.pt", "runs/a/ckpt.pt"),
        ("../a.pt", "../a.pt"),
        ("--set", "--set"),
        ("lr=3e-4", "lr=3e-4"),
        ("-k", "-k"),
        ("", ""),
    ],
)
def test_folders_are_left_out(word: str, expected: str):
    assert without_folders(word) == expected


def test_below_the_current_directory_the_rest_of_the_path_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert without_folders(str(tmp_path / "runs" / "a.pt")) == "runs/a.pt"
    assert without_folders(f"--out={tmp_path / 'b'}") == "--out=b"


def test_environment_has_versions_and_nothing_of_the_users(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    found = environment()
    assert found["torch"] == torch.__version__
    assert {"curvkit", "numpy", "python", "platform", "threads", "cpu_capability"} <= set(found)
    text = to_json(found)
    assert "hunter2" not in text
    assert str(Path.home()) not in text


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("curvkit.results.record.PACKAGES", ("no_package_of_this_name",))
    assert environment()["no_package_of_this_name"] == "unknown"


def test_peak_memory_is_that_of_this_process():
    found = peak_memory()
    assert found is not None
    assert 50 << 20 < found < 1 << 42  # torch alone takes more than 50 MiB


def git(*arguments: str, cwd: Path) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_repository_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # a hook that runs the tests sets these
    file = tmp_path / "sub" / "train.py"
    file.parent.mkdir()
    file.write_text("a = 1\n")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert repository(file) is None
    git("init", "--quiet", cwd=tmp_path)
    assert repository(file) is None  # no commit yet
    git("add", ".", cwd=tmp_path)
    git("commit", "--quiet", "-m", "first", cwd=tmp_path)
    commit = git("rev-parse", "HEAD", cwd=tmp_path)
    assert repository(file) == {"commit": commit, "dirty": False}
    file.write_text("a = 2\n")
    assert repository(file) == {"commit": commit, "dirty": True}


def test_without_git_there_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert repository(tmp_path / "train.py") is None


def definition(**changes: Any) -> Definition:
    made = {
        "matrix": "hessian",
        "loss": "cross_entropy",
        "reduction": "mean",
        "terms": 6144,
        "examples": 96,
        "batches": 8,
        "parameters": 107392,
        "mode": "eval",
        "dtype": "float32",
        "attention": "math",
    }
    return Definition(**(made | changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {},
            "Hessian of cross_entropy, mean over 6,144 terms · 96 examples in 8 batches · 107,392 parameters · eval mode",
        ),
        ({"batches": 1}, "96 examples in 1 batch · "),
        ({"reduction": "sum"}, "Hessian of cross_entropy, sum over 6,144 terms · "),
        ({"reduction": "as returned", "terms": None}, "Hessian of cross_entropy, as returned · 96 examples in"),
        ({"examples": None}, "terms · 8 batches · 107,392"),
    ],
)
def test_a_definition_in_words(changes: dict[str, Any], text: str):
    assert text in str(definition(**changes))


def pairs(**changes: Any) -> Eigenpairs:
    made = {
        "values": torch.tensor([3.0, 1.0]).double(),
        "residuals": torch.tensor([0.5, 0.25]).double(),
        "converged": torch.tensor([True, True]),
        "vectors": None,
        "recomputed": True,
        "which": "largest",
        "tolerance": 1e-3,
        "scale": 3.0,
        "asymmetry": 0.0,
        "rounding": 0.125,
        "products": 7,
    }
    return Eigenpairs(**(made | changes))


def test_intervals_hold_residual_and_rounding():
    assert pairs().intervals.tolist() == [[2.375, 3.625], [0.625, 1.375]]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, True), ({"recomputed": False}, False), ({"converged": torch.tensor([True, False])}, False)],
)
def test_converged_is_said_of_recomputed_residuals_only(changes: dict[str, Any], expected: bool):
    assert pairs(**changes).all_converged is expected
