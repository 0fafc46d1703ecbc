"""Threads do nothing more once whoever waits for them has stopped."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

import dither
from dither.archive import Archive, reader
from dither.progress import hooked
from dither.search.coder import Coder
from dither.search.forecast import Forecast
from dither.search.knowledge import Knowledge
from dither.search.ladder import Ladder
from dither.threads import Room, side_by_side


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(reader, "_WORTH_THREADS", 0)
    yield
    torch.set_num_threads(before)


def tensors(count: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {f"w{i:02}": torch.randn(64, 64, generator=draw) for i in range(count)}


def stop_at(stage: str) -> Callable[[str, float], None]:
    def hook(what: str, share: float) -> None:
        if what.startswith(stage):
            raise KeyboardInterrupt

    return hook


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_order(count: int) -> None:
    with side_by_side(lambda i: i * i, range(20), count) as found:
        assert list(found) == [i * i for i in range(20)]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_operations_take_one_thread_in_there_and_as_many_as_before_elsewhere(count: int) -> None:
    elsewhere: list[int] = []

    def note() -> None:
        elsewhere.append(torch.get_num_threads())

    with side_by_side(lambda _: torch.get_num_threads(), range(20), count) as found:
        other = threading.Thread(target=note)
        other.start()
        other.join()
        assert set(found) == {1}
        assert torch.get_num_threads() == 2
    other = threading.Thread(target=note)
    other.start()
    other.join()
    assert elsewhere == [2, 2]


def test_what_is_queued_is_not_begun_after_an_error() -> None:
    begun: list[int] = []
    gate = threading.Event()

    def work(i: int) -> int:
        begun.append(i)
        if i:
            gate.wait(10)
        return i

    def stop() -> None:
        with side_by_side(work, range(50), 2) as found:
            assert next(found) == 0
            gate.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert len(begun) < 40


def counted(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[int]:
    """As many numbers as a method of a class was called since."""
    calls: list[int] = []
    method = getattr(owner, name)

    def noted(*args: object) -> object:
        calls.append(1)
        return method(*args)

    is_static = isinstance(owner.__dict__[name], staticmethod | classmethod)
    monkeypatch.setattr(owner, name, staticmethod(noted) if is_static else noted)
    return calls


@pytest.mark.parametrize(
    ("stage", "owner", "name"),
    [
        ("predicting", Ladder, "of"),
        ("encoding, pass 1", Forecast, "code"),
    ],
)
def test_compressing_stops_where_it_is(
    stage: str, owner: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch, owner, name)
    with pytest.raises(KeyboardInterrupt):
        dither.compress(tensors(60), "8x", progress=stop_at(stage))
    assert 1 <= len(calls) < 30


def test_loading_stops_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    archive = dither.compress(tensors(60), "8x")
    calls = counted(monkeypatch, Archive, "__getitem__")
    with pytest.raises(KeyboardInterrupt), hooked(stop_at("decoding")):
        archive.state_dict()
    assert 1 <= len(calls) < 30


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [9, 1, 9, 1, 4, 6], [12, 12], [10, 1, 1, 30, 1]])
def test_room_holds_what_fits_or_one_that_does_not(sizes: list[int]) -> None:
    room, held, seen, lock = Room(10), 0, [], threading.Lock()

    def work(size: int) -> None:
        nonlocal held
        with room.for_some(size):
            with lock:
                held += size
                seen.append(held)
            threading.Event().wait(0.005)
            with lock:
                held -= size

    with side_by_side(work, sizes, 4) as done:
        assert len(list(done)) == len(sizes)
    assert all(most <= 10 or most in sizes for most in seen)
    assert held == 0


def test_large_tensors_are_worked_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that each wait for the other to begin: one after another they would wait for ever."""
    both, ladder = threading.Barrier(2), Coder.ladder

    def wait(self: Coder, known: Knowledge) -> Ladder:
        both.wait(30)
        return ladder(self, known)

    monkeypatch.setattr(Coder, "ladder", wait)
    large = {name: torch.zeros(1 << 11, (1 << 10) + 1) for name in "ab"}
    known = {name: Knowledge(value, 1.0) for name, value in large.items()}
    assert set(Forecast(known).ladders()) == {"a", "b"}
