"""Language models from the command line: what is typed, what is said, and what the record keeps."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from curvkit_cli.main import run
from oracles import seeded

from curvkit import Recipe, save
from curvkit.models import GPT, MLP

Typed = Callable[..., tuple[int, str, str]]
FAST = ("--no-data-doubt", "--no-preflight", "--seed", "0")
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 31, "bias": False, "dropout": 0.0}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def nanogpt(path: str = "ckpt.pt") -> None:
    """As its train.py writes it, compiled; and data of its prepare.py."""
    with seeded(0):
        model = GPT(**SIZES)
    weights = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    state = torch.optim.AdamW(model.parameters(), lr=6e-4).state_dict()
    torch.save({"model": weights, "optimizer": state, "model_args": SIZES, "iter_num": 5, "best_val_loss": 2.0}, path)
    numpy.random.default_rng(0).integers(0, 31, 2000).astype(numpy.uint16).tofile("val.bin")


def test_nanogpt_needs_its_data_alone(typed: Typed):
    nanogpt()
    code, out, err = typed("sharpness", "ckpt.pt")
    assert (code, out) == (3, "")
    assert "curvkit sharpness ckpt.pt --data" in err
    code, out, err = typed(
        "sharpness", "ckpt.pt", "--data", "val.bin", "--seq-len", "8", "--tokens", "64", *FAST, "--json"
    )
    assert code == 0
    assert err.splitlines() == [
        "objective: GPT of nanoGPT (nanoGPT checkpoint) · token_cross_entropy of 8 windows of 8 tokens from val.bin",
        "note: _orig_mod. taken from the names of the weights",
    ]
    record = json.loads(out)["record"]
    assert "tied: lm_head.weight = transformer.wte.weight" in json.loads(out)["result"]["notes"]
    assert len(record["tokens_digest"]) == hashlib.sha256().digest_size * 2
    assert "own_data" not in record
    assert record["options"]["data"] == {"value": "val.bin", "source": "commandline"}
    other = json.loads(typed("sharpness", "ckpt.pt", "--data", "val.bin", "--seq-len", "4", *FAST, "--json")[1])[
        "record"
    ]
    assert other["tokens_digest"] != record["tokens_digest"]


def test_init_and_inspect_know_that_nothing_has_to_be_written(typed: Typed, folder: Path):
    nanogpt()
    code, out, _ = typed("init", "ckpt.pt")
    assert code == 0
    assert out.startswith("Nothing to write: the model is a GPT of nanoGPT, which needs data alone: ids")
    assert out.endswith("Next:\ncurvkit sharpness ckpt.pt --data val.bin\n")
    assert sorted(path.name for path in folder.iterdir()) == ["ckpt.pt", "val.bin"]
    assert "next\tcurvkit sharpness ckpt.pt --data val.bin" in typed("inspect", "ckpt.pt")[1]


def test_a_text_that_is_typed_wins_over_the_configuration_and_the_environment(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
):
    nanogpt()
    Path("curvkit.toml").write_text('objective = "train.py:objective"\n')
    code, _, err = typed("trace", "ckpt.pt", "--data", "val.bin", "--no-preflight", "--max-products", "4", "--plain")
    assert code == 0, err
    assert "note: train.py:objective (from curvkit.toml) was passed over, since --data names a text" in err
    monkeypatch.setenv("CURVKIT_OBJECTIVE", "other.py:objective")
    code, _, err = typed("trace", "ckpt.pt", "--data", "val.bin", "--no-preflight", "--max-products", "4", "--plain")
    assert code == 0, err
    assert "note: other.py:objective (CURVKIT_OBJECTIVE) was passed over, since --data names a text" in err


def test_data_of_the_configuration(typed: Typed, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The path is relative to the configuration."""
    nanogpt()
    Path("curvkit.toml").write_text('[defaults]\ndata = "val.bin"\nseq-len = 8\n')
    (folder / "below").mkdir()
    (folder / ".git").mkdir()
    monkeypatch.chdir("below")
    code, out, err = typed("sharpness", "../ckpt.pt", *FAST, "--json")
    assert code == 0, err
    assert "8 windows of 8 tokens from val.bin" in err
    assert json.loads(out)["record"]["options"]["data"] == {"value": "../val.bin", "source": "default_map"}


