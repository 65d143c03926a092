"""Torch files: own reader against torch's, archives and storages that claim what is not there, damage, and trust."""

from __future__ import annotations

import argparse
import collections
import io
import os
import re
import struct
import subprocess
import sys
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import normal
from samples import Payload, environment, flipped, legacy, net, rewritten
from torch import Tensor, nn
from torch_samples import START, archive, exported, old, state_dict, storage, tensor, text, torchscript

from curvkit.checkpoints import read
from curvkit.checkpoints.reading import load
from curvkit.checkpoints.skeleton import read_skeleton
from curvkit.checkpoints.trust import Trust
from curvkit.checkpoints.trusted import can_be_allowed
from curvkit.errors import InvalidArgument, RefusedCheckpoint

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)

NEW = ("torch.uint16", "torch.uint32", "torch.uint64", "torch.float8_e4m3fn", "torch.float8_e5m2")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckpt.pt"


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(RefusedCheckpoint) as caught:
        read(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def bits(value: Tensor) -> list[int]:
    flat = torch.empty(value.shape, dtype=value.dtype).copy_(value).reshape(-1)
    return flat.view(torch.uint8).tolist()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        alike = isinstance(b, Tensor) and (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        return alike and bits(a) == bits(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- parity with torch.load -----------------------------------------------------------------------------------------


def contents() -> dict[str, Any]:
    base, model = normal(6, 4).float(), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1))
    model(base).square().sum().backward()
    optimizer.step()
    marked = base.clone()
    marked.note = "an attribute of its own"
    return {
        "views": {"a": base, "b": base.t(), "c": base[2:4], "d": base[:, 1], "e": base.expand(2, 6, 4), "f": base[:0]},
        "parameters": {"p": nn.Parameter(base), "q": nn.Parameter(base, requires_grad=False), "b": nn.Buffer(base)},
        "an attribute": {"x": marked, "p": nn.Parameter(marked)},
        "training dict": {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        },
        "plain": {"a": [1, 2.5, None, True, "x", b"ab", 1 + 2j, torch.Size([2]), -5, 10**12], "t": ()},
        "memory format": {"x": normal(2, 3, 4, 5).to(memory_format=torch.channels_last)},
        "list": [base, (base[0], {"x": base[1]})],
        "one number": {"s": base[0, 0], "i": torch.tensor(3)},
        **{
            str(dtype): {"w": torch.tensor([[0, 1, 2], [3, 1, 0]]).to(dtype), "s": torch.ones(()).to(dtype)}
            for dtype in DTYPES
        },
    }


@pytest.mark.parametrize("name", contents())
@pytest.mark.parametrize("way", ["zip", "legacy", "protocol 4", "protocol 5"])
def test_our_reader_gives_what_torch_gives(path: Path, name: str, way: str):
    """Oracle: torch's own reader; for protocols that its restricted one does not know, the content that was written."""
    content = contents()[name]
    options = {"legacy": {"_use_new_zipfile_serialization": False}, "zip": {}}
    torch.save(content, path, **options.get(way, {"pickle_protocol": int(way[-1]) if way[-1].isdigit() else 2}))
    expected = content
    known = way == "zip" or (
        way == "legacy" and name not in NEW
    )  # torch writes old files with new types that it cannot read
    if known:
        expected = torch.load(path, weights_only=True)
    assert same(load(path), expected)


def test_tensors_that_share_memory_still_do(path: Path):
    base = normal(4).float()
    torch.save({"a": base, "b": base, "c": base[1:3]}, path)
    found = load(path)
    found["a"][1] = 7.0
    assert found["b"][1] == found["c"][0] == 7.0


def test_numbers_of_the_other_byte_order(path: Path):
    """Written as a machine with the big end first would: the bytes of every number turned, and the record that says so."""
    content = {
        "w": normal(3).float(),
        "z": torch.tensor([1 + 2j]),
        "i": torch.tensor([1, -2]),
        "b": torch.tensor([True]),
    }
    torch.save(content, path)
    widths = {"data/0": 4, "data/1": 4, "data/2": 8, "data/3": 1}

    def turned(name: str, record: bytes) -> bytes:
        inner = name.partition("/")[2]
        if inner == "byteorder":
            return b"big"
        width = widths.get(inner)
        return record if width is None else np.frombuffer(record, np.uint8).reshape(-1, width)[:, ::-1].tobytes()

    rewritten(path, turned)
    assert same(load(path), content)
    assert same(load(path), torch.load(path, weights_only=True))


def test_an_unknown_byte_order(path: Path):
    torch.save({"w": torch.ones(2)}, path)
    rewritten(path, lambda name, content: b"middle" if name.endswith("byteorder") else content)
    assert "the record 'byteorder' says b'middle', neither little nor big. Take another copy." in refusal(path)


def test_a_file_without_checksums_is_read_and_said_to_be_one(path: Path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(net().state_dict(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as file:
        assert {record.CRC for record in file.infolist()} == {0}
    found = read(path)
    assert same(found.weights, dict(net().state_dict()))
    assert found.notes == ("this file was written without checksums: a flipped bit in it would not be noticed",)


def test_a_legacy_file_says_that_it_has_no_checksum(path: Path):
    legacy({"model": net().state_dict()}, path)
    found = read(path)
    assert found.notes == ("files of torch before 1.6 have no checksum: a flipped bit in it would not be noticed",)
    torch.save({"model": net().state_dict()}, path)
    assert read(path).notes == ()


def test_a_record_that_no_tensor_needs_is_verified_too(path: Path):
    torch.save({"model": net().state_dict(), "other": {"rng_state": torch.arange(100)}}, path)
    flipped(path, "ckpt/data/4")
    assert "the record 'ckpt/data/4' does not match its checksum" in refusal(path)


# ---- claims ---------------------------------------------------------------------------------------------------------

FOUR = bytes(16)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (
            tensor("0", 1, 0, (10**12,), (0,)),
            "the tensor 'w' claims 1,000,000,000,000 elements, but 4 bytes are stored",
        ),
        (tensor("0", 4, -1, (2,), (1,)), "a tensor in it has a shape, stride or offset that is no size"),
        (tensor("0", 4, 3, (2,), (-1,)), "a tensor in it has a shape, stride or offset that is no size"),
        (tensor("0", 4, 0, (-2,), (1,)), "a tensor in it has a shape, stride or offset that is no size"),
        (tensor("0", 4, 0, (2,), (1, 1)), "a tensor in it has a shape, stride or offset that is no size"),
        (tensor("0", 4, 0, (1,) * 65, (1,) * 65), "a tensor in it has a shape, stride or offset that is no size"),
        (tensor("0", 4, 0, (1 << 40, 1 << 40), (0, 0)), "a tensor in it has a shape, stride or offset that is no size"),
        (tensor("0", 4, 2, (3,), (1,)), "a tensor of shape (3,) reads outside its storage '0', which has 4 numbers"),
        (tensor("0", 4, 0, (2, 2), (3, 2)), "a tensor of shape (2, 2) reads outside its storage '0'"),
        (tensor("0", 400, 0, (400,), (1,)), "the storage '0' claims 1,600 bytes, but 16 bytes are stored"),
        (
            tensor("0", 1 << 60, 0, (1,), (1,)),
            "the storage '0' claims 4,611,686,018,427,387,904 bytes, but 16 bytes are",
        ),
        (tensor("7", 4, 0, (4,), (1,)), "a tensor refers to the record 'data/7', which is not in the archive"),
        (tensor("0", 4, stored=b"N"), "a tensor in it has no storage"),
        (tensor("0", 4, stored=storage("0", -4)), "one of its storages has no name or no size"),
        (
            tensor("0", 4, stored=storage("0", 4, "Event")),
            "storages are of the class 'torch.Event', which is none of torch's",
        ),
        (tensor("0", 4, stored=storage("0", 4).replace(b"ctorch\n", b"cnumpy\n")), "storages is of no class of torch"),
        (
            tensor("0", 4, stored=storage("0", 4, view=b"K\x01")),
            "it has a view of a storage, as only very old versions",
        ),
        (
            tensor("0", 4, 0, (4,), (1,), metadata=b"}" + text("conj") + b"\x88s"),
            "conjugated or negated lazily: save it",
        ),
    ],
)
def test_claims_that_the_file_does_not_hold(path: Path, claim: bytes, said: str):
    records = bytes(4) if "but 4 bytes" in said else FOUR
    assert said in refusal(archive(path, state_dict(w=claim), _0=records))


def test_the_largest_claim_in_the_smallest_file(path: Path):
    torch.save({"model": {"w": torch.ones(1).expand(10**12)}, "optimizer": {"param_groups": [], "state": {}}}, path)
    assert path.stat().st_size < 2000
    assert "the tensor 'w' claims 1,000,000,000,000 elements" in refusal(path)
    state = {0: {"exp_avg": torch.zeros(1).expand(10**12)}}
    torch.save({"model": {"w": torch.ones(1)}, "optimizer": {"param_groups": [], "state": state}}, path)
    assert "the tensor \"optimizer['state'][0]['exp_avg']\" claims 1,000,000,000,000" in refusal(path).replace("\\", "")


def test_weights_that_share_a_part_of_their_numbers(path: Path):
    base = torch.arange(6.0)
    torch.save({"a": base[:4], "b": base[2:]}, path)
    assert "the tensors 'a' and 'b' share a part of their numbers, so that copies of them would need more" in refusal(
        path
    )
    torch.save({"a": base[:3], "b": base[3:], "c": base[:3]}, path)
    assert [t.tolist() for t in read(path).weights.values()] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


def test_truth_values_are_zero_or_one(path: Path):
    claim = tensor("0", 4, 0, (4,), (1,), stored=storage("0", 4, "BoolStorage"))
    assert "a tensor of truth values has bytes other than 0 and 1" in refusal(
        archive(path, state_dict(w=claim), _0=b"\x00\x01\x02\x00")
    )


def test_content_that_is_nested_without_end(path: Path):
    deep: list[Any] = []
    for _ in range(150):
        deep = [deep]
    torch.save({"model": net().state_dict(), "log": deep}, path)
    assert same(read(path).weights, dict(net().state_dict()))  # what is not needed is not walked
    with pytest.raises(RefusedCheckpoint, match="its content is nested more than 100 levels deep, which no training"):
        load(path)


@pytest.mark.parametrize(
    ("numel", "tail", "said"),
    [
        (2, struct.pack("<q", 2) + bytes(8), None),
        (10**12, struct.pack("<q", 10**12) + bytes(8), "it is cut short: 264 bytes, where 4,000,000,000,256 belong"),
        (2, struct.pack("<q", 3) + bytes(12), "its storage '0' is not of the size that its tensors need"),
        (2, struct.pack("<q", 2) + bytes(9), "it goes on after its last storage: 265 bytes, where 264 belong"),
        (2, b"\x02", "its storage '0' is not of the size that its tensors need"),
    ],
)
def test_old_files_that_claim_what_they_do_not_hold(path: Path, numel: int, tail: bytes, said: str | None):
    claim = state_dict(w=tensor("0", numel, 0, (2,), (1,), stored=storage("0", numel, view=b"N")))
    old(path, claim, b"]" + text("0") + b"a", tail)
    if said is None:
        assert read(path).weights["w"].tolist() == [0, 0]
    else:
        assert re.sub(r"\d+", "N", said) in re.sub(r"\d+", "N", refusal(path))


def test_an_old_file_without_its_storages(path: Path):
    claim = state_dict(w=tensor("0", 2, 0, (2,), (1,), stored=storage("0", 2, view=b"N")))
    assert "it does not list the storages that its tensors refer to" in refusal(old(path, claim, b"]", b""))
    content = old(path, claim, b"]", b"").read_bytes()
    path.write_bytes(content.replace(b"M\xe9\x03", b"M\xe8\x03"))
    assert "it does not begin as torch begins its files" in refusal(path)


# ---- archives -------------------------------------------------------------------------------------------------------


def test_a_record_twice(path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w") as file:
            for content in (b"a", b"b"):
                file.writestr("a/data.pkl", content)
    assert "the record 'a/data.pkl' is there twice. Write the checkpoint again with torch.save." in refusal(path)


@pytest.mark.parametrize("name", ["a/data/../../x", "/etc/x", "a\\x", "a/\x1b[2J"])
def test_records_with_names_of_paths(path: Path, name: str):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"")
        file.writestr(name, b"")
    assert "has the name of a path outside the archive." in refusal(path)


def test_two_outlines(path: Path):
    with zipfile.ZipFile(path, "w") as file:
        for name in ("a/data.pkl", "b/data.pkl"):
            file.writestr(name, b"")
    assert "the archive has 2 records called data.pkl; torch.save writes one. Pass the checkpoint itself." in refusal(
        path
    )


def patched(path: Path, entry: int, offset: int, value: bytes) -> None:
    """Change a field of an entry in the directory of an archive."""
    content = bytearray(path.read_bytes())
    position = -1
    for _ in range(entry + 1):
        position = content.index(b"PK\x01\x02", position + 1)
    content[position + offset : position + offset + len(value)] = value
    path.write_bytes(content)


def test_records_that_overlap(path: Path):
    archive(path, state_dict(w=tensor("0", 4, 0, (4,), (1,))), _0=FOUR)
    size = struct.pack("<II", 500, 500)
    patched(path, 0, 20, size)
    assert "the records 'a/data.pkl' and 'a/data/0' overlap in the file, which torch.save never writes." in refusal(
        path
    )


def test_a_record_that_is_larger_than_the_file(path: Path):
    archive(path, state_dict(w=tensor("0", 4, 0, (4,), (1,))), _0=FOUR)
    patched(path, 1, 20, struct.pack("<II", 1 << 30, 1 << 30))
    assert "the record 'a/data/0' claims 1,073,741,808 bytes more than the file has." in refusal(path)


@pytest.mark.parametrize(
    ("entry", "said"), [(0, "has another name in its own header"), (1, "has no header of its own")]
)
def test_headers_that_disagree(path: Path, entry: int, said: str):
    archive(path, state_dict(w=tensor("0", 4, 0, (4,), (1,))), _0=FOUR)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x03\x04", entry) + (0 if entry else 30)] ^= 1
    path.write_bytes(content)
    assert f"{said})" in refusal(path)


def test_a_file_that_is_written_to_while_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch):
    from curvkit.checkpoints.archive import Archive

    torch.save(net().state_dict(), path)
    verify = Archive.verify

    def touched(self: Archive) -> None:
        verify(self)
        os.utime(path, (1, 1))

    monkeypatch.setattr(Archive, "verify", touched)
    assert "the file was written to while it was read. Wait until it is complete, then try again." in refusal(path)


def test_a_file_that_becomes_shorter_while_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch):
    from curvkit.checkpoints.archive import Archive

    torch.save({"w": torch.ones(300_000)}, path)
    outline = Archive.outline

    def cut(self: Archive) -> bytes:
        found = outline(self)
        os.truncate(path, 2000)
        return found

    monkeypatch.setattr(Archive, "outline", cut)
    assert "the file became shorter while it was read. Wait until it is written, then try again." in refusal(path)


