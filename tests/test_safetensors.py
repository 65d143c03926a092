"""The safetensors format: what its library writes is read alike, and headers that lie are refused before a tensor is made."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from samples import environment, net

from curvkit.checkpoints.documents import brief, document, parsed
from curvkit.checkpoints.safetensors_file import DTYPES, header, read_tensors
from curvkit.errors import RefusedCheckpoint


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def written(path: Path, entries: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refusal(path: Path) -> str:
    with pytest.raises(RefusedCheckpoint) as caught:
        read_tensors(path)
    with pytest.raises(RefusedCheckpoint):
        header(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value).removeprefix(str(path))


# ---- what is read: the library that wrote the file is the oracle ------------------------------------------------------


def test_a_state_dict_is_read_as_its_library_reads_it(path: Path):
    save_file(net().state_dict(), path, metadata={"format": "pt"})
    found = read_tensors(path)
    assert found.keys() == net().state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in net().state_dict().items())
    assert dict(header(path).metadata) == {"format": "pt"}
    assert header(path).bytes == path.stat().st_size


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_keeps_its_bits(path: Path, dtype: str):
    name, width = DTYPES[dtype]
    kind = getattr(torch, name)
    bits = torch.arange(6 * width, dtype=torch.uint8)
    tensor = (bits[:6] % 2 if name == "bool" else bits).view(kind).reshape(2, 3)
    save_file({"w": tensor, "none": torch.empty(0, 4, dtype=kind), "one": tensor[0, 0].clone()}, path)
    found, expected = read_tensors(path), load_file(path)
    for key, value in expected.items():
        assert found[key].dtype is value.dtype is kind
        assert found[key].shape == value.shape
        assert torch.equal(found[key].flatten().view(torch.uint8), value.flatten().view(torch.uint8))
    stored = header(path).tensors["w"]
    assert (stored.dtype, stored.shape, stored.numel, stored.stop - stored.start) == (name, (2, 3), 6, 6 * width)


def test_the_header_alone_does_not_import_torch(path: Path):
    save_file(net().state_dict(), path)
    program = (
        "import sys; from pathlib import Path; from curvkit.checkpoints.safetensors_file import header; "
        "print(len(header(Path(sys.argv[1])).tensors), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "4 False\n"


def test_the_header_of_a_huge_file_is_read_at_once(path: Path):
    size = 5 << 30
    written(path, {"w": entry("F32", (size // 4,), (0, size))})
    os.truncate(path, path.stat().st_size + size)  # sparse: no disk is used
    assert header(path).tensors["w"].numel == size // 4


def test_tensors_have_memory_of_their_own(path: Path):
    save_file({"w": torch.ones(4)}, path)
    found = read_tensors(path)["w"]
    path.write_bytes(b"")  # a mapped file would take the process with it
    assert torch.equal(found, torch.ones(4))


# ---- what is refused -------------------------------------------------------------------------------------------------

TWO = {"a": entry(), "b": entry(offsets=(8, 16))}


@pytest.mark.parametrize(
    ("entries", "data", "said"),
    [
        (b"[]", b"", "holds a JSON array, where an object {...} belongs"),
        (b"null", b"", "holds a JSON null"),
        (b"3", b"", "holds a JSON number"),
        (b"true", b"", "holds a JSON truth value"),
        (b'"a"', b"", "holds a JSON string"),
        (b"", b"", "the safetensors header: is empty"),
        (b"{", b"", "the safetensors header: is not JSON"),
        (b"\xff\xfe{}", b"", "is not JSON ('utf-8' codec"),
        (b'{"a":' * 100_000, b"", "is not JSON (nested too deeply)"),
        (b'{"a":' + b"9" * 5000 + b"}", b"", "is not JSON (Exceeds the limit"),
        (b'{"a":1,"a":1}', b"", "the key 'a' is there twice"),
        ({"__metadata__": {"a": 1}}, b"", "its __metadata__ is not a table of strings"),
        ({"__metadata__": []}, b"", "its __metadata__ is not a table of strings"),
        ({"a": 1}, b"", "the entry of 'a' does not have exactly dtype, shape and data_offsets"),
        ({"a": {**entry(), "more": 1}}, bytes(8), "does not have exactly dtype, shape and data_offsets"),
        ({"a": entry("F4")}, bytes(8), "has the dtype 'F4'; BOOL, U8"),
        ({"a": entry([["F32"]])}, bytes(8), "has the dtype a list"),
        ({"a": entry(None)}, bytes(8), "has the dtype null"),
        ({"a": entry(shape=(-2,))}, bytes(8), "shape or data_offsets of 'a' are not sizes"),
        ({"a": entry(shape=(2.0,))}, bytes(8), "shape or data_offsets of 'a' are not sizes"),
        ({"a": entry(shape=(True, 2))}, bytes(8), "shape or data_offsets of 'a' are not sizes"),
        ({"a": entry(shape=[1] * 65)}, bytes(8), "shape or data_offsets of 'a' are not sizes"),
        ({"a": entry(shape=2)}, bytes(8), "shape or data_offsets of 'a' are not sizes"),
        ({"a": entry(offsets=(8, 0))}, bytes(8), "shape or data_offsets of 'a' are not sizes"),
        ({"a": entry(offsets=(0, 4, 8))}, bytes(8), "shape or data_offsets of 'a' are not sizes"),
        ({"a": entry(shape=(10**12,))}, bytes(8), "claims the shape (1000000000000,) of F32, but has 8 bytes"),
        ({"a": entry(shape=[2**62] * 64)}, bytes(8), "claims the shape (4611686018427387904, 46"),
        ({"a": entry(offsets=(8, 16))}, bytes(16), "the tensor 'a' leaves a hole before it"),
        ({"a": entry(), "b": entry()}, bytes(8), "the tensor 'b' overlaps the tensor before it"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "the tensor 'b' overlaps the tensor before it"),
        (TWO, bytes(20), "4 bytes follow the last tensor"),
        ({}, b"x", "1 bytes follow the last tensor"),
        (TWO, bytes(15), "is cut short: its header describes"),
    ],
)
def test_headers_that_lie(path: Path, entries: Any, data: bytes, said: str):
    assert said in refusal(written(path, entries, data))


def test_lengths_that_lie(path: Path):
    for content in (b"", b"\x00" * 7):
        path.write_bytes(content)
        assert "is cut short" in refusal(path)
    assert "its header alone needs 18,446,744,073,709,551,623" in refusal(written(path, b"{}", length=2**64 - 1))
    written(path, b"{}", length=100_000_001)
    os.truncate(path, 100_000_100)
    assert "claims 100,000,001 bytes, where the format allows 100,000,000" in refusal(path)


def test_a_pointer_of_git_lfs(path: Path):
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n")
    assert "a pointer of Git LFS, not the file itself" in refusal(path)
    assert refusal(path).endswith("git lfs pull")


def test_a_file_that_is_not_there_and_one_that_cannot_be_read(path: Path):
    assert "cannot be read (No such file or directory)" in refusal(path)
    path.mkdir()
    assert "cannot be read (Is a directory)" in refusal(path)


def test_a_shape_that_torch_cannot_hold(path: Path):
    written(path, {"a": entry(shape=[2**62, 2**62, 0], offsets=(0, 0))})
    with pytest.raises(RefusedCheckpoint, match="cannot be held"):
        read_tensors(path)


def test_truth_values_are_0_and_1(path: Path):
    written(path, {"a": entry("BOOL", (2,), (0, 2))}, b"\x01\x02")
    with pytest.raises(RefusedCheckpoint, match="is of truth values, but has bytes other than 0 and 1"):
        read_tensors(path)


def test_a_writer_at_work_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch):
    save_file({"w": torch.ones(20_000)}, path)  # more than is read ahead
    whole, empty = path.read_bytes(), torch.empty

    def meanwhile(content: bytes) -> Any:
        def act(*arguments: Any, **options: Any) -> torch.Tensor:
            writer = threading.Thread(target=path.write_bytes, args=(content,))
            writer.start()
            writer.join()
            os.utime(path, ns=(0, 0))
            return empty(*arguments, **options)

        return act

    monkeypatch.setattr(torch, "empty", meanwhile(whole[:-8]))
    with pytest.raises(RefusedCheckpoint, match="became shorter while it was read"):
        read_tensors(path)
    path.write_bytes(whole)
    monkeypatch.setattr(torch, "empty", meanwhile(whole))
    with pytest.raises(RefusedCheckpoint, match="was written to while it was read"):
        read_tensors(path)


def test_mutated_headers_are_refused_or_read_as_the_library_does(path: Path):
    """What is read is what the library reads; what the library refuses is refused."""
    save_file({**net().state_dict(), "b": torch.ones(3).bfloat16()}, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    read = 0
    for _ in range(1000):
        content = bytearray(whole)
        at = draw.randrange(size)
        if draw.random() < 0.6:
            content[at] ^= 1 << draw.randrange(8)
        elif draw.random() < 0.5:
            del content[draw.randrange(len(content)) :]
        else:
            content[at:at] = content[draw.randrange(size) :][: draw.randrange(40)]
        path.write_bytes(content)
        try:
            found = read_tensors(path)
        except RefusedCheckpoint:
            continue
        read += 1
        expected = load_file(path)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
            assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
    assert read > 50  # flips within names


def test_the_library_refuses_what_is_refused_here(path: Path):
    for entries, data in ((TWO, bytes(15)), (TWO, bytes(20)), ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12))):
        written(path, entries, data)
        with pytest.raises(SafetensorError):
            load_file(path)


# ---- JSON documents --------------------------------------------------------------------------------------------------


def test_documents(tmp_path: Path):
    path = tmp_path / "config.json"
    with pytest.raises(RefusedCheckpoint, match="config.json: cannot be read"):
        document(path)
    path.write_bytes(b"  \n")
    with pytest.raises(RefusedCheckpoint, match="config.json: is empty: it was cut short, is still being written"):
        document(path)
    os.truncate(path, (256 << 20) + 1)
    with pytest.raises(RefusedCheckpoint, match="268,435,457 bytes, where a JSON document of a checkpoint has at most"):
        document(path)
    assert parsed(b'{"a": {"b": 1}, "c": {"b": 1}}', "x") == {"a": {"b": 1}, "c": {"b": 1}}


def test_values_in_messages():
    shown = [brief(value) for value in (None, True, 1, 1.5, 10**30, "a" * 200, [[[]]], {"a": 1}, "\ud800\x1b[31m")]
    assert shown[:5] == ["null", "true", "1", "1.5", "a number of many digits"]
    assert shown[5] == f"'{'a' * 97}...'"
    assert shown[6:] == ["a list", "an object", r"'\ud800\x1b[31m'"]
