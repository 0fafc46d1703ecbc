"""Which of several files is best, by trials of 20 labelled samples each (AOE, Dai et al. 2020).

python examples/choosing.py [--data digits] [--steps TRIALS]
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever it is run from

import dither
from dither.core import Encoder
from dither.select import AOE, class_features
from examples.tasks import arguments, load

PLANS: dict[str, Encoder] = {
    "4 bits": dither.Affine(4),
    "4 bits by row": dither.Affine(4, axis=0),
    "4 bits, clipped": dither.Ranges(dither.Affine(4, axis=0)),
    "16 points": dither.KMeans(dither.Codebook(16)),
    "pairs of 64 points": dither.KMeans(dither.Product(2, points=64), backend="torch"),
}


@torch.no_grad()
def logits(model: nn.Module, inputs: torch.Tensor) -> np.ndarray:
    found: np.ndarray = model.eval()(inputs).numpy()
    return found


def main() -> None:
    options = arguments(__doc__, 30, "chosen")
    task = load(options)
    batches = [task.batch(number) for number in range(8)]
    inputs = torch.cat([batch[0] for batch in batches])
    labels = torch.cat([batch[1] for batch in batches]).numpy()
    archives = {
        f"search, {size}": dither.compress(task.model, size) for size in ("8x", "12x", "16x")
    }
    for name, encoder in PLANS.items():
        model = copy.deepcopy(task.model)
        weights = [key for key, value in model.named_parameters() if value.ndim > 1]
        run = dither.attach(model, dither.Plan(dict.fromkeys(weights, encoder)))
        run.finish()
        archives[name] = run.archive
    files, models = list(archives.values()), []
    for archive in files:
        models.append(task.empty())
        dither.load_into(models[-1], archive)
    answers = np.stack([logits(model, inputs).argmax(1) for model in models])

    chooser = AOE(class_features(logits(task.model, inputs)), answers)
    samples = np.random.default_rng(0)
    for _ in range(options.steps):
        file = chooser.ask()
        chosen = samples.integers(0, len(labels), 20)
        chooser.tell(file, answers[file, chosen] == labels[chosen], chosen)
    answer = chooser.answer()

    print(f"{'':20}{'bytes':>12}{'believed %':>12}{'+-':>6}{'test %':>9}")
    for number, name in enumerate(archives):
        mean, deviation = 100 * answer.means[number], 100 * answer.deviations[number]
        score = task.evaluate(models[number])
        print(f"{name:20}{files[number].nbytes:12,}{mean:12.2f}{deviation:6.2f}{score:9.2f}")
    files[answer.best].save(options.out)
    print(f"best after {answer.spent} trials, with a chance of {answer.chance:.0%}:")
    print(f"{'file':12}{files[answer.best].nbytes:12,}{task.evaluate(models[answer.best]):12.2f}")


if __name__ == "__main__":
    main()
