"""Ways to compress that are asked for by name: zeros first, products of matrices."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dither.archive import load
from dither.formats import Factors
from tests.test_cli import dither_, good


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(96, 4, generator=generator) @ torch.randn(4, 160, generator=generator)
    weights = {
        "low.weight": low / 2,
        "full.weight": torch.randn(64, 64, generator=generator),
        "full.bias": torch.randn(64, generator=generator),
    }
    save_file(weights, "model.safetensors")


def zeros(value: Tensor) -> int:
    return int((value == 0).sum())


@pytest.mark.parametrize("share", ["0.7", "70%"])
def test_prune_a_share(share: str) -> None:
    document = good("compress", "model.safetensors", "--size", "10x", "--prune", share)
    found = load("model.dither")
    assert Path("model.dither").stat().st_size <= document["budget"]
    matrices = [found["low.weight"], found["full.weight"]]
    assert sum(map(zeros, matrices)) >= 0.7 * sum(m.numel() for m in matrices)
    assert zeros(found["full.bias"]) < 32


def test_prune_by_a_pattern_into_a_file_that_is_named() -> None:
    good("compress", "model.safetensors", "--size", "8x", "--prune", "1:4", "-o", "some.dither")
    for name in ("low.weight", "full.weight"):
        assert int((load("some.dither")[name].reshape(-1, 4) != 0).sum(1).max()) <= 1


def test_factors_where_they_pay() -> None:
    def kinds(*options: str) -> list[bool]:
        document = good("compress", "model.safetensors", "--size", "14x", *options)
        assert Path("model.dither").stat().st_size <= document["budget"]
        return [t["format"].startswith(Factors.name) for t in document["tensors"]]

    assert sum(kinds("--factors")) == 1
    assert sum(kinds()) == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--prune", "1.5"], "above 0 and below 1"),
        (["--prune", "90"], "above 0 and below 1"),
        (["--prune", "0"], "above 0 and below 1"),
        (["--prune", "4:4"], "n < m"),
        (["--prune", "most"], "n:m as 2:4"),
        (["--prune", "nan"], "above 0 and below 1"),
        (["--prune", "0.5", "--factors"], "exclude each other"),
        (["--prune", "0.5", "--data", "lines.txt"], "work without --data"),
        (["--factors", "--data", "lines.txt"], "work without --data"),
    ],
)
def test_refusals(options: list[str], text: str) -> None:
    result = dither_("compress", "model.safetensors", "--size", "8x", *options)
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.replace("│", " ").split())
    assert not Path("model.dither").exists()


def test_nothing_to_prune() -> None:
    save_file({"bias": torch.randn(500)}, "vectors.safetensors")
    result = dither_("compress", "vectors.safetensors", "--size", "2x", "--prune", "0.5")
    assert result.exit_code == 2
    assert "no matrix" in result.stderr
