"""Compressing to a budget with a base: sizes, what is stored how, and that nothing is lost."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dither
from dither import BudgetError, SpecError
from dither.archive import Archive
from dither.search import Knowledge, data_free
from dither.testing import same_bits


def network(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of many kinds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "emb.weight": normal(2400, 16),
        "a.weight": normal(48, 64) / 8,
        "a.bias": normal(48) / 10,
        "conv.weight": normal(8, 6, 3, 3) / 7,
        "half.weight": (normal(32, 32) / 6).half(),
        "wide.weight": (normal(16, 16) / 6).double(),
        "norm.weight": 1 + normal(48) / 10,
        "norm.running_var": torch.rand(48, generator=generator) + 0.05,
        "norm.count": torch.tensor(100 + seed),
        "mask": normal(48) > 0,
    }


def tuned(base: dict[str, Tensor], share: float = 0.03) -> dict[str, Tensor]:
    """A little of noise of their own size in all floating-point tensors."""
    noise = network(1)
    return {
        name: (v + share * noise[name]).to(v.dtype) if v.is_floating_point() else noise[name]
        for name, v in base.items()
    }


def error(archive: Archive, wanted: dict[str, Tensor]) -> float:
    pairs = [
        (archive[name].double(), v.double()) for name, v in wanted.items() if v.is_floating_point()
    ]
    return sum(float((a - b).square().sum()) for a, b in pairs)


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    return network()


@pytest.mark.parametrize("size", [3_000, 9_000, 20_000, 60_000, 400_000])
def test_files_keep_to_their_size_and_are_nearer_than_without_a_base(
    base: dict[str, Tensor], size: int
) -> None:
    fine = tuned(base)
    archive = dither.compress(fine, size, base=base)
    full = archive.nbytes >= 0.985 * size or archive.nbytes >= size - 64
    lost = error(archive, fine)
    assert archive.nbytes <= size
    assert full or lost < 1e-6 * error(dither.compress(fine, 60_000, base=base), fine)
    try:
        whole = dither.compress(fine, size)
    except BudgetError:
        pass
    else:
        assert lost == 0 or lost < 0.1 * error(whole, fine)
    again = Archive.from_bytes(archive.to_bytes(), base=dict(reversed(base.items())))
    assert all(same_bits(again[name], archive[name]) for name in fine)
    assert all(again[n].dtype == v.dtype and again[n].shape == v.shape for n, v in fine.items())
    assert all(same_bits(again[n], v) for n, v in fine.items() if not v.is_floating_point())


def test_what_is_equal_takes_no_codes_and_what_the_base_lacks_is_stored_whole(
    base: dict[str, Tensor],
) -> None:
    fine = tuned(base)
    equal = ("a.weight", "norm.count", "mask", "half.weight")
    fine |= {name: base[name].clone() for name in equal}
    fine["conv.weight"] = torch.randn(5, 6, 3, 3)
    fine["head.weight"] = torch.randn(2, 16)
    fine["tied.weight"] = fine["a.weight"]
    fine["a.bias"] = base["a.bias"].flip(0)  # no nearer to it than to zero
    archive = dither.compress(fine, 30_000, base=base)
    entries = archive.entries
    assert all(entries[name].on_base and not entries[name].parts for name in equal)
    assert all(same_bits(archive[name], fine[name]) for name in (*equal, "tied.weight"))
    assert archive.aliases == {"tied.weight": "a.weight"}
    whole = ("conv.weight", "head.weight", "a.bias")
    assert not any(entries[name].on_base for name in whole)
    assert {n for n, e in entries.items() if e.on_base and e.parts} == {
        n for n in base if n not in {*whole, *equal}
    }


def test_a_model_that_is_its_base_takes_names_only(base: dict[str, Tensor]) -> None:
    archive = dither.compress(base, 5_000, base=base)
    assert archive.nbytes < 600
    assert all(same_bits(archive[name], value) for name, value in base.items())
    with pytest.raises(BudgetError, match="impossible"):
        dither.compress(base, 50, base=base)


def test_rows_that_did_not_change_stay_as_they_are(base: dict[str, Tensor]) -> None:
    fine = tuned(base)
    fine["emb.weight"][7:2000] = base["emb.weight"][7:2000]
    fine["a.weight"][4] = base["a.weight"][4] = 0.0
    archive = dither.compress(fine, 9_000, base=base)
    assert same_bits(archive["emb.weight"][7:2000], base["emb.weight"][7:2000])
    assert same_bits(archive["a.weight"][4], torch.zeros(64))


@pytest.mark.parametrize("size", [2_600, 4_000, 20_000])
def test_variances_stay_above_half_of_what_they_were(base: dict[str, Tensor], size: int) -> None:
    fine = tuned(base)
    small = torch.logspace(-6, 0, 48)
    fine["norm.running_var"] = small
    archive = dither.compress(fine, size, base=base)
    assert bool((archive["norm.running_var"] >= 0.49 * small).all())


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, 3e38])
def test_what_no_difference_holds_is_stored_whole(base: dict[str, Tensor], odd: float) -> None:
    fine, own = tuned(base), dict(base)
    fine["a.weight"][0, 0] = odd
    own["a.weight"] = -base["a.weight"]
    own["a.weight"][0, 0] = -odd
    archive = dither.compress(fine, 40_000, base=own)
    assert not archive.entries["a.weight"].on_base
    found = archive["a.weight"][0, 0]
    assert torch.equal(found, fine["a.weight"][0, 0]) or found.isnan() or abs(found) > 2.9e38


def test_a_base_of_another_type_and_one_that_is_a_file(
    base: dict[str, Tensor], tmp_path: Path
) -> None:
    short = {n: v.bfloat16() if v.dtype == torch.float32 else v for n, v in base.items()}
    save_file(short, tmp_path / "base.safetensors")
    fine = tuned(base)
    one = dither.compress(fine, 20_000, base=tmp_path / "base.safetensors")
    assert one.to_bytes() == dither.compress(fine, 20_000, base=short).to_bytes()
    assert one.entries["a.weight"].on_base
    small = dither.compress(base, 40_000)
    small.save(tmp_path / "base.dither")
    two = dither.compress(fine, 20_000, base=tmp_path / "base.dither")
    assert error(two, fine) < 0.5 * error(dither.compress(fine, 20_000), fine)
    assert two.to_bytes() == dither.compress(fine, 20_000, base=small.state_dict()).to_bytes()


def test_data_serve_sensitivities_and_what_is_shipped_is_what_was_evaluated() -> None:
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(12, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3))
    model = nn.Sequential(nn.Linear(12, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3))
    model.load_state_dict({n: v.clone() for n, v in before.state_dict().items()})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batches, seen = list(torch.randn(4, 64, 12)), []

    def score(found: nn.Module) -> float:
        seen.append({n: v.clone() for n, v in found.state_dict().items()})
        return -float((found(batches[0]) - model(batches[0])).square().mean())

    archive = dither.compress(model.eval(), 900, base=before, data=batches, evaluate=score)
    stages = [str(getattr(trial, "stage", "")) for trial in archive.trials]
    assert stages == ["data-free", "calibrated"]
    kept = [n for n, trial in enumerate(archive.trials) if getattr(trial, "kept", False)][-1]
    assert archive.nbytes <= 900
    assert all(same_bits(archive[name], value) for name, value in seen[kept].items())
    with pytest.raises(SpecError, match="activations"):
        dither.compress(model, 900, base=before, data=batches, activations="int8")


def test_a_sensitivity_that_changes_the_weights_is_refused(base: dict[str, Tensor]) -> None:
    def pruned(tensors: Mapping[str, Tensor]) -> dict[str, Knowledge]:
        found = dict(data_free(tensors))
        some = found["a.weight"]
        small = some.value.abs() < some.value.abs().median()
        found["a.weight"] = replace(some, value=some.value.masked_fill(small, 0.0))
        return found

    with pytest.raises(SpecError, match=r"changes 'a\.weight'"):
        dither.compress(tuned(base), 9_000, base=base, sensitivity=pruned)


def test_where_no_base_goes_that_is_said(base: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"base=\.\.\.\)\.save"):
        dither.compress_to(tmp_path / "a.dither", base, 9_000, base=base)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bass'"):
        dither.compress(base, 9_000, bass=base)  # type: ignore[call-arg]
    attached = nn.Linear(4, 4)
    dither.attach(attached, budget=400, steps=1)
    with pytest.raises(SpecError, match="attached to a run"):
        dither.compress(base, 9_000, base=attached)
