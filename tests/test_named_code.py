"""Code that a checkpoint names: what was looked at is what is imported, whatever lies at its path by then."""

from __future__ import annotations

import os
import py_compile
import sys
from pathlib import Path

import pytest
from samples import TRAIN, net

from curvkit import save
from curvkit.checkpoints import read
from curvkit.checkpoints.named_recipes import NamedRecipe
from curvkit.checkpoints.trust import NOTHING
from curvkit.errors import RefusedCheckpoint
from curvkit.resolving import named_code, resolution, resolve
from curvkit.resolving.factories import load_factory
from curvkit.resolving.named_code import Admitted, admitted_file


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(TRAIN)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def a_checkpoint(folder: Path) -> Path:
    return save(folder / "ckpt.pt", model=net(), recipe=load_factory("train.py:objective"))


def evil(folder: Path) -> str:
    return f"import pathlib; pathlib.Path({str(folder / 'executed')!r}).touch()\n{TRAIN}"


def test_a_file_that_is_exchanged_after_the_look_is_not_imported(folder: Path, monkeypatch: pytest.MonkeyPatch):
    path = a_checkpoint(folder)

    def exchanged(recipe: NamedRecipe, *rest: object) -> Admitted:
        found = admitted_file(recipe, *rest)  # type: ignore[arg-type]
        (folder / "train.py").write_text(evil(folder))
        return found

    monkeypatch.setattr(resolution, "admitted_file", exchanged)
    assert resolve(read(path)).objective.parameters.n == 51
    assert not (folder / "executed").exists()
    with pytest.raises(RefusedCheckpoint, match="another SHA-256"):
        resolve(read(path))


def test_compiled_code_of_another_content_is_not_imported(folder: Path):
    """Python believes a compiled file whose time and size fit those of the source."""
    path, file = a_checkpoint(folder), folder / "train.py"
    source = evil(folder)
    file.write_text(TRAIN + "#" * (len(source.encode()) - len(TRAIN.encode())))
    padded = file.read_bytes()
    times = file.stat()
    file.write_text(source)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    py_compile.compile(str(file))
    file.write_bytes(padded)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    load_factory("train.py:objective")
    assert (folder / "executed").exists()  # that is what an ordinary import does
    (folder / "executed").unlink()
    path = a_checkpoint(folder)
    (folder / "executed").unlink()
    assert resolve(read(path)).objective.parameters.n == 51
    assert not (folder / "executed").exists()


def test_files_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    path = a_checkpoint(folder)
    recipe = NamedRecipe.from_dict(read(path).recipe or {})
    assert admitted_file(recipe, read(path), NOTHING, folder).source == TRAIN.encode()
    monkeypatch.setattr(named_code, "MOST_BYTES", 100)
    with pytest.raises(RefusedCheckpoint, match="is larger than any source file. Nothing was imported"):
        admitted_file(recipe, read(path), NOTHING, folder)
    (folder / "train.py").chmod(0)
    if not os.access(folder / "train.py", os.R_OK):
        with pytest.raises(RefusedCheckpoint, match=r"cannot be read \(Permission denied\). Nothing was imported"):
            admitted_file(recipe, read(path), NOTHING, folder)
