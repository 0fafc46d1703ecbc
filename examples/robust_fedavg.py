"""Clients train one model that bears rounding, and send files (Gupta et al. 2023).

python examples/robust_fedavg.py [--data digits]
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever it is run from

import dither
from dither.integrations.rounds import Line, State, follow, moved, update, updated
from dither.recipes import robust_fedavg
from examples.tasks import Task, arguments, load, report

CLIENTS, LOCAL, BATCH = 3, 3, 50
"""A client makes three steps in a round."""
DRAWN, SHOWN = (3, 4, 5, 6, 8, 32), (32, 4, 3)
"""Widths of steps, and of the scores at the end. Few steps cannot make up for a draw of 2 bits."""


def client(task: Task, state: State, data: tuple[Tensor, Tensor], number: int) -> State:
    """One client's part of a round: it trains at widths that are drawn for each step."""
    model = task.empty().train()
    model.load_state_dict(state)
    run = robust_fedavg.recipe(model, "mqat", widths=DRAWN, seed=number).attach(model, steps=LOCAL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(LOCAL):
        some = torch.randint(len(data[1]), (BATCH,))
        loss = functional.cross_entropy(model(data[0][some]), data[1][some]) + run.penalty()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.step()
    run.detach(commit=False)
    return dict(model.state_dict())


def scores(task: Task, model: nn.Module) -> str:
    found = []
    for bits in SHOWN:
        rounded = task.empty()
        rounded.load_state_dict(robust_fedavg.rounded(model, bits))
        found.append(f"{task.evaluate(rounded.eval()):8.2f}")
    return "".join(found)


def main() -> None:
    options = arguments(__doc__, 12, "robust_fedavg", "training steps of a client")
    task = load(options)
    size = task.nbytes // 16
    batches = [task.batch(number) for number in range(8)]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    # Half of the images lie with a client that has their class, half anywhere.
    anywhere = torch.randint(CLIENTS, labels.shape)
    owner = torch.where(torch.rand(labels.shape) < 0.5, labels % CLIENTS, anywhere)
    data = [(images[owner == one], labels[owner == one]) for one in range(CLIENTS)]

    line, nbytes = Line(size), 0
    model: State = dict(task.model.state_dict())
    held: State | None = None
    for number in range(options.steps // LOCAL):
        has = line.digest
        sent = line.advance(model)
        files = line.since(has)
        held = follow(held, files, line.digest)  # what each client does with them
        back = [client(task, held, data[one], CLIENTS * number + one) for one in range(CLIENTS)]
        replies = [update(held, state, size) for state in back]
        states = [updated(sent, reply) for reply in replies]  # what the server does with these
        mean = {
            name: torch.stack([state[name].float() for state in states]).mean(0) for name in sent
        }
        model = moved(model, sent, mean)
        nbytes += CLIENTS * sum(map(len, files)) + sum(map(len, replies))
        whole = 2 * CLIENTS * task.nbytes * (number + 1)
        print(f"round {number + 1}: {nbytes:,} bytes so far; {whole:,} as float32")

    server = task.empty()
    server.load_state_dict(model)
    print(f"{'accuracy %, bits:':20}" + "".join(f"{bits:8}" for bits in SHOWN))
    print(f"{'before':20}{scores(task, task.model)}")
    print(f"{'after':20}{scores(task, server)}")
    weights = [name for name, value in server.named_parameters() if value.ndim > 1]
    run = dither.attach(server, dither.Plan(dict.fromkeys(weights, dither.Affine(4))))
    run.finish()
    report(run, task, options.out)


if __name__ == "__main__":
    main()
