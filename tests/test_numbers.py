"""Tables of README and documentation hold what the results of the benchmarks hold.

Each expected row is made from JSON in `benchmarks/results`; a document must have it as it stands.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import federated_plot
from benchmarks.pixel_flow_plot import tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TITLES = {
    "minilm_stsb": "all-MiniLM-L6-v2 (90.9 MB, STS-B 82.03)",
    "resnet20_cifar10": "ResNet-20 (1.09 MB, CIFAR-10 91.73 %)",
}


def read(name: str) -> Any:  # noqa: ANN401 - JSON
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def without_training() -> Iterator[str]:
    """Data-free, with samples, and NNCodec at its bytes."""
    fitted = {(row["task"], row["budget"]): row["score"] for row in read("calibrated_test")}
    last = ""
    for row in read("data_free_test")["rows"]:
        task, budget = row["task"], row["budget"]
        assert row["nbytes"] <= budget
        title = "" if task == last else TITLES[task]
        last = task
        scores = [row["score"], fitted[task, budget], row["nncodec"]]
        cells = [title, f"{budget:,}", *(f"{score:.2f}" for score in scores)]
        yield "| " + " | ".join(cells).lstrip() + " |"


def trained() -> Iterator[str]:
    """ResNet-20 trained to three budgets."""
    rows = read("train_resnet20_test")["rows"]
    for row in sorted(rows, key=lambda row: (-row["budget"], row["seed"])):
        assert row["bytes"] <= row["budget"]
        yield f"| {row['budget']:,} | {row['seed']} | {row['bytes']:,} | {row['test']:.2f} |"


def minilm() -> Iterator[str]:
    """MiniLM trained to two budgets, in running text."""
    for row in read("train_minilm_test")["rows"]:
        yield f"{row['bytes']:,} bytes"
        yield f"{row['test']:.2f}"


def diffq() -> Iterator[str]:
    """DiffQ here and in its authors' package."""
    for row in read("diffq")["rows"]:
        peer = row["peer"]
        cells = [
            f"{row['penalty']:.0f}",
            *(f"{peer['bytes']['compressed_model_size']:,}", f"{peer['test']:.2f}"),
            *(f"{row['bytes']:,}", f"{row['test']:.2f}"),
        ]
        yield "| " + " | ".join(cells) + " |"


def processes() -> Iterator[str]:
    """Two processes against one."""
    found = read("two_processes")
    one, two = (row["seconds"] for row in found["rows"])
    assert found["same_bytes"]
    yield f"{one:.1f} s in one process and {two:.1f} s in two, a ratio of {found['ratio']:.2f}"


def coding() -> Iterator[str]:
    """Speed of the entropy coder beside constriction's, on one core."""
    for name, row in read("coding_speed")["sources"].items():
        yield f"| {name} | {row['decode ratio']:.1f} | {row['encode ratio']:.1f} |"


def pipelines() -> Iterator[str]:
    """EfficientNet-lite0 in the white paper's pipelines; a cell without a row is empty."""
    rows = read("pipelines")["rows"]
    ways = {
        "min-max": "min-max",
        "least squared error": "MSE",
        "the same, equalized": "MSE, equalized",
        "least squared error, biases corrected by norms": "MSE, biases corrected by norms",
        "least squared error, ranges of activations by norms": "MSE, activations by norms",
    }
    columns = ("W8A8 / tensor", "W8A8 / channel", "W4A8 / channel", "W4 / channel")
    for title, way in ways.items():
        found = [rows.get(f"{column} / {way}") for column in columns]
        cells = ["" if row is None else f"{row['score']:.2f}" for row in found]
        yield f"| {title} |" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def oscillations() -> Iterator[str]:
    """What remedies do to a small depthwise network."""
    for name, row in read("oscillations")["rows"].items():
        if name.startswith("W"):
            title = name.rpartition(" / ")[0].replace(" / ", ", ")
            shares = f"{100 * row['oscillating']:.3f} | {100 * row['frozen']:.2f}"
            yield f"| {title} | {row['score']:.2f} | {row['re-estimated']:.2f} | {shares} |"


def noise() -> Iterator[str]:
    """QAT and noise at int4 on a small depthwise network."""
    for name, row in read("oscillations")["rows"].items():
        if name.startswith("int4"):
            title = name.rpartition(" / ")[0].replace(" / ", ", ")
            yield f"| {title} | {row['score']:.2f} | {row['re-estimated']:.2f} |"


def gates() -> Iterator[str]:
    """Bayesian Bits over mu."""
    for name, row in read("recipes_digits")["rows"].items():
        if name.startswith("mu "):
            costs = f"{row['operations']:.2f} | {row['width']:.1f} | {row['pruned']:.1f}"
            yield f"| {name[3:]} | {costs} | {row['test']:.2f} | {row['nats']:.3f} |"


def students() -> Iterator[str]:
    """Polino's table in shape."""
    for name, row in read("recipes_digits")["rows"].items():
        if name.startswith("student"):
            title = name.removeprefix("student, ").replace(" / ", ", ")
            yield f"| {title} | {row['test']:.2f} | {row['nats']:.3f} |"


