"""Every kind of checkpoint through the command: written by its own library, measured, and equal to the live model.

Oracle: dense autograd in float64 on the live model, which has never been in a file.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from curvkit_cli.main import run
from samples import TRAIN, Net, examples, legacy, net, truth
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import curvkit

OBJECTIVE = ("--objective", "train.py:objective")
Writer = Callable[[Net, Path], tuple[str, ...]]
"""Saves a network into a folder; returns what to type after the command."""


def state_dict(model: Net, folder: Path) -> tuple[str, ...]:
    torch.save(model.state_dict(), folder / "weights.pt")
    return ("weights.pt",)


def training_dict(model: Net, folder: Path) -> tuple[str, ...]:
    torch.save({"model": model.state_dict(), "optimizer": trained(model), "epoch": 3}, folder / "training.pth")
    return ("training.pth",)


def old_format(model: Net, folder: Path) -> tuple[str, ...]:
    legacy(model.state_dict(), folder / "old.pth")
    return ("old.pth",)


def several(model: Net, folder: Path) -> tuple[str, ...]:
    content = {"generator": net(seed=7).state_dict(), "discriminator": model.state_dict()}
    torch.save(content, folder / "gan.pt")
    return ("gan.pt", "--key", "discriminator")


def safetensors(model: Net, folder: Path) -> tuple[str, ...]:
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return ("model.safetensors",)


def ema(model: Net, folder: Path) -> tuple[str, ...]:
    """As timm's CheckpointSaver lays a file out."""
    content = {
        "epoch": 1,
        "arch": "net",
        "state_dict": net(seed=9).state_dict(),
        "optimizer": trained(model),
        "version": 2,
        "state_dict_ema": model.state_dict(),
    }
    torch.save(content, folder / "last.pth.tar")
    return ("last.pth.tar", "--ema")


def raw_beside_ema(model: Net, folder: Path) -> tuple[str, ...]:
    content = {"arch": "net", "state_dict": model.state_dict(), "state_dict_ema": net(seed=9).state_dict()}
    torch.save(content, folder / "last.pth.tar")
    return ("last.pth.tar",)


def averaged(model: Net, folder: Path) -> tuple[str, ...]:
    average = AveragedModel(net(seed=3))
    average.update_parameters(model)  # the first update copies
    torch.save(average.state_dict(), folder / "swa.pt")
    return ("swa.pt",)


def data_parallel(model: Net, folder: Path) -> tuple[str, ...]:
    torch.save({"model": nn.DataParallel(model).state_dict()}, folder / "dp.pt")
    return ("dp.pt",)


def compiled(model: Net, folder: Path) -> tuple[str, ...]:
    torch.save(wrapped(model).state_dict(), folder / "compiled.pt")
    return ("compiled.pt",)


def compiled_inside(model: Net, folder: Path) -> tuple[str, ...]:
    """A submodule alone was compiled: the prefix stands in the middle of its names."""
    outside = nn.Module()
    outside.inner, outside.outer = wrapped(model.inner), model.outer
    torch.save(outside.state_dict(), folder / "inside.pt")
    return ("inside.pt",)


def data_parallel_of_compiled(model: Net, folder: Path) -> tuple[str, ...]:
    torch.save(nn.DataParallel(wrapped(model)).state_dict(), folder / "both.pt")
    return ("both.pt",)


def fully_sharded(model: Net, folder: Path) -> tuple[str, ...]:
    """The names that FSDP's wrappers and activation checkpointing leave behind."""
    names = {name: f"_fsdp_wrapped_module._checkpoint_wrapped_module.{name}" for name in model.state_dict()}
    torch.save({names[name]: tensor for name, tensor in model.state_dict().items()}, folder / "fsdp.pt")
    return ("fsdp.pt",)


