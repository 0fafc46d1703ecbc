"""The input vectors that a layer's weight multiplies, as a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from dither.data import arranged

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTransposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

_CHUNK = 1 << 22
"""Numbers of unfolded inputs that are in memory at once, about."""


def outputs_axis(module: nn.Module) -> int:
    """The axis of the module's ``weight`` that counts outputs."""
    return 1 if isinstance(module, ConvTransposed) or is_conv1d_of_gpt2(module) else 0


def is_conv1d_of_gpt2(module: nn.Module) -> bool:
    """Whether this is the Conv1D of transformers: a linear layer whose weight is transposed."""
    if not any(kind.__name__ == "Conv1D" for kind in type(module).__mro__):
        return False  # before the weight is read, which a parametrization would compute
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def has_vectors(module: nn.Module) -> bool:
    """Whether :func:`input_vectors` knows this kind of layer."""
    return isinstance(module, nn.Linear | Conv | ConvTransposed) or is_conv1d_of_gpt2(module)


def fits(module: nn.Module, values: Tensor) -> bool:
    """Whether the module's weight can multiply these values: a subclass may be called otherwise."""
    if not values.is_floating_point():
        return False
    if isinstance(module, Conv | ConvTransposed):
        dims = len(module.kernel_size)
        is_image = dims < values.ndim < dims + 3
        return is_image and values.shape[-dims - 1] == module.in_channels
    weight = module.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - as has_vectors asks
    return values.ndim > 0 and values.shape[-1] == weight.shape[1 - outputs_axis(module)]