def learned_bits() -> Iterator[str]:
    """DiffQ beside QAT and LSQ."""
    for name, row in read("recipes_digits")["rows"].items():
        if name.endswith(("QAT", "LSQ")) or name.startswith("DiffQ"):
            title, counted = name.replace(" / ", ", "), row.get("bits")
            bits = "" if counted is None else f"{counted:.2f} "
            scores = f"{row['test']:.2f} | {row['nats']:.3f}"
            yield f"| {title} | {row['bytes']:,.0f} | {bits}| {scores} |"


def aims() -> Iterator[str]:
    """What AdaRound aims at: distances of outputs."""
    rows = read("rounding_aims")["rows"]
    ways = ("nearest", "AdaRound, aims at the weight")
    crossed = [f"AdaRound, cross moments, around the {x}" for x in ("target", "weight")]
    for bits in (4, 3, 2):
        cells = [f"{rows[f'{bits} bits / {way}']['distance']:.4f}" for way in (*ways, *crossed)]
        yield f"| {bits} | {' | '.join(cells)} |"


def by_distance() -> Iterator[str]:
    """Where a better method loses."""
    rows = read("by_distance")["rows"]["resnet20_cifar10"]
    names = {
        "nearest, min-max": "nearest, min-max",
        "nearest, least squared error": "nearest, mse",
        "GPTQ": "GPTQ, mse",
        "AdaRound, 100 iterations": "AdaRound, mse",
    }
    for title, name in names.items():
        yield f"| {title} | {rows[name]['weights']:.4f} | {rows[name]['distance']:.3f} |"
    for title, name in (("min-max", "min-max"), ("least squared error", "mse")):
        start = f"nearest, {name}, folded"
        pair = [rows[n]["distance"] for n in (start, f"{start}, biases by norms")]
        said = f"{title}, folded: biases as they are / corrected by norms"
        yield f"| {said} | | {pair[0]:.3f} / {pair[1]:.3f} |"


def federated() -> Iterator[str]:
    """Objectives, and what messages cost."""
    rows = read("federated")["rows"]
    yield from federated_plot.objectives(rows)
    yield from federated_plot.messages(rows)


def faults() -> Iterator[str]:
    """Of a federation."""
    yield from federated_plot.faults(read("federated_faults")["cases"])


CHOOSERS = {
    "uniform labels": "uniform",
    "model picker": "`ModelPicker`",
    "SMD-AMA, mu 0.3": "`SMDAMA`, mu 0.3",
    "SMD-AMA, mu 0.6": "`SMDAMA`, mu 0.6",
    "uniform trials": "uniform",
    "successive halving": "successive halving",
    "Bayesian optimization": "Bayesian optimization on scores",
    "AOE": "`AOE`, Thompson",
    "AOE, expected improvement": "`AOE`, expected improvement",
    "AOE, upper bound": "`AOE`, upper bound",
}


def regret(row: dict[str, Any] | None) -> str:
    """Mean and deviation in points of per cent; nothing where it was not measured."""
    if row is None:
        return ""
    mean, deviation = row["mean"], row["deviation"]
    digits = 1 if max(mean, deviation) >= 1 else 2
    text = f"{mean:.{digits}f} ± {deviation:.{digits}f}"
    return text if deviation >= 0.005 else f"{mean:.2f}"


def choosing() -> Iterator[str]:
    """Regret of each chooser by labels and by trials."""
    found = read("choosing")
    for part, counts in (
        ("labels", (20, 50, 100, 200, 500, 1000, 2000)),
        ("trials", (1, 2, 3, 5, 8, 12, 20, 40, 160, 640)),
    ):
        for name, row in found[part].items():
            cells = [CHOOSERS[name], *(regret(row["regret"].get(str(n))) for n in counts)]
            yield "| " + " | ".join(cells) + " |"


def pixel_flow() -> Iterator[str]:
    """Whatever was measured of videos and images."""
    for line in tables(read("pixel_flow")["rows"]).splitlines():
        if line.startswith("| ") and "not measured | | not measured" not in line:
            yield line


TABLES = {
    "README.md": (without_training,),
    "docs/measured.md": (without_training, trained, minilm, diffq, coding),
    "docs/faithful.md": (by_distance,),
    "docs/recipes/bayesian_bits.md": (gates,),
    "docs/recipes/diffq.md": (diffq, learned_bits),
    "docs/recipes/quant_noise.md": (noise,),
    "docs/recipes/quantized_distillation.md": (students,),
    "docs/recipes/oscillations.md": (oscillations,),
    "docs/recipes/white_paper.md": (aims, pipelines),
    "docs/recipes/robust_fedavg.md": (federated, faults),
    "docs/howto/choose.md": (choosing,),
    "docs/howto/machines.md": (processes,),
    "docs/recipes/pixel_flow.md": (pixel_flow,),
}


@pytest.mark.parametrize("document", TABLES)
def test_tables_are_those_of_the_results(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for table in TABLES[document]:
        rows = list(table())
        assert rows
        missing = [row for row in rows if row not in text]
        assert not missing, f"{document} lacks rows of {table.__name__}: {missing}"
