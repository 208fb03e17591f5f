"""``pack``: linear layers become QuantMatMul, which runs with the kernels and without them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest

from onnxq import custom_ops
from onnxq.custom_ops.packed_weight import PackedWeight, pack_table
from onnxq.errors import PreconditionError, SpecError
from onnxq.graph.edit import add_initializer
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.lower.pack import Pack
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.targets import Target
from onnxq.passes.weights.gptq import Gptq
from onnxq.runtime import session, usable_library

from .. import helpers as h

K, H, N = 96, 160, 40
MODEL = f"""g (float[B,T,{K}] x) => (float[B,T,{N}] y) {{
    a = MatMul(x, w1)  b = Add(a, b1)  c = Relu(b)
    flat = Reshape(c, shape)
    d = Gemm<transB = 1>(flat, w2, b2)
    y = Reshape(d, back) }}"""
WEIGHTS = {
    "w1": h.normal(K, H, seed=1, scale=0.1),
    "b1": h.normal(H, seed=2),
    "w2": h.normal(N, H, seed=3, scale=0.1),
    "b2": h.normal(N, seed=4),
    "shape": np.array([-1, H]),
    "back": np.array([2, 3, N]),
}
X = {"x": h.normal(2, 3, K, seed=5)}
W4 = Assign(mode="weight-only", weights="int4", block=32)
INT4_ERROR = 0.15
INT8_ERROR = 0.02
BODY_ERROR = 1e-5
HALF_ERROR = 5e-3


def model() -> ir.Model:
    return h.model_of(MODEL, WEIGHTS, opset=21)


def with_kernels(packed: ir.Model) -> np.ndarray:
    if usable_library() is None:
        pytest.skip("no kernels")
    source = ir.to_proto(packed).SerializeToString()
    result: np.ndarray = session(source, threads=1, library=True).run(None, X)[0]
    return result


@pytest.mark.parametrize(
    ("assign", "pack", "error"),
    [
        (W4, Pack(), INT4_ERROR),
        (W4, Pack(activations="float", scales="float32"), INT4_ERROR),
        (W4, Pack(scales="bfloat16"), INT4_ERROR),
        (W4, Pack(scales="integer"), INT4_ERROR),
        (W4, Pack(activations="int8-group"), INT4_ERROR),
        (
            Assign(mode="weight-only", weights="uint4", block=64, symmetric_weights=False),
            Pack(),
            INT4_ERROR,
        ),
        (Assign(mode="weight-only", weights="int8"), Pack(), INT8_ERROR),
        (Assign(mode="dynamic"), Pack(), INT8_ERROR),
    ],
)
def test_both_layers_are_packed_and_run_as_kernel_and_as_body(
    assign: Assign, pack: Pack, error: float
) -> None:
    before = model()
    after = h.apply(before, assign, pack).model
    assert h.ops(after)["QuantMatMul"] == 2
    assert not {"MatMul", "Gemm", "Add"} & set(h.ops(after))
    expected = h.run(before, X)["y"]
    body = h.run(after, X)["y"]
    assert h.relative_error(expected, body) < error
    assert h.relative_error(body, with_kernels(after)) < BODY_ERROR


@pytest.mark.parametrize(
    ("weights", "bits"),
    [("int8", 8), ("int6", 6), ("int4", 4), ("int3", 3), ("int2", 2), ("fp8e4m3", 8),
     ("fp8e5m2", 8), ("mxfp8e4m3", 8), ("mxfp6e2m3", 6), ("mxfp6e3m2", 6), ("mxfp4", 4),
     ("mxint8", 8), ("nvfp4", 4), ("nf4g32", 4), ("ternary", 2), ("binary", 1), ("seq2", 2)],
)  # fmt: skip
def test_every_format_takes_its_bits_and_runs(weights: str, bits: int) -> None:
    block = 0 if weights.startswith(("mx", "nv", "nf")) else 32
    after = h.apply(model(), Assign(mode="weight-only", weights=weights, block=block), Pack()).model
    codes = [v.const_value for name, v in after.graph.initializers.items() if "_codes" in name]
    assert len(codes) == 2
    # Whole panels of 32 columns and steps of four k, and not a bit more.
    padded = -(-H // 32) * 32 * K + -(-N // 32) * 32 * H
    assert sum(tensor.nbytes for tensor in codes if tensor is not None) * 8 == padded * bits
    body = h.run(after, X)["y"]
    assert h.relative_error(body, with_kernels(after)) < BODY_ERROR


def test_scales_by_group_are_closer_to_float_activations() -> None:
    """A column 200 times as large takes the steps of its own group alone."""
    x = {"x": X["x"].copy()}
    x["x"][..., 3] *= 200
    packs = (Pack(activations="float"), Pack(), Pack(activations="int8-group"))
    made = [h.apply(model(), W4, pack).model for pack in packs]
    exact, by_token, by_group = (h.run(packed, x)["y"] for packed in made)
    token_error = h.relative_error(exact, by_token)
    assert 0 < h.relative_error(exact, by_group) < token_error / 1.5


@pytest.mark.parametrize("options", [{"outliers": 6.0}, {"scales": "integer"}])
def test_scales_by_group_stand_alone(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="activations=int8-group") as caught:
        Pack(activations="int8-group", **options)
    assert caught.value.code == "SPEC-COMBINATION"


def rotated_model(second: str) -> ir.Model:
    """A rotation of x that two nodes read."""
    text = f"""g (float[B,T,{H}] x) => (float[B,T,{N}] y, float[B,T,Z] z) {{
        y = MatMul(x, w1) {second} }}"""
    weights = {"w1": h.normal(H, N, seed=1), "w2": h.normal(H, N, seed=2)}
    made = h.model_of(text, {w: array for w, array in weights.items() if w in text}, opset=21)
    custom_ops.attach(made, "Hadamard")
    x, readers = made.graph.inputs[0], list(made.graph)
    core = add_initializer(made.graph, "core", np.ones((1, 1), np.float32))
    node = custom_ops.make_node("Hadamard", [x, core], {"block": 32, "scale": 32**-0.5})
    node.outputs[0].name, node.outputs[0].type = "rotated", x.type
    for reader in readers:
        reader.replace_input_with(0, node.outputs[0])
    made.graph.insert_before(readers[0], node)
    return made


@pytest.mark.parametrize("activations", ["int8", "int8-group"])
def test_a_rotation_is_quantized_on_the_way(activations: Literal["int8", "int8-group"]) -> None:
    """Two products share it; the numbers are those of the operators apart, to the bit."""
    fused = h.apply(rotated_model("z = MatMul(x, w2)"), W4, Pack(activations=activations))
    apart = h.apply(
        rotated_model("z = MatMul(x, w2)"), W4, Pack(activations=activations, fuse_rotations=False)
    )
    assert h.ops(fused.model)["HadamardQuantize"] == 1
    assert h.ops(fused.model)["QuantMatMulInt8"] == 2
    assert not {"Hadamard", "QuantMatMul"} & set(h.ops(fused.model))
    assert any("one pass" in change.what for change in h.report_of(fused, "pack").changed)
    assert h.ops(apart.model)["Hadamard"] == 1
    assert h.ops(apart.model)["QuantMatMul"] == 2
    x = {"x": h.normal(2, 3, H, seed=5)}
    bodies = [h.run(result.model, x) for result in (fused, apart)]
    for name in ("y", "z"):
        assert h.relative_error(bodies[0][name], bodies[1][name]) < BODY_ERROR
    if usable_library() is None:
        pytest.skip("no kernels")
    made = [ir.to_proto(result.model).SerializeToString() for result in (fused, apart)]
    got = [session(source, threads=1, library=True).run(None, x) for source in made]
    for one, other in zip(*got, strict=True):
        assert np.array_equal(one, other)


def test_a_rotation_that_others_read_stays_apart() -> None:
    packed = h.apply(rotated_model("z = Relu(x)"), W4, Pack()).model
    assert h.ops(packed)["Hadamard"] == h.ops(packed)["QuantMatMul"] == 1
    assert h.ops(packed)["HadamardQuantize"] == 0


def test_integer_scales_add_little_to_the_error() -> None:
    """Stored as int16; away from float scales by less than a tenth of what INT4 itself costs."""
    packs = (Pack(scales="integer"), Pack(scales="float32"))
    made = [h.apply(model(), W4, pack).model for pack in packs]
    integer, exact = (h.run(packed, X)["y"] for packed in made)
    stored = [v.const_value for n, v in made[0].graph.initializers.items() if "_scales" in n]
    assert [tensor.dtype for tensor in stored if tensor is not None] == [ir.DataType.INT16] * 2
    assert 0 < h.relative_error(exact, integer) < INT4_ERROR / 10


def test_what_integer_scales_do_not_fit_stays_in_the_plan() -> None:
    wide = Assign(mode="weight-only", weights="int8", block=32)
    result = h.apply(model(), wide, Pack(scales="integer"))
    report = h.report_of(result, "pack")
    assert not report.changed
    assert len(report.skipped) == 2
    assert all("integer scales but for 4-bit" in skip.reason for skip in report.skipped)


def test_outliers_stay_float() -> None:
    """A column 200 times as large: apart, it no longer takes the steps of the others."""
    x = {"x": X["x"].copy()}
    x["x"][..., 3] *= 200
    plain = h.apply(model(), Assign(mode="dynamic"), Pack()).model
    apart = h.apply(model(), Assign(mode="dynamic"), Pack(outliers=50.0))
    assert h.ops(apart.model)["DynamicQuantMatMul"] == 2
    changes = h.report_of(apart, "pack").changed
    assert all("outliers from 50 on float" in change.what for change in changes)
    exact, errors = h.run(model(), x)["y"], []
    for packed in (plain, apart.model):
        errors.append(h.relative_error(exact, h.run(packed, x)["y"]))
    assert errors[1] < errors[0] / 2
    with pytest.raises(SpecError, match="outliers=-1"):
        Pack(outliers=-1.0)


def test_the_float_weights_go() -> None:
    after = h.apply(model(), W4, Pack()).model
    left = {v.name for v in after.graph.initializers.values() if v.dtype == ir.DataType.FLOAT}
    assert not {"w1", "w2"} & left
    stored = sum(v.const_value.nbytes for v in after.graph.initializers.values() if v.const_value)
    assert stored < 0.2 * sum(array.nbytes for array in WEIGHTS.values())


def test_solved_weights_are_taken() -> None:
    """GPTQ's codes give another result than rounding to nearest."""
    samples = [{"x": h.normal(2, 3, K, seed=seed)} for seed in range(4)]
    solved = h.apply(model(), W4, Calibrate(), Gptq(), Pack(), samples=samples).model
    nearest = h.apply(model(), W4, Pack()).model
    assert h.relative_error(h.run(nearest, X)["y"], h.run(solved, X)["y"]) > 1e-3
    assert h.relative_error(h.run(model(), X)["y"], h.run(solved, X)["y"]) < 2 * INT4_ERROR


