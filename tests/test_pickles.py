"""Pickles as data: what Python and torch write is read, nothing is imported or called, and no form of them costs more than its length."""

from __future__ import annotations

import argparse
import collections
import datetime
import pickle
import re
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import normal

from curvkit.checkpoints.outline import outline
from curvkit.checkpoints.pickles import Made, NotPlain, Pickle

START = b"\x80\x02"
PLAIN = {
    "numbers": [0, -1, 255, 256, 65535, 65536, 2**31, -(2**40), 10**30, 1.5, float("inf"), True, False, None],
    "text": ["", "é", "a" * 300, "\ud800", b"", b"a" * 300, bytearray(b"ab")],
    "containers": {"a": [1, (2, (3, ())), [[]]], "b": {}, 3: {"c": (1, 2, 3, 4)}, ("g", 0): None, 1.5: [], b"k": 0},
    "dicts": [collections.OrderedDict(a=1), collections.Counter("aab"), collections.defaultdict(list, a=[1])],
    "complex": 1 + 2j,
    "size": torch.Size([2, 3]),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_python_writes_is_read(name: str, protocol: int):
    assert outline(pickle.dumps(PLAIN[name], protocol)).content == PLAIN[name]


@pytest.mark.parametrize("protocol", [2, 4])
def test_sets_become_lists(protocol: int):
    assert sorted(outline(pickle.dumps({1, 2, 3}, protocol)).content) == [1, 2, 3]
    assert sorted(outline(pickle.dumps(frozenset("ab"), protocol)).content) == ["a", "b"]
    assert outline(pickle.dumps(collections.deque([1, 2], 5), protocol)).content == [1, 2]


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "i4", "u1", "b1", ">f8", ">i4"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_numbers_of_numpy_become_numbers(dtype: str, protocol: int):
    value = np.array([1]).astype(dtype)[0]
    found = outline(pickle.dumps(value, protocol)).content
    assert type(found) in (int, float, bool)
    assert found == value


def test_what_is_named_is_written_down_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "unheard.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    found = outline(START + b"cunheard\nThing\n)R.")
    assert found.globals == {"unheard.Thing"}
    assert isinstance(found.content, Made)
    assert found.content.full == "unheard.Thing"
    assert "unheard" not in sys.modules


def test_attributes_of_an_object_are_kept_as_data():
    made = outline(pickle.dumps(argparse.Namespace(lr=0.1, inner=argparse.Namespace(b=1)))).content
    assert made.full == "argparse.Namespace"
    assert made.state["lr"] == 0.1
    assert made.state["inner"].state == {"b": 1}
    assert outline(pickle.dumps(datetime.datetime(2024, 1, 2))).globals == {"datetime.datetime"}


def test_a_list_that_holds_itself():
    loop: list[Any] = [1]
    loop.append(loop)
    found = outline(pickle.dumps({"loop": loop})).content["loop"]
    assert found[1] is found


def test_what_is_shared_stays_shared():
    part = [1]
    found = outline(pickle.dumps([part, part])).content
    assert found[0] is found[1]