def input_vectors(
    module: nn.Module, values: Tensor, mask: Tensor | None = None
) -> Iterator[Tensor]:
    """Input vectors of a linear layer or a convolution, in parts that fit into memory.

    Args:
        module: a Linear, a convolution of one to three dimensions (transposed or not), a Conv1D.
        values: what the module was called with.
        mask: bool ``(batch, positions)``: the positions that count, where values, or the outputs
            of a convolution, have these.

    Yields:
        ``(groups, vectors, inputs)`` float32, inputs in the order of the weight's other axes.
    """
    values = values.detach().float()
    if not isinstance(module, Conv | ConvTransposed):
        yield shown_rows(values, mask).unsqueeze(0)
        return
    dims = len(module.kernel_size)
    values = values.unsqueeze(0) if values.ndim == dims + 1 else values
    unfolded = _size_unfolded(module, values)
    size = max(1, _CHUNK // max(unfolded, 1))
    has_mask = mask is not None and len(mask) == len(values)
    for start in range(0, len(values), size):
        some = values[start : start + size]
        padded = _spread(module, some) if isinstance(module, ConvTransposed) else _pad(module, some)
        vectors = _windows(module, padded)
        shown = mask[start : start + size].flatten() if mask is not None and has_mask else None
        yield vectors if shown is None or len(shown) != vectors.shape[1] else vectors[:, shown]


def shown_rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """Vectors along the last axis, ``(vectors, inputs)``, at the positions that a mask shows."""
    places = None if mask is None else arranged(mask, values.shape)
    rows = values.reshape(-1, values.shape[-1])
    if places is None:
        return rows
    places = places.reshape(*places.shape, *[1] * (values.ndim - 1 - places.ndim))
    return rows[places.expand(values.shape[:-1]).reshape(-1)]


def _size_unfolded(module: Conv | ConvTransposed, values: Tensor) -> int:
    """Numbers of one example's input vectors, about."""
    places = math.prod(values.shape[2:])
    strides = math.prod(module.stride)
    places = places * strides if isinstance(module, ConvTransposed) else places // strides
    return places * values.shape[1] * math.prod(module.kernel_size)


def _pad(module: Conv, values: Tensor) -> Tensor:
    padding: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            padding += [total // 2, total - total // 2]
        elif module.padding != "valid":
            padding += [int(module.padding[axis])] * 2
    if not any(padding):
        return values
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(values, padding, mode=mode)


def _spread(module: ConvTransposed, values: Tensor) -> Tensor:
    """Zeros between the inputs, so that a plain convolution with flipped taps does the rest."""
    sizes = [
        (n - 1) * stride + 1 for n, stride in zip(values.shape[2:], module.stride, strict=True)
    ]
    spread = values.new_zeros(*values.shape[:2], *sizes)
    places = tuple(slice(None, None, int(stride)) for stride in module.stride)
    spread[(slice(None), slice(None), *places)] = values
    padding: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) - int(module.padding[axis])
        padding += [reach, reach + module.output_padding[axis]]
    return functional.pad(spread, padding)


def _windows(module: Conv | ConvTransposed, padded: Tensor) -> Tensor:
    dims, is_transposed = len(module.kernel_size), isinstance(module, ConvTransposed)
    views = padded
    for axis in range(dims):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        views = views.unfold(2 + axis, reach, 1 if is_transposed else module.stride[axis])
    taps = tuple(slice(None, None, int(dilation)) for dilation in module.dilation)
    views = views[(*[slice(None)] * (2 + dims), *taps)]
    if is_transposed:
        views = views.flip(list(range(views.ndim - dims, views.ndim)))
    # (batch, channels, *places, *kernel) to (groups, batch and places, channels and kernel)
    order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
    vectors = views.permute(order).flatten(0, dims).flatten(1)
    return vectors.reshape(len(vectors), module.groups, -1).transpose(0, 1)


def attention_vectors(
    module: nn.MultiheadAttention, call: dict[str, Any], mask: Tensor | None = None
) -> Iterator[tuple[str, list[Tensor]]]:
    """Input vectors of an attention's projections.

    Args:
        module: a MultiheadAttention.
        call: its arguments by name.
        mask: bool ``(batch, positions)``: those that count.

    Yields:
        Name of the weight and, for each group of its outputs, ``(vectors, inputs)``; those of
        queries, keys and values share ``in_proj_weight``, and need not be equally many.
    """
    rows = [shown_rows(call[name].detach().float(), mask) for name in ("query", "key", "value")]
    if not module._qkv_same_embed_dim:  # noqa: SLF001 - as its own forward asks
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        yield from ((name, [some]) for name, some in zip(names, rows, strict=True))
    else:
        yield "in_proj_weight", rows
    attended = _attended(module, call)
    if mask is not None and (places := arranged(mask, call["query"].shape)) is not None:
        is_first = module.batch_first and places.ndim > 1
        attended = attended[(places.T if is_first else places).reshape(-1)]
    yield "out_proj.weight", [attended]


def _attended(module: nn.MultiheadAttention, call: dict[str, Any]) -> Tensor:
    """What the output projection multiplies: the same attention with the identity in its place."""
    query, key, value = (call[name] for name in ("query", "key", "value"))
    if module.batch_first and query.ndim == 3:
        query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    separate = not module._qkv_same_embed_dim  # noqa: SLF001
    options: dict[str, Any] = {}
    if separate:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        options = {name: getattr(module, name) for name in names}
    attended = functional.multi_head_attention_forward(
        query,
        key,
        value,
        module.embed_dim,
        module.num_heads,
        module.in_proj_weight,
        module.in_proj_bias,
        module.bias_k,
        module.bias_v,
        module.add_zero_attn,
        0.0,
        torch.eye(module.embed_dim, dtype=query.dtype, device=query.device),
        None,
        training=False,
        key_padding_mask=call.get("key_padding_mask"),
        need_weights=False,
        attn_mask=call.get("attn_mask"),
        is_causal=bool(call.get("is_causal", False)) and call.get("attn_mask") is not None,
        use_separate_proj_weight=separate,
        **options,
    )[0]
    return attended.detach().float().reshape(-1, module.embed_dim)


def recurrent_vectors(
    module: nn.RNNBase,
    given: Tensor | PackedSequence,
    state: object = None,
    mask: Tensor | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Input vectors of every weight of an RNN, LSTM or GRU.

    Args:
        module: as it was called.
        given: its input, ``(time, batch, inputs)``, or with batch and time swapped if
            ``batch_first``; or without a batch; or packed.
        state: that it starts from, as the module takes it; zeros without.
        mask: bool ``(batch, positions)``: those that count.

    Yields:
        Name of the weight and ``(1, vectors, inputs)``.
    """
    values, places, lengths = _unrolled(module, given, mask)
    parts = state if isinstance(state, list | tuple) else [state]
    states = [part.detach().float() for part in parts if isinstance(part, Tensor)]
    states = [part.unsqueeze(1) if part.ndim == 2 else part for part in states]
    directions = ("", "_reverse") if module.bidirectional else ("",)
    for layer in range(module.num_layers):
        made = []
        for number, direction in enumerate(directions):
            ordered = _backwards(values, lengths) if direction else values
            suffix = f"l{layer}{direction}"
            own = len(directions) * layer + number
            start = [part[own : own + 1] for part in states]
            output = _one_layer(module, suffix, ordered, start)
            before = functional.pad(output[:-1], (0, 0, 0, 0, 1, 0))
            if start:
                before[0] = start[0][0]
            shown = places
            if direction and places is not None:
                shown = _backwards(places[..., None], lengths)[..., 0]
            yield f"weight_ih_{suffix}", shown_rows(values, places).unsqueeze(0)
            yield f"weight_hh_{suffix}", shown_rows(before, shown).unsqueeze(0)
            made.append(_backwards(output, lengths) if direction else output)
        values = torch.cat(made, -1)


def _unrolled(
    module: nn.RNNBase, given: Tensor | PackedSequence, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Inputs ``(time, batch, inputs)``, which of them count, and the lengths of packed ones."""
    if isinstance(given, PackedSequence):
        values, lengths = pad_packed_sequence(given)
        values, lengths = values.detach().float(), lengths.to(values.device)
        return values, torch.arange(len(values)).to(lengths)[:, None] < lengths, lengths
    values = given.detach().float()
    if values.ndim == 2:
        return values.unsqueeze(1), None, None
    places = None if mask is None else arranged(mask, values.shape)
    if module.batch_first:
        return values.transpose(0, 1), None if places is None else places.T, None
    return values, places, None


def _backwards(values: Tensor, lengths: Tensor | None) -> Tensor:
    """Steps ``(time, batch, n)`` in reverse, each sequence from its own end; its own inverse."""
    if lengths is None:
        return values.flip(0)
    steps = torch.arange(len(values)).to(lengths)[:, None]
    order = (lengths - 1 - steps) % len(values)
    return values.gather(0, order[..., None].expand_as(values))


def cell_vectors(
    module: nn.RNNCellBase, values: Tensor, state: object
) -> Iterator[tuple[str, Tensor]]:
    """The same of an RNNCell, LSTMCell or GRUCell, which takes one step."""
    hidden = state[0] if isinstance(state, list | tuple) else state
    rows = values.detach().float().reshape(-1, values.shape[-1])
    zeros = rows.new_zeros(len(rows), module.hidden_size)
    before = hidden.detach().float().reshape(zeros.shape) if isinstance(hidden, Tensor) else zeros
    yield "weight_ih", rows.unsqueeze(0)
    yield "weight_hh", before.unsqueeze(0)


def _one_layer(module: nn.RNNBase, suffix: str, values: Tensor, start: list[Tensor]) -> Tensor:
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]
    projected = int(getattr(module, "proj_size", 0))
    if projected:
        names.append("weight_hr")
    weights = [getattr(module, f"{name}_{suffix}").to(values.dtype) for name in names]
    zeros = values.new_zeros(1, values.shape[1], module.hidden_size)
    state = start[-1] if start else zeros
    options: tuple[Any, ...] = (weights, module.bias, 1, 0.0, False, False, False)
    if isinstance(module, nn.LSTM):
        none = values.new_zeros(1, values.shape[1], projected or module.hidden_size)
        first = start[0] if start else none
        output: Tensor = torch.lstm(values, (first, state), *options)[0]
        return output
    if isinstance(module, nn.GRU):
        return torch.gru(values, state, *options)[0]
    kind = torch.rnn_relu if getattr(module, "nonlinearity", "tanh") == "relu" else torch.rnn_tanh
    return kind(values, state, *options)[0]
