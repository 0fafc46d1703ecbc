"""Every recipe attaches, trains, finishes, saves, and loads as what was evaluated."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from dither.core import SpecError
from dither.formats import Affine, Product
from dither.recipes import (
    Recipe,
    bayesian_bits,
    cyclical_pruning,
    differentiable_quantization,
    diffq,
    ipq,
    oscillations,
    pqk,
    quant_noise,
    quantized_distillation,
    robust_fedavg,
)
from dither.recipes.model_layers import layers
from dither.train import (
    LSQ,
    MQAT,
    DiffQ,
    Plan,
    Teacher,
    oscillating,
    reestimate_batch_norm,
)
from dither.train.ipq import LearnedCentroids
from dither.train.learned_codebook import LearnedCodebook, polino_bits
from dither.train.quant_noise import QuantNoise

STEPS = 6
INPUTS = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(32) % 5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 5),
    )


class Words(nn.Module):
    """A language model with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(self.embed(tokens)))
        return logits


RECIPES: dict[str, Callable[[nn.Module], Recipe]] = {
    "quant_noise pq": quant_noise.recipe,
    "quant_noise int4": lambda m: quant_noise.recipe(m, "int4"),
    "quant_noise int8 histogram": lambda m: quant_noise.recipe(m, "int8", ranges="histogram"),
    "ipq": lambda m: ipq.recipe(m, steps=STEPS, data=[INPUTS[:8]]),
    "ipq after noise": lambda m: ipq.recipe(m, steps=STEPS, start=3, p=0.2),
    "ipq by layers": lambda m: ipq.recipe(m, steps=STEPS, stages="layers"),
    "diffq": lambda m: diffq.recipe(m, penalty=5.0, min_size=0.0),
    "diffq resnet20": lambda m: diffq.recipe(m, "resnet20"),
    "bayesian_bits": lambda m: bayesian_bits.recipe(m, inputs=INPUTS),
    "quantized_distillation": lambda m: quantized_distillation.recipe(m, 4),
    "differentiable_quantization": lambda m: differentiable_quantization.recipe(m, 8),
    "cyclical_pruning": lambda m: cyclical_pruning.recipe(m, 0.6, 2, steps=STEPS, inner=LSQ(None)),
    "pqk": lambda m: pqk.recipe(m, 4, 0.6, steps=STEPS),
    **{
        f"robust_fedavg {name}": lambda m, name=name: robust_fedavg.recipe(m, name)  # type: ignore[misc]
        for name in robust_fedavg.OBJECTIVES
    },
    "oscillations freeze": lambda m: oscillations.recipe(m, 3, steps=STEPS),
    "oscillations dampen": lambda m: oscillations.recipe(m, 4, "dampen", steps=STEPS),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_and_its_file_is_what_was_evaluated(name: str, tmp_path: Path) -> None:
    model = network()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    recipe = RECIPES[name](model)
    run = recipe.attach(model, optimizer=optimizer if recipe.trains_weights else None, steps=STEPS)
    learned = [p.detach().clone() for p in run.extras.parameters()]
    losses = []
    for _ in range(STEPS):
        loss = functional.cross_entropy(model(INPUTS), LABELS)
        optimizer.zero_grad()
        (loss + run.penalty()).backward()
        optimizer.step()
        run.step()
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if name == "differentiable_quantization":
        assert all(torch.equal(model.get_parameter(n), p) for n, p in before.items())
    else:
        assert losses[-1] < losses[0]
    moved = [not torch.equal(a, b) for a, b in zip(learned, run.extras.parameters(), strict=True)]
    assert all(moved)

    nbytes = run.finish([INPUTS])
    assert run.save(tmp_path / "model.dither") == nbytes
    assert nbytes < 0.6 * sum(4 * p.numel() for p in before.values())
    fresh = network()
    dither.load_into(fresh, tmp_path / "model.dither")
    assert torch.equal(model.eval()(INPUTS), fresh.eval()(INPUTS))
    assert Plan.from_json(run.plan.to_json()) == run.plan


@pytest.mark.parametrize(
    "make",
    [
        quant_noise.recipe,
        lambda m: ipq.recipe(m, steps=3),
        lambda m: diffq.recipe(m, min_size=0.0),
        quantized_distillation.recipe,
        lambda m: oscillations.recipe(m, steps=3),
        bayesian_bits.recipe,
    ],
)
def test_tied_weights_stay_tied(make: Callable[[nn.Module], Recipe], tmp_path: Path) -> None:
    model = Words()
    run = make(model).attach(model)
    run.finish()
    run.save(tmp_path / "model.dither")
    with dither.open(tmp_path / "model.dither") as archive:
        assert dict(archive.aliases) == {"head.weight": "embed.weight"}


def test_layers_are_found_in_order_with_all_their_names() -> None:
    found = layers(Words())
    assert [layer.name for layer in found] == [
        "embed.weight",
        "block.self_attn.in_proj_weight",
        "block.self_attn.out_proj.weight",
        "block.linear1.weight",
        "block.linear2.weight",
    ]
    assert found[0].names == ("embed.weight", "head.weight")
    assert [layer.is_attention for layer in found] == [False, True, True, False, False]


def test_blocks_are_the_papers() -> None:
    rules = quant_noise.recipe(Words(), p=0.05).plan
    sizes = {n: s.format.block for n, s in rules if isinstance(s, QuantNoise)}  # type: ignore[attr-defined]
    assert sizes["embed.weight"] == sizes["head.weight"] == 8
    assert sizes["block.self_attn.in_proj_weight"] == 4
    assert sizes["block.linear1.weight"] == 8
    vision = {
        n: s.format for n, s in quant_noise.recipe(network()).plan if isinstance(s, QuantNoise)
    }
    assert vision["0.weight"] == Product(9, 8)  # 48 blocks: no more than one centroid for four
    assert vision["3.weight"] == Product(4, 32)
    assert "1.weight" not in vision  # a vector
    large = ipq.plan(network(), blocks="large")
    assert "0.weight" not in large.rules
    assert large.rules["3.weight"].format.block == 4  # type: ignore[union-attr]


def test_iterative_product_quantization_goes_group_by_group() -> None:
    model = Words()
    run = ipq.recipe(model, steps=9, start=3).attach(model)

    def placed() -> set[str]:
        centroids = ((n, s) for n, s in run.surrogates.items() if isinstance(s, LearnedCentroids))
        return {n for n, s in centroids if s.is_placed}

    seen = [placed()]
    for _ in range(9):
        run.step()
        if placed() != seen[-1]:
            seen.append(placed())
    assert seen[0] == set()
    assert seen[1] == {"block.linear1.weight", "block.linear2.weight"}
    assert seen[2] == seen[1] | {"embed.weight"}
    assert seen[3] == set(run.surrogates)
    with pytest.raises(SpecError, match="no step"):
        ipq.recipe(Words(), steps=3, start=3)


def test_published_sizes_follow_from_the_formula() -> None:
    model = nn.Sequential(nn.Linear(1024, 512))
    rules = ipq.plan(model)
    codes, table, rest = 1024 * 512 / 8, 256 * 8 * 2, 512 * 4
    assert ipq.size_mib(model, rules) == pytest.approx((codes + table + rest) / 2**20)
    student = quantized_distillation.recipe(model, 4).plan.find("0.weight")
    assert isinstance(student, LearnedCodebook)
    weight = model.get_parameter("0.weight").detach()
    encoded = student.begin(weight).encode(weight)
    assert encoded.bits - 16 * 32 == polino_bits(1024 * 512, 4)  # but for the points


def test_settings_are_the_papers() -> None:
    model = network()
    int8 = quant_noise.recipe(model, "int8").plan.find("8.weight")
    assert int8 == QuantNoise(Affine(8, axis=0), 0.5)
    assert diffq.recipe(model, "deit").plan.find("8.weight") == DiffQ(8, 3, min_size=0.01, lr=5e-4)
    preset = diffq.recipe(model, "resnet20").plan
    assert preset.find("8.weight") == DiffQ(16, 1, 10, lr=2e-4)
    assert preset.find("8.bias") is None
    widths = [s.bits for _, s in oscillations.recipe(model, 3, steps=9).plan if isinstance(s, LSQ)]
    assert widths == [8, 3, 3, 3, 8]
    ends = quantized_distillation.recipe(model, ends=False).plan
    assert ends.find("0.weight") is ends.find("10.weight") is None


def test_points_are_shared_by_gradient() -> None:
    model = network()

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(net(batch[0]), batch[1])

    counts = differentiable_quantization.share_points(model, loss, [(INPUTS, LABELS)] * 9, 8)
    assert sum(counts.values()) == 5 * 8
    assert len(set(counts.values())) > 1
    run = differentiable_quantization.recipe(model, counts).attach(model)
    assert {n: len(s.points) for n, s in run.surrogates.items()} == counts  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="leave out"):
        differentiable_quantization.recipe(network(), {"0.weight": 8})


