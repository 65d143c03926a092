"""Mutated files of torch: whatever the bytes, the outcome is a checkpoint or one of our refusals, and a flipped number is found."""

from __future__ import annotations

import argparse
import collections
import io
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import environment, net
from torch import nn

from curvkit import save
from curvkit.checkpoints import inspect, read
from curvkit.errors import RefusedCheckpoint, UnknownObjective

OPCODES = b"\x00\x01\xff\x7f\x80(.}]tRQqhrjcX\x8a\x93\x94\x81\x85\x86\x87bseua02KMJGN\x88\x89)"
MEMORY = 8 << 30
"""Bytes of address space: a file that asked for more would raise MemoryError, which is not one of our errors."""


def sources(folder: Path) -> list[bytes]:
    """One file of every kind that torch writes, each with what training scripts put beside the weights."""
    path = folder / "source.pt"
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    training = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    beside = {"args": argparse.Namespace(a=1, p=Path("x")), "best": np.float64(1), "step": torch.tensor(3)}
    lightning = {
        "state_dict": model.state_dict(),
        "pytorch-lightning_version": "2",
        "hyper_parameters": {"a": 1},
        "optimizer_states": [optimizer.state_dict()],
    }
    made = []
    for content, options in (
        (model.state_dict(), {}),
        ({**training, **beside}, {}),
        (training, {"_use_new_zipfile_serialization": False}),
        (lightning, {"pickle_protocol": 4}),
        ({"model": nn.DataParallel(model).state_dict(), "model_args": {"n_layer": 1}, "iter_num": 3}, {}),
        (model, {}),
        ({"w": torch.arange(3).to(torch.uint16), "s": {1, 2}, "x": torch.ones(3)}, {"pickle_protocol": 5}),
    ):
        torch.save(content, path, **options)
        made.append(path.read_bytes())
    save(path, model=model, optimizer=optimizer, step=2)
    made.append(path.read_bytes())
    path.unlink()
    return made


def outline_of(content: bytes) -> tuple[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        return name, archive.read(name)


def with_outline(content: bytes, outline: bytes) -> bytes:
    """The archive with another pickle in it, and right checksums."""
    name, _ = outline_of(content)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(made, "w") as changed:
        for record in archive.infolist():
            changed.writestr(record.filename, outline if record.filename == name else archive.read(record.filename))
    return made.getvalue()


def mutated(draws: random.Random, content: bytes, other: bytes) -> bytes:
    changed, kind = bytearray(content), draws.random()
    first, last = sorted(draws.sample(range(len(changed) + 1), 2))
    if kind < 0.45:
        for _ in range(draws.choice((1, 1, 2, 3, 10, 40))):
            at, way = draws.randrange(len(changed)), draws.random()
            bit = changed[at] ^ 1 << draws.randrange(8)
            changed[at] = bit if way < 0.4 else draws.choice(OPCODES) if way < 0.7 else draws.randrange(256)
    elif kind < 0.6:  # cut
        del changed[draws.randrange(len(changed)) :]
    elif kind < 0.75:  # cut out
        del changed[first:last]
    elif kind < 0.9:  # splice
        start = draws.randrange(len(other))
        at = draws.randrange(len(changed))
        changed[at:at] = other[start : start + draws.choice((4, 20, 200, 5000))]
    else:  # repeat
        changed[last:last] = changed[first:last] * draws.choice((1, 4))
    return bytes(changed)


def mutations(count: int, seed: int, folder: Path) -> Iterator[bytes]:
    draws, originals = random.Random(seed), sources(folder)
    for _ in range(count):
        content, other = draws.choice(originals), draws.choice(originals)
        if content.startswith(b"PK") and draws.random() < 0.6:
            inner = outline_of(other)[1] if other.startswith(b"PK") else other
            yield with_outline(content, mutated(draws, outline_of(content)[1], inner))
        else:
            yield mutated(draws, content, other)


def outcomes(count: int, seed: int, folder: Path) -> collections.Counter[str]:
    """How reading and inspecting mutated files ended; anything but a result or a refusal is raised."""
    path, found = folder / "mutated.pt", collections.Counter[str]()
    for content in mutations(count, seed, folder):
        path.write_bytes(content)
        for look in (read, inspect):
            try:
                look(path)
                found[f"{look.__name__}: opened"] += 1
            except (RefusedCheckpoint, UnknownObjective) as error:
                found[f"{look.__name__}: {type(error).__name__}"] += 1
        assert [p.name for p in folder.iterdir()] == ["mutated.pt"]
    return found


def checked(found: collections.Counter[str], count: int) -> None:
    assert sum(found.values()) == 2 * count
    assert min(found["read: opened"], found["inspect: opened"]) > count / 100  # some mutations do no harm
    assert found["read: RefusedCheckpoint"] > count / 2


def test_mutated_files_are_refused_or_read(tmp_path: Path):
    checked(outcomes(1000, 0, tmp_path), 1000)


PROGRAM = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from test_mutations import MEMORY, outcomes
resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
print(json.dumps(outcomes(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
"""


def in_a_process(count: int, seed: int, folder: Path) -> collections.Counter[str]:
    """With little memory to take, and a process of its own to lose."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(count), str(seed), str(folder), str(Path(__file__).parent)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return collections.Counter(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_ten_thousand_mutated_files(tmp_path: Path, seed: int):
    checked(in_a_process(2000, seed, tmp_path), 2000)


@pytest.mark.parametrize("bit", [0, 7])
def test_every_flipped_byte_of_a_stored_tensor_is_found(tmp_path: Path, bit: int):
    """Oracle: torch reads each of these files without a word, and gives other weights."""
    path = tmp_path / "ckpt.pt"
    torch.save(net().state_dict(), path)
    content = path.read_bytes()
    unnoticed = 0
    for name, tensor in net().state_dict().items():
        start = content.index(bytes(tensor.reshape(-1).view(torch.uint8).tolist()))
        for position in range(start, start + tensor.nbytes, 7):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(RefusedCheckpoint, match="does not match its checksum"):
                read(path)
            unnoticed += not torch.equal(torch.load(path, weights_only=True)[name], tensor)
    assert unnoticed == sum(len(range(0, t.nbytes, 7)) for t in net().state_dict().values())


def test_a_flipped_byte_in_an_old_file_is_not_found_and_said_not_to_be(tmp_path: Path):
    path = tmp_path / "ckpt.pt"
    torch.save(net().state_dict(), path, _use_new_zipfile_serialization=False)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    found: Any = read(path)
    assert any("no checksum" in note for note in found.notes)


def test_the_limit_of_memory_would_be_noticed():
    """The guard of the runs above proves nothing unless it bites."""
    program = "import resource, torch; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)); torch.empty(1 << 36, dtype=torch.uint8)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert "can't allocate memory" in done.stderr
