"""Federated averaging whose model bears rounding, and what its messages cost.

``python -m benchmarks.federated`` trains LeNet on CIFAR-10 with ten clients, whose shares of the
classes are of a Dirichlet distribution with 0.5, by each objective of Gupta et al. 2022; the
server's model is then scored with its weights rounded to 8, 6, 4, 3 and 2 bits. FedAvg is repeated
with messages as int8 differences and as ``.dither`` files on the round's model, of two sizes.

The clients are in this process, and run one after another. What they send and hold is made by the
functions with which ``dither.integrations.flower`` makes it. Every row is saved at once, and so is
every round of one that is not done: the program may be stopped, and started again.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.environment import describe
from benchmarks.federated_plot import draw, table
from benchmarks.tasks import resnet20_cifar10
from dither.archive import atomic_write
from dither.formats import Affine
from dither.integrations.rounds import Line, State, follow, moved, update, updated
from dither.recipes import robust_fedavg
from dither.recipes.robust_fedavg import OBJECTIVES

RESULTS = Path(__file__).parent / "results"
CLIENTS, CONCENTRATION, ROUNDS = 10, 0.5, 30
PER_ROUND = 10_000
"""Images over all clients: each draws anew, in proportion to what it has."""
BATCH, RATE, MOMENTUM = 50, 0.03, 0.9
WIDTHS = (32, 8, 6, 4, 3, 2)
WATCHED = 2000
"""Test images that are scored after each round."""
SIZES = (16_000, 6_000)
"""Bytes of a ``.dither`` file, either way: 2.1 and 0.8 bits for each weight."""


def lenet() -> nn.Sequential:
    """LeNet for 32x32 colour images: 62,006 weights; maps [n, 3, 32, 32] to [n, 10] logits."""
    pool = [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), *pool, nn.Conv2d(6, 16, 5), *pool, nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def shares(labels: Tensor, seed: int) -> list[Tensor]:
    """Places of each client's images: every class is dealt out by a Dirichlet draw of its own."""
    generator = np.random.default_rng(seed)
    held: list[list[Tensor]] = [[] for _ in range(CLIENTS)]
    for kind in range(10):
        places = generator.permutation((labels == kind).nonzero().flatten().numpy())
        parts = generator.dirichlet([CONCENTRATION] * CLIENTS)
        ends = (parts.cumsum() * len(places)).round().astype(int)
        for mine, part in zip(held, np.split(places, ends[:-1]), strict=True):
            mine.append(torch.from_numpy(part))
    return [torch.cat(mine) for mine in held]


class Wire(Protocol):
    """How models travel; bytes are of one client's message."""

    def down(self, model: State) -> tuple[State, int]:
        """What clients hold of the server's model, and the bytes to one."""

    def up(self, before: State, after: State) -> tuple[State, int]:
        """What the server reads of a client's model, and the bytes from it."""


class Float32:
    """All values as they are."""

    def down(self, model: State) -> tuple[State, int]:
        return model, _nbytes(model)

    def up(self, before: State, after: State) -> tuple[State, int]:
        return after, _nbytes(after)


@dataclass
class Int8:
    """Differences to the last model rounded to 256 values per tensor, with a scale in float32.

    The first model goes as it is. What rounding loses on the way down is made up for by the next
    message, as with files.
    """

    sent: State | None = None

    def down(self, model: State) -> tuple[State, int]:
        if self.sent is None:
            self.sent = model
            return model, _nbytes(model)
        self.sent, nbytes = self.up(self.sent, model)
        return self.sent, nbytes

    def up(self, before: State, after: State) -> tuple[State, int]:
        state = {
            name: value + Affine(8).encode(after[name] - value).decode()
            for name, value in before.items()
        }
        return state, sum(value.numel() + 4 for value in before.values())


@dataclass
class Files:
    """``.dither`` files of one size that rest on the round's model; the first has all values."""

    size: int
    held: State | None = None
    line: Line = field(init=False)

    def __post_init__(self) -> None:
        self.line = Line(self.size)

    def down(self, model: State) -> tuple[State, int]:
        before = self.line.digest
        sent = self.line.advance(model)
        files = self.line.since(before or None)
        # Ends with an error where the clients' model is not bit for bit the server's.
        self.held = follow(self.held, files, self.line.digest)
        return sent, sum(map(len, files))

    def up(self, before: State, after: State) -> tuple[State, int]:
        data = update(before, after, self.size)
        return updated(before, data), len(data)


def wires() -> dict[str, Wire]:
    """By name, new ones."""
    files = {f"dither {size:,}": Files(size) for size in SIZES}
    return {"float32": Float32(), "int8": Int8(), **files}


@dataclass(frozen=True)
class Row:
    """One training."""

    objective: str
    wire: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.objective}, {self.wire}, {self.seed}"


def rows(seeds: Sequence[int]) -> list[Row]:
    """In order: the first seed, then the other seeds' objectives, then their other messages."""
    objectives = [[Row(name, "float32", seed) for name in OBJECTIVES] for seed in seeds]
    messages = [
        [Row("plain", name, seed) for name in wires() if name != "float32"] for seed in seeds
    ]
    parts = [objectives[0], messages[0], *objectives[1:], *messages[1:]]
    return [row for part in parts for row in part]


