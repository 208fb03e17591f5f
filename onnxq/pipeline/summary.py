"""What a finished run tells: the files, one row a pass, the comparison, the cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxq.pipeline.compare import Comparison
from onnxq.pipeline.runner import RunResult, StepResult
from onnxq.pipeline.task import TaskResult
from onnxq.pipeline.verdict import counted, poor_outputs


@dataclass
class RunSummary:
    """A finished run.

    Args:
        source: the input file.
        out: the output file.
        recipe: the recipe beside it.
        pipeline: the passes with their options, recipes expanded.
        target: name of the target.
        result: model, artifacts and one report a pass.
        comparison: of the written file with the input, or None without samples.
        samples: what was calibrated and compared on, in words.
        warnings: what the user should know, such as random data or unverified passes.
        task: what the task measured that was asked for.
        bytes_before, bytes_after: of the files, external data included.
        seconds, cpu_seconds: of the whole run, child processes included.
    """

    source: Path
    out: Path
    recipe: Path
    pipeline: str
    target: str
    seed: int
    threads: int
    result: RunResult
    comparison: Comparison | None
    samples: str
    warnings: list[str]
    bytes_before: int
    bytes_after: int
    task: TaskResult | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def steps(self) -> list[StepResult]:
        """One result a pass."""
        return self.result.reports

    @property
    def cosine(self) -> float | None:
        """Mean cosine of the worst output, or None without a comparison."""
        worst = None if self.comparison is None else self.comparison.worst
        return None if worst is None else worst.cosine_mean

    @property
    def is_poor(self) -> bool:
        """Whether an output is below ``POOR_COSINE``."""
        return self.comparison is not None and bool(poor_outputs(self.comparison))

    def table(self) -> list[dict[str, Any]]:
        """One row a pass: number, pass, changed, skipped, reasons, seconds, size, max_error."""
        return [
            {
                "number": s.number,
                "pass": s.spec,
                "changed": len(s.report.changed),
                "skipped": len(s.report.skipped),
                "reasons": counted(skip.reason for skip in s.report.skipped),
                "seconds": s.seconds,
                "size": s.size,
                "max_error": s.max_error,
            }
            for s in self.steps
        ]

    def to_json(self) -> dict[str, Any]:
        """The run as JSON-serialisable data."""
        return {
            "model": str(self.source),
            "output": str(self.out),
            "recipe": str(self.recipe),
            "pipeline": self.pipeline,
            "target": self.target,
            "seed": self.seed,
            "threads": self.threads,
            "samples": self.samples,
            "warnings": self.warnings,
            "is_poor": self.is_poor,
            "task": None if self.task is None else vars(self.task),
            "passes": [s.to_json() for s in self.steps],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "size_ratio": self.bytes_before / max(1, self.bytes_after),
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "provenance": self.result.provenance,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }
