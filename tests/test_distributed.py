"""Directories of torch.distributed.checkpoint: read as torch reads them, refused where torch would run code."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_samples import Pieces, loaded, of_two_processes, saved, stream
from samples import Payload, environment, net
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldTensorProperties
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from curvkit.checkpoints import inspect, read
from curvkit.checkpoints.distributed import describe, read_distributed
from curvkit.checkpoints.hugging_face import describe as describe_directory
from curvkit.checkpoints.hugging_face import read_directory
from curvkit.checkpoints.nesting import nested
from curvkit.checkpoints.optimizer_summary import optimizer_summary
from curvkit.checkpoints.pieces import Budget, Piece, Place, check_cover
from curvkit.checkpoints.torch_item import item
from curvkit.errors import RefusedCheckpoint


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "dcp"


def refusal(path: Path) -> str:
    with pytest.raises(RefusedCheckpoint) as caught:
        read_distributed(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype is b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) and type(a) is type(b)


def training() -> dict[str, Any]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 5,
        "name": "a run",
        "losses": [0.5, 0.25],
        "mixed": [1, torch.ones(2), {"a": None}],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
        "turned": torch.arange(6).reshape(2, 3).t(),
        "half": torch.ones(2).bfloat16(),
        "yes": torch.tensor([True, False]),
    }


# ---- what is read ------------------------------------------------------------------------------------------------------


def test_a_training_dict_comes_back_as_it_was(path: Path):
    content = training()
    found = read_distributed(saved(content, path))
    assert same(found, {**content, "model": dict(content["model"])})
    assert list(found["optimizer"]["state"]) == [0, 1, 2, 3]  # integers, as torch.optim has them
    said = describe(path)
    assert said.step == 5
    assert list(said.groups["model"]) == list(content["model"])
    assert sorted(said.groups["others"]) == ["empty", "half", "scalar", "turned", "yes"]
    shutil.rmtree(path)
    assert describe(saved({**content, "step": "five"}, path)).step is None


def test_the_groups_of_its_optimizer_are_described(path: Path):
    """Oracle: the summary of the same state in a file of torch.save."""
    content = {key: value for key, value in training().items() if key in ("model", "optimizer", "step")}
    torch.save(content, path.with_name("same.pt"))
    expected, found = inspect(path.with_name("same.pt")).optimizer, inspect(saved(content, path)).optimizer
    assert found is not None
    assert expected is not None
    assert found == replace(expected, step=None)  # which is a tensor
    assert (found.name, found.lr, found.betas) == ("AdamW", (1e-3,), (0.9, 0.999))


def test_states_by_the_names_of_parameters_are_described(path: Path):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.25), momentum=0.9)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    found = inspect(saved({"model": weights, "optimizer": state}, path)).optimizer
    assert found is not None
    assert (found.name, found.momentum, found.groups) == ("SGD", 0.9, 1)


def test_of_several_optimizers_none_is_taken(path: Path):
    """As accelerate numbers them, beside one model."""
    states = [torch.optim.SGD(net().parameters(), lr=lr).state_dict() for lr in (0.5, 0.25)]
    saved({"model": net().state_dict()}, path / "pytorch_model_fsdp_0")
    for index, state in enumerate(states):
        saved({"optimizer": state}, path / f"optimizer_{index}")
    found = read(path)
    assert found.optimizer is None
    assert "the states of 2 optimizers are there (optimizer, optimizer_1); none was taken" in found.notes
    assert inspect(path).optimizer is None
    shutil.rmtree(path / "optimizer_1")
    assert read(path).lr == [0.5]
    assert str(inspect(path).optimizer) == str(optimizer_summary(states[0], None, lambda value: value))


def test_a_bare_state_dict(path: Path):
    assert same(read_distributed(saved(net().state_dict(), path)), dict(net().state_dict()))
    said = describe(path)
    shapes = {name: stored.shape for name, stored in said.groups["model"].items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in net().state_dict().items()}


def test_an_optimizer_without_state(path: Path):
    optimizer = torch.optim.SGD(net().parameters(), lr=0.5).state_dict()
    assert same(read_distributed(saved({"optimizer": optimizer}, path))["optimizer"], optimizer)


def test_keys_that_hold_dots_and_numbers(path: Path):
    content = {"a.b": {"c": torch.ones(1)}, "a": {"b.d": torch.zeros(2), "0": torch.ones(3)}}
    found = read_distributed(saved(content, path))
    assert same(found, content)


def test_pieces_are_put_together(path: Path):
    whole = torch.arange(48.0).reshape(6, 8)
    pieces = Pieces(path)
    pieces.tensor("rows", whole, [((0, 0), (4, 8)), ((4, 0), (2, 8))])
    pieces.tensor("grid", whole, [((r, c), (3, 4)) for r in (0, 3) for c in (0, 4)])
    pieces.tensor("short", whole[0], [((0,), (8,)), ((8,), (0,))])
    pieces.tensor("none", torch.empty(0, 4), [])
    pieces.value("step", 7)
    pieces.write()
    found = read_distributed(path)
    expected = {"rows": whole, "grid": whole, "short": whole[0], "none": torch.empty(0, 4), "step": 7}
    assert same(found, expected)
    assert same(loaded({key: torch.zeros_like(v) for key, v in expected.items() if key != "step"}, path)["grid"], whole)
    said = describe(path)
    assert said.notes == ("tensors in up to 4 pieces",)
    assert said.bytes == sum(file.stat().st_size for file in path.glob("*.distcp"))
    shapes = {name: stored.shape for name, stored in said.groups["model"].items()}
    assert shapes == {key: tuple(value.shape) for key, value in expected.items() if isinstance(value, torch.Tensor)}
    assert said.step == 7


def test_metadata_of_older_versions(path: Path):
    pieces = Pieces(path)
    pieces.tensor("w", torch.ones(2, 3), [((0, 0), (2, 3))])
    pieces.metadata.state_dict_metadata["w"].properties = OldTensorProperties(dtype=torch.float32)
    pieces.metadata.planner_data = None  # not flattened
    pieces.write()
    for protocol in range(2, 6):
        (path / ".metadata").write_bytes(pickle.dumps(pieces.metadata, protocol=protocol))
        assert same(read_distributed(path), {"w": torch.ones(2, 3)})


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return of_two_processes(tmp_path_factory.mktemp("processes"))


@pytest.mark.slow
def test_what_two_processes_wrote(processes: Path):
    full = torch.load(processes / "full.pt", weights_only=True)
    for name in ("fsdp2", "fsdp1", "alone", "accelerate"):
        found = read_distributed(processes / name)
        assert same(found["model"], dict(full["model"])), name
        if name != "fsdp1":
            assert same(found["optimizer"], full["optimizer"]), name
        assert describe(processes / name).notes == ("tensors in up to 2 pieces",)
    found = read_distributed(processes / "tensors")
    whole = torch.arange(48.0).reshape(6, 8)
    assert same(found, {"columns": whole, "rows": whole, "copies": whole, "short": torch.ones(1)})
    (processes / "alone" / "__1.metadata").rename(processes / "kept")
    assert "missing numbers are not replaced by zeros" in refusal(processes / "alone")
    (processes / "kept").rename(processes / "alone" / "__1.metadata")


@pytest.mark.slow
def test_a_checkpoint_of_accelerate_inside_one_of_the_trainer(processes: Path, tmp_path: Path):
    path = Path(shutil.copytree(processes / "accelerate", tmp_path / "checkpoint-3"))
    (path / "trainer_state.json").write_text('{"global_step": 3}')
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    full = torch.load(processes / "full.pt", weights_only=True)
    for given in (path, tmp_path):
        found = read_directory(given, load=lambda file: item(file, file.read_bytes()))
        assert same(found.weights, dict(full["model"]))
        assert same(found.optimizer, full["optimizer"])
        assert (found.step, found.kind, found.path) == (3, "Hugging Face checkpoint", path)
        assert found.config == {"model_type": "gpt2"}
        said = describe_directory(given)
        assert (said.step, said.kind, said.path) == (3, "Hugging Face checkpoint", path)
        assert said.groups["model"]["0.weight"].shape == (5, 3)


def test_models_side_by_side(tmp_path: Path):
    for number in (0, 1):
        saved({"model": {"w": torch.full((2,), float(number))}}, tmp_path / f"pytorch_model_fsdp_{number}")
    said = (
        f"{tmp_path}: holds 2 models, in pytorch_model_fsdp_0, pytorch_model_fsdp_1. "
        f"Pass the directory of the one that is meant, for example {tmp_path / 'pytorch_model_fsdp_0'}"
    )
    for look in (read_distributed, describe, lambda path: read_directory(path, load=lambda file: None)):
        with pytest.raises(RefusedCheckpoint) as caught:
            look(tmp_path)
        assert str(caught.value) == said
    assert same(read_distributed(tmp_path / "pytorch_model_fsdp_1"), {"model": {"w": torch.ones(2)}})
    for number in (2, 10):
        shutil.copytree(tmp_path / "pytorch_model_fsdp_0", tmp_path / f"pytorch_model_fsdp_{number}")
    assert "4 models, in pytorch_model_fsdp_0, pytorch_model_fsdp_1, pytorch_model_fsdp_2, pytorch_model_fsdp_10. " in (
        refusal(tmp_path)
    )
    for number in (2, 10):
        shutil.rmtree(tmp_path / f"pytorch_model_fsdp_{number}")
    shutil.rmtree(tmp_path / "pytorch_model_fsdp_1")
    saved({"weights": torch.ones(2)}, tmp_path / "pytorch_model_fsdp_1")
    shutil.rmtree(tmp_path / "pytorch_model_fsdp_0")
    shutil.copytree(tmp_path / "pytorch_model_fsdp_1", tmp_path / "pytorch_model_fsdp_0")
    shutil.rmtree(tmp_path / "pytorch_model_fsdp_1")
    with pytest.raises(RefusedCheckpoint, match="holds no tensors by name under 'model'"):
        read_directory(tmp_path, load=lambda file: None)


def test_the_description_needs_no_torch(path: Path):
    program = (
        "import sys; from pathlib import Path; from curvkit.checkpoints.distributed import describe; "
        "print(sorted(describe(Path(sys.argv[1])).groups), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(saved(training(), path))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "['mixed', 'model', 'optimizer', 'others'] False\n"


# ---- code ------------------------------------------------------------------------------------------------------------------


def test_code_in_the_metadata_is_not_run(path: Path, tmp_path: Path):
    marker = tmp_path / "marker"
    saved({"w": torch.ones(2)}, path)
    (path / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    assert "refers to 'posix.system', which the metadata of a checkpoint has no need of" in refusal(path)
    with pytest.raises(RefusedCheckpoint):
        describe(path)
    metadata = Metadata({}, planner_data={"w": Payload(marker)}, storage_data={})
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "Nothing was executed." in refusal(path)
    assert not marker.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert marker.exists()  # as would have happened


@pytest.mark.parametrize("place", ["value", "tensor"])
def test_code_in_an_item_is_not_run(path: Path, tmp_path: Path, place: str):
    marker = tmp_path / "marker"
    pieces = Pieces(path)
    pieces.value("step", 7)
    pieces.tensor("w", torch.ones(2), [((0,), (2,))])
    index = MetadataIndex("step") if place == "value" else MetadataIndex("w", (0,))
    pieces.place(index, stream(Payload(marker)))
    said = refusal(pieces.write())
    assert "an item in it refers to 'posix.system', and loading that could run code. Nothing was executed." in said
    assert not marker.exists()
    pieces.place(index, pickle.dumps(Payload(marker)))
    refusal(pieces.write())
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        b"\x80\x04.",
        b"\x80\x04(.",
        b"\x80\x04K\x01.",
        b"\x80\x04]r\xff\xff\xff\x7f.",  # a memo of 2^31 places
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x04)" + b"\x85" * 200_000 + b".",
        b"\x80\x04}(" + b")" + b"\x85" * 200_000 + b"K\x01u.",  # a key that hashes for ever
        b"(lp0\n.",
    ],
)
def test_pickles_that_fill_the_memory_or_the_stack(path: Path, content: bytes):
    saved({"w": torch.ones(2)}, path)
    (path / ".metadata").write_bytes(content)
    assert "the metadata is damaged or cut short" in refusal(path)


# ---- paths -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../outside.distcp", "a/../../outside.distcp", "", "C:\\a", "a\x00", "/outside.distcp"]
)
def test_files_elsewhere(path: Path, tmp_path: Path, name: str):
    name = str(tmp_path / "outside.distcp") if name.startswith("/") else name
    (tmp_path / "outside.distcp").write_bytes(stream(torch.ones(2)))
    pieces = Pieces(path)
    pieces.tensor("w", torch.ones(2), [((0,), (2,))])
    pieces.metadata.storage_data[MetadataIndex("w", (0,))] = _StorageInfo(name, 0, len(stream(torch.ones(2))))
    assert "which does not lie in" in refusal(pieces.write())
    with pytest.raises(RefusedCheckpoint):
        describe(path)


def test_links_elsewhere(path: Path, tmp_path: Path):
    saved({"w": torch.ones(2)}, path)
    shard = path / "__0_0.distcp"
    shard.rename(tmp_path / "outside")
    shard.symlink_to(tmp_path / "outside")
    assert f"'__0_0.distcp' is a link to {(tmp_path / 'outside').resolve()}, outside {path}" in refusal(path)
    shard.unlink()
    shutil.copy(tmp_path / "outside", path / "inside")
    shard.symlink_to("inside")
    assert same(read_distributed(path), {"w": torch.ones(2)})
    (path / ".metadata").rename(tmp_path / "metadata")
    (path / ".metadata").symlink_to(tmp_path / "metadata")
    assert "'.metadata' is a link to" in refusal(path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pytorch_model_fsdp_0").symlink_to(path)
    assert "Pass that directory itself if it is yours." in refusal(tmp_path / "run")


# ---- what is missing or damaged ------------------------------------------------------------------------------------------


def test_checkpoints_that_are_being_written(path: Path, tmp_path: Path):
    saved({"w": torch.ones(2)}, path)
    (path / ".metadata").rename(path / ".metadata.tmp")
    said = refusal(path)
    assert "there is no .metadata, which is written last: the checkpoint is still being written, or saving was" in said
    (path / ".metadata.tmp").unlink()
    assert "Wait until it is complete, or take an earlier checkpoint." in refusal(path)
    (path / "__0_0.distcp").unlink()
    assert "there is no .metadata. Pass the directory that it wrote." in refusal(path)


def test_files_that_are_cut_or_gone(path: Path):
    saved({"w": torch.ones(2), "v": torch.ones(300)}, path)
    shard = path / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size - 1)
    assert "__0_0.distcp: is cut short: " in refusal(path)
    shard.unlink()
    assert "the file '__0_0.distcp' is not there." in refusal(path)
    shard.mkdir()
    assert "is not an ordinary file" in refusal(path)
    (path / ".metadata").unlink()
    (path / ".metadata").mkdir()
    assert "'.metadata' is not an ordinary file" in refusal(path)
    shutil.rmtree(path / ".metadata")
    (path / ".metadata").touch()
    os.truncate(path / ".metadata", (1 << 30) + 1)
    assert "1,073,741,825 bytes, where metadata has at most" in refusal(path)


def test_every_flipped_bit_in_a_tensor_is_found(path: Path):
    saved({"w": torch.arange(64.0)}, path)
    shard = path / "__0_0.distcp"
    whole = shard.read_bytes()
    start = whole.index(torch.arange(64.0).numpy().tobytes())
    for at in range(start, start + 256):
        content = bytearray(whole)
        content[at] ^= 1 << at % 8
        shard.write_bytes(content)
        assert "does not match its checksum" in refusal(path)


def wrong(change: Callable[[Pieces], None], path: Path) -> str:
    pieces = Pieces(path)
    pieces.tensor("w", torch.arange(12.0).reshape(4, 3), [((0, 0), (2, 3)), ((2, 0), (2, 3))])
    pieces.value("step", 7)
    change(pieces)
    return refusal(pieces.write())


def chunks(pieces: Pieces) -> list[ChunkStorageMetadata]:
    return pieces.metadata.state_dict_metadata["w"].chunks


FIRST = MetadataIndex("w", (0, 0))


def info(pieces: Pieces) -> _StorageInfo:
    return pieces.metadata.storage_data[FIRST]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: chunks(p).pop(), "'w' has 12 numbers, and the pieces that were written have 6."),
        (lambda p: chunks(p).clear(), "'w' has 12 numbers, and the pieces that were written have 0."),
        (lambda p: setattr(chunks(p)[1], "sizes", torch.Size((1, 3))), "the pieces that were written have 9."),
        (lambda p: setattr(chunks(p)[1], "offsets", torch.Size((1, 0))), "it has no place for a piece of 'w'"),
        (lambda p: chunks(p).append(chunks(p)[0]), "two pieces of 'w' overlap"),
        (lambda p: setattr(chunks(p)[0], "sizes", torch.Size((3, 3))), "pieces of 'w' overlap"),
        (lambda p: setattr(chunks(p)[1], "sizes", torch.Size((3, 3))), "lies outside its shape (4, 3)"),
        (lambda p: setattr(chunks(p)[1], "sizes", torch.Size((2,))), "has another number of dimensions"),
        (lambda p: setattr(chunks(p)[0], "offsets", [0, -1]), "a size in it is none"),
        (lambda p: setattr(chunks(p)[0], "offsets", 3), "a size in it is none"),
        (lambda p: p.metadata.storage_data.pop(FIRST), "it has no place for a piece of 'w'"),
        (lambda p: p.metadata.storage_data.pop(MetadataIndex("step")), "it has no place for 'step'"),
        (lambda p: setattr(info(p), "offset", -1), "a place in it is none"),
        (lambda p: setattr(info(p), "length", 10), "claims 6 numbers of float32, but has 10 bytes"),
        (lambda p: setattr(info(p), "length", 10**9), "is cut short"),
        (lambda p: setattr(info(p), "relative_path", 3), "a place in it is none"),
        (lambda p: setattr(info(p), "transform_descriptors", ["stream.zstd"]), "was written through an extension"),
        (
            lambda p: p.metadata.storage_data.update({MetadataIndex("step"): info(p)}),
            "by naming parts of it twice, which would fill the memory",
        ),
        (lambda p: p.metadata.storage_data.update({FIRST: "text"}), "a _StorageInfo is expected where something else"),
        (
            lambda p: p.metadata.storage_data.update({"text": info(p)}),
            "a MetadataIndex is expected where something else",
        ),
        (lambda p: p.metadata.state_dict_metadata.update(w=3), "a TensorStorageMetadata is expected where something"),
        (lambda p: p.metadata.state_dict_metadata.update({3: 3}), "a name in it is not text"),
        (lambda p: setattr(p.metadata, "state_dict_metadata", None), "it lists no tensors or no places"),
        (lambda p: setattr(p.metadata, "storage_data", None), "it lists no tensors or no places"),
        (lambda p: setattr(p.metadata, "planner_data", 3), "it does not say how its names are nested"),
        (lambda p: p.metadata.planner_data.pop("w"), "it does not say where 'w' belongs"),
        (lambda p: p.metadata.planner_data.update(w=("v",)), "it does not say where 'w' belongs"),
        (lambda p: p.metadata.planner_data.update(w=("w", True)), "it does not say where 'w' belongs"),
        (lambda p: setattr(p.metadata.state_dict_metadata["w"], "chunks", None), "'w' has no pieces"),
        (lambda p: setattr(p.metadata.state_dict_metadata["w"], "properties", None), "'w' has no properties"),
        (lambda p: setattr(p.metadata.state_dict_metadata["w"].properties, "dtype", 3), "'w' has no dtype"),
        (
            lambda p: setattr(p.metadata.state_dict_metadata["w"].properties, "dtype", torch.float16),
            "a piece of 'w' should be float16 (2, 3), but torch.float32 (2, 3) lies there",
        ),
        (lambda p: p.place(FIRST, stream(torch.ones(3, 2))), "should be float32 (2, 3), but torch.float32 (3, 2) lies"),
        (lambda p: p.place(FIRST, stream([1] * 50)), "should be float32 (2, 3), but list lies there"),
        (lambda p: p.place(FIRST, b"PK" + bytes(100)), "the archive is damaged"),
    ],
)
def test_metadata_that_lie(path: Path, change: Callable[[Pieces], None], said: str):
    assert said in wrong(change, path)


def test_a_tensor_and_a_value_of_one_name(path: Path):
    for number, make in enumerate((Pieces.tensor, Pieces.value)):
        pieces = Pieces(path)
        make(pieces, "w", *((torch.ones(2), [((0,), (2,))]) if number == 0 else (7,)))
        pieces.files = {name.replace("__0", f"__{number}"): content for name, content in pieces.files.items()}
        for place in pieces.metadata.storage_data.values():
            place.relative_path = f"__{number}_0.distcp"
        pieces.write()
        (path / ".metadata").rename(path / f"__{number}.metadata")
    assert "'w' is a tensor and something else" in refusal(path)


def test_processes_that_contradict_each_other(path: Path):
    for number, size in enumerate((2, 3)):
        pieces = Pieces(path)
        pieces.tensor("w", torch.ones(size), [((0,), (size,))])
        pieces.write()
        (path / ".metadata").rename(path / f"__{number}.metadata")
    assert "'w' has another shape or dtype than in the metadata of another process" in refusal(path)


def test_a_claim_of_10_12_numbers(path: Path):
    pieces = Pieces(path)
    pieces.tensor("w", torch.ones(2), [((0,), (2,))])
    entry = pieces.metadata.state_dict_metadata["w"]
    entry.size, entry.chunks[0].sizes = torch.Size((10**12,)), torch.Size((10**12,))
    assert "claims 1,000,000,000,000 numbers of float32, but has" in refusal(pieces.write())
    pieces.place(MetadataIndex("w", (0,)), stream(torch.ones(1).expand(10**12)))
    refusal(pieces.write())
    entry.size = torch.Size((2**61, 2**61, 0))
    entry.chunks.clear()
    assert "cannot be held" in refusal(pieces.write())


def covered(shape: tuple[int, ...], blocks: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    draw = random.Random(0)
    draw.shuffle(blocks)
    check_cover("w", shape, [Piece(*block, Place("f", 0, 1)) for block in blocks], Budget("m"))


def test_cover():
    covered((100, 100), [((i, j), (1, 1)) for i in range(100) for j in range(100)])  # a grid
    covered(
        (4, 4), [((0, 0), (1, 3)), ((0, 3), (3, 1)), ((3, 1), (1, 3)), ((1, 0), (3, 1)), ((1, 1), (2, 2))]
    )  # a wheel
    draw = random.Random(0)
    for _ in range(300):  # against a count of every number
        shape = tuple(draw.randrange(1, 5) for _ in range(draw.randrange(1, 4)))
        blocks, left = [], [(tuple(0 for _ in shape), shape)]
        while left:
            offsets, sizes = left.pop()
            axis = draw.randrange(len(shape))
            if sizes[axis] > 1 and draw.random() < 0.7:
                cut = draw.randrange(1, sizes[axis])
                left.append((offsets, tuple(cut if d == axis else n for d, n in enumerate(sizes))))
                moved = tuple(o + cut if d == axis else o for d, o in enumerate(offsets))
                left.append((moved, tuple(n - cut if d == axis else n for d, n in enumerate(sizes))))
            else:
                blocks.append((offsets, sizes))
        if draw.random() < 0.5:
            spoilt = draw.randrange(len(blocks))
            offsets, sizes = blocks[spoilt]
            blocks[spoilt] = tuple(draw.randrange(n - s + 1) for n, s in zip(shape, sizes, strict=True)), sizes
        count = torch.zeros(shape, dtype=torch.int64)
        for offsets, sizes in blocks:
            count[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] += 1
        if bool((count == 1).all()):
            covered(shape, blocks)
        else:
            with pytest.raises(
                RefusedCheckpoint, match="m: the metadata is damaged or cut short: pieces of 'w' overlap"
            ):
                covered(shape, blocks)


def test_pieces_made_to_take_for_ever():
    slabs = [((i, i, 0), (7000 - i, 1, 1)) for i in range(7000)]
    with pytest.raises(RefusedCheckpoint, match="in pieces of no order that a mesh of processes has"):
        covered((7000 * 7001 // 2, 1, 1), slabs)


def test_nesting():
    assert nested({("a", 0, "b"): 1, ("a", 2): 3}, "x") == {"a": [{"b": 1}, None, 3]}
    for items in (
        {("a",): 1, ("a", "b"): 2},
        {("a", "b"): 2, ("a",): 1},
        {("a", 0): 1, ("a", "b"): 2},
        {("a", -1): 1},
        {("a", 10**9): 1},
        {(0,): 1},
    ):
        with pytest.raises(RefusedCheckpoint, match="x: the metadata is damaged: '.*' contradicts another name"):
            nested(items, "x")


@pytest.mark.parametrize("layout", ["whole", "pieces"])
def test_mutated_checkpoints_are_read_or_refused(path: Path, layout: str, tmp_path: Path):
    if layout == "whole":
        saved({key: value for key, value in training().items() if key in ("model", "step", "mixed")}, path)
    else:
        pieces = Pieces(path)
        pieces.tensor("w", torch.arange(48.0).reshape(6, 8), [((r, c), (3, 4)) for r in (0, 3) for c in (0, 4)])
        pieces.value("step", 7)
        pieces.write()
    files = {file: file.read_bytes() for file in sorted(path.iterdir())}
    tokens = [
        b"\x94",
        b"R",
        b"b",
        b"(",
        b".",
        b"cos\nsystem\n",
        b"r\xff\xff\xff\x7f",
        b"\x85" * 9,
        b"K\xff",
        b"\xff" * 8,
    ]
    draw = random.Random(layout)
    ended = {True: 0, False: 0}
    for _ in range(300):
        file = draw.choice(list(files))
        content = bytearray(files[file])
        for _ in range(draw.choice([1, 1, 3])):
            at, kind = draw.randrange(len(content)), draw.randrange(4)
            if kind == 0:
                content[at] ^= 1 << draw.randrange(8)
            elif kind == 1 and draw.random() < 0.3:
                del content[at + 1 :]
            elif kind == 2:
                token = draw.choice(tokens)
                content[at : at + draw.choice([0, len(token)])] = token
            else:
                start = draw.randrange(len(content))
                content[at:at] = content[start : start + draw.randrange(60)]
        file.write_bytes(content)
        for function in (read_distributed, describe):
            try:
                function(path)
            except RefusedCheckpoint:
                ended[False] += 1
            else:
                ended[True] += 1
        file.write_bytes(files[file])
    assert min(ended.values()) > 30
    assert sorted(tmp_path.iterdir()) == [path]
