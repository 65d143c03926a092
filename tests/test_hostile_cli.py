"""Hostile twins of every kind: refused with exit code 4, and nothing of what they carry has run.

Each payload would create a file if anything unpickled or imported it; the file must not be there afterwards.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from curvkit_cli.main import run
from samples import TRAIN, Payload, legacy, net, rewritten

MARKER = "executed"
Attack = Callable[[Path], str]
"""Writes a file or directory into a folder that holds the marker's name; returns what to type."""


def in_a_state_dict(folder: Path) -> str:
    torch.save({**net().state_dict(), "extra": Payload(folder / MARKER)}, folder / "a.pt")
    return "a.pt"


def in_a_training_dict(folder: Path) -> str:
    torch.save({"model": net().state_dict(), "args": Payload(folder / MARKER)}, folder / "a.ckpt")
    return "a.ckpt"


def in_an_old_file(folder: Path) -> str:
    legacy({"model": net().state_dict(), "args": Payload(folder / MARKER)}, folder / "a.pth")
    return "a.pth"


def as_a_bare_pickle(folder: Path) -> str:
    (folder / "a.pt").write_bytes(pickle.dumps(Payload(folder / MARKER)))
    return "a.pt"


def as_a_model_s_bin(folder: Path) -> str:
    directory = hugging_face(folder)
    (directory / "model.safetensors").unlink()
    torch.save({**net().state_dict(), "extra": Payload(folder / MARKER)}, directory / "pytorch_model.bin")
    return "model"


def distributed(folder: Path, **content: Any) -> Path:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": net().state_dict(), **content}, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def in_distributed_metadata(folder: Path) -> str:
    directory = distributed(folder)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.planner_data = Payload(folder / MARKER)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return "dcp"


def in_distributed_bytes(folder: Path) -> str:
    directory = distributed(folder, note="x" * 2000)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    (place,) = [info for index, info in metadata.storage_data.items() if index.fqn == "note"]
    buffer = io.BytesIO()
    torch.save(Payload(folder / MARKER), buffer)
    payload = buffer.getvalue()
    assert len(payload) <= place.length
    shard = directory / place.relative_path
    content = bytearray(shard.read_bytes())
    content[place.offset : place.offset + len(payload)] = payload
    place.length = len(payload)
    shard.write_bytes(bytes(content))
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return "dcp"


def distributed_path(path: str) -> Attack:
    def attack(folder: Path) -> str:
        directory = distributed(folder)
        shard = next(directory.glob("*.distcp"))
        (folder / "outside.distcp").write_bytes(shard.read_bytes())
        metadata = pickle.loads((directory / ".metadata").read_bytes())
        for info in metadata.storage_data.values():
            info.relative_path = path.format(folder=folder)
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))
        return "dcp"

    return attack


def distributed_symlink(folder: Path) -> str:
    directory = distributed(folder)
    shard = next(directory.glob("*.distcp"))
    shard.rename(folder / "outside.distcp")
    shard.symlink_to(folder / "outside.distcp")
    return "dcp"


