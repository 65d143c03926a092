"""Threshold and mask of the flat coordinates: exact k-th value of many tensors, beside concatenation with kthvalue and topk, and numpy.

    python benchmarks/masks.py [--models 7.3M 50M] [--gamma 0.6] [--runs 5] [--threads 2]

The tensors have the shapes of a decoder; their values are log-normal, one in fifty is zero, as squares of gradients are. Every contender
makes the threshold and a mask for each tensor; how many are marked is counted. Times are medians of interleaved runs. Memory is what the
resident size of a fresh process grows by at its peak, the masks' n bytes taken off, in copies of the parameters.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from curvkit.linalg.selection import kth_smallest, smallest

Values = dict[str, Tensor]
MODELS = {"7.3M": (320, 5, 1750), "50M": (704, 8, 1900)}
"""Width, blocks and vocabulary."""


def values(model: str) -> Values:
    width, blocks, words = MODELS[model]
    shapes = {"embedding": (words, width), "head": (words, width), "norm": (width,)}
    for block in range(blocks):
        shapes |= {f"{block}.{name}": (width, width) for name in ("q", "k", "v", "o")}
        shapes |= {f"{block}.up": (4 * width, width), f"{block}.down": (width, 4 * width)}
        shapes |= {f"{block}.norm{which}": (width,) for which in (1, 2)}
    draw, found = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        found[name] = torch.empty(shape).log_normal_(-12, 3, generator=draw)
        found[name].view(-1)[::50] = 0.0
    return found


def size(h: Values) -> int:
    return sum(value.numel() for value in h.values())


def ours(h: Values, gamma: float) -> Values:
    return smallest(h, kth_smallest(h, math.floor(gamma * size(h))))


def kthvalue(h: Values, gamma: float) -> Values:
    """As the second class of the official code: all ties are marked."""
    joined = torch.cat([value.flatten() for value in h.values()])
    threshold = torch.kthvalue(joined, math.floor(gamma * len(joined))).values
    return {name: value <= threshold for name, value in h.items()}


def topk(h: Values, gamma: float) -> Values:
    """As the first class of the official code."""
    joined = torch.cat([value.flatten() for value in h.values()])
    threshold = torch.topk(joined, math.floor(gamma * len(joined)), largest=False).values[-1]
    return {name: value <= threshold for name, value in h.items()}


def partition(h: Values, gamma: float) -> Values:
    joined = np.concatenate([value.numpy().ravel() for value in h.values()])
    k = math.floor(gamma * len(joined))
    joined.partition(k - 1)
    return {name: value <= float(joined[k - 1]) for name, value in h.items()}


CONTENDERS: dict[str, Callable[[Values, float], Values]] = {
    "curvkit": ours,
    "concatenate + kthvalue": kthvalue,
    "concatenate + topk": topk,
    "concatenate + numpy partition": partition,
}


def marked(masks: Values) -> int:
    return sum(int(mask.count_nonzero()) for mask in masks.values())


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) << 12


def peak_alone(model: str, contender: str, gamma: float) -> int:
    """Bytes by which the resident size of a fresh process grows, looked at every millisecond; run in that process."""
    torch.set_num_threads(1)
    run, h = CONTENDERS[contender], values(model)
    run({"warm": torch.rand(10**5)}, gamma)
    before, seen, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    masks = run(h, gamma)
    done.set()
    watcher.join()
    return max(seen) - before - size(masks)


def measured_peak(model: str, contender: str, gamma: float) -> int:
    command = [sys.executable, __file__, "--peak", json.dumps([model, contender, gamma])]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--gamma", type=float, default=0.6)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak_alone(*arguments.peak))
        return
    torch.set_num_threads(arguments.threads)
    row("parameters", "contender", "wall ms", "ours is faster by", "CPU ms", "memory / parameters", "marked")
    print("|---|---|---|---|---|---|---|")
    for model in arguments.models:
        h = values(model)
        n, counts = size(h), dict[str, int]()
        wall: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        processor: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for _ in range(arguments.runs):
            for name, run in CONTENDERS.items():
                began, used = time.perf_counter(), time.process_time()
                masks = run(h, arguments.gamma)
                wall[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - used)
                counts[name] = marked(masks)
        least = statistics.median(wall["curvkit"])
        for name in CONTENDERS:
            spent, used = (1e3 * statistics.median(times[name]) for times in (wall, processor))
            memory = measured_peak(model, name, arguments.gamma) / (4 * n)
            exact = "exact" if counts[name] == math.floor(arguments.gamma * n) else f"{counts[name]:,}"
            row(f"{n:,}", name, f"{spent:.0f}", f"{spent / 1e3 / least:.1f}", f"{used:.0f}", f"{memory:.2f}", exact)


if __name__ == "__main__":
    main()
