"""``sanity``: look at the result as a user would, before anybody else has to.

On samples that no pass calibrated on, the model is run beside the one that came in. Scales must be
finite and positive, outputs finite, and nothing that was alive may have become all zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.errors import QualityError, SpecError
from onnxq.graph.io import session_source
from onnxq.graph.match import const_array
from onnxq.graph.match.values import node_label
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.runtime import session

Array = npt.NDArray[Any]

_SCALE_INPUTS = {
    "QuantizeLinear": 1,
    "DequantizeLinear": 1,
    "MatMulNBits": 2,
}


@dataclass(frozen=True)
class Sanity(Pass):
    """Check scales, and outputs against the model that came in.

    Args:
        min_cosine: least mean cosine of any output with the original's; below it the run fails.
        samples: how many held-back samples are compared.
    """

    name: ClassVar[str] = "sanity"
    summary: ClassVar[str] = "check scales, and outputs against the original on held-back samples"
    tolerance: ClassVar[float | None] = 0.0
    may_match_nothing: ClassVar[bool] = True

    min_cosine: float = 0.5
    samples: int = 8

    def __post_init__(self) -> None:
        if not -1.0 <= self.min_cosine <= 1.0:
            raise SpecError("SPEC-RANGE", f"min-cosine={self.min_cosine} is not a cosine")
        if self.samples < 1:
            raise SpecError("SPEC-RANGE", f"samples={self.samples} leaves nothing to compare on")

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Raise if the result is broken; report how close it is otherwise."""
        report = PassReport()
        report.note(f"{_check_scales(model)} scale tensors are finite and positive")
        if ctx.holdout is None or len(ctx.holdout) == 0:
            report.skip("outputs", "no held-back samples to compare on")
            return report
        for name, cosine in self._compare(model, ctx).items():
            if cosine < self.min_cosine:
                raise QualityError(
                    "QUALITY-SANITY",
                    f"output `{name}` has cosine {cosine:.4f} with the original, below "
                    f"{self.min_cosine:g}",
                    "run with --bisect to see which pass broke it",
                    output=name,
                    cosine=cosine,
                )
            report.change(name, "compared with the original", f"cosine {cosine:.5f}")
        return report

    def _compare(self, model: ir.Model, ctx: Context) -> dict[str, float]:
        """Mean cosine of each float output with the original's."""
        totals: dict[str, list[float]] = {}
        names = [str(v.name) for v in model.graph.outputs]
        zeros: dict[str, bool] = {}
        for before, after in _runs(ctx.reference, model, ctx, self.samples):
            for name, old, new in zip(names, before, after, strict=True):
                if not _is_comparable(old) or not isinstance(new, np.ndarray):
                    continue
                _check_output(name, old, new)
                zeros[name] = zeros.get(name, True) and bool(old.any()) and not new.any()
                totals.setdefault(name, []).append(_cosine(old, new))
        for name, is_dead in zeros.items():
            if is_dead:
                raise QualityError(
                    "QUALITY-ALL-ZERO",
                    f"output `{name}` has become all zero",
                    "a scale is far too large: look for outliers or mask constants in the ranges",
                )
        return {name: float(np.mean(found)) for name, found in totals.items()}


def _check_scales(model: ir.Model) -> int:
    """Check every constant scale; how many there are."""
    count = 0
    for node in model.graph.all_nodes():
        index = _SCALE_INPUTS.get(node.op_type)
        scale = None if index is None else const_array(node.inputs[index], model.ir_version)
        if scale is None:
            continue
        count += 1
        wide = scale.astype(np.float64)
        # MatMulNBits takes full-range signed scales; elsewhere a negative scale is an error.
        least = np.abs(wide) if node.op_type == "MatMulNBits" else wide
        if not np.isfinite(wide).all() or (least <= 0).any():
            raise QualityError(
                "QUALITY-SCALE",
                f"{node.op_type} `{node_label(node)}` has a scale that is not finite and positive",
                "this is a bug in the pass that wrote it; please report it",
                node=node_label(node),
            )
    return count


def _runs(
    reference: ir.Model, model: ir.Model, ctx: Context, limit: int
) -> Iterator[tuple[list[Array], list[Array]]]:
    if ctx.holdout is None:
        return
    with session_source(reference) as before, session_source(model) as after:
        old, new = session(before, threads=ctx.threads), session(after, threads=ctx.threads)
        for done, feeds in enumerate(ctx.holdout):
            if done >= limit:
                return
            ctx.progress("sanity", done, min(limit, len(ctx.holdout)))
            yield old.run(None, feeds), new.run(None, feeds)


def _is_comparable(value: object) -> bool:
    """Whether an output is a float tensor with elements (not a sequence, a label, nothing)."""
    return isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size > 0


def _check_output(name: str, old: Array, new: Array) -> None:
    if old.shape != new.shape:
        raise QualityError(
            "QUALITY-SHAPE",
            f"output `{name}` has shape {list(new.shape)}, the original {list(old.shape)}",
            "run with --bisect to see which pass broke it",
        )
    if (np.isfinite(old.astype(np.float64)) & ~np.isfinite(new.astype(np.float64))).any():
        raise QualityError(
            "QUALITY-NOT-FINITE",
            f"output `{name}` has NaN or Inf where the original has numbers",
            "run with --bisect to see which pass broke it",
        )


def _cosine(old: Array, new: Array) -> float:
    """Cosine over the elements that are finite in both; two all-zero arrays have 1."""
    a, b = old.astype(np.float64).ravel(), new.astype(np.float64).ravel()
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 else float(not a.any() and not b.any())