def number(value: int) -> bytes:
    return b"\x8a\x0c" + value.to_bytes(12, "little", signed=True)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "it ends too early"),
        (START, "it ends too early"),
        (START + b"X\xff\xff\xff\x7fab.", "it ends too early"),
        (START + b"]]", "it ends too early"),
        (START + b"(.", "malformed near byte 4"),
        (START + b".", "malformed near byte 3"),
        (START + b"a.", "malformed near byte 3"),
        (START + b"(K\x01e.", "malformed near byte 6"),
        (START + b"(q\x00.", "malformed near byte 5"),
        (START + b"K\x01K\x02a.", "malformed near byte 7"),
        (START + b"}K\x01s.", "malformed near byte"),
        (START + b"}(K\x01u.", "malformed near byte 7"),
        (START + b"h\x05.", "malformed near byte 4"),
        (START + b"ca\nb\nK\x01R.", "malformed near byte 10"),
        (START + b"X\x01\x00\x00\x00\xff.", "malformed near byte 8"),
        (START + b"I1\n.", "the bytes near 3 are none that torch writes"),
        (START + b"\x82\x01.", "the bytes near 3 are none that torch writes"),
        (b"\x80\x09.", "of a pickle protocol that torch never writes"),
        (START + b"K\x01K\x02\x93.", "a name in it is not text"),
        (START + b"c" + b"a" * 2000, "a name in it has no end"),
        (START + b"K\x01Q.", "it refers to something that is no storage"),
        (START + b"\x8b\x00\x10\x00\x00" + b"\x01" * 4096 + b".", "it has an integer of 4,096 bytes"),
        (START + b"}" + number(2**61) + b"K\x01s.", "a key of a dict in it is a int"),
        (START + b"}]K\x01s.", "a key of a dict in it is a list"),
        (START + b"})\x85\x85K\x01s.", "a key of a dict in it is a tuple"),
        (START + b"ccollections\nOrderedDict\nK\x01\x85R.", "a dict in it is made of something else"),
        (START + b"ccollections\nOrderedDict\n]K\x01a\x85R.", "a dict in it is made of something else"),
        (START + b"cbuiltins\nlist\nK\x01\x85R.", "a list in it is made of something else"),
        (START + b"c_codecs\nencode\nK\x01\x85R.", "bytes in it are written in an unknown way"),
        (START + b"cbuiltins\nbytearray\nK\x01\x85R.", "bytes in it are written in an unknown way"),
    ],
)
def test_what_is_no_pickle_of_torch(data: bytes, text: str):
    with pytest.raises(NotPlain, match=re.escape(text)):
        outline(data)


def test_a_persistent_id_needs_a_file_around_it():
    with pytest.raises(NotPlain, match="it refers to storages, which belong to a file of torch.save"):
        Pickle(START + b"K\x01Q.").load()


def nested(depth: int) -> bytes:
    return START + b"]" * depth + b"a" * (depth - 1) + b"."


def doubled(depth: int) -> bytes:
    """A tuple of itself twice, again and again: 2 ** depth parts, if anyone counts them."""
    value: Any = ()
    for _ in range(depth):
        value = (value, value)
    return pickle.dumps(value, 2)


def copied(times: int) -> bytes:
    """The same long list made into a dict again and again."""
    pairs = b"".join(struct.pack("<BiB", 0x4A, i, 0x4E) + b"\x86" for i in range(20_000))
    return START + b"](" + pairs + b"eq\x010](" + b"ccollections\nOrderedDict\nh\x01\x85R" * times + b"e."


def colliding(count: int) -> bytes:
    """Keys of one hash, into which each further one is inserted more slowly."""
    return START + b"}(" + b"".join(number(i * ((1 << 61) - 1)) + b"N" for i in range(1, count)) + b"u."


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (nested(300_000), None),
        (START + b")" + b"\x85" * 300_000 + b".", None),
        (doubled(200), None),
        (START + b"]r\xff\xff\xff\xff.", None),
        (copied(2000), "it copies the same container many times, to fill the memory"),
        (colliding(100_000), "a key of a dict in it is a int"),
    ],
    ids=["lists", "tuples", "doubled", "memo", "copied", "colliding"],
)
def test_bombs_cost_no_more_than_their_length(data: bytes, text: str | None):
    start = time.monotonic()
    if text is None:
        outline(data)
    else:
        with pytest.raises(NotPlain, match=text):
            outline(data)
    assert time.monotonic() - start < 5  # 0.3 s; a walk over 2**200 parts would not end


def test_tensors_are_described_and_not_read(tmp_path: Path):
    """Oracle: the tensors that were written."""
    base = normal(6, 4).float()
    content = {"whole": base, "turned": base.t(), "row": base[2], "column": base[:, 1], "none": base[:0]}
    torch.save(content, tmp_path / "a.pt", pickle_protocol=2)
    from curvkit.checkpoints.skeleton import read_skeleton

    found = read_skeleton(tmp_path / "a.pt").content
    for name, tensor in content.items():
        described = found[name]
        assert (described.shape, described.stride) == (tuple(tensor.shape), tensor.stride())
        assert described.offset == tensor.storage_offset()
        assert (described.dtype, described.numel, described.bytes) == ("float32", tensor.numel(), tensor.nbytes)
        assert described.storage_numel == 24
    assert len({described.storage_key for described in found.values()}) == 1
