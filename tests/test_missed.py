"""The claim that no eigenvalue lies beyond a bound, with its probability."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from curvkit.linalg import DenseMap, FunctionMap, lanczos
from curvkit.linalg.lanczos import Settings, steps
from curvkit.linalg.missed import Chain, lower_bound, tridiagonal_chain, upper_bound

# Spectra of order n whose largest eigenvalue is easy to miss: an outlier, a tiny gap, no gap at all, two close ones, both signs.
SPECTRA = {
    "outlier": lambda n: torch.cat([torch.ones(n - 1), torch.tensor([1.5])]),
    "tiny gap": lambda n: torch.cat([torch.linspace(0, 1, n - 1), torch.tensor([1.0 + 1e-3])]),
    "uniform": lambda n: torch.linspace(-1, 1, n),
    "geometric": lambda n: 0.9 ** torch.arange(n).double(),
    "both signs": lambda n: torch.cat([-torch.linspace(0, 2, n // 2), torch.linspace(0, 1, n - n // 2)]),
}


def violations(spectrum: Tensor, *, confidence: float, draws: int, num_steps: int, start: Tensor | None = None) -> int:
    """How often the bound after a few steps lies below the largest eigenvalue; nothing is made of rounding in float64."""
    d = spectrum.double()
    A = FunctionMap(len(d), lambda v: d * v, dtype=torch.float64)
    missed = 0
    for seed in range(draws):
        for state, _ in zip(steps(A, Settings(), start=start, seed=seed), range(num_steps), strict=False):
            pass
        bound = upper_bound(state.chain, confidence)
        missed += bound is not None and bound < d.max().item()
    return missed


def most_violations(draws: int, probability: float) -> int:
    """The count that a binomial variable exceeds with probability 1e-6 at most: mean + 5 standard deviations + 5."""
    return math.ceil(draws * probability + 5 * math.sqrt(draws * probability) + 5)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("num_steps", [2, 5])
def test_the_claim_holds_as_often_as_it_says(name: str, num_steps: int):
    """Statistics: 300 starts at 90 %; few steps, so that the bound is not trivially far away."""
    count = violations(SPECTRA[name](200), confidence=0.9, draws=300, num_steps=num_steps)
    assert count <= most_violations(300, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("num_steps", [2, 4, 8])
def test_the_claim_holds_at_the_confidence_that_is_printed(name: str, num_steps: int):
    """Statistics: 2000 starts at 99 %."""
    count = violations(SPECTRA[name](300), confidence=lanczos.CONFIDENCE, draws=2000, num_steps=num_steps)
    assert count <= most_violations(2000, 1 - lanczos.CONFIDENCE)


@pytest.mark.parametrize("kind", ["along another", "against it"])
def test_the_claim_holds_with_a_start_that_is_half_given(kind: str):
    """Statistics: the given half lies in another eigenvector, or is as far from the top one as it can be."""
    d = SPECTRA["tiny gap"](200)
    start = torch.zeros(200, dtype=torch.float64)
    start[0 if kind == "along another" else 199] = 1.0 if kind == "along another" else -1.0
    count = violations(d, confidence=0.9, draws=300, num_steps=5, start=start)
    assert count <= most_violations(300, 0.1)


def test_the_claim_is_not_empty():
    """Law: if the bound were never violated at low confidence it would be far too wide. At 20 % it must fail at times."""
    count = violations(SPECTRA["outlier"](200), confidence=0.0, draws=200, num_steps=1)
    assert count > 0


def test_right_side_by_hand():
    """Closed form: one step on a 2x2 matrix. |c| <= beta / (lambda - ritz), so the bound is ritz + beta / t."""
    chain = Chain(torch.tensor([2.0], dtype=torch.float64), [0.5], random_share=1.0, n=2, product_error=0.0)
    t = (1 - 0.9) * math.sqrt(math.pi / 4)
    assert upper_bound(chain, 0.9) == pytest.approx(2.0 + 0.5 / t, rel=1e-3)
    assert upper_bound(chain, 0.9) >= 2.0 + 0.5 / t
    assert lower_bound(chain, 0.9) == pytest.approx(2.0 - 0.5 / t, rel=1e-3)


def test_half_random_start_doubles_what_must_be_explained():
    """Closed form: t is proportional to the random share."""
    whole, half = (
        upper_bound(Chain(torch.tensor([2.0], dtype=torch.float64), [0.5], share, 50, 0.0), 0.99)
        for share in (1.0, 0.5)
    )
    assert (half - 2.0) == pytest.approx(2 * (whole - 2.0), rel=2e-3)


def test_an_invariant_subspace_leaves_no_gap():
    """Closed form: beta_k = 0."""
    chain = Chain(torch.tensor([1.0, 3.0], dtype=torch.float64), [1.0, 0.0], 1.0, 30, 0.0)
    assert upper_bound(chain, 0.99) == pytest.approx(3.0, abs=1e-14)


def test_rounding_of_the_products_keeps_the_bound_away():
    """Law: the bound cannot be closer than the rounding of the products allows."""
    exact, rounded = (
        upper_bound(Chain(torch.tensor([1.0, 3.0], dtype=torch.float64), [1.0, 0.0], 1.0, 30, e), 0.99)
        for e in (0.0, 1e-6)
    )
    assert rounded > exact + 1e-5


def test_zero_and_useless_chains():
    """Law: a zero matrix has the bound 0; a chain that explains nothing gives no claim, not a wrong one."""
    zero = Chain(torch.zeros(1, dtype=torch.float64), [0.0], 1.0, 10, 1e-7)
    assert upper_bound(zero, 0.99) == lower_bound(zero, 0.99) == 0.0
    assert upper_bound(Chain(torch.zeros(1, dtype=torch.float64), [1.0], 1.0, 10, 0.0), 0.99) is None
    useless = Chain(torch.tensor([1.0], dtype=torch.float64), [1e3], 1e-9, 10**12, 0.0)
    assert upper_bound(useless, 0.999999) is None


def test_chain_of_a_tridiagonal_matrix():
    """Closed form: eigenvalues and off-diagonals."""
    T = torch.tensor([[2.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
    chain = tridiagonal_chain(T, 0.25, random_share=0.5, n=7, product_error=0.0)
    assert chain.ritz.tolist() == pytest.approx([1.0, 3.0])
    assert list(chain.betas) == [1.0, 0.25]


def test_no_claim_with_blocks():
    """Law: the bound is derived for one start vector; with blocks nothing is claimed."""
    A = torch.diag(torch.linspace(0, 1, 100, dtype=torch.float64) ** 2)
    pairs = lanczos.eigenpairs(DenseMap(A), 2, block_size=2, seed=0)
    assert pairs.upper_bound is pairs.lower_bound is pairs.confidence is None


def test_the_bound_survives_restarts():
    """Closed form: it comes from the run before the first restart and stays valid for the matrix."""
    d = torch.linspace(0, 1, 2000, dtype=torch.float64) ** 2
    d[0] = 1.2
    pairs = lanczos.eigenpairs(
        FunctionMap(2000, lambda v: d * v, dtype=torch.float64), 2, max_rows=18, tolerance=1e-5, seed=0
    )
    assert pairs.upper_bound >= 1.2
    assert pairs.upper_bound >= pairs.values[0].item()
