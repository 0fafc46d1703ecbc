"""Automatic joint pruning and quantization (Tang, Wei and Li 2020, arXiv 2011.06231)."""

from __future__ import annotations

import os
from dataclasses import replace

from torch import nn

from dither.core import SpecError
from dither.search import AJPQ, Aim, Joint, Learning, Space, joint
from dither.search.joint_evaluation import Score

SPACES = {
    "fixed": Space(lowest=1, highest=8, grain=1, groups=1, sparsity=0.8),
    "mixed": Space(lowest=1, highest=8, grain=1, groups=8, sparsity=0.8),
}
"""Whole bits; one width for the kernels of a layer, or one for each eighth of them."""

CONTROLLERS = AJPQ(
    warm_up=20,
    noise=0.5,
    decay=0.99,
    learning=Learning(hidden=300, actor_rate=1e-4, critic_rate=1e-3, memory=2_000, batch=64),
)
"""As in HAQ (Wang et al. 2019), whose search the paper builds on."""


def recipe(
    model: nn.Module,
    size: int | str,
    aim: Score | Aim,
    precision: str = "mixed",
    *,
    evaluations: int = 600,
    seed: int = 0,
    processes: int = 1,
    journal: str | os.PathLike[str] | None = None,
) -> Joint:
    """Search with the paper's space and HAQ's controllers.

    The paper trains a little before each reward, and in full afterwards. Here nothing is trained:
    attach the loaded model to a budget for that.

    Args:
        model: any module.
        size: as for :func:`dither.compress`.
        aim: the score of a model, or more; its space is the recipe's.
        precision: ``"fixed"`` or ``"mixed"``: see :data:`SPACES`.
        evaluations: files; HAQ's searches take 600.
        seed: as for :func:`~dither.search.joint`.
        processes: the same.
        journal: the same.

    Raises:
        SpecError: unknown precision.
    """
    if precision not in SPACES:
        raise SpecError(f"precision is fixed or mixed, not {precision!r}")
    wanted = aim if isinstance(aim, Aim) else Aim(aim)
    return joint(
        model,
        size,
        replace(wanted, space=SPACES[precision]),
        policy=CONTROLLERS,
        evaluations=evaluations,
        seed=seed,
        processes=processes,
        journal=journal,
    )
