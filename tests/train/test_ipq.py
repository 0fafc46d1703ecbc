"""Iterative product quantization: the papers' sizes, order and gradients."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dither import Affine, Product, ProductCodes, QuantNoise, Run, SpecError, attach
from dither.train import IterativePQ, published_nbytes
from dither.train.ipq import (
    LearnedCentroids,
    _transformer_stage,
    quantize,
    usable_points,
)
from dither.train.method import spec_from_json, spec_to_json
from tests.train.test_straight_through import weight_of

MIB = 2**20


def placed(spec: ProductCodes, weight: nn.Parameter) -> LearnedCentroids:
    surrogate = spec.begin(weight.detach())
    assert isinstance(surrogate, LearnedCentroids)
    surrogate.place(weight)
    return surrogate


# --- sizes -------------------------------------------------------------------------------------


def test_the_published_size_of_the_language_model() -> None:
    width, fc = 1024, 4096
    vocabulary = [(20_000, 1024), (40_000, 256), (207_744, 64)]  # WikiText-103, adaptive
    weights = [(width * fc, 8, 256)] * 32 + [(width * width, 4, 256)] * 64
    weights += [(words * size, 8, 256) for words, size in vocabulary]
    weights += [(size * width, 4, 256) for _, size in vocabulary]
    total = sum(numel for numel, _, _ in weights)
    assert round(total / 1e6, 1) == 246.7
    assert round(published_nbytes([], rest=total) / MIB, 1) == 941.2
    assert round(published_nbytes(weights) / MIB, 2) == 37.84


def resnet(depth: int) -> tuple[list[tuple[int, int]], int, int]:
    """``(weights, kernel)`` of every convolution but the first; the rest; width of the end."""
    convolutions, rest, wide = [], 64 * 3 * 49 + 2 * 64, 64
    for stage, blocks in enumerate({18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]):
        width = 64 << stage
        out = width if depth == 18 else 4 * width
        for _ in range(blocks):
            one = [(wide, width, 3), (width, width, 3)]
            if depth == 50:
                one = [(wide, width, 1), (width, width, 3), (width, out, 1)]
            if wide != out:
                one.append((wide, out, 1))
            convolutions += [(a * b * k * k, k) for a, b, k in one]
            rest += sum(2 * b for _, b, _ in one)  # batch norm
            wide = out
    return convolutions, rest + 1000, wide


@pytest.mark.parametrize(
    ("depth", "blocks", "classes", "mib"),
    [
        (18, (9, 4), 2048, 1.54),
        (18, (18, 4), 2048, 1.03),
        (50, (9, 4), 1024, 5.09),
        (50, (18, 8), 1024, 3.19),
    ],
)
def test_the_published_sizes_of_resnets(
    depth: int, blocks: tuple[int, int], classes: int, mib: float
) -> None:
    convolutions, rest, wide = resnet(depth)
    sized = [(n, blocks[0] if kernel == 3 else blocks[1], 256) for n, kernel in convolutions]
    sized.append((1000 * wide, 4, classes))
    weights = [(n, block, usable_points(n, block, points)) for n, block, points in sized]
    assert round(published_nbytes(weights, rest) / MIB, 2) == mib


def test_the_file_is_about_as_large_as_published_sizes_say() -> None:
    weight = weight_of(256, 512)
    fmt = Product(8, points=64)
    encoded = quantize(ProductCodes(fmt), weight.detach())
    assert encoded.bits == 8 * published_nbytes([(weight.numel(), 8, 64)])


# --- one weight --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float32])
@pytest.mark.parametrize("shape", [(24, 20), (8, 4, 3, 3)])
def test_training_reads_the_file_and_centroids_get_mean_gradients(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    weight = weight_of(*shape)
    fmt = Product(8, points=4, dtype=dtype)  # 8 divides neither row
    surrogate = placed(ProductCodes(fmt), weight)
    assert surrogate.indices is not None
    read, encoded = surrogate(weight), surrogate.encode(weight.detach())
    assert torch.equal(read, encoded.decode())
    slope = torch.randn(shape)
    (read * slope).sum().backward()
    assert weight.grad is None
    blocks, codes = fmt.blocks(slope), encoded.codes["indices"].values.view(-1)
    wanted = torch.stack([blocks[codes == n].mean(0) for n in range(4)])
    assert surrogate.centroids.grad is not None
    assert torch.allclose(surrogate.centroids.grad.view(4, 8), wanted, atol=1e-6)


def test_assignments_stay_and_centroids_move() -> None:
    weight = weight_of(32, 32)
    surrogate = placed(ProductCodes(Product(4, points=8)), weight)
    before = surrogate.encode(weight.detach())
    with torch.no_grad():
        surrogate.centroids.mul_(-1)
    after = surrogate.encode(weight.detach())
    codes = [encoded.codes["indices"].values for encoded in (before, after)]
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(after.decode(), -before.decode())
    assert torch.equal(surrogate.eval()(weight), after.decode())


def test_few_blocks_make_few_centroids() -> None:
    weight = nn.Parameter(torch.ones(6, 8))
    surrogate = placed(ProductCodes(Product(4)), weight)
    assert torch.equal(surrogate(weight), torch.ones(6, 8))
    assert surrogate.encode(weight.detach()).params["centroids"].shape == (1, 4)


def test_activations_weigh_the_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 32, generator=generator) * torch.logspace(0, -2, 8).repeat(4)
    weight = weight_of(40, 32)
    spec = ProductCodes(Product(8, points=16, dtype=torch.float32))
    rows = inputs.view(-1, 8)
    errors = [
        float(
            (inputs @ (quantize(spec, weight.detach(), metric).decode() - weight.detach()).T)
            .square()
            .sum()
        )
        for metric in (None, rows.T @ rows)
    ]
    assert errors[1] < 0.5 * errors[0]


# --- stages ------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(16, 16)
        self.output = nn.Linear(16, 16)


class Model(nn.Module):
    """Names as in common encoders."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.word_embeddings = nn.Embedding(20, 16)
        self.layer = nn.ModuleList(Block() for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.word_embeddings(tokens)
        for block in self.layer:
            assert isinstance(block, Block)
            x = x + torch.relu(block.attention(x))
            x = x + block.output(torch.relu(x))
        return x


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(20, (4, 6), generator=generator)


def step(run: Run, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    loss = (run.model(tokens).sum(2) - tokens).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.step()


def begin(
    schedule: IterativePQ, noise: QuantNoise | None = None
) -> tuple[Run, torch.optim.Optimizer]:
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    spec = ProductCodes(Product(4, points=8), noise, lr=1e-2)
    run = attach(model, {"*.weight": spec}, steps=30, optimizer=optimizer, schedules=[schedule])
    return run, optimizer


def states(run: Run) -> dict[str, bool]:
    return {
        name: surrogate.is_placed
        for name, surrogate in run.surrogates.items()
        if isinstance(surrogate, LearnedCentroids)
    }


def test_feed_forward_then_embeddings_then_attention() -> None:
    run, _ = begin(IterativePQ(10))
    groups = IterativePQ(10).groups(list(run.surrogates))
    assert [len(group) for group in groups] == [2, 1, 2]
    assert all(".output." in name for name in groups[0])
    assert groups[1] == ["word_embeddings.weight"]
    names = {
        "bert.encoder.layer.0.attention.output.dense.weight": 2,
        "bert.encoder.layer.0.attention.self.query.weight": 2,
        "bert.encoder.layer.0.intermediate.dense.weight": 0,
        "bert.encoder.layer.0.output.dense.weight": 0,
        "bert.embeddings.position_embeddings.weight": 1,
        "transformer.h.0.attn.c_proj.weight": 2,
        "transformer.h.0.mlp.c_fc.weight": 0,
        "transformer.wte.weight": 1,
        "model.layers.0.self_attn.q_proj.weight": 2,
        "model.layers.0.mlp.down_proj.weight": 0,
        "model.embed_tokens.weight": 1,
        "decoder.layers.0.fc1.weight": 0,
        "encoder.layers.0.self_attn.in_proj_weight": 2,
        "encoder.layers.0.linear1.weight": 0,
    }
    assert {name: _transformer_stage(name) for name in names} == names


def test_stages_are_placed_at_their_steps_and_the_rest_goes_on() -> None:
    run, optimizer = begin(IterativePQ(4, start=2))
    data = batches()
    counts, moved = [], []
    for _ in range(14):
        before = run.parameter("layer.0.attention.weight").detach().clone()
        step(run, optimizer, next(data))
        counts.append(sum(states(run).values()))
        moved.append(not torch.equal(before, run.parameter("layer.0.attention.weight")))
    assert counts == [0, 2, 2, 2, 2, 3, 3, 3, 3, 5, 5, 5, 5, 5]
    assert moved == [True] * 10 + [False] * 4  # placed after step 10: the weight rests


def test_stages_by_layer_by_globs_and_what_is_left() -> None:
    run, _ = begin(IterativePQ(1, "layers"))
    names = list(run.surrogates)
    assert [len(group) for group in IterativePQ(1, "layers").groups(names)] == [1] * 5
    groups = IterativePQ(1, ["layer.1.*", ["layer.0.a*", "word*"]]).groups(names)
    assert [len(group) for group in groups] == [2, 2, 1]
    assert groups[2] == ["layer.0.output.weight"]


def test_centroids_learn_and_lower_the_loss() -> None:
    run, optimizer = begin(IterativePQ(1))
    data, losses = batches(), []
    tokens = next(data)
    for number in range(63):
        step(run, optimizer, next(data))
        if number in {3, 62}:
            run.model.eval()
            losses.append(float((run.model(tokens).detach().sum(2) - tokens).square().mean()))
            run.model.train()
    assert all(states(run).values())
    assert losses[1] < 0.8 * losses[0]


def test_an_optimizer_knows_centroids_but_begins_with_them_when_they_are_placed() -> None:
    run, optimizer = begin(IterativePQ(100, start=3))
    data = batches()
    centroids = run.surrogates["layer.0.output.weight"].get_parameter("centroids")
    for _ in range(3):
        step(run, optimizer, next(data))
        assert centroids not in optimizer.state
    step(run, optimizer, next(data))
    assert int(optimizer.state[centroids]["step"]) == 1


def test_noise_before_and_none_after() -> None:
    noise = QuantNoise(Product(4, points=8), p=0.5, kind="proxy")
    run, optimizer = begin(IterativePQ(100, ["layer.0.*"], start=2), noise)
    data = batches()
    surrogate, weight = (
        run.surrogates["layer.0.output.weight"],
        run.parameter("layer.0.output.weight"),
    )
    assert 0 < (surrogate(weight) == 0).sum() < weight.numel()
    for _ in range(2):
        step(run, optimizer, next(data))
    assert torch.equal(surrogate(weight), surrogate.encode(weight.detach()).decode())


def test_resuming_is_exact() -> None:
    noise = QuantNoise(Product(4, points=8), p=0.3, refresh=2)

    def go(run: Run, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        data = batches()
        for number in range(last):
            tokens = next(data)
            if number >= first:
                step(run, optimizer, tokens)

    whole, optimizer = begin(IterativePQ(4, start=1), noise)
    go(whole, optimizer, 0, 12)
    part, optimizer = begin(IterativePQ(4, start=1), noise)
    go(part, optimizer, 0, 7)
    saved = copy.deepcopy([part.model.state_dict(), optimizer.state_dict(), part.state_dict()])
    other, optimizer = begin(IterativePQ(4, start=1), noise)
    other.model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    go(other, optimizer, 7, 12)
    assert states(other) == states(whole)
    pairs = zip(whole.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_inputs_of_the_network_as_it_is_quantized_weigh_errors() -> None:
    # Only inputs are read: batches hold no labels.
    data = batches()
    schedule = IterativePQ(1, data=[next(data) for _ in range(3)], batches=2)
    run, _ = begin(schedule)
    modes = [module.training for module in run.model.modules()]
    for number in range(3):
        schedule(run, number)
    assert all(states(run).values())
    assert [module.training for module in run.model.modules()] == modes
    assert all(surrogate.active for surrogate in run.surrogates.values())


def test_what_was_not_placed_is_quantized_at_the_end() -> None:
    run, _ = begin(IterativePQ(100, ["layer.0.*"]))
    run.step()
    assert sum(states(run).values()) == 2
    run.finish()
    for name in run.surrogates:
        assert len(run.archive[name].view(-1, 4).unique(dim=0)) <= 8


def test_settings_survive_json_and_nonsense_is_refused() -> None:
    fmt = Product(8, dtype=torch.int8)
    spec = ProductCodes(fmt, QuantNoise(fmt, kind="proxy"), lr=1e-4)
    assert spec_from_json(spec_to_json(spec)) == spec
    with pytest.raises(SpecError, match="Product"):
        ProductCodes(Affine(4))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="ordered list"):
        IterativePQ(1, "resnet")
    with pytest.raises(SpecError, match="every"):
        IterativePQ(0)
    with pytest.raises(SpecError, match="ProductCodes"):
        IterativePQ(1)(attach(Model(), {"*.weight": Affine(4)}), 0)
