"""Arrays of codes of many kinds, for hypothesis and for fixed tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Codes = NDArray[np.int64]

ALPHABETS = (1, 2, 3, 5, 16, 60, 255, 256, 257, 1000, 4097, 32768, 32769, 60000, 65537, 1 << 24)

KINDS = ("uniform", "peaked", "outliers", "constant", "rows", "few", "bimodal", "sparse")


def sample(kind: str, shape: tuple[int, ...], alphabet: int, seed: int) -> Codes:
    """Codes of one kind; the same for the same arguments."""
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        return rng.integers(0, alphabet, shape)
    if kind == "constant":
        return np.full(shape, alphabet // 2)
    if kind == "few":
        return rng.integers(0, alphabet, 5)[rng.integers(0, 5, shape)]
    if kind == "sparse":
        return np.where(rng.random(shape) < 0.9, alphabet // 3, rng.integers(0, alphabet, shape))
    scale = min(alphabet / 8, 3.0)
    values = rng.laplace(size=shape) * scale
    if kind == "rows" and len(shape) > 1:
        values *= np.exp(rng.normal(size=(shape[0],) + (1,) * (len(shape) - 1)))
        values *= np.exp(0.5 * rng.normal(size=(1,) * (len(shape) - 1) + (shape[-1],)))
    if kind == "bimodal":
        values += np.where(rng.random(shape) < 0.5, -alphabet / 4, alphabet / 4)
    codes = np.clip(np.rint(values + alphabet // 2), 0, alphabet - 1).astype(np.int64)
    if kind == "outliers":
        far = rng.random(shape) < 0.003
        codes = np.where(far, rng.integers(0, alphabet, shape), codes)
    return codes


@st.composite
def arrays(draw: st.DrawFn, most: int = 3000) -> tuple[Codes, int]:
    """Codes and their alphabet."""
    alphabet = draw(st.sampled_from(ALPHABETS) | st.integers(1, 1 << 24))
    shape = draw(
        st.tuples(st.integers(0, most))
        | st.tuples(st.integers(0, 60), st.integers(0, most // 60))
        | st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3))
        | st.just(())
    )
    kind = draw(st.sampled_from(KINDS))
    return sample(kind, shape, alphabet, draw(st.integers(0, 2**32 - 1))), alphabet


def entropy_nbytes(codes: Codes) -> float:
    """Empirical entropy of the codes, in bytes."""
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(counts.sum() / counts)).sum()) / 8
