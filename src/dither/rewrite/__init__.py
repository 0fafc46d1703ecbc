"""Edits of a model that leave what it computes as it was, or restore it on average."""

from dither.rewrite.batch_norm import absorbed, norms
from dither.rewrite.bias import correct_bias, correct_biases, expected_input
from dither.rewrite.channels import free_pairs
from dither.rewrite.equalize import absorb_biases, chains, equalize, replace_relu6
from dither.rewrite.expected import Passing, correct_biases_by_norms, expected_inputs
from dither.rewrite.fold import Channels, fold_batch_norm
from dither.rewrite.remove import remove_channels

__all__ = [
    "Channels",
    "Passing",
    "absorb_biases",
    "absorbed",
    "chains",
    "correct_bias",
    "correct_biases",
    "correct_biases_by_norms",
    "equalize",
    "expected_input",
    "expected_inputs",
    "fold_batch_norm",
    "free_pairs",
    "norms",
    "remove_channels",
    "replace_relu6",
]
