"""onnxq: quantize ONNX models with a pipeline of small, named passes.

>>> import onnxq
>>> onnxq.run("model.onnx", "w8a8", calib="sentences.npz", out="model.q.onnx")  # doctest: +SKIP

Everything heavy is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from onnxq.pipeline.compare import compare_models
    from onnxq.pipeline.grammar import parse
    from onnxq.pipeline.run import run
    from onnxq.pipeline.runner import Pipeline
    from onnxq.pipeline.summary import RunSummary
    from onnxq.runtime import session

__version__: Final = "0.1.0"

__all__ = ["Pipeline", "RunSummary", "__version__", "compare_models", "parse", "run", "session"]

_WHERE: Final = {
    "Pipeline": "onnxq.pipeline.runner",
    "RunSummary": "onnxq.pipeline.summary",
    "compare_models": "onnxq.pipeline.compare",
    "parse": "onnxq.pipeline.grammar",
    "run": "onnxq.pipeline.run",
    "session": "onnxq.runtime",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("onnxq.errors")
    if name not in _WHERE:
        raise AttributeError(f"module 'onnxq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "errors"})
