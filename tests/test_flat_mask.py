"""Masks of flat coordinates: exactly floor(gamma n) of them, the right ones, the same on every way."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import bits, normal
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from curvkit import BatchLoss, Objective
from curvkit.errors import InvalidArgument
from curvkit.estimators import Exact
from curvkit.linalg import patterns
from curvkit.projection import FlatMask, FlatRule, load_masks, save_masks
from curvkit.results import Cost, DiagonalEstimate
from curvkit.testing import check_projection

SHAPES = {"embedding": (7, 5), "scale": (), "norm": (11,), "none": (0, 3), "conv": (2, 3, 4)}
N = sum(math.prod(shape) for shape in SHAPES.values())
GROUPS = {"embedding": "tables", "scale": "rest", "norm": "rest", "none": "tables", "conv": "tables"}


def shaped(shape: tuple[int, ...], seed: int) -> Tensor:
    return normal(math.prod(shape), seed=seed).view(shape)


def diagonal(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """With zeros, ties and infinities."""
    draw, found = random.Random(seed), {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        h = shaped(shape, 100 * seed + index).mul(2).round(decimals=draw.choice((0, 1, 5))).to(dtype)
        h = torch.where(shaped(shape, 50 + seed + index) > 1.5, math.inf, h.double()).to(dtype)
        found[name] = h
    return found


def sorted_mask(h: dict[str, Tensor], gamma: tuple[int, int], *, zeros_are_sharp: bool = False) -> dict[str, Tensor]:
    """Brute force in Python: sort by |h|, then by place; gamma as a fraction of integers."""
    entries = [(abs(x), place) for place, x in enumerate(torch.cat([v.reshape(-1) for v in h.values()]).tolist())]
    counted = [entry for entry in entries if entry[0] > 0 or not zeros_are_sharp]
    flat = {place for _, place in sorted(counted)[: gamma[0] * len(counted) // gamma[1]]}
    marks, found = [int(place in flat) for place in range(len(entries))], {}
    for name, value in h.items():
        found[name] = torch.tensor(marks[: value.numel()], dtype=torch.uint8).view(value.shape)
        marks = marks[value.numel() :]
    return found


def same(a: Any, b: Any) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("zero_curvature", ["flat", "sharp"])
def test_the_least_are_flat(dtype: torch.dtype, seed: int, zero_curvature: Any, monkeypatch: pytest.MonkeyPatch):
    """Brute force, whole and in chunks; the number is exact whatever the ties."""
    h, sharp = diagonal(seed, dtype), zero_curvature == "sharp"
    for hundredths in (0, 1, 29, 50, 60, 99, 100):
        rule = FlatRule(hundredths / 100, zero_curvature=zero_curvature)
        found, expected = FlatMask.from_diagonal(h, rule), sorted_mask(h, (hundredths, 100), zeros_are_sharp=sharp)
        assert same(found, expected)
        with monkeypatch.context() as patch:
            patch.setattr(patterns, "CHUNK", 6)
            assert same(FlatMask.from_diagonal(h, rule), expected)
        flat = torch.cat([h[name].abs()[mask] for name, mask in found.view().items()])
        assert found.threshold == (flat.max().item() if len(flat) else None)


@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_scopes_are_masks_of_their_own(scope: Any):
    """Law: a scope is the global rule on each set."""
    h, groups = diagonal(3), GROUPS if scope == "group" else None
    found = FlatMask.from_diagonal(h, FlatRule(0.6, scope=scope), groups=groups)
    sets = {name: GROUPS[name] if groups else name for name in h}
    for key in set(sets.values()):
        part = {name: value for name, value in h.items() if sets[name] == key}
        assert same({name: found[name] for name in part}, sorted_mask(part, (6, 10)))
    assert list(found) == list(h)
    assert found.threshold is None


def test_the_figure_of_the_paper():
    """Closed form. L = (1 + u^2) v^2 / 2 at (1, 0.01): diag H = (v^2, 1 + u^2), and half of the coordinates flat means u."""

    class Valley(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (1.0, 0.01))

        def forward(self, x: Tensor) -> Tensor:
            return (1 + self.u**2) * self.v**2 / 2 * x.mean()

    objective = Objective(Valley(), BatchLoss(lambda model, batch: model(batch[0])), [(torch.ones(1, 1),)])
    estimate = Exact("hessian").estimate(objective)
    assert estimate.values["u"].item() == pytest.approx(1e-4, rel=1e-12)
    assert estimate.values["v"].item() == pytest.approx(2.0, rel=1e-12)
    found = FlatMask.from_diagonal(estimate, FlatRule(0.5))
    assert {name: int(mask) for name, mask in found.items()} == {"u": 1, "v": 0}
    assert found.origin.startswith("hessian by Exact(")
    assert found.threshold == estimate.values["u"].item()


def test_gamma_is_the_decimal_number_that_was_written():
    """Closed form. In binary, floor(0.29 * 100) is 28."""
    assert [FlatRule(number / 100).size(100) for number in range(101)] == list(range(101))
    assert [FlatRule(number / 1000).size(10**9) for number in range(1001)] == [number * 10**6 for number in range(1001)]
    assert (FlatRule(1e-7).size(10**8), FlatRule(0.1).size(421), FlatRule(1).size(5), FlatRule(0).size(5)) == (
        10,
        42,
        5,
        0,
    )
    assert FlatRule(0.9).size(421) == 378  # where the official code keeps 380
    h = torch.arange(100.0)
    assert int(FlatMask.from_diagonal({"h": h}, FlatRule(0.29))["h"].sum()) == 29


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, math.inf]), min_size=1, max_size=30), st.integers(0, 1000))
def test_ties_are_taken_by_position(values: list[float], thousandths: int):
    """Brute force on few different values."""
    h = {"h": torch.tensor(values)}
    assert same(FlatMask.from_diagonal(h, FlatRule(thousandths / 1000)), sorted_mask(h, (thousandths, 1000)))


def test_unseen_rows_can_be_sharp():
    """Closed form. 90 of 100 rows of a table were never looked up: they are all that is flat, or none of it."""
    table, head = torch.zeros(100, 4), torch.arange(1.0, 101.0)
    table[::10] = 1000.0
    h = {"table": table, "head": head}
    flat = FlatMask.from_diagonal(h, FlatRule(0.6))
    assert {row.name: row.flat for row in flat.layers} == {"table": 300, "head": 0}
    sharp = FlatMask.from_diagonal(h, FlatRule(0.6, zero_curvature="sharp"))  # of 140 that were touched
    assert {row.name: row.flat for row in sharp.layers} == {"table": 0, "head": 84}
    assert sharp.threshold == 84.0
    none = FlatMask.from_diagonal({"h": torch.zeros(5)}, FlatRule(1.0, zero_curvature="sharp"))
    assert (none["h"].sum().item(), none.threshold) == (0, None)


def test_it_is_a_projection():
    """Law: that of `check_projection`, and its complement's; sharp coordinates are 0 whatever they were, flat ones keep their bits."""
    h = diagonal(1)
    mask = FlatMask.from_diagonal(h, FlatRule(0.5))
    update = {name: shaped(shape, 9).float() for name, shape in SHAPES.items()}
    for projection in (mask, mask.sharp):
        check_projection(projection, update)
    flat, sharp = mask(update), mask.sharp(update)
    assert all(torch.equal(flat[name] + sharp[name], update[name]) for name in update)
    odd = {"h": torch.tensor([-0.0, math.nan, math.inf, 1.0])}
    kept = FlatMask({"h": torch.tensor([True, False, False, True])})(odd)["h"]
    assert bits(kept) == bits(torch.tensor([-0.0, 0.0, 0.0, 1.0]))


