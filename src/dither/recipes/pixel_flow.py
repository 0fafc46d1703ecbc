"""Implicit pixel flow (Zhang, van Rozendaal, Brehmer, Nagel, Cohen 2021, arXiv 2112.11312).

A video is a few small networks from coordinates to colours, and its file holds their weights alone.
The first frame of each group of pictures has a network of its own; every later one moves the
coordinates of the frame before it by a *flow* network and adds the colours of a *residual* network.
One frame is an image, and plain SIREN is COIN (Dupont et al. 2021, arXiv 2103.03123)::

    from dither.recipes import pixel_flow

    content = pixel_flow.encode(video, "16kB")  # uint8, (frames, 3, height, width)
    video = pixel_flow.decode(content)  # needs nothing else

The size is a budget of the file in bytes, networks are chosen to fit it, and the weights are
trained as the integers that the file holds. Encoding is training: thousands of steps for a video.

A long video may come in files of some frames each, where each holds differences to the weights of
the file before it; nothing but the files is needed::

    files = []
    for part in video.split(6):
        files.append(pixel_flow.encode(part, "4kB", codec, before=files))
    last = pixel_flow.decode(files[-1], before=files[:-1])
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from dither.archive import Archive, Base, CodedTensor, code, load_into, pack, packed_nbytes
from dither.core import ArchiveError, BudgetError, Encoded, SpecError
from dither.formats import Raw
from dither.search import compress, parse_size
from dither.train.attach import attach
from dither.train.run import Run

Source = bytes | str | os.PathLike[str]
"""The content of a file, or its path."""

_NAME = "pixel_flow"
_SLACK = 16
"""Bytes: an index is compressed, and what metadata add to it depends a little on the rest."""
_POINTS = 4096
"""Pixels of a step, at most."""
_MOST = 1 << 30
"""Pixels of a video that is decoded, at most."""


@dataclass(frozen=True)
class Codec:
    """The networks of a video.

    Attributes:
        width: of the hidden layers of a group's first frame.
        layers: how many there are.
        motion: width of the one hidden layer of flows and residuals.
        group: frames of a group of pictures; 1 for a network for each frame.
        features: octaves of sines and cosines of the coordinates, besides the coordinates.
        omega: factor of the sines' arguments (Sitzmann et al. 2020).
    """

    width: int = 24
    layers: int = 3
    motion: int = 12
    group: int = 6
    features: int = 4
    omega: float = 30.0

    def __post_init__(self) -> None:
        counts = (self.width, self.layers, self.motion, self.group)
        if min(counts) < 1 or self.features < 0 or not self.omega > 0:
            raise SpecError(f"{self}: sizes are 1 or more, features 0 or more, omega over 0")

    def fitted(self, nbytes: int, frames: int, bits: float = 6.0) -> Codec:
        """The widest networks of this shape whose weights, of so many bits, fill a file.

        ``motion`` stays half the width.

        Raises:
            BudgetError: not even networks of width 2 fit.
        """
        fitting = None
        for width in range(2, 1025):
            codec = replace(self, width=width, motion=max(2, width // 2))
            sizes = [value.numel() for value in Pictures(codec, frames, meta=True).parameters()]
            if bits * sum(sizes) / 8 + _OVERHEAD * len(sizes) > nbytes:
                break
            fitting = codec
        if fitting is None:
            raise BudgetError(
                f"{nbytes} bytes are too few for {frames} frames in groups of {self.group}; "
                "give a larger size or longer groups"
            )
        return fitting


_OVERHEAD = 30
"""Bytes of a tensor's entry in the file, about."""


class _Layer(nn.Module):
    """Linear layers of ``count`` networks in one tensor: files count tensors, too."""

    def __init__(self, count: int, inputs: int, outputs: int, bound: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, outputs).uniform_(-bound, bound))
        self.under: dict[str, Tensor] = {}
        """What weight and bias are added to, once they are differences."""

    def forward(self, points: Tensor, number: int) -> Tensor:
        weight, bias = self.weight[number], self.bias[number]
        if "weight" in self.under:
            weight = self.under["weight"][number] + weight
        if "bias" in self.under:
            bias = self.under["bias"][number] + bias
        return functional.linear(points, weight, bias)


class _Sirens(nn.Module):
    """Sinusoidal networks of one shape (Sitzmann et al. 2020): which runs is said by its number."""

    def __init__(self, count: int, widths: list[int], omega: float, last: float = 1.0) -> None:
        super().__init__()
        self.omega = omega
        pairs = list(pairwise(widths))
        bounds = [1 / pairs[0][0]] + [math.sqrt(6 / inputs) / omega for inputs, _ in pairs[1:]]
        bounds[-1] *= last
        self.layers = nn.ModuleList(
            _Layer(count, inputs, outputs, bound)
            for (inputs, outputs), bound in zip(pairs, bounds, strict=True)
        )

    def forward(self, points: Tensor, number: int) -> Tensor:
        for layer in self.layers[:-1]:
            points = torch.sin(self.omega * layer(points, number))
        found: Tensor = self.layers[-1](points, number)
        return found


