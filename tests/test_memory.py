"""Memory, measured as growth of the peak resident size of a fresh process: streamed products, and the basis in its budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import ctypes, gc, sys
import torch, torch.nn.functional as F
from curvkit.losses import token_cross_entropy
from curvkit.models import Decoder, ResNet
from curvkit.objectives import Objective
from curvkit.operators import Hessian
from curvkit.linalg import FunctionMap, lanczos

def high_water():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

def growth(work):
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")
    before = high_water()
    work()
    return high_water() - before

torch.manual_seed(0)
"""

MODELS = {
    "convolutions with BatchNorm": "model = ResNet(depth=14).eval()\n"
    "x, y, loss = torch.randn(48, 3, 32, 32), torch.randint(10, (48,)), F.cross_entropy\n",
    "attention": "model = Decoder(vocabulary=100, width=128, depth=4, heads=8, context=128)\n"
    "x, y = torch.randint(100, (16, 128)), torch.randint(100, (16, 128))\nloss = token_cross_entropy\n",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can only be reset on Linux"),
]


def _measured(script: str) -> list[int]:
    # glibc's allocator keeps what is freed below a threshold that grows; fixed, every vector goes back to the system
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE + script],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize("name", MODELS)
def test_streamed_products_stay_within_three_times_a_gradients_peak(name: str):
    """Law: the promise of the documentation; each kind of work in a process of its own."""
    gradient = (
        "print(growth(lambda: [torch.autograd.grad(loss(model(x), y), list(model.parameters())) for _ in range(2)]))"
    )
    streamed = (
        "def work():\n"
        "    H = Hessian(Objective(model, loss, [(x, y)]), residency='streamed')\n"
        "    v = torch.randn(H.n)\n"
        "    for _ in range(2):\n"
        "        H.matvec(v)\n"
        "print(growth(work))"
    )
    (first,), (second,) = _measured(MODELS[name] + gradient), _measured(MODELS[name] + streamed)
    assert first > 30 << 20, "too small to be measured"
    assert second <= 3 * first


def test_basis_stays_within_its_budget():
    """Law: max_rows counts every vector of length n that Lanczos holds; the map's own product is one more."""
    script = (
        "n, rows = 1_000_000, 24\n"
        "d = torch.linspace(0, 1, n)\n"
        "A = FunctionMap(n, lambda v: d * v)\n"
        "lanczos.eigenpairs(A, 1, max_rows=rows, max_products=4, seed=0)\n"  # warm up the libraries
        "peak = growth(lambda: lanczos.eigenpairs(A, 2, max_rows=rows, max_products=80, tolerance=1e-4, seed=0))\n"
        "print(peak, rows * n * 4)"
    )
    peak, budget = _measured(script)
    assert peak <= budget + (12 << 20)  # the product of the map, 4 MB, and the allocator's slack


HEAD = """
from curvkit.losses import BatchLoss, chunked_token_cross_entropy
vocabulary, width = 16384, 32
class Body(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = torch.nn.Embedding(vocabulary, width), torch.nn.Linear(width, width)
        self.head = torch.nn.Linear(width, vocabulary, bias=False)
    def hidden(self, x):
        return torch.tanh(self.mix(self.embed(x)))
    def forward(self, x):
        return self.head(self.hidden(x))
model = Body()
x, y = torch.randint(vocabulary, (4, 512)), torch.randint(vocabulary, (4, 512))
def chunked(model, batch):
    return chunked_token_cross_entropy(model.hidden(batch[0]), model.head.weight, batch[1], chunk=64)
def product(loss):
    H = Hessian(Objective(model, loss, [(x, y)]), residency="retained")
    return H.matvec(torch.ones(H.n))
with torch.no_grad():
    product_of_few = Hessian(Objective(model, BatchLoss(chunked), [(x[:1, :8], y[:1, :8])])).matvec(torch.ones(1049632))
"""


def test_a_loss_in_chunks_takes_the_memory_of_a_chunk():
    """Law: plain logits are 128 MiB and second derivatives keep several of them; chunks of 64 tokens are 4 MiB."""
    (plain,) = _measured(HEAD + "print(growth(lambda: product(token_cross_entropy)))")
    (chunked,) = _measured(HEAD + "print(growth(lambda: product(BatchLoss(chunked))))")
    assert plain > 4 * (128 << 20)
    # about 6 chunks of logits, and some twenty times the 4 MB of the parameters: gradients, products and what is summed
    assert chunked < 128 << 20
    assert chunked < plain / 6
