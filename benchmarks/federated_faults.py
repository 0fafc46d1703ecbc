"""What faults cost a federation of Flower's own processes, in seconds.

``python -m benchmarks.federated_faults``, in the environment of ``make test-federated``, starts a
SuperLink and two SuperNodes on this machine, which train a network on digits for four rounds, in
each case anew: without a fault; with one bit of a client's file changed; with a client that is
killed in round 2 and started again when that is over; and with a server that is killed in round 2
and started again at once. A round's seconds are mostly those in which Flower starts a process for
each client. Cases that have a result are not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from benchmarks.loopback import Loopback, until
from dither.archive import Archive, content_hash

RESULTS = Path(__file__).parent / "results" / "federated_faults.json"
ROUNDS = 4
PATIENCE = 300.0
"""Seconds that a case may take."""


def noted(federation: Loopback, number: int, what: str) -> float | None:
    """When a round began or ended, the last time it did; None: it did not."""
    path = federation.out / "notes.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    times = [n["time"] for n in map(json.loads, lines) if (n["round"], n["what"]) == (number, what)]
    return times[-1] if times else None


def until_noted(federation: Loopback, number: int, what: str) -> None:
    """Wait for it."""
    text = f"round {number} {what}: this does not happen"
    until(lambda: noted(federation, number, what) is not None, text, PATIENCE)


def no_fault(federation: Loopback) -> dict[str, float]:
    """As it should be."""
    federation.run(ROUNDS)
    return {}


def flipped(federation: Loopback) -> dict[str, float]:
    """One bit of what the last client sends in round 2."""
    federation.run(ROUNDS, {"flip": 1})
    return {}


def client_killed(federation: Loopback) -> dict[str, float]:
    """With SIGKILL; it is started again when the round is over."""
    federation.run(ROUNDS)
    until_noted(federation, 2, "begins")
    killed = time.time()
    federation.kill_client(1)
    until_noted(federation, 2, "ends")
    over = time.time()
    federation.join(1)
    until_noted(federation, 3, "ends")
    return {
        "from the kill to the end of round 2": round(over - killed, 1),
        "from its start to the end of round 3": round(time.time() - over, 1),
    }


def server_killed(federation: Loopback) -> dict[str, float]:
    """With SIGKILL; it is started at once. Its clients stay, and find it again."""
    federation.run(ROUNDS)
    until_noted(federation, 2, "begins")
    killed = time.time()
    federation.kill_server()
    federation.serve()
    up = time.time()
    federation.run(ROUNDS)
    until_noted(federation, 2, "ends")
    return {
        "until the server answers again": round(up - killed, 1),
        "from the kill to the end of round 2": round(time.time() - killed, 1),
    }


CASES: dict[str, Callable[[Loopback], dict[str, float]]] = {
    "no fault": no_fault,
    "message changed": flipped,
    "client killed": client_killed,
    "server killed": server_killed,
}


def measure(case: str) -> dict[str, Any]:
    """Seconds of rounds and of the fault, what was refused, and the model that came of it."""
    with tempfile.TemporaryDirectory() as folder, Loopback(Path(folder)) as federation:
        found = CASES[case](federation)
        federation.wait(PATIENCE)
        spans = []
        for number in range(1, ROUNDS + 1):
            begin, end = (noted(federation, number, what) for what in ("begins", "ends"))
            spans.append(round((end or 0.0) - (begin or 0.0), 1))
        with Archive.open(federation.out / "server.dither") as kept:
            traffic = kept.metadata["traffic"]
            model = content_hash(kept.state_dict())
    counts = {name: [one[name] for one in traffic] for name in ("refused", "failed", "down", "up")}
    return {"seconds of rounds": spans, "seconds": found, **counts, "model": model}


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    given = parser.parse_args()
    found = json.loads(given.json.read_text("utf-8")) if given.json.is_file() else {}
    cases = found.setdefault("cases", {})
    for case in given.cases:
        if case in cases:
            continue
        cases[case] = measure(case)
        cases[case]["same model"] = cases[case]["model"] == cases["no fault"]["model"]
        found["environment"] = describe() | {"command": "python -m benchmarks.federated_faults"}
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(case, cases[case], flush=True)


if __name__ == "__main__":
    main()
