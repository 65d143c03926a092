"""What products with Hessian and GGN cost in gradients, retained and streamed, beside PyHessian and curvlinops; and the memory of each.

    python benchmarks/products.py [mlp resnet decoder] [--repeats 15]

Time: the contenders take turns inside one process, so that a slow spell of the machine meets all of them; the ratio of medians to
the median of a gradient (forward and backward of the same batch). Memory: growth of the peak resident size of a fresh process, as a
multiple of the gradient's. "fails" stands for a contender that raises on a model.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import CASES, Case
from curvlinops import GGNLinearOperator, HessianLinearOperator
from pyhessian import hessian as pyhessian_operator
from pyhessian.utils import hessian_vector_product
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvkit.operators import GGN, Hessian

warnings.filterwarnings("ignore")
KINDS = ("gradient", "retained", "streamed", "GGN retained", "GGN streamed")


class ClassesSecond(nn.Module):
    """[N, T, C] -> [N, C, T], as torch's cross-entropy takes it."""

    def forward(self, outputs: Tensor) -> Tensor:
        return outputs.transpose(1, 2)


def contenders(case: Case) -> dict[str, Callable[[], object]]:
    """The functions that take turns."""
    parameters = list(case.model.parameters())
    retained, streamed = (
        Hessian(case.objective(), residency="retained"),
        Hessian(case.objective(), residency="streamed"),
    )
    v = torch.randn(retained.n, generator=torch.Generator().manual_seed(0))
    ggn = {residency: GGN(case.objective(), residency=residency) for residency in ("retained", "streamed")}
    pieces = [piece.clone() for piece in retained.space.split(v)]
    with sdpa_kernel(SDPBackend.MATH):  # PyHessian fails on default attention
        single = pyhessian_operator(case.model, case.loss, data=(case.x, case.y), cuda=False)
        loader = pyhessian_operator(case.model, case.loss, dataloader=[(case.x, case.y)], cuda=False)

    def loader_product() -> object:
        with sdpa_kernel(SDPBackend.MATH):
            return loader.dataloader_hv_product(pieces)

    def linops_product(kind: type) -> Callable[[], object]:
        model = case.model if case.loss is F.cross_entropy else nn.Sequential(case.model, ClassesSecond())
        with sdpa_kernel(SDPBackend.MATH):
            operator = kind(model, nn.CrossEntropyLoss(), parameters, [(case.x, case.y)], check_deterministic=False)

        def product() -> object:
            with sdpa_kernel(SDPBackend.MATH):
                return operator @ v

        return product

    return {
        "gradient": lambda: torch.autograd.grad(case.value(), parameters),
        "curvkit, retained": lambda: retained.matvec(v),
        "curvkit, streamed": lambda: streamed.matvec(v),
        "PyHessian, one batch": lambda: hessian_vector_product(single.gradsH, single.params, pieces),
        "PyHessian, loader": loader_product,
        "curvlinops, Hessian": linops_product(HessianLinearOperator),
        "curvkit, GGN retained": lambda: ggn["retained"].matvec(v),
        "curvkit, GGN streamed": lambda: ggn["streamed"].matvec(v),
        "curvlinops, GGN": linops_product(GGNLinearOperator),
    }


def timed(case: Case, repeats: int) -> dict[str, float]:
    """Median time of each contender, in medians of a gradient."""
    everyone = contenders(case)
    functions = {name: function for name, function in everyone.items() if _runs(function)}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if repeat >= 2:  # warmed up
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    minima = {name: min(values) for name, values in times.items()}
    nan = float("nan")
    return {
        "gradient, ms": 1e3 * medians["gradient"],
        **{name: medians.get(name, nan) / medians["gradient"] for name in everyone if name != "gradient"},
        **{f"{name} (minima)": minima.get(name, nan) / minima["gradient"] for name in everyone if name != "gradient"},
    }


def _runs(function: Callable[[], object]) -> bool:
    """Peers do not differentiate every model."""
    try:
        function()
    except (RuntimeError, NotImplementedError) as error:
        print(f"fails: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    return True


def peak(kind: str, name: str) -> int:
    """Run in a fresh process: bytes by which the peak resident size grows over two calls."""
    case = CASES[name]()
    parameters = list(case.model.parameters())
    v = torch.randn(sum(p.numel() for p in parameters), generator=torch.Generator().manual_seed(0))
    _release()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # resets the peak to the present size
    base = _peak_now()
    if kind == "gradient":
        for _ in range(2):
            torch.autograd.grad(case.value(), parameters)
    else:
        matrix, residency = (GGN, kind.split()[1]) if kind.startswith("GGN ") else (Hessian, kind)
        operator = matrix(case.objective(), residency=residency)
        for _ in range(2):
            operator.matvec(v)
    del before
    return _peak_now() - base


def _peak_now() -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def _release() -> None:
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _shown(value: float) -> str:
    return "fails" if math.isnan(value) else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(arguments.peak, arguments.cases[0]))
        return
    columns = {}
    for name in arguments.cases:
        case = CASES[name]()
        column = timed(case, arguments.repeats)
        bytes_ = {
            kind: int(subprocess.check_output([sys.executable, __file__, name, "--peak", kind]).split()[-1])
            for kind in KINDS
        }
        column["gradient, peak MiB"] = bytes_["gradient"] / 2**20
        column.update({f"{kind}, peak": bytes_[kind] / bytes_["gradient"] for kind in KINDS[1:]})
        columns[f"{case.name}: {case.shape}"] = column
    names = list(next(iter(columns.values())))
    print("| |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for name in names:
        print(f"| {name} |", " | ".join(_shown(column[name]) for column in columns.values()), "|")
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "repeats": arguments.repeats}))


if __name__ == "__main__":
    main()
