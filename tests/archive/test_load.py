"""Archives are brought back tensor by tensor, in the type and to the place that are asked for."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dither
from dither import ArchiveError, SpecError
from dither.archive import Archive, limits, reader
from dither.testing import same_bits

LAYERS = 6


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(reader, "_WORTH_THREADS", 0)
    yield
    torch.set_num_threads(before)


def network() -> nn.Sequential:
    """Layers and a buffer of integers."""
    torch.manual_seed(0)
    layers = [nn.Linear(24, 24, dtype=torch.float64) for _ in range(LAYERS)]
    return nn.Sequential(*layers, nn.BatchNorm1d(24, dtype=torch.float64)).eval()


@pytest.fixture(scope="module")
def archive() -> Archive:
    return dither.compress(network(), "6x")


@pytest.fixture(scope="module")
def path(archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("load") / "model.dither"
    archive.save(found)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_floating_point_is_converted_and_nothing_else(path: Path, dtype: torch.dtype) -> None:
    plain, found = dither.load(path), dither.load(path, dtype=dtype)
    assert plain["0.weight"].dtype == torch.float64
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        wanted = value.to(dtype) if value.is_floating_point() else value
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name], wanted)


def test_tensors_go_where_they_are_asked_for(path: Path) -> None:
    assert {value.device.type for value in dither.load(path, device="meta").values()} == {"meta"}
    assert {value.device.type for value in dither.load(path).values()} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_a_type_that_would_lose_the_values_is_refused(path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(SpecError, match="no floating-point type"):
        dither.load(path, dtype=dtype)


class Counter:
    """How many of an archive's decoded tensors are in memory, and were at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.most, self.read = 0, 0, 0
        decode = Archive.__getitem__

        def counted(archive: Archive, name: str) -> Tensor:
            value = decode(archive, name)
            self.read, self.now = self.read + 1, self.now + 1
            self.most = max(self.most, self.now)
            weakref.finalize(value, self._gone)
            return value

        monkeypatch.setattr(Archive, "__getitem__", counted)

    def _gone(self) -> None:
        self.now -= 1


@pytest.mark.parametrize("meta", [False, True])
def test_a_model_is_filled_one_tensor_at_a_time(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, meta: bool
) -> None:
    model = network().float()  # so that even on the meta device what is decoded is not what is kept
    model = model.to("meta") if meta else model
    alive = Counter(monkeypatch)
    dither.load_into(model, archive, strict=False)
    integers = 1  # kept as it was decoded, where there was no memory
    assert alive.read == len(archive)
    assert alive.most <= 1 + integers * meta


def test_what_the_model_lacks_is_not_decoded(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = Counter(monkeypatch)
    found = dither.load_into(network()[:2], archive, strict=False)
    assert len(found.unexpected) == len(archive) - 4
    assert (alive.read, alive.most) == (4, 1)


def test_weights_in_another_type_are_converted_one_at_a_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = Counter(monkeypatch)
    dither.load(path, dtype=torch.float16)
    assert alive.most <= 2  # the one before, and the integers that are kept


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.usefixtures("threads")
def test_threads_change_no_value(archive: Archive, meta: bool) -> None:
    assert archive._side_by_side(archive.entries.values(), is_kept=False) == 3
    model = network().to("meta") if meta else network()
    dither.load_into(model, archive)
    torch.set_num_threads(1)
    assert all(torch.equal(v, archive[n]) for n, v in model.state_dict().items())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("meta", [False, True])
def test_of_names_that_the_model_ties_the_last_one_counts(meta: bool) -> None:
    states = {f"{i}.weight": torch.full((32, 32), float(i)) for i in range(LAYERS)}
    archive = dither.compress(states, "100%")
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(LAYERS)))
    for layer in model:
        layer.weight = model[0].weight
    if meta:
        model = model.to("meta")
        for layer in model:
            layer.weight = model[0].weight
    for _ in range(5):
        dither.load_into(model, archive)
        assert same_bits(model.get_parameter("0.weight"), states[f"{LAYERS - 1}.weight"])
        assert model[3].weight is model[0].weight


@pytest.mark.parametrize("name", ["0.weight", "3.weight", f"{LAYERS}.running_var"])
def test_a_damaged_file_changes_nothing(archive: Archive, name: str) -> None:
    data = bytearray(archive.to_bytes())
    part = max(archive.entries[name].parts, key=lambda part: part.length)
    data[part.offset + part.length // 2] ^= 16
    model = network()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ArchiveError, match=name):
        dither.load_into(model, Archive.from_bytes(bytes(data)))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.usefixtures("threads")
def test_as_many_side_by_side_as_memory_is_allowed_for(archive: Archive) -> None:
    entries = archive.entries.values()
    needs = sorted(map(limits.working_nbytes, entries))
    for count in (1, 2, 3):
        limited = Archive.from_bytes(archive.to_bytes(), sum(needs[-count:]))
        assert limited._side_by_side(entries, is_kept=False) == count
        dither.load_into(network(), limited)
