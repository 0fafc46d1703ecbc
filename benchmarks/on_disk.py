"""Compress a folder of shards with data, its weights on a disk or in memory: memory and time.

``python -m benchmarks.on_disk --layers 1 5 --json FILE`` makes a folder of a Llama with random
weights (bfloat16, in shards; heavy tails, rows of different scale; seeded) for each number of
layers. Each is compressed with samples of random tokens in a process of its own, on a disk and in
memory; that process's peak of resident memory is noted, files that it maps included, and what it
had before there was a model. The files' SHA-256 are compared. Runs that FILE has are not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SAMPLES, TOKENS, BATCH = 128, 16, 32


def make(folder: Path, layers: int, width: int) -> None:
    """A folder of a model with random weights, in shards of 32 MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8 * width,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                rows = torch.randn(len(parameter), 1).mul_(0.4).exp_()
                tails = torch.randn(parameter.shape).mul_(0.25).exp_()
                values = torch.randn(parameter.shape).mul_(tails).mul_(rows)
                parameter.copy_(values.mul_(parameter.shape[1] ** -0.5))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="32MB")


def child(source: Path, output: Path, where: str, room: int) -> dict[str, Any]:
    """Compress a folder; this process's memory and time."""
    import torch

    import dither
    from dither.archive import load_weights
    from dither.checkpoint import Pages
    from dither.cli.folders import folder_model, scored
    from dither.disk import home_of, on_disk

    torch.set_num_threads(1)
    begin = time.monotonic()
    dither.compress({"w": torch.randn(256, 256)}, "4x")  # what is compiled is not the model's
    state = load_weights(source)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    if where == "on disk":
        with on_disk(output.parent, room, Pages.of(state.values()).release):
            model = folder_model(source, state)
    else:
        model = folder_model(source)
    home = home_of(model)
    draw = torch.Generator().manual_seed(1)
    rows = max(len(value) for value in state.values())
    ids = torch.randint(rows, (SAMPLES, TOKENS), generator=draw)
    data = scored(model, [{"input_ids": part} for part in ids.split(BATCH)])
    del state
    with dither.compress_to(output, model, "8x", data=data) as archive:
        trials = [str(trial) for trial in archive.trials]
    return {
        "where": where,
        "model_nbytes": sum(p.nbytes for p in model.parameters()),
        "largest_nbytes": max(p.nbytes for p in model.parameters()),
        "before_nbytes": before,
        "peak_nbytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "disk_nbytes": 0 if home is None else home.nbytes,
        "most_in_use_nbytes": 0 if home is None else home.peak,
        "seconds": round(time.monotonic() - begin, 1),
        "processor_s": round(time.process_time(), 1),
        "sha256": hashlib.sha256(output.read_bytes()).hexdigest(),
        "nbytes": output.stat().st_size,
        "trials": trials,
    }


def measured(
    place: Path, layers: int, options: argparse.Namespace, known: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What is not known, each in a process of its own."""
    done = {one["where"] for one in known if one["layers"] == layers}
    source, own = place / f"{layers} layers", [sys.executable, "-m", "benchmarks.on_disk"]
    sizes = ["--width", str(options.width), "--room", str(options.room)]
    subprocess.run([*own, "--make", str(source), "--layers", str(layers), *sizes], check=True)
    found = []
    for where in [where for where in options.where if where not in done]:
        output = place / f"{layers} {where}.dither"
        command = [*own, "--child", where, str(source), str(output), *sizes]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        found.append({"layers": layers} | json.loads(told.splitlines()[-1]))
        print(json.dumps(found[-1], indent=1), flush=True)
    return found


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--width", type=int, default=512, help="of the model (512)")
    parser.add_argument("--room", type=int, default=1 << 24, help="bytes in memory (2^24)")
    parser.add_argument("--where", nargs="+", default=["on disk", "in memory"])
    parser.add_argument("--folder", type=Path, help="where there is room on a disk")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, options.layers[0], options.width)
        return 0
    if options.child:
        where, source, output = options.child
        print(json.dumps(child(Path(source), Path(output), where, options.room)))
        return 0
    settings = {"width": options.width, "room_nbytes": options.room}
    settings |= {"samples": SAMPLES, "tokens": TOKENS}
    runs: list[dict[str, Any]] = []
    if options.json and options.json.is_file():
        before = json.loads(options.json.read_text(encoding="utf-8"))
        runs = before["runs"] if settings.items() <= before.items() else []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        for n in options.layers:
            runs += measured(Path(temporary), n, options, runs)
    runs.sort(key=lambda one: (one["layers"], one["where"]))
    from benchmarks.environment import describe  # torch comes last: a child begins with our memory

    digests = {(one["layers"], one["sha256"]) for one in runs}
    result: dict[str, Any] = settings | {"runs": runs, "slopes": slopes(runs)}
    result["same_sha256"] = len(digests) == len({one["layers"] for one in runs})
    print(json.dumps(result["slopes"], indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(describe() | result, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0 if result["same_sha256"] else 1


def slopes(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes of memory at the peak for each byte of a larger model."""
    found = {}
    for where in dict.fromkeys(one["where"] for one in runs):
        first, *_, last = [one for one in runs if one["where"] == where] * 2
        more = last["model_nbytes"] - first["model_nbytes"]
        if more:
            found[where] = round((last["peak_nbytes"] - first["peak_nbytes"]) / more, 3)
    return found


if __name__ == "__main__":
    sys.exit(main())
