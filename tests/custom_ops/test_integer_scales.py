"""Integer Scale: group scales that are integers, sums over the groups in 32 bits."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxq import custom_ops
from onnxq.custom_ops.layout import unpack_codes, unpack_groups
from onnxq.custom_ops.packed_weight import PackedWeight, integer_levels, pack_table
from onnxq.errors import DataError, UnsupportedError
from onnxq.runtime import Library, session
from tests.custom_ops.cases import Array, Case, model_of, quantized_weight

OP = "QuantMatMul"
INT32_MAX = 2**31 - 1
N, K, GROUP = 40, 200, 32


def packed_weight(kind: str = "uint4", scale_type: str = "int16", k: int = K) -> PackedWeight:
    rng = np.random.default_rng(3)
    stored = "int16" if scale_type == "int16" else "float32"
    return quantized_weight(kind, N, k, GROUP, int8_activations=True, rng=rng, scale_type=stored)


def parts(packed: PackedWeight, n: int, k: int) -> tuple[list[list[int]], Array, int]:
    """Levels less zero points as Python integers ``[N][K]``, scales ``[N, G]``, the group."""
    group = int(packed.attributes["group"])
    level = packed.inputs["levels"][unpack_codes(packed.inputs["codes"], n, k)]
    scales = unpack_groups(packed.inputs["scales"], n)
    zero = np.broadcast_to(packed.inputs["zero_points"], packed.inputs["scales"].shape)
    level = level - np.repeat(unpack_groups(zero, n), group, axis=1)[:, :k]
    return [[int(v) for v in row] for row in level], scales, group


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512vnni"])
@pytest.mark.parametrize("rows", [1, 3, 8, 13])
def test_sums_are_those_of_python_integers(
    isa: str, rows: int, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa not in library.isa_levels:
        pytest.skip(f"this CPU has no {isa}")
    monkeypatch.setenv("ONNXQ_ISA", isa)
    packed = packed_weight()
    x = np.random.default_rng(4).integers(-127, 128, size=(rows, K)).astype(np.float32)
    x[:, 7] = 127  # each row's scale is 1: q = x
    level, scales, group = parts(packed, N, K)
    assert packed.inputs["zero_points"].any()
    factor = np.float32(packed.attributes["factor"])
    case = Case("integers", {"x": x}, packed.inputs, packed.attributes)
    got = session(model_of(OP, case), threads=1, library=True).run(None, case.inputs)[0]
    for m in range(rows):
        for c in range(N):
            exact = sum(int(x[m, k]) * level[c][k] * int(scales[c, k // group]) for k in range(K))
            bias = packed.inputs["bias"][c % len(packed.inputs["bias"])]
            assert got[m, c] == np.float32(np.float32(exact) * factor) + bias


def test_the_worst_activations_do_not_overflow(library: Library) -> None:
    """All codes and activations at their ends, and a bound that is nearly used up."""
    levels, _ = integer_levels(4, signed=True)
    k = 4096
    scale = np.random.default_rng(1).uniform(0.01, 0.02, size=(33, k // 32)).astype(np.float32)
    codes = np.zeros((33, k), np.uint8)
    packed = pack_table(codes, levels, scale, group=32, scale_type="int16", int8_activations=True)
    whole = unpack_groups(packed.inputs["scales"], 33).astype(np.int64)
    worst = (127 * 8 * 32 * whole).sum(axis=1)
    assert 0.9 * INT32_MAX < worst.max() <= INT32_MAX
    case = Case("worst", {"x": np.full((1, k), -1, np.float32)}, packed.inputs, packed.attributes)
    got = session(model_of(OP, case), threads=1, library=True).run(None, case.inputs)[0]
    assert np.allclose(got, scale.sum(axis=1) * 32 * 8, rtol=0.02)


def test_scales_are_rounded_by_at_most_half_a_step() -> None:
    exact, integer = packed_weight(scale_type="float32"), packed_weight()
    scale = unpack_groups(exact.inputs["scales"], N).astype(np.float64)
    stored = unpack_groups(integer.inputs["scales"], N).astype(np.float64)
    step = float(integer.attributes["factor"])
    assert integer.inputs["scales"].dtype == np.int16
    assert np.abs(stored * step - scale).max() <= 0.5001 * step
    assert 1e-6 < step / scale.max() < 0.01


@pytest.mark.parametrize(
    ("kind", "int8", "message"),
    [("int8", True, "integer scales but for 4-bit"), ("int4", False, "integer scales but for"),
     ("int3", True, "integer scales but for"), ("nf4", False, "integer scales but for")],
)  # fmt: skip
def test_other_weights_are_not_packed(kind: str, int8: bool, message: str) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UnsupportedError, match=message):
        quantized_weight(kind, 8, 64, 32, int8_activations=int8, rng=rng, scale_type="int16")


@pytest.mark.parametrize(
    ("small", "message"), [(1e-9, "smallest would round to zero"), (np.nan, "NaN or infinity")]
)
def test_scales_that_do_not_fit_are_not_packed(small: float, message: str) -> None:
    levels, _ = integer_levels(4, signed=True)
    scale = np.ones((2, 2), np.float32)
    scale[1, 1] = small
    with pytest.raises(UnsupportedError, match=message) as caught:
        pack_table(np.zeros((2, 64), np.uint8), levels, scale, group=32, scale_type="int16",
                   int8_activations=True)  # fmt: skip
    assert caught.value.code == "UNSUPPORTED-PACK"


def test_scales_of_zero_stay_zero() -> None:
    levels, _ = integer_levels(4, signed=True)
    packed = pack_table(np.zeros((2, 64), np.uint8), levels, np.zeros((2, 2), np.float32),
                        group=32, scale_type="int16", int8_activations=True)  # fmt: skip
    assert not packed.inputs["scales"].any()
    assert np.isfinite(packed.attributes["factor"])


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("int4", {"scales": 32767}, "integer scales of column 0 may overflow the sums of 32 bits"),
        ("int4", {"int8_activations": 0}, "integer scales need integer activations"),
        ("int4", {"exponent_scales": 1}, "as exponents"),
        ("int8", {"scales": 1}, "integer scales need integer activations and 4-bit levels"),
    ],
)
def test_kernels_refuse(kind: str, change: dict[str, int], message: str, library: Library) -> None:
    packed = packed_weight(kind, "int16" if kind == "int4" else "float32", k=4096)
    model = onnx.load_from_string(
        model_of(OP, Case(kind, {"x": np.zeros((1, 4096), np.float32)}, packed.inputs,
                          packed.attributes))
    )  # fmt: skip
    for attribute in model.graph.node[0].attribute:
        if attribute.name in change:
            attribute.i = change[attribute.name]
    for tensor in model.graph.initializer:
        if tensor.name == "scales" and "scales" in change:
            array = np.full(tuple(tensor.dims), change["scales"], np.int16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, "scales"))
    with pytest.raises(DataError, match=f"com.onnxq:{OP}: .*" + message):
        session(model.SerializeToString(), threads=1, library=library.path)


def test_outliers_stay_float_beside_integer_scales(library: Library) -> None:
    """DynamicQuantMatMul reads the same scales as numbers for its float columns."""
    packed = packed_weight("int4")
    x = np.random.default_rng(8).normal(size=(5, K)).astype(np.float32)
    x[:, 3] *= 50
    constants = {**packed.inputs, "outliers": np.array([9], np.int64)}
    case = Case("outliers", {"x": x}, constants, {**packed.attributes, "threshold": 6.0})
    op = "DynamicQuantMatMul"
    got = session(model_of(op, case), threads=1, library=True).run(None, case.inputs)[0]
    assert np.array_equal(got, case.reference(op)[0])
    body = session(model_of(op, case), threads=1, library=False).run(None, case.inputs)[0]
    assert np.allclose(got, body, atol=1e-5 * np.abs(body).max())
    assert custom_ops.get(op).inputs["scales"] == custom_ops.get(OP).inputs["scales"]