def test_same_weights_as_qdq() -> None:
    """With float activations and scales the packed product is that of the dequantized weight."""
    asymmetric = Assign(mode="weight-only", weights="uint4", block=32, symmetric_weights=False)
    packed = h.apply(model(), asymmetric, Pack(activations="float", scales="float32")).model
    blocked = Target("blocked", "a runtime without MatMulNBits", forms=("blocked",))
    theirs = h.apply(model(), asymmetric, Qdq(), target=blocked).model
    assert h.ops(theirs)["DequantizeLinear"] == 2
    assert h.relative_error(h.run(theirs, X)["y"], h.run(packed, X)["y"]) < BODY_ERROR


def test_blocks_of_int4_take_signed_scales() -> None:
    """With the extreme on the lowest code, -8, the step is smaller than with it on 7."""
    packed = h.apply(model(), W4, Pack(activations="float", scales="float32")).model
    blocked = Target("blocked", "a runtime without MatMulNBits", forms=("blocked",))
    positive = h.apply(model(), W4, Qdq(), target=blocked).model
    exact = h.run(model(), X)["y"]
    errors = [h.relative_error(exact, h.run(made, X)["y"]) for made in (packed, positive)]
    assert errors[0] < errors[1]
    scales = [v.const_value for n, v in packed.graph.initializers.items() if "_scales" in n]
    assert all((tensor.numpy() < 0).any() for tensor in scales if tensor is not None)


