"""How numbers are rebuilt from codes: one frozen dataclass for each format.

Names and versions are permanent, because files carry them; a file resolves them in the closed
table :data:`FORMATS` and nowhere else. The name ``sparse`` is reserved.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dither.core import Format, SpecError
from dither.formats.affine import Affine
from dither.formats.codebook import Codebook
from dither.formats.factors import Factors
from dither.formats.mixed import Mixed
from dither.formats.product import Product
from dither.formats.raw import Raw
from dither.formats.trellis import Trellis

__all__ = [
    "FORMATS",
    "Affine",
    "Codebook",
    "Factors",
    "Mixed",
    "Product",
    "Raw",
    "Trellis",
    "format_from_json",
    "format_to_json",
]

FORMATS: Mapping[str, type[Format]] = MappingProxyType(
    {kind.name: kind for kind in (Raw, Affine, Codebook, Product, Mixed, Trellis, Factors)}
)
"""Every format a file may name."""


def format_to_json(fmt: Format) -> dict[str, Any]:
    """A format as JSON values: its name, version and the settings that are not defaults.

    >>> format_to_json(Affine(4, group=64))
    {'format': 'affine', 'version': 1, 'bits': 4, 'group': 64}
    """
    return {"format": fmt.name, "version": fmt.version, **fmt.to_json()}


def format_from_json(values: Mapping[str, Any]) -> Format:
    """The inverse of :func:`format_to_json`.

    Raises:
        SpecError: an unknown name, version or setting.

    >>> format_from_json({"format": "affine", "version": 1, "bits": 4}) == Affine(4)
    True
    """
    settings = dict(values)
    name, version = settings.pop("format", None), settings.pop("version", None)
    kind = FORMATS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise SpecError(
            f"there is no format {name!r}; known are {', '.join(FORMATS)}. "
            "A newer release of dither may know it"
        )
    if type(version) is not int or version != kind.version:
        raise SpecError(
            f"format {name!r} has version {kind.version} here, not {version!r}; "
            "a newer release of dither may read it"
        )
    return kind.from_json(settings)