@dataclass(frozen=True)
class Data:
    """Images and labels of training, and what each client has of them."""

    images: Tensor
    labels: Tensor
    clients: list[Tensor]

    def batches(self, client: int, number: int, seed: int) -> list[Tensor]:
        """Places of a client's images for a round."""
        mine = self.clients[client]
        generator = torch.Generator().manual_seed((seed * 1000 + number) * 100 + client)
        count = max(1, round(len(mine) * PER_ROUND / len(self.labels)))
        return list(mine[torch.randperm(len(mine), generator=generator)[:count]].split(BATCH))


def trained(state: State, data: Data, row: Row, client: int, number: int) -> State:
    """What a client makes of the round's model."""
    model = lenet()
    model.load_state_dict(state)
    places = data.batches(client, number, row.seed)
    seed = (row.seed * 1000 + number) * 100 + client
    run = robust_fedavg.recipe(model, row.objective, seed=seed).attach(model, steps=len(places))
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM)
    for batch in places:
        outputs = model(data.images[batch])
        loss = functional.cross_entropy(outputs, data.labels[batch]) + run.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
    run.detach(commit=False)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def averaged(states: Sequence[State], weights: Sequence[int]) -> State:
    """FedAvg's mean, weighted by images."""
    shares = torch.tensor(weights) / sum(weights)
    return {
        name: torch.einsum("c,c...->...", shares, torch.stack([state[name] for state in states]))
        for name in states[0]
    }


@torch.inference_mode()
def watched(state: Mapping[str, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Accuracy on some test images, in per cent."""
    model = lenet()
    model.load_state_dict(dict(state))
    found = torch.cat([model(part).argmax(1) for part in test[0].split(100)])
    return 100 * float((found == test[1]).double().mean())


@dataclass
class Progress:
    """What a training has done, to go on from.

    Attributes:
        model: the server's.
        wire: with what it keeps.
        rounds: bytes so far and accuracy on some test images, after each round.
        seconds: of processor time.
    """

    model: State
    wire: Wire
    down: int = 0
    up: int = 0
    rounds: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def turn(self, data: Data, row: Row) -> None:
        """One round of all clients."""
        number = len(self.rounds) + 1
        sent, nbytes = self.wire.down(self.model)
        self.down += CLIENTS * nbytes
        states = []
        for client in range(CLIENTS):
            after = trained(sent, data, row, client, number)
            back, nbytes = self.wire.up(sent, after)
            states.append(back)
            self.up += nbytes
        self.model = moved(self.model, sent, averaged(states, list(map(len, data.clients))))


def measure(row: Row, rounds: int, folder: Path) -> dict[str, Any]:
    """Train, and score the server's model at all widths.

    Args:
        row: what is trained.
        rounds: how often.
        folder: keeps what was done after each round.
    """
    images, labels = resnet20_cifar10.some("train", 0, 1 << 30)
    data = Data(images, labels, shares(labels, row.seed))
    test, partly = resnet20_cifar10.some("test", 0, WATCHED), folder / f"{row.key}.pickle"
    torch.manual_seed(row.seed)
    server = lenet()
    model: State = {name: value.clone() for name, value in server.state_dict().items()}
    done = Progress(model, wires()[row.wire])
    if partly.is_file():
        done = pickle.loads(partly.read_bytes())  # noqa: S301 - what this program wrote
    while len(done.rounds) < rounds:
        start = time.process_time()
        done.turn(data, row)
        score = round(watched(done.model, test), 2)
        done.rounds.append({"down": done.down, "up": done.up, "accuracy": score})
        done.seconds += time.process_time() - start
        with atomic_write(partly) as file:
            file.write(pickle.dumps(done))
    server.load_state_dict(done.model)
    return {
        "accuracy": scores(server),
        "kurtosis": kurtosis(server),
        "bytes": {"down": done.down, "up": done.up},
        "rounds": done.rounds,
        "clients' images": [len(mine) for mine in data.clients],
        "processor seconds": round(done.seconds, 1),
    }


def scores(server: nn.Module) -> dict[str, float]:
    """Accuracy on all test images with weights of each width, in per cent."""
    found = {}
    for bits in WIDTHS:
        model = lenet()
        model.load_state_dict(robust_fedavg.rounded(server, bits))
        found[str(bits)] = round(resnet20_cifar10.evaluate(model.eval(), "test"), 2)
    return found


def kurtosis(server: nn.Module) -> float:
    """Mean over matrices and convolutions."""
    found = []
    for weight in server.parameters():
        if weight.ndim > 1:
            centred = weight.detach().double() - weight.detach().double().mean()
            found.append(float(centred.pow(4).mean() / centred.square().mean().square()))
    return round(sum(found) / len(found), 3)


def _nbytes(state: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in state.values())


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=RESULTS / "federated.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--work", type=Path, default=Path("out/federated"), help="rows half done")
    parser.add_argument("--table", action="store_true", help="only print and draw")
    given = parser.parse_args()
    found = json.loads(given.json.read_text("utf-8")) if given.json.is_file() else {"rows": {}}
    given.work.mkdir(parents=True, exist_ok=True)
    for row in () if given.table else rows(range(given.seeds)):
        if row.key in found["rows"]:
            continue
        found["rows"][row.key] = {
            "objective": row.objective,
            "wire": row.wire,
            "seed": row.seed,
            **measure(row, given.rounds, given.work),
        }
        found["environment"] = describe() | {"command": "python -m benchmarks.federated"}
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(row.key, found["rows"][row.key]["accuracy"], flush=True)
    print(table(found["rows"]))
    draw(found["rows"], RESULTS / "plots" / "federated")


if __name__ == "__main__":
    main()
