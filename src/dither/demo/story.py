"""What ``dither demo`` does from beginning to end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dither.core import DitherError
from dither.demo.evaluate import (
    ROUNDED_SUFFIX,
    Score,
    evaluate_in_fresh_process,
    score,
)
from dither.demo.network import DigitNet, predict, test_set, train
from dither.demo.picture import plot, require_matplotlib
from dither.demo.plain_rounding import pack_rounded, payload_nbytes, save_rounded, unpack_rounded
from dither.model import collect
from dither.search import compress

_RATIOS = (4, 8, 12, 16, 24, 32, 40, 50, 60)
_BITS = (8, 7, 6, 5, 4, 3, 2)
_QUICK_RATIOS = (8, 24, 40)
_QUICK_BITS = (8, 4, 3)
_EPOCHS = 24

_TOLERANCE = 0.01
"""A network that is less accurate than the original by at most this keeps its accuracy."""


@dataclass(frozen=True)
class _Candidate:
    """One compressed network: where it was saved, and its score in this process."""

    method: str
    setting: str
    nbytes: int
    path: Path
    score: Score


def run(
    out: Path, *, quick: bool = False, progress: Callable[[str, float], None] | None = None
) -> dict[str, Any]:
    """Train, compress, save, evaluate in a fresh process; write files, a table and a picture.

    Args:
        out: folder for the files; created.
        quick: fewer sizes.
        progress: told what is being done, and the fraction that is done.

    Returns:
        What ``results.json`` holds: ``original``, ``rows``, ``bit_equal`` and ``finding``.

    Raises:
        DitherError: scikit-learn or matplotlib is missing, or ``out`` cannot be a folder.
    """
    report = progress or _silent
    require_matplotlib()
    images, labels = test_set()
    if out.exists() and not out.is_dir():
        raise DitherError(f"{str(out)!r} is a file; name a folder for the demo's files")
    out.mkdir(parents=True, exist_ok=True)
    report("training a small network", 0.0)
    model = train(_EPOCHS)
    state = model.state_dict()
    original = score(predict(model, images), labels)
    torch.save(state, out / "digits.pt")

    ratios, widths = (_QUICK_RATIOS, _QUICK_BITS) if quick else (_RATIOS, _BITS)
    candidates: list[_Candidate] = []
    for i, ratio in enumerate(ratios):
        report(f"compressing to 1/{ratio}", 0.2 + 0.6 * i / len(ratios))
        candidates.append(_compressed(state, ratio, out, images, labels))
    report("rounding", 0.8)
    candidates += [_rounded(state, bits, out, images, labels) for bits in widths]

    report("evaluating the files in a fresh process", 0.85)
    fresh = evaluate_in_fresh_process([candidate.path for candidate in candidates])
    results = _results(model, original, candidates, fresh)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    report("drawing", 0.95)
    plot(results, [out / "accuracy.png", out / "accuracy.svg"])
    return results


def _silent(stage: str, fraction: float) -> None:
    """Report to nobody."""


def _compressed(
    state: Mapping[str, Tensor], ratio: int, out: Path, images: Tensor, labels: Tensor
) -> _Candidate:
    path = out / f"digits-{ratio}x.dither"
    archive = compress(state, f"{ratio}x")
    archive.save(path)
    model = DigitNet()
    model.load_state_dict(archive.state_dict())
    seen = score(predict(model, images), labels)
    return _Candidate("dither", f"{ratio}x", path.stat().st_size, path, seen)


def _rounded(
    state: Mapping[str, Tensor], bits: int, out: Path, images: Tensor, labels: Tensor
) -> _Candidate:
    path = out / f"digits-{bits}bit{ROUNDED_SUFFIX}"
    packed = pack_rounded(state, bits)
    save_rounded(path, packed, bits)
    model = DigitNet()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    model.load_state_dict(unpack_rounded(packed, bits, shapes))
    seen = score(predict(model, images), labels)
    return _Candidate("plain rounding", f"{bits} bits", payload_nbytes(packed), path, seen)


def _results(
    model: DigitNet, original: Score, candidates: list[_Candidate], fresh: list[Score]
) -> dict[str, Any]:
    rows = [
        {
            "method": candidate.method,
            "setting": candidate.setting,
            "nbytes": candidate.nbytes,
            "accuracy": again.accuracy,
            "bit_equal": candidate.score == again,
            "file": candidate.path.name,
        }
        for candidate, again in zip(candidates, fresh, strict=True)
    ]
    whole = {
        "nbytes": collect(model).nbytes,
        "accuracy": original.accuracy,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "file": "digits.pt",
    }
    return {
        "original": whole,
        "rows": rows,
        "bit_equal": all(row["bit_equal"] for row in rows),
        "finding": find_best(whole, rows),
    }


def find_best(original: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    """The best that the numbers show, in a sentence or two."""
    kept = {
        method: min(
            (
                row
                for row in rows
                if row["method"] == method
                and row["accuracy"] >= original["accuracy"] - _TOLERANCE - 1e-9
            ),
            key=lambda row: int(row["nbytes"]),
            default=None,
        )
        for method in ("dither", "plain rounding")
    }
    ours, plain = kept["dither"], kept["plain rounding"]
    points = f"{100 * _TOLERANCE:g} point of the original's {original['accuracy']:.2%}"
    if ours is None:
        return f"No file of dither stays within {points} accuracy."
    text = (
        f"dither stays within {points} accuracy down to {ours['nbytes']:,} bytes: "
        f"{ours['accuracy']:.2%} at 1/{original['nbytes'] / ours['nbytes']:.0f} of the size."
    )
    if plain is None:
        return f"{text} Plain rounding does not at any width."
    times = plain["nbytes"] / ours["nbytes"]
    needs = f"needs {plain['nbytes']:,} bytes for that, {times:.1f} times as many"
    return f"{text} Plain rounding {needs}."
