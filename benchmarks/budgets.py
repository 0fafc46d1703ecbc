"""Every budget kept: random budgets over real models and odd state dicts.

``python -m benchmarks.budgets --count 200`` draws a state dict and a budget, log-uniform from the
smallest possible file to beyond the tensors' own bytes, compresses, saves, loads, and checks the
rule: at most the budget, and at least 98.5 % of it, or within 64 bytes, or as accurate as float16
everywhere. An impossible budget must be refused with the smallest size, and that size must work.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import dither
from benchmarks.environment import describe
from dither.model import collect
from dither.search import LEAST_SHARE, SLACK_NBYTES

State = dict[str, Tensor]


def odd_state_dicts() -> dict[str, Callable[[], State]]:
    """State dicts that trip compressors, by name."""
    return {
        "scalars": lambda: {f"s{i}": torch.tensor(math.pi * i) for i in range(9)},
        "empty": lambda: {"none": torch.zeros(0, 7), "one": _noise(300, 20)},
        "nothing": dict,
        "integers": lambda: {
            "ids": torch.arange(5000).reshape(50, 100),
            "mask": _noise(64, 64) > 0,
            "bytes": torch.arange(256, dtype=torch.uint8),
        },
        "mixed types": lambda: {
            "bf16": _noise(200, 100).bfloat16(),
            "half": _noise(100, 90).half(),
            "double": _noise(90, 70).double(),
            "steps": torch.tensor(7),
            "flag": torch.tensor([True, False]),
            "weight": _noise(120, 60),
        },
        "views": lambda: {
            "transposed": _noise(80, 200).T,
            "strided": _noise(100, 100)[::2, ::5],
            "expanded": torch.ones(1).expand(300, 10),
        },
        "ties": _ties,
        "one tensor": lambda: {"weight": _noise(999, 77)},
        "one small tensor": lambda: {"weight": _noise(30)},
        "constants": lambda: {"ones": torch.ones(512), "zeros": torch.zeros(64, 64)},
        "outliers": lambda: {"weight": _noise(200, 200) ** 9, "tiny": _noise(50, 50) * 1e-8},
        "not finite": lambda: {
            "bad": torch.tensor([1.0, math.inf, math.nan] * 40),
            "w": _noise(99),
        },
        "denormal": lambda: {"weight": _noise(100, 30) * 1e-40, "huge": _noise(60, 60) * 1e37},
        "ternary": lambda: {"weight": _noise(300, 100).sign() * (_noise(300, 100) > 0)},
        "tiny tensors": lambda: {f"layer.{i}.bias": _noise(1 + i % 7, seed=i) for i in range(5000)},
        "large embedding": lambda: {"embedding.weight": _noise(200_000, 8), "head": _noise(8, 8)},
        "deep names": lambda: {
            ".".join(["block"] * 40 + [str(i)]): _noise(8, 8) for i in range(30)
        },
    }


def _noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _ties() -> State:
    shared = _noise(400, 32)
    return {"embed.weight": shared, "head.weight": shared, "view": shared[:10], "bias": _noise(40)}


def models() -> dict[str, Callable[[], State]]:
    """The state dicts of the real models."""
    from benchmarks.tasks import minilm_stsb, resnet20_cifar10

    return {
        "resnet20": lambda: dict(resnet20_cifar10.load().state_dict()),
        "minilm": lambda: dict(minilm_stsb.load().state_dict()),
    }


def check(state: State, budget: int) -> str:
    """Compress to a budget and hold the archive to the rule; returns what happened.

    Raises:
        AssertionError: the rule was broken.
    """
    try:
        archive = dither.compress(state, budget)
    except dither.BudgetError as error:
        refusal = error
    else:
        return _judge(archive, state, budget)
    least = refusal.smallest
    assert least is not None, f"no smallest size in: {refusal}"
    assert least > budget, f"refused {budget} although {least} is possible"
    assert dither.compress(state, least).nbytes <= least
    return "refused"


def _judge(archive: dither.Archive, state: State, budget: int) -> str:
    assert archive.nbytes <= budget, f"{archive.nbytes} bytes for a budget of {budget}"
    loaded = dither.Archive.from_bytes(archive.to_bytes()).state_dict()
    assert (list(loaded) and set(loaded) == set(state)) or not state
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype
        assert loaded[name].shape == value.shape
    if archive.nbytes >= LEAST_SHARE * budget or archive.nbytes >= budget - SLACK_NBYTES:
        return "filled"
    coarse = [name for name, value in collect(state).values.items() if _coarse(value, loaded[name])]
    assert not coarse, (
        f"{archive.nbytes} of {budget} bytes used, but {coarse[:3]} are coarser than float16"
    )
    return "accurate"


def _coarse(value: Tensor, loaded: Tensor) -> bool:
    """Whether the loaded tensor's error is above that of rounding to float16."""
    if not value.is_floating_point() or not value.numel():
        return not torch.equal(value, loaded)
    if not bool(value.isfinite().all()):
        return not torch.equal(value.nan_to_num(7.0), loaded.nan_to_num(7.0))
    exact, got = value.double(), loaded.double()
    largest = float(exact.abs().max())
    scale = 1.0 if largest < 6e4 and largest > 1e-2 else max(largest, 1e-300)
    half = (exact / scale).half().double() * scale
    error, allowed = (float((x - exact).square().mean().sqrt()) for x in (got, half))
    least = float(exact.square().mean().sqrt()) * 2.0**-12.4
    return bool(error > max(1.02 * allowed, least))


def draw(state: State, chance: random.Random) -> int:
    """A budget between far too little and more than enough."""
    total = collect(state).nbytes
    return int(math.exp(chance.uniform(math.log(60), math.log(max(2.0 * total, 4000)))))


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--odd-only", action="store_true", help="leave the real models out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sources = odd_state_dicts() | ({} if arguments.odd_only else models())
    chance = random.Random(arguments.seed)  # noqa: S311 - repeatable, not secret
    states = {name: make() for name, make in sources.items()}
    rows, failures = [], 0
    for i in range(arguments.count):
        name = list(sources)[i % len(sources)]
        budget = draw(states[name], chance)
        start = time.monotonic()
        try:
            outcome = check(states[name], budget)
        except AssertionError as error:
            outcome, failures = f"FAILED: {error}", failures + 1
        rows.append({"state": name, "budget": budget, "outcome": outcome})
        print(
            f"{i:4} {name:18} {budget:12,} {outcome} {time.monotonic() - start:.1f} s", flush=True
        )
    print(f"{failures} of {arguments.count} budgets broken")
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                describe() | {"seed": arguments.seed, "failures": failures, "rows": rows}, indent=1
            )
            + "\n"
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
