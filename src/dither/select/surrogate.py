"""Gaussian processes of scikit-learn, which fits what their kernels leave open."""

from __future__ import annotations

import importlib
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from dither.core import DitherError


@dataclass(frozen=True)
class Fitted:
    """A kernel whose length and variances were fitted.

    Attributes:
        kernel: ``kernel(a, b)`` is the covariance of rows of ``a`` and ``b``.
        noise: variance of what the kernel does not explain.
    """

    kernel: Any
    noise: float


def fit(
    inputs: np.ndarray, outputs: np.ndarray, smooth: float | None = None, floor: float = 0.0
) -> Fitted:
    """Fit a kernel by the marginal likelihood (Rasmussen and Williams 2006, section 5.4).

    Args:
        inputs: ``(n, features)``, of about unit spread.
        outputs: ``(n,)``, of mean zero.
        smooth: of a Matérn kernel; None for a Gaussian one.
        floor: variance that outputs have at least, though all that were seen are equal.

    Raises:
        DitherError: scikit-learn is not installed.
    """
    process = _module("sklearn.gaussian_process")
    kernels = _module("sklearn.gaussian_process.kernels")
    variance = max(float(outputs.var()), floor, 1e-12)
    if smooth is None:
        shape = kernels.RBF(1.0, (0.05, 50.0))
    else:
        shape = kernels.Matern(1.0, (0.05, 50.0), nu=smooth)
    bounds = (1e-4 * variance, 1e2 * variance)
    signal = kernels.ConstantKernel(0.5 * variance, bounds) * shape
    regressor = process.GaussianProcessRegressor(
        signal + kernels.WhiteKernel(0.5 * variance, bounds), alpha=1e-10
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lengths at their bounds: few points leave them open
        regressor.fit(inputs, outputs)
    return Fitted(regressor.kernel_.k1, float(regressor.kernel_.k2.noise_level))


def expected_improvement(means: np.ndarray, deviations: np.ndarray, best: float) -> np.ndarray:
    """Of normal variables over a value (Jones, Schonlau, Welch 1998), and never nothing."""
    safe = np.maximum(deviations, 1e-12)
    z = (means - best) / safe
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z])
    found: np.ndarray = (means - best) * below + safe * np.exp(-0.5 * z * z) / math.sqrt(
        2 * math.pi
    )
    return found


def check_installed() -> None:
    """Raise DitherError where Gaussian processes cannot be had: before long work, not after it."""
    _module("sklearn.gaussian_process")


def _module(name: str) -> Any:  # noqa: ANN401
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DitherError(
            'Gaussian processes are those of scikit-learn; run: pip install "dither[select]"'
        ) from error
