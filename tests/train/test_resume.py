"""A run that is stopped and resumed from a checkpoint ends bit-equal to one that went on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dither import LSQ, Affine, Run, attach
from dither.testing import same_bits
from tests.train.layers import EXAMPLES, Spec, build, weights_of

SPECS: list[Spec] = [Affine(4), LSQ(bits=None), *[s[0] for s in EXAMPLES.values() if s]]
NAMES = ["plain", "unbounded", *[name for name, s in EXAMPLES.items() if s]]
STEPS, HALF = 24, 13


def begin(spec: Spec | None, seed: int, kind: type[Any]) -> tuple[Run, Any]:
    model, _ = build("linear", seed)
    plan = None if spec is None else dict.fromkeys(weights_of(model), spec)
    budget = 1300 if spec is None else None
    optimizer = kind(model.parameters(), lr=0.01)
    return attach(model, plan, budget=budget, steps=STEPS, optimizer=optimizer), optimizer


def go_on(run: Run, optimizer: torch.optim.Optimizer, until: int) -> None:
    while run.done < until:
        inputs = torch.randn(6, 16, generator=torch.Generator().manual_seed(run.done))
        loss = run.model.train()(inputs).square().mean() + run.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("spec", [*SPECS, None], ids=[*NAMES, "budget"])
def test_resuming_is_exact(spec: Spec | None, kind: type[Any], tmp_path: Path) -> None:
    run, optimizer = begin(spec, 0, kind)
    go_on(run, optimizer, HALF)
    state = [run.model.state_dict(), optimizer.state_dict(), run.state_dict()]
    torch.save(state, tmp_path / "state.pt")
    go_on(run, optimizer, STEPS)
    again, optimizer = begin(spec, 1, kind)
    states = torch.load(tmp_path / "state.pt")  # nothing but plain data
    for target, saved in zip((again.model, optimizer, again), states, strict=True):
        target.load_state_dict(saved)
    go_on(again, optimizer, STEPS)
    one, other = run.model.state_dict(), again.model.state_dict()
    assert one.keys() == other.keys()
    assert all(same_bits(one[name], other[name]) for name in one)
    assert run.finish() == again.finish()
    encoded, resumed = run.encode(), again.encode()
    assert all(same_bits(encoded[n].decode(), resumed[n].decode()) for n in encoded)
