"""Randomness that depends on nothing but (seed, step, name, rank): exact resuming, and DDP."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from dither.core import SpecError


@dataclass(frozen=True)
class Noise:
    """Where noise comes from.

    Attributes:
        seed: any integer.
        ranks: ``"same"``: every process of a distributed run draws the same noise, so that the
            run equals one process with the whole batch; ``"different"``: each its own.

    >>> one, two = (Noise(0).generator(7, "fc.weight", torch.device("cpu")) for _ in "ab")
    >>> bool(torch.rand(3, generator=one).equal(torch.rand(3, generator=two)))
    True
    """

    seed: int = 0
    ranks: str = "same"

    def __post_init__(self) -> None:
        if self.ranks not in {"same", "different"}:
            raise SpecError(f'Noise ranks is "same" or "different", not {self.ranks!r}')

    def generator(self, step: int, name: str, device: torch.device) -> torch.Generator:
        """A generator for one weight at one step."""
        rank = 0
        if self.ranks == "different" and torch.distributed.is_initialized():
            rank = torch.distributed.get_rank()
        key = f"{self.seed} {step} {rank} {name}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        return torch.Generator(device).manual_seed(seed >> 1)
