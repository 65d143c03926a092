"""curvkit inspect: says what lies there, quickly, in every format and width, and runs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from curvkit_cli import render_inspection
from curvkit_cli.main import run
from samples import TRAIN, Payload, bare_pickle, curvkit, environment, examples, legacy, net
from torch import nn

from curvkit import Recipe, save
from curvkit.models import MLP

Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(["inspect", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def training(path: str = "ckpt.pt") -> str:
    """A training dict as of a compiled model with AdamW and averaged weights."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95))
    model(examples()[0]).sum().backward()
    optimizer.step()
    weights = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": weights, "optimizer": optimizer.state_dict(), "step": 2000, "ema": net().state_dict()}, path)
    return path


def test_numbers_that_json_does_not_have_are_null(typed: Typed):
    model = net()
    state = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    state["param_groups"][0] |= {"lr": float("nan"), "weight_decay": float("inf")}
    torch.save({"model": model.state_dict(), "optimizer": state}, "ckpt.pt")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(typed("ckpt.pt", "--json")[1], parse_constant=refuse)["result"]["optimizer"]
    assert (found["lr"], found["weight_decay"]) == ([None], [None])


def test_one_of_each_in_little_room(typed: Typed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "30")
    torch.save({"weight": torch.ones(1)}, "ckpt.pt")
    assert "1 tensor, 1 number, 4 bytes" in " ".join(typed("ckpt.pt", "--format", "table")[1].split())


def test_the_table(typed: Typed):
    size = Path(training()).stat().st_size
    code, out, err = typed("ckpt.pt", "--format", "table")
    assert (code, err) == (0, "")
    assert [line.rstrip() for line in out.splitlines()] == [
        f"ckpt.pt  training dict · {size / 1000:.3g} KB",
        " group      tensors  numbers       size  dtype",
        " model            4       51  204 bytes  float32",
        " optimizer       12      106  424 bytes  float32",
        " ema              4       51  204 bytes  float32",
        " safe        tensors and plain data alone: reading it runs nothing",
        " step        2,000",
        " optimizer   AdamW · lr 0.0003 · betas 0.9, 0.95 · weight decay 0.01 · after 1",
        "             step",
        " weights     under 'model'",
        " averaged    averaged weights are there too, and are taken with --ema",
        " prefixes    taken from the names: _orig_mod.",
        " checksum    CRC-32 of every record",
        " next        curvkit init ckpt.pt",
    ]


def test_plain_and_json(typed: Typed):
    training()
    code, out, _ = typed("ckpt.pt")
    assert code == 0
    lines = [line.split("\t") for line in out.splitlines()]
    assert lines[:2] == [["group", "tensors", "numbers", "bytes", "dtype"], ["model", "4", "51", "204", "float32"]]
    assert ["kind", "training dict"] in lines
    code, out, _ = typed("ckpt.pt", "--json")
    document = json.loads(out)
    assert document["schema"] == "curvkit.inspect/1"
    found = document["result"]
    assert (found["kind"], found["step"], found["variants"]) == ("training dict", 2000, ["ema"])
    assert found["optimizer"]["betas"] == [0.9, 0.95]
    assert found["bytes"] == Path("ckpt.pt").stat().st_size


def test_averaged_weights_and_keys(typed: Typed):
    training()
    assert "weights\t" not in typed("ckpt.pt", "--ema")[1]
    code, _, err = typed("ckpt.pt", "--key", "nothing")
    assert code == 2
    assert err.startswith("Error: --key nothing: ")
    torch.save({"a": net().state_dict(), "model": net().state_dict()}, "two.pt")
    assert "weights\tunder 'model'; also there: a (--key)\n" in typed("two.pt")[1]


def with_recipe() -> None:
    x, y = examples()
    save("ckpt.pt", model=MLP([4, 3]), recipe=Recipe("mlp", {"sizes": [4, 3]}, "cross_entropy", {"x": x, "y": y}))


def script_module() -> None:
    source = "import torch; torch.jit.script(torch.nn.Linear(2, 2)).save('ckpt.pt')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", source], check=True, timeout=120)


def exported() -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, "ckpt.pt2")
    Path("ckpt.pt2").rename("ckpt.pt")


