"""Directories of Hugging Face, adapters, tokenizers: the resolved objective against the live model of their own library."""

from __future__ import annotations

import importlib.abc
import json
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from samples import environment
from tiny_models import CONTEXT, VOCABULARY, WORDS, binary, families, ids, live, saved, silence, tokenizer
from torch import Tensor, nn

from curvkit import BatchLoss, Objective
from curvkit.checkpoints import read
from curvkit.checkpoints.trust import Trust
from curvkit.errors import InvalidArgument, MissingExtra, RefusedCheckpoint, UnknownObjective
from curvkit.measures import sharpness
from curvkit.operators import GGN
from curvkit.resolving import Request, TextData, hugging_face_weights, resolve
from curvkit.resolving.language_model import LanguageModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
transformers = pytest.importorskip("transformers")
T = 16


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def asked(path: Path, **changes: Any) -> Request:
    return Request(data=TextData(path, **{"seq_len": T, "tokens": 4 * T, **changes}))


def windows(stream: Any, count: int = 4, length: int = T) -> tuple[Tensor, Tensor]:
    """Evenly spaced windows and the same one token later, cut by numpy."""
    starts = [i * (len(stream) // count) for i in range(count)]
    cut = [(stream[s : s + length], stream[s + 1 : s + 1 + length]) for s in starts]
    x, y = (torch.from_numpy(numpy.stack(part).astype(numpy.int64)) for part in zip(*cut, strict=True))
    return x, y


def predicted(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """The loss in the words of the library: (sum, count), from its own call."""
    x, y = batch
    logits = model(input_ids=x).logits
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1), reduction="sum"), int((y != -100).sum())


def top(objective: Objective) -> float:
    return sharpness(objective, seed=0).eigenpairs.values[0].item()


CAUSAL = [name for name, (kind, *_) in families().items() if "Masked" not in kind]


@pytest.mark.parametrize("family", CAUSAL)
def test_a_causal_model_is_the_live_one(tmp_path: Path, family: str):
    model = live(family)
    checkpoint = read(saved(model, tmp_path / "model"))
    found = resolve(checkpoint, asked(binary(tmp_path / "val.bin")))
    x, y = windows(ids())
    assert torch.equal(found.objective.model(input_ids=x).logits, model(input_ids=x).logits)
    same = Objective(model, BatchLoss(predicted), [(x, y)])
    assert found.objective.value() == pytest.approx(same.value(), rel=1e-6)
    # two searches to a relative residual of 1e-3: eigenvalues are off by far less
    assert top(found.objective) == pytest.approx(top(same), rel=1e-3)
    kind = families()[family][0]
    assert (
        found.source == f"{kind} (Hugging Face directory) · token_cross_entropy of 4 windows of {T} tokens from val.bin"
    )
    assert found.own_data


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_masked_model_is_the_live_one(tmp_path: Path, family: str):
    model = live(family)
    tokenizer(saved(model, tmp_path / "model"))
    found = resolve(read(tmp_path / "model"), asked(binary(tmp_path / "val.bin")))
    (batch,) = found.objective.batches
    x, y = batch["input_ids"], batch["labels"]
    assert torch.equal(found.objective.model(input_ids=x).logits, model(input_ids=x).logits)
    original, _ = windows(ids())
    masked = y != -100
    assert masked.sum(1).tolist() == [round(0.15 * T)] * 4
    assert torch.equal(torch.where(masked, y, x), original)
    assert torch.equal(x[masked], torch.full_like(x[masked], WORDS.index("[MASK]")))
    assert top(found.objective) == pytest.approx(top(Objective(model, BatchLoss(predicted), [(x, y)])), rel=1e-3)
    assert "15% of the positions masked, drawn with seed 0" in found.notes
    again = resolve(read(tmp_path / "model"), asked(binary(tmp_path / "val.bin")))
    assert torch.equal(again.objective.batches[0]["input_ids"], x)


def test_gauss_newton_of_a_model_that_returns_an_object(tmp_path: Path):
    """Against J' H J with the Jacobian of a pure function of the live model, in float64."""
    model = live("gpt2", n_layer=1, n_embd=4, n_positions=8).double()
    checkpoint = read(saved(model, tmp_path / "model"))
    found = resolve(checkpoint, asked(binary(tmp_path / "val.bin"), seq_len=3, tokens=6)).objective
    assert found.dtype == torch.float64
    x, _ = windows(ids(), 2, 3)
    names = [name for name, _ in model.named_parameters()]

    def logits(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), kwargs={"input_ids": x}).logits

    values = tuple(p.detach() for p in model.parameters())
    z = logits(*values).detach()
    J = torch.cat([j.reshape(z.numel(), -1) for j in torch.autograd.functional.jacobian(logits, values)], 1)
    p = z.softmax(-1).reshape(-1, VOCABULARY)
    H = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p)) / len(p)
    v = torch.randn(J.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    operator = GGN(found)
    assert operator.space.names == tuple(names)
    torch.testing.assert_close(operator.matvec(v), J.T @ (H @ (J @ v)), rtol=1e-8, atol=1e-10)


def test_half_precision_is_raised_and_said(tmp_path: Path):
    path = saved(live("llama").to(torch.bfloat16), tmp_path / "model")
    with silence():
        model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    found = resolve(read(path), asked(binary(tmp_path / "val.bin")))
    assert found.objective.dtype == torch.float32
    assert "weights in bfloat16, computed in float32" in found.notes
    x, _ = windows(ids())
    raised = Objective(model, BatchLoss(predicted), [(x, x)]).raised().model
    assert torch.equal(found.objective.model(input_ids=x).logits, raised(input_ids=x).logits)


def test_names_without_the_prefix_and_weights_of_other_heads(tmp_path: Path):
    """As the files of the first GPT-2 and BERT on the hub: no prefix, causal masks, a pooler and a second head."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = live("gpt2")
    path = saved(model, tmp_path / "gpt2") / "model.safetensors"
    weights = {k.removeprefix("transformer."): v for k, v in safetensors.load_file(path).items()}
    weights["h.0.attn.bias"] = torch.ones(CONTEXT, CONTEXT).tril()[None, None]
    safetensors.save_file(weights, path, metadata={"format": "pt"})
    found = resolve(read(tmp_path / "gpt2"), asked(binary(tmp_path / "val.bin")))
    x, _ = windows(ids())
    assert torch.equal(found.objective.model(input_ids=x).logits, model(input_ids=x).logits)

    bert = live("bert")
    path = saved(bert, tmp_path / "bert") / "model.safetensors"
    tokenizer(tmp_path / "bert")
    weights = safetensors.load_file(path)
    weights |= {"bert.pooler.dense.weight": torch.ones(16, 16), "cls.seq_relationship.weight": torch.ones(2, 16)}
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in weights.items()
    }
    safetensors.save_file(old, path, metadata={"format": "pt"})
    found = resolve(read(tmp_path / "bert"), asked(binary(tmp_path / "val.bin")))
    assert torch.equal(found.objective.model(input_ids=x).logits, bert(input_ids=x).logits)
    assert (
        "left out, no part of a BertForMaskedLM: bert.pooler.dense.weight, cls.seq_relationship.weight" in found.notes
    )


def changed(path: Path, change: Any) -> Path:
    """Rewrite the weights of a directory."""
    safetensors = pytest.importorskip("safetensors.torch")
    weights = safetensors.load_file(path / "model.safetensors")
    change(weights)
    safetensors.save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w.pop("model.norm.weight"), "  missing     model.norm.weight"),
        (lambda w: w.update({"model.extra": torch.ones(2)}), "  unexpected  model.extra"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(17)}),
            "  other shape model.norm.weight: file (17,), model (16,)",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: Any, text: str):
    path = changed(saved(live("llama"), tmp_path / "model"), change)
    with pytest.raises(UnknownObjective) as caught:
        resolve(read(path), asked(binary(tmp_path / "val.bin")))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: the weights do not fit the LlamaForCausalLM that config.json describes."
    assert lines[1:] == [text, "Take the config.json that was saved with these weights."]


def test_a_missing_weight_beside_a_renamed_one_is_found(tmp_path: Path):
    def change(weights: dict[str, Tensor]) -> None:
        weights["bert.embeddings.LayerNorm.gamma"] = weights.pop("bert.embeddings.LayerNorm.weight")
        weights.pop("bert.embeddings.word_embeddings.weight")

    path = changed(saved(live("bert"), tmp_path / "model"), change)
    with pytest.raises(UnknownObjective, match="missing .*bert.embeddings.word_embeddings.weight"):
        resolve(read(path), asked(binary(tmp_path / "val.bin")))


def test_weights_that_are_no_numbers(tmp_path: Path):
    def spoil(weights: dict[str, Tensor]) -> None:
        weights["model.norm.weight"][3] = float("nan")

    path = changed(saved(live("llama"), tmp_path / "model"), spoil)
    with pytest.raises(
        RefusedCheckpoint, match=r"'model.norm.weight' has NaN or infinite entries: the run had diverged"
    ):
        resolve(read(path), asked(binary(tmp_path / "val.bin")))


def test_tied_weights_with_two_values(tmp_path: Path):
    """transformers does not tie what the file has apart; were it to, one of the two would be lost."""
    path = saved(live("gpt2"), tmp_path / "model")
    changed(path, lambda weights: weights.update({"lm_head.weight": torch.ones(VOCABULARY, 16)}))
    with silence():
        model = transformers.GPT2LMHeadModel.from_pretrained(path)
    found = resolve(read(path), asked(binary(tmp_path / "val.bin"))).objective
    x, _ = windows(ids())
    assert torch.equal(found.model(input_ids=x).logits, model(input_ids=x).logits)
    assert "lm_head.weight" in found.parameters.names
    tied, two = live("gpt2"), dict(found.model.state_dict())
    with pytest.raises(
        UnknownObjective, match=r"the model ties '.*' to another weight, but the file has different values"
    ):
        hugging_face_weights._check_values(path, tied, two)


def described(path: Path, **changes: Any) -> Path:
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


def test_architectures_that_are_no_language_models(tmp_path: Path):
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with silence():
        t5 = transformers.T5ForConditionalGeneration(config)
    path = saved(t5, tmp_path / "t5")
    text = f"{path}: a T5ForConditionalGeneration is neither a causal nor a masked language model"
    for request in (Request(), asked(binary(tmp_path / "val.bin"))):
        with pytest.raises(UnknownObjective, match=re.escape(text)):
            resolve(read(path), request)
    path = described(saved(live("gpt2"), tmp_path / "gpt2"), architectures=["GPT2ForSequenceClassification"])
    with pytest.raises(UnknownObjective, match="a GPT2ForSequenceClassification is neither"):
        resolve(read(path))


def test_configurations_that_do_not_fit(tmp_path: Path):
    data = asked(binary(tmp_path / "val.bin"))
    path = saved(live("llama"), tmp_path / "model")
    original = (path / "config.json").read_text()
    for changes, text in [
        ({"model_type": "unheard"}, "config.json has model_type 'unheard', which transformers"),
        ({"model_type": ["llama"]}, "config.json has model_type ['llama'], which transformers"),
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture GPT2LMHeadModel and model_type 'llama', which do not belong",
        ),
        ({"num_hidden_layers": 10**9}, "config.json has num_hidden_layers = 1,000,000,000, but"),
        ({"vocab_size": 10**9}, "config.json describes a LlamaForCausalLM of 32,"),
        ({"num_attention_heads": 3}, "LlamaForCausalLM"),
        ({"hidden_size": "wide"}, "LlamaForCausalLM"),
    ]:
        (path / "config.json").write_text(original)
        with pytest.raises(UnknownObjective, match=re.escape(text)):
            resolve(read(described(path, **changes)), data)
    (path / "config.json").write_text(original)
    assert resolve(read(described(path, architectures=None)), data).source.startswith("LlamaForCausalLM")


def test_integers_are_no_weights(tmp_path: Path):
    checkpoint = read(saved(live("llama"), tmp_path / "model"))
    weights = {**checkpoint.weights, "model.norm.weight": torch.ones(16, dtype=torch.int8)}
    with pytest.raises(
        RefusedCheckpoint, match="the weight 'model.norm.weight' is torch.int8. Quantised weights have no"
    ):
        resolve(replace(checkpoint, weights=weights), asked(binary(tmp_path / "val.bin")))


def test_eight_bit_floats_are_quantised(tmp_path: Path):
    checkpoint = read(saved(live("llama"), tmp_path / "model"))
    name = "model.layers.0.mlp.up_proj.weight"
    weights = {**checkpoint.weights, name: checkpoint.weights[name].to(torch.float8_e4m3fn)}
    with pytest.raises(
        RefusedCheckpoint,
        match=f"the weight '{re.escape(name)}' is torch.float8_e4m3fn: quantised, with scales of its own",
    ):
        resolve(replace(checkpoint, weights=weights), asked(binary(tmp_path / "val.bin")))


def test_several_precisions_are_said(tmp_path: Path):
    checkpoint = read(saved(live("llama"), tmp_path / "model"))
    data = asked(binary(tmp_path / "val.bin"))
    assert not any("computed in" in note for note in resolve(checkpoint, data).notes)
    weights = {**checkpoint.weights, "model.norm.weight": checkpoint.weights["model.norm.weight"].to(torch.bfloat16)}
    assert (
        "weights in bfloat16, float32, computed in float32" in resolve(replace(checkpoint, weights=weights), data).notes
    )


def test_an_expert_that_is_missing(tmp_path: Path):
    """The weights of the experts are joined into one tensor, so that no name of the model is missing."""
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    path = changed(saved(live("mixtral"), tmp_path / "model"), lambda weights: weights.pop(name))
    with pytest.raises(UnknownObjective, match="cannot load the weights into a MixtralForCausalLM|do not fit"):
        resolve(read(path), asked(binary(tmp_path / "val.bin")))


def test_a_model_that_takes_more_than_tokens(tmp_path: Path):
    config = transformers.XmodConfig(**families()["bert"][2], is_decoder=True, languages=["en_XX", "de_DE"])
    with silence():
        path = saved(transformers.XmodForCausalLM(config), tmp_path / "model")
    with pytest.raises(UnknownObjective, match="a XmodForCausalLM cannot be called with tokens alone"):
        resolve(read(path), asked(binary(tmp_path / "val.bin")))


def test_a_causal_class_that_looks_ahead(tmp_path: Path):
    config = transformers.BertConfig(**families()["bert"][2], is_decoder=False)
    with silence():
        model = transformers.BertLMHeadModel(config)
    with pytest.raises(
        UnknownObjective, match="this BertLMHeadModel is not causal: what it predicts depends on later tokens"
    ):
        resolve(read(saved(model, tmp_path / "model")), asked(binary(tmp_path / "val.bin")))


MODELING = """
from pathlib import Path
Path({marker!r}).write_text("imported")
from transformers import LlamaForCausalLM
class Own(LlamaForCausalLM):
    pass
"""


def test_code_in_the_directory_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, marker = saved(live("llama"), tmp_path / "model"), tmp_path / "imported"
    (path / "modeling_own.py").write_text(MODELING.format(marker=str(marker)))
    described(path, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    request = asked(binary(tmp_path / "val.bin"))
    monkeypatch.setenv("CURVKIT_SHARPNESS_TRUST", "1")
    monkeypatch.setenv("CURVKIT_TRUST", "1")
    with pytest.raises(RefusedCheckpoint, match="auto_map"):
        resolve(read(path), request)
    trust = Trust(everything=True)
    checkpoint = read(path, trust=trust)
    for ask in (request, Request()):
        with pytest.raises(
            RefusedCheckpoint, match="auto_map: its model is Python code in the directory.*pass --trust"
        ):
            resolve(checkpoint, ask)
    assert not marker.exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = resolve(checkpoint, Request(data=request.data, trust=trust))
    assert found.source.startswith("Own (Hugging Face directory)")
    assert marker.exists()
    described(path, auto_map={"AutoModelForCausalLM": "someone/else--modeling_own.Own"})
    with pytest.raises(UnknownObjective, match="auto_map of config.json names code of another repository"):
        resolve(read(path, trust=trust), Request(data=request.data, trust=trust))
    described(path, auto_map={"AutoModel": "modeling_own.Own"})
    with pytest.raises(UnknownObjective, match="auto_map of config.json names no causal or masked language model"):
        resolve(read(path, trust=trust), Request(data=request.data, trust=trust))


# ---- texts through the directory's tokenizer ------------------------------------------------------------------------

TEXT = "the cat sat on a mat . a dog ran and the cat ran . " * 40


def test_a_text_through_the_tokenizer_of_the_directory(tmp_path: Path):
    wrapped = tokenizer(saved(live("gpt2"), tmp_path / "model"))
    (tmp_path / "val.txt").write_text(TEXT)
    found = resolve(read(tmp_path / "model"), asked(tmp_path / "val.txt"))
    stream = numpy.array(wrapped(TEXT, add_special_tokens=False)["input_ids"])
    x, y = windows(stream)
    assert torch.equal(found.objective.batches[0]["input_ids"], x)
    assert torch.equal(found.objective.batches[0]["labels"], y)
    import hashlib

    together = numpy.concatenate([x.numpy(), y.numpy()[:, -1:]], 1).astype("<i8")
    assert found.tokens_digest == hashlib.sha256(together.tobytes()).hexdigest()


def test_lines_of_json_are_joined_by_the_end_of_a_text(tmp_path: Path):
    tokenizer(saved(live("gpt2"), tmp_path / "model"))
    lines = [json.dumps({"text": "the cat sat ."}), "", json.dumps({"text": "a dog ran", "id": 7})]
    (tmp_path / "val.jsonl").write_text("\n".join(lines))
    found = resolve(read(tmp_path / "model"), asked(tmp_path / "val.jsonl", seq_len=7, tokens=7))
    x = found.objective.batches[0]["input_ids"][0].tolist()
    assert [WORDS[i] for i in x] == ["the", "cat", "sat", ".", "[EOS]", "a", "dog"]


def test_a_directory_of_datasets(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    tokenizer(saved(live("gpt2"), tmp_path / "model"))
    stream = ids().tolist()
    rows = [stream[i : i + 100] for i in range(0, 2000, 100)]
    padded = {"input_ids": [[*row, 1, 1] for row in rows], "attention_mask": [[1] * 100 + [0, 0] for _ in rows]}
    with silence():
        datasets.disable_progress_bars()
        parts = {
            "train": datasets.Dataset.from_dict({"text": [TEXT] * 2}),
            "validation": datasets.Dataset.from_dict(padded),
        }
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")
        datasets.Dataset.from_dict({"body": ["x"]}).save_to_disk(tmp_path / "other")
    checkpoint = read(tmp_path / "model")
    with pytest.raises(
        InvalidArgument, match=r"which of its splits: train, validation. Pass for example --split validation"
    ):
        resolve(checkpoint, asked(tmp_path / "data"))
    with pytest.raises(InvalidArgument, match=r"no split 'test'; it has: train, validation"):
        resolve(checkpoint, asked(tmp_path / "data", split="test"))
    found = resolve(checkpoint, asked(tmp_path / "data", split="validation"))
    assert torch.equal(found.objective.batches[0]["input_ids"], windows(ids())[0])
    assert "split validation of data" in found.notes
    text = resolve(checkpoint, asked(tmp_path / "data", split="train")).objective
    assert [WORDS[i] for i in text.batches[0]["input_ids"][0, :4].tolist()] == ["the", "cat", "sat", "on"]
    with pytest.raises(UnknownObjective, match=r"no column 'text' or 'input_ids'; its columns are: body"):
        resolve(checkpoint, asked(tmp_path / "other"))
    with pytest.raises(InvalidArgument, match=r"--split train: .* has one table and no splits"):
        resolve(checkpoint, asked(tmp_path / "other", split="train"))
    (tmp_path / "other" / "state.json").write_text("{")
    with pytest.raises(UnknownObjective, match=r"datasets cannot open it"):
        resolve(checkpoint, asked(tmp_path / "other"))


def test_bundled_text_is_not_the_users_data(tmp_path: Path):
    tokenizer(saved(live("gpt2"), tmp_path / "model"))
    found = resolve(read(tmp_path / "model"), Request(demo_data=True, seq_len=T, tokens=2 * T))
    assert not found.own_data
    assert found.source.endswith(f"of 2 windows of {T} tokens from text bundled with Python, not your data")


def test_a_text_and_no_tokenizer(tmp_path: Path):
    path = saved(live("gpt2"), tmp_path / "model")
    (tmp_path / "val.txt").write_text(TEXT)
    for request, start in (
        (asked(tmp_path / "val.txt"), f"{tmp_path / 'val.txt'} is text"),
        (Request(demo_data=True), "--demo-data is text"),
    ):
        with pytest.raises(UnknownObjective) as caught:
            resolve(read(path), request)
        lines = str(caught.value).splitlines()
        assert lines[0] == f"{start}, and there is no tokenizer to make tokens of it."
        assert lines[1] == f"  found    GPT2LMHeadModel, vocabulary 0 to 63; no tokenizer.json or the like in {path}"
        assert lines[3].startswith(
            f"  do one   copy tokenizer.json (and tokenizer_config.json) of the model into {path}"
        )
    bert = saved(live("bert"), tmp_path / "bert")
    with pytest.raises(UnknownObjective, match="a masked language model needs the id of its mask token"):
        resolve(read(bert), asked(binary(tmp_path / "val.bin")))


def test_a_tokenizer_that_does_not_belong_to_the_model(tmp_path: Path):
    path = saved(live("gpt2", vocab_size=8, bos_token_id=3), tmp_path / "model")
    tokenizer(path)
    (tmp_path / "val.txt").write_text(TEXT)
    # its test sentence has only the unknown word and "the" ... ".", so that it is the text that shows it
    with pytest.raises(
        UnknownObjective, match=r"and the model's vocabulary is 0 to 7|but the model's vocabulary is 0 to 7"
    ):
        resolve(read(path), asked(tmp_path / "val.txt"))
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(UnknownObjective, match="its tokenizer cannot be loaded"):
        resolve(read(path), asked(tmp_path / "val.txt"))


def test_the_table_of_a_known_loss_needs_the_attribute():
    x, y = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    loss = LanguageModel(nn.Embedding(4, 4), "a model", "causal", 4, None, returns_object=True).loss
    with pytest.raises(
        UnknownObjective, match="takes the attribute 'logits' of what the model returns, and a Tensor has none"
    ):
        Objective(nn.Embedding(4, 4), loss, [(x, y)]).value()


def test_without_a_text_the_error_says_what_to_type(tmp_path: Path):
    path = saved(live("gpt2"), tmp_path / "model")
    with pytest.raises(UnknownObjective) as caught:
        resolve(read(path))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path} is a GPT2LMHeadModel, but nothing says on which text to measure it."
    assert lines[1].endswith("· no tokenizer")
    assert lines[3].startswith(f"  do one   curvkit sharpness {path} --data val.bin")
    tokenizer(path)
    with pytest.raises(UnknownObjective) as caught:
        resolve(read(path))
    lines = str(caught.value).splitlines()
    assert lines[3].startswith(f"  do one   curvkit sharpness {path} --data val.txt")
    assert lines[4].startswith(f"           curvkit sharpness {path} --demo-data")
    assert lines[5] == f"           curvkit sharpness {path} --objective train.py:objective"


def test_windows_longer_than_the_context(tmp_path: Path):
    path = saved(live("roberta"), tmp_path / "model")
    with pytest.raises(InvalidArgument, match=f"--seq-len {CONTEXT + 1}: the model's context is {CONTEXT} tokens"):
        resolve(read(path), asked(binary(tmp_path / "val.bin"), seq_len=CONTEXT + 1))


# ---- adapters -------------------------------------------------------------------------------------------------------


def test_an_adapter_on_its_base(tmp_path: Path):
    peft = pytest.importorskip("peft")
    base = saved(live("llama"), tmp_path / "base")
    with silence():
        model = peft.get_peft_model(
            transformers.LlamaForCausalLM.from_pretrained(base),
            peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
        ).eval()
    path = saved(model, tmp_path / "adapter")
    found = resolve(read(path), asked(binary(tmp_path / "val.bin")))
    x, y = windows(ids())
    assert torch.equal(found.objective.model(input_ids=x).logits, model(input_ids=x).logits)
    assert all("lora_" in name for name in found.objective.parameters.names)
    assert found.objective.parameters.n == 2 * 2 * (2 * 16 + 2 * 16)
    assert top(found.objective) == pytest.approx(top(Objective(model, BatchLoss(predicted), [(x, y)])), rel=1e-3)
    assert found.source.startswith("LlamaForCausalLM with a LORA adapter (PEFT adapter)")
    with pytest.raises(UnknownObjective, match=r"is a adapter of base|is an adapter of base"):
        resolve(read(path))

    checkpoint = read(path)
    prompts = replace(
        checkpoint, config={"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
    )
    with pytest.raises(UnknownObjective, match="a PROMPT_TUNING adapter adds tokens to the text"):
        resolve(prompts, asked(binary(tmp_path / "val.bin")))
    newer = replace(checkpoint, config={**(checkpoint.config or {}), "use_future_scaling": True})
    with pytest.raises(UnknownObjective, match=r"says use_future_scaling = True, which peft \S+ does not know"):
        resolve(newer, asked(binary(tmp_path / "val.bin")))
    off = replace(checkpoint, config={**(checkpoint.config or {}), "use_future_scaling": False})
    assert resolve(off, asked(binary(tmp_path / "val.bin"))).objective.parameters.n == found.objective.parameters.n
    integers = {name: tensor.to(torch.int8) for name, tensor in checkpoint.weights.items()}
    with pytest.raises(RefusedCheckpoint, match="is torch.int8. Quantised weights have no curvature of their own"):
        resolve(replace(checkpoint, weights=integers), asked(binary(tmp_path / "val.bin")))

    safetensors = pytest.importorskip("safetensors.torch")
    file = path / "adapter_model.safetensors"
    weights = safetensors.load_file(file)
    first = sorted(weights)[0]
    for change, kind, text in [
        ({first: weights[first][:1]}, UnknownObjective, "peft cannot put this adapter|do not fit"),
        (
            {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)},
            UnknownObjective,
            "unexpected",
        ),
        ({first: torch.full_like(weights[first], torch.inf)}, RefusedCheckpoint, "NaN or infinite entries"),
    ]:
        safetensors.save_file({**weights, **change}, file)
        with pytest.raises(kind, match=text):
            resolve(read(path), asked(binary(tmp_path / "val.bin")))
    safetensors.save_file({k: v for k, v in weights.items() if k != first}, file)
    with pytest.raises(UnknownObjective, match="missing"):
        resolve(read(path), asked(binary(tmp_path / "val.bin")))


# ---- the environment ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_broken_torchvision_is_named_with_what_to_type(tmp_path: Path):
    """A package of that name whose import fails as that of a build for another torch does."""
    home = tmp_path / "site"
    (home / "torchvision").mkdir(parents=True)
    (home / "torchvision" / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    (home / "torchvision-0.28.0.dist-info").mkdir()
    (home / "torchvision-0.28.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"
    )
    path = saved(live("gpt2"), tmp_path / "model")
    binary(tmp_path / "val.bin")
    program = (
        "import sys; from pathlib import Path; from curvkit.checkpoints import read; from curvkit.resolving import *\n"
        "from curvkit.errors import MissingExtra\n"
        f"try: resolve(read(Path({str(path)!r})), Request(data=TextData(Path({str(tmp_path / 'val.bin')!r}))))\n"
        "except MissingExtra as error: print(error)\n"
        "else: print('resolved')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(PYTHONPATH=str(home)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Type: pip uninstall torchvision" in ran.stdout, ran.stderr
    assert "operator torchvision::nms does not exist" in ran.stdout


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    from curvkit.resolving import adapted_models, dataset_folders, transformers_library

    for module, call, text in [
        (
            "transformers",
            transformers_library.library,
            "built by transformers, which is not installed. Type: pip install 'curvkit[hf]'",
        ),
        ("peft", adapted_models._peft, "built by peft, which is not installed"),
        (
            "datasets",
            lambda: dataset_folders.open_rows(Path("data"), None),
            "the package datasets, which is not installed",
        ),
    ]:
        with monkeypatch.context() as patched:
            for name in [name for name in sys.modules if name.partition(".")[0] == module]:
                patched.delitem(sys.modules, name)
            patched.setitem(sys.modules, module, None)
            with pytest.raises(MissingExtra, match=re.escape(text)):
                call()


class Broken(importlib.abc.MetaPathFinder):
    """Finds a package whose import ends in an error of something below it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == self.name:
            raise ImportError("libarrow.so: cannot open shared object file")


def test_a_broken_package_is_named(monkeypatch: pytest.MonkeyPatch):
    from curvkit.resolving import adapted_models, dataset_folders, transformers_library

    for module, call, text in [
        ("transformers", transformers_library.library, "transformers is installed but cannot be imported (libarrow.so"),
        ("peft", adapted_models._peft, "peft is installed but cannot be imported (libarrow.so"),
        (
            "datasets",
            lambda: dataset_folders.open_rows(Path("data"), None),
            "installed but cannot be imported (libarrow.so",
        ),
    ]:
        with monkeypatch.context() as patched:
            for name in [name for name in sys.modules if name.partition(".")[0] == module]:
                patched.delitem(sys.modules, name)
            patched.setattr(sys, "meta_path", [Broken(module), *sys.meta_path])
            with pytest.raises(MissingExtra, match=re.escape(text)):
                call()
