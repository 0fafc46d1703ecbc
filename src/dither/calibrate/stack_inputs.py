"""The input vectors of each matrix in a stack, seen where they are multiplied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dither.model import memory_of

_PRODUCTS = {
    "mm": 0,
    "bmm": 0,
    "addmm": 1,
    "baddbmm": 1,
    "_grouped_mm": 0,
    "grouped_mm_fallback": 0,
}
"""Products of matrices, by name, and the place of their first operand.

A grouped one multiplies rows up to each of some offsets by a matrix of its own; the fallback is
that of transformers.
"""

_PICKS = ("index", "index_select")


class StackInputs(TorchDispatchMode):
    """Watches, while entered, what is multiplied by matrices of stacks.

    What a module does with such a parameter, it does in functions: for each matrix alone, for all
    at once, for rows that are sorted by matrix, or for each row with a copy of its matrix. All of
    these come down to a few operators, whose operands are views of the parameter's memory or of
    rows picked from it. What is multiplied by other copies is not seen.

    Args:
        stacks: parameters ``(matrices, outputs, inputs)`` by name.
    """

    def __init__(self, stacks: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stacks = {name: value for name, value in stacks.items() if value.is_contiguous()}
        self._picked: list[tuple[str, Tensor, Tensor]] = [
            (name, value, torch.arange(len(value))) for name, value in self._stacks.items()
        ]
        self._seen: dict[str, list[list[Tensor]]] = {}

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an operator of torch
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operator, and look at its operands."""
        given = dict(kwargs or {})
        if func.namespace == "aten" and torch.is_inference_mode_enabled():
            with self:  # there operators that consist of others come whole
                made = func.decompose(*args, **given)
            if made is not NotImplemented:
                return made
        made = func(*args, **given)
        kind = func.overloadpacket.__name__
        if kind in _PRODUCTS:
            left, right, *more = args[_PRODUCTS[kind] :]
            offsets = more[0] if more else given.get("offs")
            self._multiplied(left, right, offsets if "grouped" in kind else None)
        elif kind in _PICKS:
            self._pick(args[0], args[1:], made)
        return made

    def vectors(self) -> Iterator[tuple[str, list[Tensor]]]:
        """By stack, in the order of first use: of each matrix ``(vectors, inputs)``, maybe none."""
        for name, seen in self._seen.items():
            stack = self._stacks[name]
            none = torch.zeros(0, stack.shape[2], device=stack.device)
            yield name, [torch.cat([none, *parts]) for parts in seen]

    def _pick(self, source: Tensor, where: Sequence[Any], made: Tensor) -> None:
        """Remember matrices that are picked from a stack, one for each row of inputs."""
        index = where[-1] if isinstance(where[-1], Tensor) else where[-1][0]
        is_first = where[0] == 0 if len(where) > 1 else len(where[0]) == 1
        if not is_first or not isinstance(index, Tensor) or index.dtype == torch.bool:
            return
        for name, stack in self._stacks.items():
            if source.shape == stack.shape and memory_of(source) == memory_of(stack):
                rows = made.reshape(-1, *stack.shape[1:])
                self._picked.append((name, rows, index.reshape(-1).cpu() % len(stack)))

    def _multiplied(self, left: Tensor, right: Tensor, offsets: Tensor | None) -> None:
        if left.layout != torch.strided or right.layout != torch.strided:
            return
        for operand, vectors in ((right.mT, left), (left, right.mT)):  # x @ W.T or W @ x.T
            for name, base, numbers in self._picked:
                begun = _begun(operand, base)
                if begun is not None:
                    seen = self._seen.setdefault(name, [[] for _ in self._stacks[name]])
                    matrices = [numbers[some].tolist() for some in begun]
                    _share(seen, vectors.detach().float(), matrices, offsets)


def _begun(operand: Tensor, base: Tensor) -> list[slice] | None:
    """Which matrices of a base each ``(outputs, inputs)`` of an operand begins; None for others.

    The operand may have the outputs of several matrices, or some of them: whose first one it has,
    of that the inputs are counted here. It has all inputs.
    """
    inputs = base.shape[2]
    if operand.untyped_storage().data_ptr() != base.untyped_storage().data_ptr():
        return None
    if not operand.numel() or operand.shape[-1] != inputs or operand.stride()[-2:] != (inputs, 1):
        return None
    place = operand.storage_offset() - base.storage_offset()
    count, stride = (len(operand), operand.stride(0)) if operand.ndim == 3 else (1, 0)
    rows, outputs = operand.shape[-2], base.shape[1]
    firsts = [(place + number * stride) // inputs for number in range(count)]
    if place < 0 or place % inputs or stride % inputs or max(firsts) + rows > len(base) * outputs:
        return None
    return [slice(-(-row // outputs), (row + rows - 1) // outputs + 1) for row in firsts]


def _share(
    seen: list[list[Tensor]], vectors: Tensor, matrices: list[list[int]], offsets: Tensor | None
) -> None:
    """Give vectors to the matrices that they are multiplied by.

    Args:
        seen: of each matrix.
        vectors: ``(operands, vectors, inputs)`` or, of one operand or with offsets, without the
            first axis.
        matrices: of each operand.
        offsets: where the vectors of each operand end, in a common list of all.
    """
    each: Iterable[Tensor] = vectors.unsqueeze(0) if vectors.ndim == 2 else vectors
    if offsets is not None and vectors.ndim == 2:
        ends = offsets.tolist()
        each = [vectors[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    for some, numbers in zip(each, matrices, strict=False):
        for number in numbers:
            seen[number].append(some)
