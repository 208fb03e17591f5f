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

from onnxq.runtime import inspect_library, require_onnxruntime
from tests.custom_ops.cases import agrees, model_of, random_case


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
            # A product needs a session for each weight, and its reference takes long.
            shared = kernel.op == "DynamicQuantizePerToken"
            made: Any = None
            for seed in range(rounds if shared else 1 + rounds // 16):
                case = random_case(kernel.op, kernel.dtype, np.random.default_rng(seed))
                if made is None or not shared:
                    made = _session(model_of(kernel.op, case), library.path)
                if not agrees(kernel.op, case, made.run(None, case.inputs), kernel=True):
                    sys.stderr.write(f"{kernel} at {isa}: seed {seed} differs: {case.name}\n")
                    return 1
    sys.stdout.write(f"{rounds} rounds of {len(library.kernels)} kernels at {library.isa_levels}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2])))
