"""Language models of two layers and width 16, written to disk by their own library, and a tokenizer to go with them."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from oracles import seeded
from torch import nn

VOCABULARY = 64
CONTEXT = 32
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
}
WORDS = ["[UNK]", "[PAD]", "[MASK]", "[EOS]", "the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "."]


def families() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Name -> class, class of the configuration, sizes."""
    return {
        "gpt2": (
            "GPT2LMHeadModel",
            "GPT2Config",
            {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2},
        ),
        "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
        "bert": ("BertForMaskedLM", "BertConfig", SIZES),
        "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**SIZES, "num_key_value_heads": 1, "tie_word_embeddings": True}),
        "mistral": ("MistralForCausalLM", "MistralConfig", {**SIZES, "num_key_value_heads": 1}),
        "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SIZES, "num_key_value_heads": 1, "num_local_experts": 4}),
        "opt": (
            "OPTForCausalLM",
            "OPTConfig",
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 16,
                "ffn_dim": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": CONTEXT,
                "word_embed_proj_dim": 16,
            },
        ),
        "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**SIZES, "max_position_embeddings": CONTEXT + 2}),
    }


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """transformers writes reports and progress bars while it makes and saves models."""
    import transformers

    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def live(family: str, **changes: Any) -> nn.Module:
    """The model as its own library makes it, in evaluation mode."""
    import transformers

    name, config, sizes = families()[family]
    special = {"bos_token_id": 3, "eos_token_id": 3, "pad_token_id": 1}
    with silence(), seeded():
        model = getattr(transformers, name)(getattr(transformers, config)(**{**sizes, **special, **changes}))
        # as after training: biases and norms are not where they began, and the function is far from flat
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def saved(model: Any, path: Path, **options: Any) -> Path:
    with silence():
        model.save_pretrained(path, **options)
    return path


def tokenizer(path: Path) -> Any:
    """One token per word, saved into the directory of a model."""
    import tokenizers
    import transformers

    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]", eos_token="[EOS]"
    )
    with silence():
        wrapped.save_pretrained(path)
    return wrapped


def ids(count: int = 2000, low: int = 4, high: int = VOCABULARY) -> numpy.ndarray[Any, Any]:
    return numpy.random.RandomState(0).randint(low, high, count)


def binary(path: Path, count: int = 2000) -> Path:
    ids(count).astype(numpy.uint16).tofile(path)
    return path
