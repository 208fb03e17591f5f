"""Which samples a run calibrates on, and which it keeps back to judge the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxq.calibration.data import CalibrationData, open_data
from onnxq.errors import OnnxqError, SpecError

if TYPE_CHECKING:
    import onnx_ir as ir

RANDOM_SAMPLES = 4
"""Random samples that a run without data is compared on."""


@dataclass(frozen=True)
class Split:
    """The two sets of samples.

    Args:
        calibration: for the passes; None in a run without data.
        compare: for verification and for the comparison at the end; None where there are none.
        words: both in words, for the report.
    """

    calibration: CalibrationData | None
    compare: CalibrationData | None
    words: str


def split_holdout(
    data: CalibrationData | None, holdout: int, model: ir.Model, seed: int, warnings: list[str]
) -> Split:
    """Hold back samples from ``data``; without data, make up random ones to compare on.

    Small sets give at most a half of their samples, and a single sample serves both ends; each of
    these goes to ``warnings``.

    Raises:
        SpecError: ``SPEC-HOLDOUT``: a negative number.
    """
    if holdout < 0:
        raise SpecError("SPEC-HOLDOUT", f"holdout={holdout} is negative", "use 0 or more")
    if data is None:
        return _without_data(model, seed, warnings)
    if holdout == 0 or len(data) == 1:
        warnings.append("compared on samples that were calibrated on: none are held back")
        return Split(data, data, f"{len(data)} samples from {data.source}, none held back")
    held = min(holdout, len(data) // 2)
    if held < holdout:
        warnings.append(f"only {held} of {len(data)} samples are held back for the comparison")
    calibration, compare = data.split(held)
    if data.is_random:
        warnings.append("the samples are random numbers: accuracy on real inputs is unknown")
    words = f"{len(calibration)} samples from {data.source}, {held} more held back"
    return Split(calibration, compare, words)


def _without_data(model: ir.Model, seed: int, warnings: list[str]) -> Split:
    try:
        made_up = open_data("random", model, samples=RANDOM_SAMPLES, seed=seed)
    except OnnxqError as error:
        warnings.append(f"not compared with the original, as there are no samples: {error.cause}")
        return Split(None, None, "no samples")
    warnings.append("compared on random numbers, as there are no samples: figures mean little")
    return Split(None, made_up, f"{len(made_up)} random samples")
