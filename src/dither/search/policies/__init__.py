"""Ways to search: one file for each policy."""

from dither.search.policies.actor_critic import Learning
from dither.search.policies.ajpq import AJPQ
from dither.search.policies.evolution import Evolution
from dither.search.policies.optuna_sampler import Optuna
from dither.search.policies.policy import Learner, Policy
from dither.search.policies.random_points import Allocator, RandomPoints

POLICIES: dict[str, Policy] = {
    "ajpq": AJPQ(),
    "evolution": Evolution(),
    "random": RandomPoints(),
    "tpe": Optuna("tpe"),
    "cma-es": Optuna("cma-es"),
    "allocator": Allocator(),
}
"""By the name that :func:`~dither.search.joint` knows them by."""

__all__ = [
    "AJPQ",
    "POLICIES",
    "Allocator",
    "Evolution",
    "Learner",
    "Learning",
    "Optuna",
    "Policy",
    "RandomPoints",
]
