"""curvkit doctor and curvkit completion: what they say of a sound machine, and of broken ones."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from curvkit_cli import diagnosis
from curvkit_cli.diagnosis import Finding
from curvkit_cli.main import run
from samples import PROGRAM, curvkit, environment

Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def package(folder: Path, name: str, version: str, source: str) -> None:
    """An installed package, as Python sees one."""
    for path, text in (
        (folder / name / "__init__.py", source),
        (
            folder / f"{name}-{version}.dist-info" / "METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        ),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(text)


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_a_sound_machine(tmp_path: Path):
    done = curvkit("doctor", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["schema"] == "curvkit.doctor/1"
    assert document["result"]["healthy"] is True
    found = {finding["name"]: finding for finding in document["result"]["findings"]}
    assert found["torch"]["text"] == torch.__version__
    assert found["numpy"]["text"] == importlib.metadata.version("numpy")
    assert found["threads"]["text"].startswith("1 of ")
    assert found["device"]["text"].startswith("cpu (")
    assert found["self-test"]["state"] == "ok"
    assert {finding["state"] for finding in found.values()} <= {"ok", "absent"}


def test_a_torchvision_that_does_not_go_with_torch(tmp_path: Path):
    package(tmp_path, "torchvision", "0.28.0", "raise RuntimeError('operator torchvision::nms does not exist')")
    done = curvkit("doctor", "--plain", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (1, "")
    line = next(line.split("\t") for line in done.stdout.splitlines() if line.startswith("torchvision"))
    assert line == [
        "torchvision",
        "broken",
        "0.28.0 cannot be imported beside this torch (RuntimeError: operator torchvision::nms does not exist), "
        "and transformers fails with it",
        "pip uninstall -y torchvision",
    ]


def test_a_module_of_the_current_directory_is_not_run(tmp_path: Path):
    package(tmp_path / "installed", "torchvision", "0.28.0", "")
    (tmp_path / "torchvision.py").write_text("open('owned', 'w')\nraise RuntimeError('mine')\n")
    done = curvkit("doctor", "--plain", cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert "torchvision\tok\t0.28.0" in done.stdout
    assert not (tmp_path / "owned").exists()


def test_a_torch_that_cannot_be_imported(tmp_path: Path):
    package(tmp_path, "torch", "2.13.0", "raise OSError('libtorch.so: cannot open shared object file')")
    for shape in ("--plain", "--json"):
        done = curvkit("doctor", shape, cwd=tmp_path, PYTHONPATH=str(tmp_path))
        assert (done.returncode, done.stderr) == (1, "")
        assert "cannot be imported (OSError: libtorch.so: cannot open shared object file)" in done.stdout
        assert "Install it again: pip install -U torch." in done.stdout
        assert "self-test" not in done.stdout


@pytest.mark.parametrize(
    ("version", "state", "text"),
    [
        ("2.5.1+cpu", "broken", "2.5.1+cpu: reading a checkpoint as data can run its code (CVE-2025-32434)"),
        ("2.9.1", "note", "2.9.1: a crafted .pt file can corrupt memory while it is read as data (CVE-2026-24747)"),
        ("2.10.0", "ok", "2.10.0"),
        ("3.0.0a0+git", "ok", "3.0.0a0+git"),
    ],
)
def test_old_versions_of_torch(monkeypatch: pytest.MonkeyPatch, version: str, state: str, text: str):
    monkeypatch.setattr(torch, "__version__", version)
    found = next(finding for finding in diagnosis.findings() if finding.name == "torch")
    assert (found.state, found.text) == (state, text)
    assert ("pip install -U" in found.remedy) is (state != "ok")


def test_a_product_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, typed: Typed):
    """The machine computes another thing than the closed form."""
    from curvkit.operators import Hessian

    right = Hessian.matvec
    monkeypatch.setattr(Hessian, "matvec", lambda self, v: right(self, v) * (1 + 1e-6))
    code, out, _ = typed("doctor", "--plain")
    assert code == 1
    assert "self-test\tbroken\ta Hessian product on cpu is off by 1.0e-06 of its length\t" in out


def test_a_check_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    def raising() -> Iterator[Finding]:
        raise RuntimeError("CUDA error: unknown error\nCompile with TORCH_USE_CUDA_DSA")
        yield

    monkeypatch.setattr(diagnosis, "_devices", raising)
    found = {finding.name: finding for finding in diagnosis.findings()}
    assert found["device"] == Finding(
        "device", "broken", "RuntimeError: CUDA error: unknown error", "Install torch again for this machine."
    )


def test_missing_packages(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diagnosis, "version", lambda name: None)
    found = {finding.name: finding for finding in diagnosis.findings()}
    assert (found["numpy"].state, found["numpy"].remedy) == ("broken", "pip install numpy")
    assert (found["peft"].state, found["peft"].remedy) == ("absent", "pip install 'curvkit[hf]'")


def test_extras_are_those_of_the_package():
    known = importlib.metadata.metadata("curvkit").get_all("Provides-Extra") or []
    assert set(diagnosis.EXTRAS.values()) <= set(known)


@pytest.mark.parametrize("columns", [30, 60, 80, 120])
def test_the_table_fits_every_width(typed: Typed, monkeypatch: pytest.MonkeyPatch, columns: int):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = typed("doctor", "--format", "table", "--color", "never")
    assert code == 0
    assert out.endswith("Nothing is broken.\n")
    assert max(len(line.rstrip()) for line in out.splitlines()) <= columns
    assert "\x1b" not in out
    assert "\x1b[32mok" in typed("doctor", "--format", "table", "--color", "always")[1]


# ---- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_of_that_shell(typed: Typed, tmp_path: Path, shell: str):
    code, out, err = typed("completion", shell)
    assert (code, err) == (0, "")
    assert f"_CURVKIT_COMPLETE={shell}_complete" in out
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not here to parse it")
    script = tmp_path / "script"
    script.write_text(out)
    done = subprocess.run([program, "-n", str(script)], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_completion_of_something_else(typed: Typed):
    code, _, err = typed("completion", "tcsh")
    assert code == 2
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'." in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("curvkit in", {"plain,init", "plain,inspect"}),
        ("curvkit sharpness --which l", {"plain,largest"}),
        ("curvkit sharpness ck", {"file,ck"}),
        ("curvkit sharpness ckpt.pt --tr", {"plain,--trust"}),
    ],
)
def test_what_is_completed(tmp_path: Path, words: str, expected: set[str]):
    """As bash asks; a configuration that is broken, or another's, is no obstacle, and torch is not imported."""
    (tmp_path / "ckpt.pt").write_bytes(b"")
    (tmp_path / "curvkit.toml").write_text("nonsense")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    last = str(len(words.split()) - 1)
    asked = environment(_CURVKIT_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=last, PYTHONPATH=str(tmp_path))
    done = subprocess.run(PROGRAM, cwd=tmp_path, env=asked, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_with_the_script(tmp_path: Path):
    """The whole way: the script is sourced, and its function is called as a tab would."""
    program = tmp_path / "bin" / "curvkit"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from curvkit_cli.main import main; main()' \"$@\"\n")
    program.chmod(0o755)
    script = (
        'eval "$(curvkit completion bash)"; COMP_WORDS=(curvkit sharp); COMP_CWORD=1; '
        '_curvkit_completion curvkit; echo "${COMPREPLY[@]}"'
    )
    path = f"{program.parent}:{environment()['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment(PATH=path),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "sharpness\n", "")
