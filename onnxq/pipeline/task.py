"""What quantization costs on a task: the metric of the original and of the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxq.errors import QualityError, SpecError


@dataclass(frozen=True)
class TaskSpec:
    """The task that a run is judged by.

    Args:
        task: a name of :func:`onnxq.evaluation.tasks`.
        data: its file or folder.
        limit: use only the first so many examples.
        max_drop: most that may be lost: points of the metric, or percent more perplexity.
    """

    task: str
    data: Path
    limit: int | None = None
    max_drop: float | None = None

    @classmethod
    def of(
        cls, task: str | None, data: Any, limit: int | None, max_drop: float | None
    ) -> TaskSpec | None:
        """The task that the arguments of a run ask for, or None.

        Raises:
            SpecError: ``SPEC-TASK``: half of it is missing; ``SPEC-RANGE``.
        """
        if task is not None and data is not None:
            if max_drop is not None and not max_drop >= 0:
                raise SpecError("SPEC-RANGE", f"max-drop={max_drop} is below 0", "use 0 or more")
            return cls(task, Path(data), limit, max_drop)
        given = {"task": task, "data": data, "task-limit": limit, "max-drop": max_drop}
        named = [f"--{name}" for name, value in given.items() if value is not None]
        if named:
            missing = [f"--{name}" for name in ("task", "data") if given[name] is None]
            raise SpecError(
                "SPEC-TASK",
                f"{' and '.join(named)} without {' and '.join(missing)}",
                "for example --task sts --data sts-dev.csv --max-drop 0.3",
            )
        return None


@dataclass(frozen=True)
class TaskResult:
    """What a task measured before and after.

    Args:
        task, metric: their names.
        before, after: the metric of the original and of the result.
        drop: what was lost; see :class:`TaskSpec`.
        n: examples.
    """

    task: str
    metric: str
    before: float
    after: float
    drop: float
    n: int

    def words(self) -> str:
        """One line."""
        unit = " %" if self.metric == "perplexity" else ""
        return f"{self.task} {self.before:.2f} -> {self.after:.2f}, drop {self.drop:.2f}{unit}"

    def problem(self, max_drop: float | None) -> QualityError | None:
        """``QUALITY-DROP`` if more was lost than ``max_drop``, or a number is none."""
        if max_drop is None or self.drop <= max_drop:
            return None
        return QualityError(
            "QUALITY-DROP",
            f"{self.words()} ({self.metric}, {self.n} examples): more than {max_drop:g}",
            "leave sensitive layers in float, or raise --max-drop",
            **vars(self),
        )


def measure_task(
    spec: TaskSpec, source: Path, result: Path, tokenizer: Any, threads: int
) -> TaskResult:
    """Run the task on both files.

    Raises:
        SpecError, DataError: see :func:`onnxq.evaluation.evaluate`.
    """
    from onnxq.data.text import find_tokenizer
    from onnxq.evaluation import evaluate

    options: dict[str, Any] = {
        "tokenizer": tokenizer or find_tokenizer(source),
        "limit": spec.limit,
        "threads": threads,
    }
    before = evaluate(source, spec.task, spec.data, **options)
    after = evaluate(result, spec.task, spec.data, **options)
    return TaskResult(
        spec.task, after.metric, before.value, after.value, before.drop_to(after), after.n
    )
