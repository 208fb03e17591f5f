"""What all tasks share: the result, the session they run, the inputs and outputs they look for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from onnxq.data.text import InputSpec
from onnxq.errors import DataError, OnnxqError, UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = npt.NDArray[Any]
T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Called with (done, total) after every batch."""


class ValueArg(Protocol):
    """What ONNX Runtime says of an input or output."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def type(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> Sequence[Any] | None: ...  # noqa: D102


class Session(Protocol):
    """The part of ``onnxruntime.InferenceSession`` that the tasks use."""

    def get_inputs(self) -> Sequence[ValueArg]: ...  # noqa: D102
    def get_outputs(self) -> Sequence[ValueArg]: ...  # noqa: D102
    def run(  # noqa: D102
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Array]
    ) -> list[Array]: ...


SessionFactory = Callable[[Path], Session]
"""Makes the session of a model file, for models that need operators of their own."""


@dataclass(frozen=True)
class EvalResult:
    """What a task measured.

    Attributes:
        task: name of the task.
        metric: name of the number, ``spearman-x100``, ``perplexity`` or ``accuracy-percent``.
        value: the number.
        n: how many things it is over (pairs, predicted tokens, images, sentences).
        details: further numbers and the options used; JSON-serialisable.
    """

    task: str
    metric: str
    value: float
    n: int
    details: Mapping[str, Any] = field(default_factory=dict)

    def drop_to(self, other: EvalResult) -> float:
        """What ``other`` loses against this: points of the metric, or percent more perplexity."""
        if self.metric == "perplexity":
            return 100.0 * (other.value / self.value - 1.0)
        return self.value - other.value

    def to_json(self) -> dict[str, Any]:
        """The result as one JSON object."""
        return {
            "task": self.task,
            "metric": self.metric,
            "value": self.value,
            "n": self.n,
            "details": dict(self.details),
        }


@dataclass(frozen=True)
class Setting:
    """What a task works with, beside its own options.

    Attributes:
        session: the model.
        data: file or folder of the task's data.
        tokenizer: loaded, for tasks over texts.
        batch: examples a run. limit: use only the first so many examples.
        progress: told after every batch.
    """

    session: Session
    data: Path
    tokenizer: Tokenizer | None
    batch: int
    limit: int | None
    progress: Progress

    def limited(self, examples: Sequence[T]) -> list[T]:
        """The examples to use.

        Raises:
            DataError: ``DATA-EMPTY`` when there are none.
        """
        if not examples:
            raise DataError("DATA-EMPTY", f"{self.data} holds no examples", "give other data")
        return list(examples[: self.limit])

    def batches(self, examples: Sequence[T]) -> Iterator[list[T]]:
        """Slices of ``batch`` examples, with progress told after each is done with."""
        for start in range(0, len(examples), self.batch):
            yield list(examples[start : start + self.batch])
            self.progress(min(start + self.batch, len(examples)), len(examples))

    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer, which a text task must have.

        Raises:
            DataError: ``DATA-TOKENIZER``.
        """
        if self.tokenizer is None:
            raise DataError(
                "DATA-TOKENIZER",
                "no tokenizer was given and none lies beside the model",
                "give the tokenizer.json that belongs to the model with --tokenizer",
            )
        return self.tokenizer


@dataclass(frozen=True)
class Task(ABC):
    """A task; its fields are its options, so subclasses are frozen dataclasses."""

    name: ClassVar[str]
    summary: ClassVar[str]
    data_format: ClassVar[str]
    default_batch: ClassVar[int]
    needs_tokenizer: ClassVar[bool]

    @abstractmethod
    def run(self, setting: Setting) -> EvalResult:
        """Measure; see each task for the numbers and the errors."""


