"""What is evaluated is what is shipped: after `finish`, and from the file in a fresh process."""

import subprocess
import sys
from pathlib import Path

import torch

from dither import Affine, attach, load_into
from dither.core import SpecError
from dither.testing import same_bits
from tests.train.layers import EXAMPLES, MODELS, Spec, attached, build, outputs, train

ALWAYS = ("linear", "conv2d", "embedding", "attention", "tied")
"""Kinds of layers that every method takes."""

TABLE: dict[str, tuple[Spec, ...]] = {"format": (Affine(4),), **EXAMPLES}
CASES: list[tuple[Spec, str]] = [
    (spec, kind)
    for specs in TABLE.values()
    for number, spec in enumerate(specs)
    for kind in (MODELS if number == 0 else ALWAYS)
]
"""Every method on every kind of layer; its other settings on the most common."""


def test_every_method_ships_what_it_evaluates_on_every_layer(tmp_path: Path) -> None:
    evaluated = {}
    for number, (spec, kind) in enumerate(CASES):
        try:
            run, inputs = attached(kind, spec)
        except SpecError:
            assert kind not in ALWAYS, f"{spec!r} refuses {kind}"
            continue
        train(run, inputs)
        run.finish()
        evaluated[f"{kind}@{number}"] = outputs(run.model, inputs)
        run.save(tmp_path / f"{kind}@{number}.dither")
    program = "import sys; from tests.train.layers import load_and_evaluate as f; f(*sys.argv[1:])"
    threads = str(torch.get_num_threads())  # torch's last bits depend on how many there are
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path), threads],
        check=True,
        cwd=Path(__file__).parents[2],
    )
    shipped = torch.load(tmp_path / "results.pt")
    assert len(evaluated) > 0.9 * len(CASES)
    assert shipped.keys() == evaluated.keys()
    wrong = [name for name in evaluated if not same_bits(evaluated[name], shipped[name])]
    assert [CASES[int(name.split("@")[1])] for name in wrong] == []


def test_a_budget_ships_what_it_evaluates(tmp_path: Path) -> None:
    model, inputs = build("linear")
    run = attach(model, budget=1200, steps=6)
    train(run, inputs, steps=6)
    run.finish()
    evaluated = outputs(model, inputs)
    assert run.save(tmp_path / "model.dither") <= 1200
    fresh, _ = build("linear", seed=1)
    load_into(fresh, tmp_path / "model.dither")
    assert same_bits(outputs(fresh, inputs), evaluated)
