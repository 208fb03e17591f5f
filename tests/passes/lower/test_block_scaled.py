"""FP4 and FP8 weights in onnxruntime's products for CUDA: layout, values, and what stays out."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import onnxq
from onnxq.errors import UnsupportedError
from onnxq.formats import Granularity, parse_format
from onnxq.graph import io
from onnxq.passes.decide.assign import Assign
from onnxq.passes.lower.block_scaled import FP4, FP8, with_plain_products
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.prepare.canonicalize import Canonicalize

from .. import helpers as h

K, N = 80, 24
W = h.normal(K, N, seed=1, scale=0.3)
B = h.normal(N, seed=3)
MATMUL = f"g (float[R,{K}] x) => (float[R,{N}] y) {{ y = MatMul(x, w) }}"
BIASED = f"g (float[R,{K}] x) => (float[R,{N}] y) {{ p = MatMul(x, w) y = Add(p, b) }}"
GEMM = f"g (float[R,{K}] x) => (float[R,{N}] y) {{ y = Gemm<transB = 1>(x, w, b) }}"
FEEDS = {"x": h.normal(6, K, seed=2)}
FLOAT16 = 2e-3
"""Relative error of inputs, weights and results in float16."""

FP4_NAMES = ["nvfp4", "nvfp4-46", "mxfp4"]
FP8_NAMES = ["fp8e4m3", "fp8e4m3g16", "mxfp8e4m3"]


def lowered(name: str, w: h.Array = W, body: str = MATMUL, target: str = "cuda") -> ir.Model:
    text = body.replace(f",{K}]", f",{w.shape[0]}]").replace(f",{N}]", f",{w.shape[1]}]")
    given = {"w": np.ascontiguousarray(w.T) if body == GEMM else w, "b": B}
    used = {k: v for k, v in given.items() if k == "w" or body != MATMUL}
    model = h.model_of(text, used, opset=21)
    return h.apply(
        model, Assign(mode="weight-only", weights=name, block=0), Qdq(), target=target
    ).model


def rows(name: str, w: h.Array = W) -> h.Array:
    fmt = parse_format(name)
    granularity = Granularity.block(1, fmt.block) if fmt.block else Granularity.per_channel(0)
    return fmt.fake_quant(np.ascontiguousarray(w.T), granularity)


def product(model: ir.Model) -> tuple[ir.Node, list[h.Array]]:
    (node,) = (n for n in model.graph if n.domain == "com.microsoft")
    return node, [v.const_value.numpy() for v in node.inputs[1:] if v is not None]


@pytest.mark.parametrize("name", FP4_NAMES)
def test_fp4_bytes_are_in_the_layout_that_the_operator_documents(name: str) -> None:
    """Two codes a byte, the lower column in the low nibble; E4M3 bytes; one float32."""
    node, (codes, scale, factor) = product(lowered(name))
    block = node.attributes["block_size"].as_int()
    assert node.op_type == FP4
    assert block == (32 if name == "mxfp4" else 16)
    assert (codes.dtype, codes.shape) == (np.uint8, (N, K // 2))
    assert (scale.dtype, scale.shape) == (np.uint8, (N, -(-K // block)))
    assert (factor.dtype, factor.shape) == (np.float32, ())
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    e2m1 = np.concatenate([e2m1, -e2m1])
    wanted = rows(name)
    for n, k in np.ndindex(N, K):
        nibble = codes[n, k // 2] >> (4 * (k % 2)) & 15
        byte = scale[n, k // block : k // block + 1].view(ml_dtypes.float8_e4m3fn)
        got = e2m1[nibble] * float(byte[0]) * float(factor)
        assert got == pytest.approx(wanted[n, k], rel=1e-6)


@pytest.mark.parametrize("name", FP8_NAMES)
def test_fp8_codes_are_those_of_the_format(name: str) -> None:
    node, (codes, scale) = product(lowered(name))
    block = node.attributes["block_size"].as_int()
    assert node.op_type == FP8
    assert block == {"fp8e4m3": K, "fp8e4m3g16": 16, "mxfp8e4m3": 32}[name]
    assert (codes.dtype, codes.shape) == (ml_dtypes.float8_e4m3fn, (N, K))
    assert (scale.dtype, scale.shape) == (np.float32, (N, -(-K // block)))
    got = codes.astype(np.float32) * np.repeat(scale, block, axis=1)[:, :K]
    np.testing.assert_allclose(got, rows(name), rtol=1e-6)


@pytest.mark.parametrize("name", [*FP4_NAMES, *FP8_NAMES])
@pytest.mark.parametrize("body", [MATMUL, BIASED, GEMM])
def test_with_plain_products_the_model_computes_what_was_rounded(name: str, body: str) -> None:
    model = lowered(name, body=body)
    kinds = h.ops(model)
    assert kinds[FP4] + kinds[FP8] == 1
    assert kinds["Cast"] == 2
    assert not kinds["MatMul"] + kinds["Gemm"] + kinds["Add"]
    assert with_plain_products(model)
    assert not with_plain_products(model)
    exact = FEEDS["x"].astype(np.float64) @ rows(name).T + (0 if body == MATMUL else B)
    assert h.relative_error(exact, h.run(model, FEEDS)["y"]) < FLOAT16


def test_a_bias_that_float16_cannot_hold_is_refused() -> None:
    model = h.model_of(BIASED, {"w": W, "b": B * np.float32(1e6)}, opset=21)
    with pytest.raises(UnsupportedError, match=r"beyond float16"):
        h.apply(model, Assign(mode="weight-only", weights="nvfp4"), Qdq(), target="cuda")


def test_scales_that_e4m3_cannot_hold_are_decoded_by_standard_operators() -> None:
    for span, packed in ((17, True), (18, False)):
        w = np.full((64, 2), 6.0, np.float32)
        w[32:, 1] *= np.float32(2.0**-span)
        model = lowered("mxfp4", w)
        assert (h.ops(model)[FP4] == 1) == packed
        with_plain_products(model)
        x = {"x": h.normal(3, 64, seed=4)}
        assert h.relative_error(x["x"] @ rows("mxfp4", w).T, h.run(model, x)["y"]) < FLOAT16


def test_blocks_of_zeros_do_not_count_for_the_span() -> None:
    w = np.full((64, 2), 6.0, np.float32)
    w[32:, 1] = 0
    node, (codes, scale, _) = product(lowered("mxfp4", w))
    assert node.op_type == FP4
    assert scale[1, 1] == 0
    assert not codes[1, 16:].any()


def test_an_odd_number_of_inputs_is_left_to_standard_operators() -> None:
    assert h.ops(lowered("nvfp4", W[:79]))[FP4] == 0
    assert h.ops(lowered("fp8e4m3", W[:79]))[FP8] == 1


@pytest.mark.parametrize("name", [*FP4_NAMES, *FP8_NAMES])
def test_other_targets_do_not_get_operators_without_a_kernel(name: str) -> None:
    kinds = h.ops(lowered(name, target="cpu"))
    assert not kinds[FP4] + kinds[FP8]


@pytest.mark.parametrize("name", ["nvfp4", "fp8e4m3", "fp8e4m3g16"])
def test_onnxruntime_knows_the_operators_and_their_types(name: str) -> None:
    """Its schema is checked when the model loads; that there is no CPU kernel comes behind that."""
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    schemas = {s.name: s for s in state.get_all_operator_schema() if s.domain == "com.microsoft"}
    node, arrays = product(lowered(name))
    schema = schemas[node.op_type]
    allowed = {t.type_param_str: t.allowed_type_strs for t in schema.type_constraints}
    for entry, value in zip(schema.inputs, node.inputs, strict=False):
        if value is not None and value.dtype is not None:
            kind = {"FLOAT": "float", "FLOAT16": "float16", "UINT8": "uint8",
                    "FLOAT8E4M3FN": "float8e4m3fn"}[value.dtype.name]  # fmt: skip
            assert f"tensor({kind})" in allowed[entry.typeStr]
    assert set(node.attributes) <= set(schema.attributes)
    assert len(arrays) <= len(schema.inputs)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(
        Exception, match=r"(?i)not implemented|NOT_IMPLEMENTED|find an implementation|invalid"
    ) as caught:
        ort.InferenceSession(
            ir.to_proto(lowered(name)).SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
    assert node.op_type in str(caught.value)


def test_a_run_checks_what_the_output_holds_and_says_so(tmp_path: Path) -> None:
    source = io.save(h.model_of(MATMUL, {"w": W}, opset=21), tmp_path / "m.onnx").path
    samples = [{"x": h.normal(6, K, seed=s)} for s in range(4)]
    done = onnxq.run(
        source,
        "assign{mode=weight-only weights=nvfp4}, qdq",
        out=tmp_path / "out.onnx",
        calib=samples,
        target="cuda",
    )
    assert any("no CPU kernel" in text for text in done.warnings)
    assert done.comparison is not None
    assert done.comparison.latency is None
    exact = [x["x"].astype(np.float64) @ W for x in samples]
    rounded = [x["x"].astype(np.float64) @ rows("nvfp4").T for x in samples]
    bounds = [h.cosine(a, b) for a, b in zip(exact, rounded, strict=True)]
    (output,) = done.comparison.outputs
    assert min(bounds) - 1e-4 < output.cosine_mean < max(bounds) + 1e-4
    assert h.ops(io.load(tmp_path / "out.onnx"))[FP4] == 1
    assert done.comparison.candidate_bytes < 0.6 * done.comparison.reference_bytes


def test_canonicalize_knows_what_opset_the_target_needs() -> None:
    model = h.model_of(MATMUL, {"w": W}, opset=13)
    done = h.apply(
        model, Canonicalize(), Assign(mode="weight-only", weights="nvfp4"), Qdq(), target="cuda"
    )
    assert h.ops(done.model)[FP4] == 1
