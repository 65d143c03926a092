"""Random numbers: addressed by (seed, purpose, index), and the global state untouched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import bits

from curvkit import seeds
from curvkit.errors import InvalidArgument


def test_drawn_seeds_differ_and_fit_in_32_bits():
    """Law. Two draws of 32 bits agree with probability 2^-32; eight of them, all equal, never."""
    drawn = [seeds.draw_seed() for _ in range(8)]
    assert len(set(drawn)) > 1
    assert all(0 <= seed < 2**32 for seed in drawn)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_a_seed_is_kept(seed: int):
    assert seeds.settle(seed) == seed


def test_none_draws_another_seed_each_time():
    """Law. A generator made without a seed would have the same one in every call."""
    assert len({seeds.settle(None) for _ in range(8)}) > 1


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "1", True])
def test_a_bad_seed_is_refused(seed: object):
    with pytest.raises(InvalidArgument, match=r"seed=.* must be an integer in \[0, 2\*\*63\), or None") as caught:
        seeds.settle(seed)  # type: ignore[arg-type]
    assert repr(seed) in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63 - 1), st.text(max_size=20), st.integers(0, 2**40))
def test_same_address_same_bits(seed: int, purpose: str, index: int):
    """Law."""
    first, second = (seeds.normal(5, seed, purpose, index) for _ in range(2))
    assert bits(first) == bits(second)


def test_any_part_of_the_address_changes_the_draw():
    """Law."""
    draws = [
        seeds.normal(4, seed, purpose, index)
        for seed in (0, 1, 10)
        for purpose in ("a", "b")
        for index in (0, 1, 2, 10)
    ]
    assert len({bits(draw) for draw in draws}) == len(draws)


def test_neighbouring_draws_are_uncorrelated():
    """Statistics. Inner products of 50 directions in R^10000, times 100, are normal: |z| < 5.5 in 1225 pairs but for p = 5e-5."""
    draws = torch.stack([seeds.normal(10_000, 7, "x", index, dtype=torch.float64) for index in range(50)])
    gram = draws @ draws.T / 100.0  # entries of variance 1 off the diagonal
    off = gram[~torch.eye(50, dtype=torch.bool)]
    assert off.abs().max() < 5.5
    assert abs(off.square().mean().item() - 1) < 5 * (2 / 1225) ** 0.5  # 1225 squares of variance 2


def test_normal_has_the_moments_of_a_normal():
    """Statistics. Means of 1e5 draws: |mean| < 5 / sqrt(N), |variance - 1| < 5 sqrt(2 / N), |kurtosis - 3| < 5 sqrt(96 / N)."""
    x, n = seeds.normal(100_000, 3, "moments", dtype=torch.float64), 100_000
    assert abs(x.mean().item()) < 5 / n**0.5
    assert abs(x.square().mean().item() - 1) < 5 * (2 / n) ** 0.5
    assert abs(x.pow(4).mean().item() - 3) < 5 * (96 / n) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device(dtype: torch.dtype):
    drawn = seeds.normal(3, 0, "x", dtype=dtype, device="cpu")
    assert (drawn.dtype, drawn.device.type, drawn.shape) == (dtype, "cpu", (3,))


def test_the_global_state_is_untouched():
    """Law."""
    before = torch.get_rng_state()
    seeds.normal(100, seeds.settle(None), "x")
    assert torch.equal(before, torch.get_rng_state())
