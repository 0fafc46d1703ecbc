"""Flower's own processes: a server, clients that reach it over loopback, and its engine on Ray.

All compute what a plain loop computes, bit for bit.
"""

import json
from pathlib import Path

import pytest
from torch import Tensor

pytest.importorskip("flwr", reason="NEEDS FLOWER: make test-federated")
pytest.importorskip("sklearn")

from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from benchmarks.federation.federation import app
from benchmarks.loopback import Loopback, until
from dither.archive import Archive
from dither.integrations.rounds import Line, State, moved, update, updated
from dither.testing import same_bits

pytestmark = pytest.mark.slow
CLIENTS, ROUNDS = 2, 2


@pytest.fixture(scope="module")
def wanted() -> State:
    """The server's model after all rounds, by a loop without Flower's processes."""
    model, line = dict(app.network().state_dict()), Line(app.DOWN)
    for _ in range(ROUNDS):
        sent, replies = line.advance(model), []
        for number in range(CLIENTS):
            after, count, _ = app.trained(sent, number, CLIENTS)
            replies.append((update(sent, after, app.UP), count))
        records = [
            RecordDict(
                {
                    "arrays": ArrayRecord(updated(sent, data)),
                    "metrics": MetricRecord({"num-examples": count}),
                }
            )
            for data, count in sorted(replies)
        ]
        mean = aggregate_arrayrecords(records, "num-examples").to_torch_state_dict()
        model = moved(model, sent, mean)
    return model


def check(federation: Loopback, wanted: State, full: dict[int, int]) -> None:
    """The model is the wanted one, and files kept to their sizes.

    Args:
        full: clients that got the whole model, by round.
    """
    with Archive.open(federation.out / "server.dither") as kept:
        found: dict[str, Tensor] = kept.state_dict()
        traffic = kept.metadata["traffic"]
    assert found.keys() == wanted.keys()
    assert all(same_bits(found[name], value) for name, value in wanted.items())
    assert [one["round"] for one in traffic] == list(range(1, ROUNDS + 1))
    whole = sum(value.nbytes for value in wanted.values())
    for one in traffic:
        assert (one["clients"], one["refused"], one["failed"]) == (CLIENTS, 0, 0)
        assert 0 < one["up"] <= 20_000 * CLIENTS
        times = full.get(one["round"], 0)
        assert one["down"] <= times * (whole + 60_000) + (CLIENTS - times) * 30_000


def noted(federation: Loopback, round_: int, what: str) -> bool:
    path = federation.out / "notes.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return any((n["round"], n["what"]) == (round_, what) for n in map(json.loads, lines))


def test_processes_over_loopback_and_a_server_that_is_killed_in_a_round(
    tmp_path: Path, wanted: State
) -> None:
    with Loopback(tmp_path, CLIENTS) as federation:
        federation.run(ROUNDS)
        until(lambda: noted(federation, 2, "begins"), "round 2 does not begin")
        federation.kill_server()
        assert not (federation.out / "done").exists()
        federation.serve()
        federation.run(ROUNDS)
        federation.wait()
        check(federation, wanted, {1: CLIENTS, 2: CLIENTS})


def test_simulation_engine_on_ray(tmp_path: Path, wanted: State) -> None:
    pytest.importorskip("ray", reason="NEEDS RAY: Flower's simulation engine runs on it")
    with Loopback(tmp_path, CLIENTS, simulated=True) as federation:
        federation.run(ROUNDS)
        federation.wait()
        check(federation, wanted, {1: CLIENTS})
