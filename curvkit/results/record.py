"""What a number needs beside it to be believed later: versions, seed, device, data. No secrets: no environment, no full paths."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("curvkit", "torch", "numpy")


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they can change a number.

    Returns:
        Plain values.

    Example:
        >>> sorted(environment())[:3]
        ['cpu_capability', 'curvkit', 'numpy']
    """
    versions = {name: _version(name) for name in PACKAGES}
    return {
        **versions,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def peak_memory() -> int | None:
    """Largest resident size of this process so far.

    Returns:
        Bytes; None where the system does not tell.
    """
    try:
        import resource  # POSIX only
    except ImportError:
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size << 10


def repository(path: Path) -> dict[str, Any] | None:
    """Commit of the git repository that a file lies in.

    Args:
        path: Of the file that defines the objective.

    Returns:
        {"commit": ..., "dirty": ...}, or None outside of a repository or without git.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=path.resolve().parent, capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "dirty": bool(git("status", "--porcelain"))}


def without_folders(text: str) -> str:
    """Shorten an absolute path, alone or as the value of an option, to its part below the current directory, or else to its name.

    Args:
        text: A word of a command line, for example "--out=/home/me/runs/a" or "/home/me/train.py:objective".

    Returns:
        The word; anything but an absolute path stays as it is.

    Example:
        >>> without_folders("--out=/home/me/runs/a"), without_folders("runs/a"), without_folders("/data/train.py:objective")
        ('--out=a', 'runs/a', 'train.py:objective')
    """
    option = re.match(r"--[\w-]+=|-[a-zA-Z](?=/)", text)
    head, tail = (option[0], text[option.end() :]) if option else ("", text)
    path = Path(tail)
    if not path.is_absolute():
        return text
    here = Path.cwd()
    return head + (str(path.relative_to(here)) if path.is_relative_to(here) else path.name)


def to_json(document: Mapping[str, Any]) -> str:
    r"""Write a document with one line per entry; NaN and infinity, which JSON does not have, become null.

    Args:
        document: Mappings, lists, dataclasses, tensors and plain values.

    Returns:
        JSON text without a final newline.

    Example:
        >>> to_json({"a": float("nan"), "b": torch.tensor([1.0])}).replace("\n", "")
        '{  "a": null,  "b": [    1.0  ]}'
    """
    return json.dumps(plain(document), indent=2, allow_nan=False, ensure_ascii=False)


def plain(value: Any) -> Any:
    """Turn a result into what JSON knows.

    Args:
        value: A mapping, sequence, dataclass, tensor or plain value.

    Returns:
        Dicts, lists, finite numbers, strings, booleans and None. NaN and infinity are None: unknown, or without bound.
    """
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
