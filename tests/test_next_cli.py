"""The line `next` of curvkit inspect, for checkpoints that need a text, ids, a base model, or nothing: it works when it is typed."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from curvkit_cli.main import run
from oracles import seeded
from samples import examples, net
from tiny_models import VOCABULARY, binary, live, saved, silence, tokenizer

from curvkit import Recipe, save
from curvkit.checkpoints import inspect
from curvkit.models import GPT, MLP

Typed = Callable[..., tuple[int, str, str]]
FAST = ("--no-data-doubt", "--no-preflight", "--seed", "0", "--seq-len", "8", "--tokens", "16", "--plain")
SIZES = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 8,
    "block_size": 16,
    "vocab_size": VOCABULARY,
    "bias": False,
    "dropout": 0.0,
}
TEXT = "the cat sat on a mat and the dog ran . " * 40


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("val.txt").write_text(TEXT)
    binary(Path("val.bin"))
    return tmp_path


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def following(typed: Typed, path: str) -> str:
    """What inspecting says next."""
    code, out, err = typed("inspect", path)
    assert code == 0, err
    return next(line for line in out.splitlines() if line.startswith("next\t")).removeprefix("next\t")


def refusal(typed: Typed, path: str) -> str:
    """Why it is not read; then nothing comes next."""
    code, out, err = typed("inspect", path)
    assert code == 0, err
    assert "\nnext\t" not in out
    return next(line for line in out.splitlines() if line.startswith("refused\t")).removeprefix("refused\t")


def nanogpt(path: str) -> None:
    with seeded(0):
        model = GPT(**SIZES)
    torch.save({"model": model.state_dict(), "model_args": SIZES, "iter_num": 5}, path)


def test_nanogpt_without_a_tokenizer_needs_ids(typed: Typed):
    nanogpt("my ckpt.pt")
    command = following(typed, "my ckpt.pt")
    assert command == "curvkit sharpness 'my ckpt.pt' --data val.bin"
    assert typed("init", "my ckpt.pt")[1].splitlines()[-1] == command
    code, out, err = typed(*shlex.split(command)[1:], *FAST)
    assert code == 0, err
    assert "\tconverged\n" in out
    code, _, err = typed("sharpness", "my ckpt.pt")
    assert code == 3
    assert f"  do one   {command} " in err  # the same command


@pytest.mark.extra
def test_nanogpt_with_a_tokenizer_takes_a_text(typed: Typed, folder: Path):
    pytest.importorskip("transformers")
    nanogpt("ckpt.pt")
    tokenizer(folder)
    command = following(typed, "ckpt.pt")
    assert command == "curvkit sharpness ckpt.pt --data val.txt"
    code, _, err = typed(*shlex.split(command)[1:], *FAST)
    assert code == 0, err


def test_sizes_of_nanogpt_that_are_not_all_there(typed: Typed):
    torch.save({"model": net().state_dict(), "model_args": {"n_layer": 1}, "iter_num": 5}, "ckpt.pt")
    assert following(typed, "ckpt.pt") == "curvkit init ckpt.pt"
    assert typed("init", "ckpt.pt")[1].startswith("wrote curvkit_objective.py")


def test_a_recipe_needs_nothing(typed: Typed):
    x, y = examples()
    save("a b.pt", model=MLP([4, 3]), recipe=Recipe("mlp", {"sizes": [4, 3]}, "cross_entropy", {"x": x, "y": y}))
    command = following(typed, "a b.pt")
    assert command == "curvkit sharpness 'a b.pt'"
    code, _, err = typed(*shlex.split(command)[1:], "--plain", "--no-data-doubt")
    assert code == 0, err


@pytest.mark.extra
@pytest.mark.parametrize("sharded", [False, True])
def test_a_causal_model(typed: Typed, sharded: bool):
    pytest.importorskip("transformers")
    path = saved(live("gpt2"), Path("my model"), **({"max_shard_size": "10KB"} if sharded else {}))
    command = following(typed, "my model")
    assert command == "curvkit sharpness 'my model' --data val.bin"
    code, _, err = typed(*shlex.split(command)[1:], *FAST)
    assert code == 0, err
    tokenizer(path)
    command = following(typed, "my model")
    assert command == "curvkit sharpness 'my model' --data val.txt"
    code, _, err = typed(*shlex.split(command)[1:], *FAST)
    assert code == 0, err


@pytest.mark.extra
def test_a_masked_model_needs_its_tokenizer(typed: Typed):
    pytest.importorskip("transformers")
    path = saved(live("bert"), Path("bert"))
    command = following(typed, "bert")
    assert command == "copy the model's tokenizer.json into bert, then: curvkit sharpness bert --data val.txt"
    tokenizer(path)
    assert following(typed, "bert") == command.partition(": ")[2]
    code, _, err = typed(*shlex.split(following(typed, "bert"))[1:], *FAST)
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.extra
def test_a_classifier_of_sequences_needs_a_function(typed: Typed):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with silence(), seeded(0):
        saved(transformers.BertForSequenceClassification(config), Path("my bert"))
    command = following(typed, "my bert")
    assert command == "curvkit init 'my bert'"
    for data in ((), ("--data", "val.bin")):
        code, _, err = typed("sharpness", "my bert", *data)
        assert code == 3
        assert "a BertForSequenceClassification is neither a causal nor a masked language model" in err
        assert f"Type {command}, which writes a function to fill in" in err
    code, out, _ = typed(*shlex.split(command)[1:])
    assert code == 0
    made = Path("curvkit_objective.py")
    lines = made.read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if "raise NotImplementedError" in line)
    model = [line.replace("# ", "", 1) for line in lines[start - 2 : start]]  # the two lines that are suggested
    made.write_text("\n".join([*lines[: start - 2], *model, *lines[start + 1 :]]) + "\n")
    code, out, err = typed(*shlex.split(out.splitlines()[-1])[1:], "--no-data-doubt", "--seed", "0", "--plain")
    assert code == 0, err
    assert "\tconverged\n" in out


@pytest.mark.extra
def test_adapters(typed: Typed, folder: Path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = saved(live("gpt2"), folder / "base")
    with silence():
        model = transformers.GPT2LMHeadModel.from_pretrained(base)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter += 0.1
        model.save_pretrained("adapter")
    command = following(typed, "adapter")
    assert command == "curvkit sharpness adapter --data val.bin"
    code, _, err = typed(*shlex.split(command)[1:], *FAST)
    assert code == 0, err
    assert typed("init", "adapter")[1].splitlines()[-1] == command
    tokenizer(base)
    assert following(typed, "adapter") == "curvkit sharpness adapter --data val.txt"
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2ForSequenceClassification"]}))
    assert following(typed, "adapter").startswith("merge the adapter into its base, model.merge_and_unload()")
    base.rename(folder / "elsewhere")
    said = refusal(typed, "adapter")
    assert "is not on this disk" in said
    code, _, err = typed("sharpness", "adapter", "--data", "val.txt")
    assert code == 4
    assert said.removeprefix("it is not read: ")[:60] in err  # inspecting says what measuring says


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "directory"])
def test_quantised_weights_have_no_next(typed: Typed, dtype: torch.dtype, kind: str):
    """Law: what inspecting refuses is refused when it is measured."""
    from safetensors.torch import save_file

    state = {name: tensor.to(dtype) if tensor.ndim > 1 else tensor for name, tensor in net().state_dict().items()}
    path = {"safetensors": "q.safetensors", "torch": "q.pt", "directory": "q"}[kind]
    if kind == "torch":
        torch.save({"model": state}, path)
    else:
        Path("q").mkdir()
        save_file(state, path if kind == "safetensors" else "q/model.safetensors")
    name = str(dtype).removeprefix("torch.")
    assert refusal(typed, path).startswith(f"it is not read: the weight 'inner.weight' is {name}: quantised. Quantised")
    if dtype is not torch.int8:
        return
    Path("train.py").write_text("from samples import TRAIN\nexec(TRAIN)\n")
    code, _, err = typed("sharpness", path, "--objective", "train.py:objective")
    assert code == 4, err
    assert "before quantisation" in err


def test_buffers_of_bytes_are_no_quantised_weights(typed: Typed):
    torch.save({**net().state_dict(), "mask": torch.ones(3, 3, dtype=torch.uint8)}, "ckpt.pt")
    assert following(typed, "ckpt.pt") == "curvkit init ckpt.pt"


def test_a_file_out_of_a_directory_leads_to_the_directory(typed: Typed):
    from safetensors.torch import save_file

    Path("my model").mkdir()
    for name in ("model.safetensors", "model-00001-of-00002.safetensors"):
        save_file(net().state_dict(), f"my model/{name}")
    assert following(typed, "my model/model.safetensors") == "curvkit init 'my model/model.safetensors'"
    assert following(typed, "my model/model-00001-of-00002.safetensors") == "curvkit inspect 'my model'"
    Path("my model/config.json").write_text("{}")
    assert following(typed, "my model/model.safetensors") == "curvkit inspect 'my model'"
    assert following(typed, "my model") == "curvkit init 'my model'"


def test_a_path_like_an_option(typed: Typed):
    torch.save(net().state_dict(), "-ckpt.pt")
    assert following(typed, "./-ckpt.pt") == "curvkit init ./-ckpt.pt"
    assert typed("init", "./-ckpt.pt")[1].splitlines()[-1] == "curvkit sharpness ./-ckpt.pt"


def test_what_was_chosen_is_typed_again(typed: Typed):
    torch.save({"a b": net().state_dict(), "c": net().state_dict()}, "gan.pt")
    command = following(typed, "gan.pt")
    assert command == "curvkit inspect gan.pt --key 'a b'"
    assert "Say which one is meant, for example --key 'a b'\n" in typed("inspect", "gan.pt")[1]
    code, out, _ = typed(*shlex.split(command)[1:])
    assert (code, "next\tcurvkit init gan.pt --key 'a b'\n" in out) == (0, True)


def test_commands_in_errors_keep_what_was_chosen(typed: Typed):
    torch.save({"a b": net().state_dict(), "c": net().state_dict(), "x": argparse.Namespace()}, "gan two.pt")
    code, _, err = typed("sharpness", "gan two.pt", "--key", "a b", "--allow", "samples.Net")
    assert code == 3
    for command in ("init", "sharpness"):
        assert f" curvkit {command} 'gan two.pt' --key 'a b' --allow samples.Net  " in err.replace(" --objective", "  ")
    code, _, err = typed("sharpness", "gan two.pt", "--key", "a b", "--data", "val.txt")
    assert code == 2
    assert err.endswith("To have one written, to fill in: curvkit init 'gan two.pt' --key 'a b'\n")


def test_the_plain_form_has_it():
    torch.save(net().state_dict(), "ckpt.pt")
    plain: dict[str, Any] = inspect(Path("ckpt.pt")).to_dict()
    assert plain["next"] == "curvkit init ckpt.pt"