def test_what_it_cannot_take_is_left_for_qdq() -> None:
    samples = [X]
    result = h.apply(model(), Calibrate(), Assign(), Pack(), Qdq(), samples=samples)
    assert h.ops(result.model)["QuantMatMul"] == 0
    assert h.ops(result.model)["QuantizeLinear"] > 0
    assert "fixed ranges; left in the plan for `qdq`" in h.reasons(h.report_of(result, "pack"))


def test_embeddings_are_left_for_qdq() -> None:
    text = (
        f"""g (int64[T] ids) => (float[T,{N}] y) {{ e = Gather(table, ids)  y = MatMul(e, w) }}"""
    )
    weights = {"table": h.normal(1024, K, seed=1), "w": h.normal(K, N, seed=2)}
    result = h.apply(h.model_of(text, weights, opset=21), W4, Pack(), Qdq())
    assert h.ops(result.model)["QuantMatMul"] == 1
    assert h.ops(result.model)["Gather"] == 2


def test_an_old_opset_is_refused_with_a_way_out() -> None:
    with pytest.raises(PreconditionError, match="needs opset 21"):
        h.apply(h.model_of(MODEL, WEIGHTS, opset=18), W4, Pack())


def pack_levels(levels: np.ndarray) -> PackedWeight:
    codes = np.arange(len(levels)).reshape(1, -1)
    return pack_table(
        codes, levels, np.ones((1, 1), np.float32), group=len(levels), int8_activations=False
    )


