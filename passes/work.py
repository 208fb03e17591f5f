"""Independent pieces of a pass's work: one after another here, or in other processes.

An executor is anything with ``submit`` as ``concurrent.futures`` has it: a process pool, or dask's.
Tasks carry paths and names, never weights, and give the same bytes wherever they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from onnxq.errors import DataError
from onnxq.graph.atomic import reported
from onnxq.graph.external import FileTensor
from onnxq.graph.match import Linear

T = TypeVar("T")
R = TypeVar("R")


class Executor(Protocol):
    """What takes tasks."""

    def submit(self, function: Callable[..., R], /, *arguments: Any) -> Future[R]:
        """Have ``function(*arguments)`` run somewhere."""
        ...


def run_tasks(
    executor: Executor | None,
    function: Callable[[T], R],
    tasks: Sequence[T],
) -> Iterator[R]:
    """The results of ``function`` on all tasks, in order, each as soon as it is there.

    Args:
        executor: None to run each task here, when its result is asked for.
        function: of a module, so that other processes find it.
        tasks: small things that can be pickled.

    Raises:
        DataError: ``WORK-LOST``: a worker died, and nobody took over its task.
    """
    if executor is None:
        yield from map(function, tasks)
        return
    waiting = [executor.submit(_pinned, function, task) for task in tasks]
    try:
        for future in waiting:
            yield future.result()
    except (BrokenExecutor, CancelledError) as error:
        raise DataError(
            "WORK-LOST",
            f"a worker process died ({type(error).__name__}): killed, or out of memory",
            "use fewer jobs; with a `cache` folder the run goes on behind what was finished",
        ) from error
    except Exception as error:
        if type(error).__name__ in ("KilledWorker", "CommClosedError"):
            raise DataError(
                "WORK-LOST",
                f"the cluster lost a task: {error}",
                "look at the workers' logs; with a `cache` folder the run goes on",
            ) from error
        raise
    finally:
        for future in waiting:
            future.cancel()


def _pinned(function: Callable[[T], R], task: T) -> R:
    """``function(task)`` with one BLAS thread: workers share the processors already."""
    with threadpool_limits(limits=1, user_api="blas"):
        return function(task)


@dataclass(frozen=True)
class WeightRef:
    """Where a float32 weight lies in a file, so that a task need not carry it.

    Args:
        path: a file that all workers can read.
        offset: first byte.
        shape: as stored.
        in_axis: axis of the input channels.
    """

    path: str
    offset: int
    shape: tuple[int, ...]
    in_axis: int

    @classmethod
    def of(cls, layer: Linear, scratch: Path, number: int) -> WeightRef:
        """Of a MatMul or Gemm layer: its own data file, or one in ``scratch`` if it has none."""
        tensor = layer.weight.const_value
        if isinstance(tensor, FileTensor) and tensor.dtype.name == "FLOAT" and tensor.external:
            path, offset = str(tensor.file.path.resolve()), tensor.offset
        else:
            path, offset = str(scratch / f"weight-{number}"), 0
            with reported(Path(path)):
                np.ascontiguousarray(layer.w, "<f4").tofile(path)
        return cls(path, offset, layer.shape, layer.in_axis)

    def rows(self) -> npt.NDArray[np.float32]:
        """The weight as ``[N, K]``, one row an output channel.

        Raises:
            DataError: the file is not there, or too short.
        """
        count = int(np.prod(self.shape))
        with reported(Path(self.path)):
            array = np.fromfile(self.path, "<f4", count, offset=self.offset)
        if array.size != count:
            raise DataError(
                "DATA-FILE-CHANGED",
                f"{self.path} ends before byte {self.offset + 4 * count}",
                "leave the model's files alone while it is quantized",
            )
        stored = array.reshape(self.shape)
        return stored if self.in_axis == 1 else np.ascontiguousarray(stored.T)
