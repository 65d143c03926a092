"""A small classifier, its checkpoints in every layout, and the train.py that a user would have beside them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from oracles import classes, normal, seeded
from torch import Tensor, nn

HIDDEN = 6
ROWS = (10, 14)
"""Rows of the two batches."""


class Net(nn.Module):
    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.inner = nn.Linear(4, hidden)
        self.outer = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


def net(hidden: int = HIDDEN, seed: int = 0) -> Net:
    with seeded(seed):
        return Net(hidden)


def examples(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return normal(sum(ROWS), 4, seed=1).to(dtype), classes(sum(ROWS), num=3, seed=2)


def truth(model: nn.Module | None = None) -> Tensor:
    """Ascending eigenvalues of the dense float64 Hessian of the mean cross-entropy over all examples."""
    model = (net() if model is None else model).double()
    names = list(dict(model.named_parameters()))
    x, y = examples(torch.float64)

    def loss(*values: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,)), y)

    values = tuple(p.detach() for p in model.parameters())
    rows = torch.autograd.functional.hessian(loss, values)
    blocks = [torch.cat([h.reshape(v.numel(), -1) for h in row], dim=1) for row, v in zip(rows, values, strict=True)]
    return torch.linalg.eigvalsh(torch.cat(blocks))


TRAIN = """
from typing import Literal
import torch
import torch.nn.functional as F
from torch import nn
import curvkit

class Net(nn.Module):
    def __init__(self, hidden=6, p=0.0):
        super().__init__()
        self.inner, self.outer, self.drop = nn.Linear(4, hidden), nn.Linear(hidden, 3), nn.Dropout(p)
    def forward(self, x):
        return self.outer(self.drop(torch.tanh(self.inner(x))))

x = torch.randn(24, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(2))
data = [(x[:10], y[:10]), (x[10:], y[10:])]

def sized(hidden):
    return curvkit.Objective(Net(hidden), F.cross_entropy, data)

@curvkit.objective
def objective(hidden: int = 6):
    return sized(hidden)

def typed(hidden: int = 6, scale: float = 1.0, flag: bool = False, act: Literal["tanh", "relu"] = "tanh", n: int | None = 3,
          plain=2, many: list[int] = (), **rest):
    objective.got = dict(hidden=hidden, scale=scale, flag=flag, act=act, n=n, plain=plain, many=many, **rest)
    return sized(hidden)

def needs(width: int, depth: int):
    return sized(width)

def prints():
    print("hello from train.py")
    return objective()

def lazy():
    import beside
    return objective(beside.HIDDEN)

def dropout():
    return curvkit.Objective(Net(p=0.5), F.cross_entropy, data)

def frozen():
    return curvkit.Objective(Net().requires_grad_(False), F.cross_entropy, data)

def on_meta():
    return curvkit.Objective(Net(), F.cross_entropy, [(x.to("meta"), y)])

def not_scalar():
    return curvkit.Objective(Net(), lambda outputs, targets: outputs, [(x, y)])

def out_of_range():
    return curvkit.Objective(Net(), F.cross_entropy, [(x, y + 5)])

def beyond_the_table():
    return curvkit.Objective(Net(), nn.MultiMarginLoss(), [(x, y + 5)])

def no_data():
    return curvkit.Objective(Net(), F.cross_entropy, [])

def lone_batch():
    return curvkit.Objective(Net(), F.cross_entropy, (x, y))

def a_model():
    return Net()

def raises():
    raise KeyError("my own mistake")

def ends():
    raise SystemExit(0)

def exhausted():
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes.")

def bad_loss():
    def loss(outputs, targets):
        raise LookupError("no such column")
    return curvkit.Objective(Net(), loss, data)

def bad_shapes():
    return curvkit.Objective(Net(), F.cross_entropy, [(x[:, :3], y)])

value = 3
"""
"""The user's file: its network has the names and shapes of `Net`, its data is `examples()`."""


class Payload:
    """Runs a command when it is unpickled by anything that does not refuse."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write a torch zip again with some records changed and right checksums."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info.filename)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records:
            archive.writestr(name, change(name, content))


def flipped(path: Path, record: str) -> None:
    """Flip one bit inside a record, as a bad disk would."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(record)
    content = bytearray(path.read_bytes())
    start = (
        info.header_offset + 30 + int.from_bytes(content[info.header_offset + 26 : info.header_offset + 28], "little")
    )
    start += int.from_bytes(content[info.header_offset + 28 : info.header_offset + 30], "little")
    content[start + info.file_size // 2] ^= 4
    path.write_bytes(content)


def legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


# ---- the command in a process of its own ----------------------------------------------------------------------------

PROGRAM = [sys.executable, "-c", "from curvkit_cli.main import main; main()"]


def environment(**more: str) -> dict[str, str]:
    """One thread, so that several of these can share two cores; nothing of the caller's about terminals and colours."""
    dropped = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM")
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("CURVKIT_")}
    return {**kept, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", **more}


def curvkit(*arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