@pytest.mark.parametrize("levels", [np.arange(4) - 2.0, np.arange(16.0), np.arange(128) - 64.0])
def test_consecutive_levels_are_completed(levels: np.ndarray) -> None:
    """Narrow integers get the levels of the next width, in which kernels are fastest."""
    packed = pack_levels(levels.astype(np.float32))
    stored, zero = packed.inputs["levels"], packed.inputs["zero_points"]
    assert (np.diff(stored) == 1).all()
    assert np.array_equal(stored[: len(levels)] - int(zero.flat[0]), levels)


def test_fp8_on_both_sides_is_one_operator_where_the_target_multiplies_it() -> None:
    """As near as float16 around it lets be: a step of FP8 apart where it rounds to another side."""
    before = model()
    assign = Assign(mode="per-token", activations="fp8e4m3", weights="fp8e4m3")
    apart = h.apply(before, assign, Pack()).model
    assert h.ops(apart)["QuantMatMul"] == h.ops(apart)["QuantizeBlock"] == 2
    after = h.apply(before, assign, Pack(), target="cuda").model
    assert h.ops(after)["DynamicFloat8MatMul"] == 2
    assert not {"QuantMatMul", "QuantizeBlock"} & set(h.ops(after))
    expected = h.run(apart, X)["y"]
    assert h.relative_error(expected, h.run(after, X)["y"]) < 10 * HALF_ERROR
    assert h.relative_error(expected, with_kernels(after)) < 10 * HALF_ERROR


