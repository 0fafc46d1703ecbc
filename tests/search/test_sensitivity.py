"""What errors cost without data: token tables, vectors, scales, and what is dropped last."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import dither
from dither.model import collect
from dither.search import Knowledge, data_free
from dither.search.knowledge import Weights
from dither.search.priors import prior_gram
from dither.search.row_steps import FREQUENT
from dither.search.sensitivity import HEAD, SIZE_EXPONENT, VECTOR_PRECISION, heads_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(scale: float = 1.0) -> dict[str, Tensor]:
    shapes = {
        "tok_emb.weight": (2100, 16),
        "conv.weight": (24, 8, 3, 3),
        "conv.bias": (24,),
        "fc1.weight": (120, 40),
        "fc1.bias": (120,),
        "fc2.weight": (30, 120),
        "norm.running_var": (120,),
    }
    state = {n: normal(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    state["norm.running_var"] = state["norm.running_var"].abs() + 0.1
    return {name: value * scale for name, value in state.items()}


@pytest.mark.parametrize("name", ["wte.weight", "model.embed_tokens.weight", "LM_HEAD.weight"])
def test_token_tables(name: str) -> None:
    table = data_free({name: normal(4000, 8)})[name]
    rows = table.rows
    assert rows is not None
    assert table.gram is None
    assert rows.shape == (4000,)
    assert float(rows.log2().mean()) == pytest.approx(0, abs=1e-5)
    assert bool((rows.diff() >= 0).all())
    assert len(rows.unique()) < 16
    # A row seen half as often may have twice the squared error: a step of sqrt(2), about.
    rarity = torch.arange(4000) / 4000 + FREQUENT
    law = rarity.sqrt() / rarity.sqrt().log2().mean().exp2()
    assert float((rows / law).log2().abs().max()) <= 0.13
    assert float(rows[-1] / rows[0]) == pytest.approx((1 / FREQUENT + 1) ** 0.5, rel=0.19)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("wte.weight", (2047, 8)),
        ("wte.weight", (2048, 513)),
        ("layer.weight", (4000, 8)),
        ("embed.weight", (4000, 2, 2)),
    ],
)
def test_what_is_no_token_table(name: str, shape: tuple[int, ...]) -> None:
    assert data_free({name: normal(*shape)})[name].rows is None


def test_matrices() -> None:
    found = data_free({"small": normal(10, 10), "large": normal(100, 100)})
    ratio = found["small"].sensitivity / found["large"].sensitivity
    assert ratio == pytest.approx(100**SIZE_EXPONENT)
    for name in ("small", "large"):
        gram = prior_gram(found[name].value)
        assert gram is not None
        assert found[name].gram is not None
        assert torch.equal(found[name].gram, gram)  # type: ignore[arg-type]


def test_vectors_are_finer_than_matrices() -> None:
    matrix, vector = normal(50, 50), normal(2000) * 7
    found = data_free({"matrix": matrix, "vector": vector})
    # The cost of an error of one standard deviation.
    costs = {
        "matrix": found["matrix"].sensitivity * float(matrix.var(correction=0)),
        "vector": found["vector"].sensitivity * float(vector.var(correction=0)),
    }
    assert costs["vector"] / costs["matrix"] == pytest.approx(VECTOR_PRECISION**-2, rel=1e-4)


@pytest.mark.parametrize(
    "vector",
    [
        torch.zeros(5),
        torch.ones(5),
        torch.tensor(3.0),
        torch.tensor([1e-30, 1.0]),
        torch.full((3,), 1e30),
        torch.full((4,), 1e-45),
        torch.tensor([1e4, 6e4]).half(),
        torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
    ],
)
def test_every_cost_is_a_positive_number(vector: Tensor) -> None:
    for state in ({"v": vector}, {"v": vector, "m": normal(4, 4)}, {"m": vector.reshape(1, -1)}):
        for weighted in data_free(state).values():
            assert 0 < weighted.sensitivity < float("inf")


def test_all_tensors_are_weighed() -> None:
    state = {"i": torch.arange(3), "e": torch.zeros(0, 3), "b": torch.tensor(True), "m": normal(2)}
    found = data_free(state)
    assert list(found) == list(state)
    assert all(found[name].value is value for name, value in state.items())
    assert data_free({}) == {}


@pytest.mark.parametrize("size", ["3%", "6%", "12%"])
@pytest.mark.parametrize("tiny", [1e-5, 1e-3, 0.05])
def test_a_running_variance_never_becomes_0(tiny: float, size: str) -> None:
    variance = normal(64, seed=3).abs() + 0.5
    variance[5] = tiny
    state = {"conv.weight": normal(64, 32, 3, 3), "bn.running_var": variance, "bn.bias": normal(64)}
    found = dither.compress(state, size)["bn.running_var"]
    assert bool((found > 0).all())
    assert float((found / variance).log2().abs().max()) < 1


def levels(archive: dither.Archive) -> dict[str, list[int]]:
    return {
        name: part.values.reshape(-1).tolist()
        for name in archive
        for part in archive.encoded(name).codes.values()
        if part.values.numel() > 1
    }


# Upwards, as storage in float16 is no option for small numbers; and at sizes where no two choices
# are so nearly equal that rounding, or the bytes of a step in the index, decides.
@pytest.mark.parametrize("scale", [2.0**10, 2.0**3])
@pytest.mark.parametrize("size", ["20%", "50%"])
def test_scale_does_not_matter(size: str, scale: float) -> None:
    one, other = (dither.compress(network(s), size) for s in (1.0, scale))
    assert levels(one) == levels(other)
    for name in one:
        assert torch.equal(one[name] * scale, other[name])


def test_scales_that_are_no_power_of_two_hardly_matter() -> None:
    # Steps are rounded to bfloat16, here to other neighbours, and the landing may pick others.
    one, other = (dither.compress(network(s), "10%") for s in (1.0, 1000.0))
    for name, entry in one.entries.items():
        assert other.entries[name].format == entry.format
        error = (one[name] * 1000 - other[name]).square().mean().sqrt()
        assert error < 2.5 * (one[name] - network()[name]).square().mean().sqrt() * 1000


@pytest.mark.parametrize("bits", [0.4, 0.6, 1.0, 2.0])
def test_nothing_is_dropped_while_others_could_be_coarser(bits: float) -> None:
    state = {f"fc{i}.weight": normal(60, 90, seed=i) * 10.0**-i for i in range(6)}
    archive = dither.compress(state, f"{bits} bits")
    assert all(bool(archive[name].any()) for name in state)


def test_a_sensitivity_of_ones_own() -> None:
    def favour(tensors: object) -> dict[str, Knowledge]:
        assert isinstance(tensors, dict)
        return {n: Knowledge(v, 1e6 if n == "a" else 1.0) for n, v in tensors.items()}

    state = {"a": normal(40, 50), "b": normal(40, 50, seed=1)}
    archive = dither.compress(state, "15%", sensitivity=favour)
    errors = {name: float((archive[name] - state[name]).square().mean()) for name in state}
    assert errors["a"] < 1e-3 * errors["b"]
    with pytest.raises(dither.SpecError, match=r"no value for \['b'\]"):
        dither.compress(state, "15%", sensitivity=lambda t: {"a": Knowledge(t["a"], 1.0)})


def test_matrices_bend_together_before_one_is_given_up() -> None:
    """As in a recurrent net at 24x: what seemed cheap was given up whole, and the net broke."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a.weight": torch.randn(256, 256, generator=generator),
        "b.weight": 0.02 * torch.randn(256, 256, generator=generator),
    }

    def left(dear: float) -> float:
        """The share of b that is left where an error in it costs that many times one in a."""

        def uneven(tensors: Mapping[str, Tensor]) -> dict[str, Knowledge]:
            return {n: Knowledge(v, dear if n == "b.weight" else 1.0) for n, v in tensors.items()}

        archive = dither.compress(weights, "28x", sensitivity=uneven)
        error = (archive["b.weight"] - weights["b.weight"]).square().sum()
        return 1 - float(error / weights["b.weight"].square().sum())

    shares = [left(dear) for dear in (90, 300, 900, 2000)]
    assert shares == sorted(shares)
    assert shares[1] > 1.4 * shares[0]
    assert shares[-1] > 0.5


