"""Compress neural networks to a byte budget: name the bytes, keep the model."""

__version__ = "0.1.0"
