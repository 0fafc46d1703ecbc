"""Two controllers by turns: one for the sparsity of a layer, one for the bits of its kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from dither.core import SpecError
from dither.search.joint_layers import FEATURES, Kernels
from dither.search.joint_space import Layout, Point
from dither.search.policies.actor_critic import ActorCritic, Learning, State
from dither.search.policies.policy import Learner

_BASELINE = 0.95
_OF_LAYER = FEATURES + 3
_OF_GROUP = FEATURES + 4


@dataclass(frozen=True)
class AJPQ:
    """Tang, Wei and Li 2020 (arXiv 2011.06231), by deep deterministic policy gradients.

    Layer by layer, the layer controller says which share of the kernels gets 0 bits; then the
    channel controller gives bits to groups of those that are left, from the most important on. Both
    see what the layer is like, how much of the network's weights is spent and still to come, and
    what was done before.

    Attributes:
        warm_up: points at random before the controllers act.
        noise: standard deviation of what is added to their actions.
        decay: its factor from point to point.
        learning: of both.
        batch: points asked for at once.

    Raises:
        SpecError: settings that make no sense.
    """

    warm_up: int = 20
    noise: float = 0.3
    decay: float = 0.98
    learning: Learning = field(default_factory=Learning)
    batch: int = 4

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        if self.warm_up < 1 or self.noise < 0 or not 0 < self.decay <= 1:
            raise SpecError(
                f"{self!r}: the warm-up has 1 point or more, noise is 0 or more, its decay is "
                "above 0 and at most 1"
            )

    def begin(self, layout: Layout, seed: int) -> Learner:
        """Begin a search."""
        return _Controllers(self, layout, seed)


@dataclass
class _Episode:
    """What both controllers did on the way to a point."""

    layers: list[tuple[State, float]] = field(default_factory=list)
    groups: list[tuple[State, float]] = field(default_factory=list)


class _Controllers:
    def __init__(self, settings: AJPQ, layout: Layout, seed: int) -> None:
        self._settings, self._layout = settings, layout
        self._of_layers = ActorCritic(_OF_LAYER, settings.learning, 2 * seed)
        self._of_groups = ActorCritic(_OF_GROUP, settings.learning, 2 * seed + 1)
        self._asked = 0
        self._open: list[_Episode] = []
        self._rewards: list[float] = []
        self._baseline = 0.0

    def ask(self, count: int) -> list[Point]:
        self._open = [_Episode() for _ in range(count)]
        points = [self._walk(episode, self._asked + n) for n, episode in enumerate(self._open)]
        self._asked += count
        return points

    def _walk(self, episode: _Episode, number: int) -> Point:
        """Go through the layers and decide."""
        settings, layout = self._settings, self._layout
        is_warm = number >= settings.warm_up
        noise = settings.noise * settings.decay ** (number - settings.warm_up) if is_warm else None
        point = list[float]()
        spent, left, before = 0.0, 1.0, (0.0, 0.5)
        for kernels in layout.kernels:
            share = kernels.features[-2]
            left -= share
            state = (*kernels.features, spent, left, before[0])
            sparsity = self._of_layers.act(state, noise)
            episode.layers.append((state, sparsity))
            widths = self._widths(episode, kernels, sparsity, before[1], noise)
            kept = layout.space.kept(kernels, sparsity) / kernels.count
            mean = sum(widths) / len(widths)
            spent += share * kept * mean
            before = sparsity, mean
            point += [sparsity, *widths]
        return tuple(point)

    def _widths(
        self,
        episode: _Episode,
        kernels: Kernels,
        sparsity: float,
        before: float,
        noise: float | None,
    ) -> list[float]:
        """Give bits to the kernels that are left, group by group."""
        groups = self._layout.space.groups
        kept = self._layout.space.kept(kernels, sparsity)
        widths = list[float]()
        for group in range(groups):
            most = kernels.norms[min(group * kept // groups, kept - 1)]
            state = (*kernels.features, kept / kernels.count, group / groups, most, before)
            before = self._of_groups.act(state, noise)
            episode.groups.append((state, before))
            widths.append(before)
        return widths

    def tell(self, points: Sequence[Point], rewards: Sequence[float]) -> None:
        for episode, given in zip(self._open, rewards, strict=True):
            # What failed is as bad as the worst.
            reward = min(self._rewards, default=0.0) if math.isnan(given) else given
            first = not self._rewards
            self._rewards.append(reward)
            self._baseline = reward if first else self._baseline
            self._baseline += (1 - _BASELINE) * (reward - self._baseline)
            self._of_layers.remember(episode.layers, reward)
            self._of_groups.remember(episode.groups, reward)
        if len(self._rewards) < self._settings.warm_up:
            return
        mean = sum(self._rewards) / len(self._rewards)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in self._rewards) / len(self._rewards))
        steps = len(points) * len(self._layout.kernels)
        for controller in (self._of_layers, self._of_groups):
            controller.learn(steps, self._baseline, max(deviation, 1e-9))
