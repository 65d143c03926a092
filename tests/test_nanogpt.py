"""nanoGPT's model and checkpoints: the same function as transformers' GPT-2, read without any code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import classes, seeded
from tiny_models import binary, ids, silence
from torch import Tensor, nn

from curvkit import BatchLoss, Objective
from curvkit.checkpoints import read
from curvkit.errors import InvalidArgument, UnknownObjective
from curvkit.measures import sharpness
from curvkit.models import GPT, build
from curvkit.resolving import Request, TextData, resolve

ARGUMENTS: dict[str, Any] = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "bias": True, "vocab_size": 64, "dropout": 0.1,
}  # fmt: skip
T = 16


def model(**changes: Any) -> GPT:
    with seeded():
        made = GPT(**{**ARGUMENTS, **changes})
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return made.eval()


def twin(made: GPT) -> nn.Module:
    """transformers' GPT-2 with the same weights; its maps are transposed."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, activation_function="gelu",
        bos_token_id=3, eos_token_id=3,
    )  # fmt: skip
    with silence():
        other = transformers.GPT2LMHeadModel(config).eval()
    names = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            own = made.state_dict().get(name)
            if own is None:  # without bias
                parameter.zero_()
            else:
                parameter.copy_(own.T if name.endswith(names) else own)
    return other


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_gpt2(bias: bool):
    made = model(bias=bias)
    tokens = classes(3, 32, num=64)
    theirs = twin(made)(input_ids=tokens).logits
    assert torch.equal(made(tokens), made(tokens))
    # both round in float32, through two layers of a few dozen terms each
    torch.testing.assert_close(made(tokens), theirs, rtol=1e-4, atol=1e-5)


def test_names_and_shapes_are_those_of_its_checkpoints():
    names = {name: tuple(value.shape) for name, value in model().state_dict().items()}
    block = {
        "ln_1.weight": (16,), "ln_1.bias": (16,), "attn.c_attn.weight": (48, 16), "attn.c_attn.bias": (48,),
        "attn.c_proj.weight": (16, 16), "attn.c_proj.bias": (16,), "ln_2.weight": (16,), "ln_2.bias": (16,),
        "mlp.c_fc.weight": (64, 16), "mlp.c_fc.bias": (64,), "mlp.c_proj.weight": (16, 64), "mlp.c_proj.bias": (16,),
    }  # fmt: skip
    expected: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (64, 16), "transformer.wpe.weight": (32, 16)}
    for layer in range(2):
        expected |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    ends = {"transformer.ln_f.weight": (16,), "transformer.ln_f.bias": (16,), "lm_head.weight": (64, 16)}
    assert names == {**expected, **ends}
    w, b = 16, 1
    count = 64 * w + 32 * w + 2 * (12 * w * w + 9 * b * w + 2 * (1 + b) * w) + (1 + b) * w
    assert sum(p.numel() for p in model().parameters()) == count
    assert sum(p.numel() for p in model(bias=False).parameters()) == 64 * w + 32 * w + 2 * (12 * w * w + 2 * w) + w


def test_positions_are_causal():
    made, tokens = model(), classes(1, 8, num=64)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 64
    assert torch.equal(made(tokens)[:, :5], made(changed)[:, :5])
    assert not torch.equal(made(tokens)[:, 5:], made(changed)[:, 5:])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n_layer": 0}, "GPT: n_layer=0 must be an integer >= 1"),
        ({"n_head": "2"}, "GPT: n_head='2' must be an integer"),
        ({"n_embd": 1.5}, "GPT: n_embd=1.5 must be an integer"),
        ({"block_size": True}, "GPT: block_size=True must be an integer"),
        ({"vocab_size": -1}, "GPT: vocab_size=-1 must be an integer"),
        ({"n_head": 3}, "GPT: n_head=3 must divide n_embd=16"),
        ({"bias": 1}, "GPT: bias=1 must be True or False"),
        ({"dropout": 1.5}, "GPT: dropout=1.5 must be a probability"),
    ],
)
def test_sizes_that_make_no_model(changes: dict[str, Any], text: str):
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        build("nanogpt", {**ARGUMENTS, **changes})


def test_tokens_that_are_none():
    with pytest.raises(InvalidArgument, match="GPT: tokens of shape .* must be .N, T. int64"):
        model()(torch.zeros(2, 3))
    with pytest.raises(InvalidArgument, match="GPT: 33 tokens in one sequence are more than block_size=32"):
        model()(torch.zeros(1, 33, dtype=torch.int64))


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def written(path: Path, made: GPT, *, prefix: str = "", **more: Tensor) -> Path:
    """As nanoGPT's train.py writes it."""
    optimizer = torch.optim.AdamW(made.parameters(), lr=6e-4, betas=(0.9, 0.95))
    bias = made.lm_head.weight is not None and "transformer.ln_f.bias" in made.state_dict()
    torch.save(
        {
            "model": {f"{prefix}{name}": value for name, value in {**made.state_dict(), **more}.items()},
            "optimizer": optimizer.state_dict(),
            "model_args": {**ARGUMENTS, "bias": bias},
            "iter_num": 2000,
            "best_val_loss": torch.tensor(1.5),
            "config": {"dataset": "shakespeare", "batch_size": 12},
        },
        path,
    )
    return path