def words(*, tied: bool, rows: int = 2048) -> dict[str, Tensor]:
    table = normal(rows, 16, seed=7)
    head = table if tied else normal(rows, 16, seed=8)
    blocks = {f"blocks.{n}.weight": normal(128, 128, seed=n) for n in range(4)}
    return {"embed.weight": table, **blocks, "out.weight": head}


@pytest.mark.parametrize(
    ("state", "heads"),
    [
        (words(tied=True), {"embed.weight"}),
        (words(tied=False), {"out.weight"}),
        (words(tied=True, rows=512), set()),  # no vocabulary
        ({k: v for k, v in words(tied=False).items() if k != "out.weight"}, set()),
        ({**words(tied=False), "out.weight": normal(4096, 16)}, set()),  # of other tokens
    ],
)
def test_output_layers_over_a_vocabulary_are_found(
    state: dict[str, Tensor], heads: set[str]
) -> None:
    tensors = collect(state)
    assert heads_of(tensors.values, tensors.aliases) == heads
    weights = Weights(tensors.values, tensors.stacks, heads=frozenset(heads))
    plain, found = data_free(dict(tensors.values)), data_free(weights)
    ratios = {n: found[n].sensitivity / plain[n].sensitivity for n in plain}
    assert ratios == {n: pytest.approx(HEAD if n in heads else 1.0) for n in plain}


def test_a_tied_table_gets_more_of_the_bytes() -> None:
    state = words(tied=True)
    alone = {name: value for name, value in state.items() if name != "out.weight"}
    tied, plain = (dither.compress(s, 12_000) for s in (state, alone))
    assert tied.entries["embed.weight"].nbytes > 1.2 * plain.entries["embed.weight"].nbytes