class Pictures(nn.Module):
    """All networks of a video: coordinates in [-1, 1] and the number of a frame to colours.

    Args:
        codec: their sizes.
        frames: how many there are.
        meta: sizes only, without memory.
    """

    def __init__(self, codec: Codec, frames: int, *, meta: bool = False) -> None:
        super().__init__()
        self.codec = codec
        groups = -(-frames // codec.group)
        inputs = 2 + 4 * codec.features
        with torch.device("meta" if meta else "cpu"):
            hidden = [codec.width] * codec.layers
            self.keys = _Sirens(groups, [inputs, *hidden, 3], codec.omega)
            if moved := frames - groups:
                # They begin as hardly anything: a frame begins as the one before it.
                self.flows = _Sirens(moved, [inputs, codec.motion, 2], codec.omega, 0.05)
                self.residuals = _Sirens(moved, [inputs, codec.motion, 3], codec.omega, 0.05)

    def forward(self, points: Tensor, frame: int) -> Tensor:
        """Colours ``(n, 3)`` of the points ``(n, 2)`` of a frame, about 0 to 1."""
        group, place = divmod(int(frame), self.codec.group)
        added = torch.zeros(len(points), 3)
        for number in range(place, 0, -1):
            moved = group * (self.codec.group - 1) + number - 1
            features = self._features(points)
            added = added + self.residuals(features, moved)
            points = points + 0.1 * self.flows(features, moved)
        colours: Tensor = self.keys(self._features(points), group)
        return colours + 0.5 + added

    def start_at(self, base: Mapping[str, Tensor]) -> None:
        """Take over the tensors of another that have the names and shapes of these."""
        with torch.no_grad():
            for name, value in self.named_parameters():
                if name in base and base[name].shape == value.shape:
                    value.copy_(base[name])

    def rest_on(self, base: Mapping[str, Tensor]) -> set[str]:
        """Make differences of the parameters that are nearer to another's than to zero.

        Returns:
            Their names.
        """
        resting = set()
        for where, layer in self.named_modules():
            if not isinstance(layer, _Layer):
                continue
            for kind, value in layer.named_parameters():
                own = base.get(f"{where}.{kind}")
                if own is None or own.shape != value.shape:
                    continue
                difference = value.detach() - own
                if difference.square().sum() < value.detach().square().sum():
                    value.data, layer.under[kind] = difference, own
                    resting.add(f"{where}.{kind}")
        return resting

    def _features(self, points: Tensor) -> Tensor:
        octaves = [points * (math.pi * 2.0**k) for k in range(self.codec.features)]
        waves = [wave for octave in octaves for wave in (octave.sin(), octave.cos())]
        return torch.cat([points, *waves], dim=1)


def encode(
    video: Tensor,
    size: int | str,
    codec: Codec | None = None,
    *,
    before: Sequence[Source] = (),
    steps: int = 4000,
    trained: bool = True,
    lr: float = 2e-3,
    seed: int = 0,
) -> bytes:
    """A file of at most ``size`` bytes.

    Half of the steps train in float32, half as integers to the budget.

    Args:
        video: uint8, ``(frames, 3, height, width)``; an image is one frame.
        size: bytes, or as :func:`dither.compress` reads it, of the video's own bytes.
        codec: the networks; by default those of the file before, or the largest that fit at 6 bits
            for each weight.
        before: the files of the frames before these, in order: training begins at the weights of
            the last, and the file holds differences to them.
        steps: of training.
        trained: otherwise all steps are in float32 and the weights are compressed afterwards.
        lr: learning rate of Adam, which falls to nothing as a cosine in each half.
        seed: of weights and pixels.

    Raises:
        SpecError: no video.
        BudgetError: a size that cannot be reached.
        ArchiveError: files before that :func:`decode` refuses.
    """
    frames = _checked(video)
    budget = parse_size(size, video.numel(), video.numel())
    last = _model(before)[0] if before else None
    if codec is None:
        codec = Codec().fitted(budget, len(video)) if last is None else last.codec
    shape = [len(video), *video.shape[2:]]
    metadata = {_NAME: {"codec": asdict(codec), "shape": shape}}
    torch.manual_seed(seed)
    model = Pictures(codec, len(video))
    base = None if last is None else Base.of(last)
    if base is not None:
        model.start_at(base.tensors)
    generator = torch.Generator().manual_seed(seed)
    if not trained:
        _train(model, frames, steps, lr, generator)
        return compress(model, budget, metadata=metadata, base=base).to_bytes()
    _train(model, frames, steps - steps // 2, lr, generator)
    resting = set() if base is None else model.rest_on(base.tensors)
    base = base if resting else None
    plain = _coded({name: Raw().encode(value) for name, value in model.state_dict().items()})
    besides = packed_nbytes(_coded(plain, resting), metadata=metadata, base=base)
    half = steps // 2
    room = budget - (besides - packed_nbytes(plain)) - _SLACK
    run = attach(model, budget=room, steps=half, noise=seed)
    _train(model, frames, half, lr / 2, generator, run)
    run.finish()
    return pack(_coded(run.encode(), resting), metadata=metadata, base=base).to_bytes()


def decode(source: Source, before: Sequence[Source] = ()) -> Tensor:
    """The video of a file: uint8, ``(frames, 3, height, width)``.

    Args:
        source: the content of a file, or its path.
        before: the files before it, in order, if it holds differences to the last of them.

    Raises:
        ArchiveError: it is no file of :func:`encode`, or rests on another than that.
    """
    model, shape = _model([*before, source])
    points = _points(*shape[1:])
    frames = []
    with torch.no_grad():
        for number in range(shape[0]):
            parts = [model(part, number) for part in points.split(_POINTS)]
            frames.append(torch.cat(parts).clamp(0, 1).mul(255).round().to(torch.uint8))
    return torch.stack(frames).reshape(*shape, 3).permute(0, 3, 1, 2).contiguous()


def _model(sources: Sequence[Source]) -> tuple[Pictures, list[int]]:
    """The networks and the shape of the last file; each may rest on the one before it."""
    model, shape = None, [0]
    for source in sources:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Archive.from_bytes(content) as plain:
            codec, shape = _settings(plain.metadata.get(_NAME))
            rests = plain.base is not None
        if rests and model is None:
            raise ArchiveError(
                "this file holds differences to the weights of the file before it: give the files "
                "before it, in order, as before="
            )
        with Archive.from_bytes(content, base=model if rests else None) as archive:
            model = Pictures(codec, shape[0])
            load_into(model, archive)
    if model is None:
        raise SpecError("there is no file to decode: give one or more")
    return model, shape


def _coded(
    tensors: Mapping[str, Encoded | CodedTensor], resting: Collection[str] = ()
) -> dict[str, CodedTensor]:
    """Tensors for a file, where some are differences to a base."""
    found = {}
    for name, tensor in tensors.items():
        coded = code(tensor) if isinstance(tensor, Encoded) else tensor
        found[name] = coded._replace(on_base=name in resting)
    return found


def _train(
    model: Pictures,
    frames: Tensor,
    steps: int,
    lr: float,
    generator: torch.Generator,
    run: Run | None = None,
) -> None:
    """Mean squared error on random pixels of a random frame, with Adam."""
    points = _points(*frames.shape[1:3])
    colours = frames.flatten(1, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    if run is not None:
        run.join(optimizer)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups[:1]:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        frame = int(torch.randint(len(frames), (), generator=generator))
        chosen = torch.randint(len(points), (min(_POINTS, len(points)),), generator=generator)
        loss = (model(points[chosen], frame) - colours[frame, chosen]).square().mean()
        loss = loss.clamp(min=1e-9).log()  # decibels, of the scale that a budget's penalty expects
        if run is not None:
            loss = loss + run.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run is not None:
            run.step()


def _checked(video: Tensor) -> Tensor:
    """Colours from 0 to 1, ``(frames, height, width, 3)``."""
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[1] != 3 or not video.numel():
        raise SpecError(
            f"{video.dtype} of shape {tuple(video.shape)}: give uint8, (frames, 3, height, width)"
        )
    return video.permute(0, 2, 3, 1).float() / 255


def _points(height: int, width: int) -> Tensor:
    """Coordinates of pixels, row by row, ``(height * width, 2)`` in [-1, 1]."""
    rows = (torch.arange(height) + 0.5) * (2 / height) - 1
    columns = (torch.arange(width) + 0.5) * (2 / width) - 1
    return torch.cartesian_prod(rows, columns)


def _settings(found: object) -> tuple[Codec, list[int]]:
    """Networks and shape of a video, as files have them."""
    try:
        assert isinstance(found, Mapping)  # noqa: S101 - one error for whatever is wrong
        codec, shape = Codec(**found["codec"]), [int(number) for number in found["shape"]]
        frames, height, width = shape
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ArchiveError(f"this file holds no video: its {_NAME!r} is {found!r}") from error
    if min(shape) < 1 or frames * height * width > _MOST:
        raise ArchiveError(f"a video of shape {shape}: 1 to {_MOST} pixels are decoded")
    return codec, shape
