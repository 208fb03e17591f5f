"""Builders of real models: a published checkpoint in, an ONNX file and its tokenizer out.

>>> from onnxq import models
>>> models.build("minilm", "minilm.onnx", spelling="torchscript")  # doctest: +SKIP

No PyTorch is involved. Each build writes ``FILE.onnx`` (weights inside) and, beside it,
``FILE.tokenizer.json`` for the ``tokenizers`` library; two builds give equal bytes.
"""

from __future__ import annotations

from onnxq.models.registry import BuiltModel, ModelInfo, Option, available, build

__all__ = ["BuiltModel", "ModelInfo", "Option", "available", "build"]