def test_fp8_in_blocks_of_128_has_a_scale_a_square() -> None:
    """Each weight is within half a step of its own; on the CPU there is no such product."""
    k, n = 640, 200
    w, x = h.normal(k, n, seed=3), h.normal(7, k, seed=4)
    text = f"g (float[T,{k}] x) => (float[T,{n}] y) {{ y = MatMul(x, w) }}"
    before = h.model_of(text, {"w": w}, opset=21)
    assign = Assign(mode="per-token", activations="fp8e4m3g128", weights="fp8e4m3", block=128)
    after = h.apply(before, assign, Pack(), target="cuda").model
    assert h.ops(after)["DynamicFloat8MatMul"] == 1
    (node,) = (node for node in after.graph if node.op_type == "DynamicFloat8MatMul")
    weight, scales = (v.const_value.numpy() for v in node.inputs[1:3])
    assert (weight.shape, scales.shape) == ((n, k), (2, 8))
    assert not scales[:, 5:].any()
    spread = np.repeat(np.repeat(scales[:, :5], 128, axis=0)[:n], 128, axis=1)
    error = np.abs(weight.astype(np.float32) * spread - w.T)
    assert (error <= np.maximum(np.abs(w.T) * 2.0**-4, spread * 2.0**-10) * 1.0001).all()
    assert np.abs(weight[:128, :128].astype(np.float32)).max() == 448
    exact = x.astype(np.float64) @ w
    assert 0.01 < h.relative_error(exact, h.run(after, {"x": x})["y"]) < 0.06
    apart = h.apply(before, assign, Pack()).model
    assert (h.ops(apart)["QuantMatMul"], h.ops(apart)["QuantizeBlock"]) == (1, 1)


@pytest.mark.parametrize("assign", [W4, Assign(mode="per-token", activations="int8")])
def test_products_for_cuda_take_float16(assign: Assign) -> None:
    """Casts around them; the rest of the model stays as it is."""
    before = model()
    after = h.apply(before, assign, Pack(), target="cuda").model
    products = [node for node in after.graph if node.op_type == "QuantMatMul"]
    assert len(products) == 2
    for node in products:
        assert node.inputs[0] is not None
        narrow, (wide,) = node.inputs[0].producer(), node.outputs[0].consumers()
        assert narrow is not None
        assert narrow.attributes["to"].as_int() == ir.DataType.FLOAT16
        assert wide.attributes["to"].as_int() == ir.DataType.FLOAT
    assert h.ops(after)["Cast"] == 4
    expected = h.run(h.apply(before, assign, Pack()).model, X)["y"]
    got = h.run(after, X)["y"]
    assert got.dtype == np.float32
    assert 0 < h.relative_error(expected, got) < HALF_ERROR
    assert h.relative_error(got, with_kernels(after)) < HALF_ERROR


def test_rotations_for_cuda_are_fused_too_and_take_no_casts() -> None:
    """What stays a QuantMatMul beside them takes float16."""
    fused = h.ops(h.apply(rotated_model("z = MatMul(x, w2)"), W4, Pack(), target="cuda").model)
    assert (fused["HadamardQuantize"], fused["QuantMatMulInt8"]) == (1, 2)
    assert "Cast" not in fused
    pack = Pack(fuse_rotations=False)
    apart = h.ops(h.apply(rotated_model("z = MatMul(x, w2)"), W4, pack, target="cuda").model)
    assert (apart["Hadamard"], apart["QuantMatMul"], apart["Cast"]) == (1, 2, 4)


@pytest.mark.parametrize(
    ("activations", "weights"), [("fp8e5m2", "fp8e4m3"), ("fp8e4m3", "int8"), ("int8", "int8")]
)
def test_other_formats_are_not_that_operator(activations: str, weights: str) -> None:
    assign = Assign(mode="per-token", activations=activations, weights=weights)
    after = h.apply(model(), assign, Pack(), target="cuda").model
    assert h.ops(after)["QuantMatMul"] == 2
