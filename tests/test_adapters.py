"""Adapters as PEFT writes them: read alike, their base found on this disk alone, and hostile ones refused."""

from __future__ import annotations

import json
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from curvkit.checkpoints.adapters import describe_adapter, read_adapter
from curvkit.checkpoints.hugging_face import describe, read_directory
from curvkit.checkpoints.torch_item import item
from curvkit.errors import RefusedCheckpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

KINDS: dict[str, Any] = {
    "LORA": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "DORA": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "LOHA": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "LOKR": lambda: peft.LoKrConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


def load(path: Path) -> Any:
    return item(path, path.read_bytes())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes))
    path = tmp_path_factory.mktemp("base") / "llama"
    model.save_pretrained(path)
    return path


def adapted(base: Path, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        found = peft.get_peft_model(model, config)
        for parameter in found.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
    return found


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "lora"
    adapted(base, KINDS["LORA"]()).save_pretrained(path)
    return path


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "lora"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch):
    def refused(*arguments: Any) -> None:
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = path / "adapter_config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def refusal(path: Path) -> str:
    with pytest.raises(RefusedCheckpoint) as caught:
        read_adapter(path, load=load)
    return str(caught.value)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_adapters_are_read_as_their_library_has_them(base: Path, tmp_path: Path, kind: str):
    model = adapted(base, KINDS[kind]())
    model.save_pretrained(tmp_path)
    found = read_adapter(tmp_path)
    live = peft.get_peft_model_state_dict(model)
    assert found.weights.keys() == live.keys()
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in live.items())
    assert (found.kind, found.base, found.path) == ("PEFT adapter", base, tmp_path)
    assert found.config is not None
    assert found.config["peft_type"] == kind.replace("DORA", "LORA")
    assert found.notes == (
        f"base model: {base}",
        "safetensors has no checksum: a flipped bit in the file would not be noticed",
    )
    said = describe_adapter(tmp_path)
    assert {name: stored.shape for name, stored in said.groups["adapter"].items()} == {
        name: tuple(tensor.shape) for name, tensor in live.items()
    }
    assert said.notes == (f"base model: {base}",)


def test_several_adapters_of_one_model(base: Path, tmp_path: Path):
    model = adapted(base, KINDS["LORA"]())
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    found = read_adapter(tmp_path)
    assert found.notes[-1] == "further adapters lie in other; pass that directory to read one"
    other = read_adapter(tmp_path / "other")
    live = peft.get_peft_model_state_dict(model, adapter_name="other")
    assert other.weights.keys() == live.keys()
    assert all(torch.equal(other.weights[name], tensor) for name, tensor in live.items())


def test_a_checkpoint_of_the_trainer(path: Path, base: Path):
    run = path.parent / "run" / "checkpoint-3"
    run.parent.mkdir()
    shutil.copytree(path, run)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([weight], lr=0.25)
    optimizer.step()
    torch.save(optimizer.state_dict(), run / "optimizer.pt")
    (run / "trainer_state.json").write_text('{"global_step": 3}')
    found = read_directory(run.parent, load=load)
    assert (found.kind, found.step, found.lr, found.base) == ("PEFT adapter", 3, [0.25], base)
    assert found.notes[0] == "checkpoint-3 was taken"
    said = describe(run.parent)
    assert (said.kind, said.step, said.optimizer_file) == ("PEFT adapter", 3, run / "optimizer.pt")
    assert read_adapter(run).optimizer is None  # nothing to read it with
    torch.save({"state": {}}, run / "optimizer.pt")
    assert "does not hold the state of an optimizer" in refusal(run)


# ---- the base model ----------------------------------------------------------------------------------------------------


def test_a_base_beside_the_adapter(path: Path, base: Path):
    shutil.copytree(base, path / "base")
    changed(path, lambda config: config.update(base_model_name_or_path="base"))
    assert read_adapter(path).base == path / "base"


