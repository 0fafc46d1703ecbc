"""PQK: pruning, quantization, and distillation from itself (Kim et al. 2021, arXiv 2106.14681).

Phase 1 prunes gradually and trains with quantization. In phase 2 the mask stays, and the network
with all its weights, which pruning left unused, teaches the pruned one: no other teacher is needed.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from dither.core import SpecError
from dither.recipes.model_layers import Layer, plan_of
from dither.recipes.recipe import Recipe
from dither.train.lsq import LSQ
from dither.train.own_teacher import FixMasks
from dither.train.pruned import Pruned, Together
from dither.train.sparsity import Gradual


def recipe(
    model: nn.Module,
    bits: int = 4,
    sparsity: float = 0.9,
    *,
    steps: int,
    phase: float = 0.5,
    together: bool = True,
) -> Recipe:
    """Both phases; in the second add :func:`loss` of the teacher to the student's.

    Args:
        model: any module.
        bits: of the weights that stay, 4 and 8 in the paper; steps are learned.
        sparsity: share of zeros at the end, of all matrices and kernels.
        steps: optimizer steps in all.
        phase: share of the steps of phase 1; sparsity is reached after three quarters of it.
        together: whether magnitudes of all layers are ranked together, or each layer's alone.

    Raises:
        SpecError: a phase outside 0 to 1.
    """
    if not 0 < phase < 1:
        raise SpecError(f"phase 1 takes a share of the steps between 0 and 1, not {phase}")
    schedule = Gradual(sparsity, until=0.75 * phase)

    def choose(_: Layer) -> Pruned:
        return Pruned(LSQ(bits), schedule, regrow=True)

    ranked = (Together(schedule),) if together else ()
    return Recipe(plan_of(model, choose), (), (*ranked, FixMasks(phase)), steps)


def loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    weight: float = 1.0,
    temperature: float = 4.0,
) -> Tensor:
    """Phase 2: ``CE(S) + weight T^2 KL(p_T || p_S) + CE(T)``, a scalar.

    Args:
        student: logits ``(batch, classes)`` of the pruned network.
        teacher: of the whole one, from within :meth:`~dither.train.OwnTeacher.teaching`.
        labels: ``(batch,)``.
        weight: of the distillation.
        temperature: of both in it.
    """
    wanted = functional.log_softmax(teacher.detach() / temperature, 1)
    given = functional.log_softmax(student / temperature, 1)
    taught = functional.kl_div(given, wanted, log_target=True, reduction="batchmean")
    own = functional.cross_entropy(student, labels)
    return own + weight * temperature**2 * taught + functional.cross_entropy(teacher, labels)