def test_types_and_order_of_an_update_are_kept():
    mask = FlatMask({"a": torch.tensor([1, 0], dtype=torch.uint8), "b": torch.tensor([True])})
    update = {"b": torch.ones(1, dtype=torch.bfloat16), "a": torch.ones(2, dtype=torch.float64, requires_grad=True)}
    found = mask(update)
    assert [(name, u.dtype, u.requires_grad) for name, u in found.items()] == [
        ("b", torch.bfloat16, False),
        ("a", torch.float64, False),
    ]


@pytest.mark.parametrize(
    ("update", "said"),
    [
        ({"a": torch.ones(2)}, r"lacks \['b'\] and has \[\] beside; it must have the 2 names"),
        ({"a": torch.ones(2), "b": torch.ones(1), "c": torch.ones(1)}, r"lacks \[\] and has \['c'\] beside"),
        ({"a": torch.ones(2, 1), "b": torch.ones(1)}, r"'a' is a torch.float32 tensor of shape \(2, 1\)"),
        ({"a": torch.ones(2).long(), "b": torch.ones(1)}, "'a' is a torch.int64 tensor"),
        ({"a": torch.ones(2).to_sparse(), "b": torch.ones(1)}, "'a' is .* layout torch.sparse_coo"),
    ],
)
def test_another_update_is_refused(update: dict[str, Tensor], said: str):
    with pytest.raises(InvalidArgument, match=f"FlatMask: .*{said}"):
        FlatMask({"a": torch.tensor([True, False]), "b": torch.tensor([True])})(update)


