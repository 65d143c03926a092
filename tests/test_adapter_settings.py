"""Settings of adapters: no stranger's expression is searched with, and the adapted model is the live one of peft all the same."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import live, saved, silence
from torch import Tensor, nn

from curvkit.checkpoints import read
from curvkit.checkpoints.adapters import read_adapter
from curvkit.checkpoints.trust import NOTHING
from curvkit.errors import RefusedCheckpoint, UnknownObjective
from curvkit.resolving.adapted_models import adapt
from curvkit.resolving.adapter_settings import exact
from curvkit.resolving.hugging_face_models import build_hugging_face
from curvkit.resolving.language_model import LanguageModel

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

NEVER = "([a-z_.0-9]+)+!"
"""An expression that takes time exponential in the length of what it does not match."""
TOKENS = torch.arange(4, 20)[None]
CONFIGS: dict[str, Callable[[], Any]] = {
    "regular expression": lambda: peft.LoraConfig(r=2, target_modules=r".*\.(q|v)_proj"),
    "all linear layers": lambda: peft.LoraConfig(r=2, target_modules="all-linear"),
    "all linear but some": lambda: peft.LoraConfig(
        r=2, target_modules="all-linear", exclude_modules=r".*layers\.0\..*"
    ),
    "some layers": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]),
    "layers by a pattern": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=r"lay\w+s"
    ),
    "ranks and alphas": lambda: peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"q_proj": 3, r"^model\.layers\.1\.self_attn\.v_proj$": 1},
        alpha_pattern={"layers.0.self_attn.q_proj": 5, r".*layers\.\d+\.mlp\.up_proj": 32, "q_proj": 7},
    ),
    "ranks of LoHa": lambda: peft.LoHaConfig(
        r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 3}
    ),
    "ranks of LoKr": lambda: peft.LoKrConfig(r=2, target_modules=".*q_proj", rank_pattern={"layers.1.*": 1}),
    "whole modules": lambda: peft.LoraConfig(r=2, target_modules=".*q_proj", modules_to_save=["lm_head"]),
    "embeddings": lambda: peft.LoraConfig(r=2, target_modules="model.embed_tokens", rank_pattern={"embed_tokens": 3}),
    "directions and lengths": lambda: peft.LoraConfig(r=2, target_modules=".*q_proj", use_dora=True),
    "layers twice": lambda: peft.LoraConfig(r=2, target_modules=".*q_proj", layer_replication=[[0, 2], [1, 2]]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(live("llama"), tmp_path_factory.mktemp("base") / "llama")


def adapted(base: Path, config: Any, path: Path) -> nn.Module:
    """A live adapted model, in evaluation mode, that has been saved."""
    import transformers

    with silence(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(path)
    return model


def read_back(path: Path) -> LanguageModel:
    checkpoint = read_adapter(path)
    assert checkpoint.base is not None
    return adapt(build_hugging_face(read(checkpoint.base), NOTHING), checkpoint)


def changed(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_adapted_model_is_the_live_one(base: Path, tmp_path: Path, kind: str):
    model = adapted(base, CONFIGS[kind](), tmp_path)
    found = read_back(tmp_path)
    assert torch.equal(logits(found.model), logits(model))
    own = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert {name: p.shape for name, p in found.model.named_parameters() if p.requires_grad} == own
    assert not torch.equal(logits(found.model), logits(build_hugging_face(read(base), NOTHING).model))
    searched = kind not in ("all linear layers", "some layers", "ranks and alphas", "ranks of LoHa")
    assert searched == any("is an expression, which is not searched with" in note for note in found.notes)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": NEVER},
        {"exclude_modules": NEVER},
        {"layers_to_transform": [0, 1], "layers_pattern": [NEVER]},
        {"layers_to_transform": [0, 1], "layers_pattern": NEVER},
        {"target_modules": ["q_proj", NEVER]},
        {"target_modules": ["q_proj", *(f"x{i}" for i in range(5000))]},
        {"rank_pattern": {NEVER: 2}},
        {"rank_pattern": {"nowhere": 3}},
        {"alpha_pattern": {f"x{i}": 2 for i in range(900)}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_expressions_that_never_end_are_replaced(base: Path, tmp_path: Path, changes: dict[str, Any]):
    model = adapted(base, peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    changed(tmp_path, **changes)
    begin = time.monotonic()
    assert torch.equal(logits(read_back(tmp_path).model), logits(model))
    assert time.monotonic() - begin < 60  # NEVER takes minutes for the name of one module, and more for longer ones


def test_the_expression_would_not_end():
    """Law: its time doubles with every letter, so that the tests above can fail."""
    took = []
    for count in (16, 20):
        begin = time.process_time()
        assert re.fullmatch(NEVER, "a" * count) is None
        took.append(time.process_time() - begin)
    assert took[1] > 4 * took[0]  # sixteen times, if nothing else ran


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpha_pattern": {NEVER: 2}}, "alpha_pattern has '([a-z_.0-9]+)+!', an expression; searching with it"),
        ({"alpha_pattern": {"(q|q)_proj": 2}}, "Write the names of the modules in its place"),
        ({"alpha_pattern": {".*.*.*x": 2}}, "alpha_pattern has '.*.*.*x', an expression"),
        ({"alpha_pattern": {f"a.*{i}": 2 for i in range(33)}}, "alpha_pattern has 33 patterns"),
        ({"alpha_pattern": {f"x{i}": 2 for i in range(5000)}}, "alpha_pattern has 5,000 patterns"),
        ({"alpha_pattern": {"q_proj": "2"}}, "alpha_pattern is an object, not names of modules with a number each"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is a list, not names of modules with a number each"),
        ({"modules_to_save": [NEVER]}, "modules_to_save is no list of names of modules (a list)"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is no list of names of modules ('lm_head')"),
        ({"modules_to_save": ["a"] * 1001}, "modules_to_save is no list of names of modules"),
        ({"trainable_token_indices": {NEVER: [1]}}, "trainable_token_indices is no list of names of modules"),
        ({"r": 10**9}, "asks for the rank 1000000000, but no size of its weights is above 16"),
        ({"rank_pattern": {"q_proj": 10**30}}, "asks for the rank a number of many digits"),
        ({"layer_replication": [[0, 2]] * 2000}, "asks for more layers than the adapter has weights"),
        ({"layer_replication": [[0, "2"]]}, "layer_replication is no list of [start, end]"),
        ({"layer_replication": 0.5}, "layer_replication is no list of [start, end]"),
        ({"layer_replication": [3]}, "layer_replication is no list of [start, end]"),
        ({"target_parameters": ["a"], "target_modules": NEVER}, "beside target_parameters, target_modules cannot be"),
        ({"target_parameters": ["a"], "alpha_pattern": {NEVER: 1}}, "beside target_parameters, the pattern"),
        (
            {"target_parameters": ["a"], "alpha_pattern": {f"x{i}": 1 for i in range(33)}},
            "rank_pattern or alpha_pattern",
        ),
        ({"target_parameters": NEVER}, "beside target_parameters, target_parameters cannot be replaced"),
    ],
)
def test_settings_that_are_refused(base: Path, tmp_path: Path, changes: dict[str, Any], said: str):
    adapted(base, peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    changed(tmp_path, **changes)
    with pytest.raises(RefusedCheckpoint) as caught:
        read_back(tmp_path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "adapter_config.json"))


def test_an_adapter_that_cannot_be_called(base: Path, tmp_path: Path):
    adapted(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path)
    changed(tmp_path, alora_invocation_tokens=3)
    with pytest.raises(
        UnknownObjective, match=f"{tmp_path}: a PeftModelForCausalLM cannot be called with tokens alone"
    ):
        read_back(tmp_path)


def test_weights_of_modules_that_the_base_does_not_have():
    weights = {"base_model.model.h.0.q.lora_A.weight": torch.ones(2, 4)}
    with pytest.raises(RefusedCheckpoint, match=r"belong to 1 modules that the base model does not have, .* 'h\.0\.q'"):
        exact(Path("a"), {"peft_type": "LORA", "target_modules": ".*q"}, weights, ["h.1.q"])


def test_patterns_give_what_peft_finds():
    """Oracle: peft's own look-up of a pattern, for the patterns that are handed on and those that are put in their place."""
    from peft.utils.other import get_pattern_key

    draws = random.Random(0)
    modules = [
        f"model.layers.{i}.{part}" for i in range(12) for part in ("attn.q_proj", "attn.o_proj", "mlp.up", "q_proj")
    ]
    weights = {f"base_model.model.{name}.lora_A.weight": torch.ones(2, 64) for name in modules}
    pieces = [
        "q_proj",
        "proj",
        r"layers\.1",
        "layers.1",
        ".*",
        r"\.",
        r"\d+",
        "[0-9]",
        "^model",
        "attn",
        ".",
        "up$",
        "_",
    ]
    seen = 0
    for _ in range(400):
        patterns: dict[str, Any] = {
            "".join(draws.choices(pieces, k=draws.randint(1, 4))): draws.randint(1, 9) for _ in range(3)
        }
        settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "alpha_pattern": patterns}
        try:
            made, _ = exact(Path("a"), settings, weights, modules)
        except RefusedCheckpoint:
            continue
        for name in modules:
            wanted = patterns.get(get_pattern_key(list(patterns), name))
            found = made["alpha_pattern"].get(get_pattern_key(list(made["alpha_pattern"]), name))
            assert found == wanted
            seen += wanted is not None
    assert seen > 1000
