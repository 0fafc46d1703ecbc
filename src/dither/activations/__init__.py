"""Activations and gradients on integer grids: where, and with which ranges."""

from dither.activations.encodings import Encoding, Encodings
from dither.activations.gradients import GradientQuantizer
from dither.activations.layer_inputs import inputs_of_layers
from dither.activations.observe import (
    apply,
    begin,
    encodings_of,
    functions,
    observe,
    remove,
    step,
)
from dither.activations.quantizer import Quantizer
from dither.activations.site_spec import Activation, Gradient, site_from_json
from dither.activations.sites import Site, placed, resolve

__all__ = [
    "Activation",
    "Encoding",
    "Encodings",
    "Gradient",
    "GradientQuantizer",
    "Quantizer",
    "Site",
    "apply",
    "begin",
    "encodings_of",
    "functions",
    "inputs_of_layers",
    "observe",
    "placed",
    "remove",
    "resolve",
    "site_from_json",
    "step",
]
