"""Spend bytes where they lower the loss most."""

from __future__ import annotations

from collections.abc import Mapping

from dither.search.knowledge import Choice
from dither.search.ladder import Ladder


def allocate(ladders: Mapping[str, Ladder], nbytes: float) -> dict[str, Choice]:
    """Choose one way for each tensor so that the predicted bytes stay within ``nbytes``.

    Every ladder is convex, so that taking the steps of all ladders in the order of loss saved
    for each byte is optimal (up to the last step): the Lagrangian of Shoham and Gersho 1988.

    >>> from dither.search.proposers import Stored
    >>> ladder = Ladder(
    ...     tuple(Choice(n, loss, Stored()) for n, loss in [(1, 9.0), (2, 4.0), (4, 0.0)])
    ... )
    >>> allocate({"a": ladder, "b": ladder}, 4)["a"].nbytes
    2
    """
    chosen = {name: ladder.choices[0] for name, ladder in ladders.items()}
    spent = sum(choice.nbytes for choice in chosen.values())
    steps = [
        ((a.loss - b.loss) / max(b.nbytes - a.nbytes, 1e-9), name, a, b)
        for name, ladder in ladders.items()
        for a, b in zip(ladder.choices, ladder.choices[1:], strict=False)
    ]
    steps.sort(key=lambda step: -step[0])
    full: set[str] = set()
    for _, name, before, after in steps:
        if name in full:
            continue
        extra = after.nbytes - before.nbytes
        if spent + extra > nbytes:
            full.add(name)
            continue
        chosen[name] = after
        spent += extra
    return chosen