def test_views_share_memory():
    given_ = {"a": torch.tensor([True, False])}
    mask = FlatMask(given_)
    assert mask.view()["a"].data_ptr() == mask.bytes()["a"].data_ptr() == mask["a"].data_ptr() == given_["a"].data_ptr()
    assert (mask.view()["a"].dtype, mask.bytes()["a"].dtype) == (torch.bool, torch.uint8)


def test_it_is_a_mapping_that_is_equal_to_itself_alone():
    a, b = (FlatMask({"a": torch.tensor([True, False])}) for _ in range(2))
    assert (list(a), len(a), "a" in a, a == b, len({a, b})) == (["a"], 1, True, False, 2)
    assert repr(a) == "FlatMask(1 of 2 coordinates flat)"


def test_shares_per_layer():
    """Counting."""
    mask = FlatMask({"a": torch.tensor([True, False]), "b": torch.ones(0, 2).bool(), "c": torch.ones(3).bool()})
    assert [(row.name, row.numel, row.flat) for row in mask.layers] == [("a", 2, 1), ("b", 0, 0), ("c", 3, 3)]
    assert (mask.layers[0].flat_fraction, mask.flat_fraction) == (0.5, 0.8)
    assert math.isnan(mask.layers[1].flat_fraction)


def test_turnover_is_the_share_that_changed():
    """Counting: 1 of 5; and a mask against its inverse is 1."""
    a = FlatMask({"a": torch.tensor([True, False]), "b": torch.ones(3).bool()})
    b = FlatMask({"b": torch.ones(3).bool(), "a": torch.tensor([True, True])})
    assert (a.turnover(b), b.turnover(a), a.turnover(a), a.turnover(a.inverted())) == (0.2, 0.2, 0.0, 1.0)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"a": torch.ones(2).bool()}, "'b' is in the first and not in the second"),
        (
            {"a": torch.ones(3).bool(), "b": torch.ones(1).bool()},
            r"'a' has shape \(2,\) in the first and \(3,\) in the second",
        ),
        ({"a": torch.ones(2).bool(), "b": torch.ones(1).bool(), "c": torch.ones(1).bool()}, "'c' is in the second"),
    ],
)
def test_masks_of_other_models_are_refused(other: dict[str, Tensor], said: str):
    mask = FlatMask({"a": torch.ones(2).bool(), "b": torch.ones(1).bool()})
    with pytest.raises(InvalidArgument, match=f"FlatMask.turnover: {said}"):
        mask.turnover(FlatMask(other))


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ({"a": torch.ones(2)}, "the mask 'a' has dtype torch.float32"),
        ({"a": torch.tensor([0, 2], dtype=torch.uint8)}, "the mask 'a' has an entry 2"),
        ({}, "there is no coordinate"),
    ],
)
def test_what_is_no_mask_is_refused(masks: dict[str, Tensor], said: str):
    with pytest.raises(InvalidArgument, match=f"FlatMask: {said}"):
        FlatMask(masks)


def test_inverting_twice_is_the_mask():
    mask = FlatMask.from_diagonal(diagonal(2), FlatRule(0.3))
    inverse = mask.inverted()
    assert (inverse.rule, inverse.threshold, inverse.origin) == (None, None, "inverted: a mask")
    assert inverse.flat_fraction == 1 - mask.flat_fraction
    assert same(inverse.inverted(), mask)
    named = FlatMask.random(diagonal(2), FlatRule(0.3), 5)
    assert named.inverted().origin == "inverted: random, seed 5"
    assert named.inverted().inverted().origin == named.origin


