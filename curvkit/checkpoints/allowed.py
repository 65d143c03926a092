"""What a checkpoint may hold beside tensors: plain containers and numbers, none of which runs anything."""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import types
from typing import Any

import numpy as np

_NUMPY_MAKERS: tuple[Any, ...] = (np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0])
SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    collections.defaultdict,
    list,
    dict,
    int,
    float,
    datetime.datetime,
    datetime.timedelta,
    np.dtype,
    np.ndarray,
    *(
        (f, f"{module}.{f.__name__}")
        for f in _NUMPY_MAKERS
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    ),
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "uint32", "bool")),
]
"""For torch.serialization.safe_globals: what training scripts store beside weights."""