def safetensors() -> None:
    from safetensors.torch import save_file

    save_file(net().state_dict(), "ckpt.pt")


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (lambda: torch.save(net().state_dict(), "ckpt.pt"), ["kind\tstate dict", "next\tcurvkit init ckpt.pt"]),
        (lambda: legacy(net().state_dict(), Path("ckpt.pt")), ["weights\t4\t51\t204\tfloat32", "checksum\tnone: "]),
        (with_recipe, ["recipe\tdata: mlp, cross_entropy", "next\tcurvkit sharpness ckpt.pt"]),
        (safetensors, ["kind\tsafetensors file", "model\t4\t51\t204\tfloat32", "checksum\tnone: "]),
        (
            lambda: torch.save(net(), "ckpt.pt"),
            [
                "kind\tpickled model",
                "refused\tit is not read: it refers to samples.Net, ",
                "torch.save(model.state_dict(), p",
            ],
        ),
        (
            lambda: torch.save({"model": net().state_dict(), "x": Payload(Path("owned"))}, "ckpt.pt"),
            ["refused\tit is not read: it refers to posix.system, which loading would import and could run."],
        ),
        (exported, ["kind\tprogram of torch.export", "refused\tit is not read: a program of torch.export is code"]),
        pytest.param(
            script_module,
            ["kind\tTorchScript", "refused\tit is not read: a TorchScript file is code"],
            marks=pytest.mark.slow,
        ),
        (
            lambda: torch.save({"epoch": 3}, "ckpt.pt"),
            ["refused\tit is not read: no state dict found. Its keys are: epoch."],
        ),
    ],
)
def test_kinds_that_can_be_recognised(typed: Typed, make: Callable[[], Any], texts: list[str], folder: Path):
    make()
    code, out, err = typed("ckpt.pt")
    assert (code, err) == (0, "")
    for text in texts:
        assert text in out
    assert ("next\t" in out) is ("refused\t" not in out)
    assert not (folder / "owned").exists()
    for shape in ("table", "json"):
        assert typed("ckpt.pt", "--format", shape)[0] == 0


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path.write_bytes(b""), "the file is empty."),
        (lambda path: path.write_text("notes"), "not a checkpoint: it begins with b'notes'"),
        (lambda path: bare_pickle(Payload(Path("owned")), path), "a bare pickle, not a file that torch.save wrote."),
        (lambda path: path.write_bytes(Path(training("whole.pt")).read_bytes()[:-200]), "the archive is cut short"),
        (lambda path: path.mkdir(), "the directory is empty."),
        (lambda path: os.mkfifo(path), "is not an ordinary file"),
    ],
)
def test_damaged_files(typed: Typed, make: Callable[[Path], Any], text: str, folder: Path):
    make(Path("ckpt.pt"))
    code, out, err = typed("ckpt.pt")
    assert (code, out) == (4, "")
    assert err.startswith("Error: ckpt.pt: ")
    assert text in err
    assert not (folder / "owned").exists()


def test_a_path_that_is_not_there(typed: Typed):
    code, _, err = typed("nothing.pt")
    assert code == 2
    assert err.endswith("Path 'nothing.pt' does not exist.\n")
    training()
    for path, advice in (("ckpts.pt", "There is ckpt.pt."), ("no/ckpt.pt", "")):
        code, _, err = typed(path)
        assert code == 2
        assert err.rstrip().endswith(f"Path '{path}' does not exist. {advice}".rstrip())
    Path("link.pt").symlink_to("gone.pt")
    assert typed("link.pt")[2].endswith("Path 'link.pt' does not exist. It is a link to gone.pt, which is not there.\n")


def test_a_file_that_may_not_be_read(typed: Typed):
    training()
    Path("ckpt.pt").chmod(0)
    if os.access("ckpt.pt", os.R_OK):
        pytest.skip("this user may read everything")
    code, _, err = typed("ckpt.pt")
    assert code == 2
    assert "Path 'ckpt.pt' is not readable. Look at its permissions: ls -ld ckpt.pt\n" in err
    Path("closed").mkdir(mode=0)
    code, _, err = typed("closed/ckpt.pt")
    Path("closed").chmod(0o755)
    assert code == 2
    assert "/closed may not be entered: look at its permissions, ls -ld " in err


# ---- a stranger's names on a terminal --------------------------------------------------------------------------------

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\r\n"


