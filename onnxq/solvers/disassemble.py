"""Channel disassembly: large channels as several smaller ones (QLLM, arXiv 2310.08041).

A channel x of a product ``x W`` may stand t times, ``x / t`` each, its weight row repeated: the
product stays, the largest number falls to ``max|x| / t``. Of all ways to spend a number of new
channels, splitting the largest part again and again leaves the smallest largest part.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt


def choose_parts(amax: npt.NDArray[np.floating], extra: int) -> npt.NDArray[np.int64]:
    """How many parts each channel gets, ``[K]``, ``extra`` more than channels in all.

    Args:
        amax: ``[K]`` largest magnitude of each channel.
        extra: channels to add; fewer are added where nothing is left to split.
    """
    parts = np.ones(len(amax), np.int64)
    heap = [(-float(a), j) for j, a in enumerate(amax) if a > 0]
    heapq.heapify(heap)
    for _ in range(extra if heap else 0):
        _, j = heap[0]
        parts[j] += 1
        heapq.heapreplace(heap, (-float(amax[j]) / int(parts[j]), j))
    return parts
