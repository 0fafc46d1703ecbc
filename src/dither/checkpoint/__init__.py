"""Read checkpoints as others write them: safetensors, PyTorch, Hugging Face folders, NumPy.

Nothing in a file is executed: PyTorch files are read with ``weights_only=True`` and NumPy files
without pickle. Tied weights, where a file records them, share memory in the result.
"""

from dither.checkpoint.conversion import converted
from dither.checkpoint.kinds import TORCH_SUFFIXES
from dither.checkpoint.mapped import Pages
from dither.checkpoint.reading import (
    ADAPTER_IN_FOLDER,
    ARCHIVE_IN_FOLDER,
    archive_in,
    inside_folder,
    read_checkpoint,
)
from dither.checkpoint.safetensors_files import ALIASES_KEY
from dither.checkpoint.wrappers import plain_names

__all__ = [
    "ADAPTER_IN_FOLDER",
    "ALIASES_KEY",
    "ARCHIVE_IN_FOLDER",
    "TORCH_SUFFIXES",
    "Pages",
    "archive_in",
    "converted",
    "inside_folder",
    "plain_names",
    "read_checkpoint",
]
