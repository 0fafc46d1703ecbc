"""Time and error of k-means on blocks: the torch backend beside faiss, interleaved.

Both start from the same centroids and run the same number of iterations on one thread count. The
machine may be noisy, so the figure to look at is the ratio of the best times, and the median of
the ratios of neighbouring runs. Times are seconds of `KMeans.encode`, everything included, and of
the iterations alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.environment import describe
from dither import encoders, formats
from dither.encoders.importance import weighted_error
from dither.encoders.lloyd import lloyd_vectors


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def iterations_alone(
    weight: Tensor, fmt: formats.Product, iterations: int
) -> dict[str, Callable[[], object]]:
    """Lloyd's iterations of both backends from the same start, without encoding."""
    import faiss

    blocks, start = fmt.blocks(weight), fmt.fit(weight)["centroids"]

    def run_faiss() -> None:
        trainer = faiss.Kmeans(
            fmt.block,
            len(start),
            niter=iterations,
            min_points_per_centroid=1,
            max_points_per_centroid=10**9,
        )
        trainer.train(blocks.numpy(), init_centroids=start.numpy())

    def run_torch() -> None:
        unit = 1 / float(blocks.abs().max())
        lloyd_vectors(blocks * unit, start * unit, iterations, None, torch.Generator())

    return {"torch": run_torch, "faiss": run_faiss}


def summary(seconds: dict[str, list[float]]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(seconds["torch"], seconds["faiss"], strict=True)]
    return {
        "torch_best_s": min(seconds["torch"]),
        "faiss_best_s": min(seconds["faiss"]),
        "ratio_of_best": min(seconds["torch"]) / min(seconds["faiss"]),
        "median_ratio": statistics.median(ratios),
    }


def measure(options: argparse.Namespace) -> dict[str, object]:
    import faiss

    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(options.rows, options.columns, generator=generator) * 0.02
    fmt = formats.Product(options.block, options.points)
    plain = encoders.KMeans(fmt, options.iterations)
    runs = {name: replace(plain, backend=name) for name in ("torch", "faiss")}
    errors = {
        name: weighted_error(weight, run.encode(weight).decode()) for name, run in runs.items()
    }
    alone = iterations_alone(weight, fmt, options.iterations)
    whole_s: dict[str, list[float]] = {name: [] for name in runs}
    alone_s: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run in runs.items():
            whole_s[name].append(timed(partial(run.encode, weight)))
            alone_s[name].append(timed(alone[name]))
    return {
        "weight": [options.rows, options.columns],
        "block": options.block,
        "points": options.points,
        "iterations": options.iterations,
        "threads": options.threads,
        "repeats": options.repeats,
        "encode": summary(whole_s),
        "iterations_alone": summary(alone_s),
        "torch_error": errors["torch"],
        "faiss_error": errors["faiss"],
        "error_ratio": errors["torch"] / errors["faiss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("rows", 1536),
        ("columns", 384),
        ("block", 8),
        ("points", 256),
        ("iterations", 15),
        ("threads", 1),
        ("repeats", 9),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args()
    start = time.monotonic()
    result = measure(options)
    if options.json:
        head = describe() | {"seconds": round(time.monotonic() - start, 1)}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(head | result, indent=1) + "\n", encoding="utf-8")
    print(f"{options.rows} x {options.columns}, block {options.block}, {options.points} points,")
    print(
        f"{options.iterations} iterations, {options.threads} thread(s), best of {options.repeats}"
    )
    for part in ("encode", "iterations_alone"):
        figures = result[part]
        assert isinstance(figures, dict)
        print(
            f"{part:17} torch {figures['torch_best_s']:.3f} s,"
            f" faiss {figures['faiss_best_s']:.3f} s,"
            f" ratio {figures['ratio_of_best']:.2f} (median {figures['median_ratio']:.2f})"
        )
    print(f"squared error     torch / faiss {result['error_ratio']:.5f}")


if __name__ == "__main__":
    main()
