"""Tokenizers beside the weights: read as their library reads them, and never from outside of their directory, the network or code."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from curvkit_cli.main import run
from tiny_models import live, saved, tokenizer

from curvkit.checkpoints.trust import NOTHING, NeedsTrust, Trust
from curvkit.errors import RefusedCheckpoint, UnknownObjective
from curvkit.resolving.tokenizers import load_tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
Change = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch):
    def refused(*arguments: Any) -> None:
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a model and its tokenizer, and files outside of it."""
    path = saved(live("gpt2"), tmp_path / "model")
    tokenizer(path)
    outside = tmp_path / "outside"
    outside.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (outside / file).write_bytes((path / file).read_bytes())
    return path


def load(place: Path, trust: Trust = NOTHING) -> Any:
    return load_tokenizer([place], vocabulary=64, trust=trust)


def entries(place: Path, **changes: Any) -> None:
    file = place / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def linked(place: Path, name: str) -> None:
    (place / name).unlink(missing_ok=True)
    (place / name).symlink_to(place.parent / "outside" / name)


def queued(place: Path, name: str) -> None:
    """A pipe that nothing ever writes to; opening it would wait for ever."""
    (place / name).unlink(missing_ok=True)
    os.mkfifo(place / name)


def templates(place: Path) -> None:
    (place / "additional_chat_templates").mkdir()
    (place / "additional_chat_templates" / "a.jinja").symlink_to(place.parent / "outside" / "tokenizer.json")


OUTSIDE: dict[str, Change] = {
    "tokenizer.json is a link": lambda place: linked(place, "tokenizer.json"),
    "tokenizer_config.json is a link": lambda place: linked(place, "tokenizer_config.json"),
    "special tokens are a link to a device": lambda place: (place / "special_tokens_map.json").symlink_to("/dev/zero"),
    "config.json is a pipe": lambda place: queued(place, "config.json"),
    "added_tokens.json is a pipe": lambda place: queued(place, "added_tokens.json"),
    "a template is a link": templates,
    "an absolute name": lambda place: entries(place, vocab_file="/etc/passwd"),
    "a name upwards": lambda place: entries(place, tokenizer_file="../outside/tokenizer.json"),
    "a version upwards": lambda place: entries(place, fast_tokenizer_files=["../outside/tokenizer.1.0.json"]),
    "a name that is not there": lambda place: entries(place, merges_file="absent.txt"),
}


@pytest.mark.parametrize("change", OUTSIDE)
def test_files_outside_of_the_directory(place: Path, change: str):
    OUTSIDE[change](place)
    with pytest.raises(RefusedCheckpoint) as caught:
        load(place)
    assert str(place) in str(caught.value)


def test_the_exit_code_is_that_of_a_refused_file(place: Path, capsys: pytest.CaptureFixture[str]):
    (place.parent / "val.txt").write_text("the cat sat on the mat . " * 100)
    typed = ["sharpness", str(place), "--data", str(place.parent / "val.txt"), "--seq-len", "8"]
    linked(place, "tokenizer.json")
    assert run(typed) == 4
    assert "'tokenizer.json' is a link to" in capsys.readouterr().err


def test_what_old_configurations_say_of_a_disk_elsewhere(place: Path):
    before = load(place).encode("the cat")
    entries(place, special_tokens_map_file="/content/special_tokens_map.json", tokenizer_file=None, name_or_path="a/b")
    assert load(place).encode("the cat") == before


def test_the_configuration_beside_it_is_believed_in_nothing_else(place: Path):
    """A stranger's config.json may ask for a loop, for code and for kernels; the ids of a text stay the same."""
    before = load(place).encode("the cat sat")
    described = json.loads((place / "config.json").read_text())
    hostile = {
        "num_labels": 10**12,
        "attn_implementation": "evil/kernel",
        "use_kernels": True,
        "auto_map": {"AutoConfig": "x.Y"},
    }
    (place / "config.json").write_text(json.dumps({**described, **hostile}))
    assert load(place).encode("the cat sat") == before
    (place / "config.json").write_text(json.dumps({**described, "n_layer": 10**12}))
    with pytest.raises(UnknownObjective, match="its tokenizer cannot be loaded .* has n_layer = 1,000,000,000,000"):
        load(place)


def test_a_tokenizer_of_code_needs_trust(place: Path):
    marker = place.parent / "executed"
    (place / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    entries(place, tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    (place / "config.json").write_text('{"model_type": "new"}')
    with pytest.raises(NeedsTrust, match=r"its tokenizer is Python code in the directory.* pass --trust"):
        load(place)
    assert not marker.exists()


@pytest.mark.parametrize("missing", ["added_tokens", "model"])
def test_a_damaged_tokenizer(place: Path, missing: str):
    file = place / "tokenizer.json"
    content = json.loads(file.read_text())
    del content[missing]
    file.write_text(json.dumps(content))
    (place / "tokenizer_config.json").unlink()
    with pytest.raises(UnknownObjective) as caught:
        load(place)
    assert f"{place}: its tokenizer cannot be loaded (" in str(caught.value)
    assert "('" not in str(caught.value)
    assert "Save it again with tokenizer.save_pretrained" in str(caught.value)


def test_a_tokenizer_that_fails_at_a_text(place: Path):
    """A word list without its unknown word; an expression without an end, at which its library panics: no exception of Python."""
    file = place / "tokenizer.json"
    content = json.loads(file.read_text())
    whole = json.dumps(content)
    content["model"]["unk_token"] = "[NONE]"
    file.write_text(json.dumps(content))
    with pytest.raises(
        UnknownObjective, match=r"its tokenizer cannot make tokens of a text \(WordLevel error: Missing"
    ):
        load(place)
    content = json.loads(whole)
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "([a-z]+)+!"},
        "behavior": "Isolated",
        "invert": False,
    }
    file.write_text(json.dumps(content))
    with pytest.raises(
        UnknownObjective, match=r"cannot make tokens of a text \(Onig: .* pass ids of tokens as a \.bin file"
    ):
        load(place).encode("a" * 100)


def test_an_interruption_is_none(place: Path, monkeypatch: pytest.MonkeyPatch):
    found = load(place)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(found.wrapped), "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        found.encode("the")
