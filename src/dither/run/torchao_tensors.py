"""Models whose layers run on the integers of an archive, as tensors of torchao."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dither.activations import apply, placed
from dither.archive import Archive, load_into
from dither.core import DitherError
from dither.model import inner, memory_of, refuse_attached
from dither.run.integers import Integers
from dither.run.quiet import quiet
from dither.terminal import some_names

_INT4_GROUPS = (128, 64, 32)
"""Weights that share a scale in the kernel for 4 bits, on the CPU."""

_ROWS = 16
"""Rows of which that kernel takes a multiple."""


@dataclass(frozen=True)
class Converted:
    """What :func:`to_torchao` did.

    Attributes:
        integers: weights that are tensors of torchao now, and how they are stored.
        dense: weights of Linear layers that stayed numbers, and why.
    """

    integers: dict[str, str]
    dense: dict[str, str]

    def __str__(self) -> str:
        """One line for each way of storing, and for each reason."""
        lines = []
        for title, table in (("", self.integers), ("dense, ", self.dense)):
            for kind in sorted(set(table.values())):
                names = [name for name, other in table.items() if other == kind]
                lines.append(f"{title}{kind}: {some_names(names)}")
        return "\n".join(lines)


def to_torchao(model: nn.Module, archive: Archive, *, four_bits: bool = True) -> Converted:
    """Load an archive into a model, and let its Linear layers keep integers, as torchao does.

    Weights on grids become ``Int8Tensor`` or, with 4 bits in runs of 32, 64 or 128 that share a
    scale, ``Int4OpaqueTensor``, which torchao has for the CPU and still calls a prototype. Their
    numbers are the archive's, bit for bit; products are added up in another order. All others are
    loaded as numbers.

    Args:
        model: is changed in place, on the CPU.
        archive: fits it.
        four_bits: whether to use the kernel for 4 bits, which is quick for bfloat16 alone; else
            those weights take 8.

    Raises:
        SpecError: the model is attached to a run.
        CheckpointError: the archive does not fit the model; nothing is changed then.
        DitherError: torchao is missing.
    """
    refuse_attached(model, "to_torchao")
    with quiet("torchao"):
        try:
            import torchao.quantization as torchao
            from torchao.prototype.quantization.int4 import Int4OpaqueTensor
        except ImportError as error:
            raise DitherError(
                f'tensors of torchao need {error.name}; run: pip install "dither[torchao]"'
            ) from error
    whole = inner(model)
    if archive.sites and not placed(whole):
        apply(whole, archive.sites)
    load_into(whole, archive)
    integers: dict[str, str] = {}
    dense: dict[str, str] = {}
    places = Counter(memory_of(v) for _, v in whole.named_parameters(remove_duplicate=False))
    for path, module in whole.named_modules():
        name = f"{path}.weight" if path else "weight"
        if not isinstance(module, nn.Linear) or name not in archive:
            continue
        held = Integers.of(archive.encoded(name))
        if places[memory_of(module.weight)] > 1:
            dense[name] = "another layer has the same weight"
        elif held is None:
            dense[name] = "its format is no grid"
        elif four_bits and (block := _int4_block(held)) is not None:
            made: Any = _int4(Int4OpaqueTensor, held, block)
            integers[name] = f"int4 in groups of {block}"
            module.weight = nn.Parameter(made, requires_grad=False)
        elif (eight := _int8(torchao.Int8Tensor, held)) is not None:
            integers[name] = "int8"
            module.weight = nn.Parameter(eight, requires_grad=False)
        else:
            dense[name] = "torchao has no such grid"
    return Converted(integers, dense)


def _int8(kind: Any, held: Integers) -> Any:
    """A row or a run in it for each scale; rows with zeros other than 0 torchao would misread."""
    rows, columns = held.steps.shape
    run = held.grouping.group or columns
    found = held.codes(8, signed=run >= columns)
    if found is None or held.grouping.axis == 1 or columns % run:
        return None
    codes, zero = found
    settings: dict[str, Any] = {}
    if zero is not None:
        codes, settings = codes - 128, {"zero_point": (zero - 128).to(torch.int8).reshape(rows, -1)}
    scale = held.by_row().scale.reshape(rows, -1).contiguous()
    return kind(codes.to(torch.int8), scale, [1, run], torch.float32, **settings)


def _int4_block(held: Integers) -> int | None:
    rows, columns = held.steps.shape
    if rows % _ROWS or held.codes(4, signed=True) is None:
        return None
    fitting = (n for n in _INT4_GROUPS if columns % n == 0)
    return next((n for n in fitting if held.by_block(held.scale, n) is not None), None)


def _int4(kind: Any, held: Integers, block: int) -> Any:
    """Codes from 0, of which the kernel subtracts 8."""
    scale = cast("Tensor", held.by_block(held.scale, block))
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu  # noqa: SLF001 - torch's only name
    pairs = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()
    return kind(pack(held.steps + 8, 1), pairs, [1, block], held.steps.shape)
