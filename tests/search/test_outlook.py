"""What `plan` predicts is what `compress` then does."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.core import BudgetError, SpecError
from dither.search import Knowledge
from dither.search.outlook import kind_of


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "emb.weight": normal(4096, 16) * torch.linspace(0.1, 2, 16),
        "conv.weight": normal(32, 16, 3, 3),
        "fc.weight": 0.02 * normal(300, 200),
        "fc.bias": normal(300),
        "ids": torch.arange(512),
        "broken": torch.full((8, 8), torch.nan),
    }


@pytest.mark.parametrize("size", ["4x", "8x", "20x", "3.2 bits", 60_000])
def test_bytes_are_those_of_compress(size: int | str) -> None:
    found = dither.plan(tensors(), [size]).sizes[0]
    archive = dither.compress(tensors(), size)
    assert found.is_reachable
    assert found.nbytes == pytest.approx(archive.nbytes, rel=0.02)
    assert found.bits == pytest.approx(
        8 * archive.nbytes / sum(map(Tensor.numel, tensors().values())), rel=0.02
    )
    kinds: Counter[str] = Counter()
    for name, entry in archive.entries.items():
        kinds[KINDS[name]] += entry.nbytes
    for kind, nbytes in kinds.items():
        assert found.kinds[kind] == pytest.approx(nbytes, abs=0.04 * archive.nbytes), kind


KINDS = {
    "emb.weight": "token tables",
    "conv.weight": "convolutions",
    "fc.weight": "matrices",
    "fc.bias": "vectors",
    "ids": "kept exactly",
    "broken": "kept exactly",
}


def test_fewer_bytes_lose_more() -> None:
    rows = dither.plan(tensors(), ["30x", "4x", "8x"]).sizes
    assert [row.size for row in rows] == ["30x", "4x", "8x"]
    by_size = sorted(rows, key=lambda row: -row.budget)
    assert by_size[0].loss < by_size[1].loss < by_size[2].loss
    assert by_size[0].snr > by_size[1].snr + 10
    assert not by_size[0].erased


def test_the_snr_is_what_decoded_tensors_have() -> None:
    weights = {"a": torch.randn(256, 256), "b": 5 * torch.randn(128, 256)}
    found = dither.plan(weights, ["8x"]).sizes[0]
    archive = dither.compress(weights, "8x")
    total = 0.0
    for name, value in weights.items():
        noise = (archive[name] - value).square().sum()
        total += value.numel() * 10 * math.log10(float(value.square().sum() / noise))
    # Errors are fed on to where inputs rarely go, which costs some plain error.
    assert found.snr == pytest.approx(total / (3 * 128 * 256), abs=1.5)


def test_the_smallest_size_and_what_is_kept_exactly() -> None:
    found = dither.plan(tensors(), ["1kB"])
    assert not found.sizes[0].is_reachable
    with pytest.raises(BudgetError) as refused:
        dither.compress(tensors(), "1kB")
    assert found.smallest == pytest.approx(refused.value.smallest, rel=0.2)
    assert found.exact.keys() == {"ids", "broken"}
    assert "NaN" in found.exact["broken"]
    assert found.values == sum(map(Tensor.numel, tensors().values()))


def test_a_model_and_its_weights_are_planned_alike() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    left, right = (dither.plan(source, ["6x"]) for source in (model, model.state_dict()))
    assert left.sizes == right.sizes


@pytest.mark.parametrize("sizes", [[], ["9 parsecs"], [6.5], ["0x"]])
def test_no_such_sizes(sizes: list[int | str]) -> None:
    with pytest.raises(BudgetError):
        dither.plan(tensors(), sizes)


def test_an_attached_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    dither.attach(model, {"*": dither.LSQ(4)})
    with pytest.raises(SpecError, match="plan"):
        dither.plan(model)


def test_nothing_to_round(tmp_path: Path) -> None:
    found = dither.plan({"ids": torch.arange(100)}, ["100%"])
    assert found.sizes[0].loss == 0
    assert found.sizes[0].erased == ()
    assert kind_of(Knowledge(torch.arange(100), 1.0)) == "kept exactly"
