"""Directories of Hugging Face as transformers writes them, and their hostile, damaged and half-written twins."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import Payload, environment, net
from torch import nn

from curvkit.checkpoints import inspect, read
from curvkit.checkpoints.confined import confined, shown
from curvkit.checkpoints.hub_cache import cached, snapshot
from curvkit.checkpoints.hugging_face import describe, read_directory
from curvkit.checkpoints.torch_item import item
from curvkit.checkpoints.trust import Trust
from curvkit.errors import RefusedCheckpoint

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def load(path: Path) -> Any:
    return item(path, path.read_bytes())


def gpt2(**more: Any) -> nn.Module:
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **more)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng():
        return gpt2()


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout, written once; tests copy what they change."""
    root = tmp_path_factory.mktemp("saved")
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="8KB")
    for name in ("old", "old-sharded"):
        (root / name).mkdir()
        shutil.copy(root / "single" / "config.json", root / name)
    torch.save(model.state_dict(), root / "old" / "pytorch_model.bin")
    state = model.state_dict()
    index: dict[str, Any] = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": {}}
    for number, half in enumerate((list(state)[:9], list(state)[9:]), 1):
        torch.save({name: state[name] for name in half}, root / "old-sharded" / f"pytorch_model-{number}.bin")
        index["weight_map"] |= dict.fromkeys(half, f"pytorch_model-{number}.bin")
    (root / "old-sharded" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return root


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(saved / name, tmp_path / name))


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(RefusedCheckpoint) as caught:
        read_directory(path, load=load, **options)
    return str(caught.value)


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def equal(weights: dict[str, torch.Tensor], model: nn.Module, absent: tuple[str, ...] = ()) -> bool:
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in absent}
    return weights.keys() == state.keys() and all(
        weights[name].dtype is tensor.dtype and torch.equal(weights[name], tensor) for name, tensor in state.items()
    )


# ---- what is read: the live model is the oracle ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_safetensors_directories(saved: Path, model: nn.Module, layout: str):
    found = read_directory(saved / layout, load=load)
    assert equal(found.weights, model, absent=("lm_head.weight",))  # tied, so not in the file
    assert found.kind == "Hugging Face directory"
    assert found.config is not None
    assert (found.config["model_type"], found.config["tie_word_embeddings"]) == ("gpt2", True)
    assert found.notes == ("safetensors has no checksum: a flipped bit in the file would not be noticed",)
    assert (found.path, found.optimizer, found.step, found.base) == (saved / layout, None, None, None)
    said = describe(saved / layout)
    assert {name: stored.shape for name, stored in said.groups["model"].items()} == {
        name: tuple(tensor.shape) for name, tensor in found.weights.items()
    }
    assert said.kind == found.kind
    assert "no checksum" in said.checksum
    assert said.bytes == sum(file.stat().st_size for file in (saved / layout).glob("*.safetensors"))
    assert len(list((saved / "sharded").glob("*.safetensors"))) > 3


@pytest.mark.parametrize("layout", ["old", "old-sharded"])
def test_directories_of_old_pickles(saved: Path, model: nn.Module, layout: str):
    found = read_directory(saved / layout, load=load)
    assert equal(found.weights, model)
    assert found.notes == ()
    said = describe(saved / layout)
    assert [file.name for file in said.torch_files] == sorted(f.name for f in (saved / layout).glob("*.bin"))
    assert said.groups == {}
    assert said.checksum == "CRC-32 of every record"