def test_a_file_that_is_deleted_while_it_is_read_is_read(path: Path, monkeypatch: pytest.MonkeyPatch):
    from curvkit.checkpoints.archive import Archive

    torch.save(net().state_dict(), path)
    outline = Archive.outline

    def rotated(self: Archive) -> bytes:
        path.unlink()
        return outline(self)

    monkeypatch.setattr(Archive, "outline", rotated)
    assert same(read(path).weights, dict(net().state_dict()))


# ---- kinds that are refused by name ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: {"w": torch.eye(2).to_sparse()}, "refused, it holds sparse tensors: save them with .to_dense()."),
        (
            lambda: {"w": torch.ones(2, device="meta")},
            "it holds tensors of the meta device, whose numbers were never saved",
        ),
        (
            lambda: {"layer.qweight": torch.ones(2), "layer.scales": torch.ones(2)},
            "the weights are quantised ('layer.qweight')",
        ),
        (
            lambda: {"l.weight": torch.ones(2), "l.weight.absmax": torch.ones(2)},
            "the weights are quantised ('l.weight.absmax')",
        ),
        (lambda: {"_fsdp_wrapped_module._flat_param": torch.ones(2)}, "the part that one process of FSDP held"),
        (lambda: {"w": torch.ones(2, dtype=torch.complex64).conj()}, "conjugated or negated lazily"),
    ],
)
def test_tensors_that_have_no_curvature(path: Path, content: Any, said: str):
    torch.save(content(), path)
    assert said in refusal(path)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32])
