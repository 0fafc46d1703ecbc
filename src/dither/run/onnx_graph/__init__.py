"""Archives as ONNX files, with weights and activations as integers."""

from dither.run.onnx_graph.export import Exported, to_onnx

__all__ = ["Exported", "to_onnx"]
