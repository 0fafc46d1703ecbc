"""One short training of each method and each recipe; the file it ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from benchmarks.byte_cases.case import Case, saved, short
from benchmarks.byte_cases.models import made
from dither import recipes
from dither.activations import Activation
from dither.core import Encoder
from dither.encoders import Ranges
from dither.formats import Affine, Codebook, Mixed, Product, Trellis
from dither.train import (
    LSQ,
    BayesianBits,
    Budget,
    CountOscillations,
    Dampening,
    DiffQ,
    DiffQSize,
    FreezeOscillations,
    GatePenalty,
    IterativePQ,
    Kurtosis,
    LearnedCodebook,
    Method,
    ProductCodes,
    QuantNoise,
    Ramp,
    Run,
    Size,
    StraightThrough,
    Teacher,
    WarmUp,
    attach,
    soft_targets,
)

STEPS = 8
_MATRICES = {
    "images": "*.weight",
    "words": "*.weight",
    "sounds": "*weight*",
    "dense": "*.weight",
}


def cases() -> Iterator[Case]:
    """All of them."""
    for spec in _SPECS:
        for name in ("images", "words"):
            yield Case(f"train/{name}/{short(spec)}", partial(_planned, name, spec))
    yield Case("train/sounds/LSQ", lambda: _planned("sounds", LSQ(4)))
    yield Case("train/sounds/QuantNoise", lambda: _planned("sounds", QuantNoise(Affine(4), 0.5)))
    for what, attached in _RUNS.items():
        for name in ("images", "words"):
            yield Case(f"train/{name}/{what}", partial(_trained, name, attached))
    for name in ("images", "words", "sounds", "dense"):
        yield Case(f"train/{name}/budget", partial(_trained, name, _to_budget))
    for what, recipe in _RECIPES.items():
        for name in ("images", "dense"):
            yield Case(f"recipe/{name}/{what}", partial(_trained, name, partial(_attached, recipe)))
    yield Case("train/dense/distilled", _distilled)
    yield Case("train/images/batch norm", lambda: _trained("images", _to_budget, renewed=True))
    yield Case("train/dense/resumed", _resumed)


Spec = Method | Encoder
Attach = Callable[[nn.Module, Optimizer], Run]
Make = Callable[[nn.Module], recipes.Recipe]


def _attached(make: Make, model: nn.Module, optimizer: Optimizer) -> Run:
    recipe = make(model)
    trains = optimizer if recipe.trains_weights else None
    return recipe.attach(model, optimizer=trains, steps=STEPS)


def _planned(name: str, spec: Spec) -> bytes:
    plan = {_MATRICES[name]: spec}
    return _trained(name, lambda m, o: attach(m, plan, steps=STEPS, optimizer=o, noise=1))


def _trained(name: str, attached: Attach, *, renewed: bool = False) -> bytes:
    model, batches = made(name)
    optimizer = Adam(model.parameters(), lr=1e-3)
    run = attached(model, optimizer)
    _train(run, batches, optimizer, range(STEPS))
    run.finish(batches if renewed else None)
    return saved(run.archive)


def _train(
    run: Run,
    batches: list[Tensor],
    optimizer: Optimizer,
    steps: Iterable[int],
    loss: Callable[[Tensor, Tensor], Tensor] = lambda output, _: output.float().square().mean(),
) -> None:
    run.model.train()
    for step in steps:
        batch = batches[step % len(batches)]
        optimizer.zero_grad()
        (loss(run.model(batch), batch) + run.penalty()).backward()
        optimizer.step()
        run.step()
    run.model.eval()


def _to_budget(model: nn.Module, optimizer: Optimizer) -> Run:
    return attach(model, budget="6x", steps=STEPS, optimizer=optimizer)


def _distilled() -> bytes:
    model, batches = made("dense")
    teacher = Teacher(model)
    optimizer = Adam(model.parameters(), lr=1e-3)
    run = attach(model, {"*.weight": LSQ(3)}, steps=STEPS, optimizer=optimizer)
    _train(run, batches, optimizer, range(STEPS), lambda o, x: soft_targets(o, teacher(x)))
    run.finish()
    return saved(run.archive)


def _resumed() -> bytes:
    model, batches = made("dense")
    optimizer = Adam(model.parameters(), lr=1e-3)
    run = _to_budget(model, optimizer)
    _train(run, batches, optimizer, range(STEPS // 2))
    again, _ = made("dense")
    other = Adam(again.parameters(), lr=1e-3)
    second = _to_budget(again, other)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    second.load_state_dict(run.state_dict())
    _train(second, batches, other, range(STEPS // 2, STEPS))
    second.finish()
    return saved(second.archive)


_SPECS: tuple[Spec, ...] = (
    LSQ(4),
    LSQ(3, axis=0),
    LSQ(None, step=0.02),
    QuantNoise(Affine(4), 0.5),
    QuantNoise(Affine(8, axis=0), Ramp(0.1, 0.9), rescale=False),
    QuantNoise(Affine(4, grid="asymmetric"), 0.5, kind="mean"),
    QuantNoise(Product(4, 16), 0.3, kind="proxy", rescale=True),
    QuantNoise(Product(4, 16), 0.3, selection="clusters", refresh=3),
    QuantNoise(Codebook(8), 0.5, block=4),
    StraightThrough(Affine(4)),
    StraightThrough(Affine(4, axis=0), stochastic=True),
    StraightThrough(Affine(3), ranges="mse", refresh=2),
    StraightThrough(Codebook(16), refresh=2),
    StraightThrough(Mixed(8)),
    DiffQ(group=8),
    DiffQ(group=4, min_bits=2, max_bits=10, noise="uniform", param="noise"),
    BayesianBits(8),
    BayesianBits(16, prune=True, lr=0.1),
    LearnedCodebook(8, 64),
    LearnedCodebook(4, 32, init="uniform", train_weights=True),
    ProductCodes(Product(4, 16)),
    ProductCodes(Product(4, 16), QuantNoise(Product(4, 16), 0.2, kind="proxy")),
    Ranges(Affine(4, axis=0)),
    Trellis(),
)

_PRODUCT = {"*.weight": ProductCodes(Product(4, 16))}

_RUNS: dict[str, Attach] = {
    "budget from larger": lambda m, o: attach(
        m, budget=Budget("6x", start="4x", arrive=0.5), steps=STEPS, optimizer=o
    ),
    "budget of LSQ": lambda m, o: attach(
        m, {"*": LSQ(None)}, budget="4x", steps=STEPS, optimizer=o
    ),
    "budget of DiffQ": lambda m, o: attach(
        m, {"*": DiffQ(4)}, budget="3x", steps=STEPS, optimizer=o
    ),
    "iterative": lambda m, o: attach(
        m, _PRODUCT, steps=STEPS, optimizer=o, schedules=[IterativePQ(1, "layers")]
    ),
    "frozen": lambda m, o: attach(
        m,
        {"*.weight": LSQ(3)},
        steps=STEPS,
        optimizer=o,
        schedules=[FreezeOscillations(0.05, momentum=0.3)],
    ),
    "dampened": lambda m, o: attach(
        m,
        {"*.weight": StraightThrough(Affine(4))},
        steps=STEPS,
        optimizer=o,
        penalties=[Dampening(0.1), Kurtosis(0.01)],
        schedules=[CountOscillations(0.1)],
    ),
    "penalties": lambda m, o: attach(
        m,
        {"*.weight": DiffQ(8)},
        steps=STEPS,
        optimizer=o,
        penalties=[DiffQSize(5.0), Size(Ramp(0.1, 1.0))],
    ),
    "gates": lambda m, o: attach(
        m,
        {"*.weight": BayesianBits(8, prune=True, lr=0.5)},
        steps=STEPS,
        optimizer=o,
        penalties=[GatePenalty(0.1)],
    ),
    "schedules": lambda m, o: attach(
        m,
        {"*.weight": QuantNoise(Affine(4), 0.1)},
        steps=STEPS,
        optimizer=o,
        schedules=[WarmUp(0.3)],
    ),
    "activations": lambda m, o: attach(
        m,
        {
            "*@in": Activation(8, training="learned"),
            "*.weight": LSQ(4),
        },
        steps=STEPS,
        optimizer=o,
    ),
    "own optimizer": lambda m, _: attach(
        m, {"*.weight": LSQ(4)}, steps=STEPS, optimizer=SGD(m.parameters(), lr=0.0)
    ),
}

_RECIPES: dict[str, Make] = {
    "bayesian_bits": recipes.bayesian_bits.recipe,
    "differentiable_quantization": lambda m: recipes.differentiable_quantization.recipe(
        m, 4, bucket=32
    ),
    "diffq": lambda m: recipes.diffq.recipe(m, min_size=0),
    "diffq deit": lambda m: recipes.diffq.recipe(m, "deit", min_size=0),
    "ipq": lambda m: recipes.ipq.recipe(m, steps=STEPS, start=2, p=0.1),
    "ipq layers": lambda m: recipes.ipq.recipe(m, steps=STEPS, stages="layers"),
    "oscillations": lambda m: recipes.oscillations.recipe(m, 3, steps=STEPS),
    "oscillations dampened": lambda m: recipes.oscillations.recipe(m, 4, "dampen", steps=STEPS),
    "quant_noise": recipes.quant_noise.recipe,
    "quant_noise int4": lambda m: recipes.quant_noise.recipe(m, "int4"),
    "quantized_distillation": recipes.quantized_distillation.recipe,
}
