"""Frequencies of tokens: what was seen counts as much as the prior misses it."""

from __future__ import annotations

import torch

from dither.search.row_steps import frequencies, prior_frequencies, steps_of


def test_a_sample_like_the_prior_changes_little() -> None:
    generator, rows = torch.Generator().manual_seed(0), 5000
    prior = prior_frequencies(rows)
    like = torch.multinomial(prior, 20_000, replacement=True, generator=generator)
    other = torch.multinomial(prior.flip(0), 20_000, replacement=True, generator=generator)
    near, far = (frequencies(torch.bincount(seen, minlength=rows)) for seen in (like, other))
    assert abs(float(near.sum()) - 1) < 1e-9
    distance = [float((found - prior).abs().sum()) for found in (near, far)]
    assert distance[0] < 0.3
    assert distance[1] > 0.6
    assert bool((far > 0).all())


def test_nothing_seen() -> None:
    assert torch.equal(frequencies(torch.zeros(50)), prior_frequencies(50))


def test_steps_fall_with_frequency() -> None:
    steps = steps_of(torch.tensor([0.5, 0.25, 0.125, 0.125]), 0.5)
    assert torch.allclose(steps / steps[0], torch.tensor([1.0, 2**0.5, 2.0, 2.0]))
    assert abs(float(steps.log2().mean())) < 1e-6
