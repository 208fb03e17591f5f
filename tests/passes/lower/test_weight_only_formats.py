"""Weights in every format, run by onnxruntime as it comes: the product of what was rounded."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import PreconditionError, SpecError, UnsupportedError
from onnxq.formats import Granularity, parse_format
from onnxq.passes.decide.assign import Assign
from onnxq.passes.keys import ROUNDED
from onnxq.passes.lower.decode import planes_of
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.targets import Target
from onnxq.passes.weights.hqq import Hqq

from .. import helpers as h

K, N = 80, 24
W = h.normal(K, N, seed=1, scale=0.3)
MATMUL = f"g (float[R,{K}] x) => (float[R,{N}] y) {{ y = MatMul(x, w) }}"
GEMM = f"g (float[R,{K}] x) => (float[R,{N}] y) {{ y = Gemm<transB = 1>(x, w) }}"
FEEDS = {"x": h.normal(6, K, seed=2)}
FLOAT32 = 3e-6
"""Relative error of a float32 product with its sums in another order."""

FORMATS = [
    "fp8e4m3", "fp8e5m2", "fp6e2m3", "fp6e3m2g16", "fp4", "fp4g32", "mxfp8e4m3", "mxfp6e2m3",
    "mxfp4", "mxint8", "nvfp4", "nvfp4-46", "nf4", "kmeans4", "kmeans3g40", "log2", "logsqrt2",
    "ternary", "ternaryg40-absmean", "ternary-ttq", "binary", "seq2", "mx9", "mx6", "mx4",
    "int3", "int5g16", "int6", "uint3g32", "int7g16", "int2g20",
]  # fmt: skip


def lowered(name: str, body: str = MATMUL, target: str = "cpu", **options: bool) -> ir.Model:
    w = W if body == MATMUL else np.ascontiguousarray(W.T)
    model = h.model_of(body, {"w": w}, opset=21)
    assign = Assign(mode="weight-only", weights=name, block=0, **options)
    return h.apply(model, assign, Qdq(), target=target).model


def wanted(name: str) -> h.Array:
    """The product with what the codec makes of the rows of the weight."""
    fmt = parse_format(name)
    granularity = Granularity.block(1, fmt.block) if fmt.block else Granularity.per_channel(0)
    rows = fmt.fake_quant(np.ascontiguousarray(W.T), granularity)
    return FEEDS["x"].astype(np.float64) @ rows.T


@pytest.mark.parametrize("name", FORMATS)
def test_the_model_computes_with_what_the_codec_gives(name: str) -> None:
    model = lowered(name, symmetric_weights=not name.startswith("uint"))
    assert h.relative_error(wanted(name), h.run(model, FEEDS)["y"]) < FLOAT32
    assert h.relative_error(wanted(name), h.run(model, FEEDS, optimised=True)["y"]) < FLOAT32
    assert not [v for v in model.graph.initializers.values() if v.const_value.size >= K * N
                and v.dtype == ir.DataType.FLOAT]  # fmt: skip


@pytest.mark.parametrize("name", ["nvfp4", "int3", "mx6"])
def test_a_weight_that_is_stored_transposed_is_read_alike(name: str) -> None:
    assert h.relative_error(wanted(name), h.run(lowered(name, GEMM), FEEDS)["y"]) < FLOAT32


def test_e4m3_codes_and_scales_are_those_of_ml_dtypes() -> None:
    rows = np.ascontiguousarray(W.T)
    scale = np.abs(rows).max(axis=1, keepdims=True) / 448
    values = (rows / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    exact = FEEDS["x"].astype(np.float64) @ values.T
    assert h.relative_error(exact, h.run(lowered("fp8e4m3"), FEEDS)["y"]) < FLOAT32


@pytest.mark.parametrize(
    ("name", "bits"),
    [("nvfp4", 4.5), ("mxfp4", 4.25), ("mxfp6e2m3", 6.25), ("int3g32", 4.0), ("ternary", 2.03)],
)
def test_bytes_are_those_of_the_format(name: str, bits: float) -> None:
    k, n = 1024, 512
    body = MATMUL.replace(str(K), str(k)).replace(str(N), str(n))
    model = h.model_of(body, {"w": h.normal(k, n)}, opset=21)
    after = h.apply(model, Assign(mode="weight-only", weights=name), Qdq()).model
    stored = sum(v.const_value.nbytes for v in after.graph.initializers.values())
    assert 8 * stored / (k * n) == pytest.approx(bits, rel=0.02)


def test_planes_add_up() -> None:
    assert [planes_of(b) for b in (3, 6, 7, 8, 16)] == [[2, 1], [4, 2], [4, 2, 1], [8], [8, 8]]


@pytest.mark.parametrize("target", ["cpu", "bare"])
def test_real_zero_points_make_a_grid_of_sixteen_levels_exact(target: str) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (N, 2, 32))
    codes[:, :, :2] = [0, 15]
    low, step = rng.normal(size=(N, 2, 1)), rng.uniform(0.01, 0.1, (N, 2, 1))
    w = np.ascontiguousarray((low + step * codes).reshape(N, 64).T.astype(np.float32))
    body = MATMUL.replace(str(K), "64")
    model = h.model_of(body, {"w": w}, opset=21)
    assign = Assign(mode="weight-only", weights="uint4", block=32, symmetric_weights=False)
    bare = Target("bare", "a runtime without MatMulNBits", forms=("blocked", "function"))
    to = bare if target == "bare" else target
    result = h.apply(model, assign, Hqq(), Qdq(), target=to)
    feeds = {"x": h.normal(6, 64, seed=2)}
    exact = feeds["x"].astype(np.float64) @ w
    assert h.relative_error(exact, h.run(result.model, feeds)["y"]) < 1e-5
    plain = h.apply(model, assign, Qdq(), target=to).model
    assert h.relative_error(exact, h.run(plain, feeds)["y"]) > 1e-3
    kinds = h.ops(result.model)
    assert kinds["MatMulNBits"] == (1 if target == "cpu" else 0)


def test_hqq_refuses_symmetric_weights() -> None:
    model = h.model_of(MATMUL, {"w": W}, opset=21)
    assign = Assign(mode="weight-only", weights="int4", block=32)
    with pytest.raises(UnsupportedError, match="zero point"):
        h.apply(model, assign, Hqq())


def test_an_old_opset_is_refused() -> None:
    model = h.model_of(MATMUL, {"w": W}, opset=13)
    with pytest.raises(PreconditionError, match=r"nvfp4 .*opset 19; the model has 13"):
        h.apply(model, Assign(mode="weight-only", weights="nvfp4"), Qdq())


def test_formats_without_integers_go_with_float_activations_only() -> None:
    with pytest.raises(SpecError, match="integer"):
        Assign(mode="static", weights="nvfp4")
    with pytest.raises(SpecError, match="blocks of 16"):
        Assign(mode="weight-only", weights="nvfp4", block=32)


def test_rounded_weights_of_any_format_survive_storage() -> None:
    from onnxq.passes.weights.rounded import RoundedWeight, RoundedWeights
    from onnxq.solvers.rtn import rtn

    for name in ("nvfp4", "kmeans4", "mx6", "ternary", "int4g16"):
        weight = RoundedWeight.of(rtn(np.ascontiguousarray(W.T), parse_format(name)))
        kept = RoundedWeights()
        kept.add("a", weight)
        back = RoundedWeights.from_storage(*kept.to_storage()).get("a")
        assert back is not None
        np.testing.assert_array_equal(back.values(), weight.values())
    assert ROUNDED.type is RoundedWeights