def test_bf16_keeps_its_bits(tmp_path: Path):
    with torch.random.fork_rng():
        model = gpt2().bfloat16()
    model.save_pretrained(tmp_path)
    found = read_directory(tmp_path, load=load)
    assert equal(found.weights, model, absent=("lm_head.weight",))
    assert {tensor.dtype for tensor in found.weights.values()} == {torch.bfloat16}


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(6) + index, "labels": torch.arange(6) + index}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of the Trainer with checkpoints 5, 10 and 12."""
    path = tmp_path_factory.mktemp("run")
    options = {"max_steps": 12, "save_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    arguments = transformers.TrainingArguments(
        str(path), **options, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no"
    )
    with torch.random.fork_rng():
        trainer = transformers.Trainer(model=gpt2(), args=arguments, train_dataset=Rows())
        trainer.train()
    return path, trainer


def test_of_a_run_the_last_checkpoint_by_number_is_taken(run: tuple[Path, Any]):
    path, trainer = run
    assert sorted(child.name for child in path.iterdir()) == ["checkpoint-10", "checkpoint-12", "checkpoint-5"]
    found = read_directory(path, load=load)
    assert found.path == path / "checkpoint-12"
    assert found.notes[0] == "checkpoint-12 was taken, the last of 3 checkpoints"
    assert found.kind == "Hugging Face checkpoint"
    assert found.step == 12
    assert equal(found.weights, trainer.model, absent=("lm_head.weight",))
    live = trainer.optimizer.state_dict()
    assert found.optimizer is not None
    assert [group["params"] for group in found.optimizer["param_groups"]] == [g["params"] for g in live["param_groups"]]
    assert found.lr == [live["param_groups"][0]["lr"]]
    for index, state in live["state"].items():
        assert torch.equal(found.optimizer["state"][index]["exp_avg_sq"], state["exp_avg_sq"])
    said = describe(path)
    assert (said.step, said.kind) == (12, found.kind)
    assert said.optimizer_file == path.resolve() / "checkpoint-12" / "optimizer.pt"
    assert read_directory(path / "checkpoint-5", load=load).step == 5


def test_training_args_are_never_opened(run: tuple[Path, Any], tmp_path: Path):
    path = Path(shutil.copytree(run[0] / "checkpoint-12", tmp_path / "checkpoint-12"))
    (path / "training_args.bin").write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    (path / "rng_state.pth").unlink()
    (path / "rng_state.pth").symlink_to("/dev/zero")
    assert read_directory(path, load=load).step == 12
    assert not (tmp_path / "marker").exists()


def test_a_run_whose_last_model_was_saved_too(run: tuple[Path, Any], copy: Callable[[str], Path]):
    path = copy("single")
    shutil.copytree(run[0] / "checkpoint-5", path / "checkpoint-5")
    assert read_directory(path, load=load).path == path
    (path / "model.safetensors").unlink()  # only configuration and tokenizer lie beside the checkpoints
    found = read_directory(path, load=load)
    assert (found.path, found.notes[0]) == (path / "checkpoint-5", "checkpoint-5 was taken")


def test_weights_without_a_configuration(tmp_path: Path):
    save_file(net().state_dict(), tmp_path / "model.safetensors")
    torch.save(torch.optim.SGD(net().parameters(), lr=0.5).state_dict(), tmp_path / "optimizer.bin")  # accelerate
    found = read_directory(tmp_path, load=load)
    assert equal(found.weights, net())
    assert (found.kind, found.config, found.lr) == ("directory of weights", None, [0.5])
    note = "there is no config.json: the directory does not say which model the weights belong to"
    assert found.notes[-1] == note
    assert describe(tmp_path).notes == (note,)


def test_prefixes_of_wrappers_are_taken_away(tmp_path: Path):
    compiled = torch.compile(net())
    save_file(compiled.state_dict(), tmp_path / "model.safetensors")
    found = read_directory(tmp_path, load=load)
    assert equal(found.weights, net())
    assert found.removed == ("_orig_mod.",)


def test_the_step_is_in_the_name_where_nothing_else_says_it(tmp_path: Path):
    (tmp_path / "checkpoint-7").mkdir()
    save_file(net().state_dict(), tmp_path / "checkpoint-7" / "model.safetensors")
    assert read_directory(tmp_path, load=load).step == 7


def test_what_lies_beside_the_weights_is_said(copy: Callable[[str], Path], model: nn.Module):
    path = copy("single")
    torch.save({}, path / "pytorch_model.bin")
    found = read_directory(path, load=load)
    assert equal(found.weights, model, absent=("lm_head.weight",))
    assert found.notes[0] == "pytorch_model.bin lies beside model.safetensors and was not read"


def test_reading_needs_neither_transformers_nor_for_headers_torch(saved: Path):
    program = (
        "import sys; from pathlib import Path; from curvkit.checkpoints.hugging_face import describe; "
        "describe(Path(sys.argv[1])); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(saved / "sharded")],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False False\n"


# ---- the cache of downloads --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As huggingface_hub lays it out: blobs by hash, and links to them."""
    folder = tmp_path / "hub" / "models--org--tiny"
    snapshots = folder / "snapshots" / "abc123"
    snapshots.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc123")
    for number, file in enumerate(sorted((saved / "sharded").iterdir())):
        shutil.copy(file, folder / "blobs" / f"hash{number}")
        (snapshots / file.name).symlink_to(f"../../blobs/hash{number}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def test_links_within_one_model_of_the_cache_are_followed(hub: Path, model: nn.Module):
    found = read_directory(hub / "snapshots" / "abc123", load=load)
    assert equal(found.weights, model, absent=("lm_head.weight",))
    whole = read_directory(hub, load=load)
    assert equal(whole.weights, model, absent=("lm_head.weight",))
    assert whole.notes[0] == "snapshot abc123 was taken"
    assert describe(hub).path == hub / "snapshots" / "abc123"
    link = hub.parent / "elsewhere"
    link.symlink_to(hub / "snapshots" / "abc123")
    assert equal(read_directory(link, load=load).weights, model, absent=("lm_head.weight",))


def test_the_cache_agrees_with_its_own_library(hub: Path):
    from huggingface_hub import try_to_load_from_cache

    theirs = try_to_load_from_cache("org/tiny", "config.json", cache_dir=hub.parent)
    assert isinstance(theirs, str)
    assert cached("org/tiny") == Path(theirs).parent
    assert cached("org/tiny", "abc123") == Path(theirs).parent
    assert cached("org/other") is None
    assert cached("../tiny") is None
    assert cached("https://x/y") is None


def test_the_places_of_the_cache(hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("HF_HUB_CACHE")
    for variable, value in (
        ("HUGGINGFACE_HUB_CACHE", hub.parent),
        ("HF_HOME", tmp_path),
        ("XDG_CACHE_HOME", tmp_path / "cache"),
    ):
        for other in ("HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(other, raising=False)
        if variable == "XDG_CACHE_HOME":
            (tmp_path / "cache").mkdir()
            (tmp_path / "cache" / "huggingface").symlink_to(tmp_path)
        monkeypatch.setenv(variable, str(value))
        found = cached("org/tiny")
        assert found is not None
        assert found.name == "abc123"


def test_snapshots_that_are_not_there(hub: Path):
    with pytest.raises(RefusedCheckpoint, match=r"the revision 'v2' is not among the snapshots .* \(abc123\)"):
        snapshot(hub, "v2")
    with pytest.raises(RefusedCheckpoint, match="the revision '../../x' is not among"):
        snapshot(hub, "../../x")
    (hub / "refs" / "main").write_text("gone")
    assert snapshot(hub).name == "abc123"  # the only one
    (hub / "snapshots" / "def456").mkdir()
    with pytest.raises(RefusedCheckpoint, match="the revision 'main' is not among the snapshots .*abc123, def456"):
        snapshot(hub)
    shutil.rmtree(hub / "snapshots")
    with pytest.raises(RefusedCheckpoint, match="without readable snapshots"):
        snapshot(hub)


def test_links_to_another_model_of_the_cache_are_refused(hub: Path):
    other = hub.parent / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(hub / "blobs" / "hash0", other / "hash0")
    config = hub / "snapshots" / "abc123" / "config.json"
    config.unlink()
    config.symlink_to("../../../models--org--other/blobs/hash0")
    assert "Links are followed within one model of the Hugging Face cache alone" in refusal(hub)


def test_a_download_that_was_not_finished(hub: Path):
    next((hub / "blobs").glob("hash3")).unlink()
    assert "is not there (a link to nothing: the download was not finished)" in refusal(hub)


# ---- paths ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/../../b",
        "..",
        "",
        "C:\\x",
        "C:x",
        "a\\b",
        "a\nb",
        "a\x00b",
        "\ud800",
        ".",
    ],
)
def test_an_index_cannot_name_files_elsewhere(copy: Callable[[str], Path], name: str):
    path = copy("sharded")
    save_file({"w": torch.ones(1)}, path.parent / "model.safetensors")
    changed(
        path / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"transformer.wte.weight": name}),
    )
    said = refusal(path)
    assert said.startswith(f"{path / 'model.safetensors.index.json'}: ")
    assert "does not lie in" in said or "is not an ordinary file" in said
    with pytest.raises(RefusedCheckpoint):
        describe(path)
    said.encode()


