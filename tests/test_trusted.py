"""Classes that a user lets in: imported from where Python finds them, and never in the place of a library."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from samples import net

from curvkit.checkpoints import read
from curvkit.checkpoints.trust import Trust

SPY = "from pathlib import Path\nPath({marker!r}).touch()\nclass Config:\n    pass\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def a_file_with_a_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "mine").mkdir()
    (folder / "mine" / "settings_of_mine.py").write_text("class Config:\n    pass\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(folder / "mine")
        import settings_of_mine  # type: ignore[import-not-found]

        torch.save({"model": net().state_dict(), "config": settings_of_mine.Config()}, folder / "ckpt.pt")
        del sys.modules["settings_of_mine"]
    return folder / "ckpt.pt"


def test_a_file_beside_a_download_takes_no_library_s_place(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The name is that of a module of Python, and nobody has imported it yet."""
    path = a_file_with_a_config(folder, monkeypatch)
    marker, places = folder / "executed", list(sys.path)
    (folder / "plistlib.py").write_text(SPY.format(marker=str(marker)))
    (folder / "settings_of_mine.py").write_text("import plistlib\nclass Config:\n    pass\n")
    for trust in (Trust(classes=("settings_of_mine.Config",)), Trust(everything=True)):
        monkeypatch.delitem(sys.modules, "plistlib", raising=False)
        sys.modules.pop("settings_of_mine", None)
        assert read(path, trust=trust).weights.keys() == net().state_dict().keys()
        assert sys.modules["plistlib"].__file__ != str(folder / "plistlib.py")
    assert not marker.exists()
    assert sys.path == places


def test_a_class_in_the_current_directory_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch):
    path = a_file_with_a_config(folder, monkeypatch)
    (folder / "settings_of_mine.py").write_text("class Config:\n    pass\n")
    found = read(path, trust=Trust(classes=("settings_of_mine.Config",)))
    assert torch.equal(found.weights["inner.weight"], net().state_dict()["inner.weight"])
    assert not any("was not needed" in note for note in found.notes)


def test_a_class_that_the_file_does_not_refer_to(folder: Path):
    torch.save(net().state_dict(), folder / "ckpt.pt")
    found = read(folder / "ckpt.pt", trust=Trust(classes=("train.Config", "train.Args")))
    assert "--allow train.Config, train.Args was not needed: the file refers to no class" in found.notes
    assert "train" not in sys.modules
    assert read(folder / "ckpt.pt").notes == ()
