"""Sites of functions: the sums, products and softmaxes that a module's `forward` computes.

A mode of torch (``TorchFunctionMode``) sees every function while a module runs that has such
sites, and a stack says whose `forward` is running. It needs no graph: torch.fx cannot trace models
that branch on their inputs, as those of transformers do, and would put another model in the place
of the user's. Modules keep their class and their parameters; `forward` in the instance calls the
class's.
"""

from __future__ import annotations

import inspect
import math
import re
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dither.model import SITES

KINDS = ("add", "matmul", "scores", "softmax")
RESERVED = frozenset({SITES, "dither_shadows"})
"""Names of children that this library adds."""
ATTENTION = frozenset(KINDS[1:])
"""Kinds for which attention in one function is computed step by step."""

_SUMS = (torch.add, Tensor.add, Tensor.add_)
_PRODUCTS = (
    *(torch.matmul, Tensor.matmul, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm),
    *(torch.baddbmm, Tensor.baddbmm, torch.einsum),
)
_SOFTMAXES = (functional.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
_KIND_OF: dict[Any, str] = {
    **dict.fromkeys(_SUMS, "add"),
    **dict.fromkeys(_PRODUCTS, "matmul"),
    **dict.fromkeys(_SOFTMAXES, "softmax"),
}
_IN_PLACE = {Tensor.add_}
_END = re.compile(rf"({'|'.join(KINDS)})(\.[1-9][0-9]*)?")
_GLOB = re.compile(rf"({'|'.join(KINDS)})\b.*")

Change = Callable[[Tensor], Tensor]
Find = Callable[[str], Change | None]
"""What happens to the tensor at an end, such as ``"add.1"``."""
Tables = Callable[[str], tuple[Find, Iterable[str]] | None]
"""Of a module's path, what happens at its ends, and to which kinds; None where nothing does."""


def is_function(end: str) -> bool:
    """Whether what stands behind the @ of a site is a function: ``"add"``, ``"softmax.1"``."""
    return _END.fullmatch(end) is not None


def asks_function(glob: str) -> bool:
    """Whether a rule's glob names functions: ``"*@add*"``, but not ``"*@*"``."""
    return _GLOB.fullmatch(glob.rpartition("@")[2]) is not None


def kind_of(end: str) -> str:
    """Without its number."""
    return end.partition(".")[0]


class _Stack(threading.local):
    """The calls of traced modules that are running in this thread, the innermost last."""

    def __init__(self) -> None:
        self.calls: list[_Call | None] = []


_stack = _Stack()


class _Call:
    """One call of a module, and how many functions of each kind it has computed.

    Args:
        find: what changes at an end.
        kinds: for which something may.
    """

    def __init__(self, find: Find, kinds: frozenset[str]) -> None:
        self._find = find
        self._counts: dict[str, int] = {}
        self.is_split = not ATTENTION.isdisjoint(kinds)

    def change(self, kind: str, values: Tensor) -> Tensor:
        """The next tensor of a kind, changed where there is a site.

        What a mask has hidden, with minus infinity or the least number of its type, stays as it is
        and counts as 0.
        """
        number = self._counts.get(kind, 0)
        self._counts[kind] = number + 1
        change = self._find(f"{kind}.{number}" if number else kind)
        if change is None:
            return values
        if kind == "softmax":
            return change(values)
        hidden = values <= torch.finfo(values.dtype).min / 2
        return torch.where(hidden, values, change(values.masked_fill(hidden, 0)))

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002 - torch's own signature
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        """``scaled_dot_product_attention`` step by step, as its documentation defines it.

        Rows of which everything is masked are 0, as in torch.
        """
        if query.is_nested:
            return functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        if enable_gqa:
            key, value = (
                part.repeat_interleave(query.shape[-3] // part.shape[-3], -3)
                for part in (key, value)
            )
        products = self.change("matmul", query @ key.transpose(-2, -1))
        scores = products * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -math.inf)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        scores = self.change("scores", scores)
        weights = functional.softmax(scores, -1)
        weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0)
        weights = self.change("softmax", weights)
        if dropout_p:
            weights = functional.dropout(weights, dropout_p)
        return self.change("matmul", weights @ value)


def apart(change: Change, values: Tensor) -> Tensor:
    """Call ``change``; its own sums and products are none of the running module's."""
    if torch.compiler.is_compiling() or not _stack.calls:
        return change(values)
    with _hidden():
        return change(values)


@contextmanager
def _hidden() -> Iterator[None]:
    calls, _stack.calls = _stack.calls, []
    try:
        yield
    finally:
        _stack.calls = calls