def test_links_out_of_the_directory_are_refused(copy: Callable[[str], Path], tmp_path: Path):
    outside = tmp_path / "outside.safetensors"
    save_file({"w": torch.ones(1)}, outside)
    path = copy("single")
    for name in ("model.safetensors", "config.json"):
        kept = (path / name).read_bytes()
        (path / name).unlink()
        (path / name).symlink_to(outside)
        said = refusal(path)
        assert f"{name!r} is a link to {outside.resolve()}, outside {path}" in said
        assert "copy it in place of the link" in said
        (path / name).unlink()
        (path / name).write_bytes(kept)
    (path / "trainer_state.json").symlink_to(outside)
    assert "is a link to" in refusal(path)
    (path / "trainer_state.json").unlink()
    (path / "optimizer.pt").symlink_to(outside)
    assert "is a link to" in refusal(path)


def test_a_checkpoint_that_is_a_link_out_of_the_run(copy: Callable[[str], Path], tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-9").symlink_to(copy("single"))
    assert "outside the run. Pass that directory itself if it is yours." in refusal(tmp_path / "run")


def test_files_that_are_no_files(copy: Callable[[str], Path]):
    path = copy("single")
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")  # opening it would wait for ever
    assert "'model.safetensors' is not an ordinary file" in refusal(path)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to("model.safetensors")
    assert "cannot be found" in refusal(path) or "is not there" in refusal(path)


def test_names_that_are_too_long(tmp_path: Path):
    with pytest.raises(RefusedCheckpoint, match="index: the file 'aaaa.*cannot be found"):
        confined(tmp_path, "a" * 5000, source="index")
    assert shown("plain.pt") == "plain.pt"


# ---- the configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [(), ("text_config",)])
def test_code_of_its_own_is_refused_without_trust(
    saved: Path, copy: Callable[[str], Path], place: tuple[str, ...], tmp_path: Path
):
    path = copy("single")
    (path / "modeling.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    auto_map = {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    changed(path / "config.json", lambda config: config.update({place[0]: auto_map} if place else auto_map))
    said = refusal(path)
    assert f"the model needs code that comes with it ({'.'.join((*place, 'auto_map'))}: an object)" in said
    assert "Nothing was imported." in said
    assert "--trust" in said
    described = describe(path)
    assert described.refusal is not None
    assert described.refusal in said
    assert described.groups["model"].keys() == describe(saved / "single").groups["model"].keys()
    with pytest.raises(RefusedCheckpoint):
        read_directory(path, load=load, trust=Trust(classes=("modeling.Model",)))
    found = read_directory(path, load=load, trust=Trust(everything=True))
    assert (found.notes[-1] == "the configuration names code of its own (auto_map)") is not bool(place)
    assert not (tmp_path / "marker").exists()


def test_attention_to_be_downloaded_is_refused(copy: Callable[[str], Path]):
    path = copy("single")
    changed(path / "config.json", lambda config: config.update(_attn_implementation="org/kernel"))
    assert "_attn_implementation is 'org/kernel', code to be downloaded. Nothing was." in refusal(path)


def test_quantised_weights_are_refused(copy: Callable[[str], Path]):
    path = copy("single")
    changed(path / "config.json", lambda config: config.update(quantization_config={"bits": 4}))
    assert "the weights are quantised (quantization_config)" in refusal(path, trust=Trust(everything=True))
    changed(path / "config.json", lambda config: config.update(quantization_config=None))
    assert read_directory(path, load=load).weights


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "config.json: is empty: it was cut short"),
        ('{"model_type": "gp', "config.json: is not JSON"),
        ("[1]", "config.json: holds a JSON array"),
        ("[" * 200_000, "config.json: is not JSON (nested too deeply)"),
    ],
)
def test_configurations_that_are_damaged(copy: Callable[[str], Path], content: str, said: str):
    path = copy("single")
    (path / "config.json").write_text(content)
    assert said in refusal(path)


