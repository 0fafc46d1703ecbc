"""Allocation against brute force."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dither.search.allocate import allocate
from dither.search.knowledge import Choice
from dither.search.ladder import Ladder
from dither.search.proposers import Stored


@st.composite
def ladders(draw: st.DrawFn) -> dict[str, Ladder]:
    """A few small convex ladders with whole numbers of bytes."""
    found = {}
    for i in range(draw(st.integers(1, 4))):
        steps = draw(
            st.lists(st.tuples(st.integers(1, 20), st.floats(0.01, 10)), min_size=0, max_size=4)
        )
        # Slopes that fall make a convex ladder.
        slopes = sorted((slope for _, slope in steps), reverse=True)
        slopes = [slope * 1.001 ** (len(slopes) - k) for k, slope in enumerate(slopes)]
        nbytes, loss = draw(st.integers(0, 30)), draw(st.floats(0, 5))
        loss += sum(size * slope for (size, _), slope in zip(steps, slopes, strict=True))
        choices = [Choice(nbytes, loss, Stored())]
        for (size, _), slope in zip(steps, slopes, strict=True):
            nbytes, loss = nbytes + size, loss - size * slope
            choices.append(Choice(nbytes, loss, Stored()))
        found[f"t{i}"] = Ladder(tuple(choices))
    return found


def totals(choices: list[Choice] | tuple[Choice, ...]) -> tuple[float, float]:
    return sum(o.nbytes for o in choices), sum(o.loss for o in choices)


def best(tensors: dict[str, Ladder], nbytes: float) -> float:
    every = (totals(chosen) for chosen in product(*(t.choices for t in tensors.values())))
    return min((loss for size, loss in every if size <= nbytes), default=float("inf"))


def least(tensors: dict[str, Ladder]) -> float:
    return sum(ladder.choices[0].nbytes for ladder in tensors.values())


def most(tensors: dict[str, Ladder]) -> float:
    return sum(ladder.choices[-1].nbytes for ladder in tensors.values())


@settings(max_examples=200)
@given(ladders(), st.floats(0, 1))
def test_within_one_step_of_the_best(tensors: dict[str, Ladder], share: float) -> None:
    nbytes = least(tensors) + share * (most(tensors) - least(tensors))
    chosen = allocate(tensors, nbytes)
    assert list(chosen) == list(tensors)
    assert all(chosen[name] in tensors[name].choices for name in tensors)
    size, loss = totals(list(chosen.values()))
    assert size <= nbytes
    last = max(
        (
            a.loss - b.loss
            for t in tensors.values()
            for a, b in zip(t.choices, t.choices[1:], strict=False)
        ),
        default=0.0,
    )
    assert best(tensors, nbytes) - 1e-9 <= loss <= best(tensors, nbytes) + last + 1e-9


@settings(max_examples=100)
@given(ladders())
def test_the_best_where_the_steps_fill_the_budget(tensors: dict[str, Ladder]) -> None:
    steps = [
        (a.loss - b.loss, b.nbytes - a.nbytes)
        for t in tensors.values()
        for a, b in zip(t.choices, t.choices[1:], strict=False)
    ]
    steps.sort(key=lambda step: -step[0] / step[1])
    nbytes = least(tensors)
    for _, size in [(0.0, 0.0), *steps]:
        nbytes += size
        chosen = totals(list(allocate(tensors, nbytes).values()))
        assert chosen[1] == pytest.approx(best(tensors, nbytes), abs=1e-9)


@given(ladders(), st.floats(-100, 1000))
def test_the_ends(tensors: dict[str, Ladder], nbytes: float) -> None:
    if nbytes < least(tensors):
        chosen = allocate(tensors, nbytes)
        assert chosen == {name: ladder.choices[0] for name, ladder in tensors.items()}
    rich = allocate(tensors, most(tensors) + max(nbytes, 0))
    assert rich == {name: ladder.choices[-1] for name, ladder in tensors.items()}


def test_nothing_to_allocate() -> None:
    assert allocate({}, 100) == {}


def test_bytes_go_where_they_save_most() -> None:
    steep = Ladder((Choice(1, 100.0, Stored()), Choice(2, 0.0, Stored())))
    flat = Ladder((Choice(1, 10.0, Stored()), Choice(2, 9.0, Stored())))
    chosen = allocate({"flat": flat, "steep": steep}, 3)
    assert (chosen["flat"].nbytes, chosen["steep"].nbytes) == (1, 2)
