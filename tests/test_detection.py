"""What lies at a path: every kind by its first bytes or names, what people pass by mistake, and no torch for it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from samples import environment, legacy, net
from torch_samples import exported, torchscript

from curvkit.checkpoints import detect, inspect, read
from curvkit.errors import InvalidArgument, RefusedCheckpoint


def refusal(path: Path) -> str:
    with pytest.raises(RefusedCheckpoint) as caught:
        detect(path)
    assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(RefusedCheckpoint):
        read(path)
    with pytest.raises(RefusedCheckpoint):
        inspect(path)
    return str(caught.value)


FILES = {
    "torch zip": lambda p: torch.save({"w": torch.ones(1)}, p),
    "torch legacy": lambda p: legacy({"w": torch.ones(1)}, p),
    "torchscript": torchscript,
    "exported program": exported,
    "safetensors": lambda p: save_file({"w": torch.ones(1)}, p),
}


@pytest.mark.parametrize("kind", FILES)
def test_files(tmp_path: Path, kind: str):
    path = tmp_path / "model.pt2"
    FILES[kind](path)
    found = detect(path)
    assert (found.kind, found.bytes, found.path, found.note) == (kind, path.stat().st_size, path, "")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a pointer of Git LFS, not the file itself. Fetch it with: git lfs",
        ),
        (
            b"<!DOCTYPE html><html>",
            "a web page, not a checkpoint: the download led to an error page. Download the file",
        ),
        (b"\x1f\x8b\x08\x00", "compressed with gzip. Unpack it first: gunzip FILE"),
        (b"BZh91AY", "compressed with bzip2. Unpack it first: bunzip2 FILE"),
        (b"(\xb5/\xfd\x00", "compressed with zstd. Unpack it first: unzstd FILE"),
        (b"\xfd7zXZ\x00", "compressed with xz. Unpack it first: unxz FILE"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file: quantised weights for llama.cpp, which have no curvature."),
        (
            b"\x89HDF\r\n\x1a\n",
            "an HDF5 file, of Keras or h5py. Save the weights from PyTorch: torch.save(model.state_",
        ),
        (
            b'{"weight_map": {}}',
            "a JSON document, not weights. If it belongs to a model's directory, pass the directory.",
        ),
        (
            b"\x80\x04\x95",
            "a bare pickle, not a file that torch.save wrote. Unpickling runs code, so it is not opened, with --trust neither.",
        ),
        (b"\x80\x17\x03\x9a\x00\xff\x12\x08", "not a checkpoint: it begins with b'\\x80\\x17\\x03"),
        (b"hello, this is text", "not a checkpoint: it begins with b'hello, t', but torch.save writes a zip archive."),
        (b"\x00", "not a checkpoint: it begins with b'\\x00', but torch.save writes a zip archive."),
        (b"", "the file is empty. Saving was interrupted; take an earlier checkpoint."),
    ],
)
def test_what_people_pass_by_mistake(tmp_path: Path, content: bytes, text: str):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    assert text in refusal(path)


def test_archives_that_are_something_else(tmp_path: Path):
    path = tmp_path / "a"
    with path.open("wb") as file:
        np.save(file, np.ones(2))
    assert "an array of numpy." in refusal(path)
    with path.open("wb") as file:
        np.savez(file, a=np.ones(2))
    assert "arrays of numpy (.npz)." in refusal(path)
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, "model.py")
    assert "a tar archive. Unpack it with: tar xf FILE, and pass what is in it" in refusal(path)
    for name, text in (
        ("ckpt/model.pth", "a zip archive with 'ckpt/model.pth' in it. Unpack it, and pass what is in it."),
        ("pkg/.data/extern_modules", "an archive of torch.package, which is code. Save the weights instead"),
        ("a.txt", "a zip archive, but not one that torch.save wrote. Pass the checkpoint itself."),
    ):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(name, "")
        assert text in refusal(path)


def test_a_safetensors_file_that_is_cut_short(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:40])
    assert "a safetensors file that is cut short or still being written. Wait until" in refusal(path)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_shard_of_deepspeed(tmp_path: Path, name: str):
    torch.save({"module": net().state_dict()}, tmp_path / name)
    assert "a shard of DeepSpeed, which holds a part of the weights. Run the zero_to_fp32.py" in refusal(
        tmp_path / name
    )


def test_places_that_are_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe").endswith("is not an ordinary file. Pass the checkpoint itself.")
    assert refusal(tmp_path / "nothing").endswith("is not there. Pass the checkpoint itself.")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert refusal(tmp_path / "link").endswith("is not there. Pass the checkpoint itself.")
    assert "cannot be read (File name too long)." in refusal(tmp_path / ("a" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_places_that_may_not_be_read(tmp_path: Path):
    path = tmp_path / "ckpt.pt"
    torch.save({"w": torch.ones(1)}, path)
    path.chmod(0)
    assert "cannot be read (Permission denied). Look at its permissions and at the disk." in refusal(path)


# ---- directories ----------------------------------------------------------------------------------------------------


def made(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("config.json", "model.safetensors"), "Hugging Face directory"),
        (("model-00001-of-00002.safetensors", "model.safetensors.index.json"), "Hugging Face directory"),
        (("config.json", "pytorch_model.bin"), "Hugging Face directory"),
        (("config.json",), "Hugging Face directory"),
        (("checkpoint-2/model.safetensors", "checkpoint-10/model.safetensors"), "Hugging Face directory"),
        (("adapter_config.json", "adapter_model.safetensors"), "adapter"),
        (("config.json", "adapter_config.json", "adapter_model.safetensors"), "adapter"),
        ((".metadata", "__0_0.distcp"), "distributed"),
        (("__0_0.distcp",), "distributed"),
        (("__0.metadata", "__0_0.distcp"), "distributed"),
        (("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"), "distributed"),
        (("pytorch_model_fsdp_0/.metadata", "trainer_state.json"), "Hugging Face directory"),
    ],
)
def test_directories(tmp_path: Path, names: tuple[str, ...], kind: str):
    found = detect(made(tmp_path, *names))
    assert (found.kind, found.path) == (kind, tmp_path)


def test_a_folder_of_the_cache(tmp_path: Path):
    assert detect(made(tmp_path / "models--a--b", "snapshots/")).kind == "Hugging Face directory"
    assert detect(made(tmp_path / "run", "checkpoint-2/", "checkpoint-10/")).note == (
        "a run with 2 checkpoints, of which the last is taken"
    )


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ((), "the directory is empty. Pass the checkpoint itself."),
        (
            ("step_9.pt", "step_10.pt", "notes.txt"),
            "a directory with step_9.pt, step_10.pt. Pass one of them, for example {}/step_10.pt",
        ),
        (("last.pt",), "a directory with last.pt. Pass it: {}/last.pt"),
        (("a.pt", "optimizer.pt", "training_args.bin"), "Pass one of them, for example {}/a.pt"),
        (
            tuple(f"{i}.ckpt" for i in range(6)),
            "a directory with 0.ckpt, 1.ckpt, 2.ckpt, 3.ckpt and 2 more. Pass one of",
        ),
        (("runs/", "best/last.ckpt"), "a directory, not a checkpoint. Pass one that is in it, for example {}/best"),
        (
            ("src/main.py",),
            "a directory without a checkpoint in it. Pass a file of torch.save, a .safetensors file, or",
        ),
        (
            ("latest", "global_step10/x.pt", "zero_to_fp32.py"),
            "a checkpoint of DeepSpeed, whose weights are spread over files",
        ),
        (
            ("latest", "global_step10/x.pt"),
            "Run its own script, python {}/zero_to_fp32.py {} OUTPUT, and pass what it writes.",
        ),
        (
            ("mp_rank_00_model_states.pt",),
            "shards of DeepSpeed, each of which holds a part of the weights. Run DeepSpeed's zero_to_fp32.py on their folder, and pass",
        ),
    ],
)
def test_directories_that_are_no_checkpoint(tmp_path: Path, names: tuple[str, ...], text: str):
    assert text.replace("{}", str(tmp_path)) in refusal(made(tmp_path, *names))


def test_shards_below_the_script_of_deepspeed(tmp_path: Path):
    folder = made(tmp_path / "my run", "zero_to_fp32.py", "global_step10/mp_rank_00_model_states.pt")
    text = f"Run python '{folder}/zero_to_fp32.py' '{folder}' OUTPUT, and pass what it writes."
    assert text in refusal(folder / "global_step10")


def test_a_model_of_onnx(tmp_path: Path):
    (tmp_path / "a.onnx").write_bytes(b"\x08\x07\x12")
    assert "a model of ONNX, which is a program. Save the weights" in refusal(tmp_path / "a.onnx")


def test_the_script_of_deepspeed_is_never_run(tmp_path: Path):
    folder = made(tmp_path, "latest", "global_step1/mp_rank_00_model_states.pt")
    (folder / "zero_to_fp32.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    refusal(folder)
    assert not (tmp_path / "executed").exists()


# ---- choices and hints ----------------------------------------------------------------------------------------------


def test_one_of_several_files_of_a_model(tmp_path: Path):
    path = tmp_path / "model-00001-of-00002.safetensors"
    save_file(net().state_dict(), path)
    text = f"{path}: one of several files that together hold a model. Pass the directory that they lie in: {tmp_path}"
    with pytest.raises(RefusedCheckpoint, match=re.escape(text)):
        read(path)


def test_a_safetensors_file_beside_its_configuration(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file(net().state_dict(), path)
    assert read(path).kind == "safetensors file"
    assert len(read(path).notes) == 1
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert (
        read(path).notes[1]
        == f"config.json lies beside it: pass the directory {tmp_path} to have the model built from it"
    )


@pytest.mark.parametrize(("options", "flag"), [({"key": "a.b"}, "--key a.b"), ({"ema": True}, "--ema")])
def test_a_directory_of_one_model_has_no_choice(tmp_path: Path, options: dict[str, object], flag: str):
    save_file(net().state_dict(), tmp_path / "model.safetensors")
    text = f"{flag}: {tmp_path} holds one model, and no averages beside it. Leave {flag.split()[0]} out."
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        read(tmp_path, **options)
    with pytest.raises(InvalidArgument, match=re.escape(f"{flag}: {tmp_path} holds one model. Leave it out.")):
        inspect(tmp_path, **options)


def test_nothing_of_it_needs_torch(tmp_path: Path):
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")
    code = (
        "import sys; from pathlib import Path; from curvkit.checkpoints import detect, Trust; "
        "print(detect(Path(sys.argv[1])).kind, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.pt")],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "torch zip False False\n"


def test_the_names_of_the_room():
    import curvkit.checkpoints as room

    assert set(room.__all__) <= set(dir(room))
    for name in room.__all__:
        assert getattr(room, name).__name__ == name
    with pytest.raises(AttributeError, match=r"module 'curvkit.checkpoints' has no attribute 'nothing'"):
        _ = room.nothing
