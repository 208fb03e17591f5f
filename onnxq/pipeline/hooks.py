"""What happens between passes: checks, dumps, and whatever a caller adds.

A hook is an object with ``before_pass(step)`` and ``after_pass(step)``. The runner calls all hooks
around every pass, in order; a hook that raises ends the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from onnxq.errors import EquivalenceError
from onnxq.graph.edit import validate
from onnxq.pipeline.snapshot import Snapshot
from onnxq.runtime.metrics import relative_error
from onnxq.runtime.workspace import Sample, Workspace, run_samples

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxq.passes.contract import Artifacts, Pass, PassReport

Outputs = list[dict[str, np.ndarray]]

VERIFY_SAMPLES = 2
"""Samples on which passes with a tolerance are checked."""

EXACT = 1e-6
"""Relative error in float64 of a rewrite that is exact but for the order of its sums."""


_WIDE = (np.dtype(np.float64), np.dtype(np.int64), np.dtype(np.bool_))


@dataclass
class Step:
    """One pass on its way through the pipeline.

    Args:
        number: from 1.
        owner: the pass.
        model: the model, before the pass in ``before_pass`` and after it in ``after_pass``.
        artifacts: the blackboard, unrestricted.
        report: what the pass did; empty before it ran.
        seconds, cpu_seconds: of the pass alone, without hooks.
        max_error: largest relative output error that a check measured, or None.
    """

    number: int
    total: int
    owner: Pass
    model: ir.Model
    artifacts: Artifacts
    report: PassReport
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    max_error: float | None = None

    def __str__(self) -> str:
        return f"pass {self.number} `{self.owner.name}`"


class Hook:
    """Base of hooks: does nothing."""

    def before_pass(self, step: Step) -> None:
        """Called with the model as the pass will see it."""

    def after_pass(self, step: Step) -> None:
        """Called with the model as the pass left it."""


class ValidityHook(Hook):
    """The graph is sound after every pass."""

    def after_pass(self, step: Step) -> None:
        """Raise InternalError ``INTERNAL-INVALID-IR`` with what is wrong."""
        validate(step.model, after=str(step))


@dataclass
class VerifyHook(Hook):
    """Passes with a tolerance keep the model's function to it, on a few samples.

    The model runs as it is written (onnxruntime's optimisations off) before and after the pass.
    The error of an output is ``||before - after|| / ||before||`` over one sample, at most. What a
    pass promises is about float32, whose rounding it adds to; a model in float64 may move by
    ``EXACT`` alone.
    """

    samples: Sequence[Sample]
    threads: int = 1
    _space: Workspace = field(default_factory=Workspace, init=False)
    _before: Outputs | None = field(default=None, init=False)
    _snapshot: Snapshot | None = field(default=None, init=False)

    def before_pass(self, step: Step) -> None:
        """Keep the outputs that the pass must preserve."""
        if step.owner.tolerance is None:
            self.close()
            return
        self._snapshot = Snapshot(step.model)
        if self._before is None:
            self._before = self._outputs(step.model)

    def after_pass(self, step: Step) -> None:
        """Raise EquivalenceError ``EQUIVALENCE`` if an output moved by more than the tolerance."""
        tolerance = step.owner.tolerance
        if tolerance is None or self._before is None:
            return
        if all(array.dtype in _WIDE for out in self._before for array in out.values()):
            tolerance = min(tolerance, EXACT)
        if self._snapshot == Snapshot(step.model):
            step.max_error = 0.0
            return
        after = self._outputs(step.model)
        name, error = worst_output(self._before, after)
        step.max_error = error
        if not error <= tolerance:
            raise EquivalenceError(
                "EQUIVALENCE",
                f"{step} changed output `{name}` by {error:.3g} relative; it promises"
                f" {tolerance:.3g}",
                "leave the pass out, or find the rewrite with --bisect, and report this",
                pass_number=step.number,
                pass_name=step.owner.name,
                output=name,
                error_norm=error,
                tolerance=tolerance,
            )
        self._before = after

    def close(self) -> None:
        """Forget the outputs and weights of the last model."""
        self._before = self._snapshot = None
        self._space.close()
        self._space = Workspace()

    def _outputs(self, model: ir.Model) -> Outputs:
        return list(run_samples(self._space.session(model, threads=self.threads), self.samples))


def worst_output(before: Outputs, after: Outputs) -> tuple[str, float]:
    """The output with the largest relative error over all samples, and that error.

    An output that is missing afterwards has an infinite error.
    """
    worst, name = 0.0, next(iter(before[0]), "") if before else ""
    for reference, other in zip(before, after, strict=True):
        for output, array in reference.items():
            error = relative_error(array, other[output]) if output in other else float("inf")
            if error > worst:
                worst, name = error, output
    return name, worst