def test_a_base_from_here(path: Path, base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(base.parent)
    changed(path, lambda config: config.update(base_model_name_or_path="llama"))
    found = read_adapter(path).base
    assert found is not None
    assert found.resolve() == base.resolve()


def test_the_order_in_which_a_relative_base_is_looked_for(
    path: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """PEFT writes what was typed in the project's directory; the adapter may lie deep below it, and the user be elsewhere."""
    project = tmp_path / "project"
    deep = Path(shutil.copytree(path, project / "runs" / "one" / "adapter"))
    changed(deep, lambda config: config.update(base_model_name_or_path="models/llama"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(base, tmp_path / "models" / "llama")
    assert read_adapter(deep).base == tmp_path / "models" / "llama"
    (project / ".git").mkdir()
    said = refusal(deep)  # what lies outside of the repository is not the project's
    assert (
        f"from the current directory, {tmp_path / 'elsewhere'}, and from {deep} and the directories above it up to"
        in said
    )
    assert f"up to {project}, and in the cache of downloads." in said
    for place, noted in [
        (project, f"(from {project}; there is none in the current directory)"),
        (project / "runs", f"(from {project / 'runs'}; there is none in the current directory)"),
        (deep, f"(from {deep}; there is none in the current directory)"),
        (tmp_path / "elsewhere", f"(from the current directory, {tmp_path / 'elsewhere'})"),
    ]:
        (place / "models" / "llama").mkdir(parents=True)  # a directory without a model in it does not count
        assert read_adapter(deep).base != place / "models" / "llama" if place != project else refusal(deep)
        shutil.copytree(base, place / "models" / "llama", dirs_exist_ok=True)
        found = read_adapter(deep)
        assert found.base is not None
        assert found.base.resolve() == place / "models" / "llama"
        assert found.notes[0] == f"base model: {found.base} {noted}"


def test_a_home_directory_is_no_project(path: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(base, tmp_path / "llama")
    changed(path, lambda config: config.update(base_model_name_or_path="llama"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_adapter(path).base == tmp_path / "llama"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"and from {path}, and in the cache of downloads" in refusal(path)


@pytest.mark.parametrize("named", ["./llama", "../models/llama", "models/of/mine/llama", "models\\llama"])
def test_what_is_no_name_of_the_hub_is_not_to_be_downloaded(path: Path, named: str):
    changed(path, lambda config: config.update(base_model_name_or_path=named))
    said = refusal(path)
    assert "hf download" not in said
    assert said.endswith(
        "Write its directory into the file (base_model_name_or_path), or start in the directory from which it was trained."
    )


def test_a_base_in_the_cache_of_downloads(path: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--org--llama"
    shutil.copytree(base, model / "snapshots" / "abc")
    changed(path, lambda config: config.update(base_model_name_or_path="org/llama"))
    assert read_adapter(path).base == model / "snapshots" / "abc"
    changed(path, lambda config: config.update(revision="def"))
    assert "the revision 'def' is not among the snapshots" in refusal(path)
    changed(path, lambda config: config.update(revision=["def"]))
    assert "revision is a list, not a name" in refusal(path)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (None, "does not say which model the adapter belongs to (base_model_name_or_path)"),
        ("", "does not say which model the adapter belongs to"),
        (3, "does not say which model the adapter belongs to"),
        ("https://example.org/model", "is 'https://example.org/model', which is neither a directory nor the name"),
        ("file:///etc", "nothing is downloaded"),
        ("a\x1b[31m", "neither a directory nor the name of a model"),
        ("a" * 2000, "neither a directory nor the name of a model"),
        ("a" * 900, "cannot be looked up"),
        ("~nobody-of-this-name/x", "cannot be looked up"),
        ("org/absent", "cache of Hugging Face where the network may be used: hf download org/absent"),
        ("/absent/model", "the base model '/absent/model' is not on this disk, and nothing is downloaded"),
        ("/", "where no config.json of a model lies"),
        (".", "where no config.json of a model lies"),
    ],
)
def test_a_base_that_is_not_there(path: Path, named: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(path)
    changed(path, lambda config: config.update(base_model_name_or_path=named))
    message = refusal(path)
    assert said in message
    assert message.startswith(str(path))
    message.encode()
    assert describe_adapter(path).groups["adapter"]


# ---- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", None, ["LORA"], "lora"])
def test_other_kinds(path: Path, kind: Any):
    changed(path, lambda config: config.update(peft_type=kind))
    said = refusal(path)
    assert "peft_type is " in said
    assert "adapters of the kinds LORA, LOHA, LOKR are read" in said
    with pytest.raises(RefusedCheckpoint):
        describe_adapter(path)


def test_fields_that_make_peft_import_something(path: Path):
    changed(path, lambda config: config.update(megatron_config={"a": 1}, megatron_core="antigravity"))
    assert "megatron_config makes PEFT import the module that the file names. Nothing was imported." in refusal(path)


def test_weights_that_are_not_of_an_adapter(path: Path, tmp_path: Path):
    save_file({"model.weight": torch.ones(2)}, path / "adapter_model.safetensors")
    assert "holds the tensor 'model.weight'; names of an adapter begin with 'base_model.model.'" in refusal(path)
    save_file({}, path / "adapter_model.safetensors")
    assert "holds no tensor; names of an adapter" in refusal(path)
    (path / "adapter_model.safetensors").unlink()
    assert "the file 'adapter_model.safetensors' is not there" in refusal(path)
    (path / "adapter_model.bin").write_bytes(b"anything")
    assert "the adapter is a pickle (adapter_model.bin)" in refusal(path)
    save_file({"model.weight": torch.ones(2)}, tmp_path / "outside")
    (path / "adapter_model.safetensors").symlink_to(tmp_path / "outside")
    assert "is a link to" in refusal(path)


def test_mutated_adapters_are_read_or_refused(path: Path):
    files = {file: file.read_bytes() for file in sorted(path.glob("adapter_*"))}
    draw = random.Random(0)
    ended = {True: 0, False: 0}
    for _ in range(300):
        file = draw.choice(list(files))
        content = bytearray(files[file])
        at, kind = draw.randrange(len(content)), draw.randrange(4)
        if kind == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content[at : at + 4] = draw.choice([b'"../x"', b"null", b"-1", b"1e999", b"[[", b"\xff\xff"])
        else:
            start = draw.randrange(len(content))
            content[at:at] = content[start : start + 60]
        file.write_bytes(content)
        for function in (lambda: read_adapter(path, load=load), lambda: describe_adapter(path)):
            try:
                function()
            except RefusedCheckpoint:
                ended[False] += 1
            else:
                ended[True] += 1
        file.write_bytes(files[file])
    assert min(ended.values()) > 30
