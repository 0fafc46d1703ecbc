"""One of two processes that compress together: the program that test_together.py starts."""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dither
from dither import team
from dither.archive import CodedTensor
from dither.data import divergence
from dither.search import compress_to, journal
from dither.search.coder import Coder
from dither.search.knowledge import Choice, Knowledge
from dither.team import alone


class Tokens(nn.Module):
    """A table, a convolution, attention whose three weights share an input, and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 24)
        self.mix = nn.Conv1d(24, 24, 3, padding=1)
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))
        self.norm, self.gate = nn.LayerNorm(24), nn.Linear(24, 4)
        self.experts = nn.Parameter(torch.randn(4, 32, 24) / 5)
        self.up, self.down = nn.Linear(24, 96), nn.Linear(96, 24, bias=False)
        self.out = nn.Linear(24, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.mix(x.mT).mT
        scores = self.query(x) @ self.key(x).mT / 5
        x = self.norm(x + scores.softmax(-1) @ self.value(x))
        rows, chosen = x.reshape(-1, 24), self.gate(x).argmax(-1).reshape(-1)
        made = torch.zeros(len(rows), 32, dtype=x.dtype)
        for number, expert in enumerate(self.experts):
            made[chosen == number] = nn.functional.linear(rows[chosen == number], expert)
        x = x + self.down(self.up(x).relu()) + made[:, :24].reshape(x.shape)
        logits: Tensor = self.out(x.mean(1))
        return logits


class Silent(nn.Module):
    """Runs without gradients, so that noise says what errors cost."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(40, 60), nn.Linear(60, 10)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.two(self.one(x).relu())
        return made


def tokens(seed: int = 0) -> Tokens:
    torch.manual_seed(seed)
    return Tokens().eval()


def ids(rows: int = 40, lengths: tuple[int, ...] = (4, 9, 5, 12, 7)) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, 50, (rows, length)) for length in lengths]


def samples() -> dither.Data:
    return dither.Data(ids(), distance=divergence)


def without_data() -> dither.Archive:
    return dither.compress(tokens(), "6x")


def with_data() -> dither.Archive:
    return dither.compress(tokens(), "9x", data=samples())


def one_batch() -> dither.Archive:
    """One process has none of its own."""
    return dither.compress(tokens().half(), "5x", data=ids(150, (6,)))


def few_samples() -> dither.Archive:
    return dither.compress(tokens(), "7x", data=ids(3))


def with_score() -> dither.Archive:
    """A score that differs from process to process: that of the first decides."""
    return dither.compress(tokens(), "9x", data=ids(), evaluate=lambda _: time.monotonic())


def without_gradients() -> dither.Archive:
    torch.manual_seed(0)
    return dither.compress(Silent(), "8x", data=[torch.randn(50, 40) for _ in range(3)])


_MAKERS = (without_data, with_data, one_batch, few_samples, with_score, without_gradients)
FILES: dict[str, Callable[[], dither.Archive]] = {f.__name__: f for f in _MAKERS}


class _Failing(nn.Module):
    """Fails in one process, and only once it is asked for the last batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        if dist.get_rank() == 1:
            raise KeyError("only here")
        made: Tensor = self.layer(x)
        return made


def model_fails() -> None:
    torch.manual_seed(0)
    dither.compress(_Failing(), "8x", data=[torch.randn(50, 40) for _ in range(3)])


def loader_fails() -> None:
    def batches() -> Iterator[Tensor]:
        yield from ids()
        if dist.get_rank() == 1:
            raise OSError("disk of one machine")

    dither.compress(tokens(), "9x", data=batches())


def other_batches() -> None:
    model = tokens()
    torch.manual_seed(dist.get_rank())
    dither.compress(model, "9x", data=[torch.randint(0, 50, (40, 5)) for _ in range(3)])


def other_models() -> None:
    dither.compress(tokens(dist.get_rank()), "9x")


def other_sizes() -> None:
    dither.compress(tokens(), 9_000 + dist.get_rank())


def impossible() -> None:
    dither.compress(tokens(), 100)


FAILURES: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (model_fails, loader_fails, other_batches, other_models, other_sizes, impossible)
}


def digest(archive: dither.Archive, path: Path) -> str:
    archive.save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(rank: int, folder: Path) -> None:
    """Everything in turn: after a failure the processes go on."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {name: digest(make(), folder / f"{name}{rank}") for name, make in FILES.items()}
    for name, fail in FAILURES.items():
        try:
            fail()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is compared
            found[name] = f"{type(error).__name__}: {error}"
    dither.attach(tokens(rank), budget="6x", steps=4)  # replicas that are not equal yet
    if rank == 0:
        with alone():
            found["alone"] = digest(without_data(), folder / "alone")
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def killed(rank: int, folder: Path) -> None:
    """One process is killed amid the work; the other says so, and when."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

    class Killed(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            if rank == 1:
                (folder / "time").write_text(str(time.time()), encoding="utf-8")
                os.kill(os.getpid(), signal.SIGKILL)
            return super().forward(x)

    torch.manual_seed(0)
    try:
        dither.compress(Killed().eval(), "9x", data=ids())
    except dither.DitherError as error:
        since = time.time() - float((folder / "time").read_text(encoding="utf-8"))
        told = json.dumps({"said": str(error), "seconds": since})
        (folder / "told.json").write_text(told, encoding="utf-8")
        os._exit(0)  # of the group nothing can be closed


def interrupted(rank: int, folder: Path) -> None:
    """A job with a journal, of which one process is killed the first time; what it codes anew."""
    torch.set_num_threads(1)
    is_again, journal.PATIENCE = (folder / "again").exists(), 0.0
    meet = f"file://{folder}/{'meet again' if is_again else 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    coded = 0

    class Counting(Coder):
        def _coded(self, known: Knowledge, choice: Choice) -> CodedTensor:
            nonlocal coded
            coded += 1
            return super()._coded(known, choice)

    def killing(stage: str, share: float, *_: object) -> None:
        if rank == 1 and not is_again and "in sequence" in stage and share > 0.3:
            os.kill(os.getpid(), signal.SIGKILL)

    compress_to.__globals__["Coder"] = Counting
    try:
        compress_to(folder / "file", tokens(), "9x", data=samples(), progress=killing).close()
    except dither.DitherError:
        os._exit(0)  # of the group nothing can be closed
    (folder / f"{rank}.json").write_text(json.dumps(coded), encoding="utf-8")
    dist.destroy_process_group()


def missing(rank: int, folder: Path) -> None:
    """One process has other things to do."""
    team.MEETING = timedelta(seconds=2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    if rank == 0:
        start = time.monotonic()
        try:
            without_data()
        except dither.DitherError as error:
            told = json.dumps({"said": str(error), "seconds": time.monotonic() - start})
            (folder / "told.json").write_text(told, encoding="utf-8")
    while not (folder / "told.json").exists():
        time.sleep(0.05)
    os._exit(0)


if __name__ == "__main__":
    PROGRAMS = {"main": main, "killed": killed, "missing": missing}
    PROGRAMS["interrupted"] = interrupted
    PROGRAMS[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]))
