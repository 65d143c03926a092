"""The k-th smallest |h| without a sort: bit for bit that of a sort, from any parts in any order."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import bits, normal
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.linalg import bracket, patterns
from curvkit.linalg.patterns import count_zeros, unmark_zeros
from curvkit.linalg.selection import Selection, kth_smallest, smallest

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def drawn(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Magnitudes over many octaves, with zeros of both signs, infinities, subnormals and ties."""
    draw = random.Random(seed)
    h = (normal(n, seed=seed) * torch.exp(3 * normal(n, seed=seed + 1))).to(dtype)
    finfo = torch.finfo(dtype)
    special = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        finfo.tiny,
        finfo.smallest_normal / 4,
        -finfo.smallest_normal / 2,
        finfo.max,
    ]
    for value in special:
        if draw.random() < 0.5:
            h[draw.randrange(n) :: draw.choice((1, 2, 3, 7, 50))] = value
    return h


def cut(h: Tensor, parts: int, seed: int) -> dict[str, Tensor]:
    """In pieces of random length, some of them empty."""
    draw = random.Random(seed)
    places = sorted(draw.randint(0, len(h)) for _ in range(parts - 1))
    ends = zip([0, *places], [*places, len(h)], strict=True)
    return {f"{index}": h[begin:end] for index, (begin, end) in enumerate(ends)}


def marked(h: Tensor, k: int) -> Tensor:
    """The first k of a stable sort."""
    mask = torch.zeros(len(h), dtype=torch.uint8)
    mask[h.abs().double().sort(stable=True).indices[:k]] = 1
    return mask


def joined(masks: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([mask.reshape(-1) for mask in masks.values()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(30))
def test_it_is_that_of_a_sort(dtype: torch.dtype, seed: int):
    """Another library: torch.kthvalue and a stable sort; ties, zeros, infinities and subnormals in random numbers."""
    draw = random.Random(seed)
    n = draw.choice((1, 2, 3, 17, 400, 5000))
    h, parts = drawn(n, dtype, seed), draw.choice((1, 2, 5))
    named = cut(h, parts, seed)
    for k in {1, n, draw.randint(1, n), max(1, int(0.6 * n))}:
        found, expected = kth_smallest(named, k), h.abs().kthvalue(k).values
        assert bits(found.value) == bits(expected)
        assert found.below == int((h.abs() < expected).sum()) < k <= found.below + found.ties
        assert found.ties == int((h.abs() == expected).sum())
        assert found.take == k - found.below
        assert torch.equal(joined(smallest(named, found)), marked(h, k))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=40), st.data())
def test_any_list_of_numbers(values: list[float], data: st.DataObject):
    """Brute force: Python's sort."""
    k = data.draw(st.integers(1, len(values)))
    found = kth_smallest({"h": torch.tensor(values)}, k)
    assert found.value.item() == sorted(map(abs, values))[k - 1]
    assert math.copysign(1.0, found.value.item()) == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_the_order_of_parts_nor_the_chunks_matter(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Law. The mask of each tensor belongs to the order of the names; the value to none."""
    h = drawn(3000, dtype, 5)
    named = cut(h, 6, 0)
    found = kth_smallest(named, 1700)
    masks = smallest(named, found)
    for chunk in (37, 100, 1000):
        monkeypatch.setattr(patterns, "CHUNK", chunk)
        assert kth_smallest(dict(reversed(named.items())), 1700) == found
        assert kth_smallest(named, 1700) == found
        again = smallest(named, found)
        assert all(torch.equal(masks[name], again[name]) for name in named)


def test_strides_are_seen_through(monkeypatch: pytest.MonkeyPatch):
    """Brute force on contiguous copies: transposed, strided, expanded, channels last, without dimension, without entry."""
    monkeypatch.setattr(patterns, "CHUNK", 10)
    x = drawn(240, torch.float32, 3)
    named = {
        "transposed": x.view(12, 20).T,
        "strided": x[::7],
        "rows": x.view(20, 12)[::3, 1::2],
        "expanded": x[:5, None].expand(5, 30),
        "flipped": x.view(2, 3, 40).permute(2, 0, 1),
        "channels last": x.view(2, 3, 5, 8).to(memory_format=torch.channels_last),
        "scalar": x[7],
        "empty": x[:0].view(0, 3),
    }
    whole = joined(named)
    for k in (1, 100, 300, len(whole)):
        found = kth_smallest(named, k)
        assert bits(found.value) == bits(whole.abs().kthvalue(k).values)
        masks = smallest(named, found)
        assert torch.equal(joined(masks), marked(whole, k))
        assert all(masks[name].shape == tensor.shape for name, tensor in named.items())


def test_several_types_are_compared_as_numbers():
    """Closed form: 1/3 in three types is three numbers."""
    named = {str(dtype): torch.tensor([1 / 3], dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)}
    values = sorted(tensor.double().item() for tensor in named.values())
    assert [kth_smallest(named, k).value.item() for k in (1, 2, 3)] == values
    assert kth_smallest({"a": torch.ones(1).half(), "b": torch.ones(1).bfloat16()}, 1).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_of_processes_add_up(dtype: torch.dtype):
    """Law. Three shares, one of them empty: the added counts lead to the whole's value, and the ties are handed on in order."""
    h = drawn(900, dtype, 8)
    h[::3] = 0.5
    shares = [h[:100], h[:0], h[100:]]
    k = int((h.abs() < 0.5).sum()) + 120
    found = Selection.start(k, dtype)
    while not found.done:
        found = found.narrowed(sum((found.counts([share]) for share in shares), torch.zeros((), dtype=torch.int64)))
    assert found == kth_smallest({"h": h}, k)
    left, masks = found.take, []
    for share in shares:
        masks.append(smallest({"h": share}, found, take=left)["h"])
        left = max(0, left - int((share.abs() == 0.5).sum()))
    assert torch.equal(torch.cat(masks), marked(h, k))
    assert int(torch.cat(masks).sum()) == k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(12))