def test_an_objective_wins_over_a_text_that_is_not_typed(typed: Typed, monkeypatch: pytest.MonkeyPatch):
    nanogpt()
    Path("train.py").write_text(
        "import torch, curvkit\nfrom curvkit.models import GPT\nfrom curvkit.losses import token_cross_entropy\n\n"
        f"def objective():\n    x = torch.arange(16)[None]\n    return curvkit.Objective(GPT(**{SIZES}), token_cross_entropy, [(x, x)])\n"
    )
    monkeypatch.setitem(sys.modules, "train", None)
    Path("curvkit.toml").write_text('[defaults]\ndata = "val.bin"\ndemo-data = false\n')
    code, _, err = typed("sharpness", "ckpt.pt", "--objective", "train.py:objective", *FAST, "--plain")
    assert code == 0, err
    assert err.startswith("objective: train.py:objective (--objective)\n")
    Path("curvkit.toml").write_text('objective = "train.py:objective"\n[defaults]\ndata = "val.bin"\n')
    code, _, err = typed("sharpness", "ckpt.pt", *FAST, "--plain")
    assert code == 0, err
    assert err.startswith("objective: train.py:objective (from curvkit.toml)\n")
    Path("curvkit.toml").write_text('[defaults]\ndata = "val.bin"\n')
    x, y = torch.ones(4, 4), torch.tensor([0, 1, 2, 0])
    save("own.pt", model=MLP([4, 3]), recipe=Recipe("mlp", {"sizes": [4, 3]}, "cross_entropy", {"x": x, "y": y}))
    code, _, err = typed("sharpness", "own.pt", *FAST, "--plain")
    assert (code, err) == (0, "objective: recipe in the checkpoint (mlp, cross_entropy)\n")
    code, _, err = typed("sharpness", "ckpt.pt", "--objective", "train.py:objective", "--data", "val.bin", *FAST)
    assert code == 2
    assert "--data and --objective: train.py:objective brings its own data. Leave one of them out." in err


@pytest.mark.slow
@pytest.mark.extra
def test_a_directory_of_hugging_face(typed: Typed):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    letters = {letter: index for index, letter in enumerate("?abcdefghijklmnopqrstuvwxyz .,\n")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained("my-model")
    sizes = {"vocab_size": len(letters), "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 32}
    with seeded(0):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.save_pretrained("my-model")
    for inner in (".cache", "checkpoint-5", "original"):
        Path("my-model", inner).mkdir()
        Path("my-model", inner, "file").touch()
    Path("val.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    code, out, err = typed("sharpness", "my-model", "--data", "val.txt", *FAST, "--json")
    assert code == 0, err
    record = json.loads(out)["record"]
    files = record["checkpoint"]["files"]
    assert record["checkpoint"]["name"] == "my-model"
    assert {"config.json", "model.safetensors", "tokenizer.json", "original/file"} <= set(files)
    assert not {".cache/file", "checkpoint-5/file"} & set(files)
    assert record["notes"] == ["safetensors has no checksum: a flipped bit in the file would not be noticed"]
    demo = ("sharpness", "my-model", "--demo-data", "--tokens", "128", *FAST)
    code, out, err = typed(*demo, "--json")
    assert code == 0, err
    assert "not your data" in err.splitlines()[0]
    assert json.loads(out)["record"]["own_data"] is False
    assert "checkpoint\tmy-model on bundled text, not your data\n" in typed(*demo, "--plain")[1]
    assert typed(*demo, "--format", "table")[1].startswith("sharpness of my-model on bundled text, not your data\n")
    assert typed("init", "my-model")[1].startswith(
        "Nothing to write: the model is a GPT2LMHeadModel, which needs data alone"
    )
