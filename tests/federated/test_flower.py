"""Federated averaging in Flower's simulation engine, with archives for messages.

Flower's requirements clash with those of other tools: `make test-federated` makes an environment.
"""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

flwr = pytest.importorskip("flwr", reason="NEEDS FLOWER: make test-federated")

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.server.superlink.fleet.vce.backend import Backend  # noqa: E402
from flwr.serverapp import ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAdam, FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402

from dither.archive import Archive, content_hash  # noqa: E402
from dither.integrations.flower import Archives, archives_mod  # noqa: E402
from dither.testing import same_bits  # noqa: E402

pytestmark = pytest.mark.slow
CLIENTS, ENGINE = 3, "in this process"
SEEN: dict[str, Any] = {}


class InThisProcess(Backend):  # type: ignore[misc]
    """Runs clients in the engine's own thread: Flower's default backend starts Ray."""

    def build(self, app_fn: Callable[[], ClientApp]) -> None:
        self._app = app_fn

    @property
    def num_workers(self) -> int:
        return 1

    def is_worker_idle(self) -> bool:
        return True

    def terminate(self) -> None:
        pass

    def process_message(self, message: Message, context: Any) -> tuple[Message, Any]:
        return self._app()(message=message, context=context), context


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "flwr.server.superlink.fleet.vce.backend.raybackend"
    module = types.ModuleType(name)
    module.RayBackend = InThisProcess  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    SEEN.clear()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 3))


def samples(client: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(client)
    inputs = torch.randn(96, 12, generator=generator)
    return inputs, (inputs[:, :3] * inputs[:, 3:6]).argmax(1)


def train(state: dict[str, Tensor], client: int) -> tuple[dict[str, Tensor], float]:
    model = network()
    model.load_state_dict(state)
    inputs, labels = samples(client)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
    return model.state_dict(), float(loss.detach())


def client(*mods: Any) -> ClientApp:
    app = ClientApp(mods=[*mods])

    @app.train()  # type: ignore[untyped-decorator]
    def fit(message: Message, context: Any) -> Message:
        number = int(context.node_config["partition-id"])
        got = message.content["arrays"].to_torch_state_dict()
        SEEN.setdefault("got", []).append((number, content_hash(got)))
        if number == SEEN.get("dies"):
            raise RuntimeError("this client dies")
        state, loss = train(got, number)
        SEEN.setdefault("gave", []).append((number, state))
        metrics = MetricRecord({"num-examples": 96, "loss": loss})
        return Message(
            RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message
        )

    @app.evaluate()  # type: ignore[untyped-decorator]
    def score(message: Message, context: Any) -> Message:
        state = message.content["arrays"].to_torch_state_dict()
        SEEN.setdefault("scored", []).append(content_hash(state))
        metrics = MetricRecord({"num-examples": 96})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def federate(
    strategy: Any, app: ClientApp, rounds: int, initial: ArrayRecord | None = None
) -> dict[str, Tensor]:
    server, found = ServerApp(), []

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, context: Any) -> None:
        arrays = initial or ArrayRecord(network().state_dict())
        found.append(strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds))

    run_simulation(server_app=server, client_app=app, num_supernodes=CLIENTS, backend_name=ENGINE)
    state: dict[str, Tensor] = found[0].arrays.to_torch_state_dict()
    return state


def averaging(kind: type[FedAvg] = FedAvg, *, evaluate: float = 0.0) -> FedAvg:
    few = {"min_train_nodes": CLIENTS, "min_available_nodes": CLIENTS}
    return kind(fraction_evaluate=evaluate, min_evaluate_nodes=CLIENTS, **few)


@pytest.mark.parametrize("kind", [FedAvg, FedAdam])
def test_messages_keep_to_their_size_and_both_ends_have_the_same(kind: type[FedAvg]) -> None:
    strategy = Archives(averaging(kind), down="1500", up="900")
    final = federate(strategy, client(archives_mod), 4)
    line = list(strategy._line.files)
    got = SEEN["got"]
    assert len(got) == 4 * CLIENTS
    for number in range(4):  # all clients train from the file of their round
        assert {digest for _, digest in got[number * CLIENTS : (number + 1) * CLIENTS]} == {
            line[number]
        }
    nbytes = sum(value.nbytes for value in network().state_dict().values())
    for traffic in strategy.traffic:
        assert traffic.clients == CLIENTS
        assert (traffic.refused, traffic.failed) == (0, 0)
        assert traffic.up <= 900 * CLIENTS
        assert traffic.down <= (nbytes + 1000 if traffic.round == 1 else 1500) * CLIENTS
        assert 0 < traffic.messages_down - traffic.down < 500 * CLIENTS
        assert 0 < traffic.messages_up - traffic.up < 500 * CLIENTS
    assert strategy.model is not None
    assert all(same_bits(final[name], value) for name, value in strategy.model.items())