def test_a_sampled_bracket_gives_the_same(dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch):
    """Another library. Small numbers are made worth a sample; the bracket misses now and then, and then all bits are counted."""
    monkeypatch.setattr(bracket, "LEAST", 64)
    monkeypatch.setattr(bracket, "PART", 4)
    monkeypatch.setattr(bracket, "DEVIATIONS", 1.0)
    monkeypatch.setattr(patterns, "CHUNK", 500)
    h = drawn(4000, dtype, seed)
    named = cut(h, 4, seed) | {"t": drawn(600, dtype, seed + 1).view(20, 30).T}
    whole = joined(named)
    for k in (1, 2, 1000, 2300, 4599, 4600):
        expected = whole.abs().kthvalue(k).values
        found = kth_smallest(named, k)
        assert bits(found.value) == bits(expected)
        assert found.below == int((whole.abs() < expected).sum())
        assert found.ties == int((whole.abs() == expected).sum())
        assert torch.equal(joined(smallest(named, found)), marked(whole, k))


def test_a_bracket_holds_what_it_is_to_hold_or_gives_up(monkeypatch: pytest.MonkeyPatch):
    """Closed form on 0 ... n - 1: found at once; missed where the sampled tensor is not like the rest; too few values; NaN."""
    n = 1 << 18
    h = torch.arange(float(n))[torch.randperm(n, generator=torch.Generator().manual_seed(0))]

    def at_once(h: Tensor, k: int) -> tuple[int, int, int] | None:
        return bracket.kth_in_bracket([h], k, torch.float32)

    for k in (1, 2, n // 2, n - 1, n):
        found = at_once(h, k)
        assert found is not None
        assert found == (int(torch.tensor(float(k - 1)).view(torch.int32)), k - 1, 1)
    assert at_once(torch.zeros(n), n // 2) == (0, 0, n)
    assert at_once(h[: n // 4], 5) is None
    with monkeypatch.context() as patch:
        patch.setattr(bracket, "PART", n)  # two values are no sample
        assert at_once(h, 5) is None
    assert at_once(torch.where(h == 77.0, math.nan, h), n // 2) is None
    monkeypatch.setattr(bracket, "TURN", 0.0)  # the first of each run is drawn
    misleading = torch.arange(float(n))
    misleading[:: bracket.PART] += 1e9
    assert at_once(misleading, n // 2) is None
    expected = misleading.kthvalue(n // 2).values
    assert bits(kth_smallest({"h": misleading}, n // 2).value) == bits(expected)


def test_ties_beside_a_bracket_do_not_fill_the_memory():
    """Closed form. Two values, and the quantile at the border of them: the bracket would hold all, so that all bits are counted."""
    h = torch.zeros(1 << 20)
    h[1::2] = 1.0
    assert bracket.kth_in_bracket([h], 1 << 19, torch.float32) is None
    found = kth_smallest({"h": h}, 1 << 19)
    assert (found.value.item(), found.below, found.ties) == (0.0, 0, 1 << 19)
    found = kth_smallest({"h": h}, (1 << 19) + 1)
    assert (found.value.item(), found.below, found.ties) == (1.0, 1 << 19, 1 << 19)


def test_subnormals_are_not_flushed():
    """Closed form. Comparisons of floating-point numbers under this flag would make them equal to zero."""
    h = torch.tensor([3e-45, 0.0, -1e-45, 2e-40])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        found = kth_smallest({"h": h}, 2)
        mask, zeros = smallest({"h": h}, found)["h"], count_zeros({"h": h})
        kept = unmark_zeros({"h": h}, {"h": torch.ones(4, dtype=torch.uint8)})["h"]
    finally:
        torch.set_flush_denormal(False)
    assert (found.low, found.below, found.ties, zeros) == (1, 1, 1, 1)
    assert mask.tolist() == [0, 1, 1, 0]
    assert kept.tolist() == [1, 0, 1, 1]


def test_both_zeros_are_one():
    """Closed form."""
    h = {"a": torch.tensor([-0.0, 1.0]), "b": torch.tensor([0.0])}
    found = kth_smallest(h, 2)
    assert (bits(found.value), found.ties, count_zeros(h)) == (bits(torch.zeros(1)), 2, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("payload", ["quiet", "least"])
def test_nan_is_refused_by_name(dtype: torch.dtype, sign: int, payload: str):
    """The NaN whose bits follow those of infinity is one, too."""
    h = torch.ones(3, 4, dtype=dtype)
    integers = patterns.PATTERNS[dtype][0]
    least = (torch.tensor([patterns.infinity(dtype) + 1], dtype=integers)).view(dtype)[0]
    h[1, 2] = sign * (least if payload == "least" else torch.tensor(math.nan, dtype=dtype))
    with pytest.raises(
        InvalidArgument, match=r"'b.weight' is NaN at index \[1, 2\]. Values must be numbers or infinite"
    ):
        kth_smallest({"a": torch.ones(2, dtype=dtype), "b.weight": h}, 1)


def test_nan_in_the_counts_is_refused_by_every_process():
    start = Selection.start(1, torch.float32)
    counts = start.counts([torch.ones(2)]) + start.counts([torch.tensor([math.nan, 1.0, math.nan])])
    with pytest.raises(InvalidArgument, match="2 of the values are NaN, which have no place in the order"):
        start.narrowed(counts)


@pytest.mark.parametrize("k", [0, -1, 1.0, True, None])
def test_a_place_is_a_positive_integer(k: object):
    with pytest.raises(InvalidArgument, match="k=.* must be an integer of at least 1") as caught:
        kth_smallest({"a": torch.ones(2)}, k)  # type: ignore[arg-type]
    assert repr(k) in str(caught.value)


def test_a_place_is_among_the_values():
    with pytest.raises(InvalidArgument, match="kth_smallest: k=3 must lie between 1 and the number of values, 2"):
        kth_smallest({"a": torch.ones(2)}, 3)
    start = Selection.start(3, torch.float32)
    with pytest.raises(InvalidArgument, match="Selection: k=3 of 2 values"):
        start.narrowed(start.counts([torch.ones(2)]))


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, dtype=torch.int64), torch.ones(2).to(torch.complex64), torch.ones(2).to_sparse()]
)
def test_what_has_no_order_is_refused(tensor: Tensor):
    with pytest.raises(
        InvalidArgument, match="'w' is of torch.* an order is defined for dense tensors of float16, bfloat16, float32"
    ):
        kth_smallest({"a": torch.ones(2), "w": tensor}, 1)
    with pytest.raises(
        InvalidArgument, match="values of type torch.int64 were given; the order is defined for float16"
    ):
        Selection.start(1, torch.int64)


def test_nothing_has_no_order():
    with pytest.raises(InvalidArgument, match="No tensor was given, and an order needs values"):
        kth_smallest({}, 1)


def test_marking_needs_the_value():
    with pytest.raises(InvalidArgument, match="smallest: the selection has 31 unknown bits"):
        smallest({"a": torch.ones(2)}, Selection.start(1, torch.float32))


def test_a_graph_is_not_touched():
    """Law. Values that require a gradient are read, and nothing is recorded or written."""
    h = torch.tensor([2.0, -1.0], requires_grad=True)
    before = bits(h)
    found = kth_smallest({"h": h}, 1)
    assert smallest({"h": h}, found)["h"].tolist() == [0, 1]
    assert bits(h) == before
    assert not found.value.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_device_gives_the_same(dtype: torch.dtype):
    """The CPU's selection and mask, bit for bit, also of tensors on both."""
    named = cut(drawn(300_000, dtype, 3), 3, 0)
    there = {name: tensor.cuda() if name != "1" else tensor for name, tensor in named.items()}
    for k in (1, 150_001, 300_000):
        found = kth_smallest(named, k)
        assert kth_smallest(there, k) == found
        masks, others = smallest(named, found), smallest(there, found)
        assert all(torch.equal(masks[name], others[name].cpu()) for name in named)
        assert all(others[name].device == there[name].device for name in named)


LARGE = """
import resource, torch
from curvkit.linalg.selection import kth_smallest, smallest
n, k = 10**8, 60_000_007
h = torch.empty(n, dtype=torch.float32).log_normal_(0, 3, generator=torch.Generator().manual_seed(0))
h[::1000] = 0.0
kth_smallest({"h": h[:1000]}, 5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = kth_smallest({"h": h}, k)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mask = smallest({"h": h}, found)["h"]
value = found.value.item()
below = sum(int((part < value).sum()) for part in h.split(1 << 22))
up_to = sum(int((part <= value).sum()) for part in h.split(1 << 22))
kept = sum(int(part.count_nonzero()) for part in mask.split(1 << 22))
print(after - before, below == found.below, below < k <= up_to, up_to - below == found.ties, kept == k)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="resident sizes are in other units")
def test_a_hundred_million_values_in_bounded_memory():
    """Counting: fewer than k lie below, at least k do not lie above. 400 MB of values; beside them less than 20 MiB at any time."""
    ran = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True, timeout=300)
    kib, *right = ran.stdout.split()
    assert int(kib) < 20 << 10
    assert right == ["True"] * 4
