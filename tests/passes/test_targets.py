"""Targets: what each of them gets, in nodes and types, and what is refused with which code."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import SpecError, UnsupportedError
from onnxq.passes.conform import check_input, check_output
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.decide.set_format import SetFormat
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.prepare.canonicalize import Canonicalize
from onnxq.passes.targets import TARGETS, parse_target

from . import helpers as h


def small(width: int = 128, opset: int = 13) -> ir.Model:
    """An embedding, a Conv and a MatMul, all of fixed shapes."""
    return h.model_of(
        """g (int64[1, 8] ids, float[1, 4, 8, 8] x) => (float[1, 8, 24] y, float[1, 8, 8, 8] c) {
            e = Gather(table, ids)
            y = MatMul(e, w)
            c = Conv <pads = [1, 1, 1, 1]> (x, k)
        }""",
        {
            "table": h.normal(300, width),
            "w": h.normal(width, 24, scale=0.1),
            "k": h.normal(8, 4, 3, 3, scale=0.2),
        },
        opset=opset,
    )


FEEDS: list[h.Feeds] = [
    {
        "ids": np.random.default_rng(seed).integers(0, 300, (1, 8)),
        "x": h.normal(1, 4, 8, 8, seed=seed),
    }
    for seed in range(4)
]


def quantized(target: str, width: int = 128, **options: Any) -> ir.Model:
    passes = (Canonicalize(), Calibrate(margin=1.0), Assign(**options), Qdq())
    return h.apply(small(width), *passes, samples=FEEDS, target=target).model


def dequantized_weights(model: ir.Model) -> dict[str, tuple[ir.Node, list[h.Array]]]:
    """DequantizeLinear of constants: by the type of the reader, the node and its three inputs."""
    found = {}
    for node in model.graph:
        constant = node.inputs and node.inputs[0] is not None and node.inputs[0].const_value
        if node.op_type == "DequantizeLinear" and constant:
            reader = next(iter(node.outputs[0].uses())).node.op_type
            arrays = [h.const(model, str(v.name)) for v in node.inputs if v is not None]
            found[reader] = (node, arrays)
    return found


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "genai"])
def test_static_models_run_and_are_close(target: str) -> None:
    done = quantized(target)
    exact, got = h.run(small(), FEEDS[0]), h.run(done, FEEDS[0])
    for name, array in exact.items():
        assert h.cosine(array, got[name]) > 0.999, name


def test_qnn_gets_unsigned_weights_and_one_scale_a_matmul() -> None:
    weights = dequantized_weights(quantized("qnn"))
    assert set(weights) == {"Conv", "MatMul", "Gather"}
    for reader, (_, (codes, scale, zero)) in weights.items():
        assert codes.dtype == np.uint8
        assert (zero == 128).all()
        assert scale.shape == zero.shape == ((8,) if reader == "Conv" else ())


def test_a_bias_in_integers_has_a_scale_of_the_rank_of_its_weights() -> None:
    """QNN (2.7) computes nonsense where a weight by tensor meets a bias by channel."""
    model = h.model_of(
        "g (float[1, 64] x) => (float[1, 16] y) { y = Gemm(x, w, b) }",
        {"w": h.normal(64, 16), "b": h.normal(16, seed=1, scale=3.0)},
    )
    feeds = [{"x": h.normal(1, 64, seed=s)} for s in range(4)]
    for target, shape in (("qnn", ()), ("cpu", (16,))):
        passes = (Calibrate(margin=1.0), Assign(), Qdq())
        done = h.apply(model, *passes, samples=feeds, target=target).model
        assert h.const(done, "y_bias_scale").shape == shape
        assert h.cosine(h.run(model, feeds[0])["y"], h.run(done, feeds[0])["y"]) > 0.999


def test_qnn_gathers_codes_between_two_pairs_that_change_nothing() -> None:
    done = quantized("qnn")
    (gather,) = (n for n in done.graph if n.op_type == "Gather")
    assert [n.op_type for n in gather.outputs[0].consumers()] == ["QuantizeLinear"]
    table, scale, zero = dequantized_weights(done)["Gather"][1]
    pair = next(iter(gather.outputs[0].uses())).node
    names = [str(v.name) for v in pair.inputs[1:] if v is not None]
    np.testing.assert_array_equal(h.const(done, names[0]), scale)
    np.testing.assert_array_equal(h.const(done, names[1]), zero)
    step = np.abs(h.const(small(), "table")).max() / 127
    assert scale == pytest.approx(step, rel=0.01)
    assert table.shape == (300, 128)


@pytest.mark.parametrize("opset", [13, 21])
def test_qnn_takes_sixteen_bits_below_opset_21_from_contrib_operators(opset: int) -> None:
    passes = (Canonicalize(), Calibrate(), Assign(activations="uint16"), Qdq())
    done = h.apply(small(opset=opset), *passes, samples=FEEDS, target="qnn").model
    assert done.opset_imports[""] == opset
    domains = {n.domain for n in done.graph if n.op_type == "QuantizeLinear"}
    assert ("com.microsoft" in domains) == (opset < 21)
    exact, got = h.run(small(), FEEDS[0]), h.run(done, FEEDS[0])
    assert h.cosine(exact["c"], got["c"]) > 0.9999


def test_qnn_needs_fixed_shapes_and_says_how_to_fix_them() -> None:
    free = h.model_of("g (float[batch, 4] x) => (float[batch, 4] y) { y = Relu(x) }")
    with pytest.raises(UnsupportedError) as caught:
        h.apply(free, Canonicalize(), target="qnn")
    assert caught.value.code == "TARGET-SHAPES"
    assert "`x`" in caught.value.cause
    assert "--dim_param batch" in caught.value.hint
    h.apply(h.fixed(free), Canonicalize(), target="qnn")


def test_tensorrt_gets_symmetric_int8_and_no_dynamic_quantization() -> None:
    done = quantized("tensorrt")
    zeros = [h.const(done, str(n.inputs[2].name)) for n in done.graph
             if n.op_type == "QuantizeLinear"]  # fmt: skip
    assert zeros
    assert all(z.dtype == np.int8 and z == 0 for z in zeros)
    assert all(arrays[0].dtype == np.int8 for _, arrays in dequantized_weights(done).values())
    with pytest.raises(UnsupportedError) as caught:
        quantized("tensorrt", mode="dynamic")
    assert caught.value.code == "TARGET-DYNAMIC"


@pytest.mark.parametrize(("width", "block"), [(128, 128), (256, 128), (192, 64)])
def test_tensorrt_gets_the_largest_block_that_divides_the_layer(width: int, block: int) -> None:
    done = quantized("tensorrt", width, mode="weight-only", weights="int4")
    assert done.opset_imports[""] == 21
    node, (_, scale, _) = dequantized_weights(done)["MatMul"]
    assert node.attributes["block_size"].as_int() == block
    assert scale.shape == (width // block, 24)
    exact, got = h.run(small(width), FEEDS[0]), h.run(done, FEEDS[0])
    assert h.cosine(exact["y"], got["y"]) > 0.98


def test_tensorrt_leaves_a_layer_that_no_block_divides_and_refuses_other_blocks() -> None:
    passes = (Canonicalize(), Assign(mode="weight-only", weights="int4"))
    report = h.report_of(h.apply(small(96), *passes, target="tensorrt"), "assign")
    assert "96 inputs are no multiple of 64 or 128" in h.reasons(report)
    with pytest.raises(UnsupportedError) as caught:
        quantized("tensorrt", mode="weight-only", weights="int4", block=32)
    assert caught.value.code == "TARGET-BLOCK"
    assert "64 or 128, not of 32" in caught.value.cause


def test_openvino_takes_int4_at_any_opset() -> None:
    done = quantized("openvino", mode="weight-only", weights="int4")
    assert done.opset_imports[""] == 13
    assert h.ops(done)["MatMulNBits"] == 1


@pytest.mark.parametrize(
    ("target", "options", "code"),
    [
        ("openvino", {"activations": "uint16"}, "TARGET-ACTIVATIONS"),
        ("openvino", {"weights": "uint8"}, "TARGET-WEIGHTS"),
        ("openvino", {"mode": "weight-only", "weights": "nf4"}, "TARGET-WEIGHTS"),
        ("openvino", {"embeddings": "int4"}, "TARGET-EMBEDDING"),
        ("tensorrt", {"activations": "uint8"}, "TARGET-ACTIVATIONS"),
        ("tensorrt", {"mode": "weight-only", "weights": "int3"}, "TARGET-WEIGHTS"),
        ("qnn", {"activations": "int8"}, "TARGET-ACTIVATIONS"),
        ("qnn", {"mode": "weight-only", "weights": "int4"}, "TARGET-WEIGHTS"),
        ("iree", {"mode": "weight-only", "weights": "int4"}, "TARGET-WEIGHTS"),
        ("iree", {"activations": "uint16"}, "TARGET-ACTIVATIONS"),
        ("tract", {"mode": "weight-only", "weights": "int4"}, "TARGET-WEIGHTS"),
        ("tract", {"activations": "uint16"}, "TARGET-ACTIVATIONS"),
        ("cpu", {"embeddings": "uint8"}, "TARGET-EMBEDDING"),
        ("cpu", {"embeddings": "int4g256"}, "TARGET-EMBEDDING"),
        ("web-webgpu", {"mode": "weight-only", "weights": "nvfp4"}, "TARGET-TYPE"),
    ],
)
def test_what_a_target_does_not_list_is_refused(
    target: str, options: dict[str, Any], code: str
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        quantized(target, **options)
    assert caught.value.code == code
    assert caught.value.hint


def test_an_int4_table_is_gathered_in_blocks_at_any_opset() -> None:
    done = quantized("cpu", embeddings="int4", mode="weight-only", weights="int8")
    assert h.ops(done)["GatherBlockQuantized"] == 1
    exact, got = h.run(small(), FEEDS[0]), h.run(done, FEEDS[0])
    assert h.cosine(exact["y"], got["y"]) > 0.98


def test_genai_needs_a_decoder_with_its_attention() -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_input(small(), parse_target("genai"))
    assert caught.value.code == "TARGET-NEEDS"
    assert "GroupQueryAttention" in caught.value.cause
    with pytest.raises(SpecError):
        parse_target("genie")


def test_set_format_raises_the_opset_too() -> None:
    passes = (
        Canonicalize(),
        Assign(mode="weight-only", weights="int4"),
        SetFormat(layers=("*",), format="nf4"),
        Qdq(),
    )
    model = h.model_of("g (float[1, 64] x) => (float[1, 8] y) { y = MatMul(x, w) }",
                       {"w": h.normal(64, 8)})  # fmt: skip
    done = h.apply(model, *passes).model
    assert done.opset_imports[""] == 19


# The final look ------------------------------------------------------------------------------


def pair(
    dtype: type[np.generic], zero: int, *, zero_rank: int = 0, constant: bool = False
) -> ir.Model:
    """DequantizeLinear of an input or of a constant, as somebody else may have written it."""
    kind = {np.int8: "int8", np.uint8: "uint8", np.int32: "int32", np.uint16: "uint16"}[dtype]
    source = "w" if constant else "x"
    return h.model_of(
        f"g ({kind}[1, 4] x) => (float[1, 4] y) {{ y = DequantizeLinear({source}, s, z) }}",
        {
            "s": np.array(0.1, np.float32),
            "z": np.full((1,) * zero_rank, zero, dtype),
            **({"w": np.ones((1, 4), dtype)} if constant else {}),
        },
        opset=21,
        ir_version=10,
    )


@pytest.mark.parametrize(
    ("model", "target", "code"),
    [
        (pair(np.int32, 0), "cpu", "TARGET-ZERO-POINT"),
        (pair(np.int8, 3, constant=True), "cpu", "TARGET-ZERO-POINT"),
        (pair(np.int8, 3), "tensorrt", "TARGET-ZERO-POINT"),
        (pair(np.uint8, 3, zero_rank=1), "web-webgpu", "TARGET-RANK"),
        (pair(np.uint8, 3), "tensorrt", "TARGET-TYPE"),
        (pair(np.uint16, 3), "openvino", "TARGET-TYPE"),
        (small_contrib := h.model_of(
            "g (float[1, 4] x) => (float[1, 4] y) { y = com.microsoft.Gelu(x) }"
        ), "openvino", "TARGET-OP"),
    ],
)  # fmt: skip
def test_the_final_look_names_node_and_operator(model: ir.Model, target: str, code: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_output(model, parse_target(target))
    assert caught.value.code == code
    assert "`y`" in caught.value.cause
    assert caught.value.details["op"] in caught.value.cause


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (pair(np.int8, 3), "cpu"),
        (pair(np.uint8, 3, constant=True), "cpu"),
        (pair(np.int8, 0, constant=True), "tensorrt"),
        (small_contrib, "cpu"),
    ],
)
def test_the_final_look_lets_pass_what_is_listed(model: ir.Model, target: str) -> None:
    check_output(model, parse_target(target))


def test_a_pipeline_ends_with_the_final_look() -> None:
    with pytest.raises(UnsupportedError) as caught:
        h.apply(small_contrib, Canonicalize(), target="tract")
    assert caught.value.code == "TARGET-OP"
    assert caught.value.details["node"] == "y"
