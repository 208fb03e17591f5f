"""Errors that onnxq raises for its users, each with a stable code, a cause and a way out.

Every error that a user's input can cause is an :class:`OnnxqError`. The command line prints it as
one block (code, cause, hint) and leaves with its exit code; a traceback is shown only with
``--debug``. Codes are stable: scripts may match on them, messages may change.

=========  =====================================================  =========
class      meaning                                                exit code
=========  =====================================================  =========
Spec       the pipeline text or an option cannot be understood    2
Pipeline   the passes are fine one by one, but not in this order  2
Quality    the result is worse than the threshold asked for       3
Noop       a pass that was asked for matched nothing              4
Data       the model, the calibration data or a file is bad       5
Precondition  a pass cannot be applied to this model              6
Unsupported   the model, target or machine lacks what is needed   6
Equivalence   a pass that must keep the function changed it       7
Internal   a bug in onnxq                                         70
=========  =====================================================  =========
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Span:
    """A half-open range ``[start, stop)`` of characters in a pipeline text."""

    text: str
    start: int
    stop: int

    def caret(self) -> str:
        """The text with a line of carets below the span."""
        width = max(1, self.stop - self.start)
        return f"{self.text}\n{' ' * self.start}{'^' * width}"


class OnnxqError(Exception):
    """Base of all errors with a code, a cause and a hint.

    Args:
        code: stable identifier, upper-case kebab, for example ``DATA-NOT-ONNX``.
        cause: one sentence: what is wrong, with the names and numbers involved.
        hint: one sentence: what the user can do about it.
        details: further facts for ``--json``; values must be JSON-serialisable.
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, code: str, cause: str, hint: str = "", **details: Any) -> None:
        super().__init__(cause)
        self.code = code
        self.cause = cause
        self.hint = hint
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are rebuilt from ``args``, which holds the cause alone; workers send them home.
        return _rebuilt, (type(self), self.code, self.cause, self.hint), self.__dict__

    def __str__(self) -> str:
        return f"[{self.code}] {self.cause}" + self._hint_line()

    def _hint_line(self) -> str:
        return f"\n  hint: {self.hint}" if self.hint else ""

    def to_json(self) -> dict[str, Any]:
        """The error as one JSON object, for ``--json``."""
        return {
            "error": self.code,
            "cause": self.cause,
            "hint": self.hint,
            "exit_code": self.exit_code,
            **self.details,
        }


def _rebuilt(kind: type[OnnxqError], code: str, cause: str, hint: str) -> OnnxqError:
    return kind(code, cause, hint)


class SpecError(OnnxqError):
    """A pipeline text or an option cannot be understood; carries the place in the text."""

    exit_code = 2

    def __init__(
        self, code: str, cause: str, hint: str = "", *, span: Span | None = None, **details: Any
    ) -> None:
        super().__init__(code, cause, hint, **details)
        self.span = span

    def __str__(self) -> str:
        place = "" if self.span is None else "\n  " + self.span.caret().replace("\n", "\n  ")
        return f"[{self.code}] {self.cause}{place}" + (
            f"\n  hint: {self.hint}" if self.hint else ""
        )


class PipelineError(OnnxqError):
    """The passes cannot run in this order; the hint says which order works."""

    exit_code = 2


class QualityError(OnnxqError):
    """The result runs but is worse than the threshold that was asked for."""

    exit_code = 3


class NoopError(OnnxqError):
    """A pass that was asked for matched nothing in the model."""

    exit_code = 4


class DataError(OnnxqError):
    """A file, a model or calibration data is missing, broken or does not fit."""

    exit_code = 5


class PreconditionError(OnnxqError):
    """A pass cannot be applied to this model; names the pass and the node."""

    exit_code = 6


class UnsupportedError(OnnxqError):
    """The model, target or machine lacks something that is needed."""

    exit_code = 6


class EquivalenceError(OnnxqError):
    """A pass that declares a tolerance changed the function by more than that."""

    exit_code = 7


class InternalError(OnnxqError):
    """A bug in onnxq: an invariant of its own does not hold."""

    exit_code = 70
