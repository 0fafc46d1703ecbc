"""Models that nobody tuned on: what each keeps at 8, 12, 16 and 24 times fewer bytes.

    python -m benchmarks.zoo [--only 'g2p_en/*'] [--nncodec PYTHON] [--results FOLDER]

For each model of `benchmarks.zoo_models`: its score in float32; files of `dither.compress` without
data and with samples; NNCodec's (with the interpreter of its own environment, made by
`benchmarks.peers.setup`) at several QPs; and plain rounding to int8 and int4 with one scale for
each output, compressed by xz. Every row is measured in a process of its own and kept in
``FOLDER/MODEL/METHOD-SETTING.json``; those that exist are not repeated (``--again`` does). A model
whose package is missing is left out, and said so. ``FOLDER/README.md`` is the table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import lzma
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.environment import describe

MODELS = ("efficientnet_lite0", "g2p_en", "wordllama", "silero_vad")
SIZES = ("8x", "12x", "16x", "24x")
SETTINGS = {
    "fp32": ("none",),
    "dither": SIZES,
    "dither-data": SIZES,
    "nncodec": tuple(f"qp{qp}" for qp in range(-28, -7, 4)),
    "xz": ("int8", "int4"),
}
_RESULTS = Path("benchmarks/results/zoo")
_PEER = Path(__file__).parent / "peers" / "nncodec_peer.py"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure real models that nobody tuned on.")
    parser.add_argument("--only", default="*", help="a glob of MODEL/METHOD-SETTING")
    parser.add_argument("--nncodec", type=Path, help="its environment's interpreter")
    parser.add_argument("--results", type=Path, default=_RESULTS)
    parser.add_argument("--again", action="store_true", help="repeat what is there")
    parser.add_argument("--row", nargs=3, metavar=("MODEL", "METHOD", "SETTING"))
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.row, options.nncodec)))
        return
    for model in MODELS:
        for method, settings in SETTINGS.items():
            for setting in settings:
                name = f"{model}/{method}-{setting}"
                path = options.results / f"{name}.json"
                if not fnmatchcase(name, options.only) or (path.exists() and not options.again):
                    continue
                if method == "nncodec" and options.nncodec is None:
                    continue
                _keep(path, (model, method, setting), options.nncodec)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "README.md").write_text(page(options.results), encoding="utf-8")


def _keep(path: Path, row: tuple[str, str, str], nncodec: Path | None) -> None:
    """Measure a row in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.zoo", "--row", *row]
    command += ["--nncodec", str(nncodec)] if nncodec else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        print(f"{'/'.join(row)}: NOT MEASURED: {''.join(said)}", flush=True)
        return
    found = json.loads(done.stdout.splitlines()[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{'/'.join(row)}: {found['nbytes']:,} bytes, {found['score']:.2f}", flush=True)


def measure(row: Sequence[str], nncodec: Path | None) -> dict[str, Any]:
    """One row, of a model, a method and a setting: bytes, score, seconds, memory."""
    model, method, setting = row
    zoo: Any = importlib.import_module(f"benchmarks.zoo_models.{model}")
    network = zoo.load()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        nbytes, remark = _compressed(zoo, network, (method, setting), (Path(scratch), nncodec))
    seconds = time.perf_counter() - start
    return {
        "model": model,
        "method": method,
        "setting": setting,
        "nbytes": nbytes,
        "score": zoo.evaluate(network),
        "metric": zoo.SCORE,
        "less_is_better": zoo.LESS,
        "seconds": round(seconds, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "trials": remark,
        **describe(),
        "command": f"python -m benchmarks.zoo --row {' '.join(row)}",
    }


def _compressed(
    zoo: Any,  # noqa: ANN401 - a module
    network: Any,  # noqa: ANN401 - torch comes late
    what: tuple[str, str],
    tools: tuple[Path, Path | None],
) -> tuple[int, list[str]]:
    """Replace a network's weights by what a method keeps of them; bytes, and what it says."""
    import torch

    import dither

    (method, setting), (folder, nncodec) = what, tools
    state = network.state_dict()
    plain = sum(value.numel() * value.element_size() for value in state.values())
    if method == "fp32":
        return plain, []
    if method.startswith("dither"):
        data = zoo.samples() if method == "dither-data" else None
        archive = dither.compress(network, setting, data=data)
        archive.save(folder / "m.dither")
        dither.load_into(network, folder / "m.dither")
        return (folder / "m.dither").stat().st_size, [str(trial) for trial in archive.trials]
    if method == "xz":
        found, nbytes = rounded(state, int(setting.removeprefix("int")))
    else:
        found, nbytes = _nncodec(state, int(setting.removeprefix("qp")), folder, nncodec)
    with torch.no_grad():
        for name, value in found.items():
            state[name].copy_(value)
    return nbytes, []


def rounded(state: Mapping[str, Any], bits: int) -> tuple[dict[str, Any], int]:
    """Weights on a symmetric grid for each output, all else in float32; bytes after xz -9e."""
    import torch

    found, payload = {}, bytearray()
    most = 2 ** (bits - 1) - 1
    for name, value in state.items():
        if not value.is_floating_point() or value.ndim < 2:
            payload += value.numpy().tobytes()
            continue
        flat = value.reshape(len(value), -1)
        scale = flat.abs().amax(1, keepdim=True) / most
        scale = torch.where(scale > 0, scale, 1.0)
        codes = (flat / scale).round().clamp(-most, most)
        found[name] = (codes * scale).reshape(value.shape)
        numbers = (codes + most + 1).to(torch.uint8).reshape(-1)
        if bits == 4:
            numbers = torch.nn.functional.pad(numbers, (0, len(numbers) % 2))
            numbers = numbers[::2] * 16 + numbers[1::2]
        payload += numbers.numpy().tobytes() + scale.numpy().tobytes()
    return found, len(lzma.compress(bytes(payload), preset=9 | lzma.PRESET_EXTREME))


def _nncodec(
    state: Mapping[str, Any], qp: int, folder: Path, python: Path | None
) -> tuple[dict[str, Any], int]:
    """What NNCodec keeps, by its own interpreter."""
    from safetensors.torch import load_file, save_file

    source, coded, back = (folder / name for name in ("a.safetensors", "a.nnc", "b.safetensors"))
    save_file({k: v.contiguous() for k, v in state.items() if v.is_floating_point()}, source)
    # Of another NumPy: what this process was told to import is not for it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for command in (["encode", source, coded, "--qp", str(qp)], ["decode", coded, back]):
        subprocess.run(
            [str(python), str(_PEER), *map(str, command)],
            check=True,
            capture_output=True,
            env=environment,
        )
    return load_file(back), coded.stat().st_size


def page(results: Path) -> str:
    """The table of all rows that are there, the largest files of a model first."""
    lines = [
        "# Models that nobody tuned on",
        "",
        "Made by `python -m benchmarks.zoo`, whose first lines say what the rows are; the JSON",
        "files beside this page have commit, machine, seconds and memory of each.",
    ]
    for model in MODELS:
        rows = [json.loads(path.read_text()) for path in sorted((results / model).glob("*.json"))]
        if not rows:
            continue
        order = "less is better" if rows[0]["less_is_better"] else "more is better"
        lines += ["", f"## {model}: {rows[0]['metric']} ({order})", ""]
        lines += ["| method | setting | bytes | smaller | score | seconds |"]
        lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
        whole = max(row["nbytes"] for row in rows)
        for row in sorted(rows, key=lambda row: -row["nbytes"]):
            lines.append(
                f"| {row['method']} | {row['setting']} | {row['nbytes']:,} | "
                f"{whole / row['nbytes']:.1f}x | {row['score']:.2f} | {row['seconds']:.0f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
