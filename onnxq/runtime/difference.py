"""How far the values of two models are apart, sample by sample, and when one is plainly broken."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from onnxq.runtime.metrics import cosine, leaves, sqnr_db

Flag = Literal["all-zero", "non-finite", "shape"]


@dataclass(frozen=True)
class OutputDiff:
    """How far one output is from the reference's, over all samples.

    Args:
        name: of the output.
        cosine_mean, cosine_min: over samples; NaN when an element is not finite. For outputs that
            are no floats (class numbers, texts): share of equal elements.
        sqnr_db: of all samples together.
        max_abs: largest absolute difference.
        samples: how many were compared.
        is_float: whether the output holds floats.
        flags: ``all-zero`` (the reference is not), ``non-finite`` (the reference is finite),
            ``shape`` (the shapes differ).
    """

    name: str
    cosine_mean: float
    cosine_min: float
    sqnr_db: float
    max_abs: float
    samples: int
    is_float: bool = True
    flags: tuple[Flag, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as JSON data; NaN and infinities become None."""
        return {k: _json(v) for k, v in vars(self).items()}


@dataclass(frozen=True)
class LayerDiff:
    """How far one inner value is from the reference's, over all samples.

    Args:
        name: of the value in the reference.
        op: type of the operator that makes it there.
    """

    name: str
    op: str
    cosine: float
    sqnr_db: float

    def to_json(self) -> dict[str, Any]:
        """The same as JSON data; NaN and infinities become None."""
        return {k: _json(v) for k, v in vars(self).items()}


@dataclass
class Tally:
    """Running sums of the difference of one value between two models, sample by sample."""

    cosines: list[float] = field(default_factory=list)
    signal: float = 0.0
    noise: float = 0.0
    dot: float = 0.0
    other: float = 0.0
    max_abs: float = 0.0
    is_float: bool = True
    alive: bool = False
    candidate_alive: bool = False
    flags: set[Flag] = field(default_factory=set)

    def add(self, a: Any, b: Any) -> None:
        """Count one sample: ``a`` of the reference, ``b`` of the candidate."""
        left, right = _whole(a), _whole(b)
        self.is_float = left.dtype.kind == "f"
        if left.shape != right.shape:
            self.flags.add("shape")
            self.cosines.append(math.nan)
            return
        if not self.is_float:
            self.cosines.append(float(np.mean(left == right)) if left.size else 1.0)
            return
        x, y = left.astype(np.float64).ravel(), right.astype(np.float64).ravel()
        both = np.isfinite(x)
        if not np.isfinite(y[both]).all():
            self.flags.add("non-finite")
            self.cosines.append(math.nan)
            return
        # Positions that are -inf by design (masks) in both say nothing about the error.
        x, y = x[both], y[both]
        if not np.isfinite(y).all() or x.size == 0:
            return
        self.cosines.append(cosine(x, y))
        self.signal += float(x @ x)
        self.noise += float((x - y) @ (x - y))
        self.dot += float(x @ y)
        self.other += float(y @ y)
        self.max_abs = max(self.max_abs, float(np.abs(x - y).max()))
        self.alive |= bool(x.any())
        self.candidate_alive |= bool(y.any())

    def output(self, name: str) -> OutputDiff:
        """The sums as a result."""
        flags = set(self.flags)
        if self.alive and not self.candidate_alive:
            flags.add("all-zero")
        exact = not self.is_float and all(c == 1.0 for c in self.cosines)
        return OutputDiff(
            name=name,
            cosine_mean=float(np.mean(self.cosines)) if self.cosines else math.nan,
            cosine_min=float(np.min(self.cosines)) if self.cosines else math.nan,
            sqnr_db=self._sqnr() if self.is_float else math.inf if exact else math.nan,
            max_abs=math.nan if "non-finite" in flags else self.max_abs,
            samples=len(self.cosines),
            is_float=self.is_float,
            flags=tuple(sorted(flags)),
        )

    def layer(self, name: str, op: str) -> LayerDiff:
        """The sums as a result; the cosine is of all samples as one vector."""
        norms = math.sqrt(self.signal * self.other)
        both_zero = self.signal == self.other == 0.0
        whole = self.dot / norms if norms > 0.0 else float(both_zero)
        return LayerDiff(name, op, math.nan if self.flags else whole, self._sqnr())

    def _sqnr(self) -> float:
        return math.nan if self.flags else sqnr_db(self.signal, self.noise)


def _whole(value: Any) -> np.ndarray:
    """An array as it is; the leaves of a sequence or map as one vector, the float ones if any."""
    if isinstance(value, np.ndarray):
        return value
    parts = [array.ravel() for _, array in leaves(value)]
    floats = [part for part in parts if part.dtype.kind == "f"]
    return np.concatenate(floats or parts) if parts else np.empty(0, np.float32)


def _json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value
