"""Reading checkpoints as data, putting them into models, and writing them: what loads, what is refused, and what is said."""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import re
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import seeded
from samples import Payload, bare_pickle, environment, flipped, legacy, net, rewritten
from torch import nn
from torch_samples import exported, torchscript

from curvkit import save
from curvkit.checkpoints import detect, digest, fit, read
from curvkit.checkpoints.reading import WEIGHT_KEYS
from curvkit.errors import InvalidArgument, RefusedCheckpoint, UnknownObjective


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckpt.pt"


def weights() -> dict[str, torch.Tensor]:
    return net().state_dict()


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(got) == list(expected) and all(torch.equal(got[name], expected[name]) for name in expected)


def refusal(path: Path) -> str:
    with pytest.raises(RefusedCheckpoint) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# ---- what loads -----------------------------------------------------------------------------------------------------


def test_a_state_dict(path: Path):
    torch.save(weights(), path)
    found = read(path)
    assert found.kind == "state dict"
    assert same(found.weights, weights())
    assert (found.optimizer, found.step, found.recipe, found.keys, found.lr) == (None, None, None, (), [])
    assert found.numel == 51
    assert str(found) == "state dict · 4 tensors, 51 numbers, float32"


@pytest.mark.parametrize("key", WEIGHT_KEYS)
def test_a_training_dict_under_each_key(path: Path, key: str):
    optimizer = torch.optim.AdamW(net().parameters(), lr=3e-4)
    torch.save({key: weights(), "optimizer": optimizer.state_dict(), "step": 7}, path)
    found = read(path)
    assert found.kind == "training dict"
    assert same(found.weights, weights())
    assert found.step == 7
    assert found.optimizer is not None
    assert found.keys == (key, "optimizer", "step")
    assert str(found) == "training dict · 4 tensors, 51 numbers, float32 · step 7 · AdamW with lr 0.0003"


def test_the_first_of_several_keys_wins(path: Path):
    other = {name: tensor + 1 for name, tensor in weights().items()}
    torch.save({"params": other, "model": weights(), "optim": {}, "iter_num": 5, "epoch": 1}, path)
    found = read(path)
    assert same(found.weights, weights())
    assert found.step == 5


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_learning_rates_of_the_groups(path: Path, lr: Any):
    model = net()
    groups = [{"params": [p], "lr": lr if i < 3 else 0.5} for i, p in enumerate(model.parameters())]
    torch.save({"model": weights(), "optimizer": torch.optim.SGD(groups, lr=1.0).state_dict()}, path)
    assert read(path).lr == pytest.approx([0.1, 0.5])


@pytest.mark.parametrize("groups", [None, "none", [3], [{"lr": "x"}], [{"lr": torch.ones(2)}]])
def test_an_optimizer_of_another_form_has_no_learning_rate(path: Path, groups: Any):
    torch.save({"model": weights(), "optimizer": {"param_groups": groups}}, path)
    assert read(path).lr == []


PLAIN_OBJECTS = {
    "namespace": argparse.Namespace(lr=0.1, path=Path("x"), names=["a"], nested=argparse.Namespace(b=1)),
    "simple namespace": types.SimpleNamespace(a=1),
    "path": Path("runs/a"),
    "numpy scalar": np.float64(1.5),
    "numpy array": np.arange(3.0, dtype=np.float32),
    "numpy integers": np.arange(3),
    "numpy bool": np.array([True]),
    "time": datetime.datetime(2024, 1, 2),
    "duration": datetime.timedelta(seconds=3),
    "empty defaultdict": collections.defaultdict(list),
    "filled defaultdict": collections.defaultdict(list, a=[1]),
    "queue": collections.deque([1, 2], maxlen=3),
    "version": torch.__version__,
    "set": {1, 2},
    "counter": collections.Counter("aab"),
}


@pytest.mark.parametrize("name", PLAIN_OBJECTS)
def test_plain_objects_beside_the_weights(path: Path, name: str):
    torch.save({"model": weights(), "args": PLAIN_OBJECTS[name]}, path)
    assert same(read(path).weights, weights())


