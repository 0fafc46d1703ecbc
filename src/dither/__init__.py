"""Name the bytes, keep the model: compress neural networks to a byte budget."""

from dither.archive import Archive, Loaded, load, load_into, verify
from dither.core import (
    ArchiveError,
    BudgetError,
    CheckpointError,
    DitherError,
    Encoded,
    Encoder,
    Format,
    SpecError,
    Stats,
)
from dither.formats import Affine, Codebook, Mixed, Product, Raw
from dither.search import compress

__version__ = "0.1.0"

open = Archive.open

__all__ = [
    "Affine",
    "Archive",
    "ArchiveError",
    "BudgetError",
    "CheckpointError",
    "Codebook",
    "DitherError",
    "Encoded",
    "Encoder",
    "Format",
    "Loaded",
    "Mixed",
    "Product",
    "Raw",
    "SpecError",
    "Stats",
    "compress",
    "load",
    "load_into",
    "open",
    "verify",
]
