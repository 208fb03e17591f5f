"""Quantize ONNX models with pipelines of small named passes."""

__version__ = "0.1.0"
