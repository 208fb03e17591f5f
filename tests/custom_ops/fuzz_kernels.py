"""Random shapes, types, values and faults through a kernel library; run by the sanitizer test.

    python -m tests.custom_ops.fuzz_kernels LIBRARY ROUNDS

Each round takes the next kernel and instruction set. It runs a sound case, whose result must be the
numpy reference's, and a damaged one, which may run or be refused with an error that names the
operator. Leaves with 1 and the seed of a round that went wrong; a sanitizer ends the process by
itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq.runtime import inspect_library, require_onnxruntime
from tests.custom_ops.cases import Inputs, agrees, model_of, random_case

_INTEGERS = (-(2**63), -1, 0, 1, 2, 3, 5, 7, 16, 33, 255, 2**31, 2**62, 2**63 - 1)
_FLOATS = (np.nan, np.inf, -1.0, 0.0, 1e-38, 1e38)


def session_of(model: bytes, library: Path) -> Any:
    """Without ONNX Runtime's arena, so that every buffer is one allocation with guarded ends."""
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def damage(model: onnx.ModelProto, inputs: Inputs, rng: np.random.Generator) -> str:
    """Change an attribute, a constant's shape or bytes, or an input's shape; says what."""
    node, constants = model.graph.node[0], list(model.graph.initializer)
    kinds = ["input"] + ["attribute"] * bool(node.attribute) + ["shape", "bytes"] * bool(constants)
    kind = str(rng.choice(kinds))
    if kind == "attribute":
        found = node.attribute[rng.integers(len(node.attribute))]
        is_float = found.type == onnx.AttributeProto.FLOAT
        value = float(rng.choice(_FLOATS)) if is_float else _INTEGERS[rng.integers(len(_INTEGERS))]
        found.CopyFrom(onnx.helper.make_attribute(found.name, value))
        return f"{found.name} = {value}"
    if kind == "input":
        name = str(rng.choice(list(inputs)))
        inputs[name] = resized(inputs[name], rng)
        return f"{name} {inputs[name].shape}"
    tensor = constants[rng.integers(len(constants))]
    array = onnx.numpy_helper.to_array(tensor)
    if kind == "shape":
        array = resized(array, rng)
    else:
        array = np.frombuffer(rng.bytes(array.nbytes), array.dtype).reshape(array.shape)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    return f"{kind} of {tensor.name} {array.shape}"


def resized(array: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """One axis longer, shorter or gone; or an axis more, or none left."""
    kind = int(rng.integers(5))
    if array.ndim == 0 or kind == 4:
        return array.reshape(1, *array.shape)
    axis = int(rng.integers(array.ndim))
    extent = (array.shape[axis] + 1, max(0, array.shape[axis] - 1), 0)[kind % 3]
    if kind == 3:
        return np.zeros((), array.dtype)
    shape = list(array.shape)
    shape[axis] = extent
    return np.resize(array, shape) if array.size else np.zeros(shape, array.dtype)


def try_damaged(op: str, model: bytes, inputs: Inputs, library: Path, seed: int) -> str | None:
    """What is wrong with how a damaged model is met, or None."""
    rng = np.random.default_rng([seed, 1])
    proto, fed = onnx.load_from_string(model), dict(inputs)
    what = damage(proto, fed, rng)
    try:
        session_of(proto.SerializeToString(), library).run(None, fed)
    except Exception as error:  # ONNX Runtime's own classes share no base but Exception
        if op not in str(error):
            return f"{what}: an error that does not name {op}: {error}"
    return None


def main(path: str, rounds: int) -> int:
    library = inspect_library(Path(path))
    for seed in range(rounds):
        kernel = library.kernels[seed % len(library.kernels)]
        levels = library.isa_levels
        os.environ["ONNXQ_ISA"] = isa = levels[seed // len(library.kernels) % len(levels)]
        case = random_case(kernel.op, kernel.dtype, np.random.default_rng(seed))
        model = model_of(kernel.op, case)
        wrong = try_damaged(kernel.op, model, case.inputs, library.path, seed)
        got = session_of(model, library.path).run(None, case.inputs)
        if not agrees(kernel.op, case, got, kernel=True):
            wrong = f"differs: {case.name}"
        if wrong is not None:
            sys.stderr.write(f"{kernel} at {isa}, seed {seed}: {wrong}\n")
            return 1
    sys.stdout.write(f"{rounds} rounds of {len(library.kernels)} kernels at {library.isa_levels}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2])))
