"""Federated averaging with Flower whose messages are archives, under a byte budget both ways.

A client has a mod, and the server's strategy, any of Flower's, is wrapped::

    app = ClientApp(mods=[archives_mod])
    strategy = Archives(FedAvg(), down="60kB", up="30kB")
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=30)

Neither the client's functions nor the strategy see anything of it: both get and give arrays. What
goes to a client are the files that it lacks of those that make the round's model, each resting on
the one before; what comes back is a file that rests on the round's model. Both ends compute with
exactly the numbers of these files. Whoever has lost the model, or is new, gets it whole; a file
that is damaged, or holds what it should not, is refused, and the round goes on with the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from dither.archive import Archive
from dither.core import ArchiveError, BudgetError, SpecError
from dither.integrations.rounds import Line, State, follow, moved, update, updated, whole

__all__ = ["Archives", "Traffic", "archives_mod"]

_OURS = "dither"
_MODEL = "dither.model"
_SERVER = "server.dither"
_LOG = logging.getLogger("flwr")


@dataclass
class Traffic:
    """Bytes of one round, both ways.

    Attributes:
        round: its number.
        down: of the files that went to clients.
        up: of the files that came back.
        messages_down: of all that went, as Flower counts the records of messages.
        messages_up: of all that came back, likewise.
        clients: that were asked.
        refused: that could not use what they got, or whose file was refused.
        failed: that gave no answer, or an error.
    """

    round: int
    down: int = 0
    up: int = 0
    messages_down: int = 0
    messages_up: int = 0
    clients: int = 0
    refused: int = 0
    failed: int = 0


def archives_mod(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """The client's side: arrays in place of the files of a message, and a file of what comes back.

    The model is kept in the context's state between rounds. Messages of others pass as they are.
    """
    ours = message.content.config_records.get(_OURS)
    if ours is None:
        return call_next(message, context)
    key, digest = str(ours["key"]), str(ours["model"])
    kept = context.state.array_records.get(_MODEL)
    try:
        files = [bytes(data) for data in ours.get("files", ())]
        model = follow(None if kept is None else kept.to_torch_state_dict(), files, digest)
    except ArchiveError as error:
        return _answer(message, {"refused": str(error)})
    context.state[_MODEL] = ArrayRecord(model)
    del message.content[_OURS]
    message.content[key] = ArrayRecord(model)
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    arrays = reply.content.array_records
    has: dict[str, str | bytes] = {"has": digest}
    if key in arrays and "up" in ours:
        trained = arrays[key].to_torch_state_dict()
        try:
            has["file"] = update(model, trained, str(ours["up"]))
        except BudgetError as error:
            return _answer(message, {"refused": str(error)})
        del reply.content[key]
    reply.content[_OURS] = ConfigRecord(dict(has))
    return reply


def _answer(message: Message, said: dict[str, str]) -> Message:
    return Message(RecordDict({_OURS: ConfigRecord(dict(said))}), reply_to=message)


class Archives(Strategy):  # type: ignore[misc]
    """A strategy whose messages are archives.

    Args:
        strategy: one of Flower's, which samples and averages; of :class:`FedAvg`'s kind.
        down: size of a file of one round's changes, to clients: bytes, or as text.
        up: size of a client's file.
        first: size of the first file; None: the values as they are.
        folder: where the state is kept after each round, to go on from it: see :attr:`done`.

    Attributes:
        traffic: of all rounds.
        done: rounds that were done before; :meth:`start` is to be asked for the others.
        model: the server's own, which is nearer to the average than files hold.
    """

    def __init__(
        self,
        strategy: FedAvg,
        *,
        down: int | str,
        up: int | str,
        first: int | str | None = None,
        folder: Path | None = None,
    ) -> None:
        self.inner, self._up, self._folder = strategy, str(up), folder
        self._line = Line(down, first)
        self._has: dict[int, str] = {}
        self.traffic: list[Traffic] = []
        self.done = self._before = 0
        self.model: State | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._resume(folder)

    @property
    def arrays(self) -> ArrayRecord | None:
        """The server's model, to begin with where a folder had one."""
        return None if self.model is None else ArrayRecord(dict(self.model))

    def summary(self) -> None:
        """Say what the strategy within does."""
        self.inner.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Files in place of the arrays of what the strategy would send."""
        self.traffic.append(Traffic(server_round + self._before))
        self.model = arrays.to_torch_state_dict()
        sent = self._line.advance(self.model)
        plain = self.inner.configure_train(server_round, ArrayRecord(sent), config, grid)
        return self._as_files(list(plain), self._up)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The same; clients whom it reaches have the next round's model already."""
        sent = self._line.advance(arrays.to_torch_state_dict())
        plain = self.inner.configure_evaluate(server_round, ArrayRecord(sent), config, grid)
        return self._as_files(list(plain), "")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the strategy makes of the files that came back; the server's model moves by that."""
        good = self._opened(replies, is_train=True)
        arrays, metrics = self.inner.aggregate_train(server_round, good)
        sent, model = self._line.model, self.model
        if arrays is not None and sent is not None and model is not None:
            self.model = moved(model, sent, arrays.to_torch_state_dict())
            arrays = ArrayRecord(dict(self.model))
        self.done = server_round + self._before
        self._keep()
        return arrays, metrics

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """What the strategy makes of the metrics."""
        good = self._opened(replies, is_train=False)
        return self.inner.aggregate_evaluate(server_round, good)

    def _as_files(self, messages: list[Message], up: str) -> list[Message]:
        key, now = self.inner.arrayrecord_key, self.traffic[-1]
        digest, asked = self._line.digest, []
        for message in messages:
            node = message.metadata.dst_node_id
            files = self._line.since(self._has.pop(node, None))  # until it says what it has
            ours: dict[str, str | list[bytes]] = {"key": key, "model": digest}
            # Flower cannot count the bytes of what is empty.
            ours |= {"up": up} if up else {}
            ours |= {"files": files} if files else {}
            others = {name: r for name, r in message.content.items() if name != key}
            content = RecordDict({**others, _OURS: ConfigRecord(dict(ours))})
            kind = message.metadata.message_type
            asked.append(Message(content=content, message_type=kind, dst_node_id=node))
            now.down += sum(map(len, files))
            now.messages_down += _counted(content)
            now.clients += 1
        return asked

    def _opened(self, replies: Iterable[Message], *, is_train: bool) -> list[Message]:
        """Replies with arrays in place of files, without those that are refused.

        They stand in the order of their files, so that sums are the same whoever answers first.
        """
        now, good = self.traffic[-1], []
        replies = sorted(replies, key=_file_of)
        for reply in replies:
            if reply.has_error():
                now.failed += 1
                good.append(reply)  # which the strategy counts and names
                continue
            now.messages_up += _counted(reply.content)
            try:
                self._open(reply, is_train=is_train)
            except (ArchiveError, KeyError, SpecError, TypeError, ValueError) as error:
                now.refused += 1
                node = reply.metadata.src_node_id
                _LOG.warning("what node %d sent is refused: %s", node, error)
                continue
            good.append(reply)
        return good

    def _open(self, reply: Message, *, is_train: bool) -> None:
        ours, sent = reply.content.config_records[_OURS], self._line.model
        if "refused" in ours or sent is None:
            raise ArchiveError(f"the client could not use what it got: {ours.get('refused')}")
        if ours["has"] == self._line.digest:
            self._has[reply.metadata.src_node_id] = self._line.digest
        del reply.content[_OURS]
        if not is_train:
            return
        data = ours["file"]
        if not isinstance(data, bytes):
            raise ArchiveError("a reply without a file")
        self.traffic[-1].up += len(data)
        reply.content[self.inner.arrayrecord_key] = ArrayRecord(updated(sent, data))

    def _keep(self) -> None:
        """The files, and then the model with what is noted, in one step: whatever ends between."""
        if self._folder is None or self.model is None:
            return
        self._line.save(self._folder)
        about = {"done": self.done, "traffic": [asdict(each) for each in self.traffic]}
        whole(self.model, about).save(self._folder / _SERVER)

    def _resume(self, folder: Path) -> None:
        if not (folder / _SERVER).is_file():
            return
        self._line.load(folder)
        with Archive.open(folder / _SERVER) as kept:
            self.model, about = kept.state_dict(), kept.metadata
        self.done = self._before = int(about["done"])
        self.traffic = [Traffic(**each) for each in about["traffic"]]


def _file_of(reply: Message) -> bytes:
    ours = None if reply.has_error() else reply.content.config_records.get(_OURS)
    data = None if ours is None else ours.get("file")
    return data if isinstance(data, bytes) else b""


def _counted(content: RecordDict) -> int:
    """As Flower's own mods count."""
    return sum(int(record.count_bytes()) for record in content.values())