# ---- shards ----------------------------------------------------------------------------------------------------------------


def index(path: Path) -> Path:
    return path / "model.safetensors.index.json"


def test_a_shard_that_is_not_there(copy: Callable[[str], Path]):
    path = copy("sharded")
    next(path.glob("model-00002*")).unlink()
    said = refusal(path)
    assert "the file 'model-00002-of-00006.safetensors' is not there." in said
    assert "incomplete or still being written" in said


def test_index_and_shards_must_agree(copy: Callable[[str], Path]):
    path = copy("sharded")
    kept = index(path).read_text()
    places = json.loads(kept)["weight_map"]
    first, second = sorted(set(places.values()))[:2]
    name = next(name for name, file in places.items() if file == first)
    cases: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda found: found["weight_map"].pop(name), f"{first} holds '{name}', which the index does not name"),
        (lambda found: found["weight_map"].update({name: second}), f"'{name}' lies in {first}, and not in {second}"),
        (lambda found: found["weight_map"].update(new=second), f"'new' should lie in {second}, where it is not"),
        (lambda found: found.pop("weight_map"), "has no weight_map from tensors to files"),
        (lambda found: found.update(weight_map={}), "has no weight_map from tensors to files"),
        (lambda found: found["weight_map"].update({name: 3}), "has no weight_map from tensors to files"),
    ]
    for change, said in cases:
        changed(index(path), change)
        assert said in refusal(path)
        index(path).write_text(kept)
    tensors = load_file(path / second)
    save_file({**tensors, name: torch.ones(1)}, path / second)
    said = refusal(path)
    assert f"the tensor '{name}' lies in two shards, " in said
    assert first in said
    assert second in said
    assert "They come from different saves" in said
    save_file({**tensors, **{key: torch.ones(1) for key in "abcde"}}, path / second)
    assert "and 2 more" in refusal(path)
    index(path).write_text(kept.replace('"weight_map": {', f'"weight_map": {{ "{name}": "{second}",'))
    assert f"the key '{name}' is there twice" in refusal(path)


