"""From an archive to something that runs: in memory, and in other programs' kernels."""

from dither.run.compact import PackedWeights, compact, packed_weights
from dither.run.integers import Integers
from dither.run.onnx_graph import Exported, StoredTensor, to_onnx
from dither.run.torchao_tensors import Converted, to_torchao

__all__ = [
    "Converted",
    "Exported",
    "Integers",
    "PackedWeights",
    "StoredTensor",
    "compact",
    "packed_weights",
    "to_onnx",
    "to_torchao",
]
