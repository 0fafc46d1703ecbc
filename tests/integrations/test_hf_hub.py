"""Folders go to a hub and come back; the hub is a server of a few lines in this process."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import dither
from dither.core import CheckpointError
from tests.test_hf_folders import BERT, build, place

pytest.importorskip("transformers", reason="NEEDS transformers: install dither[hf]")
pytest.importorskip("huggingface_hub", reason="NEEDS huggingface_hub: install dither[hf]")

from dither.integrations.transformers import (
    WEIGHTS,
    push_to_hub,
    save_pretrained,
)

__all__ = ["place"]

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub to make a repository, commit files and read them."""

    files: dict[str, bytes]

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        data = self.body()
        if self.path.endswith("/repos/create"):
            name = json.loads(data)["name"]
            self.answer(
                {"url": f"http://{self.headers['Host']}/user/{name}", "name": f"user/{name}"}
            )
        elif "/preupload/" in self.path:
            asked = json.loads(data)["files"]
            told = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in asked
            ]
            self.answer({"files": told})
        elif "/commit/" in self.path:
            for line in map(json.loads, data.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            url = f"http://{self.headers['Host']}/user/m/commit/{COMMIT}"
            self.answer({"commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer({})

    def do_HEAD(self) -> None:
        self.do_GET(with_body=False)

    def do_GET(self, *, with_body: bool = True) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/"):
            held = [{"rfilename": name, "path": name, "type": "file"} for name in self.files]
            is_tree = "/tree/" in path
            self.answer(held if is_tree else {"id": "user/m", "sha": COMMIT, "siblings": held})
            return
        data = self.files.get(path.partition(f"/resolve/{COMMIT}/")[2] or path.rpartition("/")[2])
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    files: dict[str, bytes] = {}
    kind: Any = type("Own", (Hub,), {"files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()
    server.server_close()
    thread.join()


PROGRAM = """
import sys
from transformers import AutoModel
if sys.argv[1] == "known":
    from dither.integrations.transformers import push_to_hub
    print(push_to_hub(sys.argv[2], "user/m", private=True, token="hf_none"))
try:
    model, info = AutoModel.from_pretrained("user/m", output_loading_info=True)
    print("read", len(info["missing_keys"]), float(model.embeddings.word_embeddings.weight.sum()))
except OSError as error:
    print(str(error).splitlines()[0])
"""


def test_a_folder_goes_to_a_hub_and_comes_back(
    hub: tuple[str, dict[str, bytes]], place: Path
) -> None:
    """In one line where dither is known; elsewhere what is missing is said."""
    address, files = hub
    model = build("Bert", BERT)
    archive = dither.compress(model, "4x")
    save_pretrained(archive, place / "out", model)

    def python(kind: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, kind, str(place / "out")],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={
                **os.environ,
                "HF_ENDPOINT": address,
                "HF_HOME": str(place / kind),
                "HF_HUB_OFFLINE": "0",  # the hub is here
            },
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    pushed, read = python("known")
    assert pushed.startswith(address)
    total = float(archive["embeddings.word_embeddings.weight"].sum())
    assert read == f"read 0 {total}"
    assert files[WEIGHTS] == (place / "out" / WEIGHTS).read_bytes()
    assert {"config.json", WEIGHTS} <= set(files)
    (said,) = python("unknown")
    assert "`pip install dither` and `import dither.integrations.transformers`" in said


def test_what_is_no_folder_of_ours_is_not_uploaded(place: Path) -> None:
    with pytest.raises(CheckpointError, match="save_pretrained writes it"):
        push_to_hub(place, "user/m")
