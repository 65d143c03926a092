"""Projections on an eigenspace and its complement against dense matrices, and what they refuse."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES
from oracles import normal, relative
from projections import HandMask, orthonormal, pairs_of, space_of
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.estimators import Lanczos
from curvkit.operators import Hessian
from curvkit.parameters import ParameterSpace
from curvkit.projection.intersection import Intersection
from curvkit.projection.protocol import Projection
from curvkit.projection.sharp_complement import Eigenspace, SharpComplement
from curvkit.testing import check_projection

EXACT = 1e-13
"""float64 rounding, 2.2e-16, over sums of some tens of terms."""
SHAPES: dict[str, tuple[int, ...]] = {"weight": (4, 5), "scale": (), "none": (0, 3), "bias": (7,)}
SPACE = space_of(**SHAPES)


def update(space: ParameterSpace = SPACE, dtype: torch.dtype = torch.float64, seed: int = 3) -> dict[str, Tensor]:
    return space.unflatten(normal(space.n, seed=seed).to(dtype))


@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [
        (torch.float64, EXACT),
        (torch.float32, 1e-6),  # ten eps
        (torch.float16, 1e-3),  # eps / 2 for each entry of the result, and eps / 2 for the update
        (torch.bfloat16, 8e-3),
    ],
)
def test_both_parts_are_those_of_the_dense_projector(dtype: torch.dtype, allowed: float):
    """Dense: I - V V' in float64, applied to the update as it is in its dtype."""
    V = orthonormal(SPACE.n, 3)
    flat, u = SharpComplement(pairs_of(V, SPACE)), update(dtype=dtype)
    kept, taken = flat(u), flat.sharp(u)
    truth = SPACE.flatten(u).double()
    assert relative(SPACE.flatten(kept).double(), truth - V @ (V.T @ truth)) <= allowed
    assert relative(SPACE.flatten(taken).double(), V @ (V.T @ truth)) <= allowed
    assert relative(SPACE.flatten(kept).double() + SPACE.flatten(taken).double(), truth) <= allowed
    for projection in (flat, flat.sharp):
        assert isinstance(projection, Projection)
        check_projection(projection, u)


def test_tensors_keep_their_own_dtype_layout_and_order():
    V = orthonormal(SPACE.n, 2)
    u = update()
    mixed = {
        "bias": u["bias"].bfloat16(),
        "weight": u["weight"].T.contiguous().T,
        "none": u["none"],
        "scale": u["scale"].float(),
    }
    before = {name: tensor.clone() for name, tensor in mixed.items()}
    kept = SharpComplement(pairs_of(V.float(), SPACE))(mixed)
    assert list(kept) == list(mixed)
    assert [tensor.dtype for tensor in kept.values()] == [tensor.dtype for tensor in mixed.values()]
    assert all(torch.equal(mixed[name], before[name]) for name in mixed)
    flat = torch.cat([mixed[name].double().reshape(-1) for name in SPACE.names])
    got = torch.cat([kept[name].double().reshape(-1) for name in SPACE.names])
    assert relative(got, flat - V @ (V.T @ flat)) <= 8e-3  # the bias is rounded to bfloat16, the rest to 1e-7
    assert torch.allclose(got[:20], (flat - V @ (V.T @ flat))[:20], atol=1e-6)


def test_projecting_twice_is_projecting_once_also_where_vectors_are_rounded():
    """Law, in float64, with vectors of float32 that are orthonormal to 1e-7 alone: V V' would leave that."""
    V = orthonormal(SPACE.n, 4).float()
    assert (V.double().T @ V.double() - torch.eye(4)).abs().max() > 1e-9
    flat, u = SharpComplement(pairs_of(V, SPACE)), update()
    once = SPACE.flatten(flat(u))
    assert relative(SPACE.flatten(flat(flat(u))), once) <= EXACT
    assert (V.double().T @ once).abs().max() <= EXACT
    check_projection(flat, u)


def test_many_runs_are_one_sum():
    """Tensors longer than a run of 65,536, in float32 against float64 matrix products."""
    space = space_of(a=(3, 50_001), b=(70_000,))
    V = orthonormal(space.n, 3).float()
    flat, u = SharpComplement(pairs_of(V.T.contiguous().T, space)), update(space, torch.float32)
    full = space.flatten(u).double()
    truth = full - V.double() @ (V.double().T @ full)
    assert relative(space.flatten(flat(u)).double(), truth) <= 1e-7  # one rounding of each entry


