"""Configurations of models: nothing is fetched, imported or built in vain because of one."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONTEXT, live, saved

from curvkit.checkpoints import read
from curvkit.checkpoints.trust import NOTHING
from curvkit.errors import RefusedCheckpoint, UnknownObjective
from curvkit.resolving.configurations import NOT_OURS, plain, refuse_unbuildable
from curvkit.resolving.hugging_face_models import build_hugging_face

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch):
    def refused(*arguments: Any) -> None:
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)


def changed(path: Path, **changes: Any) -> Path:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return path


def test_what_is_not_the_model_is_left_out_everywhere():
    hostile = dict.fromkeys(NOT_OURS, "x")
    assert plain({**hostile, "a": 1, "b": {**hostile, "c": [{**hostile, "d": 2}]}}) == {"a": 1, "b": {"c": [{"d": 2}]}}


HOSTILE: dict[str, Any] = {
    "use_kernels": True,
    "kernel_config": {"kernel_mapping": {"RMSNorm": "evil/kernel:Norm"}},
    "experts_implementation": "sonicmoe",
    "_experts_implementation": "deepgemm",
    "custom_pipelines": {"evil": {"impl": "evil.Pipeline", "pt": ["AutoModelForCausalLM"]}},
    "num_labels": 10**12,
    "id2label": {"0": "a"},
    "problem_type": "single_label_classification",
    "gguf_file": "evil.gguf",
    "transformers_weights": "evil.safetensors",
    "distributed_config": {"enable_expert_parallel": True},
    "_name_or_path": "https://evil.example/model",
    "extra_config": {"attn_implementation": "flash_attention_2", "auto_map": None},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As if the package `kernels` were installed: which kernels of the Hub would be fetched and imported."""
    modeling, hub = (
        pytest.importorskip(f"transformers.{name}") for name in ("modeling_utils", "integrations.hub_kernels")
    )
    found: list[str] = []

    def fetch(name: str, **options: Any) -> Any:
        found.append(name)
        raise FileNotFoundError(name)

    monkeypatch.setattr(modeling, "is_kernels_available", lambda: True, raising=False)
    monkeypatch.setattr(hub, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub, "get_kernel_hub", fetch, raising=False)
    return found


def test_the_library_itself_would_fetch(asked: list[str]):
    """The tests below can fail."""
    config = transformers.LlamaConfig(num_hidden_layers=1, attn_implementation="evil/kernel")
    with pytest.raises(Exception, match="evil/kernel"):
        transformers.LlamaForCausalLM(config)
    assert asked == ["evil/kernel"]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_hostile_configuration_changes_nothing(tmp_path: Path, family: str, asked: list[str]):
    """Oracle: the live model."""
    model = live(family)
    path = changed(saved(model, tmp_path / "model"), **HOSTILE)
    tokens = torch.arange(8)[None]
    found = build_hugging_face(read(path), NOTHING)
    assert torch.equal(found.model(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert asked == []


@pytest.mark.parametrize("place", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", {"": "evil/kernel"}, {"text_config": "evil/kernel"}])
def test_ways_to_run_attention_are_ours(tmp_path: Path, place: str, value: Any, asked: list[str]):
    model = live("llama")
    path = changed(saved(model, tmp_path / "model"), **{place: value})
    tokens = torch.arange(8)[None]
    found = build_hugging_face(read(path), NOTHING)
    assert torch.equal(found.model(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert asked == []


@pytest.mark.parametrize("kind", ["mra", "rwkv", "yoso"])
def test_models_that_fetch_their_layers(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    home = tmp_path / "site"
    home.mkdir()
    (home / "kernels.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(home))
    path = changed(saved(live("llama"), tmp_path / "model"), model_type=kind, architectures=["RwkvForCausalLM"])
    with pytest.raises(
        RefusedCheckpoint, match=f"of the type {kind} fetches code from the Hub .*pip uninstall kernels"
    ):
        build_hugging_face(read(path), NOTHING)


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"n_layer": 10**9}, "has n_layer = 1,000,000,000, but 0 weights are there"),
        ({"text_config": {"max_position_embeddings": 10**9}}, "max_position_embeddings = 1e+09, a context longer than"),
        ({"n_positions": 10**400}, r"n_positions = 1.84e+19, a context longer than"),
        ({"num_local_experts": 10**9}, "num_local_experts = 1e+09, but 0 weights are there"),
        ({"list": [{"inner_group_num": 5000}]}, "inner_group_num = 5e+03, but 0 weights are there"),
        (
            {"model_type": "roformer", "hidden_size": 10**6, "max_position_embeddings": 10**4},
            "of 1e+04 by 1e+06, and its",
        ),
    ],
)
def test_sizes_that_are_never_built(described: dict[str, Any], said: str):
    with pytest.raises(UnknownObjective) as caught:
        refuse_unbuildable("config.json", described, {})
    assert str(caught.value).startswith("config.json ")
    assert said in str(caught.value)


def test_sizes_of_models_that_there_are():
    for kind in ("llama", "mixtral"):
        config = live(kind).config.to_dict()
        refuse_unbuildable("config.json", config, {})
    large = {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 94,
        "num_experts": 512,
        "shared_expert_intermediate_size": 20480,
    }
    refuse_unbuildable("config.json", {**large, "vocab_size": 200_000, "max_position_embeddings": 10_485_760}, {})


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"n_positions": 10**7, "n_ctx": 10**7}),
        ("llama", {"max_position_embeddings": 10**10}),
        ("llama", {"hidden_size": 10**12}),
        ("llama", {"vocab_size": 10**18}),
        ("llama", {"num_attention_heads": 10**9, "head_dim": 10**9}),
        ("llama", {"intermediate_size": 10**30}),
        ("llama", {"dtype": "os"}),
        ("llama", {"rms_norm_eps": float("nan")}),
        ("gpt2", {"layer_norm_epsilon": float("nan")}),
        ("llama", {"rope_parameters": {"rope_type": "evil"}}),
        ("llama", {"hidden_act": "os.system"}),
        ("llama", {"to_dict": 1, "__class__": "x"}),
        ("bert", {"max_position_embeddings": 10**9}),
    ],
    ids=str,
)
def test_a_configuration_of_another_size_is_refused_at_once(tmp_path: Path, family: str, changes: dict[str, Any]):
    path = changed(saved(live(family), tmp_path / "model"), **changes)
    begin = time.monotonic()
    with pytest.raises(UnknownObjective):
        build_hugging_face(read(path), NOTHING)
    assert time.monotonic() - begin < 60


def test_a_long_context_by_rotation_is_built(tmp_path: Path):
    """Rotations need no table: a context of millions costs nothing."""
    path = changed(saved(live("llama"), tmp_path / "model"), max_position_embeddings=10_485_760)
    assert build_hugging_face(read(path), NOTHING).context == 10_485_760 > CONTEXT


def test_a_way_to_save_memory_is_not_the_model(tmp_path: Path):
    model = live("bert")
    path = changed(saved(model, tmp_path / "model"), chunk_size_feed_forward=3)
    tokens = torch.arange(8)[None]
    assert torch.equal(
        build_hugging_face(read(path), NOTHING).model(input_ids=tokens).logits, model(input_ids=tokens).logits
    )


def test_a_context_of_one_token_has_no_later_ones(tmp_path: Path):
    path = changed(saved(live("llama"), tmp_path / "model"), max_position_embeddings=1)
    assert build_hugging_face(read(path), NOTHING).context == 1