def test_bayesian_bits_count_multiplications_and_fix_gates() -> None:
    model = network()
    macs = bayesian_bits.multiplications(model, INPUTS)
    assert macs["0.weight"] == 16 * 27 * 64
    assert macs["5.weight"] == 32 * 9 * 64
    assert macs["8.weight"] == 128 * 64
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    recipe = bayesian_bits.recipe(model, penalty=1.0, inputs=INPUTS, lr=0.3)
    run = recipe.attach(model, optimizer=optimizer)
    begun = bayesian_bits.bit_operations(run, macs)
    assert begun == pytest.approx(16 / 32)
    for step in range(40):
        if step == 30:
            bayesian_bits.fix_gates(run)
            fixed = [p.detach().clone() for s in run.surrogates.values() for p in s.parameters()]
        optimizer.zero_grad()
        (functional.cross_entropy(model(INPUTS), LABELS) + run.penalty()).backward()
        optimizer.step()
        run.step()
    after = [p for s in run.surrogates.values() for p in s.parameters()]
    same = [torch.equal(a, b) for a, b in zip(fixed, after, strict=True)]
    assert same == [not parameter.requires_grad for parameter in after]
    assert bayesian_bits.bit_operations(run, macs) < 0.7 * begun
    shown = model(INPUTS)  # in train(): gates are drawn, but none is left to chance
    run.step()
    assert torch.equal(shown, model(INPUTS))


