"""Archives behind a URL: the index is read, and the bytes of what is asked for, in few requests."""

import copy
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

import dither
from dither import ArchiveError
from dither.archive import Archive, reader, remote, source, write
from dither.formats import Affine, Raw
from dither.testing import same_bits

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

COUNT, SIDE = 40, 96


class Server(ThreadingHTTPServer):
    """One file, which it serves as its way says, and what was asked of it."""

    daemon_threads = True

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.way, self.tag = data, "ranges", '"1"'
        self.requests: list[tuple[str, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/model.dither"

    @property
    def gets(self) -> list[int]:
        return [nbytes for kind, nbytes in self.requests if kind == "GET"]


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self.server.requests.append(("HEAD", 0))
        self._head(404 if self.server.way == "gone" else 200, len(self.server.data))

    def do_GET(self) -> None:
        server, way = self.server, self.server.way
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        wanted = self.headers.get("If-Match", server.tag)
        if way == "gone" or (way == "ranges" and wanted != server.tag):
            self._answer(404 if way == "gone" else 412, b"")
        elif asked is None or way == "whole":
            self._answer(200, server.data)
        else:
            begin, end = int(asked[1]), min(int(asked[2]) + 1, len(server.data))
            body = server.data[begin:end]
            where = f"bytes {begin}-{end - 1}/{len(server.data)}"
            if way == "short":
                self._answer(206, body[: len(body) // 2], where)
            elif way == "cut":
                self._answer(206, body[: len(body) // 2], where, said=len(body))
            else:
                self._answer(206, body, where)

    def _head(self, status: int, length: int, where: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if self.server.tag:
            self.send_header("ETag", self.server.tag)
        if where:
            self.send_header("Content-Range", where)
        self.end_headers()

    def _answer(self, status: int, body: bytes, where: str = "", said: int | None = None) -> None:
        self.server.requests.append(("GET", len(body)))
        self._head(status, len(body) if said is None else said, where)
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # the client had enough
        self.close_connection = self.close_connection or said is not None


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {f"layer{i}.weight": torch.randn(SIDE, SIDE, generator=draw) for i in range(COUNT)}


def packed(folder: Path, seed: int = 0) -> bytes:
    encoded = {name: Affine(bits=8).encode(value) for name, value in tensors(seed).items()}
    write(folder / "m", encoded | {"steps": Raw().encode(torch.arange(3))}, {"again": "steps"})
    return (folder / "m").read_bytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    found = packed(tmp_path_factory.mktemp("remote"))
    assert len(found) > 4 * remote.FIRST
    return found


@pytest.fixture
def server(data: bytes) -> Iterator[Server]:
    served = Server(data)
    thread = threading.Thread(target=served.serve_forever, args=(0.01,))
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def test_the_index_is_read_and_then_what_is_asked_for(server: Server, data: bytes) -> None:
    local = Archive.from_bytes(data)
    with dither.open(server.url) as archive:
        assert archive.nbytes == len(data)
        assert list(archive) == list(local)
        assert str(archive) == str(local)
        assert len(server.requests) == 3  # its size, its beginning, its end
        assert sum(server.gets) <= remote.FIRST + 64
        for name in ("layer7.weight", "layer31.weight"):
            server.requests.clear()
            assert same_bits(archive[name], local[name])
            stored = sum(p.length for p in local.entries[name].parts if p.inline is None)
            assert server.requests == [("GET", stored)]


def test_an_index_larger_than_what_is_first_asked_for_takes_one_more(
    server: Server, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "FIRST", 100)
    with dither.open(server.url) as archive:
        assert len(server.gets) == 3
        assert same_bits(archive["layer3.weight"], Archive.from_bytes(data)["layer3.weight"])


@pytest.mark.parametrize("ahead", [1, 30_000, remote.AHEAD])
def test_all_tensors_come_in_few_requests(
    server: Server, data: bytes, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote.RemoteSource, "ahead", ahead)
    archive, local = dither.open(server.url), Archive.from_bytes(data)
    server.requests.clear()
    found = archive.state_dict()
    stored = sum(entry.nbytes for entry in local.entries.values())
    assert all(same_bits(found[name], local[name]) for name in local)
    assert sum(server.gets) <= stored
    assert len(server.gets) <= 1 + 1.5 * stored / ahead if ahead > 1 else COUNT + 1
    archive.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_model_is_loaded_from_a_url(
    server: Server, data: bytes, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_WORTH_THREADS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    model = nn.Module()
    for name in tensors():
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.empty(SIDE, SIDE))
        setattr(model, name.partition(".")[0], layer)
    try:
        found = dither.load_into(model, server.url, strict=False)
    finally:
        torch.set_num_threads(before)
    assert found.unexpected == ("steps", "again")
    local = Archive.from_bytes(data)
    assert all(same_bits(value.data, local[name]) for name, value in model.named_parameters())
    assert len(server.requests) <= 4
    assert dither.load(server.url).keys() == set(local)
    assert dither.verify(server.url) == []


def test_a_large_range_comes_in_pieces(
    server: Server, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PIECE", 1000)
    with dither.open(server.url) as archive:
        server.requests.clear()
        assert same_bits(archive["layer0.weight"], Archive.from_bytes(data)["layer0.weight"])
        assert len(server.gets) > 5
        assert max(server.gets) <= 1000


def test_a_server_without_ranges_is_named_before_the_file_is_read(server: Server) -> None:
    server.way = "whole"
    with pytest.raises(ArchiveError, match=r"does not answer requests for a part.*download"):
        dither.open(server.url)


def test_a_small_file_needs_no_ranges(server: Server, tmp_path: Path) -> None:
    write(tmp_path / "small", {"w": Raw().encode(torch.arange(9.0))})
    server.way, server.data = "whole", (tmp_path / "small").read_bytes()
    assert torch.equal(dither.load(server.url)["w"], torch.arange(9.0))


@pytest.mark.parametrize("tag", ['"2"', 'W/"2"', ""])
@pytest.mark.parametrize("way", ["ranges", "deaf"])
def test_a_file_that_changes_is_named(server: Server, tag: str, way: str, tmp_path: Path) -> None:
    """By the server, by its tag, or by the size where there is none."""
    server.tag, server.way = tag.replace("2", "1"), way
    with dither.open(server.url) as archive:
        archive["layer0.weight"]
        server.data, server.tag = packed(tmp_path, seed=1), tag
        if not tag:
            server.data += b"more"
        with pytest.raises(ArchiveError, match="has changed since it was opened"):
            archive["layer1.weight"]


@pytest.mark.parametrize(
    ("way", "kind", "text"),
    [
        ("short", ArchiveError, r"the server sent \d+ bytes of .* where \d+"),
        ("cut", OSError, r"reading bytes \d+ to \d+ of .* failed"),
        ("gone", OSError, "model.dither"),
    ],
)
def test_answers_that_are_not_whole(
    server: Server, way: str, kind: type[Exception], text: str
) -> None:
    with dither.open(server.url) as archive:
        server.way = way
        with pytest.raises(kind, match=text):
            archive["layer1.weight"]
        server.way = "ranges"
        assert archive["layer1.weight"].shape == (SIDE, SIDE)


@pytest.mark.parametrize("way", ["short", "cut", "gone"])
def test_what_cannot_be_opened(server: Server, way: str) -> None:
    server.way = way
    with pytest.raises((ArchiveError, OSError), match=r"model\.dither"):
        dither.open(server.url)


def test_damage_on_the_way_is_named_by_tensor(server: Server, data: bytes) -> None:
    entry = Archive.from_bytes(data).entries["layer5.weight"]
    place = max(entry.parts, key=lambda part: part.length).offset + 50
    server.data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    with dither.open(server.url) as archive:
        archive["layer4.weight"]
        with pytest.raises(ArchiveError, match=r"layer5\.weight.*checksum"):
            archive["layer5.weight"]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_read_for_themselves(server: Server, again: object, tmp_path: Path) -> None:
    assert callable(again)
    with dither.open(server.url) as archive:
        expected, kept = archive["layer2.weight"], pickle.dumps(archive)
        copied = again(archive)
    with copied:
        assert same_bits(copied["layer2.weight"], expected)
    server.data, server.tag = packed(tmp_path, seed=1), '"2"'
    with pytest.raises(ArchiveError, match="has changed"):
        pickle.loads(kept)


def test_reading_from_several_threads(server: Server, data: bytes) -> None:
    local, found = Archive.from_bytes(data), {}
    with dither.open(server.url) as archive:

        def read(first: int) -> None:
            for i in range(first, COUNT, 4):
                found[f"layer{i}.weight"] = archive[f"layer{i}.weight"]

        threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == COUNT
    assert all(same_bits(value, local[name]) for name, value in found.items())


def test_other_kinds_of_url(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.dither").write_bytes(data)
    url = (tmp_path / "m.dither").as_uri()
    assert same_bits(dither.load(url)["layer9.weight"], Archive.from_bytes(data)["layer9.weight"])
    with pytest.raises(ArchiveError, match="no URL that fsspec knows"):
        dither.open("nonsense://there/m.dither")
    with pytest.raises(FileNotFoundError):
        dither.open(url + "x")


def test_a_secret_in_a_url_is_not_shown(server: Server) -> None:
    server.way = "short"
    with pytest.raises(ArchiveError) as caught:
        dither.open(server.url + "?token=precious")
    assert "precious" not in str(caught.value)


@pytest.mark.parametrize("package", ["fsspec.core", "aiohttp"])
def test_without_the_packages(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if package == "aiohttp":
        monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
        registry = sys.modules["fsspec.registry"]
        for name in ("http", "https"):
            monkeypatch.delitem(registry._registry, name, raising=False)
    with pytest.raises(ArchiveError, match=r"install dither\[remote\]"):
        dither.open("https://example.invalid/m.dither")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="systems that fork")
def test_a_forked_process_connects_for_itself(server: Server, data: bytes) -> None:
    expected = Archive.from_bytes(data)["layer8.weight"]
    with dither.open(server.url) as archive:
        child = os.fork()
        if not child:
            try:
                os._exit(0 if same_bits(archive["layer8.weight"], expected) else 1)
            finally:
                os._exit(2)
        deadline = time.monotonic() + 30
        found, status = 0, 0
        while not found and time.monotonic() < deadline:
            found, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.01)
        if not found:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert (found, status) == (child, 0)
        assert same_bits(archive["layer8.weight"], expected)
