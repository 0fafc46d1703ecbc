"""Edits of a model that leave what it computes as it was, or restore it on average."""

from dither.rewrite.batch_norm import absorbed, norms
from dither.rewrite.bias import correct_bias, correct_biases, expected_input
from dither.rewrite.channels import free_pairs
from dither.rewrite.equalize import absorb_biases, chains, equalize, replace_relu6
from dither.rewrite.fold import Channels, fold_batch_norm
from dither.rewrite.remove import remove_channels

__all__ = [
    "Channels",
    "absorb_biases",
    "absorbed",
    "chains",
    "correct_bias",
    "correct_biases",
    "equalize",
    "expected_input",
    "fold_batch_norm",
    "free_pairs",
    "norms",
    "remove_channels",
    "replace_relu6",
]
