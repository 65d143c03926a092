"""What is there, what works and what does not, on the machine at hand."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "absent", "note", "broken"]
LEAST_TORCH, SAFE_TORCH = (2, 6), (2, 10)
"""Below the first, reading with weights_only can run code (CVE-2025-32434); below the second, it can be made to corrupt memory."""
CORE = ("numpy", "rich", "click", "safetensors")
EXTRAS = {
    "transformers": "hf",
    "peft": "hf",
    "accelerate": "hf",
    "datasets": "hf",
    "lightning": "lightning",
    "backpack-for-pytorch": "backpack",
    "pyhessian": "pyhessian",
    "matplotlib": "plot",
    "tensorboard": "tensorboard",
}
"""Optional package -> the extra of curvkit that installs it."""
UNINSTALL = "pip uninstall -y torchvision"
SECONDS_PER_IMPORT = 120
MOST_ERROR = 1e-12
"""Relative error of a product of order 8 in float64, whose rounding is some 1e-16 per term."""


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    name: str
    state: State
    text: str
    remedy: str = ""


def findings() -> Iterator[Finding]:
    """Look at one thing after the other; nothing is changed."""
    yield Finding("curvkit", "ok", version("curvkit") or "not installed as a package")
    yield Finding("python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    torch = _torch()
    yield torch
    yield from (_core(name) for name in CORE)
    if torch.state != "broken":
        yield from _guarded("threads", _threads)
        yield from _guarded("device", _devices)
    yield from map(_extra, EXTRAS)
    yield from _torchvision()
    if torch.state != "broken":
        yield from _guarded("self-test", _products)


def version(package: str) -> str | None:
    """Of an installed package; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _guarded(name: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check that raises has found something, too."""
    try:
        yield from look()
    except Exception as error:
        yield Finding(
            name, "broken", _reason(f"{type(error).__name__}: {error}"), "Install torch again for this machine."
        )


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:
        reason = _reason(f"{type(error).__name__}: {error}")
        return Finding("torch", "broken", f"cannot be imported ({reason})", "Install it again: pip install -U torch.")
    found = torch.__version__
    release = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if release < LEAST_TORCH:
        return Finding(
            "torch",
            "broken",
            f"{found}: reading a checkpoint as data can run its code (CVE-2025-32434)",
            "Install a newer one: pip install -U 'torch>=2.10'.",
        )
    if release < SAFE_TORCH:
        return Finding(
            "torch",
            "note",
            f"{found}: a crafted .pt file can corrupt memory while it is read as data (CVE-2026-24747)",
            "Open only files whose author you know, or pip install -U 'torch>=2.10'.",
        )
    return Finding("torch", "ok", found)


def _core(name: str) -> Finding:
    found = version(name)
    if found is None:
        return Finding(name, "broken", "not installed", f"pip install {name}")
    return Finding(name, "ok", found)


def _extra(name: str) -> Finding:
    found = version(name)
    if found is None:
        return Finding(name, "absent", "optional", f"pip install 'curvkit[{EXTRAS[name]}]'")
    return Finding(name, "ok", found)


def _threads() -> Iterator[Finding]:
    import torch

    waiting = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if name in os.environ}
    said = "".join(f", {name}={value}" for name, value in waiting.items())
    yield Finding("threads", "ok", f"{torch.get_num_threads()} of {os.cpu_count()} processors{said}")


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("device", "ok", f"cpu ({torch.backends.cpu.get_cpu_capability()})")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        text = f"cuda:{index} ({torch.cuda.get_device_name(index)}, {free / (1 << 30):.1f} of {total / (1 << 30):.1f} GiB free)"
        yield Finding("device", "ok", text)


def _torchvision() -> Iterator[Finding]:
    """Import it in another process: half imported, it would stay broken in this one. No module of the current directory is taken."""
    found = version("torchvision")
    if found is None:
        return
    try:
        tried = subprocess.run(
            [sys.executable, "-P", "-c", "import torchvision"],
            capture_output=True,
            text=True,
            timeout=SECONDS_PER_IMPORT,
            check=False,
        )
        reason = tried.stderr.strip().splitlines()[-1:] if tried.returncode else []
        failed = tried.returncode != 0
    except subprocess.TimeoutExpired:
        reason, failed = ["importing it takes too long"], True
    if failed:
        why = _reason(reason[0]) if reason else "it ends the process"
        text = f"{found} cannot be imported beside this torch ({why}), and transformers fails with it"
        yield Finding("torchvision", "broken", text, UNINSTALL)
    else:
        yield Finding("torchvision", "ok", found)


def _products() -> Iterator[Finding]:
    """A product with the Hessian of least squares, which is X'X times a constant, on every device."""
    import torch
    import torch.nn.functional as F

    from curvkit.objectives import Objective
    from curvkit.operators import Hessian

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        n = 8
        x = torch.arange(1.0, 5 * n + 1, dtype=torch.float64).sin().reshape(5, n)
        v = torch.arange(1.0, n + 1, dtype=torch.float64).cos()
        model = torch.nn.Linear(n, 1, bias=False, dtype=torch.float64, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            model.weight.zero_()
        objective = Objective(model, F.mse_loss, [(x, torch.ones(5, 1, dtype=torch.float64))]).converted(device=device)
        product = Hessian(objective).matvec(v.to(device)).cpu()
        expected = 2 / len(x) * (x.T @ (x @ v))
        error = ((product - expected).norm() / expected.norm()).item()
        if error <= MOST_ERROR:
            yield Finding("self-test", "ok", f"a Hessian product on {device} is right to {error:.0e}")
        else:
            text = f"a Hessian product on {device} is off by {error:.1e} of its length"
            yield Finding(
                "self-test", "broken", text, "Do not trust results there; use --device cpu, or another torch."
            )


def _reason(text: str) -> str:
    """The first line, not too long."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 160 else line[:157] + "..."
