"""What long work says of itself: what is done, to which tensor, and how long it takes."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dither
from dither import progress
from dither.calibrate import collect
from dither.progress import Step, hooked, listening, part_of, report, steps


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5)]
    return nn.Sequential(*layers).eval()


def batches() -> list[Tensor]:
    return list(torch.randn(6, 32, 24, generator=torch.Generator().manual_seed(1)))


def heard(work: Callable[[], object]) -> list[Step]:
    found: list[Step] = []
    with listening(found.append):
        work()
    return found


def rises(found: list[Step]) -> bool:
    """Whether shares of a stage rise, from one report to the next."""
    pairs = itertools.pairwise(found)
    same = [(a, b) for a, b in pairs if (a.way, a.stage) == (b.way, b.stage)]
    return all(0 <= a.share <= b.share <= 1 for a, b in same)


def test_compressing_without_data_names_every_tensor() -> None:
    found = heard(lambda: dither.compress(network(), "8x"))
    names = set(network().state_dict())
    for stage in ("predicting", "encoding, pass 1"):
        own = [step for step in found if step.stage == stage]
        assert {step.item for step in own} == names
        assert rises(own)
        assert own[-1].share == 1
    assert {step.way for step in found} == {""}


def test_compressing_with_data_says_what_is_tried() -> None:
    trials: list[object] = []

    def work() -> None:
        trials.extend(dither.compress(network(), "8x", data=batches()).trials)

    found = heard(work)
    tried = {trial.stage for trial in trials}  # type: ignore[attr-defined]
    assert {"data-free", "calibrated", "calibrated, in sequence"} <= tried
    assert {step.way for step in found} == tried | {""}
    by_way = {way: {s.stage for s in found if s.way == way} for way in tried}
    assert all("comparing outputs" in by_way[way] for way in tried if not way.endswith("anew"))
    assert {"reading samples", "predicting", "encoding, pass 1"} <= by_way["calibrated"]
    assert "running the model" in {step.stage for step in found if not step.way}
    weights = {f"{i}.weight" for i in (0, 2, 4)}
    for stage in ("encoding in sequence, to learn", "encoding in sequence"):
        own = [s for s in found if s.way == "calibrated, in sequence" and s.stage == stage]
        assert {step.item for step in own if step.item} == weights
        assert own[-1].share == 1


@pytest.mark.parametrize(
    ("stage", "work"),
    [
        ("decoding", dither.load),
        ("decoding", lambda path: dither.load_into(network(), path)),
        ("checking", dither.verify),
        ("probing", lambda path: dither.plan(path, "8x")),
    ],
)
def test_reading_names_tensors(stage: str, work: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "m.dither"
    dither.compress(network(), "6x").save(path)
    found = [step for step in heard(lambda: work(path)) if step.stage == stage]
    assert {step.item for step in found} & set(network().state_dict())
    assert rises(found)
    assert found[-1].share == 1


@pytest.mark.parametrize("sized", [True, False])
def test_passes_over_samples(sized: bool) -> None:
    class Stream:
        def __iter__(self) -> Iterator[Tensor]:
            return iter(batches())

    found = heard(lambda: collect(network(), batches() if sized else Stream()))
    assert len(found) == 6
    assert [step.share for step in found] == ([i / 6 for i in range(6)] if sized else [0.0] * 6)


def test_no_listener_changes_nothing_and_takes_no_items() -> None:
    drawn: list[int] = []

    def draw() -> Iterator[int]:
        for i in range(3):
            drawn.append(i)
            yield i

    assert next(iter(steps("any", draw()))) == 0
    assert drawn == [0]
    plain = dither.compress(network(), "8x").to_bytes()
    with listening(lambda _: None):
        assert dither.compress(network(), "8x").to_bytes() == plain


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_the_time_left_is_what_it_will_take_at_the_speed_so_far(clock: Clock) -> None:
    found: list[Step] = []
    costs = {"small": 5.0, "large": 80.0, "other": 15.0}
    with listening(found.append):
        for name in steps("encoding", costs, costs.__getitem__):
            clock.now += costs[name]
    assert [step.left for step in found] == [None, pytest.approx(95), pytest.approx(15), 0]


def test_each_stage_has_its_own_speed(clock: Clock) -> None:
    found: list[Step] = []
    with listening(found.append):
        for way, seconds in (("one", 100.0), ("other", 10.0)):
            with part_of(way):
                report("encoding", 0.0)
                clock.now += seconds
                report("encoding", 0.5)
        report("encoding", 0.0)  # the same again, from its beginning
        clock.now += 4
        report("encoding", 0.25)
    assert [step.left for step in found] == [None, 100, None, 10, None, 12]


def test_nothing_is_said_of_time_as_long_as_it_is_not_known(clock: Clock) -> None:
    found: list[Step] = []
    with listening(found.append):
        report("encoding", 0.0)
        clock.now += 1.9
        report("encoding", 0.4)
        report("writing", 0.0)
        clock.now += 60
        report("writing", 0.02)
    assert [step.left for step in found] == [None] * 4


def test_a_hook_hears_words_and_a_share_and_the_one_around_it_does_not() -> None:
    outer: list[Step] = []
    inner: list[tuple[str, float]] = []
    with listening(outer.append):
        with hooked(lambda what, share: inner.append((what, share))), part_of("way"):
            report("encoding", 0.5, "w")
        with hooked(None):
            report("writing", 1.0)
    assert inner == [("way: encoding w", 0.5)]
    assert [str(step) for step in outer] == ["writing, 100 %"]


def test_a_hook_may_report_to_the_one_around_it() -> None:
    outer: list[Step] = []
    with listening(outer.append), hooked(report):
        report("encoding", 0.5, "w")
    assert [str(step) for step in outer] == ["encoding w, 50 %"]


def test_a_way_ends_with_its_block_whatever_happens() -> None:
    found: list[Step] = []
    with listening(found.append):
        with pytest.raises(KeyError), part_of("one"):
            raise KeyError
        report("encoding", 0.0)
    assert found[0].way == ""