def asked(path: Path, **changes: Any) -> Request:
    return Request(data=TextData(path, **{"seq_len": T, "tokens": 4 * T, **changes}))


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_is_the_live_model(tmp_path: Path, prefix: str, bias: bool):
    made = model(bias=bias)
    checkpoint = read(written(tmp_path / "ckpt.pt", made, prefix=prefix))
    assert checkpoint.step == 2000
    found = resolve(checkpoint, asked(binary(tmp_path / "val.bin")))
    assert (
        found.source
        == f"GPT of nanoGPT (nanoGPT checkpoint) · token_cross_entropy of 4 windows of {T} tokens from val.bin"
    )
    ((x, y),) = found.objective.batches
    stream = torch.from_numpy(ids())
    assert torch.equal(x, torch.stack([stream[s : s + T] for s in range(0, 2000, 500)]))
    assert torch.equal(y, torch.stack([stream[s + 1 : s + 1 + T] for s in range(0, 2000, 500)]))
    assert torch.equal(found.objective.model(x), made(x))
    assert found.objective.parameters.n == sum(p.numel() for p in made.parameters())
    assert found.objective.parameters.tied == {"lm_head.weight": "transformer.wte.weight"}

    def own(live: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return F.cross_entropy(
            live(input_ids=batch[0]).logits.flatten(0, 1), batch[1].flatten(), reduction="sum"
        ), y.numel()

    theirs = Objective(twin(made), BatchLoss(own), [(x, y)], None if bias else ["*weight"])
    top = sharpness(found.objective, seed=0).eigenpairs.values[0].item()
    # two searches to a relative residual of 1e-3: eigenvalues are off by far less
    assert top == pytest.approx(sharpness(theirs, seed=0).eigenpairs.values[0].item(), rel=1e-3)


def test_masks_of_old_torch_are_left_out(tmp_path: Path):
    made = model()
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(32, 32).tril()[None, None] for i in range(2)}
    found = resolve(read(written(tmp_path / "ckpt.pt", made, **masks)), asked(binary(tmp_path / "val.bin")))
    assert "left out: 2 causal masks, which are not weights" in found.notes
    masks["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    with pytest.raises(UnknownObjective, match=r"unexpected *transformer.h.0.attn.bias"):
        resolve(read(written(tmp_path / "ckpt.pt", made, **masks)), asked(tmp_path / "val.bin"))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n_experts": 4}, "model_args has n_experts, which nanoGPT's GPT does not take"),
        ({"n_head": 3}, "its model_args make no model. GPT: n_head=3 must divide"),
        ({"n_layer": 10**9}, "model_args has n_layer = 1,000,000,000, but"),
        ({"n_layer": 3}, "the weights do not fit the model"),
        ({"vocab_size": 10**12}, "the weights do not fit the model"),
    ],
)
def test_model_args_of_another_model(tmp_path: Path, changes: dict[str, Any], text: str):
    content = torch.load(written(tmp_path / "ckpt.pt", model()), weights_only=True)
    content["model_args"] |= changes
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(UnknownObjective, match=re.escape(text)):
        resolve(read(tmp_path / "ckpt.pt"), asked(binary(tmp_path / "val.bin")))


def test_a_text_needs_a_tokenizer_and_a_pickle_is_not_opened(tmp_path: Path):
    checkpoint = read(written(tmp_path / "ckpt.pt", model()))
    (tmp_path / "val.txt").write_text("the cat sat")
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(UnknownObjective) as caught:
        resolve(checkpoint, asked(tmp_path / "val.txt"))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path / 'val.txt'} is text, and there is no tokenizer to make tokens of it."
    assert lines[2] == f"           {tmp_path / 'meta.pkl'}, a pickle, which is not opened: that could run code"
    command = f"curvkit sharpness {tmp_path / 'ckpt.pt'} --data val.bin"
    assert lines[4] == f"  do one   {command}    the ids that nanoGPT's prepare.py wrote for its training"
    with pytest.raises(UnknownObjective) as caught:
        resolve(checkpoint)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path / 'ckpt.pt'} is a GPT of nanoGPT, but nothing says on which text to measure it."
    assert lines[3].startswith(f"  do one   curvkit sharpness {tmp_path / 'ckpt.pt'} --data val.bin")