def lightning(model: Net, folder: Path) -> tuple[str, ...]:
    """One step of a Trainer with learning rate 0, so that the file has the network's own weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning as L

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

        class Task(L.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = model

            def training_step(self, batch: Any, index: int) -> Any:
                x, y = batch
                return F.cross_entropy(self.net(x), y)

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW(self.parameters(), lr=0.0, weight_decay=0.0)

        trainer = L.Trainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Task(), DataLoader(TensorDataset(*examples()), batch_size=24))
        trainer.save_checkpoint(folder / "epoch=0-step=1.ckpt")
    return ("epoch=0-step=1.ckpt",)


def distributed(model: Net, folder: Path) -> tuple[str, ...]:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model.state_dict(), "step": 5}, checkpoint_id=folder / "dcp", no_dist=True)
    return ("dcp",)


def of_curvkit(model: Net, folder: Path) -> tuple[str, ...]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    curvkit.save(folder / "own.pt", model=model, optimizer=optimizer, step=2)
    return ("own.pt",)


KINDS: tuple[Writer, ...] = (
    state_dict,
    training_dict,
    old_format,
    several,
    safetensors,
    ema,
    raw_beside_ema,
    averaged,
    data_parallel,
    compiled,
    compiled_inside,
    data_parallel_of_compiled,
    fully_sharded,
    lightning,
    distributed,
    of_curvkit,
)

WALKED = (state_dict, several, ema, distributed)
"""Those that are measured with what `init` writes, too; the others differ from them in how they are read, which has its own test."""


def wrapped(model: nn.Module) -> Any:
    """By torch.compile, whose import warns of what it uses itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(model)


def trained(model: nn.Module) -> dict[str, Any]:
    """The state of an optimizer that has made a step, with learning rate 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    x, y = examples()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.state_dict()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty folder with a user's train.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    Path("train.py").write_text(TRAIN)
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_each_kind_measures_as_the_live_model(write: Writer, folder: Path, capsys: pytest.CaptureFixture[str]):
    typed = write(net(), folder)
    capsys.readouterr()  # what the library that wrote it printed
    code = run(["sharpness", *typed, *OBJECTIVE, "--json", "--seed", "0", "--no-data-doubt", "--tolerance", "1e-5"])
    out, err = capsys.readouterr()
    assert code == 0, err
    (found,) = json.loads(out)["result"]["eigenvalues"]
    slack = 1e-6 * abs(found["value"])  # the weights are float32: eps of theta, through a smooth function of size 1
    assert found["low"] - slack <= truth()[-1].item() <= found["high"] + slack


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_each_kind_can_be_inspected(write: Writer, folder: Path, capsys: pytest.CaptureFixture[str]):
    """Law: every number of the network is found, whatever else lies in the file."""
    typed = write(net(), folder)
    capsys.readouterr()
    code = run(["inspect", *typed, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    said = json.loads(out)
    assert said["schema"] == "curvkit.inspect/1"
    numbers = sum(parameter.numel() for parameter in net().parameters())
    found = {group["numbers"] for group in said["result"]["groups"]}
    assert found & {numbers, numbers + 1}  # AveragedModel counts its updates


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_what_inspecting_says_next_works_when_it_is_typed(
    write: Writer, folder: Path, capsys: pytest.CaptureFixture[str]
):
    """The walk of somebody who types what is printed: inspect, init, fill in the model, sharpness. Names have spaces."""
    (folder / "my runs").mkdir()
    path, *chosen = write(net(), folder / "my runs")
    capsys.readouterr()
    assert run(["inspect", f"my runs/{path}", *chosen]) == 0
    out, _ = capsys.readouterr()
    program, *words = shlex.split(
        next(line for line in out.splitlines() if line.startswith("next\t")).removeprefix("next\t")
    )
    assert (program, words) == ("curvkit", ["init", f"my runs/{path}", *chosen])
    assert run(words) == 0
    out, _ = capsys.readouterr()
    program, *words = shlex.split(out.splitlines()[-1])
    assert (program, words) == ("curvkit", ["sharpness", f"my runs/{path}", *chosen])
    if write not in WALKED:
        return
    made = Path("curvkit_objective.py")
    model = '    raise NotImplementedError("curvkit_objective.py: make_model() does not return the model yet")\n'
    made.write_text(made.read_text().replace(model, "    from samples import Net\n    return Net()\n"))
    code = run([*words, "--no-data-doubt", "--no-preflight", "--seed", "0", "--plain"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "\tconverged\n" in out