@pytest.mark.parametrize("old", [False, True])
def test_quantised_tensors(path: Path, dtype: torch.dtype, old: bool):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that they will move to torchao
        content = {"w": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, dtype)}
        torch.save(content, path, _use_new_zipfile_serialization=not old)
    assert "refused, it holds quantised weights, which have no curvature of their own: pass the checkpoint" in refusal(
        path
    )


class Arguments:
    def __init__(self) -> None:
        self.lr = 0.1


def test_a_pickle_without_any_tensor_is_no_model(path: Path):
    """As training_args.bin of the Trainer, which people pass by mistake."""
    torch.save(Arguments(), path)
    said = refusal(path)
    assert (
        f"not a checkpoint of a model: it holds no tensor, and refers to {Arguments.__module__}.Arguments, which loading"
        in said
    )


# ---- trust ----------------------------------------------------------------------------------------------------------


def test_a_class_of_the_users_can_be_allowed(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "mytrain.py").write_text("class Config:\n    pass\ndef make(*a):\n    raise SystemExit(9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import mytrain  # type: ignore[import-not-found]

    torch.save({"model": net().state_dict(), "config": mytrain.Config()}, path)
    del sys.modules["mytrain"]
    said = refusal(path)
    assert said.endswith("If these classes are yours: --allow mytrain.Config")
    assert "mytrain" not in sys.modules
    before = set(torch.serialization.get_safe_globals())
    assert same(read(path, trust=Trust(classes=("mytrain.Config",))).weights, dict(net().state_dict()))
    assert set(torch.serialization.get_safe_globals()) == before
    del sys.modules["mytrain"]
    assert "it refers to mytrain.Config" in refusal(path, trust=Trust(classes=("mytrain.Other",)))
    assert "mytrain" not in sys.modules


def test_what_a_script_has_allowed_itself_stays_allowed(path: Path):
    torch.save({"model": net().state_dict(), "args": argparse.Namespace(), "x": Arguments()}, path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        read(path, trust=Trust(classes=(f"{Arguments.__module__}.Arguments",)))
        assert {g for g in torch.serialization.get_safe_globals() if not isinstance(g, tuple)} == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "os.system",
            "--allow os.system: not the full name of a class of yours. Write package.module.Class; modules that",
        ),
        (
            "__main__.Config",
            "--allow __main__.Config: __main__ was the script that wrote the file, and its classes cannot",
        ),
        ("nowhere.Config", "--allow nowhere.Config: cannot be imported from"),
        ("argparse.Nothing", "--allow argparse.Nothing: cannot be imported from"),
        ("json.loads", "--allow json.loads: it is no class, and a file that may call it could run anything."),
    ],
)
def test_names_that_cannot_be_allowed(path: Path, name: str, said: str):
    module, attribute = name.split(".")
    pickle = (
        START
        + b"}"
        + text("w")
        + tensor("0", 4, 0, (4,), (1,))
        + b"s"
        + text("x")
        + f"c{module}\n{attribute}\n".encode()
        + b"s."
    )
    archive(path, pickle, _0=FOUR)
    with pytest.raises(InvalidArgument, match=re.escape(said)):
        read(path, trust=Trust(classes=(name,)))


