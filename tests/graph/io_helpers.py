"""Small models, with and without external data, for the tests of load and save."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

from onnxq.errors import OnnxqError
from onnxq.graph import io

TEXT = """
<ir_version: 9, opset_import: ["" : 18, "local" : 1]>
main (float[N, 4] x) => (float[N, 3] y) {
    h = MatMul(x, w)
    g = local.twice(h)
    big = ReduceMax <keepdims = 0> (g)
    zero = Constant <value = float {0.0}> ()
    yes = Greater(big, zero)
    y = If (yes) <
        then_branch = then_graph () => (float[N, 3] a) <float[3] b = {1.0, 2.0, 3.0}> {
            a = Add(g, b)
        },
        else_branch = else_graph () => (float[N, 3] c) { c = Neg(g) }
    >
}
<domain: "local", opset_import: ["" : 18]>
twice (v) => (r) {
    two = Constant <value = float {2.0}> ()
    r = Mul(v, two)
}
"""


def weight(rows: int = 4, columns: int = 3, seed: int = 0) -> np.ndarray:
    """Weight ``[rows, columns]`` f32."""
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def small_model() -> onnx.ModelProto:
    """MatMul, a local function, and an If with an initializer of its own."""
    model = onnx.parser.parse_model(TEXT)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight(), "w"))
    return model


def wide_model(layers: int = 4, width: int = 256, seed: int = 0) -> onnx.ModelProto:
    """A chain of MatMuls with weights ``[width, width]`` f32, large enough to be streamed."""
    names = [f"w{i}" for i in range(layers)]
    lines = [f"h{i + 1} = MatMul(h{i}, {name})" for i, name in enumerate(names)]
    body = "\n".join(lines)
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 18]>\n'
        f"wide (float[N, {width}] h0) => (float[N, {width}] h{layers}) {{\n{body}\n}}"
    )
    for i, name in enumerate(names):
        array = weight(width, width, seed + i)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def write(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def external_model(
    folder: Path,
    *,
    location: str = "w.data",
    offset: str | None = "0",
    length: str | None = "48",
    data: bytes | None = None,
) -> Path:
    """The small model with ``w`` in external data; ``data`` is written unless it is ``None``."""
    model = small_model()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    if data is not None:
        (folder / "w.data").write_bytes(data)
    return write(model, folder / "model.onnx")


def refused(path: Path, code: str) -> OnnxqError:
    """Load ``path``, which must fail with ``code``, a cause and a hint."""
    with pytest.raises(OnnxqError) as caught:
        io.load(path)
    assert caught.value.code == code
    assert caught.value.cause
    assert caught.value.hint
    return caught.value


def shared_folder() -> Path:
    """The folder with the real models; skips the test where there is none."""
    default = Path(__file__).parents[2].parent / "shared"
    folder = Path(os.environ.get("ONNXQ_SHARED", default))
    if not (folder / "models").is_dir():
        pytest.skip("no shared models: set ONNXQ_SHARED")
    return folder


def shared_models() -> list[str]:
    """Paths of the real models below the shared folder, empty where there is none."""
    default = Path(__file__).parents[2].parent / "shared"
    folder = Path(os.environ.get("ONNXQ_SHARED", default)) / "models"
    return sorted(str(path.relative_to(folder)) for path in folder.glob("**/*.onnx"))
