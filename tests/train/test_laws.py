"""Law 4: every training method, on drawn and on awkward weights."""

import pytest
import torch

from dither.core import SpecError
from dither.testing import awkward_weights, check_surrogate
from dither.train.method import METHODS, Method
from tests.train.layers import EXAMPLES

SPECS = [spec for specs in EXAMPLES.values() for spec in specs]


def test_every_method_has_an_example() -> None:
    ours = {name for name, kind in METHODS.items() if kind.__module__.startswith("dither.")}
    assert {name for name in ours if not EXAMPLES.get(name)} == set(), (
        "give the method a line in `makers` of tests/train/layers.py"
    )


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_law_4_on_awkward_weights(spec: Method) -> None:
    taken = set()
    for dtype in (torch.float32, torch.bfloat16):
        for name, weight in awkward_weights(dtype).items():
            try:
                check_surrogate(spec, weight)
            except SpecError:
                continue
            taken.add(name)
    assert {"odd sizes", "kernel", "zeros", "constant", "outlier"} <= taken
