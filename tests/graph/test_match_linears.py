"""Linear layers: each spelling, its axes and bias, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxq.graph.match import analyze, analyze_all, const_array, is_const

from . import match_helpers as mh

X = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)

MATMUL = """g (float[B, 3] x) => (float[B, 2] y)
<float[3,2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {10, 20}>"""

#: spelling -> (graph, kind, in_axis, out_axis, has bias, has separate Add)
SPELLINGS = {
    "matmul": (f"{MATMUL} {{ y = MatMul(x, w) }}", "matmul", 0, 1, False, False),
    "matmul, bias right": (
        f"{MATMUL} {{ h = MatMul(x, w)\n y = Add(h, b) }}",
        "matmul",
        0,
        1,
        True,
        True,
    ),
    "matmul, bias left": (
        f"{MATMUL} {{ h = MatMul(x, w)\n y = Add(b, h) }}",
        "matmul",
        0,
        1,
        True,
        True,
    ),
    "matmul behind transpose": (
        """g (float[B, 3] x) => (float[B, 2] y) <float[2,3] w = {1, 2, 3, 4, 5, 6}>
        { t = Transpose<perm = [1, 0]>(w)\n y = MatMul(x, t) }""",
        "matmul",
        1,
        0,
        False,
        False,
    ),
    "matmul behind two transposes": (
        f"""{MATMUL} {{ t = Transpose<perm = [1, 0]>(w)\n u = Transpose(t)\n y = MatMul(x, u) }}""",
        "matmul",
        0,
        1,
        False,
        False,
    ),
    "matmul, weight from a Constant through Identity": (
        """g (float[B, 3] x) => (float[B, 2] y)
        { c = Constant<value = float[3,2] {1, 2, 3, 4, 5, 6}>()
          w = Identity(c)\n y = MatMul(x, w) }""",
        "matmul",
        0,
        1,
        False,
        False,
    ),
    "gemm": (
        f"{MATMUL} {{ y = Gemm<alpha = 0.5, beta = 2.0>(x, w, b) }}",
        "gemm",
        0,
        1,
        True,
        False,
    ),
    "gemm transB": (
        """g (float[B, 3] x) => (float[B, 2] y)
        <float[2,3] w = {1, 2, 3, 4, 5, 6}, float[1,2] b = {10, 20}>
        { y = Gemm<transB = 1>(x, w, b) }""",
        "gemm",
        1,
        0,
        True,
        False,
    ),
    "gemm without C, then Add": (
        f"{MATMUL} {{ h = Gemm<alpha = 2.0>(x, w)\n y = Add(b, h) }}",
        "gemm",
        0,
        1,
        True,
        True,
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling_matches_and_computes_the_output(spelling: str) -> None:
    body, kind, in_axis, out_axis, has_bias, has_add = SPELLINGS[spelling]
    model = mh.model_from(body)
    structure = analyze(model)
    (linear,) = structure.linears
    assert (linear.kind, linear.in_axis, linear.out_axis) == (kind, in_axis, out_axis)
    assert (linear.in_features, linear.out_features) == (3, 2)
    assert (linear.bias is not None, linear.bias_add is not None) == (has_bias, has_add)
    assert linear.output.name == "y"
    assert not structure.rejected
    mh.check_against_runtime(model, structure, {"x": X})


#: what makes it none -> (graph, words of the reason, or "" when it is simply no linear layer)
NEGATIVES = {
    "two activations": (
        "g (float[2,3] x, float[3,2] w) => (float[2,2] y) { y = MatMul(x, w) }",
        "",
    ),
    "constant left": (
        "g (float[3,2] x) => (float[2,2] y) <float[2,3] w = {1,2,3,4,5,6}> { y = MatMul(w, x) }",
        "left operand",
    ),
    "batched weight": (
        """g (float[1,2,3] x) => (float[1,2,2] y) <float[1,3,2] w = {1,2,3,4,5,6}>
        { y = MatMul(x, w) }""",
        "rank 3",
    ),
    "integer weight": (
        """g (int32[2,3] x) => (int32[2,2] y) <int32[3,2] w = {1,2,3,4,5,6}>
        { y = MatMul(x, w) }""",
        "not floating point",
    ),
    "quantized weight": (
        """g (float[2,3] x) => (float[2,2] y)
        <int8[3,2] q = {1,2,3,4,5,6}, float s = {0.5}>
        { w = DequantizeLinear(q, s)\n y = MatMul(x, w) }""",
        "quantized already",
    ),
    "transA": (
        """g (float[3,2] x) => (float[2,2] y) <float[3,2] w = {1,2,3,4,5,6}>
        { y = Gemm<transA = 1>(x, w) }""",
        "transA",
    ),
    "another domain": (
        """g (float[2,3] x) => (float[2,2] y) <float[3,2] w = {1,2,3,4,5,6}>
        { y = com.microsoft.MatMul(x, w) }""",
        "",
    ),
    "weight may be overridden": (
        """g (float[2,3] x, float[3,2] w) => (float[2,2] y) <float[3,2] w = {1,2,3,4,5,6}>
        { y = MatMul(x, w) }""",
        "",
    ),
}


@pytest.mark.parametrize("case", NEGATIVES)
def test_near_miss_gives_its_reason(case: str) -> None:
    body, reason = NEGATIVES[case]
    structure = mh.structure_of(body)
    assert not structure.linears
    assert [reason in r for r in mh.reasons(structure, "linear")] == ([True] if reason else [])


@pytest.mark.parametrize(
    ("add", "operand"),
    [
        ("b", "float[1] b = {10}"),
        ("b", "float[2,1] b = {10, 20}"),
        ("b", "float[2,2] b = {1, 2, 3, 4}"),
    ],
)
def test_an_add_that_is_no_channel_bias_stays_outside(add: str, operand: str) -> None:
    structure = mh.structure_of(
        f"""g (float[2,3] x) => (float[2,2] y) <float[3,2] w = {{1,2,3,4,5,6}}, {operand}>
        {{ h = MatMul(x, w)\n y = Add(h, {add}) }}"""
    )
    (linear,) = structure.linears
    assert linear.bias_add is None
    assert linear.output.name == "h"


def test_an_output_that_is_read_twice_keeps_its_add_outside() -> None:
    structure = mh.structure_of(f"{MATMUL} {{ h = MatMul(x, w)\n r = Relu(h)\n y = Add(h, b) }}")
    assert structure.linears[0].bias_add is None


def test_conv_channels_groups_and_bias() -> None:
    structure = mh.structure_of(
        """g (float[1,4,5,4] x) => (float[1,4,5,4] z)
        <float[1,4,1,1] b = {1,2,3,4}, float[4] c = {1,2,3,4}>
        { k = Constant<value = float[4,1,1,1] {1,2,3,4}>()
          h = Conv<group = 4>(x, k)
          y = Add(b, h)
          k2 = Constant<value = float[4,2,1,1] {1,2,3,4,5,6,7,8}>()
          v = Conv<group = 2>(y, k2)
          z = Add(v, c) }"""
    )
    depthwise, grouped = structure.linears
    assert depthwise.is_depthwise
    assert (depthwise.groups, depthwise.in_features, depthwise.out_features) == (4, 4, 4)
    assert depthwise.bias_add is not None
    assert (grouped.groups, grouped.in_features, grouped.out_features) == (2, 4, 4)
    assert not grouped.is_depthwise
    assert grouped.bias_add is None, "c broadcasts over the width, not over the channels"


def test_initializers_listed_as_inputs_are_constant_before_ir_4() -> None:
    body = """g (float[2,3] x, float[3,2] w) => (float[2,2] y) <float[3,2] w = {1,2,3,4,5,6}>
    { y = MatMul(x, w) }"""
    old, new = mh.model_from(body, ir_version=3, opset=8), mh.model_from(body)
    assert len(analyze(old).linears) == 1
    assert analyze(old).linears[0].w.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert not analyze(new).linears
    weight = old.graph.initializers["w"]
    assert is_const(weight, 3)
    assert not is_const(weight, 4)
    assert const_array(weight) is None


def test_names_are_unique_and_stable() -> None:
    body = """g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}>
    { a = MatMul(x, w)\n b = MatMul(a, w)\n y = MatMul(b, w) }"""
    model = mh.model_from(body)
    nodes = list(model.graph)
    nodes[0].name, nodes[1].name, nodes[2].name = "same", "same", "own"
    names = [linear.name for linear in analyze(model).linears]
    assert names == ["a", "b", "own"]
    assert analyze(model).linears == analyze(model).linears
    assert all(linear.is_weight_shared for linear in analyze(model).linears)


def test_bodies_of_if_are_analyzed_with_captured_values() -> None:
    model = mh.model_from(
        """g (float[2,3] x, bool c) => (float[2,2] y) <float[3,2] w = {1,2,3,4,5,6}>
        { y = If (c) <
            then_branch = t () => (float[2,2] a) { a = MatMul(x, w) },
            else_branch = e () => (float[2,2] b) { h = MatMul(x, w)\n b = Relu(h) }> }"""
    )
    assert not analyze(model).linears
    per_graph = list(analyze_all(model))
    assert [len(s.linears) for s in per_graph] == [0, 1, 1]
    assert per_graph[1].linears[0].x is model.graph.inputs[0]
    assert per_graph[1].linears[0].is_weight_shared


def test_analysis_changes_nothing() -> None:
    model = mh.model_from(SPELLINGS["matmul behind transpose"][0])
    before = ir.to_proto(model).SerializeToString()
    for linear in analyze(model).linears:
        assert linear.w.shape == (2, 3)
    assert ir.to_proto(model).SerializeToString() == before
    onnx.checker.check_model(ir.to_proto(model))