def test_names_that_are_not_offered():
    assert can_be_allowed("train.models.Config")
    assert not any(map(can_be_allowed, ("os.system", "builtins.eval", "__main__.A", "a", "a b.C", "posix.system")))


def test_a_payload_runs_with_trust_and_not_with_a_class(path: Path):
    marker = path.with_name("executed")
    torch.save({"model": net().state_dict(), "x": Payload(marker)}, path)
    assert "Nothing was executed" in refusal(path, trust=Trust(classes=("train.Config",)))
    assert not marker.exists()
    read(path, trust=Trust(everything=True))
    assert marker.exists()


@pytest.mark.parametrize("place", ["alone", "in a dict"])
def test_a_trusted_model_gives_its_weights(path: Path, place: str):
    model = net()
    torch.save(model if place == "alone" else {"model": model, "step": 3}, path)
    found = read(path, trust=Trust(everything=True))
    assert same(found.weights, dict(model.state_dict()))
    assert found.step == (None if place == "alone" else 3)


@pytest.mark.parametrize("make", [torchscript, exported])
def test_a_trusted_program_gives_its_weights(tmp_path: Path, make: Any):
    path = tmp_path / "model.pt2"
    make(path)
    found = read(path, trust=Trust(everything=True))
    assert {name: tuple(t.shape) for name, t in found.weights.items()} == {"weight": (2, 2), "bias": (2,)}


