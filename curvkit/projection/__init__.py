"""Which directions are flat: masks over coordinates, complements of eigenspaces, and how far they agree."""

from curvkit.projection.agreeing_diagonals import DiagonalAgreement, diagonal_agreement
from curvkit.projection.agreeing_masks import MaskAgreement, mask_agreement
from curvkit.projection.chance import AgainstChance
from curvkit.projection.flat_directions import ComplementOf, MaskOf, directions
from curvkit.projection.flat_mask import FlatMask, FlatShare
from curvkit.projection.flat_rule import FlatRule
from curvkit.projection.intersection import Intersection
from curvkit.projection.named_masks import load_masks, save_masks
from curvkit.projection.noise import NoiseFloor, noise_floor
from curvkit.projection.projected_operator import Projected
from curvkit.projection.protocol import FlatDirections, Projection
from curvkit.projection.sharp_complement import Eigenspace, SharpComplement
from curvkit.projection.sharp_mass import MaskSubspaceOverlap, mask_subspace_overlap
from curvkit.projection.subspaces import SubspaceOverlap, subspace_overlap

__all__ = [
    "AgainstChance",
    "ComplementOf",
    "DiagonalAgreement",
    "Eigenspace",
    "FlatDirections",
    "FlatMask",
    "FlatRule",
    "FlatShare",
    "Intersection",
    "MaskAgreement",
    "MaskOf",
    "MaskSubspaceOverlap",
    "NoiseFloor",
    "Projected",
    "Projection",
    "SharpComplement",
    "SubspaceOverlap",
    "diagonal_agreement",
    "directions",
    "load_masks",
    "mask_agreement",
    "mask_subspace_overlap",
    "noise_floor",
    "save_masks",
    "subspace_overlap",
]