def test_arithmetic_is_float32_where_all_is_coarser():
    """Vectors and update in bfloat16, against float64 from the same rounded numbers: the result is rounded once, to eps / 2 = 4e-3."""
    space = space_of(a=(20_000,))
    V = orthonormal(space.n, 2).bfloat16()
    u = update(space, torch.bfloat16)
    full, exact = space.flatten(u).double(), V.double()
    truth = exact @ torch.linalg.solve(exact.T @ exact, exact.T @ full)
    sharp = SharpComplement(pairs_of(V, space)).sharp
    assert relative(space.flatten(sharp(u)).double(), truth) <= 4e-3


def test_every_direction_may_be_sharp():
    V = orthonormal(SPACE.n, SPACE.n)
    flat, u = SharpComplement(pairs_of(V, SPACE)), update()
    assert SPACE.flatten(flat(u)).abs().max() <= EXACT
    assert relative(SPACE.flatten(flat.sharp(u)), SPACE.flatten(u)) <= EXACT
    assert flat.flat_fraction == 0.0


def test_an_update_with_a_graph_gives_one_without():
    u = {name: tensor.clone().requires_grad_() for name, tensor in update().items()}
    kept = SharpComplement(pairs_of(orthonormal(SPACE.n, 2), SPACE))(u)
    assert not any(tensor.requires_grad for tensor in kept.values())


def test_the_complement_of_a_search_is_that_of_the_dense_eigenvectors():
    """Dense `eigh` of the Hessian; the residuals of the search are 1e-8 relative, the gaps of these eigenvalues above 1e-2."""
    objective = CASES["mlp"]().objective()
    H = Hessian(objective)
    values, vectors = torch.linalg.eigh(H.matmat(torch.eye(H.n, dtype=torch.float64)))
    order = values.abs().argsort(descending=True)
    V = vectors[:, order[:3]]
    assert values[order[2]].abs() - values[order[3]].abs() > 1e-2 * values.abs().max()
    flat = SharpComplement(Lanczos(rank=3, tolerance=1e-8).eigenpairs(objective, seed=0))
    u = normal(H.n, seed=1)
    assert relative(H.space.flatten(flat(H.space.unflatten(u))), u - V @ (V.T @ u)) <= 1e-5
    assert flat.notes == ()
    assert flat.rank == 3
    assert flat.flat_fraction == 1 - 3 / H.n
    check_projection(flat, H.space.unflatten(u))


def test_what_did_not_converge_is_said():
    pairs = pairs_of(orthonormal(SPACE.n, 3), SPACE, good=2, asked=5)
    flat = SharpComplement(pairs)
    assert flat.notes == ("3 of 5 eigenvectors were found", "1 of 3 eigenvectors have not converged to 0.001")
    assert flat.sharp.notes == flat.notes
    assert repr(flat) == "SharpComplement(3 eigenvectors, 2 converged, of 28 coordinates)"
    assert repr(flat.sharp) == "Eigenspace(3 eigenvectors, 2 converged, of 28 coordinates)"


# ---- refusals -------------------------------------------------------------------------------------------------------


def skewed(off: float) -> Tensor:
    V = orthonormal(SPACE.n, 2)
    return torch.stack([V[:, 0], (V[:, 1] + off * V[:, 0]) / (1 + off**2) ** 0.5], dim=1)


GOOD = pairs_of(orthonormal(SPACE.n, 2), SPACE)


@pytest.mark.parametrize("kind", [Eigenspace, SharpComplement])
@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (SPACE, "eigenpairs=ParameterSpace are no Eigenpairs. Pass those of Lanczos(rank)"),
        (replace(GOOD, vectors=None), "the eigenpairs have no vectors;"),
        (replace(GOOD, space=None), "the eigenpairs have no space;"),
        (
            replace(GOOD, space=space_of(w=(5,))),
            "shape (28, 2); they must be real floating-point numbers of shape [5, k]",
        ),
        (replace(GOOD, vectors=torch.zeros(SPACE.n, 0)), "of shape (28, 0); they must be"),
        (replace(GOOD, vectors=torch.ones(SPACE.n, 1).long()), "are a torch.int64 tensor"),
        (pairs_of(2 * orthonormal(SPACE.n, 2), SPACE), "not orthonormal: V'V differs from the identity by 3 "),
        (pairs_of(skewed(2e-3), SPACE), "not orthonormal: V'V differs from the identity by 0.002 "),
        (pairs_of(skewed(float("nan")), SPACE), "differs from the identity by nan (nan: they are not finite)"),
    ],
)
def test_what_is_no_eigenspace_is_refused(kind: type[Eigenspace], pairs: Any, said: str):
    with pytest.raises(InvalidArgument, match=f"^{kind.__name__}: .*" + re.escape(said)):
        kind(pairs)


