"""Checkpoints of torch.distributed.checkpoint: of one process, of two, and with pieces laid out by hand in torch's own classes."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from samples import environment
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Block = tuple[Sequence[int], Sequence[int]]


def saved(content: dict[str, Any], path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of there being one process
        dcp.save(content, checkpoint_id=path)
    return path


def loaded(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """What torch itself reads into the given tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(content, checkpoint_id=path)
    return content


def stream(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


class Pieces:
    """A checkpoint put together piece by piece; every detail can be made wrong."""

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, {"__0_0.distcp": b""}
        self.metadata = Metadata({}, planner_data={}, storage_data={})

    def place(self, index: MetadataIndex, content: bytes, file: str = "__0_0.distcp") -> None:
        before = self.files.get(file, b"")
        self.files[file] = before + content
        self.metadata.storage_data[index] = _StorageInfo(file, len(before), len(content))

    def tensor(self, name: str, whole: torch.Tensor, blocks: Sequence[Block], dtype: Any = None) -> None:
        chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in blocks]
        properties = TensorProperties(dtype=dtype or whole.dtype)
        self.metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, whole.shape, chunks)
        self.metadata.planner_data[name] = tuple(name.split("."))
        for number, (offsets, sizes) in enumerate(blocks):
            part = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].clone()
            self.place(MetadataIndex(name, offsets), stream(part), f"__{number}_0.distcp")

    def value(self, name: str, value: Any) -> None:
        self.metadata.state_dict_metadata[name] = BytesStorageMetadata()
        self.metadata.planner_data[name] = (name,)
        self.place(MetadataIndex(name), stream(value))

    def write(self) -> Path:
        self.path.mkdir(exist_ok=True)
        for name, content in self.files.items():
            (self.path / name).write_bytes(content)
        (self.path / ".metadata").write_bytes(pickle.dumps(self.metadata))
        return self.path


PROCESSES = """
import os, sys, time, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp, torch.multiprocessing as mp
from pathlib import Path
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

def trained(wrap):
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(4, 3).double()).sum().backward()
    optimizer.step()
    return model, optimizer

def work(rank, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(str(out / "store"), 2))
    mesh = init_device_mesh("cpu", (2,))
    model, optimizer = trained(lambda model: fully_shard(model, mesh=mesh))
    weights, state = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": state, "step": 5}
    dcp.save(content, checkpoint_id=out / "fsdp2")
    dcp.save(content, storage_writer=dcp.FileSystemWriter(out / "alone"), use_collectives=False)
    dcp.save({"model": weights}, checkpoint_id=out / "accelerate" / "pytorch_model_fsdp_0")
    dcp.save({"optimizer": state}, checkpoint_id=out / "accelerate" / "optimizer_0")
    whole = StateDictOptions(full_state_dict=True)
    weights, state = get_state_dict(model, optimizer, options=whole)
    if rank == 0:
        torch.save({"model": weights, "optimizer": state}, out / "full.pt")
    w = torch.arange(48.0).reshape(6, 8)
    spread = {"columns": [Shard(1)], "rows": [Shard(0)], "copies": [Replicate()]}
    content = {name: distribute_tensor(w, mesh, how) for name, how in spread.items()}
    content["short"] = distribute_tensor(torch.ones(1), mesh, [Shard(0)])  # nothing is left for the second process
    dcp.save(content, checkpoint_id=out / "tensors")
    model, optimizer = trained(lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True))
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        content = {"model": model.state_dict(), "optimizer": FullyShardedDataParallel.optim_state_dict(model, optimizer)}
        dcp.save(content, checkpoint_id=out / "fsdp1")
    leave(out, rank)

def leave(out, rank):
    # both end when both are done, and without what runs at the end of a process: threads of gloo that meet a closed connection abort it
    (out / f"done{rank}").touch()
    deadline = time.monotonic() + 60
    while not all((out / f"done{other}").exists() for other in range(2)):
        if time.monotonic() > deadline:
            raise TimeoutError("the other process did not finish")
        time.sleep(0.01)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

if __name__ == "__main__":
    mp.spawn(work, (Path(sys.argv[1]),), nprocs=2)
"""


def of_two_processes(out: Path) -> Path:
    script = out / "write.py"
    script.write_text(PROCESSES)
    command = [sys.executable, str(script), str(out)]
    done = subprocess.run(command, env=environment(), check=False, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out
