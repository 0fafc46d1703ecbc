"""The demo: quick, once, and the parts that its comparison rests on."""

import json
import re
import subprocess
import sys
import threading
import urllib.request
import webbrowser
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dither.archive import load
from dither.cli import app, demo_command
from dither.cli.demo_command import served
from dither.core import CheckpointError, DitherError
from dither.demo.evaluate import evaluate_in_fresh_process
from dither.demo.network import DigitNet, load_digits
from dither.demo.plain_rounding import (
    load_rounded,
    pack_rounded,
    payload_nbytes,
    save_rounded,
    unpack_rounded,
)
from dither.demo.story import find_best, run


@pytest.mark.parametrize("bits", range(2, 9))
def test_plain_rounding(tmp_path: Path, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    state = {"w": torch.randn(7, 5, generator=generator), "b": torch.randn(3, generator=generator)}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    packed = pack_rounded(state, bits)
    assert payload_nbytes(packed) == -(-35 * bits // 8) + 8 + 12
    rounded = unpack_rounded(packed, bits, shapes)
    step = (state["w"].max() - state["w"].min()) / (2**bits - 1)
    assert float((rounded["w"] - state["w"]).abs().max()) <= float(step) * 0.5001
    assert torch.equal(rounded["b"], state["b"])
    save_rounded(tmp_path / "a.rounded.safetensors", packed, bits)
    again = load_rounded(tmp_path / "a.rounded.safetensors", shapes)
    assert all(torch.equal(again[name], rounded[name]) for name in state)


def test_the_fresh_process_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.dither").write_bytes(b"garbage")
    with pytest.raises(DitherError, match=r"not a \.dither archive"):
        evaluate_in_fresh_process([tmp_path / "a.dither"])


def test_other_files_are_no_rounded_networks(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="has no bits"):
        load_rounded(tmp_path / "a.safetensors", {"w": (2,)})


def row(method: str, nbytes: int, accuracy: float) -> dict[str, Any]:
    return {"method": method, "nbytes": nbytes, "accuracy": accuracy}


def test_the_finding() -> None:
    original = {"nbytes": 1000, "accuracy": 0.99}
    ours = [row("dither", 100, 0.985), row("dither", 50, 0.98), row("dither", 25, 0.90)]
    plain = [row("plain rounding", 200, 0.985), row("plain rounding", 90, 0.95)]
    text = find_best(original, ours + plain)
    assert "down to 50 bytes: 98.00% at 1/20 of the size" in text
    assert "needs 200 bytes for that, 4.0 times as many" in text
    assert "does not at any width" in find_best(original, ours + plain[1:])
    assert find_best(original, plain).startswith("No file of dither")


@pytest.mark.parametrize(
    ("package", "call"), [("sklearn", "load_digits()"), ("matplotlib", "require_matplotlib()")]
)
def test_a_missing_extra_is_named(package: str, call: str) -> None:
    program = (
        f"import sys\nsys.modules[{package!r}] = None\n"
        "from dither.core import DitherError\nfrom dither.demo.network import load_digits\n"
        "from dither.demo.picture import require_matplotlib\n"
        f"try:\n    {call}\nexcept DitherError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert 'pip install "dither[demo]"' in done.stdout


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(DitherError, match="is a file"):
        run(tmp_path / "out", quick=True)


def test_the_demo(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["demo", "--quick", "--json", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((out / "results.json").read_text())
    assert found["original"]["accuracy"] >= 0.97
    assert found["bit_equal"]
    assert all(item["bit_equal"] for item in found["rows"])
    for name in ("accuracy.png", "accuracy.svg", "digits.pt"):
        assert (out / name).stat().st_size > 1000
    smaller = {item["setting"]: item for item in found["rows"] if item["method"] == "dither"}
    assert smaller["8x"]["nbytes"] <= found["original"]["nbytes"] / 8
    assert smaller["8x"]["accuracy"] >= found["original"]["accuracy"] - 0.02
    assert smaller["8x"]["nbytes"] == (out / smaller["8x"]["file"]).stat().st_size
    assert set(load(out / smaller["8x"]["file"])) == set(DigitNet().state_dict())
    assert found["finding"].startswith("dither stays within")


def test_the_demo_says_what_it_will_do_before_torch_is_imported() -> None:
    program = (
        "import sys, types\nfrom dither.cli import app\n"
        "def demo(*_, **__):\n    sys.exit(3 if 'torch' in sys.modules else 7)\n"
        "sys.modules['dither.cli.work'] = types.SimpleNamespace(demo=demo)\n"
        "app(['demo', '--out', 'there'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 7, done.stderr
    assert re.search(r"handwritten digits.*about a minute.*there$", done.stderr.strip())


def test_the_page_is_served_to_a_browser_with_types_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "web").mkdir(parents=True)
    for name in ("index.html", "page.mjs", "ort.wasm"):
        (tmp_path / "out" / "web" / name).write_text(name)
    seen = {}

    def browse(url: str) -> None:
        def look() -> None:
            for name in ("", "page.mjs", "ort.wasm"):
                with urllib.request.urlopen(url + name) as answer:
                    seen[name] = (answer.read(), answer.headers.get_content_type())
            servers[0].shutdown()

        threading.Thread(target=look).start()

    servers = []

    def kept(folder: Path) -> ThreadingHTTPServer:
        servers.append(served(folder))
        return servers[0]

    monkeypatch.setattr(demo_command, "served", kept)
    monkeypatch.setattr(webbrowser, "open", browse)
    result = CliRunner().invoke(app, ["demo", "--web"])
    assert result.exit_code == 0, result.output
    assert seen[""] == (b"index.html", "text/html")
    assert seen["page.mjs"] == (b"page.mjs", "text/javascript")
    assert seen["ort.wasm"][1] == "application/wasm"


def test_a_page_that_was_not_built_is_named_with_what_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["demo", "--web"])
    assert result.exit_code == 2
    assert "make web" in " ".join(result.stderr.split())


def test_the_data_is_what_it_was() -> None:
    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert labels[:8].tolist() == [6, 5, 5, 7, 9, 9, 8, 4]
    assert float(images.max()) == 1