def test_trust_does_not_make_a_file_readable_whose_code_is_not_there(path: Path):
    pickle = START + b"}" + text("w") + tensor("0", 4, 0, (4,), (1,)) + b"s" + text("x") + b"cnowhere\nThing\ns."
    archive(path, pickle, _0=FOUR)
    assert "trusted, but it cannot be loaded (" in refusal(path, trust=Trust(everything=True))


def test_a_damaged_file_is_refused_with_trust_too(path: Path):
    torch.save({"model": net(), "epoch": 3}, path)
    flipped(path, "ckpt/data/0")
    assert "does not match its checksum" in refusal(path, trust=Trust(everything=True))


def test_trusted_tensors_are_checked_as_well(path: Path):
    torch.save({"model": {"w": torch.ones(1).expand(10**12)}, "x": Arguments()}, path)
    trust = Trust(everything=True)
    assert "the tensor 'w' claims 1,000,000,000,000 elements, but 4 bytes are stored" in refusal(path, trust=trust)
    torch.save({"model": {"w": torch.eye(2).to_sparse()}, "x": Arguments()}, path)
    assert "the tensor 'w' is of the layout torch.sparse_coo. Save it with .to_dense()." in refusal(path, trust=trust)
    torch.save({"model": {"w": torch.ones(2, device="meta")}, "x": Arguments()}, path)
    assert "the tensor 'w' is of the meta device: its numbers were never saved." in refusal(path, trust=trust)


