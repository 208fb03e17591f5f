"""Random shapes, types and values through a kernel library; run by the sanitizer test.

    python fuzz_kernels.py LIBRARY ROUNDS

Leaves with 1 and the seed of the round when a result differs from the numpy reference; a sanitizer
ends the process by itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import custom_ops
from onnxq.runtime import inspect_library, require_onnxruntime
from tests.custom_ops.cases import random_input, same_bits, single_node_model


def _session(model: bytes, library: Path) -> Any:
    """Without ONNX Runtime's arena, so that every buffer is one allocation with guarded ends."""
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def main(path: str, rounds: int) -> int:
    library = inspect_library(Path(path))
    for isa in library.isa_levels:
        os.environ["ONNXQ_ISA"] = isa
        for kernel in library.kernels:
            made = _session(single_node_model(kernel.op, kernel.dtype), library.path)
            operator = custom_ops.get(kernel.op)
            for seed in range(rounds):
                rng = np.random.default_rng(seed)
                inputs = {name: random_input(kernel.dtype, rng) for name in operator.inputs}
                got = made.run(None, inputs)
                if not all(map(same_bits, got, operator.reference(**inputs))):
                    sys.stderr.write(f"{kernel} at {isa}: seed {seed} differs\n")
                    return 1
    sys.stdout.write(f"{rounds} rounds of {len(library.kernels)} kernels at {library.isa_levels}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2])))
