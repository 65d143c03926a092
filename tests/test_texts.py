"""The texts on a user's disk as ids, and ids as windows: what is read, and what is said of everything else."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from oracles import seeded
from tiny_models import VOCABULARY, binary, ids

from curvkit.errors import InvalidArgument, UnknownObjective
from curvkit.models import GPT
from curvkit.resolving import Request, TextData, texts
from curvkit.resolving.calibration import LOGITS_PER_BATCH, Shape, calibrate
from curvkit.resolving.language_model import LanguageModel
from curvkit.resolving.texts import NoTokenizer, Tokens, bundled_tokens, read_tokens


@dataclass(frozen=True)
class Letters:
    """One token per character, which is a real tokenizer, if a small one."""

    separator: int | None = 1
    mask: int | None = 2

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


def read(
    path: Path, tokenizer: Letters | None = Letters(), split: str | None = None, *, length: int = 4, count: int = 2
) -> list[int]:
    return read_tokens(TextData(path, split=split), tokenizer, length=length, count=count).ids.tolist()


def language(vocabulary: int = VOCABULARY, context: int | None = 32) -> LanguageModel:
    with seeded():
        return LanguageModel(GPT(1, 1, 2, 4, 3), "GPT", "causal", vocabulary, context)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["val.txt", "val.TXT", "notes.md", "corpus"])
def test_text(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes("\ufeffab\r\nc".encode())
    assert read(tmp_path / name) == [ord(c) for c in "ab\nc"]


def test_lines(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n\n{"text": "", "n": 1}\n{"text": "c"}')
    assert read(tmp_path / "a.jsonl") == [97, 98, 1, 1, 99]
    assert read(tmp_path / "a.jsonl", Letters(separator=None)) == [97, 98, 99]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"prompt": "a", "completion": "b"}', 'line 2 has no text under "text" (fields: prompt, completion)'),
        ("{}", 'line 2 has no text under "text" (fields: none)'),
        (
            '{"text": 3}',
            'line 2 has an int (3) under "text", which is no text. Write it in quotes, so that lines are {"text"',
        ),
        ('{"text": null}', 'line 2 has null under "text", which is no text.'),
        ('{"text": ["a"]}', "line 2 has a list (["),
        ('["a"]', 'line 2 has no text under "text" (a list)'),
        ("plain words", "line 2 is no JSON. A .jsonl file has one object per line"),
        ("[" * 100_000, "line 2 is no JSON"),
    ],
)
def test_lines_of_another_form(tmp_path: Path, line: str, text: str):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + line)
    with pytest.raises(UnknownObjective, match=re.escape(text)):
        read(tmp_path / "a.jsonl")


def test_a_long_text_is_cut_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(texts, "MOST_CHARACTERS", 10)
    (tmp_path / "a.txt").write_text("abcdefghijklmnop")
    found = read_tokens(TextData(tmp_path / "a.txt"), Letters(), length=2, count=1)
    assert len(found.ids) == 10
    assert found.notes == (f"the first 10 characters of {tmp_path / 'a.txt'}",)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "abcdef"}) for _ in range(3)))
    assert len(read(tmp_path / "a.jsonl")) == 6 + 1 + 4
    monkeypatch.setattr(texts, "LONGEST_LINE", 10)
    with pytest.raises(UnknownObjective, match="line 1 has more than 10 characters. Write one text per line"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"ab\xff", "not UTF-8 text (byte 2 is 0xff)"),
        ("ab".encode("utf-16-le"), "it has NUL bytes, so it is no text"),
    ],
)
def test_what_is_no_text(tmp_path: Path, content: bytes, text: str):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UnknownObjective, match=re.escape(text)):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", list(texts.NOT_TEXT))
def test_endings_that_are_not_read(tmp_path: Path, suffix: str):
    (tmp_path / f"a{suffix}").write_bytes(b"x")
    with pytest.raises(UnknownObjective, match=re.escape(f"{suffix} files are not read. {texts.NOT_TEXT[suffix]}")):
        read(tmp_path / f"a{suffix}")


def test_ids_of_nanogpt_need_no_tokenizer(tmp_path: Path):
    path = binary(tmp_path / "val.bin", 100)
    assert read(path, None, length=200, count=2) == ids(100).tolist()
    # windows of 4 and the token after them, evenly spaced: no more is read
    assert read(path, None) == [*ids(100)[:5].tolist(), *ids(100)[50:55].tolist()]
    numpy.array([65535, 0], dtype="<u2").tofile(path)
    assert read(path, None) == [65535, 0]


def test_a_binary_file_of_wider_ids(tmp_path: Path):
    path = tmp_path / "val.bin"
    for low in (0, 60_000):  # the upper halves are 0, or 0 and 1
        (ids(200) + low).astype(numpy.uint32).tofile(path)
        with pytest.raises(
            UnknownObjective, match=r"it looks like 32-bit ids \(every second 16-bit number is 0 or 1\)"
        ):
            read(path, None)
    numpy.zeros(200, numpy.uint16).tofile(path)  # ids 0 and 1 alone are ids
    assert read(path, None) == [0] * 10
    binary(path)
    with pytest.raises(UnknownObjective, match="the model's vocabulary of 65,537 does not fit"):
        read_tokens(TextData(path), None, length=4, count=2, vocabulary=65_537)
    assert len(read_tokens(TextData(path), None, length=4, count=2, vocabulary=65_536).ids) == 10


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ([[5, 6], None], "row 1 of input_ids is null"),
        (["five"], "row 0 of input_ids is a str ('five')"),
        ([[0.5, 1.0]], "row 0 of input_ids is a list with a float (0.5)"),
        ([[[5, 6]]], "row 0 of input_ids is a list with a list ([5, 6])"),
        ([[5, None]], "row 0 of input_ids is a list with null"),
        ([5, 6], "row 0 of input_ids is an int (5)"),
    ],
)
def test_a_column_of_something_else_than_ids(tmp_path: Path, column: list[object], said: str):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"input_ids": column}).save_to_disk(tmp_path / "data")
    with pytest.raises(UnknownObjective, match=re.escape(said)):
        read(tmp_path / "data", None)


def test_a_mask_of_another_length(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    for mask in ([1], None):
        path = tmp_path / f"data-{mask}"
        datasets.Dataset.from_dict({"input_ids": [[5, 6]], "attention_mask": [mask]}).save_to_disk(path)
        with pytest.raises(UnknownObjective, match=f"--data {re.escape(str(path))}: row 0 has 2 input_ids and another"):
            read(path, None)


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_a_binary_file_that_is_none(tmp_path: Path, content: bytes):
    (tmp_path / "val.bin").write_bytes(content)
    with pytest.raises(UnknownObjective, match=f"{len(content)} bytes are no sequence of 16-bit ids"):
        read(tmp_path / "val.bin")


def test_paths_that_do_not_fit(tmp_path: Path):
    with pytest.raises(InvalidArgument, match="there is no such file or directory"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(UnknownObjective, match="a directory that datasets.save_to_disk did not write; in it: nothing"):
        read(tmp_path)
    with pytest.raises(InvalidArgument, match="--split train: only a directory of datasets has splits"):
        read(binary(tmp_path / "val.bin"), None, "train")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(NoTokenizer, match=r"a.txt is text"):
        read(tmp_path / "a.txt", None)


def test_the_bundled_text():
    from curvkit.models import topics_text

    assert bundled_tokens(Letters()).ids.tolist() == [ord(c) for c in topics_text()]


def test_numbers_that_do_not_fit():
    with pytest.raises(InvalidArgument, match="--seq-len 0: must be at least 1"):
        TextData(Path("a"), seq_len=0)
    with pytest.raises(InvalidArgument, match="--tokens -1: must be at least 1"):
        TextData(Path("a"), tokens=-1)
    with pytest.raises(InvalidArgument, match="--data and --demo-data: the one is your data, the other is not"):
        Request(data=TextData(Path("a")), demo_data=True)


# ---- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seq_len", "tokens", "context", "shape"),
    [
        (None, None, None, Shape(128, 8)),
        (None, None, 1024, Shape(128, 8)),
        (None, None, 64, Shape(64, 8)),
        (32, 100, 64, Shape(32, 3)),
        (64, 64, 64, Shape(64, 1)),
        (None, 1, 64, Shape(1, 1)),
        (None, 100, 64, Shape(64, 1)),
        (None, 50, None, Shape(50, 1)),
        (64, 4096, None, Shape(64, 64)),
    ],
)
def test_what_the_user_leaves_open(seq_len: int | None, tokens: int | None, context: int | None, shape: Shape):
    assert Shape.of(seq_len, tokens, context=context) == shape


def test_a_window_beyond_the_context():
    with pytest.raises(InvalidArgument, match="--seq-len 65: the model's context is 64 tokens. Pass at most that."):
        Shape.of(65, None, context=64)


def test_fewer_tokens_than_one_window():
    text = "--tokens 63: fewer than one window of --seq-len 64. Pass --tokens 64 or more, or a shorter --seq-len."
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        Shape.of(64, 63, context=64)


def test_windows_and_their_targets():
    found = calibrate(Tokens(torch.arange(20)), Shape(3, 4), language(), mask=None, source="val.txt")
    ((x, y),) = found.batches
    assert x.tolist() == [[0, 1, 2], [5, 6, 7], [10, 11, 12], [15, 16, 17]]
    assert torch.equal(y, x + 1)
    assert found.words == "4 windows of 3 tokens"
    assert found.notes == ()


def test_a_shorter_text_gives_fewer_windows_and_that_is_said():
    found = calibrate(Tokens(torch.arange(10), ("a note",)), Shape(3, 8), language(), mask=None, source="val.txt")
    assert found.words == "3 windows of 3 tokens"
    assert found.notes == ("a note", "the text has 10 tokens: 3 of 8 windows")
    exact = calibrate(Tokens(torch.arange(4)), Shape(3, 1), language(), mask=None, source="val.txt")
    assert exact.words == "1 window of 3 tokens"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "val.txt: too short: it has 0 tokens, and one window of 8 needs 9. Pass a longer text."),
        (
            8,
            "val.txt: too short: it has 8 tokens, and one window of 8 needs 9. Pass --seq-len 7 or less, or a longer text.",
        ),
    ],
)
def test_a_text_that_is_too_short(count: int, text: str):
    with pytest.raises(UnknownObjective, match=re.escape(text)):
        calibrate(Tokens(torch.arange(count)), Shape(8, 2), language(), mask=None, source="val.txt")


@pytest.mark.parametrize("token", [-1, 64, 65535])
def test_ids_of_another_tokenizer(token: int):
    tokens = torch.arange(20)
    tokens[7] = token
    with pytest.raises(UnknownObjective, match=f"it has the token {token}, but the model's vocabulary is 0 to 63"):
        calibrate(Tokens(tokens), Shape(3, 4), language(), mask=None, source="val.txt")


def test_batches_hold_as_many_windows_as_their_logits_allow():
    vocabulary = LOGITS_PER_BATCH // 8
    found = calibrate(Tokens(torch.arange(100)), Shape(4, 5), language(vocabulary), mask=None, source="val.txt")
    assert [len(x) for x, _ in found.batches] == [2, 2, 1]


def test_the_digest_is_that_of_the_ids():
    one, other = (
        calibrate(Tokens(torch.arange(20) + k), Shape(3, 4), language(), mask=None, source="") for k in (0, 1)
    )
    same = calibrate(Tokens(torch.arange(20)), Shape(3, 4), language(128), mask=None, source="")
    assert one.digest == same.digest != other.digest
    assert re.fullmatch("[0-9a-f]{64}", one.digest)