# ---- the outline ----------------------------------------------------------------------------------------------------


def test_a_skeleton_knows_names_and_places(path: Path):
    torch.save(
        {"model": net().state_dict(), "args": argparse.Namespace(a=1), "log": collections.OrderedDict(x=1)}, path
    )
    found = read_skeleton(path)
    assert found.content["model"]["inner.weight"].shape == (6, 4)
    assert found.content["args"].state == {"a": 1}
    assert found.sizes == {"0": 96, "1": 24, "2": 72, "3": 12}
    assert "argparse.Namespace" in found.globals


def test_a_skeleton_of_a_pickled_model_imports_nothing(path: Path):
    module = types.ModuleType("vanished")
    exec("import torch\nclass Model(torch.nn.Linear):\n    pass", module.__dict__)
    sys.modules["vanished"] = module
    module.Model.__module__ = "vanished"
    torch.save(module.Model(2, 3), path)
    del sys.modules["vanished"]
    assert "vanished.Model" in read_skeleton(path).globals
    assert "vanished" not in sys.modules


def test_items_in_memory_can_be_read_as_well(path: Path):
    from curvkit.checkpoints.archive import Archive

    buffer = io.BytesIO()
    torch.save({"w": torch.ones(3)}, buffer)
    assert Archive(path, buffer).sizes == {"0": 12}


