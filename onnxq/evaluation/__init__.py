"""Measuring a model on a task: sentence similarity, perplexity, image and text classification.

>>> from onnxq.evaluation import evaluate
>>> evaluate("minilm.onnx", "sts", "sts-dev.csv").value  # doctest: +SKIP
86.72
"""

from __future__ import annotations

from onnxq.evaluation.base import EvalResult, Progress, Session, SessionFactory, cpu_session
from onnxq.evaluation.run import evaluate, tasks
from onnxq.evaluation.sts import embed

__all__ = [
    "EvalResult",
    "Progress",
    "Session",
    "SessionFactory",
    "cpu_session",
    "embed",
    "evaluate",
    "tasks",
]