def test_rounding_of_a_search_is_taken():
    SharpComplement(pairs_of(skewed(5e-4), SPACE))
    SharpComplement(pairs_of(orthonormal(SPACE.n, 3).float(), SPACE))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bias": None}, "the update lacks ['bias'] and has [] beside; it must have the 4 names"),
        ({"other": torch.zeros(2)}, "the update lacks [] and has ['other'] beside"),
        ({"bias": torch.zeros(7, 1)}, "'bias' has shape (7, 1) in the update, its parameter (7,)."),
        ({"bias": torch.zeros(7).long()}, "'bias' is of torch.int64 and layout torch.strided"),
        ({"bias": torch.zeros(7).cfloat()}, "'bias' is of torch.complex64"),
        ({"bias": torch.zeros(7).to_sparse()}, "'bias' is of torch.float32 and layout torch.sparse_coo"),
    ],
)
def test_an_update_that_does_not_fit_is_refused(changes: dict[str, Any], said: str):
    wrong = {name: tensor for name, tensor in {**update(), **changes}.items() if tensor is not None}
    for projection in (SharpComplement(GOOD), SharpComplement(GOOD).sharp):
        with pytest.raises(InvalidArgument, match=re.escape(said)):
            projection(wrong)


# ---- two in turn ----------------------------------------------------------------------------------------------------


def mask(share: float = 0.5, seed: int = 7) -> HandMask:
    return HandMask(SPACE, normal(SPACE.n, seed=seed) < share)


def test_two_masks_keep_what_both_keep():
    one, other, u = mask(), mask(seed=8), update()
    both = Intersection(one, other, like=u)
    truth = torch.where(SPACE.flatten(one.keep) & SPACE.flatten(other.keep), SPACE.flatten(u), 0.0)
    assert torch.equal(SPACE.flatten(both(u)), truth)
    check_projection(both, u)


def test_a_mask_and_a_complement_do_not_commute_in_general():
    """Planted: the eigenvectors have entries inside and outside of the mask; that one after the other is no projection is seen, too."""
    one, flat, u = mask(), SharpComplement(GOOD), update()
    twice = flat(one(flat(one(u))))
    assert relative(SPACE.flatten(twice), SPACE.flatten(flat(one(u)))) > 1e-3
    for first, second in ((one, flat), (flat, one), (flat.sharp, one)):
        with pytest.raises(
            InvalidArgument, match=r"^Intersection: \w+ and \w+ do not commute: .* two orders differ by"
        ):
            Intersection(first, second, like=u)


def test_a_mask_and_a_complement_within_it_commute():
    """Dense: with eigenvectors within the mask, the product of both is diag(keep) - V V'."""
    one, u = mask(), update()
    keep = SPACE.flatten(one.keep)
    V = torch.zeros(SPACE.n, 2, dtype=torch.float64)
    V[keep] = orthonormal(int(keep.sum()), 2)
    both = Intersection(one, SharpComplement(pairs_of(V, SPACE)), like=update(dtype=torch.bfloat16))
    truth = (torch.diag(keep.double()) - V @ V.T) @ SPACE.flatten(u)
    assert relative(SPACE.flatten(both(u)), truth) <= EXACT
    check_projection(both, u)


def test_a_small_tilt_is_seen_by_the_eigenvectors():
    """A mask that takes 1e-4 out of one eigenvector of 40,000 coordinates: random updates hardly meet it, the eigenvector does."""
    space = space_of(w=(40_000,))
    V = orthonormal(space.n, 1)
    V[0] = 0.0
    V = V / V.norm()
    V[0] = 1e-4
    keep = torch.arange(space.n) > 0
    like = {"w": torch.zeros(space.n, dtype=torch.bfloat16)}  # it is tried in float32
    one, flat = HandMask(space, keep), SharpComplement(pairs_of(V, space))
    with pytest.raises(InvalidArgument, match="an update of length 200 the two orders differ by 0.02"):
        Intersection(one, flat, like=like)
    V[0] = 0.0
    Intersection(one, SharpComplement(pairs_of(V, space)), like=like)