def test_random_masks_have_the_size_of_the_rule():
    """Counting: for each scope; zeros of the diagonal stay sharp where the rule says so; the seed is said, and decides."""
    h, before = diagonal(4), torch.get_rng_state()
    for rule in (
        FlatRule(0.6),
        FlatRule(0.6, scope="tensor"),
        FlatRule(0.6, scope="group"),
        FlatRule(0.5, zero_curvature="sharp"),
    ):
        groups = GROUPS if rule.scope == "group" else None
        drawn = FlatMask.random(h, rule, 3, groups=groups)
        wanted = FlatMask.from_diagonal(h, rule, groups=groups)
        assert drawn.flat_fraction == wanted.flat_fraction
        assert rule.scope != "tensor" or drawn.layers == wanted.layers
        assert same(drawn, FlatMask.random(h, rule, 3, groups=groups))
        assert not same(drawn, FlatMask.random(h, rule, 4, groups=groups))
        if rule.zero_curvature == "sharp":
            assert not any(bool((mask & (h[name] == 0)).any()) for name, mask in drawn.view().items())
    assert (drawn.origin, drawn.rule, drawn.threshold) == ("random, seed 3", rule, None)
    assert torch.equal(torch.get_rng_state(), before)
    estimate = DiagonalEstimate(h, None, "hessian", "Exact()", Cost(1.0, 0.0))
    assert same(FlatMask.random(estimate, FlatRule(0.6), 3), FlatMask.random(h, FlatRule(0.6), 3))
    assert "seed " in FlatMask.random(h, FlatRule(0.6)).origin


def test_random_masks_are_uniform():
    """Statistics. Each of 200 coordinates is flat in 400 draws 120 times, sd 9.2: |z| < 4.5 in all but for p = 1e-3 once in a seed."""
    like = {"a": torch.zeros(150), "b": torch.zeros(50)}
    times = torch.zeros(200)
    for seed in range(400):
        drawn = FlatMask.random(like, FlatRule(0.3), seed)
        times += torch.cat([drawn["a"], drawn["b"]])
    assert ((times - 120) / (400 * 0.3 * 0.7) ** 0.5).abs().max() < 4.5


def test_a_random_mask_of_touched_coordinates_needs_the_diagonal():
    with pytest.raises(
        InvalidArgument, match="FlatMask.random: 'a' is of torch.uint8, and zero_curvature='sharp' needs the diagonal"
    ):
        FlatMask.random(FlatMask({"a": torch.ones(2).bool()}), FlatRule(0.5, zero_curvature="sharp"), 0)


def test_files_give_back_what_they_were_given(tmp_path: Path):
    h = diagonal(5)
    masks = {
        "exact": FlatMask.from_diagonal(h, FlatRule(0.6, zero_curvature="sharp")),
        "all": FlatMask.from_diagonal(h, FlatRule(1.0)),
        "random: 1": FlatMask.random(h, FlatRule(0.6, scope="tensor"), 1),
        "inverted": FlatMask.from_diagonal(h, FlatRule(0.6)).inverted(),
    }
    assert masks["all"].threshold == math.inf
    found = load_masks(save_masks(tmp_path / "m.safetensors", masks, record={"seed": 1}))
    for name, mask in masks.items():
        again = found[name]
        assert same(again, mask)
        assert (again.rule, again.threshold, again.origin) == (mask.rule, mask.threshold, mask.origin)
        assert again.digest == mask.digest
    assert len({mask.digest for mask in masks.values()}) == 4
    assert same(FlatMask.load(masks["exact"].save(tmp_path / "one.safetensors")), masks["exact"])
    large = FlatMask.random({"w": torch.zeros(800_000)}, FlatRule(0.5), 0)
    assert large.save(tmp_path / "large.safetensors").stat().st_size < 101_000  # one bit per coordinate


def test_files_with_several_masks_or_none_are_said(tmp_path: Path):
    mask = FlatMask({"a": torch.ones(2).bool()})
    path = save_masks(tmp_path / "m.safetensors", {"first": mask, "second": mask})
    with pytest.raises(
        InvalidArgument, match=r"has 2 masks \(first, second\), and one is wanted. Take it from `load_masks"
    ):
        FlatMask.load(path)
    with pytest.raises(InvalidArgument, match="save_masks: no mask was given for .*; a file has one or more"):
        save_masks(path, {})