@pytest.mark.parametrize("layout", ["sharded", "old-sharded"])
@pytest.mark.parametrize(("total", "said"), [(5, "5"), ("x", "'x'"), (True, "true")])
def test_a_sum_that_does_not_match_is_noted(copy: Callable[[str], Path], layout: str, total: Any, said: str):
    path = copy(layout)
    changed(next(path.glob("*.index.json")), lambda found: found["metadata"].update(total_size=total))
    notes = read_directory(path, load=load).notes
    assert any(note.startswith(f"the index counts {said} bytes (total_size), the shards hold 3") for note in notes)
    changed(next(path.glob("*.index.json")), lambda found: found.update(metadata=None))
    assert not any("total_size" in note for note in read_directory(path, load=load).notes)


def test_pointers_of_git_lfs(copy: Callable[[str], Path]):
    for layout, name in (("single", "model.safetensors"), ("old", "pytorch_model.bin")):
        path = copy(layout)
        (path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        assert refusal(path).endswith(f"{name}: a pointer of Git LFS, not the weights. Fetch them with: git lfs pull")


def test_old_pickles_that_are_no_weights(copy: Callable[[str], Path], tmp_path: Path):
    path = copy("old")
    for content, said in (
        ([1], "pytorch_model.bin: holds a list, not a state dict"),
        ({}, "pytorch_model.bin: holds a dict, not a state dict"),
        ({"a": 1}, "the entry 'a' is a int; weights of Hugging Face are tensors by name"),
        ({3: torch.ones(1)}, "the entry '3' is a Tensor"),
    ):
        torch.save(content, path / "pytorch_model.bin")
        assert said in refusal(path)
    torch.save({"w": Payload(tmp_path / "marker")}, path / "pytorch_model.bin")
    refusal(path)
    assert not (tmp_path / "marker").exists()


# ---- what is missing -------------------------------------------------------------------------------------------------------


def test_directories_without_weights(copy: Callable[[str], Path], run: tuple[Path, Any], tmp_path: Path):
    path = copy("single")
    (path / "model.safetensors").rename(path / "model.fp16.safetensors")
    (path / "\x1b[31m").touch()
    said = refusal(path)
    assert "no weights under the names model.safetensors, model.safetensors.index.json, pytorch_model.bin" in said
    assert r"'\x1b[31m', config.json, generation_config.json, model.fp16.safetensors." in said
    assert said.endswith(f"Pass the file that holds the weights, for example {path / 'model.fp16.safetensors'}")
    (path / "model.fp16.safetensors").unlink()
    assert refusal(path).endswith("wrote, or wait until it is complete.")
    adapter = path / "first"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert refusal(path).endswith("Adapters lie in first: pass one of these directories.")
    for number in range(9):
        (path / f"more-{number}").touch()
    assert "and 5 more. " in refusal(path)

    half = Path(shutil.copytree(run[0], tmp_path / "run")) / "checkpoint-12"
    (half / "model.safetensors").unlink()
    said = refusal(tmp_path / "run")
    assert said.endswith(f"incomplete or still being written; an earlier one is {half.with_name('checkpoint-10')}")
    (tmp_path / "empty").mkdir()
    assert "It holds: nothing." in refusal(tmp_path / "empty")
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "absent")