def test_large_files_give_what_flower_gives_without_us() -> None:
    plain = federate(averaging(), client(), 3)
    strategy = Archives(averaging(), down="1MB", up="1MB")
    ours = federate(strategy, client(archives_mod), 3)
    assert plain.keys() == ours.keys()
    for name, value in plain.items():
        torch.testing.assert_close(ours[name].to(value.dtype), value, rtol=1e-5, atol=1e-6)


def test_evaluation_brings_the_model_that_training_then_has() -> None:
    strategy = Archives(averaging(evaluate=1.0), down="1500", up="900")
    federate(strategy, client(archives_mod), 3)
    line = list(strategy._line.files)
    assert SEEN["scored"] == [digest for digest in line[1:] for _ in range(CLIENTS)]
    assert all(traffic.down <= 1500 * CLIENTS for traffic in strategy.traffic[1:])


def flipping(victim: int, at: str) -> Any:
    """A mod between ours and the network that changes one bit of one client's files in round 2."""

    def mod(message: Message, context: Any, call_next: Any) -> Message:
        number = int(context.node_config["partition-id"])
        is_hit = number == victim and message.content["config"]["server-round"] == 2
        if is_hit and at == "down":
            ours = message.content["dither"]
            ours["files"] = [_flipped(data) for data in ours["files"]]
        reply = call_next(message, context)
        if is_hit and at == "up":
            reply.content["dither"]["file"] = _flipped(reply.content["dither"]["file"])
        return reply

    return mod


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


@pytest.mark.parametrize("at", ["down", "up"])
def test_a_message_that_is_damaged_is_refused_and_the_round_goes_on(at: str) -> None:
    strategy = Archives(averaging(), down="1500", up="900")
    federate(strategy, client(flipping(1, at), archives_mod), 4)
    assert [traffic.refused for traffic in strategy.traffic] == [0, 1, 0, 0]
    assert [traffic.failed for traffic in strategy.traffic] == [0, 0, 0, 0]
    by_round = [digest for _, digest in SEEN["got"]]
    line = list(strategy._line.files)
    # In round 3 the client has the model again, like all others.
    assert by_round[-CLIENTS:] == [line[3]] * CLIENTS
    assert by_round[-2 * CLIENTS : -CLIENTS] == [line[2]] * CLIENTS
    assert by_round.count(line[1]) == (CLIENTS - 1 if at == "down" else CLIENTS)


def test_a_client_that_dies_is_left_out_and_gets_what_it_lacks_once_it_is_back() -> None:
    strategy = Archives(averaging(), down="1500", up="900")
    app, call = client(archives_mod), Archives.configure_train

    class Killing(Archives):
        def configure_train(self, server_round: int, *rest: Any) -> Any:
            SEEN["dies"] = 2 if server_round in {2, 3} else None
            return call(self, server_round, *rest)

    strategy = Killing(averaging(), down="1500", up="900")
    federate(strategy, app, 5)
    assert [traffic.failed for traffic in strategy.traffic] == [0, 1, 1, 0, 0]
    last = [digest for number, digest in SEEN["got"] if number == 2][-1]
    assert last == list(strategy._line.files)[4]
    alive = {number for number, _ in SEEN["gave"]}
    assert alive == {0, 1, 2}


def test_a_server_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    def strategy(folder: Path) -> Archives:
        return Archives(averaging(), down="1500", up="900", folder=folder)

    whole = strategy(tmp_path / "whole")
    wanted = federate(whole, client(archives_mod), 5)
    killed = strategy(tmp_path / "killed")
    federate(killed, client(archives_mod), 2)
    again = strategy(tmp_path / "killed")  # in another run, of which clients know nothing
    assert again.done == 2
    found = federate(again, client(archives_mod), 3, again.arrays)
    assert [traffic.round for traffic in again.traffic] == [1, 2, 3, 4, 5]
    assert all(same_bits(found[name], value) for name, value in wanted.items())
    assert list(again._line.files) == list(whole._line.files)
    with Archive.open(tmp_path / "killed" / "server.dither") as kept:
        assert json.dumps(kept.metadata["traffic"]).count('"round"') == 5
