"""A model larger than the memory that its quantization takes: one layer at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import pytest

from onnxq.graph import io

SIZE, LAYERS = 2048, 24
SCRIPT = """
import resource, sys
from onnxq.graph import io
from onnxq.pipeline.runner import Pipeline
passes = "assign{mode=weight-only weights=int4 block=32}, qdq"
io.save(Pipeline(passes).run(sys.argv[1], verify=False).model, sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_the_peak_is_far_below_the_weights(tmp_path: Path) -> None:
    """400 MB of weights (3.5 GB take hardly more): the peak is that of one layer."""
    rng = np.random.default_rng(0)
    nodes, initializers, x, offset = [], [], "x", 0
    with (tmp_path / "w.data").open("wb") as data:
        for i in range(LAYERS):
            w = rng.standard_normal((SIZE, SIZE), np.float32)
            w.tofile(data)
            tensor = onnx.TensorProto(name=f"w{i}", data_type=1, dims=[SIZE, SIZE], data_location=1)
            entries = {"location": "w.data", "offset": str(offset), "length": str(w.nbytes)}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=value)
            offset += w.nbytes
            initializers.append(tensor)
            nodes.append(oh.make_node("MatMul", [x, f"w{i}"], [f"y{i}"]))
            x = f"y{i}"
    inputs, outputs = ([oh.make_tensor_value_info(name, 1, ["T", SIZE])] for name in ("x", x))
    graph = oh.make_graph(nodes, "g", inputs, outputs, initializers)
    opset = [oh.make_opsetid("", 21)]
    onnx.save(oh.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "m.onnx")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "m.onnx"), str(tmp_path / "out.onnx")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 0.6 * offset
    assert io.size_on_disk(tmp_path / "out.onnx") < 0.16 * offset
