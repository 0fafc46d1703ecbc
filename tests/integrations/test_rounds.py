"""Models that change from round to round: both ends have the same, whatever was lost on the way."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dither import ArchiveError
from dither.archive import content_hash
from dither.integrations.rounds import Line, follow, moved, update, updated, whole
from dither.testing import same_bits


def model(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(8, 3, 5, 5, generator=generator) / 9,
        "fc.weight": torch.randn(40, 60, generator=generator) / 8,
        "fc.bias": torch.randn(40, generator=generator) / 10,
        "norm.count": torch.tensor(seed),
    }


def later(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    other = model(seed)
    return {n: v + other[n] / 20 if v.is_floating_point() else other[n] for n, v in state.items()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    floats = [n for n, v in one.items() if v.is_floating_point()]
    return sum(float((one[n] - other[n]).square().sum()) for n in floats)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[n], other[n]) for n in one)


@pytest.mark.parametrize("first", [None, "4kB"])
def test_receivers_have_the_sender_s_model_whatever_they_had(first: str | None) -> None:
    line, wanted, seen = Line("1kB", first), model(), []
    for number in range(4):
        sent = line.advance(wanted)
        assert len(line.files) == number + 1
        assert line.advance(wanted) is sent  # nothing new
        seen.append((line.digest, sent))
        for digest, held in [(None, None), ("0" * 64, None), *seen]:
            files = line.since(digest)
            assert equal(follow(held, files, line.digest), sent)
        assert line.since(line.digest) == []
        wanted = later(wanted, number + 1)
    assert all(len(data) <= 1000 for data in list(line.files.values())[1:])
    assert first is not None or equal(seen[0][1], model())


def test_who_lacks_more_than_the_whole_gets_the_whole() -> None:
    line = Line("6kB", "6kB")
    wanted = model()
    for number in range(4):
        line.advance(wanted)
        wanted = later(wanted, number + 1)
    assert line.model is not None
    (data,) = line.since(None)
    assert data == whole(line.model).to_bytes()
    assert equal(follow(None, [data], line.digest), line.model)
    assert len(line.since(list(line.files)[2])) == 1


def test_what_a_file_loses_the_next_makes_up_for() -> None:
    line, wanted = Line("900", None), model()
    line.advance(wanted)
    wanted = later(wanted, 1)
    far = [distance(line.advance(wanted), wanted)]
    for _ in range(5):
        sent = line.model
        assert sent is not None
        wanted = moved(wanted, sent, sent)  # nobody changed anything
        line._wanted = ""
        far.append(distance(line.advance(wanted), wanted))
    assert far[-1] < 0.2 * far[0]
    assert far == sorted(far, reverse=True)


def test_a_sender_that_was_killed_goes_on(tmp_path: Path) -> None:
    line, wanted = Line("1kB"), model()
    for number in range(3):
        line.advance(wanted)
        line.save(tmp_path)
        wanted = later(wanted, number)
    again = Line("1kB")
    again.load(tmp_path)
    assert again.files == line.files
    assert again.model is not None
    assert line.model is not None
    assert equal(again.model, line.model)
    assert equal(again.advance(wanted), line.advance(wanted))
    (tmp_path / "1.dither").write_bytes((tmp_path / "1.dither").read_bytes()[:-9])
    with pytest.raises(ArchiveError):
        Line("1kB").load(tmp_path)


def test_updates_rest_on_the_round_s_model_and_keep_to_their_size() -> None:
    before, after = model(), later(model(), 1)
    data = update(before, after, "2kB")
    assert len(data) <= 2000
    found = updated(before, data)
    assert distance(found, after) < 0.3 * distance(before, after)
    assert same_bits(found["norm.count"], after["norm.count"])
    with pytest.raises(ArchiveError, match=content_hash(before)):
        updated(after, data)


def test_files_that_are_damaged_or_not_what_they_should_be_are_refused() -> None:
    before, after = model(), later(model(), 1)
    data = update(before, after, "2kB")
    for position in range(0, len(data), 37):
        broken = bytearray(data)
        broken[position] ^= 16
        with pytest.raises(ArchiveError):
            updated(before, bytes(broken))
    bad = [
        {n: v for n, v in after.items() if n != "fc.bias"},
        {**after, "more": torch.ones(3)},
        {**after, "fc.bias": torch.ones(41)},
        {**after, "fc.bias": after["fc.bias"].double()},
        {**after, "fc.bias": torch.full((40,), torch.nan)},
    ]
    for state in bad:
        with pytest.raises(ArchiveError, match=r"other tensors|not finite"):
            updated(before, update(before, state, "9kB"))
    with pytest.raises(ArchiveError, match="is not here"):
        follow(None, [data], "0" * 64)
    with pytest.raises(ArchiveError, match="make the model"):
        follow(before, [data], "0" * 64)
    with pytest.raises(ArchiveError, match="make the model none"):
        follow(None, [], "0" * 64)
