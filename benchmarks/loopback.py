"""Flower's own processes on this machine: a server, and clients that reach it over loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

APP = Path(__file__).parent / "federation"
SOURCE = Path(__file__).parents[1] / "src"
WAIT = 120.0
"""Seconds, after which a process that should have done something has failed."""


class Loopback:
    """A SuperLink, SuperNodes, and a run of the app; all end with the context.

    Every process is one of Flower's commands. The server's and the clients' functions run in
    processes of their own that these start, as in any deployment.

    Args:
        folder: of logs, Flower's own files and what the app keeps.
        clients: SuperNodes that are started.
        simulated: clients are of Flower's simulation engine, on Ray, and there are no SuperNodes.
    """

    def __init__(self, folder: Path, clients: int = 2, *, simulated: bool = False) -> None:
        self.folder, self.clients, self._simulated = folder.resolve(), clients, simulated
        self.out = self.folder / "out"
        self.out.mkdir(parents=True, exist_ok=True)
        self._home = self.folder / "home"
        self._home.mkdir(exist_ok=True)
        self.link: subprocess.Popen[bytes] | None = None
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._port = 0

    def __enter__(self) -> Self:
        try:
            self.begin()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def begin(self) -> None:
        """Start the server, and clients where there are none."""
        self.serve()
        for number in () if self._simulated else range(self.clients):
            self.join(number)

    def serve(self) -> None:
        """Start the server, at the same port as before."""
        self._port = self._port or free_port()
        config = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{self.address}"\n'
        (self._home / "config.toml").write_text(config + "insecure = true\n", encoding="utf-8")
        options = ["--disable-runtime-dependency-installation", "--host", "127.0.0.1"]
        # With a file for its state it knows its clients again; without, it turns them away.
        options += ["--port", str(self._port), "--database", str(self.folder / "link.db")]
        options += ["--simulation"] if self._simulated else []
        self.link = self._start("link", "flower-superlink", "--insecure", *options)
        until(self._answers, "Flower's server does not answer")

    def join(self, number: int) -> None:
        """Start a client."""
        options = ["--superlink", self.address, "--port", str(free_port())]
        options += ["--node-config", f"partition-id={number}"]
        name = f"node-{number}"
        self.nodes[number] = self._start(name, "flower-supernode", "--insecure", *options)

    def run(self, rounds: int, settings: Mapping[str, str | float] | None = None) -> None:
        """Hand over the app; it begins once all clients are there."""
        values: dict[str, str | float] = {"folder": str(self.out), "rounds": rounds}
        values |= {"clients": self.clients, **(settings or {})}
        text = " ".join(f"{key}={value!r}" for key, value in values.items())
        options = ["--run-config", text]
        if self._simulated:
            options += ["--federation-config", f"num-supernodes={self.clients}"]
        done = self._start("run", "flwr", "run", str(APP), "here", *options)
        if done.wait(WAIT):
            raise RuntimeError(f"flwr run ended with {done.returncode}: {self.log('run')}")

    def wait(self, seconds: float = WAIT) -> None:
        """Until all rounds are done."""
        until((self.out / "done").is_file, "the run does not end", seconds)

    def log(self, name: str) -> str:
        """What a process printed."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    @property
    def address(self) -> str:
        """Of the server."""
        return f"127.0.0.1:{self._port}"

    def end(self) -> None:
        """Kill all."""
        for number in list(self.nodes):
            self.kill_client(number)
        self.kill_server()

    def kill_client(self, number: int) -> None:
        """With its function, if that runs: the client is gone at once, and says nothing."""
        _kill_tree(self.nodes.pop(number))

    def kill_server(self) -> None:
        """With its function."""
        if self.link is not None:
            _kill_tree(self.link)
        self.link = None

    def _start(self, name: str, command: str, *options: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "FLWR_HOME": str(self._home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(SOURCE),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [str(Path(sys.executable).parent / command), *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )

    def _answers(self) -> bool:
        if self.link is None or self.link.poll() is not None:
            raise RuntimeError(f"Flower's server ended: {self.log('link')}")
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1):
            return True
        return False


def until(holds: Callable[[], bool], error: str, seconds: float = WAIT) -> None:
    """Wait.

    Raises:
        TimeoutError: it took longer than the seconds.
    """
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(error)
        time.sleep(0.05)


def free_port() -> int:
    """One that nobody has now."""
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return int(some.getsockname()[1])


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """A process and all that it started, which Flower puts into sessions of their own."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, check=True)
    parents = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    tree = [process.pid]
    for one in tree:
        tree += [child for child, parent in parents if parent == one]
    for one in tree:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    process.wait()
