"""The list of tasks, their options as text or values, and :func:`evaluate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from onnxq.data.text import find_tokenizer, load_tokenizer
from onnxq.errors import SpecError
from onnxq.evaluation.base import (
    EvalResult,
    Progress,
    Session,
    SessionFactory,
    Setting,
    Task,
    cpu_session,
)
from onnxq.evaluation.classify import ImageNet, Sst2
from onnxq.evaluation.perplexity import Perplexity
from onnxq.evaluation.sts import Sts

_TASKS: dict[str, type[Task]] = {task.name: task for task in (ImageNet, Perplexity, Sst2, Sts)}


def tasks() -> dict[str, type[Task]]:
    """All tasks by name; the fields of each class are its options."""
    return dict(_TASKS)


def evaluate(
    model: str | Path | Session,
    task: str,
    data: str | Path,
    *,
    tokenizer: str | Path | None = None,
    batch: int | None = None,
    limit: int | None = None,
    threads: int = 1,
    session_factory: SessionFactory | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> EvalResult:
    """Measure a model on a task.

    Args:
        model: a file, or a session that is open already.
        task: one of :func:`tasks`.
        data: the task's file or folder (:attr:`Task.data_format`).
        tokenizer: a ``tokenizer.json``; by default the one beside the model file.
        batch: examples a run; by default the task's.
        limit: use only the first so many examples (windows for ``perplexity``).
        threads: of the default session; ignored with ``session_factory`` or an open session.
        session_factory: opens the model file, for models with operators of their own.
        progress: called with (done, total) after every batch.
        options: of the task, as values or as text.

    Raises:
        SpecError: ``SPEC-EVAL-TASK``, ``SPEC-EVAL-OPTION``: no such task or option.
        DataError: model, tokenizer or data are missing or do not fit together.
    """
    kind = _TASKS.get(task)
    if kind is None:
        raise SpecError(
            "SPEC-EVAL-TASK", f"there is no task {task!r}", f"tasks: {', '.join(sorted(_TASKS))}"
        )
    for name, value in (("batch", batch), ("limit", limit), ("threads", threads)):
        if value is not None and value < 1:
            raise SpecError("SPEC-EVAL-OPTION", f"{name}={value}", f"{name} is at least 1")
    chosen = _with_options(kind, options)
    loaded = None
    if kind.needs_tokenizer:
        where = tokenizer or (find_tokenizer(model) if isinstance(model, str | Path) else None)
        loaded = load_tokenizer(where) if where is not None else None
    if isinstance(model, str | Path):
        path = Path(model)
        session = session_factory(path) if session_factory else cpu_session(path, threads)
    else:
        session = model
    setting = Setting(
        session=session,
        data=Path(data),
        tokenizer=loaded,
        batch=batch or kind.default_batch,
        limit=limit,
        progress=progress or (lambda _done, _total: None),
    )
    return chosen.run(setting)


def _with_options(kind: type[Task], options: dict[str, Any]) -> Task:
    """The task with options given as values or as text; types are those of the defaults."""
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in options.items():
        name = key.replace("-", "_")
        if name not in defaults:
            known = ", ".join(defaults)
            raise SpecError(
                "SPEC-EVAL-OPTION", f"task {kind.name} has no option {key!r}", f"options: {known}"
            )
        wanted: type[Any] = type(defaults[name])
        text = str(value).lower() if isinstance(value, bool) else value
        try:
            values[name] = wanted(text)
        except ValueError as error:
            raise SpecError(
                "SPEC-EVAL-OPTION",
                f"option {key}={value!r} of task {kind.name} is not of type {wanted.__name__}",
                f"for instance {key}={defaults[name]}",
            ) from error
    return kind(**values)