def test_a_record_that_is_larger_than_its_kind_can_be(path: Path):
    torch.save({"w": torch.ones(2)}, path)
    rewritten(path, lambda name, content: content * 10 if name.endswith("byteorder") else content)
    assert "the record 'ckpt/byteorder' has 60 bytes, where at most 16 belong. Write the checkpoint again" in refusal(
        path
    )


def test_shapes_of_nothing(path: Path):
    claim = tensor("0", 4, 0, (1 << 61, 1 << 61, 0), (1, 1, 1))
    assert "a tensor of shape (2305843009213693952, 2305843009213693952, 0) cannot be made (numel: integer" in refusal(
        archive(path, state_dict(w=claim), _0=FOUR)
    )


SMALL = """
import resource, sys
from pathlib import Path
from curvkit.checkpoints import read
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
read(Path(sys.argv[1]))
"""


def test_more_numbers_than_memory(path: Path):
    with torch.serialization.skip_data():
        torch.save({"w": torch.empty(2_000_000_000)}, path)
    done = subprocess.run(
        [sys.executable, "-c", SMALL, str(path)], env=environment(), capture_output=True, text=True, check=False
    )
    path.unlink()
    assert "not enough memory for a tensor of 8,000,000,000 bytes. Use a machine with more memory." in done.stderr


# ---- files of torch in a directory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt"])
def test_claims_of_a_file_in_a_directory_are_checked(tmp_path: Path, name: str):
    torch.save(net().state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    claim = {"w": torch.zeros(1).expand(5 * 10**8)}
    torch.save(claim if name.endswith("bin") else {"state": {0: claim}, "param_groups": []}, tmp_path / name)
    assert (tmp_path / name).stat().st_size < 6_000
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path / name}: the tensor ")
    assert "claims 500,000,000 elements, but 4 bytes are stored. Such a file would fill the memory" in said


def test_trust_reaches_the_files_of_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "dirtrain.py").write_text("class Config: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import dirtrain  # type: ignore[import-not-found]

    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    torch.save(net().state_dict(), path / "pytorch_model.bin")
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1).state_dict()
    torch.save({**optimizer, "config": dirtrain.Config(), "t": torch.ones(1)}, path / "optimizer.pt")
    found = read(path)
    assert same(found.weights, dict(net().state_dict()))  # which do not need the optimizer
    assert found.optimizer is None
    (note,) = (note for note in found.notes if note.startswith("the optimizer's state was not read: "))
    assert f"{path / 'optimizer.pt'}: refused" in note
    assert note.endswith("--allow dirtrain.Config")
    for trust in (Trust(classes=("dirtrain.Config",)), Trust(everything=True)):
        found = read(path, trust=trust)
        assert found.lr == [0.1]
        assert not any("optimizer" in note for note in found.notes)
    (path / "optimizer.pt").write_bytes((path / "optimizer.pt").read_bytes()[:-100])
    assert "optimizer.pt: " in refusal(path)  # damage stays a refusal
    (path / "optimizer.pt").unlink()
    torch.save(net(), path / "pytorch_model.bin")
    assert "pytorch_model.bin: refused, a whole pickled model" in refusal(path)
    assert same(read(path, trust=Trust(everything=True)).weights, dict(net().state_dict()))
