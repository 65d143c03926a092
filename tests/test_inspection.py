"""Inspecting: what the headers say, from every kind of file, in no time and memory, and without torch."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from samples import Payload, environment, flipped, legacy, net
from torch import nn
from torch_samples import exported, torchscript

from curvkit import Recipe, save
from curvkit.checkpoints import inspect, read
from curvkit.errors import InvalidArgument, RefusedCheckpoint


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckpt.pt"


def stepped(kind: type[torch.optim.Optimizer], **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    optimizer = kind(model.parameters(), **options)
    for _ in range(3):
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_a_checkpoint_of_curvkit(path: Path):
    from curvkit.models import build

    model = build("mlp", {"sizes": [4, 3]})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    batch = {"x": torch.ones(5, 4), "y": torch.zeros(5, dtype=torch.long)}
    save(
        path, model=model, optimizer=optimizer, step=7, recipe=Recipe("mlp", {"sizes": [4, 3]}, "cross_entropy", batch)
    )
    found = inspect(path)
    assert (found.kind, found.step, found.bytes) == ("checkpoint of curvkit.save", 7, path.stat().st_size)
    assert found.checksum == "CRC-32 of every record"
    assert found.recipe == "data: mlp, cross_entropy"
    assert [(g.name, g.tensors, g.numbers, g.bytes, g.dtypes) for g in found.groups] == [
        ("model", 2, 15, 60, ("float32",)),
        ("curvkit", 2, 25, 120, ("float32", "int64")),
    ]
    assert found.optimizer is not None
    assert (found.optimizer.name, found.optimizer.lr, found.optimizer.betas) == ("AdamW", (1e-3,), (0.9, 0.95))
    assert (found.refused_globals, found.refusal, found.weight_keys) == ((), None, ("model",))


OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any], str]] = [
    (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}, "AdamW"),
    (torch.optim.Adam, {"lr": 1e-3, "betas": (0.8, 0.9)}, "Adam"),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, "SGD"),
    (torch.optim.SGD, {"lr": torch.tensor(0.25)}, "SGD"),
    (torch.optim.RMSprop, {"lr": 0.1}, "RMSprop"),
    (torch.optim.Adagrad, {"lr": 0.1}, "Adagrad"),
    (torch.optim.Adadelta, {"lr": 0.1}, "Adadelta"),
    (torch.optim.NAdam, {"lr": 0.1}, "NAdam"),
    (torch.optim.Rprop, {"lr": 0.1}, "Rprop"),
]


@pytest.mark.parametrize(("kind", "options", "name"), OPTIMIZERS)
@pytest.mark.parametrize("old", [False, True])
def test_optimizers(path: Path, kind: type[torch.optim.Optimizer], options: dict[str, Any], name: str, old: bool):
    """Oracle: the optimizer itself."""
    model, optimizer = stepped(kind, **options)
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path, _use_new_zipfile_serialization=not old
    )
    found = inspect(path).optimizer
    assert found is not None
    group = optimizer.param_groups[0]
    assert (found.name, found.groups, found.lr) == (name, 1, (float(group["lr"]),))
    assert found.betas == group.get("betas")
    assert found.momentum == group.get("momentum")
    assert found.nesterov == group.get("nesterov")
    assert found.weight_decay == ((group["weight_decay"],) if "weight_decay" in group else ())
    assert found.step == (3 if name not in ("SGD",) else None)


def test_an_optimizer_of_no_known_class(path: Path):
    for groups, name in (
        ([{"lr": 0.1, "ns_steps": 5}], "Muon"),
        ([{"lr": 0.1}], None),
        ([{"lr": 1, "betas": (0.9, 0.99), "amsgrad": False}], "Adam or AdamW"),
        ([3], None),
    ):
        torch.save({"model": net().state_dict(), "optimizer": {"param_groups": groups, "state": {}}}, path)
        found = inspect(path).optimizer
        assert found is not None
        assert found.name == name


def test_tied_weights_count_once(path: Path):
    shared = torch.ones(5, 3)
    torch.save({"model": {"wte": shared, "head": shared, "b": torch.ones(2)}}, path)
    found = inspect(path)
    assert found.tied == (("wte", "head"),)
    assert (found.groups[0].tensors, found.groups[0].numbers) == (2, 17)


def test_wrappers_and_variants(path: Path):
    state = {f"module._orig_mod.{name}": tensor for name, tensor in net().state_dict().items()}
    torch.save({"model": state, "model_ema": state, "epoch": 3}, path)
    found = inspect(path)
    assert (found.removed_prefixes, found.variants, found.keys) == (
        ("module.", "_orig_mod."),
        ("ema",),
        ("model", "model_ema", "epoch"),
    )
    assert inspect(path, ema=True).variants == ("raw",)
    assert inspect(path, key="model_ema").weight_keys == ()
    with pytest.raises(InvalidArgument, match="--key other: "):
        inspect(path, key="other")


def test_a_pickled_model_is_described_and_not_made(path: Path):
    torch.save(net(), path)
    found = inspect(path)
    assert found.kind == "pickled model"
    assert "samples.Net" in found.refused_globals
    assert found.refusal is not None
    assert found.refusal.startswith(
        "it refers to samples.Net, torch.nn.modules.linear.Linear, which loading would import"
    )
    assert [(g.name, g.numbers) for g in found.groups] == [("weights", 51)]


def test_a_payload_does_not_run(path: Path):
    marker = path.with_name("executed")
    torch.save({"model": net().state_dict(), "x": Payload(marker), "args": argparse.Namespace(a=1)}, path)
    found = inspect(path)
    assert found.refused_globals == ("posix.system",)
    assert found.groups[0].numbers == 51
    assert not marker.exists()


def test_names_in_a_file_do_not_reach_the_terminal_as_they_are(path: Path):
    from torch_samples import START, archive

    archive(path, START + b"}X\x01\x00\x00\x00acevil\x1b[2J\nThing\ns.")
    assert "evil?[2J.Thing" in str(inspect(path).refusal)


def test_a_refused_layout_is_shown_with_what_is_there(path: Path):
    torch.save({"a": net().state_dict(), "b": net().state_dict()}, path)
    found = inspect(path)
    assert found.refusal is not None
    assert found.refusal.startswith("holds several models")
    assert [g.name for g in found.groups] == ["a", "b"]
    torch.save({"w": torch.ones(1).expand(10**12)}, path)
    assert "claims 1,000,000,000,000 elements" in str(inspect(path).refusal)


@pytest.mark.parametrize(("make", "kind"), [(torchscript, "TorchScript"), (exported, "program of torch.export")])
def test_programs(tmp_path: Path, make: Any, kind: str):
    path = tmp_path / "model.pt2"
    make(path)
    found = inspect(path)
    assert found.kind == kind
    assert "which is loaded with --trust alone. Save the weights where" in str(found.refusal)


def test_safetensors(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({f"module.{name}": tensor for name, tensor in net().state_dict().items()}, path, {"format": "pt"})
    found = inspect(path)
    assert found.kind == read(path).kind == "safetensors file"
    assert (found.groups[0].numbers, found.removed_prefixes, found.notes) == (51, ("module.",), ("written by pt",))
    assert found.checksum == "none: safetensors has no checksum: a flipped bit in the file would not be noticed"


def test_an_old_file(path: Path):
    legacy({"model": net().state_dict(), "step": 3}, path)
    found = inspect(path)
    assert (found.kind, found.step, found.notes) == ("training dict", 3, ("written by a torch before 1.6",))
    assert found.checksum.startswith("none: files of torch before 1.6 have no checksum")


def test_a_directory_with_files_of_torch(tmp_path: Path):
    model, optimizer = stepped(torch.optim.AdamW, lr=0.1)
    (tmp_path / "config.json").write_text("{}")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    found = inspect(tmp_path)
    assert [(g.name, g.numbers) for g in found.groups] == [("model", 51), ("optimizer", 2 * 51 + 4)]
    assert found.optimizer is not None
    assert (found.optimizer.name, found.optimizer.step, found.step) == ("AdamW", 3, 3)
    torch.save({"w": nn.Linear(1, 1)}, tmp_path / "optimizer.pt")
    found = inspect(tmp_path)
    assert (found.refusal, found.refused_globals) == (None, ())  # the weights do not need it
    assert any(note.startswith("optimizer.pt refers to ") and "linear.Linear" in note for note in found.notes)
    torch.save({**optimizer.state_dict(), "x": torch.zeros(1).expand(10**9)}, tmp_path / "optimizer.pt")
    assert "optimizer.pt: the tensor 'x' claims 1,000,000,000" in str(inspect(tmp_path).refusal)
    (tmp_path / "optimizer.pt").unlink()
    torch.save({"w": nn.Linear(1, 1)}, tmp_path / "pytorch_model.bin")
    assert "torch.nn.modules.linear.Linear" in str(inspect(tmp_path).refusal)
    torch.save({"w": torch.zeros(1).expand(10**9)}, tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin: the tensor 'w' claims 1,000,000,000 elements" in str(inspect(tmp_path).refusal)


def test_a_distributed_directory(tmp_path: Path):
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save({"model": net().state_dict(), "step": 5}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert [(g.name, g.numbers) for g in inspect(tmp_path / "dcp").groups] == [("model", 51)]


def test_damage_in_the_outline_is_found(path: Path):
    torch.save(net().state_dict(), path)
    flipped(path, "ckpt/data.pkl")
    with pytest.raises(RefusedCheckpoint, match=r"the record 'ckpt/data.pkl' does not match its checksum"):
        inspect(path)


def test_the_plain_form(path: Path):
    save(path, model=net(), step=1)
    plain = inspect(path).to_dict()
    assert json.loads(json.dumps(plain))["groups"][0]["numbers"] == 51
    assert plain["path"] == str(path)


MEASURED = """
import re, sys, time
from pathlib import Path
start = time.perf_counter()
from curvkit.checkpoints.inspection import inspect
found = inspect(Path(sys.argv[1]))
seconds = time.perf_counter() - start
print(found.groups[0].bytes, "torch" in sys.modules, seconds, re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_five_gigabytes_in_a_second_and_a_hundred_megabytes(path: Path):
    """The file has holes in place of its numbers; its headers are those that torch writes for five gigabytes."""
    with torch.serialization.skip_data():
        torch.save({"model": {f"layers.{i}.weight": torch.empty(1000, 1250) for i in range(1000)}, "step": 3}, path)
    try:
        assert path.stat().st_size > 5_000_000_000
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(path)], env=environment(), capture_output=True, text=True, check=True
        )
    finally:
        path.unlink()
    size, with_torch, seconds, kilobytes = done.stdout.split()
    assert (size, with_torch) == ("5000000000", "False")
    assert float(seconds) < 2  # 0.2 s on two idle cores
    assert int(kilobytes) < 100_000
