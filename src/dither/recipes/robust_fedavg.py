"""Quantization-robust federated averaging (Gupta et al., TMLR 2023, arXiv 2206.10844).

Clients train so that the server's one model bears rounding at any width. Their objective is a
recipe for each round's model; the averaging itself is plain FedAvg, in Flower with
:mod:`dither.integrations.flower`.
"""

from __future__ import annotations

from torch import Tensor, nn

from dither.core import SpecError
from dither.formats import Affine
from dither.recipes.recipe import Recipe
from dither.train.any_width import APQN, FLOAT, MQAT
from dither.train.method import Method
from dither.train.penalties import Kurtosis
from dither.train.plan import Plan
from dither.train.straight_through import StraightThrough

OBJECTIVES = ("mqat", "apqn", "kure", "qat", "plain")
WIDTHS = (2, 3, 4, 5, 6, 7, 8, FLOAT)
KURE_WEIGHT = 1.0


def recipe(
    model: nn.Module,
    objective: str = "mqat",
    *,
    widths: tuple[int, ...] = WIDTHS,
    bits: int = 4,
    seed: int = 0,
) -> Recipe:
    """A client's objective for one round, for all its matrices and convolutions.

    Args:
        model: the client's copy of the round's model.
        objective: ``"mqat"`` rounds at a width drawn for each step, ``"apqn"`` adds noise of that
            width's variance, ``"kure"`` draws the kurtosis of weights towards 1.8, ``"qat"`` rounds
            at fixed ``bits``, ``"plain"`` is FedAvg.
        widths: that are drawn; 32 is no rounding.
        bits: of ``"qat"``.
        seed: of widths; different for each client and round.

    Raises:
        SpecError: an unknown objective, or nothing to round.
    """
    methods: dict[str, Method | Affine] = {
        "mqat": MQAT(widths, seed=seed),
        "apqn": APQN(widths, seed=seed),
        "kure": Affine(8),
        "qat": StraightThrough(Affine(bits)),
        "plain": Affine(8),
    }
    if objective not in OBJECTIVES:
        raise SpecError(f"objectives are {', '.join(OBJECTIVES)}, not {objective!r}")
    named = {name: methods[objective] for name, _ in _weights(model)}
    if not named:
        raise SpecError("the model has no matrices or convolutions to round")
    return Recipe(Plan(named), (Kurtosis(KURE_WEIGHT),) if objective == "kure" else ())


def rounded(model: nn.Module, bits: int) -> dict[str, Tensor]:
    """The model's state with its matrices and convolutions on the grids of training; 32: as it is.

    Args:
        model: of the server.
        bits: of each weight.
    """
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, weight in () if bits == FLOAT else _weights(model):
        state[name] = Affine(bits).encode(weight.detach()).decode()
    return state


def _weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in model.named_parameters() if value.ndim > 1]