def in_an_exported_program(folder: Path) -> str:
    """The sample inputs of a .pt2 are a pickle; torch.export.load falls back to unpickling all of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(net(), (torch.ones(2, 4),)), folder / "a.pt2")
    buffer = io.BytesIO()
    torch.save(((Payload(folder / MARKER),), {}), buffer)
    rewritten(folder / "a.pt2", lambda name, content: buffer.getvalue() if "sample_inputs" in name else content)
    return "a.pt2"


def hugging_face(folder: Path, **config: Any) -> Path:
    from safetensors.torch import save_file

    directory = folder / "model"
    directory.mkdir()
    described = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **config}
    (directory / "config.json").write_text(json.dumps(described))
    save_file(net().state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def naming_remote_code(folder: Path) -> str:
    directory = hugging_face(folder, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    (directory / "modeling.py").write_text(f"open({str(folder / MARKER)!r}, 'w')\nclass Evil: pass\n")
    return "model"


def shard_index(path: str, *, symlink: bool = False) -> Attack:
    def attack(folder: Path) -> str:
        directory = hugging_face(folder)
        (directory / "model.safetensors").rename(folder / "outside.safetensors")
        name = path.format(folder=folder)
        if symlink:
            (directory / name).symlink_to(folder / "outside.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(net().state_dict(), name)}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return "model"

    return attack


def zip_bomb(folder: Path) -> str:
    """100 MB of zeros in 100 KB."""
    torch.save({"weight": torch.zeros(25_000_000)}, folder / "bomb.pt")
    rewritten(folder / "bomb.pt", lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert (folder / "bomb.pt").stat().st_size < 200_000
    return "bomb.pt"


def claiming_a_trillion(folder: Path) -> str:
    """One stored number, expanded with stride 0."""
    torch.save({"weight": torch.zeros(1).expand(10**12)}, folder / "large.pt")
    assert (folder / "large.pt").stat().st_size < 2_000
    return "large.pt"


def as_torchscript(folder: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net()).save(str(folder / "script.pt"))
    return "script.pt"


def as_a_pickled_module(folder: Path) -> str:
    torch.save(net(), folder / "whole.pt")
    return "whole.pt"


ATTACKS: dict[str, Attack] = {
    "pickle in a state dict": in_a_state_dict,
    "pickle in a training dict": in_a_training_dict,
    "pickle in an old file": in_an_old_file,
    "bare pickle": as_a_bare_pickle,
    "pickle in pytorch_model.bin": as_a_model_s_bin,
    "pickle in DCP metadata": in_distributed_metadata,
    "pickle in DCP bytes": in_distributed_bytes,
    "DCP path upwards": distributed_path("../outside.distcp"),
    "DCP absolute path": distributed_path("{folder}/outside.distcp"),
    "DCP symlink outwards": distributed_symlink,
    "pickle in a .pt2": in_an_exported_program,
    "auto_map": naming_remote_code,
    "index upwards": shard_index("../outside.safetensors"),
    "index absolute": shard_index("{folder}/outside.safetensors"),
    "index by a symlink outwards": shard_index("model-00001-of-00001.safetensors", symlink=True),
    "zip bomb": zip_bomb,
    "trillion elements": claiming_a_trillion,
    "TorchScript": as_torchscript,
    "pickled module": as_a_pickled_module,
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty folder with a user's train.py; the environment tries to open the doors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("CURVKIT_TRUST", "CURVKIT_SHARPNESS_TRUST", "CURVKIT_INSPECT_TRUST"):
        monkeypatch.setenv(name, "1")
    for name in ("CURVKIT_ALLOW", "CURVKIT_SHARPNESS_ALLOW", "CURVKIT_INSPECT_ALLOW"):
        monkeypatch.setenv(name, "posix.system")
    Path("train.py").write_text(TRAIN)
    return tmp_path


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_twin_is_refused_and_nothing_runs(attack: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    typed = ATTACKS[attack](folder)
    before = sorted(folder.rglob("*"))
    code = run(["sharpness", typed, "--objective", "train.py:objective", "--json"])
    out, err = capsys.readouterr()
    assert code == 4, err
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("Error: ")
    assert [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts] == before


@pytest.mark.parametrize("attack", ATTACKS)
def test_inspecting_a_hostile_twin_runs_nothing(attack: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    typed = ATTACKS[attack](folder)
    before = sorted(folder.rglob("*"))
    code = run(["inspect", typed])
    _, err = capsys.readouterr()
    assert code in (0, 4), err
    assert "Traceback" not in err
    assert sorted(folder.rglob("*")) == before


def test_the_attacks_would_work_on_a_reader_that_unpickles(folder: Path):
    """Law: the payload does what it says, so that the tests above can fail."""
    with zipfile.ZipFile(in_a_state_dict(folder)) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        content = archive.read(name)

    class Careless(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return None

        def find_class(self, module: str, name: str) -> Any:
            return getattr(os, name) if module in ("posix", "nt") else lambda *arguments: {}

    with contextlib.suppress(Exception):  # whatever comes after the payload
        Careless(io.BytesIO(content)).load()
    assert (folder / MARKER).exists()