def test_distillation_mixes_teacher_and_labels() -> None:
    teacher = Teacher(network())
    student = network()
    goal = quantized_distillation.loss(student(INPUTS), teacher(INPUTS), LABELS)
    assert goal.requires_grad
    alone = functional.cross_entropy(student(INPUTS), LABELS)
    assert float(goal.detach()) == pytest.approx(0.3 * float(alone.detach()), rel=0.3)


def test_oscillations_are_counted_with_every_remedy() -> None:
    for remedy in ("freeze", "dampen", "none"):
        model = network()
        run = oscillations.recipe(model, 3, remedy, steps=4).attach(model)
        assert oscillating(run) == 0
    with pytest.raises(SpecError, match="remedies"):
        oscillations.recipe(network(), remedy="hope", steps=4)


def test_batch_norm_is_reestimated_as_it_is_evaluated() -> None:
    model = network()
    run = oscillations.recipe(model, 3, "none", steps=4).attach(model)
    norm = model.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d)
    reestimate_batch_norm(model, [INPUTS[:16], (INPUTS[16:], LABELS[16:])])
    with torch.no_grad():
        seen = model.eval().get_submodule("0")(INPUTS)
    assert norm.running_mean is not None
    assert torch.allclose(norm.running_mean, seen.mean((0, 2, 3)), atol=1e-5)
    assert norm.momentum == 0.1
    assert run.finish() > 0


def test_stages_may_be_named() -> None:
    model = network()
    run = ipq.recipe(model, steps=6, stages=["8.*", "10.*"], blocks="large").attach(model)
    placed = [n for n, s in run.surrogates.items() if getattr(s, "is_placed", False)]
    assert placed == ["8.weight"]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(SpecError, match="schemes"):
        quant_noise.recipe(network(), "int3")
    with pytest.raises(SpecError, match="presets"):
        diffq.recipe(network(), "mnist")
    with pytest.raises(SpecError, match="1 to 16"):
        quantized_distillation.recipe(network(), 0)
    with pytest.raises(SpecError, match="no weight"):
        quant_noise.recipe(nn.BatchNorm1d(3))


def test_clients_objectives_are_the_papers() -> None:
    model = network()
    weights = {name for name, p in model.named_parameters() if p.ndim > 1}
    for name in robust_fedavg.OBJECTIVES:
        recipe = robust_fedavg.recipe(model, name, widths=(3, 32), bits=3, seed=4)
        run = recipe.attach(network(), steps=STEPS)
        assert set(run.surrogates) == weights
        kurtosis = float(run.penalty().detach())
        assert (kurtosis > 0) == (name == "kure")
        first = run.model.train()(INPUTS)
        plain = network().train()(INPUTS)
        is_plain = torch.equal(first, plain)
        assert is_plain == (name in {"kure", "plain"} or MQAT((3, 32), seed=4).width(0) == 32)
    with pytest.raises(SpecError, match="objectives are mqat"):
        robust_fedavg.recipe(model, "fedavg")
    with pytest.raises(SpecError, match="no matrices"):
        robust_fedavg.recipe(nn.ReLU())


@pytest.mark.parametrize("bits", [2, 5, 32])
def test_the_servers_model_is_rounded_at_any_width(bits: int) -> None:
    model = network()
    state = robust_fedavg.rounded(model, bits)
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        is_weight = name in dict(model.named_parameters()) and value.ndim > 1
        if not is_weight or bits == 32:
            assert torch.equal(state[name], value)
        else:
            assert 1 < len(state[name].unique()) <= 1 << bits
            assert torch.equal(state[name], Affine(bits).encode(value).decode())
