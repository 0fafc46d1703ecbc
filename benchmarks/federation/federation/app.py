"""Clients that train a network on digits, and a server that averages; messages are archives.

Client ``n`` has every image whose number leaves ``n`` when it is divided by the clients. What it
makes of a model depends on nothing else, so that any two runs can be compared bit for bit. Settings
of a run: ``folder`` of what the server keeps, ``rounds``, ``clients``, and ``flip``, to damage one
message.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.nn import functional

from dither.demo import network as digits
from dither.integrations.flower import Archives, archives_mod
from dither.integrations.rounds import State
from dither.recipes import robust_fedavg

DOWN, UP = "30kB", "20kB"
STEPS, BATCH = 4, 50


def flipping(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Changes one bit of the file that the last client sends in round 2, if a run asks for it."""
    reply = call_next(message, context)
    last = int(context.node_config["partition-id"]) == int(context.run_config["clients"]) - 1
    if context.run_config["flip"] and last and message.content["config"]["server-round"] == 2:
        data = reply.content["dither"]["file"]
        middle = len(data) // 2
        reply.content["dither"]["file"] = (
            data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
        )
    return reply


client = ClientApp(mods=[flipping, archives_mod])
server = ServerApp()


def network() -> nn.Module:
    """The model before round 1."""
    torch.manual_seed(0)
    return digits.DigitNet()


def trained(state: State, number: int, clients: int) -> tuple[State, int, float]:
    """What a client makes of a model, of how many images, and its last loss."""
    images, labels = (part[number::clients] for part in digits.training_set())
    model = network()
    model.load_state_dict(state)
    run = robust_fedavg.recipe(model, "mqat", seed=number).attach(model, steps=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(STEPS):
        some = slice(BATCH * step, BATCH * (step + 1))
        loss = functional.cross_entropy(model(images[some]), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
    run.detach(commit=False)
    return dict(model.state_dict()), len(labels), float(loss.detach())


@client.train()  # type: ignore[untyped-decorator]
def fit(message: Message, context: Context) -> Message:
    """One round of a client."""
    torch.set_num_threads(1)
    number, clients = int(context.node_config["partition-id"]), int(context.run_config["clients"])
    state = message.content["arrays"].to_torch_state_dict()
    state, count, loss = trained(state, number, clients)
    metrics = MetricRecord({"num-examples": count, "loss": loss})
    content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics})
    return Message(content, reply_to=message)


class Noted(Archives):
    """Notes when each round began and ended, in seconds since the epoch."""

    def __init__(self, strategy: FedAvg, folder: Path) -> None:
        super().__init__(strategy, down=DOWN, up=UP, folder=folder)
        self._notes = folder / "notes.jsonl"

    def configure_train(self, server_round: int, *rest: Any) -> Any:  # noqa: ANN401
        messages = super().configure_train(server_round, *rest)
        self._note("begins")
        return messages

    def aggregate_train(self, server_round: int, replies: Any) -> Any:  # noqa: ANN401
        found = super().aggregate_train(server_round, replies)
        self._note("ends")
        return found

    def _note(self, what: str) -> None:
        note = {"round": self.traffic[-1].round, "what": what, "time": time.time()}
        with self._notes.open("a") as file:
            file.write(json.dumps(note) + "\n")


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """All rounds that are left to do."""
    folder = Path(str(context.run_config["folder"]))
    folder.mkdir(parents=True, exist_ok=True)
    clients = int(context.run_config["clients"])
    few = {"min_train_nodes": 2, "min_available_nodes": clients}
    strategy = Noted(FedAvg(fraction_evaluate=0.0, **few), folder)
    start = strategy.arrays or ArrayRecord(network().state_dict())
    left = int(context.run_config["rounds"]) - strategy.done
    strategy.start(grid=grid, initial_arrays=start, num_rounds=left)
    (folder / "done").write_text(str(strategy.done))
