"""Which table codes which symbol, whatever the shape is cut into."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dither.coding import contexts
from dither.coding.contexts import Contexts

SHAPES = [(5,), (300,), (6, 7), (2, 100), (100, 2), (3, 2, 4, 3), (2, 1, 3), (4, 0), (0, 4)]


@given(st.sampled_from(SHAPES), st.integers(0, 1 << 20), st.integers(0, 30), st.integers(2, 16))
def test_tables_are_clipped_sums_of_classes(
    shape: tuple[int, ...], seed: int, offset: int, tables: int
) -> None:
    draw = np.random.default_rng(seed)
    classes = {
        axis: draw.integers(0, 16, length).astype(np.uint8)
        for axis, length in enumerate(shape)
        if draw.random() < 0.7
    }
    sums = [sum(int(c[i[a]]) for a, c in classes.items()) for i in product(*map(range, shape))]
    expected = [min(max(total - offset, 0), tables - 1) for total in sums]
    for run, most in ((1, 1 << 20), (64, 1 << 20), (64, 5), (7, 200)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(contexts, "_RUN", run)
            patch.setattr(contexts, "_MOST", most)
            found = Contexts(classes, offset, tables).of(shape)
        assert found.dtype == np.uint8
        assert found.tolist() == expected