def cpu_session(path: Path, threads: int = 1) -> Session:
    """A plain ONNX Runtime session on the CPU.

    Raises:
        UnsupportedError: ``UNSUPPORTED-NO-ONNXRUNTIME``.
        DataError: ``DATA-MODEL-MISSING``, ``DATA-MODEL-LOAD``.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UnsupportedError(
            "UNSUPPORTED-NO-ONNXRUNTIME",
            "running a model needs onnxruntime, which is not installed",
            "pip install 'onnxq[cpu]'",
        ) from error
    if not path.is_file():
        raise DataError("DATA-MODEL-MISSING", f"there is no model at {path}", "check the path")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session: Session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions share no narrower base
        raise DataError(
            "DATA-MODEL-LOAD",
            f"ONNX Runtime cannot load {path}: {error}",
            "check the file; a model with operators of its own needs a session factory",
        ) from error
    return session


_ORT_TYPES: dict[str, npt.DTypeLike] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
}


def input_specs(session: Session) -> list[InputSpec]:
    """The model's inputs.

    Raises:
        DataError: ``DATA-INPUT-TYPE`` for a type that no task feeds.
    """
    specs = []
    for arg in session.get_inputs():
        dtype = _ORT_TYPES.get(arg.type)
        if dtype is None:
            raise DataError(
                "DATA-INPUT-TYPE",
                f"the model's input {arg.name!r} is {arg.type}, which no task can feed",
                "evaluate a model with plain tensor inputs",
            )
        specs.append(InputSpec(arg.name, dtype, tuple(arg.shape or ())))
    return specs


def run_session(
    session: Session, outputs: Sequence[str], feeds: Mapping[str, Array]
) -> list[Array]:
    """Run, with a failure inside the model turned into an error with a code.

    Raises:
        DataError: ``DATA-MODEL-RUN``.
    """
    try:
        return session.run(outputs, feeds)
    except OnnxqError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
        raise DataError(
            "DATA-MODEL-RUN",
            f"the model failed on inputs {shapes}: {error}",
            "check that the model belongs to this task, or set batch and lengths to its sizes",
        ) from error


def pick_output(session: Session, preferred: Sequence[str], ranks: Sequence[int]) -> str:
    """The first output with a preferred name, else the first of a wanted rank.

    Raises:
        DataError: ``DATA-OUTPUT-UNKNOWN``.
    """
    outputs = session.get_outputs()
    # ONNX Runtime says [] of an output whose rank it does not know; then the name decides.
    fitting = [a for a in outputs if "float" in a.type and len(a.shape or ()) in (0, *ranks)]
    for name in preferred:
        if any(arg.name == name for arg in fitting):
            return name
    for arg in fitting:
        if arg.shape:
            return arg.name
    raise DataError(
        "DATA-OUTPUT-UNKNOWN",
        f"none of the outputs {', '.join(arg.name for arg in outputs)} is a float tensor with "
        f"{' or '.join(str(rank) for rank in ranks)} dimensions",
        "evaluate a model that belongs to this task",
    )


def require_finite(value: float, what: str) -> float:
    """``value``, unless it is NaN or infinite: then the model is broken, not just worse.

    Raises:
        DataError: ``DATA-NOT-FINITE``.
    """
    if not math.isfinite(value):
        raise DataError(
            "DATA-NOT-FINITE",
            f"{what} is {value}: the model's outputs are constant, NaN or infinite",
            "compare the model with its float original",
        )
    return value


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file, split at newlines only.

    Raises:
        DataError: ``DATA-FILE``.
    """
    return read_text(path).split("\n")


def read_text(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        DataError: ``DATA-FILE``.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "DATA-FILE", f"cannot read {path} as text: {error}", "give a UTF-8 text file"
        ) from error


def accuracy_percent(hits: int, total: int) -> float:
    """Share of hits in percent."""
    return 100.0 * hits / total


def check_labels(labels: Sequence[int], classes: int, data: Path) -> None:
    """All labels must be classes of the model.

    Raises:
        DataError: ``DATA-LABELS``.
    """
    low, high = min(labels), max(labels)
    if low < 0 or high >= classes:
        raise DataError(
            "DATA-LABELS",
            f"{data} has labels {low} to {high}, the model's output has classes 0 to {classes - 1}",
            "give the labels that belong to the model",
        )