def test_a_file_that_numpy_1_wrote(path: Path):
    torch.save({"model": weights(), "best": np.float64(0.5), "curve": np.arange(2.0)}, path)
    before = path.read_bytes()
    rewritten(path, lambda name, content: content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert path.read_bytes() != before
    assert same(read(path).weights, weights())


def test_a_legacy_file(path: Path):
    legacy(weights(), path)
    assert detect(path).kind == "torch legacy"
    assert same(read(path).weights, weights())


def test_extra_state_beside_the_tensors_is_left_out(path: Path):
    torch.save({"model": {**weights(), "norm._extra_state": {"calls": 3}}}, path)
    assert same(read(path).weights, weights())


def test_the_list_of_safe_classes_is_left_as_it_was(path: Path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"model": weights(), "args": argparse.Namespace()}, path)
    read(path)
    assert set(torch.serialization.get_safe_globals()) == before


def test_digest_sees_size_and_both_ends(path: Path):
    path.write_bytes(b"a" * 3_000_000)
    first = digest(path)
    assert re.fullmatch(r"sha256-ends:[0-9a-f]{16}", first)
    for content in (b"b" + b"a" * 2_999_999, b"a" * 2_999_999 + b"b", b"a" * 3_000_001):
        path.write_bytes(content)
        assert digest(path) != first


# ---- what is refused: nothing runs ----------------------------------------------------------------------------------

PAYLOADS = {
    "beside the weights": lambda p, x: torch.save({"model": weights(), "x": x}, p),
    "among the weights": lambda p, x: torch.save({**weights(), "x": x}, p),
    "legacy": lambda p, x: legacy({"model": weights(), "x": x}, p),
    "bare pickle": lambda p, x: bare_pickle(x, p),
    "newer protocol": lambda p, x: torch.save({"model": weights(), "x": x}, p, pickle_protocol=4),
}


@pytest.mark.parametrize("kind", PAYLOADS)
@pytest.mark.parametrize("forced", [False, True])
def test_a_payload_does_not_run(path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, forced: bool):
    if forced:  # torch's switch for scripts that do not ask for weights_only
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = path.with_name("executed")
    PAYLOADS[kind](path, Payload(marker))
    text = refusal(path)
    assert not marker.exists()
    assert "torch.save(model.state_dict(), path)" in text
    if kind in ("beside the weights", "among the weights", "legacy"):
        assert f"it refers to {os.name}.system, and loading that could run code. Nothing was executed." in text


def test_the_payload_would_run(path: Path):
    """The refusals above prove nothing unless the payload works."""
    torch.save(Payload(path.with_name("executed")), path)
    torch.load(path, weights_only=False)
    assert path.with_name("executed").exists()


def test_a_pickled_model_is_named(path: Path):
    torch.save(net(), path)
    assert "refused, a whole pickled model: it refers to samples.Net, torch.nn.modules.linear.Linear, and" in refusal(
        path
    )


def test_many_names_are_cut(path: Path):
    torch.save(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Tanh(), nn.GELU(), nn.Flatten(), nn.Softmax()), path)
    assert re.search(r"it refers to [\w., ]+ \.\.\., and loading that", refusal(path))


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (torchscript, "torchscript", "a TorchScript file, which is code. Save the weights instead: torch.save(model"),
        (exported, "exported program", "a program of torch.export, which is code. Save the weights instead: torch.s"),
    ],
    ids=["torchscript", "exported"],
)
def test_kinds_that_are_code(tmp_path: Path, make: Any, kind: str, text: str):
    path = tmp_path / "model.pt2"  # torch.export insists on the name
    make(path)
    assert detect(path).kind == kind
    assert text in refusal(path)
    assert refusal(path).endswith("If you trust whoever made it, add --trust.")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1, 2], "no state dict found. Its keys are: 0, 1. The weights are looked for under model, state_dict, "),
        ("text", "holds a str, not a state dict. Save the weights: torch.save"),
        (torch.ones(2), "holds a Tensor, not a state dict"),
        ({}, "no state dict found. Its keys are: none. The weights are looked for under model, state_dict, "),
        ({"epoch": 1, "lr": 0.1}, "no state dict found. Its keys are: epoch, lr. "),
        ({"model": {}, "epoch": 1}, "no state dict found. Its keys are: model, epoch. "),
        ({str(i): i for i in range(20)}, "Its keys are: 0, 1, 2, 3, 4, 5, 6, 7. "),
    ],
)
def test_content_without_weights(path: Path, content: Any, text: str):
    torch.save(content, path)
    assert text in refusal(path)


def test_a_tensor_that_claims_more_than_is_stored(path: Path):
    torch.save({"w": torch.ones(1).expand(10**12)}, path)
    assert path.stat().st_size < 4000
    assert "the tensor 'w' claims 1,000,000,000,000 elements, but 4 bytes are stored." in refusal(path)


