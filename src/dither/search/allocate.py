"""Spend bytes where they lower the loss most."""

from __future__ import annotations

from collections.abc import Mapping

from dither.search.options import Ladder, Option


def allocate(ladders: Mapping[str, Ladder], nbytes: float) -> dict[str, Option]:
    """Choose one option for each tensor so that the predicted bytes stay within ``nbytes``.

    Every ladder is convex, so that taking the steps of all ladders in the order of loss saved
    for each byte is optimal (up to the last step): the Lagrangian of Shoham and Gersho 1988.

    >>> ladder = Ladder((Option(1, 9.0), Option(2, 4.0), Option(4, 0.0)))
    >>> allocate({"a": ladder, "b": ladder}, 4)["a"].nbytes
    2
    """
    chosen = {name: ladder.options[0] for name, ladder in ladders.items()}
    spent = sum(option.nbytes for option in chosen.values())
    steps = [
        ((a.loss - b.loss) / max(b.nbytes - a.nbytes, 1e-9), name, a, b)
        for name, ladder in ladders.items()
        for a, b in zip(ladder.options, ladder.options[1:], strict=False)
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
