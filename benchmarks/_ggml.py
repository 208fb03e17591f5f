"""The same products by ggml, where `pip install ggml-python` has put it; a peer for kernels.py.

Not a benchmark itself. Weights lie in ggml's repacked CPU buffers for the types that have one, as
llama.cpp loads them.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
CONTEXT_BYTES = 1 << 20


def module() -> Any | None:
    """The bindings, or None where they are not installed."""
    try:
        return importlib.import_module("ggml")
    except ImportError:
        return None


class Weight:
    """A weight of ``k`` by ``n`` random numbers in one of ggml's types.

    Attributes:
        repacked: whether it lies in a buffer of ggml's repacked layout.
    """

    def __init__(self, type_name: str, k: int, n: int, threads: int) -> None:
        self.ggml = ggml = module()
        self.k, self.n = k, n
        self.type = getattr(ggml, f"GGML_TYPE_{type_name}")
        self.backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self.backend, threads)
        numbers = np.random.default_rng(0).standard_normal((n, k), dtype=np.float32)
        size = ggml.ggml_row_size(self.type, k) * n
        data = np.zeros(size, np.uint8)
        ggml.ggml_quantize_chunk(
            self.type, numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            data.ctypes.data, 0, n, k, None,
        )  # fmt: skip
        # Not ggml_backend_cpu_buffer_type: its binding cuts the pointer to 32 bits.
        self.plain = ggml.ggml_backend_get_default_buffer_type(self.backend)
        buffers = [*self._repacked_buffers(), self.plain]
        for place, buffer in enumerate(buffers):
            self.context = self._context()
            self.tensor = ggml.ggml_new_tensor_2d(self.context, self.type, k, n)
            memory = ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.context, buffer)
            self.repacked = place < len(buffers) - 1
            if memory and (not self.repacked or self._takes_product(memory)):
                break
        ggml.ggml_backend_tensor_set(self.tensor, data.ctypes.data, 0, size)

    def product(self, x: Array) -> Callable[[], Array]:
        """A function that multiplies ``x [M, K]`` and returns ``[M, N]``."""
        ggml = self.ggml
        m = x.shape[0]
        context = self._context()
        right = ggml.ggml_new_tensor_2d(context, ggml.GGML_TYPE_F32, self.k, m)
        result = ggml.ggml_mul_mat(context, self.tensor, right)
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, result)
        ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, self.plain)
        y = np.empty((m, self.n), np.float32)

        def run() -> Array:
            ggml.ggml_backend_tensor_set(right, x.ctypes.data, 0, x.nbytes)
            if ggml.ggml_backend_graph_compute(self.backend, graph):
                raise SystemExit("ggml cannot compute the product")
            ggml.ggml_backend_tensor_get(result, y.ctypes.data, 0, y.nbytes)
            return y

        return run

    def _context(self) -> Any:
        ggml = self.ggml
        return ggml.ggml_init(ggml.ggml_init_params(CONTEXT_BYTES, None, True))

    def _repacked_buffers(self) -> list[Any]:
        """ggml's further buffer types of the CPU; products choose among them by type and ISA."""
        ggml = self.ggml
        registry = ggml.ggml_backend_cpu_reg()
        address = ggml.ggml_backend_reg_get_proc_address(
            registry, b"ggml_backend_dev_get_extra_bufts"
        )
        if not address:
            return []
        kind = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
        found = kind(address)(ggml.ggml_backend_reg_dev_get(registry, 0))
        buffers = []
        while found and found[len(buffers)]:
            buffers.append(found[len(buffers)])
        return buffers

    def _takes_product(self, memory: Any) -> bool:
        ggml = self.ggml
        ggml.ggml_backend_buffer_set_usage(memory, ggml.GGML_BACKEND_BUFFER_USAGE_WEIGHTS)
        context = self._context()
        right = ggml.ggml_new_tensor_2d(context, ggml.GGML_TYPE_F32, self.k, 1)
        product = ggml.ggml_mul_mat(context, self.tensor, right)
        return bool(
            ggml.ggml_backend_dev_supports_op(
                ggml.ggml_backend_reg_dev_get(ggml.ggml_backend_cpu_reg(), 0), product
            )
        )