# --- functions -----------------------------------------------------------------------------------


class _Mode(TorchFunctionMode):
    """Sees the functions of the running modules."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        given = dict(kwargs or {})
        call = _stack.calls[-1] if _stack.calls else None
        if call is None:
            return func(*args, **given)
        if func is functional.multi_head_attention_forward:
            with self:
                return _opened(*args, **given)
        with _hidden():  # the mode is off in here, and modules called in here begin anew
            return _compute(call, func, args, given)


def _compute(
    call: _Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A function's value, changed at its site."""
    if func is functional.scaled_dot_product_attention and call.is_split:
        return call.attention(*args, **kwargs)
    kind = _KIND_OF.get(func)
    if kind == "softmax" and args and _is_real(args[0]):
        args = (call.change("scores", args[0]), *args[1:])
    elif kind == "softmax" and _is_real(kwargs.get("input")):
        kwargs["input"] = call.change("scores", kwargs["input"])
    result = func(*args, **kwargs)
    if kind is None or not _is_real(result) or (kind == "add" and not _is_sum(args, kwargs)):
        return result
    if func in _IN_PLACE or kwargs.get("out") is not None:
        return result.copy_(call.change(kind, result.clone()))
    return call.change(kind, result)


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not value.is_nested


def _is_sum(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether two tensors are added, not a constant."""
    terms = [*args[:2], *(kwargs[name] for name in ("input", "other") if name in kwargs)]
    return len(terms) == 2 and all(_is_real(term) and term.ndim for term in terms)


def _open(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch that does not hand itself to modes, but whose own functions do."""
    if not isinstance(function, types.FunctionType):
        return function
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    made = types.FunctionType(function.__code__, names, function.__name__)
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return made


_opened = _open(functional.multi_head_attention_forward)


# --- modules -------------------------------------------------------------------------------------


class Traced:
    """A module's `forward` that says when it runs; copied and pickled with the module.

    Args:
        module: whose it is.
        inner: what stood in the instance before, if anything.
        find: what changes at an end; by default the module's quantizers.
        kinds: for which something may.
    """

    def __init__(
        self,
        module: nn.Module,
        inner: Callable[..., Any] | None = None,
        find: Find | None = None,
        kinds: Iterable[str] = (),
    ) -> None:
        self.module = module
        self.inner = inner
        self.find = find
        self.kinds = frozenset(kinds)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What is called; :mod:`inspect` finds the signature here."""
        inner = type(self.module).forward.__get__(self.module)
        return inner if self.inner is None else self.inner

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)

    @torch.compiler.disable  # type: ignore[untyped-decorator] # compilers know no such modes
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._call()
        calls = _stack.calls
        depth = len(calls)
        if not depth and call is None:
            return self.__wrapped__(*args, **kwargs)
        calls.append(call)
        try:
            if depth:
                return self.__wrapped__(*args, **kwargs)
            with _Mode():
                return self.__wrapped__(*args, **kwargs)
        finally:
            del calls[depth:]

    def _call(self) -> _Call | None:
        if self.find is not None:
            return _Call(self.find, self.kinds) if self.kinds else None
        held: Any = self.module._modules.get(SITES)
        if held is None:
            return None
        found = {end: module for end, module in held.items() if is_function(end)}
        return _Call(found.get, frozenset(map(kind_of, found))) if found else None


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module, without what this library adds."""
    for path, module in model.named_modules():
        if RESERVED.isdisjoint(path.split(".")):
            yield path, module


def trace(module: nn.Module, find: Find | None = None, kinds: Iterable[str] = ()) -> None:
    """Let a module say when it runs."""
    given = module.__dict__.get("forward")
    if not isinstance(given, Traced):
        module.__dict__["forward"] = Traced(module, given, find, kinds)


def untrace(module: nn.Module) -> None:
    """Take that back."""
    given = module.__dict__.get("forward")
    if isinstance(given, Traced):
        del module.__dict__["forward"]
        if given.inner is not None:
            module.__dict__["forward"] = given.inner


@contextmanager
def watching(model: nn.Module, tables: Tables) -> Iterator[None]:
    """See the functions of a model for a while.

    Args:
        model: any module.
        tables: of a module's path, what happens at its ends, and to which kinds.
    """
    modules = list(own_modules(model))
    try:
        for path, module in modules:
            find, kinds = tables(path) or (_nothing, ())
            trace(module, find, kinds)
        yield
    finally:
        for _, module in modules:
            untrace(module)


def _nothing(end: str) -> None:
    del end
