"""Layer by layer: statistics are those of the encoded layers before, and nothing stays changed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from dither.calibrate import in_sequence
from dither.core import Encoded, SpecError, Stats
from dither.encoders import Nearest
from dither.formats import Affine
from dither.testing import same_bits


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Recording:
    """Rounds, and keeps what it was told."""

    seen: list[Stats] = field(default_factory=list)

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        assert stats is not None
        self.seen.append(stats)
        return Nearest(Affine(None), 0.25).encode(weight)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def close(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and torch.allclose(found, expected, atol=1e-5)


def test_statistics_follow_what_is_encoded() -> None:
    model, loader = network(), [normal(20, 6), normal(20, 6, seed=1)]
    before, recording = copy.deepcopy(model.state_dict()), Recording()
    made = in_sequence(model, loader, lambda name, weight: recording)
    assert list(made) == ["0.weight", "3.weight", "5.weight"]
    assert all(same_bits(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    encoded = copy.deepcopy(model).eval()
    encoded.load_state_dict({**before, **{name: e.decode() for name, e in made.items()}})
    with torch.no_grad():
        wanted, found = (m[:5](torch.cat(loader)) for m in (copy.deepcopy(model).eval(), encoded))
    assert close(recording.seen[2].gram, found.T @ found / 40)
    assert close(recording.seen[2].cross, wanted.T @ found / 40)
    first = torch.cat(loader)
    assert close(recording.seen[0].cross, first.T @ first / 40)


def test_only_some_and_without_the_original() -> None:
    recording = Recording()
    made = in_sequence(network(), [normal(4, 6)], {"3.weight": recording}, corrected=False)
    assert list(made) == ["3.weight"]
    assert recording.seen[0].cross is None
    with pytest.raises(SpecError, match="no weight was encoded; those in use are"):
        in_sequence(network(), [normal(4, 6)], {})
    with pytest.raises(SpecError, match="no batch"):
        in_sequence(network(), [], {})


def test_weights_come_back_after_an_error() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())

    def choose(name: str, weight: Tensor) -> Recording:
        if name == "5.weight":
            raise RuntimeError("enough")
        return Recording()

    with pytest.raises(RuntimeError, match="enough"):
        in_sequence(model, [normal(4, 6)], choose)
    assert all(same_bits(v, before[k]) for k, v in model.state_dict().items())