def test_what_the_trainer_left_is_checked(run: tuple[Path, Any], tmp_path: Path):
    path = Path(shutil.copytree(run[0] / "checkpoint-12", tmp_path / "checkpoint-12"))
    kept = (path / "trainer_state.json").read_bytes()
    for content, said in (
        (kept[: len(kept) // 2], "trainer_state.json: is not JSON"),
        (b"{}", "has no global_step that is a number >= 0"),
        (b'{"global_step": -1}', "has no global_step that is a number >= 0"),
        (b'{"global_step": true}', "has no global_step that is a number >= 0"),
    ):
        (path / "trainer_state.json").write_bytes(content)
        assert said in refusal(path)
    (path / "trainer_state.json").write_bytes(kept)
    torch.save({"state": {}}, path / "optimizer.pt")
    assert "optimizer.pt: does not hold the state of an optimizer (a dict with param_groups)" in refusal(path)
    torch.save({"param_groups": [Payload(tmp_path / "marker")]}, path / "optimizer.pt")
    found = read_directory(path, load=load)  # the weights do not need it
    assert found.optimizer is None
    assert any(
        "the optimizer's state was not read: " in note and "Nothing was executed" in note for note in found.notes
    )
    assert not (tmp_path / "marker").exists()


class Foreign:
    """Of no module that can be imported."""


def test_an_optimizer_that_cannot_be_read_is_a_note_also_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The weights beside it are good, and do not need it."""
    save_file(net().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    torch.save({"param_groups": [], "x": Foreign()}, tmp_path / "optimizer.pt")
    monkeypatch.delattr(f"{__name__}.Foreign")
    for trust, said in (
        (Trust(), "optimizer.pt: not a checkpoint of a model: it holds no tensor, and refers to "),
        (Trust(everything=True), "optimizer.pt: trusted, but it cannot be loaded (AttributeError: "),
    ):
        found = read(tmp_path, trust=trust)
        assert equal(found.weights, net())
        assert found.optimizer is None
        (note,) = (note for note in found.notes if note.startswith("the optimizer's state was not read: "))
        assert said in note
    torch.save(nn.Linear(2, 2), tmp_path / "optimizer.pt")
    found = read(tmp_path, trust=Trust(everything=True))
    assert any("does not hold the state of an optimizer" in note for note in found.notes)
    (tmp_path / "optimizer.pt").write_bytes(b"PK\x03\x04")
    for trust in (Trust(), Trust(everything=True)):
        with pytest.raises(RefusedCheckpoint, match=r"optimizer.pt: the archive is cut short"):
            read(tmp_path, trust=trust)


def test_of_the_optimizers_of_accelerate_none_is_taken(tmp_path: Path):
    save_file(net().state_dict(), tmp_path / "model.safetensors")
    for name, lr in (("optimizer.bin", 0.5), ("optimizer_1.bin", 0.25)):
        torch.save(torch.optim.SGD(net().parameters(), lr=lr).state_dict(), tmp_path / name)
    note = "the states of several optimizers are there (optimizer.bin, optimizer_1.bin); none was taken"
    found = read(tmp_path)
    assert (found.optimizer, note in found.notes) == (None, True)
    seen = inspect(tmp_path)
    assert (seen.optimizer, note in seen.notes) == (None, True)


# ---- damage ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["single", "sharded", "old-sharded"])
def test_mutated_directories_are_read_or_refused(copy: Callable[[str], Path], layout: str):
    path = copy(layout)
    files = {file: file.read_bytes() for file in sorted(path.iterdir())}
    names, draw = list(files), random.Random(layout)
    ended = {True: 0, False: 0}
    for _ in range(250):
        file = draw.choice(names)
        content = bytearray(files[file])
        within = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else len(content)
        at, kind = draw.randrange(within), draw.randrange(4)
        if kind == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[draw.randrange(len(content)) :]
        elif kind == 2:
            content[at : at + 4] = draw.choice([b'"../x"', b"null", b"-1", b"1e999", b"[[", b"\xff\xff"])
        else:
            other = files[draw.choice(names)]
            start = draw.randrange(len(other))
            content[at : at + draw.choice([0, 60])] = other[start : start + 60]
        file.write_bytes(content)
        for function in (lambda: read_directory(path, load=load), lambda: describe(path)):
            try:
                function()
            except RefusedCheckpoint:
                ended[False] += 1
            else:
                ended[True] += 1
        file.write_bytes(files[file])
    assert min(ended.values()) > 30
    assert sorted(path.iterdir()) == names
