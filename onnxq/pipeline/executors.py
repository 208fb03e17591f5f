"""Where the heavy work of passes runs: in this process, in several, or on a dask cluster."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from onnxq.errors import DataError, SpecError, UnsupportedError

if TYPE_CHECKING:
    from onnxq.passes.work import Executor

CONNECT_SECONDS = 10


@contextmanager
def open_executor(jobs: int = 1, cluster: str | None = None) -> Iterator[Executor | None]:
    """An executor for ``jobs`` processes or the cluster at ``cluster``; None for neither.

    Args:
        jobs: worker processes on this machine.
        cluster: address of a dask scheduler, for example ``tcp://host:8786``. Its workers must
            see the model's files and the temporary folder under the same paths.

    Raises:
        SpecError: fewer than one job, or jobs and a cluster at once.
        UnsupportedError: ``WORK-NO-DASK``: the package ``distributed`` is not installed.
        DataError: ``WORK-NO-CLUSTER``: nothing answers at the address.
    """
    if jobs < 1 or (cluster is not None and jobs > 1):
        raise SpecError(
            "SPEC-JOBS",
            f"jobs={jobs}" + (f" beside the cluster {cluster}" if cluster else ""),
            "give a number of processes from 1 on, or a cluster",
        )
    if cluster is not None:
        with _client(cluster) as client:
            yield client.get_executor()
    elif jobs > 1:
        # A forked child would inherit the locks of onnxruntime's threads.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            yield pool
    else:
        yield None


def _client(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        raise UnsupportedError(
            "WORK-NO-DASK",
            "the package `distributed`, which talks to clusters, is not installed",
            "pip install 'onnxq[dask]'",
        ) from error
    try:
        return Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise DataError(
            "WORK-NO-CLUSTER",
            f"no dask scheduler answers at {address}: {type(error).__name__}",
            "start one with `dask scheduler`, and workers with `dask worker ADDRESS`",
        ) from error
