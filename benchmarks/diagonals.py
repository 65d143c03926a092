"""Estimators of the Hessian's diagonal side by side: cost, memory and true error; and what signs per example gain over shared ones.

    python benchmarks/diagonals.py [mlp resnet decoder] [--parts table curve] [--only Fisher ...] [--runs 5] [--coordinates 200]

The truth is the whole diagonal of the Hessian where it is known exactly (piecewise linear models: MLP and ResNet-20), and else a sample of
its coordinates by products with unit vectors, drawn half evenly and half by the squares of a first estimate, and weighted by one over
their probability. An error is the root mean square over `--runs` seeds of ||d - diag H|| / ||diag H||. Times are in gradients (forward and
backward of the batch), checks beforehand included; memory is the peak of a fresh process above what it holds with model and data.

The curve needs no truth: both estimators are unbiased, so that half the mean squared difference of two draws is their variance. Shown is
how many times Hutchinson's gradients are for the same error of the diagonal, and of the trace.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from cases import CASES, Case
from torch import Tensor

from curvkit import Objective
from curvkit.errors import CurvkitError
from curvkit.estimators import (
    BackPACK,
    Controlled,
    Deflated,
    DiagonalEstimator,
    EmpiricalFisher,
    Exact,
    ExampleHutchinson,
    Fisher,
    Hutchinson,
    Lanczos,
    OptimizerState,
    SquaredGradient,
    XDiag,
)
from curvkit.operators import Hessian
from curvkit.results import DiagonalEstimate

warnings.filterwarnings("ignore")
CONTENDERS: tuple[DiagonalEstimator, ...] = (
    Exact("ggn"),
    Fisher(),
    Fisher(num_samples=10),
    EmpiricalFisher(),
    SquaredGradient(),
    Hutchinson(num_probes=1),
    Hutchinson(num_probes=12),
    ExampleHutchinson(),
    ExampleHutchinson(num_probes=10),
    Controlled(Hutchinson(num_probes=12)),
    Controlled(ExampleHutchinson()),
    Controlled(ExampleHutchinson(), by=Fisher(num_samples=4)),
    XDiag(num_products=30),
    Deflated(Hutchinson(num_probes=15), rank=15),
    Lanczos(rank=10),
    BackPACK("DiagHessian"),
    BackPACK("DiagGGNExact"),
    BackPACK("DiagGGNMC"),
)


@dataclass(frozen=True, eq=False)
class Truth:
    """The diagonal of the Hessian, whole or at some coordinates."""

    values: Tensor
    chosen: Tensor | None
    """Coordinates; None: all."""
    weights: Tensor
    how: str

    def error(self, found: Tensor) -> float:
        """Relative, in the Frobenius norm."""
        d = found if self.chosen is None else found[self.chosen]
        return ((self.weights * (d - self.values).square()).sum() / self.size).sqrt().item()

    @property
    def size(self) -> Tensor:
        return (self.weights * self.values.square()).sum()

    @classmethod
    def of(cls, case: Case, coordinates: int) -> Truth:
        """Exact where that is cheap; else sampled."""
        objective = case.objective()
        if case.name != "decoder":
            d = flat(Exact("ggn").estimate(objective))  # equal to the Hessian's where the model is piecewise linear
            return cls(d, None, torch.ones_like(d), "whole, GGN = H")
        first = flat(ExampleHutchinson(num_probes=4).estimate(objective, seed=10**6)).square()
        p = 0.5 / len(first) + 0.5 * first / first.sum()
        chosen = torch.multinomial(p, coordinates, replacement=True, generator=torch.Generator().manual_seed(0))
        H, values = Hessian(objective), []
        for j in chosen.tolist():
            e = torch.zeros(H.n, dtype=H.dtype)
            e[j] = 1.0
            values.append(H.matvec(e)[j].double())
        return cls(torch.stack(values), chosen, 1 / (coordinates * p[chosen]), f"{coordinates} coordinates")


def flat(found: DiagonalEstimate) -> Tensor:
    return torch.cat([value.reshape(-1).double() for value in found.values.values()])


def timed(estimator: DiagonalEstimator, objective: Objective, seed: int) -> tuple[DiagonalEstimate, float]:
    began = time.perf_counter()
    return estimator.estimate(objective, seed=seed), time.perf_counter() - began


def gradient_seconds(case: Case) -> float:
    parameters, began = list(case.model.parameters()), time.perf_counter()
    torch.autograd.grad(case.value(), parameters)
    return time.perf_counter() - began


def peak(name: str, contender: str) -> str:
    """MiB above model and data, in a fresh process; and what was foreseen."""
    done = subprocess.run(
        [sys.executable, __file__, name, "--alone", contender], capture_output=True, text=True, check=False
    )
    return done.stdout.strip().rpartition("\n")[2] or "fails"


def alone(case: Case, contender: str) -> str:
    """Run one, with the high-water mark of the resident set put back before."""
    estimator, objective = eval(contender, globals()), case.objective()
    before, expected = memory("VmRSS"), estimator.expected(objective)
    Path("/proc/self/clear_refs").write_text("5")
    estimator.estimate(objective, seed=0)
    return f"{memory('VmHWM') - before:.0f} ({expected.peak_bytes(objective) / 2**20:.0f})"


def memory(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def table(case: Case, name: str, chosen: list[DiagonalEstimator], *, runs: int, coordinates: int) -> None:
    truth, objective = Truth.of(case, coordinates), case.objective()
    trace = truth.values.sum().item() if truth.chosen is None else None
    for estimator in chosen:
        try:
            estimator.estimate(objective, seed=10**5)  # once for warming up
        except CurvkitError as error:
            row(case.name, estimator, "", "", "", f"refused: {str(error)[:150]}", "")
            continue
        gradients, times, found = list[float](), list[float](), list[DiagonalEstimate]()
        for seed in range(runs):
            gradients.append(gradient_seconds(case))
            one, seconds = timed(estimator, objective, seed)
            found.append(one)
            times.append(seconds)
        error = statistics.fmean(truth.error(flat(one)) ** 2 for one in found) ** 0.5
        off = "" if trace is None else f"{statistics.fmean((one.trace / trace - 1) ** 2 for one in found) ** 0.5:.1e}"
        cost = statistics.median(times) / statistics.median(gradients)
        row(case.name, estimator, found[0].matrix, f"{cost:.1f}", peak(name, repr(estimator)), f"{error:.2g}", off)
    row(
        case.name,
        f"truth: {truth.how}",
        "",
        "",
        "",
        f"{truth.size.sqrt().item():.3g}",
        "" if trace is None else f"{trace:.6g}",
    )


def saved(case: Case) -> None:
    """The free one, of the optimizer that trained the model."""
    objective, times = case.objective(), list[float]()
    gradients = [gradient_seconds(case) for _ in range(5)]
    for _ in range(5):
        began = time.perf_counter()
        found = OptimizerState().from_optimizer(case.optimizer, objective)
        times.append(time.perf_counter() - began)
    cost = statistics.median(times) / statistics.median(gradients)
    row(case.name, OptimizerState(), found.matrix, f"{cost:.2f}", "", "no Hessian", "")


def variances(found: Iterable[DiagonalEstimate]) -> tuple[float, float]:
    """Of the diagonal, summed, and of the trace, from draws one after the other."""
    draws = [flat(one) for one in found]
    pairs = list(zip(draws[::2], draws[1::2], strict=True))
    diagonal = statistics.fmean((a - b).square().sum().item() / 2 for a, b in pairs)
    return diagonal, statistics.fmean((a - b).sum().item() ** 2 / 2 for a, b in pairs)


def sizes(case: Case) -> Mapping[str, Case]:
    """Smaller batches, and shorter sequences."""
    if case.name != "decoder":
        rows = [n for n in (1, 4, 16, 64, 256, 512) if n <= len(case.x)]
        return {f"{n} rows": replace(case, x=case.x[:n], y=case.y[:n]) for n in rows}
    shapes = ((1, 128), (2, 128), (4, 128), (8, 128), (8, 64), (8, 32), (8, 16), (32, 32), (64, 16))
    made = {}
    for n, length in shapes:
        x, y = (ids.reshape(-1, length)[:n] for ids in (case.x, case.y))
        made[f"{n} sequences of {length}"] = replace(case, x=x, y=y)
    return made


def curve(case: Case, *, runs: int) -> None:
    for size, part in sizes(case).items():
        objective, seconds, spread = part.objective(), dict[str, float](), dict[str, tuple[float, float]]()
        for estimator in (Hutchinson(num_probes=1), ExampleHutchinson()):
            times, found = list[float](), list[DiagonalEstimate]()
            for seed in range(2 * runs):
                one, took = timed(estimator, objective, seed)
                found.append(one)
                times.append(took)
            name = type(estimator).__name__
            seconds[name], spread[name] = statistics.median(times), variances(found)
        ratio = seconds["Hutchinson"] / seconds["ExampleHutchinson"]
        gains = [ratio * a / b for a, b in zip(*spread.values(), strict=True)]
        row(case.name, size, f"{gains[0]:.1f}", f"{gains[0] ** 0.5:.1f}", f"{gains[1]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=["mlp", "resnet", "decoder"])
    parser.add_argument("--parts", nargs="*", default=["table", "curve"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="classes of estimators; default: all", default=[])
    parser.add_argument("--coordinates", type=int, default=200)
    parser.add_argument("--alone", help="an estimator; prints the peak of its memory and what was foreseen, in MiB")
    arguments = parser.parse_args()
    if arguments.alone:
        print(alone(CASES[arguments.cases[0]](steps=1), arguments.alone))
        return
    cases: dict[str, tuple[str, Case]] = {name: (name, CASES[name]()) for name in arguments.cases}
    if "table" in arguments.parts:
        row(
            "model",
            "estimator",
            "matrix",
            "time / gradient",
            "peak MiB (foreseen)",
            "error of the diagonal",
            "of the trace",
        )
        print("|---|---|---|---|---|---|---|")
        for name, case in cases.values():
            chosen = [it for it in CONTENDERS if not arguments.only or type(it).__name__ in arguments.only]
            table(case, name, chosen, runs=arguments.runs, coordinates=arguments.coordinates)
            saved(case)
    if "curve" in arguments.parts:
        row("model", "batch", "times fewer gradients, diagonal", "times smaller error", "times fewer gradients, trace")
        print("|---|---|---|---|---|")
        for _, case in cases.values():
            curve(case, runs=arguments.runs)


if __name__ == "__main__":
    main()