# ---- what is refused: damage ----------------------------------------------------------------------------------------


def test_an_empty_file(path: Path):
    path.write_bytes(b"")
    assert refusal(path).endswith("the file is empty. Saving was interrupted; take an earlier checkpoint.")


@pytest.mark.parametrize("keep", [10, 0.5, -200, -1])
def test_a_file_cut_short(path: Path, keep: float):
    torch.save(weights(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if 0 < keep < 1 else int(keep)])
    assert "cut short or still being written. Wait until it is complete, or take an earlier" in refusal(path)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.99])
def test_a_legacy_file_cut_short(path: Path, share: float):
    legacy(weights(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    # a cut within a name leaves the beginning of one, which is not known either
    assert re.search(r"the file is damaged \(|it refers to \w", refusal(path))


def test_text_and_other_archives(path: Path):
    path.write_text("hello, this is text")
    assert "not a checkpoint: it begins with b'hello, t', but torch.save writes a zip archive." in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hi")
    assert "a zip archive, but not one that torch.save wrote. Pass the checkpoint itself." in refusal(path)


def test_every_flipped_record_is_found_and_named(path: Path):
    torch.save(weights(), path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = [info.filename for info in archive.infolist() if info.file_size]
    assert sum("/data/" in record for record in records) == 4
    for record in records:
        path.write_bytes(content)
        flipped(path, record)
        assert f"the record {record!r} does not match its checksum: the file was damaged" in refusal(path)


def test_a_flipped_record_would_load_without_a_word(path: Path):
    """Why the checksums are verified: torch does not."""
    torch.save(weights(), path)
    flipped(path, "ckpt/data/0")
    assert not same(torch.load(path, weights_only=True), weights())


def test_a_compressed_record(path: Path):
    torch.save({"w": torch.zeros(1_000_000)}, path)
    rewritten(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 40_000
    assert "is compressed, which torch.save never does: it could expand to any size." in refusal(path)


def test_a_damaged_directory(path: Path):
    torch.save(weights(), path)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 2] ^= 0xFF
    path.write_bytes(content)
    assert "the archive is damaged (Bad magic number for central directory). Take another copy" in refusal(path)


def test_a_record_that_claims_to_be_encrypted(path: Path):
    torch.save(weights(), path)
    content = bytearray(path.read_bytes())
    content[6] |= 1  # flags of the first record, and of its entry in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert re.search(r"the record '\w+/data.pkl' is encrypted. Write the checkpoint again", refusal(path))


# ---- into the model -------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        if tie:
            self.head.weight = self.embedding.weight


def test_weights_are_copied_and_the_dtype_is_the_models():
    model = net(seed=1).double()
    fit(model, {name: tensor.bfloat16() for name, tensor in weights().items()}, "ckpt.pt")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype is torch.float64
        assert torch.equal(tensor, weights()[name].bfloat16().double())


def test_missing_and_unexpected_with_the_nearest():
    found = weights()
    found["outer2.weight"] = found.pop("outer.weight")
    with pytest.raises(UnknownObjective) as caught:
        fit(net(), found, "ckpt.pt")
    assert str(caught.value).splitlines() == [
        "ckpt.pt: the weights do not fit the model (tensors: 4 in the file, 4 in the model).",
        "  missing     outer.weight",
        "  unexpected  outer2.weight",
        "  nearest     outer.weight ~ outer2.weight",
        "Build the model with the sizes of the run that wrote the file, for example with --set.",
    ]


def test_other_shapes_one_per_line():
    with pytest.raises(UnknownObjective) as caught:
        fit(net(8), weights(), "ckpt.pt")
    assert str(caught.value).splitlines()[1:-1] == [
        "  other shape inner.weight: file (6, 4), model (8, 4)",
        "              inner.bias: file (6,), model (8,)",
        "              outer.weight: file (3, 6), model (3, 8)",
    ]


def test_long_lists_are_cut():
    deep = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))
    with pytest.raises(UnknownObjective) as caught:
        fit(deep, {f"x{i}": torch.ones(1) for i in range(12)}, "ckpt.pt")
    assert "0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 7 more" in str(caught.value)
    with pytest.raises(UnknownObjective, match="and 7 more"):
        fit(deep, {name: torch.ones(1) for name in deep.state_dict()}, "ckpt.pt")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_integer_weights(dtype: torch.dtype):
    found = {**weights(), "inner.weight": weights()["inner.weight"].to(dtype)}
    text = f"the weight 'inner.weight' is {dtype}, the model's is torch.float32. Quantised weights have no curvature"
    with pytest.raises(RefusedCheckpoint, match=re.escape(text)):
        fit(net(), found, "ckpt.pt")


def test_integer_buffers_are_no_weights():
    model = nn.BatchNorm1d(3)
    fit(model, {**model.state_dict(), "num_batches_tracked": torch.tensor(7)}, "ckpt.pt")
    assert model.num_batches_tracked == 7


@pytest.mark.parametrize(
    ("dtype", "number", "fits"),
    [
        (torch.uint8, 255, True),
        (torch.uint8, 256, False),
        (torch.uint8, -1, False),
        (torch.int8, 128, False),
        (torch.int32, 2**31 - 1, True),
        (torch.int32, 2**31, False),
        (torch.bool, 1, True),
        (torch.bool, 2, False),
    ],
)
def test_integer_buffers_that_would_wrap_are_refused(dtype: torch.dtype, number: int, fits: bool):
    model = nn.Module()
    model.register_buffer("table", torch.zeros(2, dtype=dtype))
    found = {"table": torch.tensor([0, number])}
    if fits:
        fit(model, found, "ckpt.pt")
        assert model.table.tolist() == [0, number]
        return
    with pytest.raises(RefusedCheckpoint) as caught:
        fit(model, found, "ckpt.pt")
    assert str(caught.value) == (
        f"ckpt.pt: 'table' is torch.int64, with numbers that {dtype}, the model's dtype, cannot hold. "
        "Build the model with the dtypes of the run that wrote the file."
    )
    assert model.table.tolist() == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_named(bad: float):
    model, found = net(seed=1), weights()
    found["outer.bias"] = torch.tensor([1.0, bad, 2.0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        RefusedCheckpoint, match="the weight 'outer.bias' has 1 NaN or infinite entry of 3: the run had"
    ):
        fit(model, found, "ckpt.pt")
    assert same(model.state_dict(), before)


def test_tied_weights_under_any_of_their_names():
    for keep in ("embedding.weight", "head.weight"):
        with seeded():
            source, model = Tied(), Tied()
        fit(model, {keep: source.state_dict()[keep] + 1}, "ckpt.pt")
        assert model.head.weight is model.embedding.weight
        assert torch.equal(model.head.weight, source.head.weight + 1)


def test_untied_copies_that_agree_fit_a_tied_model():
    with seeded():
        untied, tied = Tied(tie=False), Tied()
    untied.head.weight = nn.Parameter(untied.embedding.weight.detach().clone())
    fit(tied, untied.state_dict(), "ckpt.pt")
    assert torch.equal(tied.head.weight, untied.head.weight)


def test_untied_copies_that_differ_are_refused():
    text = "the model ties 'embedding.weight' and 'head.weight', but the file has different values for them. Build the"
    with pytest.raises(UnknownObjective, match=re.escape(text)):
        fit(Tied(), Tied(tie=False).state_dict(), "ckpt.pt")


# ---- writing --------------------------------------------------------------------------------------------------------


def trained(lr: Any = 0.1) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    groups = [
        {"params": [model.inner.weight, model.outer.weight], "weight_decay": 0.1},
        {"params": [model.outer.bias, model.inner.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_what_is_saved_is_plain(path: Path):
    model, optimizer = trained()
    assert save(path, model=model, optimizer=optimizer, step=12) == path
    content = torch.load(path, weights_only=True)  # with torch's own list of safe classes, nothing added
    assert list(content) == ["model", "step", "optimizer", "curvkit"]
    assert type(content["curvkit"]["torch"]) is str
    assert content["curvkit"] | {"torch": ""} == {
        "format": 1,
        "torch": "",
        "optimizer": "AdamW",
        "optimizer_names": [["inner.weight", "outer.weight"], ["outer.bias", "inner.bias"]],
    }
    found = read(path)
    assert found.kind == "checkpoint of curvkit.save"
    assert (found.step, found.lr) == (12, [0.1])
    assert found.optimizer_names == content["curvkit"]["optimizer_names"]
    assert same(found.weights, dict(model.state_dict()))


def test_the_names_belong_to_the_states(path: Path):
    """Law: the k-th name of all groups is the parameter whose state has the key k, of the same shape."""
    model, optimizer = trained()
    save(path, model=model, optimizer=optimizer)
    found = read(path)
    assert found.optimizer is not None
    assert found.optimizer_names is not None
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for index, name in enumerate(name for group in found.optimizer_names for name in group):
        assert found.optimizer["state"][index]["exp_avg"].shape == shapes[name]


def test_torch_version_alone_would_make_it_unreadable(path: Path):
    """The trap: torch.__version__ is no str, and weights_only refuses it."""
    torch.save({"model": weights(), "version": torch.__version__}, path)
    with pytest.raises(Exception, match="TorchVersion"):
        torch.load(path, weights_only=True)


class Extra(nn.Linear):
    """Saves something of its own beside its weights."""

    def __init__(self, state: Any) -> None:
        super().__init__(2, 2)
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("state", "plain"),
    [
        (torch.__version__, str(torch.__version__)),
        (Text("a"), "a"),
        (np.float64(0.5), 0.5),
        (signal.SIGINT, 2),
        (True, True),
        (None, None),
        (torch.Size([2, 3]), (2, 3)),
        ([1, (2, "x")], [1, (2, "x")]),
        ({1: {"a": 2.0}}, {1: {"a": 2.0}}),
    ],
)
def test_subclasses_of_plain_values_become_plain(path: Path, state: Any, plain: Any):
    save(path, model=Extra(state))
    loaded = torch.load(path, weights_only=True)["model"]["_extra_state"]
    assert loaded == plain
    assert type(loaded) is type(plain)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (np.arange(2), "curvkit.save: model['_extra_state'] is a numpy.ndarray; a checkpoint holds tensors and plain"),
        ({"a": [1, {2}]}, "curvkit.save: model['_extra_state']['a'][1] is a builtins.set;"),
        (argparse.Namespace(), "is a argparse.Namespace; .* Convert it, for example with float(...) or str(...)."),
        ({(1, 2): 3}, "curvkit.save: model['_extra_state'] has the key (1, 2); keys must be strings or numbers."),
    ],
)
def test_what_is_not_plain_is_refused_and_nothing_is_written(path: Path, state: Any, text: str):
    with pytest.raises(InvalidArgument, match=re.escape(text).replace(r"\.\*", ".*")):
        save(path, model=Extra(state))
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("step", [-1, 1.5, True, "3"])
def test_a_step_that_is_none(path: Path, step: Any):
    with pytest.raises(InvalidArgument, match=rf"curvkit.save: step={step!r} must be an integer >= 0"):
        save(path, model=net(), step=step)


def test_an_optimizer_of_another_model(path: Path):
    text = "group 0 of the optimizer has a parameter of shape (6, 4) that is not the model's. Pass the model that"
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        save(path, model=net(), optimizer=torch.optim.SGD(net().parameters(), lr=0.1))


@pytest.mark.parametrize("tie", [True, False])
def test_tied_and_untied_weights_round_trip(path: Path, tie: bool):
    with seeded(3):
        model, other = Tied(tie), Tied(tie)
    save(path, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    found = read(path)
    assert found.optimizer_names == [["embedding.weight"] if tie else ["embedding.weight", "head.weight"]]
    storages = {tensor.untyped_storage().data_ptr() for tensor in found.weights.values()}
    assert len(storages) == (1 if tie else 2)
    fit(other, found.weights, "ckpt.pt")
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_a_view_is_saved_without_the_rest_of_its_storage(path: Path):
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(1_000_000)[:4].view(2, 2))
    save(path, model=model)
    assert path.stat().st_size < 10_000


def test_folders_are_made_and_a_file_is_replaced(tmp_path: Path):
    path = tmp_path / "a" / "b" / "ckpt.pt"
    save(path, model=net(), step=1)
    save(str(path), model=net(), step=2)
    assert read(path).step == 2
    assert [p.name for p in path.parent.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException):
    save(path, model=net(), step=1)

    def half(content: Any, file: Any) -> None:
        file.write(b"PK half of it")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(type(error)):
        save(path, model=net(), step=2)
    assert read(path).step == 1
    assert [p.name for p in path.parent.iterdir()] == ["ckpt.pt"]


KILLED = """
import os, signal, sys, torch
from torch import nn
from curvkit import save
path = sys.argv[1]
save(path, model=nn.Linear(2, 2), step=1)
whole = torch.save
def half(content, file):
    whole(content, file)
    file.flush()
    os.truncate(file.name, os.path.getsize(file.name) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
save(path, model=nn.Linear(2, 2), step=2)
"""


def test_a_killed_process_leaves_the_old_file(path: Path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment(), check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert read(path).step == 1