def test_damaged_files_are_refused(tmp_path: Path):
    """Cut short, one bit changed in the coordinates, another format, another file, none."""
    path = FlatMask.random({"w": torch.zeros(1000)}, FlatRule(0.5), 0).save(tmp_path / "m.safetensors")
    whole = path.read_bytes()
    with safe_open(str(path), "pt") as file:
        metadata, bits_ = file.metadata(), file.get_tensor("0:w")

    def refused(said: str) -> None:
        with pytest.raises(InvalidArgument, match=f"m.safetensors: cannot be read as masks .*{said}.*Write them anew"):
            load_masks(path)

    path.write_bytes(whole[:-10])
    refused("")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("it is damaged: the mask 'mask' is not the one that was written")
    path.write_bytes(b"PK" + whole)
    refused("")
    path.unlink()
    refused("")
    save_file({"0:w": bits_}, path, metadata=metadata | {"format": "curvkit.diagonal/1"})
    refused("it is no curvkit.masks/1 file, as `FlatMask.save` writes")
    save_file({"0:w": bits_[1:]}, path, metadata=metadata)
    refused(r"are not the bits of shape \(1000,\)")
    save_file({"1:w": bits_}, path, metadata=metadata)
    refused("")
    save_file({"0:w": bits_}, path, metadata=metadata | {"masks": "[1]"})
    refused("")


def test_nan_is_refused_by_name_whatever_is_flat():
    h = {"a": torch.ones(2), "b": torch.tensor([[1.0, math.nan]])}
    for rule in (
        FlatRule(0.0),
        FlatRule(0.5),
        FlatRule(1.0),
        FlatRule(0.5, "tensor"),
        FlatRule(0.5, zero_curvature="sharp"),
    ):
        with pytest.raises(InvalidArgument, match=r"'b' is NaN at index \[0, 1\]"):
            FlatMask.from_diagonal(h, rule)


@pytest.mark.parametrize("gamma", [-0.01, 1.01, 60, math.nan, math.inf, "0.6", None, True])
def test_gamma_is_a_share(gamma: Any):
    with pytest.raises(
        InvalidArgument, match=r"FlatRule: gamma=.* must be a number in \[0, 1\].*gamma = 1 - rank"
    ) as caught:
        FlatRule(gamma)
    assert repr(gamma) in str(caught.value)


@pytest.mark.parametrize(
    ("option", "allowed"), [("scope", "'global', 'group', 'tensor'"), ("zero_curvature", "'flat', 'sharp'")]
)
def test_choices_are_named(option: str, allowed: str):
    with pytest.raises(InvalidArgument, match=f"FlatRule: {option}='layer' must be one of {allowed}. Pass for example"):
        FlatRule(0.5, **{option: "layer"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scope", "groups", "said"),
    [
        ("group", None, "scope='group' needs groups, and none were given"),
        ("global", {"a": "x"}, "groups were given, and scope='global' does not use them"),
        ("group", {"a": "x"}, "'b' has no group. Each of the 2 parameters needs one"),
        ("group", {"a": "x", "b": "x", "c": "x"}, "'c' has a group and is no parameter of the diagonal"),
    ],
)
def test_groups_belong_to_the_parameters(scope: Any, groups: dict[str, str] | None, said: str):
    with pytest.raises(InvalidArgument, match=f"FlatRule: {said}"):
        FlatMask.from_diagonal({"a": torch.ones(1), "b": torch.ones(1)}, FlatRule(0.5, scope), groups=groups)


def test_what_is_no_diagonal_or_no_rule_is_refused():
    with pytest.raises(
        InvalidArgument, match="FlatMask: Tensor is no DiagonalEstimate and no mapping of tensors by name"
    ):
        FlatMask.from_diagonal(torch.ones(2), FlatRule(0.5))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="FlatMask: rule=0.6 is no FlatRule, which says what flat means"):
        FlatMask.from_diagonal({"a": torch.ones(2)}, 0.6)  # type: ignore[arg-type]
