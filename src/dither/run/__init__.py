"""From an archive to something that runs: in memory, and in other programs' kernels."""

from dither.run.compact import PackedWeights, compact, packed_weights
from dither.run.onnx_graph import Exported, to_onnx
from dither.run.torchao_tensors import Converted, to_torchao

__all__ = ["Converted", "Exported", "PackedWeights", "compact", "packed_weights"]
__all__ += ["to_onnx", "to_torchao"]
