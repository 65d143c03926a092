"""A decoder of 100 million parameters on the CPU: largest eigenvalue and trace, with time and peak memory.

    python benchmarks/large.py [--seconds 900]

Random weights, 2 sequences of 128 tokens of CPython's documentation, float32. The peak is that of the process (VmHWM), the model and
the imports included; the aim is to stay within 24 GiB.
"""

from __future__ import annotations

import argparse
import string
import time

import torch

from curvkit import Objective
from curvkit.linalg import lanczos
from curvkit.linalg.trace import Settings
from curvkit.losses import token_cross_entropy
from curvkit.measures import SharpnessSettings, TraceSettings, sharpness, trace
from curvkit.models import CharacterVocabulary, Decoder, spaced_windows, topics_text


def objective() -> Objective:
    text = topics_text()
    vocabulary = CharacterVocabulary.from_text(text + string.printable[:95])
    torch.manual_seed(0)
    model = Decoder(vocabulary=len(vocabulary), width=768, depth=15, heads=12, context=128)
    x, y = spaced_windows(vocabulary.encode(text), 128, 2)
    return Objective(model, token_cross_entropy, [(x, y)])


def peak() -> float:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM"))


MEMORY = 16 << 30
"""For graphs and vectors, half each, of a machine with 24 GiB: 18 vectors."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=300.0, help="At most, for each of the two searches.")
    seconds = parser.parse_args().seconds
    it = objective()
    print(f"{it.parameters.n:,} parameters, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    began = time.perf_counter()
    it.gradient()
    gradient = time.perf_counter() - began
    print(f"gradient {gradient:.1f} s, peak {peak():.1f} GiB", flush=True)
    search = lanczos.Settings(max_seconds=seconds)
    found = sharpness(it, seed=0, settings=SharpnessSettings(search, data_doubt=False, memory_bytes=MEMORY))
    low, high = found.eigenpairs.intervals[0].tolist()
    print(
        f"top 1: {found.value:.5g} in [{low:.5g}, {high:.5g}], converged {found.eigenpairs.all_converged}, {found.products} products, "
        f"{found.seconds:.0f} s ({found.seconds / gradient:.0f} gradients), peak {peak():.1f} GiB; {found.plan}",
        flush=True,
    )
    total = trace(it, tolerance=0.1, max_products=40, seed=0, settings=TraceSettings(Settings(max_seconds=seconds)))
    print(total, f"peak {peak():.1f} GiB")


if __name__ == "__main__":
    main()