def test_nothing_in_a_file_reaches_the_terminal_as_it_is(typed: Typed):
    content = {
        "model": {f"{ESCAPES}.weight": torch.ones(2)},
        ESCAPES: {"a": torch.ones(1)},
        "optimizer": {"param_groups": []},
    }
    torch.save(
        content | {"curvkit": {"optimizer": ESCAPES, "recipe": {"builder": ESCAPES, "loss": ESCAPES}}}, "ckpt.pt"
    )
    torch.save({ESCAPES: {"a": torch.ones(1)}, f"b{ESCAPES}": {"a": torch.ones(1)}}, "several.pt")
    for path in ("ckpt.pt", "several.pt"):
        for shape in ("table", "plain", "json"):
            code, out, err = typed(path, "--format", shape, "--color", "never")
            assert code == 0
            assert not set(out + err) & set("\x1b\x07\x9b\u202e\r")
            assert "evil" in out


def test_a_hostile_name_in_an_error_message(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    torch.save({f"{ESCAPES}.weight": torch.ones(2)}, "ckpt.pt")
    Path("train.py").write_text(TRAIN)
    monkeypatch.setitem(sys.modules, "train", None)  # so that the file is imported anew, and leaves nothing behind
    assert run(["sharpness", "ckpt.pt", "--objective", "train.py:objective"]) == 3
    err = capsys.readouterr().err
    assert not set(err) & set("\x1b\x07\x9b\u202e\r")
    assert "evil" in err


def test_a_file_whose_name_is_no_text(folder: Path):
    path = os.fsencode(folder) + b"/\xff.pt"
    with open(path, "wb") as file:
        torch.save(net().state_dict(), file)
    for shape in ("plain", "table", "json"):
        done = subprocess.run(
            [sys.executable, "-c", "from curvkit_cli.main import main; main()", "inspect", path, "--format", shape],
            env=environment(),
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, b""), done.stderr


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120])
def test_every_width(typed: Typed, monkeypatch: pytest.MonkeyPatch, columns: int):
    monkeypatch.setenv("COLUMNS", str(columns))
    training()
    code, out, _ = typed("ckpt.pt", "--format", "table", "--color", "never")
    assert code == 0
    assert max(len(line.rstrip()) for line in out.splitlines()) <= columns
    words = "".join(out.split())
    for text in ("trainingdict", "10642", "betas0.9,0.95", "_orig_mod.", "curvkitinitckpt.pt"):
        assert text in words or (text == "10642" and "106numbers,424bytes" in words)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1 KB"),
        (14_234_567, "14.2 MB"),
        (5 * 10**9, "5 GB"),
        (999_700, "1,000 KB"),
        (3 * 10**15, "3,000 TB"),
    ],
)
def test_sizes(number: int, text: str):
    assert render_inspection.size(number) == text


def test_a_closed_pipe(folder: Path):
    training()
    program = f"{sys.executable} -c 'from curvkit_cli.main import main; main()' inspect ckpt.pt --json"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program} | head -n 1"],
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the peak of one process")
@pytest.mark.slow
def test_five_gigabytes_are_inspected_by_their_headers(folder: Path):
    """The file is sparse: its numbers are zeros that no disk holds."""
    weights = {f"layers.{i}.weight": torch.empty(1250, 100_000, device="meta") for i in range(10)}
    with open("large.safetensors", "wb") as file:
        offset, header = 0, {}
        for name, tensor in weights.items():
            header[name] = {
                "dtype": "F32",
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + 4 * tensor.numel()],
            }
            offset += 4 * tensor.numel()
        text = json.dumps(header).encode()
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    script = (
        "from curvkit_cli.main import run; code = run(['inspect', 'large.safetensors']); import re; "
        "print(code, int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10)"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True, timeout=60
    )
    assert time.monotonic() - began < 5  # about a second alone; other processes share the processors
    assert "model\t10\t1250000000\t5000000000\tfloat32" in done.stdout
    code, mebibytes = map(int, done.stdout.splitlines()[-1].split())
    assert (code, mebibytes < 100) == (0, True)


def test_its_help(folder: Path):
    done = curvkit("inspect", "--help", cwd=folder)
    assert done.returncode == 0
    assert "Nothing in the file is run" in " ".join(done.stdout.split())
