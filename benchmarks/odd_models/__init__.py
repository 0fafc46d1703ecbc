"""Random small models for `benchmarks.any_model`: ordinary parts, and what is odd in them."""

from benchmarks.odd_models.specimen import Specimen, specimen

__all__ = ["Specimen", "specimen"]
