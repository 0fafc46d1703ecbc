"""The ways in which a tensor could be stored: one file for each proposer."""

from dither.search.knowledge import Proposer
from dither.search.proposers.grid import Grid
from dither.search.proposers.rotated_grid import RotatedGrid
from dither.search.proposers.sparse_products import SparseProducts
from dither.search.proposers.stored import Stored
from dither.search.proposers.trellis_grid import TrellisGrid

PROPOSERS: tuple[Proposer, ...] = (Stored(), Grid(), RotatedGrid())
"""Asked for every tensor, unless its :class:`~dither.search.Knowledge` names others."""

__all__ = ["PROPOSERS", "Grid", "RotatedGrid", "SparseProducts", "Stored", "TrellisGrid"]
