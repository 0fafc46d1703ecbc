"""Deterministic policy gradients for one number in each state: actor, critic, and their memory.

Lillicrap et al. 2016 (arXiv 1509.02971), as AMC (He et al. 2018) and HAQ (Wang et al. 2019) use it:
the reward comes at the end of an episode, counts in full at every state, less a baseline, and is
not discounted. A library's was looked at:
stable-baselines3's ``DDPG`` runs the loop itself, for one learner, and draws from its memory by
NumPy's one generator, from which a score may draw, too. Here two learners take turns within an
episode, several episodes are under way at once, and nothing but the seed decides.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam

State = tuple[float, ...]


@dataclass(frozen=True)
class Learning:
    """Settings of an actor and its critic: as HAQ's, but for smaller networks and larger steps.

    Attributes:
        hidden: width of both hidden layers.
        actor_rate: learning rate of the actor, for Adam.
        critic_rate: the same of the critic.
        follow: share of the difference by which the slow copies follow after each step.
        memory: transitions that are remembered.
        batch: transitions of a step.
    """

    hidden: int = 64
    actor_rate: float = 1e-3
    critic_rate: float = 3e-3
    follow: float = 0.01
    memory: int = 10_000
    batch: int = 64


class ActorCritic:
    """Acts on states, and learns from the rewards of episodes.

    Args:
        size: numbers of a state.
        settings: of learning.
        seed: of weights, noise and what is drawn from memory.
    """

    def __init__(self, size: int, settings: Learning, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._actor = _network(size, settings.hidden, nn.Sigmoid())
            self._critic = _network(size + 1, settings.hidden, nn.Identity())
        self._slow_actor, self._slow_critic = (
            copy.deepcopy(self._actor),
            copy.deepcopy(self._critic),
        )
        self._actor_steps = Adam(self._actor.parameters(), settings.actor_rate)
        self._critic_steps = Adam(self._critic.parameters(), settings.critic_rate)
        self._settings, self._generator = settings, np.random.default_rng(seed)
        self._memory: deque[tuple[State, float, float, State | None]] = deque(
            maxlen=settings.memory
        )

    def act(self, state: State, noise: float | None) -> float:
        """A number of 0 to 1: the actor's with normal noise, or any for None."""
        if noise is None:
            return float(self._generator.random())
        with torch.no_grad():
            middle = float(self._actor(_float([state])))
        while noise > 0:  # drawn again until it is within, as HAQ does
            number = middle + noise * float(self._generator.normal())
            if 0 <= number <= 1:
                return number
        return middle

    def remember(self, episode: Sequence[tuple[State, float]], reward: float) -> None:
        """Remember the states and actions of an episode, each with the reward at its end."""
        for place, (state, action) in enumerate(episode):
            after = episode[place + 1][0] if place + 1 < len(episode) else None
            self._memory.append((state, action, reward, after))

    def learn(self, steps: int, baseline: float, scale: float) -> None:
        """Take so many steps on transitions drawn from memory.

        Args:
            steps: how many.
            baseline: is taken from rewards.
            scale: in units of which they then count.
        """
        for _ in range(steps if self._memory else 0):
            places = self._generator.integers(len(self._memory), size=self._settings.batch)
            drawn = [self._memory[int(place)] for place in places]
            states, actions, rewards, after = zip(*drawn, strict=True)
            going = [
                state if later is None else later
                for state, later in zip(states, after, strict=True)
            ]
            self._step(
                _float(states),
                _float(actions)[:, None],
                (_float(rewards)[:, None] - baseline) / scale,
                _float(going),
                _float([[later is not None] for later in after]),
            )

    def _step(
        self, states: Tensor, actions: Tensor, rewards: Tensor, after: Tensor, goes_on: Tensor
    ) -> None:
        """One of the critic, one of the actor; the slow copies follow."""
        with torch.no_grad():
            later = self._slow_critic(_joined(after, self._slow_actor(after)))
        error = functional.mse_loss(
            self._critic(_joined(states, actions)), rewards + goes_on * later
        )
        _descend(self._critic_steps, error)
        _descend(self._actor_steps, -self._critic(_joined(states, self._actor(states))).mean())
        for fast, slow in ((self._actor, self._slow_actor), (self._critic, self._slow_critic)):
            for new, old in zip(fast.parameters(), slow.parameters(), strict=True):
                old.data.lerp_(new.data, self._settings.follow)


def _network(inputs: int, hidden: int, last: nn.Module) -> nn.Module:
    network = nn.Sequential(
        *(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()),
        *(nn.Linear(hidden, 1), last),
    )
    final = network[4]
    assert isinstance(final, nn.Linear)  # noqa: S101 - for the type checker
    nn.init.uniform_(final.weight, -3e-3, 3e-3)
    nn.init.zeros_(final.bias)
    return network


def _float(values: Sequence[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _joined(states: Tensor, actions: Tensor) -> Tensor:
    return torch.cat([states, actions], 1)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
